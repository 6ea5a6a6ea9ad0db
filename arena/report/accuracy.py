"""Sections about what was measured on test: accuracies by length, run by run, and over all tasks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from arena.report.document import Section
from arena.report.palette import Look, family_order
from arena.report.routing import routing_section, routing_table
from arena.report.tables import (
    SOLVED,
    accuracy_table,
    budget_table,
    chosen_points,
    overall_table,
)
from arena.statistics import MIN_UNITS

DRAWN_TASKS = 12
"""Tasks in a figure."""
LISTED_TASKS = 60
"""Tasks with a table in the report."""
RUN_PANELS = 80
"""Panels in the figure of the single runs."""

_BUDGET = ("parameters", "state bytes", "tokens", "unmatched")


def accuracy_sections(
    tested: pl.DataFrame,
    labels: dict[tuple[str, str], str],
    styles: dict[str, Look],
    folder: Path,
    title: str,
) -> tuple[list[Section], dict[str, pl.DataFrame], list[str]]:
    """What was measured on test.

    Args:
        tested: rows of the runs that are reported.
        labels: short names of the tasks, in the order of the file.
        styles: looks of the arms.
        folder: for the figures.
        title: of the report.

    Returns:
        The sections, the tables by name, and what a reader has to know of them.
    """
    from arena.report.figure import accuracy_figure, drawn_runs, overview_figure
    from arena.report.runs_figure import runs_figure
    from arena.report.surfaces import surface_sections

    points = chosen_points(tested)
    keys = ["task", "task_params", "arm", "trial"]
    best = tested.join(points.select(keys), on=keys, how="semi")
    frames = {
        "accuracy": accuracy_table(tested),
        "overall": overall_table(best),
        "budget": budget_table(best),
    }
    chosen = frames["accuracy"].join(points.select(keys), on=keys, how="semi")
    there = set(chosen.select("task", "task_params").iter_rows())
    labels = {key: label for key, label in labels.items() if key in there}
    drawn = dict(list(labels.items())[:DRAWN_TASKS])
    listed = dict(list(labels.items())[:LISTED_TASKS])
    notes = []
    if (points["points"] > 1).any():
        notes.append(
            "Of several learning rates or weight decays, the one that is best on split valid is shown, "
            "for each architecture and task; all are in accuracy.csv."
        )
    if len(labels) > len(drawn):
        notes.append(
            f"LEFT OUT: {len(labels)} tasks and settings are too many to show: figures show the first "
            f"{len(drawn)}, tables here the first {len(listed)}; all are in accuracy.csv."
        )
    shown, runs = drawn_runs(best, drawn)
    if shown < runs:
        notes.append(
            f"LEFT OUT: figures draw the curves of {shown:,} of {runs:,} single runs, evenly chosen from the "
            "worst to the best of each architecture; means and tables are of all."
        )
    names = ("accuracy", "overview", "runs")
    figures = [folder / f"{name}.png" for name in names]
    accuracy_figure(best, drawn, figures[0], title=title, styles=styles)
    overview_figure(chosen, drawn, figures[1], title=title)
    tasks = max(1, RUN_PANELS // chosen["arm"].n_unique())
    runs_figure(best, dict(list(drawn.items())[:tasks]), styles, figures[2])
    sections = [Section(heading="Accuracy over sequence length", figures=figures[:2], quiet=True)]
    sections += [
        replace(_task_section(chosen, frames["budget"], key, label), part=True)
        for key, label in listed.items()
    ]
    if len(labels) > 1:
        sections.append(replace(_overall_section(frames["overall"]), part=True))
    sections[-1] = replace(sections[-1], caption=_LEGEND)
    sections.append(Section(heading="Run by run", figures=figures[2:], caption=_RUNS, quiet=True))
    if tasks < len(drawn):
        sections[-1] = replace(sections[-1], lines=[f"Too many panels: the first {tasks} tasks are drawn."])
    routing = routing_table(best)
    experts = routing_section(routing, labels)
    if experts is not None:
        sections.append(experts)
        frames["routing"] = routing
    surfaces, table = surface_sections(chosen, folder, styles)
    if not table.is_empty():
        frames["surfaces"] = table
    return sections + surfaces, frames, notes


def _params(cost: dict[str, Any]) -> str:
    active = cost["active_params"]
    tail = f" ({active:,} active)" if active not in (None, cost["params"]) else ""
    return f"{cost['params']:,}{tail}"


_RUNS = (
    "A panel an architecture and task: each line is one run, in grey the means of the other architectures. "
    "Mean accuracy hides runs that either solve a task or do not."
)
_LEGEND = (
    f"A cell: mean accuracy over the runs (lowest..highest run) solved/runs; from {MIN_UNITS} runs on, "
    "interquartile mean [its 95 % bootstrap interval] instead of mean and range. "
    "A run solves a length when its chance-scaled accuracy, (accuracy - chance) / (1 - chance), is at least "
    f"{SOLVED}. "
    "Exact solve-rate intervals, chance-scaled and whole-sequence accuracy: accuracy.csv. "
    "State bytes: what one sequence carries at the longest length. "
    "Unmatched: differs from the median architecture (parameters, tokens: by over 2 %)."
)


def _task_section(table: pl.DataFrame, budget: pl.DataFrame, key: tuple[str, str], label: str) -> Section:
    """Architectures by length, the best at the longest length first."""
    cells = table.filter(task=key[0], task_params=key[1])
    costs = {row["arm"]: row for row in budget.filter(task=key[0], task_params=key[1]).iter_rows(named=True)}
    lengths = sorted(cells["eval_length"].unique())
    longest = dict(cells.filter(eval_length=lengths[-1]).select("arm", "mean").iter_rows())
    rows = []
    for arm in sorted(
        cells["arm"].unique(), key=lambda name: (-round(longest.get(name, 0.0), 2), family_order(name))
    ):
        texts = []
        for length in lengths:
            found = cells.filter(arm=arm, eval_length=length).to_dicts()
            texts.append(" ".join(_accuracy_text(cell) for cell in found) or "-")
        cost = costs[arm]
        rows.append(
            [
                arm,
                *texts,
                _params(cost),
                f"{cost['state_bytes']:,}",
                f"{cost['train_tokens']:,}",
                cost["unmatched"] or "",
            ]
        )
    chance = (
        cells.group_by("eval_length").agg(pl.col("chance").first()).sort("eval_length")["chance"].to_list()
    )
    rows.append(
        ["chance", *(f"{value:.2f}" if value is not None else "-" for value in chance), "", "", "", ""]
    )
    seen = set(cells.filter(split="train")["eval_length"])
    heads = [f"length {length}{'*' if length in seen else ''}" for length in lengths]
    columns = ["architecture", *heads, *_BUDGET]
    return Section(heading=label, columns=columns, rows=rows, wide=len(_BUDGET))


def _accuracy_text(cell: dict[str, Any]) -> str:
    if cell["runs"] == 1:
        return f"{cell['mean']:.2f}"
    solved = f"{cell['solved']}/{cell['runs']}"
    if cell["iqm_low"] is not None:
        return f"{cell['iqm']:.2f} [{cell['iqm_low']:.2f}, {cell['iqm_high']:.2f}] {solved}"
    return f"{cell['mean']:.2f} ({cell['min']:.2f}..{cell['max']:.2f}) {solved}"


def _overall_section(overall: pl.DataFrame) -> Section:
    rows = []
    for row in overall.iter_rows(named=True):
        if row["low"] is not None:
            spread = f"{row['iqm']:z.2f} [{row['low']:z.2f}, {row['high']:z.2f}]"
        else:
            spread = f"{row['min']:z.2f}..{row['max']:z.2f}"
        solved = f"{row['solved']}/{row['units']} [{row['solve_low']:.2f}, {row['solve_high']:.2f}]"
        rows.append([row["arm"], f"{row['mean']:z.2f}", spread, solved])
    return Section(
        heading="all tasks, each at its longest length",
        columns=[
            "architecture",
            "chance-scaled accuracy",
            "range, or IQM [interval]",
            "solved [95 % interval]",
        ],
        rows=rows,
    )
