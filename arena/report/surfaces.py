"""Accuracy over the difficulty dials: tasks that were run with several values of their parameters."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import polars as pl
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from arena.report.document import Section
from arena.report.figure import STYLE
from arena.report.palette import Look
from arena.report.svg import plain, save_figure

LENGTH = "sequence length"
MOST_PAIRS = 3
"""Pairs of dials of a task that are drawn; those of the most values."""
_ACROSS = 4  # panels in a line

_CAPTION = (
    "A panel an architecture. Number: mean accuracy over runs (and over the settings of the dials that are "
    "not on the axes); bold: every run solves it; colour: chance-scaled accuracy, from chance to perfect. "
    "Where length is not an axis, each setting is at its longest length."
)


def dials(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The parameters in which settings of one task differ, with their values in order."""
    found = {}
    for name in sorted({name for setting in settings for name in setting}):
        values = {_text(setting.get(name)): setting.get(name) for setting in settings}
        if len(values) > 1:
            found[name] = sorted(values.values(), key=_order)
    return found


def surface_table(cells: pl.DataFrame) -> pl.DataFrame:
    """Accuracy by pairs of dials.

    Args:
        cells: of ``accuracy_table``, one point a (task, architecture).

    Returns:
        task, ``dial_x``, ``dial_y`` (names; one may be ``sequence length``), ``x``, ``y`` (values as JSON),
        arm, ``runs``, ``accuracy`` (mean over the runs), ``chance_scaled``, ``solved`` (runs); empty where no
        task has a dial.
    """
    parts = []
    for (task,), mine in cells.group_by("task", maintain_order=True):
        settings = {text: json.loads(text) for text in mine["task_params"].unique(maintain_order=True)}
        turned = dials(list(settings.values()))
        if not turned:
            continue
        values = pl.DataFrame(
            [
                {"task_params": text, **{name: _text(setting.get(name)) for name in turned}}
                for text, setting in settings.items()
            ],
            schema=dict.fromkeys(("task_params", *turned), pl.String),
        )
        table = mine.select(
            "task_params", "arm", "eval_length", "runs", "mean", "chance_scaled", "solved"
        ).join(values, on="task_params")
        if len(turned) == 1:
            (name,) = turned
            table = table.with_columns(pl.col("eval_length").cast(pl.String).alias(LENGTH))
            pairs = [(LENGTH, name)]
        else:
            table = table.filter(pl.col("eval_length") == pl.col("eval_length").max().over("task_params"))
            names = sorted(turned, key=lambda name: -len(turned[name]))
            pairs = list(itertools.combinations(names, 2))[:MOST_PAIRS]
        weight = pl.col("runs")
        parts += [
            table.group_by(pl.col(x).alias("x"), pl.col(y).alias("y"), "arm", maintain_order=True)
            .agg(
                runs=weight.sum().cast(pl.Int64),
                accuracy=(pl.col("mean") * weight).sum() / weight.sum(),
                chance_scaled=(pl.col("chance_scaled") * weight).sum() / weight.sum(),
                solved=pl.col("solved").sum().cast(pl.Int64),
            )
            .select(
                pl.lit(task).alias("task"), pl.lit(x).alias("dial_x"), pl.lit(y).alias("dial_y"), pl.all()
            )
            for x, y in pairs
        ]
    return pl.concat(parts) if parts else pl.DataFrame()


def surface_sections(
    cells: pl.DataFrame, folder: Path, styles: Mapping[str, Look]
) -> tuple[list[Section], pl.DataFrame]:
    """The surfaces as a section with a figure for each pair of dials, and their table; none without dials."""
    table = surface_table(cells)
    if table.is_empty():
        return [], table
    figures = []
    groups = table.group_by("task", "dial_x", "dial_y", maintain_order=True)
    for number, ((task, x, y), surface) in enumerate(groups, start=1):
        words = "_".join(re.sub(r"\W+", "-", str(word), flags=re.ASCII)[:24] for word in (task, y, x))
        path = folder / f"surface_{number}_{words}.png"
        arms = [arm for arm in styles if arm in set(surface["arm"])]
        surface_figure(surface, arms, path, title=f"{task}: {y} and {x}")
        figures.append(path)
    heading = "Response surfaces over the difficulty dials"
    return [Section(heading=heading, figures=figures, caption=_CAPTION, quiet=True)], table


def surface_figure(surface: pl.DataFrame, arms: Sequence[str], path: Path, *, title: str) -> None:
    """One pair of dials of one task as a heat map an architecture.

    Args:
        surface: rows of :func:`surface_table`.
        arms: in the order of the panels.
        path: of the PNG.
        title: above the panels.
    """
    xs, ys = (sorted(set(surface[name]), key=lambda text: _order(json.loads(text))) for name in ("x", "y"))
    across = min(_ACROSS, len(arms))
    lines = -(-len(arms) // across)
    width = max(16, 8 * len(xs))
    tall = max(len(arm) for arm in arms) // width
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(
            figsize=(
                max(1.5, 0.52 * len(xs) + 0.35) * across + 1.0,
                (0.36 * len(ys) + 0.5 + 0.16 * tall) * lines + 0.9,
            ),
            layout="constrained",
            dpi=160,
        )
        axes = figure.subplots(lines, across, squeeze=False, sharex=True, sharey=True)
        for number, axis in enumerate(axes.flat):
            if number >= len(arms):
                axis.set_visible(False)
                continue
            _map(axis, surface.filter(arm=arms[number]), xs, ys)
            axis.set_title(plain(arms[number], width), fontsize=9)
            if number + across >= len(arms):  # nothing visible below
                axis.tick_params(labelbottom=True)
        figure.supxlabel(plain(surface["dial_x"][0]), fontsize=9)
        figure.supylabel(plain(surface["dial_y"][0]), fontsize=9)
        figure.suptitle(plain(title), x=0.01, ha="left", fontsize=10)
        save_figure(figure, path)


def _map(axis: Axes, cells: pl.DataFrame, xs: list[str], ys: list[str]) -> None:
    colours = np.full((len(ys), len(xs)), np.nan)
    for row in cells.iter_rows(named=True):
        down, along = ys.index(row["y"]), xs.index(row["x"])
        colours[down, along] = max(0.0, row["chance_scaled"])
        axis.text(
            along + 0.5,
            down + 0.52,
            f"{row['accuracy']:.2f}",
            ha="center",
            va="center",
            fontsize=8,
            color="white" if row["chance_scaled"] > 0.55 else "#333333",
            fontweight="bold" if row["solved"] == row["runs"] else "normal",
        )
    labels = [[plain(str(json.loads(text))) for text in texts] for texts in (xs, ys)]
    sns.heatmap(
        colours,
        ax=axis,
        vmin=0,
        vmax=1,
        cmap=sns.light_palette("#1b4f72", as_cmap=True),
        cbar=False,
        linewidths=1.0,
        linecolor="white",
        xticklabels=labels[0],
        yticklabels=labels[1],
    )
    axis.tick_params(length=0, rotation=0, labelsize=8)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _order(value: Any) -> tuple[int, float, str]:
    """Numbers by size, before everything else by its text."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return 0, float(value), ""
    return 1, 0.0, _text(value)
