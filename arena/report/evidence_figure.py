"""Figures of the evidence: score against budget, against learning rate, and the sensitivity panel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import polars as pl
import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from arena.report.figure import STYLE, pen
from arena.report.palette import Look
from arena.report.svg import plain, save_figure

Labels = Mapping[tuple[str, str], str]
_GREY = "#888888"
_SHADE = "#f3f3f3"
_LEAST_SPAN = 0.2  # of a score axis
_ACROSS = 7  # panels in a line
_STAGES = {"search": ("o", "search"), "extension": ("^", "extension"), "exploit": ("D", "exploit")}


def best_of_n_figure(table: pl.DataFrame, labels: Labels, styles: Mapping[str, Look], path: Path) -> None:
    """Expected best score of n trials, a line of panels a task: first all arms, then each with its band, both
    estimators, and the others in grey; shaded from n = N / 2 on, where neither is to be trusted.
    """
    arms = _present(table, styles)
    columns = ["all", *arms] if len(arms) > 1 else arms
    with matplotlib.rc_context(STYLE):
        figure, panels = _grid(labels, columns, title={"all": "all, unbiased"})
        for (key, column), axis in panels.items():
            mine = table.filter(task=key[0], task_params=key[1]).sort("n")
            if mine.is_empty():
                continue
            most = max(mine["points"].to_list())
            if most > 1:
                axis.axvspan(most / 2, most * 1.02, color=_SHADE, zorder=0, linewidth=0)
            for arm in arms:
                curve = mine.filter(arm=arm)
                if column == "all":
                    _trusted_line(axis, curve, styles[arm], markersize=4)
                elif column != arm:
                    axis.plot(curve["n"], curve["unbiased"], color="#cfcfcf", linewidth=0.8, zorder=1)
                else:
                    _best_of_n(axis, curve, styles[arm])
            axis.set_xlim(1 - 0.03 * most, most * 1.02)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5, min_n_ticks=1))
        axis = next(iter(panels.values()))  # all share its scores: noise is not to look like a difference
        low, high = axis.get_ylim()
        if high - low < _LEAST_SPAN:
            axis.set_ylim((low + high - _LEAST_SPAN) / 2, (low + high + _LEAST_SPAN) / 2)
        figure.supxlabel("trials n", fontsize=10)
        figure.supylabel("expected best score on valid", fontsize=10)
        handles: list[Artist] = [Line2D([], [], label=plain(arm), **pen(styles[arm])) for arm in arms]
        handles += [
            Line2D([], [], label="unbiased", color=_GREY, linewidth=1.5),
            Line2D([], [], label="with replacement", color=_GREY, linestyle=":", linewidth=1.5),
            Patch(label="95 % band (unbiased)", facecolor=_GREY, alpha=0.3),
            Patch(label="n > N/2: not trusted", facecolor="#ececec"),
        ]
        _finish(figure, handles, path)


def _trusted_line(axis: Axes, curve: pl.DataFrame, style: Look, **changes: float) -> pl.DataFrame:
    """The unbiased estimate with markers, thin beyond N / 2; the trusted part of the curve."""
    trusted = curve.filter("trusted") if curve.height > 1 else curve
    line = {**pen(style), **changes, "markevery": max(1, -(-trusted.height // 6))}
    axis.plot(trusted["n"], trusted["unbiased"], **line, zorder=4)
    axis.plot(curve["n"], curve["unbiased"], color=style.colour, linewidth=0.9, alpha=0.7, zorder=3)
    return trusted


def _best_of_n(axis: Axes, curve: pl.DataFrame, style: Look) -> None:
    trusted = _trusted_line(axis, curve, style)
    axis.plot(curve["n"], curve["replaced"], color=style.colour, linestyle=":", linewidth=1.5, zorder=3)
    low, high = trusted["unbiased_low"], trusted["unbiased_high"]
    axis.fill_between(trusted["n"], low, high, color=style.colour, alpha=0.22, linewidth=0, zorder=2)


def response_figure(
    points: pl.DataFrame, chosen: pl.DataFrame, labels: Labels, styles: Mapping[str, Look], path: Path
) -> None:
    """Score on valid against learning rate of every tuning trial, a panel a task and arm, the chosen one
    ringed.

    Args:
        points: of ``point_scores``, tuning stages only.
        chosen: task, task_params, arm and trial of the winners.
        labels: short names of the tasks.
        styles: looks of the arms.
        path: of the PNG.
    """
    arms = _present(points, styles)
    rates = points["lr"].to_list()
    low, high = _limits(points)
    reach = high - low
    with matplotlib.rc_context(STYLE):
        figure, panels = _grid(labels, arms)
        for (key, arm), axis in panels.items():
            mine = points.filter(task=key[0], task_params=key[1], arm=arm)
            winner = mine.join(chosen, on=["task", "task_params", "arm", "trial"], how="semi")
            _response(axis, mine, winner, styles[arm])
            _log_axis(axis, min(rates) / 1.5, max(rates) * 1.5)
            axis.set_ylim(low - 0.06 * reach, high + 0.09 * reach)
        figure.supxlabel("learning rate", fontsize=10)
        figure.supylabel("score on valid", fontsize=10)
        there = set(points["stage"])
        handles = [
            Line2D([], [], label=name, color=_GREY, marker=marker, linestyle="none", markersize=5)
            for stage, (marker, name) in _STAGES.items()
            if stage in there
        ]
        if points["diverged"].any():
            handles.append(
                Line2D([], [], label="diverged", color=_GREY, marker="x", linestyle="none", markersize=6)
            )
        handles += [
            Line2D(
                [], [], label="chosen", color="black", marker="o", markerfacecolor="none", linestyle="none",
                markersize=10,
            ),
        ]  # fmt: skip
        _finish(figure, handles, path)


def _log_axis(axis: Axes, low: float, high: float) -> None:
    """A logarithmic x axis with labels that do not meet: decades, and the threes between few of them."""
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    if high / low < 100:
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _response(axis: Axes, points: pl.DataFrame, winner: pl.DataFrame, style: Look) -> None:
    alive = points.filter(~pl.col("diverged"))
    for stage, (marker, _) in _STAGES.items():
        part = alive.filter(stage=stage)
        axis.plot(
            part["lr"], part["score"], marker, color=style.colour, markersize=5, alpha=0.85,
            markeredgecolor="white", markeredgewidth=0.5,
        )  # fmt: skip
    lost = points.filter("diverged")
    axis.plot(lost["lr"], lost["score"], "x", color=style.colour, markersize=6)
    axis.plot(
        winner["lr"], winner["score"], "o", markersize=10, markerfacecolor="none", markeredgecolor="black",
        markeredgewidth=1.3, zorder=5,
    )  # fmt: skip


def panel_figure(
    panel: pl.DataFrame, windows: pl.DataFrame, labels: Labels, styles: Mapping[str, Look], path: Path
) -> None:
    """The sensitivity panel, a panel a task: mean over the seeds against learning rate, the single seeds as
    dots, and below the curves each arm's window within 5 % of its best.
    """
    arms = _present(panel, styles)
    labels = {
        key: label for key, label in labels.items() if panel.filter(task=key[0], task_params=key[1]).height
    }
    low, high = _limits(panel)
    reach = high - low
    with matplotlib.rc_context(STYLE):
        figure, axes = _panels(len(labels), sharey=True)
        for axis, key in zip(axes, labels, strict=False):
            axis.set_title(plain(labels[key]))
            axis.set_xscale("log")
            axis.set_xlabel("learning rate")
            for place, arm in enumerate(arms):
                mine = panel.filter(task=key[0], task_params=key[1], arm=arm)
                mean = mine.group_by("lr").agg(pl.col("score").mean()).sort("lr")
                axis.plot(mine["lr"], mine["score"], ".", color=styles[arm].colour, alpha=0.45, markersize=5)
                axis.plot(mean["lr"], mean["score"], **pen(styles[arm]), zorder=4)
                height = low - (0.05 + 0.045 * place) * reach
                for window in windows.filter(task=key[0], task_params=key[1], arm=arm).iter_rows(named=True):
                    span = (window["low_lr"], window["high_lr"])
                    axis.plot(
                        span, (height, height), color=styles[arm].colour, linewidth=3.2, solid_capstyle="butt"
                    )
                    axis.plot(
                        window["best_lr"], height, **{**pen(styles[arm]), "linestyle": "none"}, zorder=5
                    )
            axis.set_ylim(low - (0.06 + 0.045 * len(arms)) * reach, high + 0.05 * reach)
            axis.set_yticks(np.linspace(low, high, 5).round(2))
        axes[0].set_ylabel("score on valid")
        handles: list[Artist] = [Line2D([], [], label=plain(arm), **pen(styles[arm])) for arm in arms]
        handles += [
            Line2D([], [], label="one seed", color=_GREY, marker=".", linestyle="none"),
            Line2D([], [], label="window within 5 %\nof the best", color=_GREY, linewidth=3.2),
        ]
        _finish(figure, handles, path)


def _limits(table: pl.DataFrame) -> tuple[float, float]:
    """Ends of the score axis: 0 and 1, or more where scores (chance-scaled ones, losses) lie outside."""
    scores = table["score"].to_list()
    low, high = min(*scores, 0.0), max(*scores, 0.0)
    return (low, 1.0) if high > 0 or low == 0 else (low, high)


def _present(table: pl.DataFrame, styles: Mapping[str, Look]) -> list[str]:
    there = set(table["arm"])
    return [arm for arm in styles if arm in there]


def _grid(
    labels: Labels, columns: Sequence[str], title: Mapping[str, str] | None = None
) -> tuple[Figure, dict[tuple[tuple[str, str], str], Axes]]:
    """A panel for each task and column, the columns of a task in as many lines as they need."""
    across = min(_ACROSS, len(columns))
    lines = -(-len(columns) // across)
    tall = max(len(column) for column in columns) // 22
    figure = Figure(
        figsize=(1.9 * across + 2.2, (1.9 + 0.18 * tall) * lines * len(labels) + 0.8),
        layout="constrained",
        dpi=160,
    )
    axes = figure.subplots(lines * len(labels), across, squeeze=False, sharex=True, sharey=True)
    panels = {}
    for line, (key, label) in enumerate(labels.items()):
        for number in range(lines * across):
            axis = axes[line * lines + number // across, number % across]
            if number >= len(columns):
                axis.set_visible(False)
                continue
            panels[key, columns[number]] = axis
            if line == 0 or lines > 1:
                axis.set_title(plain((title or {}).get(columns[number], columns[number]), 22), fontsize=10)
            if number % across == 0:
                axis.set_ylabel(plain(label), fontsize=10, fontweight="bold")
            if number + across >= len(columns):  # nothing visible below
                axis.tick_params(labelbottom=line == len(labels) - 1 or lines > 1)
    return figure, panels


def _panels(count: int, *, sharey: bool) -> tuple[Figure, Sequence[Axes]]:
    columns = min(3, count)
    lines = -(-count // columns)
    figure = Figure(figsize=(4.1 * columns + 2.1, 3.6 * lines + 0.4), layout="constrained", dpi=160)
    axes = list(figure.subplots(lines, columns, squeeze=False, sharey=sharey).flat)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes


def _finish(figure: Figure, handles: Sequence[Artist], path: Path) -> None:
    figure.legend(
        handles=list(handles), loc="outside right center", handlelength=2.4, labelspacing=0.55, fontsize=9.5
    )
    sns.despine(fig=figure)
    save_figure(figure, path)
