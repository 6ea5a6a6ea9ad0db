"""The figure of an ablation: what every point scores, and what every axis is worth."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
import polars as pl
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from arena.ablation.sentences import longest
from arena.report.svg import plain, save_figure

_STYLE = {
    **sns.axes_style("white"),
    **sns.plotting_context("notebook", font_scale=0.9),
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": False,
    "svg.hashsalt": "arena",
}

_CAPTION = (
    "left: chance-scaled accuracy, mean over the seeds, by test length; right: its change at the longest "
    "length, over the pairs of points that differ on that axis alone; * a claim, others none"
)


def ablation_figure(
    points: pl.DataFrame,
    effects: pl.DataFrame,
    labels: Mapping[tuple[str, str], str],
    path: Path,
    *,
    title: str = "",
) -> None:
    """Two heat maps: score of every point at every task and length; main effects at the longest lengths.

    Args:
        points: of ``point_table``.
        effects: of ``effect_table``; may be empty.
        labels: (task, task_params) -> short name, in the order of the columns.
        path: of the PNG.
        title: above the figure.
    """
    arms = list(dict.fromkeys(points["arm"]))
    columns = [
        (key, length)
        for key in labels
        for length in sorted(points.filter(task=key[0], task_params=key[1])["eval_length"].unique())
    ]
    main = longest(effects).filter(kind="main") if not effects.is_empty() else effects
    changes = list(dict.fromkeys(main.select("axis", "of", "to").iter_rows())) if not main.is_empty() else []
    lines = max(len(arms), len(changes))
    with matplotlib.rc_context(_STYLE):
        widths = [0.78 * len(columns) + 0.085 * max(map(len, arms)), 1.25 * len(labels) + 2.6]
        figure = Figure(figsize=(sum(widths) + 1.0, 0.4 * lines + 2.6), layout="constrained", dpi=160)
        left, right = figure.subplots(1, 2, width_ratios=widths)
        _score_map(left, points, arms, columns, labels)
        if changes:
            _effect_map(right, main, changes, labels)
        else:
            right.set_visible(False)
        figure.supxlabel(
            textwrap.fill(_CAPTION, int(14 * (sum(widths) + 1.0))),
            x=0.01,
            ha="left",
            fontsize=8,
            color="#666666",
        )
        if title:
            figure.suptitle(plain(title), x=0.01, ha="left", fontsize=12)
        save_figure(figure, path)


def _score_map(
    axis: Axes,
    points: pl.DataFrame,
    arms: list[str],
    columns: list[tuple[tuple[str, str], int]],
    labels: Mapping[tuple[str, str], str],
) -> None:
    values = np.full((len(arms), len(columns)), np.nan)
    texts = np.full(values.shape, "", dtype=object)
    for row in points.iter_rows(named=True):
        column = columns.index(((row["task"], row["task_params"]), row["eval_length"]))
        place = arms.index(row["arm"]), column
        values[place], texts[place] = row["mean"], f"{row['mean']:z.2f}"
    sns.heatmap(
        np.clip(values, 0, 1),
        ax=axis,
        vmin=0,
        vmax=1,
        cmap=sns.light_palette("#1b4f72", as_cmap=True),
        cbar=False,
        annot=texts,
        fmt="",
        annot_kws={"fontsize": 8.5},
        linewidths=1.2,
        linecolor="white",
        xticklabels=[str(length) for _, length in columns],
        yticklabels=arms,
    )
    names = {row["arm"]: row["named"] for row in points.iter_rows(named=True)}
    axis.set_yticklabels(
        [plain(f"{arm}  (= {names[arm]})" if names[arm] not in (None, arm) else arm) for arm in arms],
        rotation=0,
    )
    position = 0
    for key, label in labels.items():
        count = sum(column[0] == key for column in columns)
        if count:
            axis.text(
                position + 0.05, -0.15, plain(label), fontweight="bold", fontsize=9, ha="left", va="bottom"
            )
            if position:
                axis.axvline(position, color="#555555", linewidth=1.2)
        position += count
    axis.tick_params(length=0)
    axis.set_xlabel("test length")


def _effect_map(
    axis: Axes,
    main: pl.DataFrame,
    changes: list[tuple[str, str, str]],
    labels: Mapping[tuple[str, str], str],
) -> None:
    keys = list(labels)
    values = np.full((len(changes), len(keys)), np.nan)
    texts = np.full(values.shape, "", dtype=object)
    for row in main.iter_rows(named=True):
        place = (
            changes.index((row["axis"], row["of"], row["to"])),
            keys.index((row["task"], row["task_params"])),
        )
        value = row["iqm"] if row["iqm"] is not None else row["mean"]
        if value is None:
            continue
        values[place] = value
        texts[place] = f"{value:+z.2f}{'*' if row['claim'] else ''}"
    reach = max(0.1, float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 0.0)
    sns.heatmap(
        values,
        ax=axis,
        vmin=-reach,
        vmax=reach,
        cmap=sns.diverging_palette(20, 245, s=80, l=45, as_cmap=True),
        cbar=False,
        annot=texts,
        fmt="",
        annot_kws={"fontsize": 8.5},
        linewidths=1.2,
        linecolor="white",
        xticklabels=[plain(labels[key]) for key in keys],
        yticklabels=[f"{name}: {of} → {to}" for name, of, to in changes],
    )
    for text in axis.texts:
        text.set_fontweight("bold" if text.get_text().endswith("*") else "normal")
    axis.set_yticklabels(axis.get_yticklabels(), rotation=0)
    axis.set_xticklabels(axis.get_xticklabels(), rotation=0)
    axis.tick_params(length=0)
    axis.set_title("main effects")
