"""The figure of the single runs: a panel for each architecture and task, so that no run hides another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import polars as pl
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from arena.report.figure import SHADE, STYLE, pen, runs_drawn, some_runs
from arena.report.palette import Look
from arena.report.svg import plain, save_figure
from arena.report.tables import scores

_ACROSS = 5  # panels in a line


def runs_figure(
    rows: pl.DataFrame, labels: Mapping[tuple[str, str], str], styles: Mapping[str, Look], path: Path
) -> None:
    """Accuracy against sequence length of every run, a panel a task and arm; the other arms' means in grey.

    Args:
        rows: of one point a (task, architecture).
        labels: short names of the tasks.
        styles: looks of the arms, in the order of the panels.
        path: of the PNG.
    """
    table = scores(rows)
    there = set(table["arm"])
    arms = [arm for arm in styles if arm in there]
    across = min(_ACROSS, len(arms))
    lines = -(-len(arms) // across)
    most = runs_drawn(len(labels), len(arms))
    tall = max(len(arm) for arm in arms) // 22
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(1.85 * across + 0.7, (1.7 + 0.16 * tall) * lines * len(labels) + 0.5),
            layout="constrained",
            dpi=160,
        )
        axes = figure.subplots(lines * len(labels), across, squeeze=False)  # shared axes are slow
        for line, (key, label) in enumerate(labels.items()):
            panel = table.filter(task=key[0], task_params=key[1]).sort("eval_length")
            trained = rows.filter(task=key[0], task_params=key[1])["train_length_max"].max()
            for number in range(lines * across):
                axis = axes[line * lines + number // across, number % across]
                if number >= len(arms):
                    axis.set_visible(False)
                    continue
                _panel(axis, panel, arms[number], styles[arms[number]], most, trained)
                axis.set_title(plain(arms[number], 22), fontsize=9)
                if number % across == 0:
                    axis.set_ylabel(plain(label), fontsize=9, fontweight="bold")
        figure.supxlabel("sequence length", fontsize=9)
        sns.despine(fig=figure)
        save_figure(figure, path)


def _panel(axis: Axes, panel: pl.DataFrame, arm: str, style: Look, most: int, trained: object) -> None:
    lengths = sorted(panel["eval_length"].unique())
    axis.set_xscale("log", base=2)
    if isinstance(trained, int) and trained >= lengths[0]:
        axis.axvspan(lengths[0] / 1.2, trained, color=SHADE, zorder=0, linewidth=0)
    means = panel.group_by("arm", "eval_length").agg(pl.col("accuracy").mean()).sort("arm", "eval_length")
    for (name,), mean in means.group_by("arm", maintain_order=True):
        if name != arm:
            axis.plot(mean["eval_length"], mean["accuracy"], color="#cfcfcf", linewidth=0.8, zorder=1)
    mine = some_runs(panel.filter(arm=arm), most)
    for _, run in mine.group_by("run_id", maintain_order=True):
        line = {**pen(style), "markersize": 3.6, "linewidth": 1.0, "markeredgewidth": 0.8}
        axis.plot(run["eval_length"], run["accuracy"], **line, alpha=0.8, zorder=3)
    axis.set_xlim(lengths[0] / 1.2, lengths[-1] * 1.2)
    axis.set_xticks(lengths, [str(length) for length in lengths], fontsize=7)
    axis.minorticks_off()
    axis.set_ylim(-0.05, 1.07)
    axis.set_yticks([0, 0.5, 1.0])
    axis.tick_params(axis="y", labelsize=7)
