"""Panels of the figures of a study: one task in one axis, architectures as rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import polars as pl
import seaborn as sns
from matplotlib.axes import Axes

from arena.dynamics.effects import NEAR_MINUS_ONE
from arena.dynamics.study import Tables
from arena.report.palette import Look, looks
from arena.report.svg import plain

GREY = "#777777"
SHADE = "#f1ede2"
Panel = Callable[[Axes, tuple[str, str], list[str]], bool]
"""Draws a task into an axis, architectures as rows; says whether there was anything to draw."""


def _rows(axis: Axes, arms: list[str]) -> None:
    """Architectures as rows, the first one at the top."""
    axis.set_yticks(range(len(arms)), [plain(arm) for arm in arms])
    axis.set_ylim(len(arms) - 0.45, -0.55)
    axis.tick_params(axis="y", length=0)


def _spread(count: int, width: float = 0.56) -> np.ndarray:
    """Offsets that tell ``count`` marks of one row apart."""
    return np.linspace(-width / 2, width / 2, count) if count > 1 else np.zeros(count)


def _dots(
    axis: Axes, row: float, look: Look, values: Sequence[float], *, filled: bool = True, **kind: Any
) -> None:
    if not len(values):  # an empty line that is not clipped would count as one at the figure's corner
        return
    colour, marker, _ = look
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
    axis.text(0.02, row, text, transform=axis.get_yaxis_transform(), va="center", color=GREY, fontsize=8)


def _bars(axis: Axes, row: float, look: Look, low: pl.Series, high: pl.Series) -> None:
    """Intervals behind the marks of :func:`_dots`."""
    axis.hlines(row + _spread(len(low)), low, high, color=look.colour, alpha=0.6, linewidth=1.2)


def _of(tables: Tables, quantity: str, key: tuple[str, str]) -> pl.LazyFrame:
    return tables.measurements.filter(
        pl.col("quantity") == quantity,
        pl.col("task") == key[0],
        pl.col("task_params") == key[1],
        pl.col("value").is_not_null(),
    )


def gate_panel(tables: Tables, gate: str) -> Panel:
    """A gate over tokens: median and middle half, for each head (and micro-step) of each run that varies."""
    pens = looks(tables.runs["arm"])

    def panel(axis: Axes, key: tuple[str, str], arms: list[str]) -> bool:
        frame = (
            _of(tables, gate, key)
            .filter(pl.col("role") == "all", pl.col("statistic").is_in(["q25", "q50", "q75", "min", "max"]))
            .collect()
        )
        # a gate that an architecture does not have is traced as its neutral constant
        place = ["arm", "run_id", "layer", "head", "micro"]
        wide = frame.pivot(on="statistic", index=place, values="value")
        if wide.is_empty() or (wide["min"] == wide["max"]).all():
            return False
        high, least = 1.05, 0.0
        for row, arm in enumerate(arms):
            heads = wide.filter(pl.col("arm") == arm, pl.col("min") < pl.col("max"))
            heads = heads.sort("layer", "head", "micro")
            for offset, (low, middle, top) in zip(
                _spread(len(heads)), heads.select("q25", "q50", "q75").iter_rows(), strict=True
            ):
                axis.plot([low, top], [row + offset] * 2, color=pens[arm].colour, linewidth=1.2, alpha=0.6)
                high, least = max(high, top * 1.05, middle * 1.05), min(least, low)
            _dots(axis, row, pens[arm], heads["q50"].to_list())
        _rows(axis, arms)
        if high > 2.2 or least < -1:
            axis.set_xscale("symlog", linthresh=1)
        else:
            axis.set_xlim(-1.05 if (wide["min"] < -0.01).any() else -0.04, high)
        return True

    return panel


def eigenvalue_panel(tables: Tables, longest: pl.DataFrame) -> Panel:
    """Least eigenvalue of each head, where the answer moves and where it stays."""
    pens = looks(tables.runs["arm"])
    table = tables.eigenvalues.join(longest, on=["task", "task_params", "length"], how="semi")

    def panel(axis: Axes, key: tuple[str, str], arms: list[str]) -> bool:
        mine = table.filter(task=key[0], task_params=key[1])
        if mine.is_empty():
            return False
        moving = "moves" in set(mine["tokens"])
        axis.axvspan(-1.05, NEAR_MINUS_ONE, color=SHADE, zorder=0, linewidth=0)
        axis.axvline(0, color="#bbbbbb", linewidth=0.8, zorder=1)
        for row, arm in enumerate(arms):
            heads = mine.filter(arm=arm).sort("run_id", "layer", "head")
            for name, filled in (("stays", False), ("moves" if moving else "all", True)):
                _dots(
                    axis,
                    row,
                    pens[arm],
                    heads.filter(tokens=name)["least_eigenvalue"].to_list(),
                    filled=filled,
                )
        _rows(axis, arms)
        axis.set_xlim(-1.05, 1.05)
        return True

    return panel


def half_life_panel(tables: Tables) -> Panel:
    """Half-life of each head by its decay alone."""
    pens = looks(tables.runs["arm"])

    def panel(axis: Axes, key: tuple[str, str], arms: list[str]) -> bool:
        frame = _of(tables, "half_life", key).filter(pl.col("value").is_finite()).collect()
        if frame.is_empty():
            return False
        for row, arm in enumerate(arms):
            heads = frame.filter(arm=arm).sort("run_id", "layer", "head")
            _dots(axis, row, pens[arm], heads["value"].to_list())
            if heads.is_empty():
                axis.text(
                    0.02, row, "no decay", transform=axis.get_yaxis_transform(), va="center", color=GREY
                )
        _rows(axis, arms)
        axis.set_xscale("log")
        return True

    return panel


def age_panel(tables: Tables) -> Panel:
    """Mean weight of a token in a read against its age."""
    pens = looks(tables.runs["arm"])

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
            _line(axis, pens[arm], 2.0 ** mine["octave"].to_numpy(), mine["weight"].to_numpy())
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        low = frame.filter(pl.col("weight") > 0)["weight"].min()
        axis.set_ylim(bottom=max(1e-6, 0.5 * float(low or 1e-6)))  # type: ignore[arg-type]
        return True

    return panel


def pen(look: Look) -> dict[str, Any]:
    """How a line of an architecture is drawn."""
    colour, marker, dashed = look
    return {
        "color": colour,
        "linestyle": (0, (4, 1.6)) if dashed else "-",
        "linewidth": 1.5,
        "marker": marker,
        "markersize": 4,
        "markerfacecolor": "white" if dashed else colour,
    }


def _line(axis: Axes, look: Look, x: np.ndarray, y: np.ndarray) -> None:
    axis.plot(x, y, markevery=max(1, len(x) // 6), **pen(look))


def token_panel(tables: Tables, quantity: str) -> Panel:
    """Mean of a quantity over heads, sequences and runs against the token."""
    pens = looks(tables.runs["arm"])

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
        axis.axvspan(1, float(trained), color=SHADE, zorder=0, linewidth=0)  # type: ignore[arg-type]
        for arm in arms:
            mine = frame.filter(arm=arm)
            if not mine.is_empty():
                _line(axis, pens[arm], mine["token"].to_numpy() + 1, mine["value"].to_numpy())
        axis.set_xscale("log", base=2)
        if quantity == "state_frobenius":
            axis.set_yscale("log")
        axis.set_xlabel("token", fontsize=8.5)
        return True

    return panel


def head_panel(tables: Tables, quantity: str, limits: tuple[float, float]) -> Panel:
    """Mean of a quantity over writes, for each head of each run; beyond the limits: at the limit."""
    pens = looks(tables.runs["arm"])

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
            _dots(axis, row, pens[arm], frame.filter(arm=arm)["value"].clip(*limits).to_list(), clip_on=False)
        _rows(axis, arms)
        axis.set_xlim(*limits)
        return True

    return panel


def probe_panel(tables: Tables) -> Panel:
    """Accuracy of the linear probe of each run and layer, longest and shortest length, and its control."""
    pens = looks(tables.runs["arm"])

    def panel(axis: Axes, key: tuple[str, str], arms: list[str]) -> bool:
        frame = tables.decodability.filter(
            pl.col("task") == key[0],
            pl.col("task_params") == key[1],
            pl.col("length") == pl.col("fitted_length"),
        )
        if frame.is_empty():
            return False
        lengths = sorted(set(frame["length"]))
        sides = [(lengths[-1], True, -0.14), (lengths[0], False, 0.14)]
        if len(lengths) == 1:
            sides = [(lengths[0], True, 0.0)]
        for row, arm in enumerate(arms):
            mine = frame.filter(arm=arm).sort("seed", "layer")
            axis.plot(
                mine["control"], np.full(len(mine), row), "x", color=GREY, markersize=4, alpha=0.7, zorder=2
            )
            for length, filled, shift in sides:
                part = mine.filter(length=length)
                _bars(axis, row + shift, pens[arm], part["low"], part["high"])
                _dots(axis, row + shift, pens[arm], part["accuracy"].to_list(), filled=filled)
            if mine.is_empty():
                _note(axis, row, "memory grows: no probe")
        _rows(axis, arms)
        axis.set_xlim(-0.03, 1.03)
        return True

    return panel


def effect_panel(tables: Tables, longest: pl.DataFrame) -> Panel:
    """Accuracy lost with each gate frozen at its mean in all heads, mean over runs."""
    table = tables.effects.join(longest, on=["task", "task_params", "length"], how="semi")

    def panel(axis: Axes, key: tuple[str, str], arms: list[str]) -> bool:
        mine = table.filter(
            pl.col("task") == key[0],
            pl.col("task_params") == key[1],
            pl.col("role") == "all",
            pl.col("change").str.ends_with("frozen at its mean"),
        )
        if mine.is_empty():
            return False
        frozen = set(mine["gate"])
        gates = [gate for gate in ("decay", "erase", "write", "angle", "output") if gate in frozen]
        lost = np.full((len(arms), len(gates)), np.nan)
        for (arm, gate), part in mine.group_by("arm", "gate"):
            lost[arms.index(str(arm)), gates.index(str(gate))] = -part["effect"].mean()  # type: ignore[operator]
        texts = np.where(np.isnan(lost), "", np.char.mod("%.2f", np.round(np.nan_to_num(lost), 2) + 0.0))
        sns.heatmap(
            lost, ax=axis, vmin=0, vmax=max(0.5, float(np.nanmax(lost))), annot=texts, fmt="", cbar=False,
            cmap=sns.light_palette("#1b4f72", as_cmap=True), linewidths=1.2, linecolor="white",
            xticklabels=gates, yticklabels=arms, annot_kws={"fontsize": 9},
        )  # fmt: skip
        axis.tick_params(length=0, rotation=0)
        axis.grid(False)
        return True

    return panel


def identified_panel(tables: Tables, longest: pl.DataFrame) -> Panel:
    """Accuracy with a gate clamped in the heads that flip and in as many others, for each run."""
    pens = looks(tables.runs["arm"])
    table = tables.effects.join(longest, on=["task", "task_params", "length"], how="semi")

    def panel(axis: Axes, key: tuple[str, str], arms: list[str]) -> bool:
        mine = table.filter(task=key[0], task_params=key[1])
        found = mine.filter(role="identified")
        if found.is_empty():
            return False
        shown = [arm for arm in arms if arm in set(found["arm"])]
        axis.axvline(found["chance"][0], color=GREY, linestyle=(0, (1, 2)), linewidth=1.5)
        for row, arm in enumerate(shown):
            runs = found.filter(arm=arm).sort("seed", "change")
            for role, filled in (("control", False), ("identified", True)):
                part = runs.select("run_id", "change").join(
                    mine.filter(role=role), on=["run_id", "change"], how="left", maintain_order="left"
                )
                offsets = row + _spread(len(part))
                axis.hlines(
                    offsets,
                    part["accuracy_low"],
                    part["accuracy_high"],
                    color=pens[arm].colour,
                    linewidth=1.2,
                )
                _dots(axis, row, pens[arm], part["accuracy"].to_list(), filled=filled)
            axis.plot(runs["baseline"], row + _spread(len(runs)), "|", color=GREY, markersize=11, zorder=2)
        _rows(axis, shown)
        axis.set_xlim(min(0.4, float(found["chance"][0]) - 0.1), 1.03)
        return True

    return panel
