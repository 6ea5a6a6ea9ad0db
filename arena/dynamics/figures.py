"""Figures of a study, one for each family of measurements: a row of panels for each task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import polars as pl
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from arena.dynamics import panels
from arena.dynamics.effects import NEAR_MINUS_ONE
from arena.dynamics.study import Tables
from arena.report.palette import family_order, looks
from arena.report.svg import plain, save_figure

_STYLE = {
    **sns.axes_style("ticks"),
    **sns.plotting_context("notebook", font_scale=0.85),
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "axes.grid.axis": "x",
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
}


def draw_figures(tables: Tables, labels: dict[tuple[str, str], str], folder: Path) -> dict[str, Path]:
    """Draw what there is to draw; name -> PNG in ``folder``.

    Args:
        tables: of a study.
        labels: (task, task_params) -> short name, in the order to show them in.
        folder: exists.
    """
    longest = tables.runs.group_by("task", "task_params").agg(length=pl.col("length").max())
    measured = tables.measurements.join(longest.lazy(), on=["task", "task_params", "length"], how="semi")
    small = Tables(tables.runs, measured, *tables[2:])
    families: dict[str, list[tuple[str, panels.Panel]]] = {
        "gates": [
            (gate, panels.gate_panel(small, gate))
            for gate in ("decay", "erase", "write", "angle")
            if gate != "angle" or _is_measured(measured, gate)  # few memories turn
        ],
        "eigenvalues": [("least eigenvalue of a head's transition", panels.eigenvalue_panel(small, longest))],
        "retention": [
            ("half-life of a head by its decay, tokens", panels.half_life_panel(small)),
            ("weight of a token in a read, by its age", panels.age_panel(small)),
        ],
        "state": [
            ("Frobenius norm of the memory", panels.token_panel(small, "state_frobenius")),
            ("effective rank of the memory", panels.token_panel(small, "state_effective_rank")),
        ],
        "edit": [
            ("old value left", panels.head_panel(small, "old_value_left", (-1.05, 1.3))),
            ("other keys' values left", panels.head_panel(small, "other_value_left", (-0.3, 1.3))),
            ("read beside the new", panels.head_panel(small, "overwrite_error", (0, 2.5))),
        ],
        "decodability": [("true state read by a linear probe", panels.probe_panel(small))],
        "effects": [("accuracy lost with a gate frozen at its mean", panels.effect_panel(small, longest))],
        "identified": [
            (
                "accuracy with erase (or signed decay, angle) clamped",
                panels.identified_panel(small, longest),
            )
        ],
    }
    drawn = {}
    for name, columns in families.items():
        path = folder / f"{name}.png"
        if _draw(columns, tables.runs, labels, path, _legends(tables.runs["arm"]).get(name, [])):
            drawn[name] = path
    return drawn


def _is_measured(measurements: pl.LazyFrame, quantity: str) -> bool:
    rows = measurements.filter(pl.col("quantity") == quantity, pl.col("value").is_not_null())
    return not rows.limit(1).collect().is_empty()


def _draw(
    columns: Sequence[tuple[str, panels.Panel]],
    runs: pl.DataFrame,
    labels: dict[tuple[str, str], str],
    path: Path,
    legend: list[Line2D],
) -> bool:
    """One row of panels a task; rows without anything are left out."""
    arms = {
        key: sorted(set(runs.filter(task=key[0], task_params=key[1])["arm"]), key=family_order)
        for key in labels
    }
    with matplotlib.rc_context(_STYLE):
        shown = []
        for key in labels:
            trial = Figure().subplots(1, len(columns), squeeze=False)[0]
            if any([panel(axis, key, arms[key]) for axis, (_, panel) in zip(trial, columns, strict=True)]):
                shown.append(key)
        if not shown:
            return False
        heights = [0.34 * len(arms[key]) + 1.4 for key in shown]
        width = 9.4 if len(columns) > 1 else 7.2
        figure = Figure(figsize=(width, sum(heights) + 0.35), dpi=120)
        figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.06)
        axes = figure.subplots(len(shown), len(columns), squeeze=False, height_ratios=heights)
        for row, key in zip(axes, shown, strict=True):
            for index, (axis, (title, panel)) in enumerate(zip(row, columns, strict=True)):
                if not panel(axis, key, arms[key]):
                    axis.set_axis_off()
                    axis.text(0.5, 0.5, "none here", ha="center", va="center", color=panels.GREY, fontsize=9)
                axis.set_title(f"{plain(labels[key])}: {title}" if index == 0 else title, fontsize=9.5)
        if legend:
            figure.legend(handles=legend, loc="outside lower left", ncols=min(len(legend), 6), fontsize=8.5)
        sns.despine(fig=figure)
        save_figure(figure, path)
    return True


def _mark(filled: bool, text: str, marker: str = "o") -> Line2D:
    face = panels.GREY if filled else "white"
    return Line2D([], [], linestyle="", marker=marker, color=panels.GREY, markerfacecolor=face, label=text)


def _legends(arms: pl.Series) -> dict[str, list[Line2D]]:
    shown = looks(arms)
    lines = [
        Line2D([], [], label=plain(arm), **panels.pen(shown[arm])) for arm in sorted(shown, key=family_order)
    ]
    line = Line2D([], [], color=panels.GREY, linewidth=1.2, label="from the 25 % to the 75 % quantile")
    chance = Line2D([], [], color=panels.GREY, linestyle=(0, (1, 2)), label="chance")
    return {
        "gates": [_mark(True, "median of one head of one run"), line],
        "eigenvalues": [
            _mark(True, "where the answer moves (or all tokens)"),
            _mark(False, "where it stays"),
            Line2D([], [], color="#d9d2bd", linewidth=7, label=f"below {NEAR_MINUS_ONE}: flips"),
        ],
        "retention": [*lines, _mark(True, "one head of one run")],
        "state": [*lines, Line2D([], [], color="#d9d2bd", linewidth=7, label="trained lengths")],
        "edit": [_mark(True, "one head of one run, mean over writes")],
        "decodability": [
            _mark(True, "longest length"),
            _mark(False, "shortest length"),
            _mark(True, "shuffled labels", "x"),
        ],
        "identified": [
            _mark(True, "in the heads that flip"),
            _mark(False, "in as many others"),
            _mark(True, "untouched", "|"),
            chance,
        ],
    }
