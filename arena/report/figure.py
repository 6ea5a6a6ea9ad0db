"""Figures: accuracy against length, one panel a task; and all of it as one heat map."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import polars as pl
import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from arena.report.palette import Look, family_order, looks
from arena.report.svg import plain, save_figure
from arena.report.tables import scores

STYLE = {
    **sns.axes_style("ticks"),
    **sns.plotting_context("notebook", font_scale=0.9),
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "svg.hashsalt": "arena",
}
SHADE = "#f1ede2"
_COLUMNS = 3
_RUNS_A_LINE = 40  # most single runs of an architecture in a panel
RUNS_A_FIGURE = 1500


def accuracy_figure(
    rows: pl.DataFrame,
    labels: Mapping[tuple[str, str], str],
    path: Path,
    *,
    title: str = "",
    styles: Mapping[str, Look] | None = None,
) -> None:
    """Accuracy against sequence length, a panel a task: means as lines, single runs as faint ones behind
    them.

    Args:
        rows: of one point a (task, architecture).
        labels: short names of the tasks.
        path: of the PNG.
        title: above the panels.
        styles: looks of the arms; None: those of the arms in ``rows``.
    """
    table = scores(rows)
    arms = sorted(table["arm"].unique(), key=family_order)
    styles = looks(arms) if styles is None else styles
    columns = min(_COLUMNS, len(labels))
    lines = -(-len(labels) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(4.1 * columns + 0.8 + 0.09 * max(12, *map(len, arms)), 3.9 * lines + 0.6),
            layout="constrained",
            dpi=160,
        )
        axes = figure.subplots(lines, columns, squeeze=False, sharey=True)
        for axis, key in zip(axes.flat, labels, strict=False):
            trained = rows.filter(task=key[0], task_params=key[1]).select(
                pl.col("train_length_min").min(), pl.col("train_length_max").max()
            )
            panel = table.filter(task=key[0], task_params=key[1])
            most = runs_drawn(len(labels), len(arms))
            _panel(axis, panel, {arm: styles[arm] for arm in arms}, trained.row(0), most)
            axis.set_title(plain(labels[key]))
        for axis in axes.flat[len(labels) :]:
            axis.set_visible(False)
        for axis in axes[:, 0]:
            axis.set_ylabel("accuracy")
        for axis in axes.flat[max(0, len(labels) - columns) : len(labels)]:
            axis.set_xlabel("sequence length")
        figure.legend(
            handles=_legend({arm: styles[arm] for arm in arms}),
            loc="outside right center",
            handlelength=2.6,
            labelspacing=0.55,
            fontsize=9.5,
        )
        if title:
            figure.suptitle(plain(title), x=0.01, ha="left", fontsize=12)
        sns.despine(fig=figure)
        save_figure(figure, path)


def runs_drawn(panels: int, arms: int) -> int:
    """How many single runs of an architecture a panel shows."""
    return max(3, min(_RUNS_A_LINE, RUNS_A_FIGURE // max(1, panels * arms)))


def some_runs(rows: pl.DataFrame, most: int) -> pl.DataFrame:
    """The rows of at most so many runs, evenly chosen from the worst to the best."""
    order = rows.group_by("run_id").agg(pl.col("accuracy").mean()).sort("accuracy", "run_id")["run_id"]
    if len(order) <= most:
        return rows
    places = np.linspace(0, len(order) - 1, most).round().astype(int)
    return rows.filter(pl.col("run_id").is_in(order.gather(places).implode()))


def drawn_runs(rows: pl.DataFrame, labels: Mapping[tuple[str, str], str]) -> tuple[int, int]:
    """How many single runs the figures of these tasks draw, and how many there are."""
    counts = (
        rows.filter(pl.col("reported"), pl.col("status") != "failed")
        .group_by("task", "task_params", "arm")
        .agg(pl.col("run_id").n_unique())
    )
    most = runs_drawn(len(labels), counts["arm"].n_unique())
    here = pl.concat([counts.filter(task=task, task_params=params)["run_id"] for task, params in labels])
    return int(here.clip(upper_bound=most).sum()), int(counts["run_id"].sum())


def _panel(
    axis: Axes, panel: pl.DataFrame, arms: Mapping[str, Look], trained: tuple[int, int], most: int
) -> None:
    lengths = sorted(panel["eval_length"].unique())
    axis.set_xscale("log", base=2)
    shortest, longest = trained
    axis.axvspan(shortest / 1.04, longest * 1.04, color=SHADE, zorder=0, linewidth=0)
    chance = panel.group_by("eval_length").agg(pl.col("chance").first()).sort("eval_length").drop_nulls()
    axis.plot(
        chance["eval_length"],
        chance["chance"],
        color="#888888",
        linestyle=(0, (1, 2)),
        linewidth=1.5,
        zorder=1,
    )
    # Models that tie would hide each other: each has its own place beside the length.
    gap = min((b / a for a, b in itertools.pairwise(lengths)), default=2.0)
    places = gap ** np.linspace(-0.16, 0.16, len(arms)) if len(arms) > 1 else [1.0]
    for (arm, style), place in zip(arms.items(), places, strict=True):
        mine = panel.filter(arm=arm).sort("eval_length")
        if mine.is_empty():
            continue
        for _, run in some_runs(mine, most).group_by("run_id", maintain_order=True):
            axis.plot(
                run["eval_length"] * place,
                run["accuracy"],
                color=style.colour,
                alpha=0.35,
                linewidth=0.8,
                marker=".",
                markersize=4,
                zorder=2,
            )
        mean = mine.group_by("eval_length").agg(pl.col("accuracy").mean()).sort("eval_length")
        axis.plot(
            mean["eval_length"] * place,
            mean["accuracy"],
            **pen(style),
            zorder=4,
        )
    axis.set_xlim(lengths[0] / gap**0.55, lengths[-1] * gap**0.4)
    axis.set_xticks(lengths, [str(length) for length in lengths])
    axis.minorticks_off()
    axis.set_ylim(-0.03, 1.05)
    axis.set_yticks([0, 0.25, 0.5, 0.75, 1.0])


def pen(style: Look) -> dict[str, Any]:
    """The properties of an arm's line."""
    return {
        "color": style.colour,
        "marker": style.marker,
        "markersize": 5.5,
        "markerfacecolor": "white" if style.dashed else style.colour,
        "markeredgecolor": style.colour,
        "markeredgewidth": 1.2,
        "linestyle": (0, (4, 1.6)) if style.dashed else "-",
        "linewidth": 1.5,
    }


def _legend(arms: Mapping[str, Look]) -> list[Artist]:
    handles: list[Artist] = [Line2D([], [], label=plain(arm), **pen(style)) for arm, style in arms.items()]
    handles.append(Line2D([], [], label="one run", color="#555555", alpha=0.4, linewidth=0.8))
    handles.append(Line2D([], [], label="chance", color="#888888", linestyle=(0, (1, 2)), linewidth=1.5))
    handles.append(Patch(label="trained lengths", facecolor=SHADE))
    return handles


def overview_figure(
    table: pl.DataFrame, labels: Mapping[tuple[str, str], str], path: Path, *, title: str = ""
) -> None:
    """Mean accuracy of every architecture (rows) at every task and length (columns), as a heat map with
    numbers.

    Args:
        table: of ``accuracy_table``, one point a (task, architecture).
        labels: short names of the tasks.
        path: of the PNG.
        title: above the map.
    """
    arms = sorted(table["arm"].unique(), key=family_order)
    spans = {
        key: sorted(table.filter(task=key[0], task_params=key[1])["eval_length"].unique()) for key in labels
    }
    width = sum(len(lengths) for lengths in spans.values())
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(
            figsize=(0.62 * width + 1.6 + 0.085 * max(12, *map(len, arms)), 0.36 * len(arms) + 1.6),
            layout="constrained",
            dpi=160,
        )
        axes = figure.subplots(
            1, len(labels), squeeze=False, width_ratios=[len(spans[key]) for key in labels]
        )[0]
        for position, (axis, key) in enumerate(zip(axes, labels, strict=True)):
            cells = table.filter(task=key[0], task_params=key[1])
            colours = np.full((len(arms), len(spans[key])), np.nan)
            for arm, length, mean, scaled, solved, runs in cells.select(
                "arm", "eval_length", "mean", "chance_scaled", "solved", "runs"
            ).iter_rows():
                row, column = arms.index(arm), spans[key].index(length)
                colours[row, column] = max(0.0, scaled)
                ink = "white" if scaled > 0.55 else "#333333"
                where = {"ha": "center", "va": "center", "color": ink}
                axis.text(column + 0.5, row + 0.38, f"{mean:.2f}", fontsize=9, **where)
                axis.text(column + 0.5, row + 0.75, f"{solved}/{runs}", fontsize=6.5, alpha=0.85, **where)
            sns.heatmap(
                colours,
                ax=axis,
                vmin=0,
                vmax=1,
                cmap=sns.light_palette("#1b4f72", as_cmap=True),
                cbar=False,
                linewidths=1.2,
                linecolor="white",
                xticklabels=spans[key],
                yticklabels=[plain(arm) for arm in arms] if position == 0 else False,
            )
            axis.set_title(plain(labels[key], max(8, 7 * len(spans[key]))), fontsize=9)
            axis.set_xlabel("sequence length")
            axis.tick_params(length=0, rotation=0)
        figure.supxlabel(
            "number: mean accuracy; below it: runs that solved the length;"
            + ("\n" if width < 9 else " ")
            + "colour: from chance to perfect",
            x=0.01,
            ha="left",
            fontsize=8,
            color="#666666",
        )
        if title:
            figure.suptitle(plain(title), x=0.01, ha="left", fontsize=12)
        save_figure(figure, path)
