"""One sentence an axis: what it buys, on which task, at what cost, all of it from the numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import polars as pl

from arena.ablation.axes import AXES
from arena.ablation.effects import ALPHA
from arena.statistics import MIN_UNITS

LEGEND = (
    "Score: chance-scaled accuracy, (accuracy - chance) / (1 - chance), at the longest reported length; Δ: "
    "its difference to the first point in the same seeds, by itself no claim. An effect is taken within each "
    "seed (same data), over all pairs of points that differ on that axis alone. "
    f"From {MIN_UNITS} seeds on: interquartile mean [its 95 % bootstrap interval]; below that, and where it "
    "has no width: mean (lowest..highest seed), and no claim. A claim needs an interval without 0 and a "
    f"sign-flip test of p <= {ALPHA} after Holm's correction for all main effects (for an interaction: "
    "all interactions) that were asked for. Time was measured while other work may have run."
)


def effect_text(effect: Mapping[str, Any]) -> str:
    """An effect with what is known of its spread."""
    if not effect["seeds"]:
        return "no seeds in common"
    if effect["low"] is not None:
        return f"{effect['iqm']:+z.2f} [{effect['low']:+z.2f}, {effect['high']:+z.2f}]"
    return f"{effect['mean']:+z.2f} ({effect['min']:+z.2f}..{effect['max']:+z.2f})"


def why_not(effect: Mapping[str, Any]) -> str:
    """Why an effect is no claim; empty where its interval says it."""
    seeds = effect["seeds"]
    if seeds < effect["needed"]:
        return f"{seeds} of {effect['needed']} seeds"
    if effect["low"] is None:
        if effect["min"] < effect["max"]:
            return "no interval, for want of spread"
        return "all seeds agree" if effect["mean"] else "no seed differs"
    if effect["low"] <= 0 <= effect["high"]:
        return ""
    return f"p = {effect['p_holm']:.2g} after Holm's correction"


def axis_sentences(effects: pl.DataFrame, labels: Mapping[tuple[str, str], str]) -> dict[str, str]:
    """Axis -> its sentence, from the main effects at the longest length of each task.

    Args:
        effects: of ``effect_table``.
        labels: (task, task_params) -> short name.
    """
    found: dict[str, str] = {}
    if effects.is_empty():
        return found
    main = longest(effects).filter(kind="main")
    for axis in AXES:
        parts = []
        for (of, level), rows in main.filter(axis=axis).group_by("of", "to", maintain_order=True):
            claims, others = [], []
            for effect in rows.iter_rows(named=True):
                where, text = labels[effect["task"], effect["task_params"]], effect_text(effect)
                if effect["claim"]:
                    claims.append(f"{text} on {where}")
                else:
                    reason = why_not(effect)
                    others.append(f"{where} ({text}{'; ' if reason else ''}{reason})")
            said = [f"changes the score by {_listed(claims)}"] if claims else []
            said += [f"allows no claim on {_listed(others)}"] if others else []
            parts.append(f"{level} instead of {of} {', '.join(said)}, {_cost(axis, level, rows)}")
        if parts:
            found[axis] = f"{axis}: {'; '.join(parts)}."
    return found


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def longest(frame: pl.DataFrame) -> pl.DataFrame:
    """The rows at the longest length of each task."""
    return frame.filter(pl.col("eval_length") == pl.col("eval_length").max().over("task", "task_params"))


def _cost(axis: str, level: str, rows: pl.DataFrame) -> str:
    """What a level costs: parameters, state bytes, FLOPs, time; the mean over tasks."""
    params, state = rows["params"].mean(), rows["state_bytes"].mean()
    assert isinstance(params, float) and isinstance(state, float)
    words = [_more(params, "parameters"), _more(state, "state bytes")]
    for name, what in (("flops", "the FLOPs"), ("time", "the time")):
        ratios = rows[name].drop_nulls().to_list()
        if ratios:
            words.append(f"{math.exp(math.fsum(map(math.log, ratios)) / len(ratios)):.2f} x {what}")
    slow = (
        " (on the reference backend, which says little)"
        if (axis, level) == ("write_on", "correction")
        else ""
    )
    return "at " + ", ".join(words) + slow


def _more(change: float, what: str) -> str:
    return f"{change:+,.0f} {what}" if round(change) else f"the same {what}"
