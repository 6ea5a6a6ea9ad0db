"""Sections about the search: was the budget enough, how does the score depend on the parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from arena.report.document import Section
from arena.report.evidence_tables import (
    INDEX,
    TUNED,
    best_of_n_table,
    importance_table,
    panel_table,
    window_table,
)
from arena.report.palette import Look
from arena.report.verdicts import LEARNED

FEW_TRIALS = 32
"""Importances of fewer trials are noise: see the caption."""

_BEST_OF_N = (
    "Expected best score on valid of n of the N paired search points: unbiased (Tang et al. 2020, arXiv "
    "2004.13705) and with replacement (Dodge et al. 2019, arXiv 1909.03004). A curve that still rises at "
    "N/2 asks for more trials; beyond N/2 neither estimator is to be trusted. Bands are bootstrapped over "
    "the points and under-cover: nominal 95 %, in simulations 88 to 95 % at n <= N/8 and 76 to 94 % at "
    "N/2."
)
_RESPONSE = (
    "Every trial of every stage, at its own values of the other parameters. A best point at the edge of "
    "the range, or a slope that has not turned, means that the range was too narrow."
)
_PANEL = (
    "Mean score on valid over the seeds at each rate, everything else at its default. Window: where it "
    "stays within 5 % of its best, around the best, linear in log lr between the rates; >=: it reaches "
    "the end of the panel."
)
_IMPORTANCE = (
    "Share of each parameter in what separates good trials from all, by Optuna's PED-ANOVA (Watanabe et "
    "al. 2023, arXiv 2304.10255). ?: under 32 trials, where it is mostly noise: of a function of the rate "
    "alone in a space of five parameters it named the rate first in 8 % of simulated studies of 8 "
    "points, 65 % of 16 and all of 32."
)


@dataclass(frozen=True, kw_only=True)
class Context:
    """What all sections of the evidence need."""

    directory: Path
    """The result folder; figures go to its ``report``."""
    labels: Mapping[tuple[str, str], str]
    """(task, task_params) -> short name, in the order of the tables."""
    styles: Mapping[str, Look]
    """Looks of the arms, in the order of the tables."""
    frames: dict[str, pl.DataFrame] = field(default_factory=dict)
    """Filled by the sections: the tables that are written."""

    def figure(self, name: str) -> Path:
        """Where a figure is written."""
        return self.directory / "report" / f"{name}.png"

    def ordered(self, table: pl.DataFrame) -> list[dict[str, Any]]:
        """The rows of a table by task and arm, in the order of labels and styles."""
        tasks = {key: place for place, key in enumerate(self.labels)}
        arms = {arm: place for place, arm in enumerate(self.styles)}
        return sorted(
            (row for row in table.iter_rows(named=True) if (row["task"], row["task_params"]) in tasks),
            key=lambda row: (tasks[row["task"], row["task_params"]], arms.get(row["arm"], len(arms))),
        )

    def heads(self, row: Mapping[str, Any]) -> list[str]:
        """The first two cells of a row: architecture and task."""
        return [row["arm"], self.labels[row["task"], row["task_params"]]]


def best_of_n_section(points: pl.DataFrame, context: Context) -> Section | None:
    """The expected best of n trials: curves and a table; None without search points."""
    from arena.report.evidence_figure import best_of_n_figure

    table = best_of_n_table(points)
    if table.is_empty():
        return None
    context.frames["best_of_n"] = table
    path = context.figure("best_of_n")
    best_of_n_figure(table, context.labels, context.styles, path)
    rows = []
    firsts = table.group_by(INDEX).agg(pl.col("points").first())
    for cell in context.ordered(firsts):
        curve = table.filter(**{name: cell[name] for name in INDEX}).sort("n")
        total = cell["points"]
        half = curve.row(max(1, total // 2) - 1, named=True)
        band = (
            f" [{half['unbiased_low']:.3f}, {half['unbiased_high']:.3f}]"
            if half["unbiased_low"] == half["unbiased_low"]  # NaN: no width
            else ""
        )
        rows.append(
            [
                *context.heads(cell),
                f"{curve['unbiased'][0]:.3f}",
                f"{half['unbiased']:.3f}{band}",
                f"{half['replaced']:.3f}",
                f"{curve['unbiased'][-1]:.3f}",
                str(total),
            ]
        )
    return Section(
        heading="Was the budget enough: expected best of n trials",
        figures=[path],
        columns=["architecture", "task", "n = 1", "n = N/2 [95 % band]", "with replacement", "n = N", "N"],
        rows=rows,
        caption=_BEST_OF_N,
    )


def response_section(points: pl.DataFrame, winners: pl.DataFrame, context: Context) -> Section | None:
    """Score against learning rate of every trial; None without trials."""
    from arena.report.evidence_figure import response_figure

    tuned = points.filter(pl.col("stage").is_in(TUNED))
    if tuned.is_empty():
        return None
    if winners.is_empty():  # not chosen yet: the best so far
        winners = tuned.group_by(INDEX, maintain_order=True).first()
    path = context.figure("response")
    response_figure(tuned, winners.select(*INDEX, "trial"), context.labels, context.styles, path)
    return Section(
        heading="Score against learning rate",
        figures=[path],
        caption=_RESPONSE,
    )


def panel_section(rows: pl.DataFrame, metric: str, lengths: list[int], context: Context) -> Section | None:
    """The sensitivity panel; None where there is none."""
    from arena.report.evidence_figure import panel_figure

    panel = panel_table(rows, metric, lengths)
    if panel.is_empty():
        return None
    windows = window_table(panel)
    context.frames.update({"panel": panel, "window": windows})
    path = context.figure("panel")
    scaled = window_table(panel_table(rows, "chance_scaled_accuracy")).filter(pl.col("best") < LEARNED)
    panel_figure(panel, windows.join(scaled, on=INDEX, how="anti"), context.labels, context.styles, path)
    idle = set(scaled.select(INDEX).iter_rows())
    table = []
    for row in context.ordered(windows):
        nothing = tuple(row[name] for name in INDEX) in idle
        wider = ">= " if row["open_low"] or row["open_high"] else ""
        table.append(
            [
                *context.heads(row),
                f"{row['best']:.3f}",
                f"{row['best_lr']:.2g}",
                "not learned" if nothing else f"{row['low_lr']:.2g} to {row['high_lr']:.2g}",
                "-" if nothing else f"{wider}{row['decades']:.2f}",
                f"{row['window_mean']:.3f}",
                f"{row['panel_mean']:.3f}",
                f"{row['rates']} x {row['seeds']}",
            ]
        )
    return Section(
        heading="Sensitivity to the learning rate",
        figures=[path],
        columns=[
            "architecture", "task", "best", "at lr", "window", "decades", "mean over window",
            "mean over rates", "rates x seeds",
        ],
        rows=table,
        caption=_PANEL,
    )  # fmt: skip


def importance_section(studies: Mapping[tuple[str, str, str], Any], context: Context) -> Section | None:
    """Parameter importances of the studies; None where none says anything."""
    table = importance_table(studies)
    if table.is_empty():
        return None
    context.frames["importance"] = table
    names = list(dict.fromkeys(table["parameter"].sort()))
    rows = []
    for cell in context.ordered(table.group_by(INDEX).agg(pl.col("trials").first())):
        mine = table.filter(**{name: cell[name] for name in INDEX})
        shares = dict(mine.select("parameter", "importance").iter_rows())
        mark = "?" if cell["trials"] < FEW_TRIALS else ""
        rows.append(
            [
                *context.heads(cell),
                *(f"{shares[name]:.2f}{mark}" if name in shares else "-" for name in names),
                str(cell["trials"]),
            ]
        )
    return Section(
        heading="Parameter importances",
        columns=["architecture", "task", *names, "trials"],
        rows=rows,
        caption=_IMPORTANCE,
    )
