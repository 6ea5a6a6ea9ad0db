"""The figure of a comparison: every pair of runs, and the interval, for each architecture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import polars as pl
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from arena.report.figure import STYLE
from arena.report.palette import Look, family_order, looks
from arena.report.svg import plain, save_figure

MOST_TASKS = 24
_GREY = "#777777"


def compare_figure(
    table: pl.DataFrame, labels: Mapping[tuple[str, str], str], path: Path, *, metric: str
) -> None:
    """Differences at the longest length that both have, a panel a task, architectures as rows.

    Args:
        table: of ``difference_table``, one metric.
        labels: short names of the tasks.
        path: of the PNG.
        metric: its name.
    """
    longest = table.filter(
        pl.col("eval_length") == pl.col("eval_length").max().over("task", "task_params")
    ).filter(pl.col("mean_difference").is_not_null())
    there = set(longest.select("task", "task_params").iter_rows())
    keys = [key for key in labels if key in there][:MOST_TASKS]
    styles = looks(longest["arm"])
    arms = {
        key: sorted(longest.filter(task=key[0], task_params=key[1])["arm"].unique(), key=family_order)
        for key in keys
    }
    heights = [0.26 * len(arms[key]) + 0.75 for key in keys] or [1.0]
    with matplotlib.rc_context({**STYLE, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(6.2, sum(heights) + 0.6), layout="constrained", dpi=160)
        axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights, sharex=True)[:, 0]
        for axis, key in zip(axes, keys, strict=False):
            cells = longest.filter(task=key[0], task_params=key[1])
            for place, arm in enumerate(arms[key]):
                _row(axis, place, cells.filter(arm=arm), styles[arm])
            axis.axvline(0, color=_GREY, linewidth=1.0, zorder=1)
            axis.set_yticks(range(len(arms[key])), [plain(arm) for arm in arms[key]])
            axis.set_ylim(len(arms[key]) - 0.4, -0.6)
            axis.tick_params(axis="y", length=0)
            axis.set_title(plain(f"{labels[key]}, length {cells['eval_length'][0]}"), fontsize=10)
        axes[-1].set_xlabel(f"{metric.replace('_', ' ')}: B less A")
        handles = [
            Line2D([], [], color=_GREY, marker="o", linestyle="", markersize=6, label="mean difference"),
            Line2D(
                [],
                [],
                color=_GREY,
                linewidth=2.2,
                alpha=0.5,
                label="95 % interval of the interquartile means",
            ),
            Line2D([], [], color=_GREY, marker="|", linestyle="", markersize=7, label="one pair of runs"),
        ]
        figure.legend(handles=handles, loc="outside lower left", ncols=2, fontsize=8)
        sns.despine(fig=figure)
        save_figure(figure, path)


def _row(axis: Axes, place: int, cell: pl.DataFrame, style: Look) -> None:
    row = cell.row(0, named=True)
    values = row["values"]
    axis.plot(values, [place] * len(values), "|", color=style.colour, markersize=7, alpha=0.7, zorder=2)
    if row["low"] is not None:
        axis.hlines(place, row["low"], row["high"], color=style.colour, linewidth=3.0, alpha=0.5, zorder=3)
    axis.plot(
        [row["mean_difference"]],
        [place],
        linestyle="",
        marker=style.marker,
        markersize=6,
        color=style.colour,
        markerfacecolor="white" if style.dashed else style.colour,
        zorder=4,
    )
