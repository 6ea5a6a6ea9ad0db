"""Figures of a study, one for each family of measurements: a row of panels for each task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import polars as pl
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from arena.dynamics.effects import NEAR_MINUS_ONE
from arena.dynamics.study import Tables
from arena.report.palette import family_order, look

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
_GREY = "#777777"
_SHADE = "#f1ede2"
Panel = Callable[[Axes, tuple[str, str], list[str]], bool]
"""Draws a task into an axis, architectures as rows; says whether there was anything to draw."""


def draw_figures(tables: Tables, labels: dict[tuple[str, str], str], folder: Path) -> dict[str, Path]:
    """Draw what there is to draw; name -> PNG in ``folder``.

    Args:
        tables: of a study.
        labels: (task, task_params) -> short name, in the order to show them in.
        folder: exists.
    """
    longest = tables.runs.group_by("task", "task_params").agg(eval_length=pl.col("eval_length").max())
    measured = tables.measurements.join(longest.lazy(), on=["task", "task_params", "eval_length"], how="semi")
    small = Tables(tables.runs, measured, *tables[2:])
    families: dict[str, list[tuple[str, Panel]]] = {
        "gates": [(gate, _gate_panel(small, gate)) for gate in ("decay", "erase", "write")],
        "eigenvalues": [("least eigenvalue of a head's transition", _eigenvalue_panel(small, longest))],
        "retention": [
            ("half-life of a head by its decay, tokens", _half_life_panel(small)),
            ("weight of a token in a read, by its age", _age_panel(small)),
        ],
        "state": [
            ("Frobenius norm of the memory", _token_panel(small, "state_frobenius")),
            ("effective rank of the memory", _token_panel(small, "state_effective_rank")),
        ],
        "edit": [
            ("old value left after a write", _head_panel(small, "old_value_left", (-1.05, 1.3))),
            ("values of other keys left", _head_panel(small, "other_value_left", (-0.3, 1.3))),
            ("read beside the new value", _head_panel(small, "overwrite_error", (0, 2.5))),
        ],
        "decodability": [("true state read by a linear probe", _probe_panel(small))],
        "effects": [("accuracy lost with a gate frozen at its mean", _effect_panel(small, longest))],
        "identified": [("accuracy with erase clamped to [0, 1]", _identified_panel(small, longest))],
    }
    drawn = {}
    for name, columns in families.items():
        path = folder / f"{name}.png"
        if _draw(columns, tables.runs, labels, path, _legends().get(name, [])):
            drawn[name] = path
    return drawn


def _draw(
    columns: Sequence[tuple[str, Panel]],
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
        heights = [0.34 * len(arms[key]) + 1.25 for key in shown]
        width = 9.4 if len(columns) > 1 else 7.2
        figure = Figure(figsize=(width, sum(heights) + 0.35), layout="constrained", dpi=120)
        axes = figure.subplots(len(shown), len(columns), squeeze=False, height_ratios=heights)
        for row, key in zip(axes, shown, strict=True):
            for index, (axis, (title, panel)) in enumerate(zip(row, columns, strict=True)):
                if not panel(axis, key, arms[key]):
                    axis.set_axis_off()
                    axis.text(0.5, 0.5, "none here", ha="center", va="center", color=_GREY, fontsize=9)
                axis.set_title(f"{labels[key]}: {title}" if index == 0 else title, fontsize=9.5)
        if legend:
            figure.legend(handles=legend, loc="outside lower left", ncols=len(legend), fontsize=8.5)
        sns.despine(fig=figure)
        figure.savefig(path)
    return True


def _mark(filled: bool, text: str, marker: str = "o") -> Line2D:
    face = _GREY if filled else "white"
    return Line2D([], [], linestyle="", marker=marker, color=_GREY, markerfacecolor=face, label=text)


def _legends() -> dict[str, list[Line2D]]:
    line = Line2D([], [], color=_GREY, linewidth=1.2, label="from the 25 % to the 75 % quantile")
    chance = Line2D([], [], color=_GREY, linestyle=(0, (1, 2)), label="chance")
    return {
        "gates": [_mark(True, "median of one head of one run"), line],
        "eigenvalues": [
            _mark(True, "where the answer moves (or all tokens)"),
            _mark(False, "where it stays"),
            Line2D([], [], color="#d9d2bd", linewidth=7, label=f"below {NEAR_MINUS_ONE}: flips"),
        ],
        "retention": [_mark(True, "one head of one run")],
        "state": [Line2D([], [], color="#d9d2bd", linewidth=7, label="trained lengths")],
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


def _rows(axis: Axes, arms: list[str]) -> None:
    """Architectures as rows, the first one at the top."""
    axis.set_yticks(range(len(arms)), arms)
    axis.set_ylim(len(arms) - 0.45, -0.55)
    axis.tick_params(axis="y", length=0)


def _spread(count: int, width: float = 0.56) -> np.ndarray:
    """Offsets that tell ``count`` marks of one row apart."""
    return np.linspace(-width / 2, width / 2, count) if count > 1 else np.zeros(count)


def _dots(
    axis: Axes, row: int, arm: str, values: Sequence[float], *, filled: bool = True, **kind: Any
) -> None:
    colour, marker, _ = look(arm)
    axis.plot(
        values,
        row + _spread(len(values)),
        linestyle="",
        marker=marker,
        markersize=4.5,
        color=colour,
        markerfacecolor=colour if filled else "white",
        markeredgewidth=1.0,
        alpha=0.9,
        zorder=3,
        **kind,
    )


def _note(axis: Axes, row: int, text: str) -> None:
    axis.text(0.02, row, text, transform=axis.get_yaxis_transform(), va="center", color=_GREY, fontsize=8)


def _bars(axis: Axes, row: int, arm: str, low: pl.Series, high: pl.Series) -> None:
    """Intervals behind the marks of :func:`_dots`."""
    axis.hlines(row + _spread(len(low)), low, high, color=look(arm).colour, alpha=0.6, linewidth=1.2)


def _of(tables: Tables, quantity: str, key: tuple[str, str]) -> pl.LazyFrame:
    return tables.measurements.filter(
        pl.col("quantity") == quantity,
        pl.col("task") == key[0],
        pl.col("task_params") == key[1],
        pl.col("value").is_not_null(),
    )


def _gate_panel(tables: Tables, gate: str) -> Panel:
    def panel(axis: Axes, key: tuple[str, str], arms: list[str]) -> bool:
        frame = (
            _of(tables, gate, key)
            .filter(pl.col("role") == "all", pl.col("statistic").is_in(["q25", "q50", "q75", "min", "max"]))
            .collect()
        )
        # a gate that an architecture does not have is traced as its neutral constant
        wide = frame.pivot(on="statistic", index=["arm", "run_id", "layer", "head"], values="value")
        if wide.is_empty() or (wide["min"] == wide["max"]).all():
            return False
        high = 1.05
        for row, arm in enumerate(arms):
            heads = wide.filter(pl.col("arm") == arm, pl.col("min") < pl.col("max")).sort("layer", "head")
            for offset, (low, middle, top) in zip(
                _spread(len(heads)), heads.select("q25", "q50", "q75").iter_rows(), strict=True
            ):
                axis.plot([low, top], [row + offset] * 2, color=look(arm).colour, linewidth=1.2, alpha=0.6)
                high = max(high, top * 1.05, middle * 1.05)
            _dots(axis, row, arm, heads["q50"].to_list())
        _rows(axis, arms)
        if high > 2.2:
            axis.set_xscale("symlog", linthresh=1)
        else:
            axis.set_xlim(-1.05 if (wide["min"] < -0.01).any() else -0.04, high)
        return True

    return panel


def _eigenvalue_panel(tables: Tables, longest: pl.DataFrame) -> Panel:
    table = tables.eigenvalues.join(longest, on=["task", "task_params", "eval_length"], how="semi")

    def panel(axis: Axes, key: tuple[str, str], arms: list[str]) -> bool:
        mine = table.filter(task=key[0], task_params=key[1])
        if mine.is_empty():
            return False
        moving = "moves" in set(mine["tokens"])
        axis.axvspan(-1.05, NEAR_MINUS_ONE, color=_SHADE, zorder=0, linewidth=0)
        axis.axvline(0, color="#bbbbbb", linewidth=0.8, zorder=1)
        for row, arm in enumerate(arms):
            heads = mine.filter(arm=arm).sort("run_id", "layer", "head")
            for name, filled in (("stays", False), ("moves" if moving else "all", True)):
                _dots(axis, row, arm, heads.filter(tokens=name)["least_eigenvalue"].to_list(), filled=filled)
        _rows(axis, arms)
        axis.set_xlim(-1.05, 1.05)
        return True

    return panel


def _half_life_panel(tables: Tables) -> Panel:
    def panel(axis: Axes, key: tuple[str, str], arms: list[str]) -> bool:
        frame = _of(tables, "half_life", key).filter(pl.col("value").is_finite()).collect()
        if frame.is_empty():
            return False
        for row, arm in enumerate(arms):
            heads = frame.filter(arm=arm).sort("run_id", "layer", "head")
            _dots(axis, row, arm, heads["value"].to_list())
            if heads.is_empty():
                axis.text(
                    0.02, row, "no decay", transform=axis.get_yaxis_transform(), va="center", color=_GREY
                )
        _rows(axis, arms)
        axis.set_xscale("log")
        return True

    return panel


def _age_panel(tables: Tables) -> Panel:
    def panel(axis: Axes, key: tuple[str, str], arms: list[str]) -> bool:
        age = (pl.col("token") - pl.col("source") + 1).log(2).floor().cast(pl.Int32)
        frame = (
            _of(tables, "contribution", key)
            .group_by("arm", age.alias("octave"))
            .agg(weight=pl.col("value").abs().mean())
            .sort("arm", "octave")
            .collect()
        )
        if frame.is_empty():
            return False
        for arm in arms:
            mine = frame.filter(pl.col("arm") == arm, pl.col("weight") > 0)
            _line(axis, arm, 2.0 ** mine["octave"].to_numpy(), mine["weight"].to_numpy())
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        low = frame.filter(pl.col("weight") > 0)["weight"].min()
        axis.set_ylim(bottom=max(1e-6, 0.5 * float(low or 1e-6)))  # type: ignore[arg-type]
        axis.legend(fontsize=7, loc="lower left", handlelength=2.2, labelspacing=0.25)
        return True

    return panel


def _line(axis: Axes, arm: str, x: np.ndarray, y: np.ndarray) -> None:
    colour, marker, dashed = look(arm)
    axis.plot(
        x,
        y,
        color=colour,
        linestyle=(0, (4, 1.6)) if dashed else "-",
        linewidth=1.5,
        marker=marker,
        markersize=4,
        markevery=max(1, len(x) // 6),
        markerfacecolor="white" if dashed else colour,
        label=arm,
    )


def _token_panel(tables: Tables, quantity: str) -> Panel:
    def panel(axis: Axes, key: tuple[str, str], arms: list[str]) -> bool:
        frame = (
            _of(tables, quantity, key)
            .group_by("arm", "token")
            .agg(value=pl.col("value").mean())
            .sort("arm", "token")
            .collect()
        )
        if frame.is_empty():
            return False
        trained = tables.runs.filter(task=key[0], task_params=key[1])["train_length_max"].max()
        axis.axvspan(1, float(trained), color=_SHADE, zorder=0, linewidth=0)  # type: ignore[arg-type]
        for arm in arms:
            mine = frame.filter(arm=arm)
            if not mine.is_empty():
                _line(axis, arm, mine["token"].to_numpy() + 1, mine["value"].to_numpy())
        axis.set_xscale("log", base=2)
        if quantity == "state_frobenius":
            axis.set_yscale("log")
        axis.set_xlabel("token", fontsize=8.5)
        axis.legend(fontsize=7, loc="best", handlelength=2.2, labelspacing=0.25)
        return True

    return panel


def _head_panel(tables: Tables, quantity: str, limits: tuple[float, float]) -> Panel:
    def panel(axis: Axes, key: tuple[str, str], arms: list[str]) -> bool:
        frame = (
            _of(tables, quantity, key)
            .group_by("arm", "run_id", "layer", "head")
            .agg(value=pl.col("value").mean())
            .sort("run_id", "layer", "head")
            .collect()
        )
        if frame.is_empty():
            return False
        for row, arm in enumerate(arms):
            _dots(axis, row, arm, frame.filter(arm=arm)["value"].clip(*limits).to_list(), clip_on=False)
        _rows(axis, arms)
        axis.set_xlim(*limits)
        return True

    return panel


def _probe_panel(tables: Tables) -> Panel:
    def panel(axis: Axes, key: tuple[str, str], arms: list[str]) -> bool:
        frame = tables.decodability.filter(
            pl.col("task") == key[0],
            pl.col("task_params") == key[1],
            pl.col("eval_length") == pl.col("fitted_length"),
        )
        if frame.is_empty():
            return False
        lengths = sorted(set(frame["eval_length"]))
        for row, arm in enumerate(arms):
            mine = frame.filter(arm=arm).sort("seed", "layer")
            axis.plot(
                mine["control"], np.full(len(mine), row), "x", color=_GREY, markersize=4, alpha=0.7, zorder=2
            )
            for length, filled in [(lengths[-1], True), *([(lengths[0], False)] if len(lengths) > 1 else [])]:
                part = mine.filter(eval_length=length)
                offsets = row + _spread(len(part))
                axis.hlines(
                    offsets, part["low"], part["high"], color=look(arm).colour, alpha=0.5, linewidth=1
                )
                _dots(axis, row, arm, part["accuracy"].to_list(), filled=filled)
            if mine.is_empty():
                _note(axis, row, "memory grows: no probe")
        _rows(axis, arms)
        axis.set_xlim(-0.03, 1.03)
        return True

    return panel


def _effect_panel(tables: Tables, longest: pl.DataFrame) -> Panel:
    table = tables.effects.join(longest, on=["task", "task_params", "eval_length"], how="semi")

    def panel(axis: Axes, key: tuple[str, str], arms: list[str]) -> bool:
        mine = table.filter(
            pl.col("task") == key[0],
            pl.col("task_params") == key[1],
            pl.col("role") == "all",
            pl.col("change").str.ends_with("frozen at its mean"),
        )
        if mine.is_empty():
            return False
        gates = ("decay", "erase", "write", "output")
        lost = np.full((len(arms), len(gates)), np.nan)
        for (arm, gate), part in mine.group_by("arm", "gate"):
            lost[arms.index(str(arm)), gates.index(str(gate))] = -part["effect"].mean()  # type: ignore[operator]
        texts = np.where(np.isnan(lost), "", np.char.mod("%.2f", np.nan_to_num(lost) + 0.0))
        sns.heatmap(
            lost, ax=axis, vmin=0, vmax=max(0.5, float(np.nanmax(lost))), annot=texts, fmt="", cbar=False,
            cmap=sns.light_palette("#1b4f72", as_cmap=True), linewidths=1.2, linecolor="white",
            xticklabels=gates, yticklabels=arms, annot_kws={"fontsize": 9},
        )  # fmt: skip
        axis.tick_params(length=0, rotation=0)
        axis.grid(False)
        return True

    return panel


def _identified_panel(tables: Tables, longest: pl.DataFrame) -> Panel:
    table = tables.effects.join(longest, on=["task", "task_params", "eval_length"], how="semi")

    def panel(axis: Axes, key: tuple[str, str], arms: list[str]) -> bool:
        mine = table.filter(task=key[0], task_params=key[1])
        found = mine.filter(role="identified")
        if found.is_empty():
            return False
        shown = [arm for arm in arms if arm in set(found["arm"])]
        axis.axvline(found["chance"][0], color=_GREY, linestyle=(0, (1, 2)), linewidth=1.5)
        for row, arm in enumerate(shown):
            runs = found.filter(arm=arm).sort("seed")
            for role, filled in (("control", False), ("identified", True)):
                part = runs.select("run_id").join(
                    mine.filter(role=role), on="run_id", how="left", maintain_order="left"
                )
                offsets = row + _spread(len(part))
                axis.hlines(
                    offsets,
                    part["accuracy_low"],
                    part["accuracy_high"],
                    color=look(arm).colour,
                    linewidth=1.2,
                )
                _dots(axis, row, arm, part["accuracy"].to_list(), filled=filled)
            axis.plot(runs["baseline"], row + _spread(len(runs)), "|", color=_GREY, markersize=11, zorder=2)
        _rows(axis, shown)
        axis.set_xlim(min(0.4, float(found["chance"][0]) - 0.1), 1.03)
        return True

    return panel
