"""Factorial tables of an ablation: what each point scores, main effects and two-way interactions.

A unit is a seed. An effect is taken inside each seed, between runs on the same data, and averaged over the
contexts in which it can be seen: pairs of points that differ on one axis alone (for an interaction: the four
corners of two axes). So a table with holes has effects all the same, from the pairs that it holds.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import torch

from arena.ablation.axes import AXES, IDLE, Level, Levels, level_text, named
from arena.ablation.request import Ablation, gates_of_model
from arena.grid.tuning_section import TuningSection
from arena.memory import GateSpec
from arena.model import ModelConfig, build_model
from arena.statistics import (
    MIN_UNITS,
    bootstrap_interval,
    claim_seeds,
    holm,
    interquartile_mean,
    sign_flip_test,
)

METRIC = "chance_scaled_accuracy"
ALPHA = 0.05
CELL = ("task", "task_params", "eval_length")

Scores = dict[int, float]
"""Seed -> score."""


def units(rows: pl.DataFrame) -> pl.DataFrame:
    """One row a run and length that is reported on split test: ``score`` is the chance-scaled accuracy.

    Lengths whose sequences are so few that training may have met them all have rows of split train only.

    Args:
        rows: of ``arena.load_results``; runs that served the choice of a learning rate are left out.
    """
    kept = rows.filter(
        pl.col("reported"),
        pl.col("split") == "test",
        pl.col("metric") == METRIC,
        pl.col("status") != "failed",
        pl.col("stage") == "final",
    )
    names = [*CELL, "arm", "model_params", "seed", "lr", "params", "state_bytes", "steps", "wall_s"]
    return kept.select(*names, score="value")


def levels_of_params(model_params: str) -> tuple[GateSpec, Levels]:
    """Gate setting and levels of a model, from the column ``model_params`` of its rows."""
    with torch.device("meta"):
        return gates_of_model(build_model(ModelConfig(**json.loads(model_params)), seed=0))


def point_table(rows: pl.DataFrame, base: str, ledger: pl.DataFrame | None = None) -> pl.DataFrame:
    """One row a task, length and point.

    Args:
        rows: of ``arena.load_results``.
        base: the arm that the others are compared with.
        ledger: of the tuner, for ``ms_per_step`` and ``flops_per_token``; None: the former from the runs'
            wall time, the latter null.

    Returns:
        The cell, ``arm``, ``named`` (the architecture at that point, or null), one column an axis (its
        level as text), ``erase_low``, ``erase_high``, ``write_low``, ``write_high`` (the values that the
        gates can take), ``seeds``, ``mean``, ``min``, ``max``, ``iqm``, ``low``, ``high`` of the score,
        ``difference`` (paired difference to the base, mean over the seeds), ``difference_iqm``,
        ``difference_low`` and ``difference_high`` (its interquartile mean and the interval), ``lr``,
        ``params``, ``state_bytes``, ``flops_per_token``, ``ms_per_step``. Intervals are null below 10 seeds.
    """
    table = units(rows)
    found = []
    specs = {text: levels_of_params(text) for text in table["model_params"].unique()}
    costs = _costs(table, ledger)
    for cell, part in table.group_by(CELL, maintain_order=True):
        scores = _scores(part)
        for (arm,), runs in part.group_by("arm", maintain_order=True):
            spec, levels = specs[runs["model_params"][0]]
            against = _paired([scores[arm], scores.get(base, {})], [1, -1])
            difference = summary(against) if arm != base else dict.fromkeys(summary([]))
            found.append(
                {
                    **dict(zip(CELL, cell, strict=True)),
                    "arm": arm,
                    "named": named(spec),
                    **{axis: level_text(level) for axis, level in levels.items()},
                    **dict(zip(("erase_low", "erase_high"), spec.erase_interval, strict=True)),
                    **dict(zip(("write_low", "write_high"), spec.write_interval, strict=True)),
                    **summary(list(scores[arm].values())),
                    "difference": difference["mean"],
                    **{f"difference_{name}": difference[name] for name in ("iqm", "low", "high")},
                    "lr": runs["lr"][0],
                    "params": runs["params"].max(),
                    "state_bytes": runs["state_bytes"].max(),
                    **costs.get((*cell[:2], arm), {"flops_per_token": None, "ms_per_step": None}),
                }
            )
    return pl.DataFrame(found, infer_schema_length=None)


def effect_table(
    rows: pl.DataFrame,
    base: str,
    ledger: pl.DataFrame | None = None,
    declared: Mapping[str, int] | None = None,
) -> pl.DataFrame:
    """Main effects and two-way interactions by task and length.

    A main effect is the score at level ``to`` less that at ``of``, the base's level; an interaction is the
    effect of ``to`` where ``second_to`` holds less the same effect at the base's level of ``second``.

    Args:
        rows: as for :func:`point_table`; so are ``base`` and ``ledger``.
        base: the arm that the others are compared with.
        ledger: of the tuner.
        declared: of :func:`declared_effects`: effects that the rows do not show, as a point has no result
            yet or failed, count in the family all the same. None: what the rows show is the family.

    Returns:
        The cell; ``kind`` (``main`` or ``interaction``), ``axis``, ``of``, ``to``, ``second``, ``second_of``,
        ``second_to`` (null for main effects); ``contexts``, over how many pairs (or fours) of points it is a
        mean; ``seeds``, ``mean``, ``min``, ``max``, ``iqm``, ``low``, ``high`` over the seeds; ``p``, of a
        sign-flip test; ``p_holm``, adjusted for all effects of its kind at the longest length of each task,
        those not seen included (null at other lengths); ``needed``, the fewest seeds with which one of so
        many effects can be a claim, and all that were asked for; ``claim``: there are as many, p_holm is at
        most 0.05 and the interval leaves out 0; and for main effects the cost: ``params`` and ``state_bytes``
        that are added, ``flops`` (a token) and ``time`` as ratios.
    """
    points = point_table(rows, base, ledger)
    if points.is_empty():
        return pl.DataFrame()
    table = units(rows)
    found: list[dict[str, Any]] = []
    for cell, part in table.group_by(CELL, maintain_order=True):
        here = points.filter(pl.col(name) == value for name, value in zip(CELL, cell, strict=True))
        entries = {row["arm"]: row for row in here.iter_rows(named=True)}
        if base not in entries:
            continue
        scores = _scores(part)
        for fields, contexts, signs in _contrasts(entries, entries[base]):
            effects = [_paired_by_seed([scores[arm] for arm in context], signs) for context in contexts]
            seeds = set.intersection(*(set(effect) for effect in effects))
            values = [float(np.mean([effect[seed] for effect in effects])) for seed in sorted(seeds)]
            found.append(
                {
                    **dict(zip(CELL, cell, strict=True)),
                    **fields,
                    "contexts": len(contexts),
                    **summary(values),
                    "p": sign_flip_test(values) if values else 1.0,
                    **(_cost(entries, contexts) if fields["kind"] == "main" else {}),
                }
            )
    if not found:
        return pl.DataFrame()
    return _judged(pl.DataFrame(found, infer_schema_length=None), declared or {})


def declared_effects(ablation: Ablation) -> dict[str, int]:
    """How many effects of each kind (``main``, ``interaction``) an ablation will test, on how many
    ``seeds``.
    """
    entries = {
        arm: {axis: level_text(level) for axis, level in levels.items()}
        for arm, levels in ablation.levels.items()
    }
    kinds = [fields["kind"] for fields, *_ in _contrasts(entries, entries[ablation.base])]
    found = {kind: kinds.count(kind) * len(ablation.experiment.tasks) for kind in ("main", "interaction")}
    section = ablation.experiment.tuning or TuningSection()
    return {**found, "seeds": len(section.report_seeds)}


def seeds_for_a_claim(ablation: Ablation) -> tuple[int, int]:
    """How many main effects an ablation will test, and the fewest seeds with which one can be a claim."""
    changes = declared_effects(ablation)["main"]
    return changes, claim_seeds(max(changes, 1), ALPHA)


def summary(values: Sequence[float]) -> dict[str, float | int | None]:
    """``seeds``, ``mean``, ``min``, ``max``, and from 10 seeds on ``iqm`` with its interval ``low``, ``high``
    (null where that has no width).
    """
    interval = bootstrap_interval([values]) if len(values) else None
    return {
        "seeds": len(values),
        "mean": float(np.mean(values)) if len(values) else None,
        "min": min(values, default=None),
        "max": max(values, default=None),
        "iqm": float(interquartile_mean(values)) if len(values) >= MIN_UNITS else None,
        "low": interval[0] if interval else None,
        "high": interval[1] if interval else None,
    }


def _scores(part: pl.DataFrame) -> dict[str, Scores]:
    found: dict[str, Scores] = {}
    for arm, seed, score in part.select("arm", "seed", "score").iter_rows():
        found.setdefault(arm, {})[seed] = score
    return found


def _paired_by_seed(points: Sequence[Scores], signs: Sequence[int]) -> Scores:
    """The signed sum of several points' scores, for every seed that all of them have."""
    shared = set.intersection(*(set(point) for point in points))
    return {
        seed: sum(sign * point[seed] for sign, point in zip(signs, points, strict=True)) for seed in shared
    }


def _paired(points: Sequence[Scores], signs: Sequence[int]) -> list[float]:
    return [value for _, value in sorted(_paired_by_seed(points, signs).items())]


Contrast = tuple[dict[str, Any], Sequence[tuple[str, ...]], tuple[int, ...]]
"""What an effect is, the points of each context, and the sign of each point."""


def _contrasts(entries: dict[str, dict[str, Any]], base: dict[str, Any]) -> Iterable[Contrast]:
    """Every main effect and two-way interaction that the points allow, with their contexts."""
    changes = [
        (axis, level)
        for axis in AXES
        for level in sorted({entry[axis] for entry in entries.values()} - {base[axis], IDLE})
        if base[axis] != IDLE
    ]
    for axis, level in changes:
        contexts = [
            (arm, other)
            for arm, entry in entries.items()
            if entry[axis] == base[axis]
            for other in _moved(entries, entry, {axis: level}, base)
        ]
        if contexts:
            yield (
                {"kind": "main", "axis": axis, "of": base[axis], "to": level}
                | dict.fromkeys(("second", "second_of", "second_to")),
                contexts,
                (-1, 1),
            )
    for (axis, level), (second, other) in itertools.combinations(changes, 2):
        if axis == second:
            continue
        fours = [
            (arm, first, then, both)
            for arm, entry in entries.items()
            if entry[axis] == base[axis] and entry[second] == base[second]
            for first in _moved(entries, entry, {axis: level}, base)
            for then in _moved(entries, entry, {second: other}, base)
            for both in _moved(entries, entry, {axis: level, second: other}, base)
        ]
        if fours:
            yield (
                {"kind": "interaction", "axis": axis, "of": base[axis], "to": level}
                | {"second": second, "second_of": base[second], "second_to": other},
                fours,
                (1, -1, -1, 1),
            )


def _moved(
    entries: dict[str, dict[str, Any]], start: dict[str, Any], change: dict[str, Level], base: dict[str, Any]
) -> list[str]:
    """The points that differ from ``start`` by the change alone.

    An axis that has lost its meaning on the way (the range of an erase gate that is gone) does not count,
    where the other point has the base's level on it.
    """

    def same(axis: str, a: Level, b: Level) -> bool:
        return a == b or {a, b} == {IDLE, base[axis]}

    return [
        arm
        for arm, entry in entries.items()
        if all(
            entry[axis] == change[axis] if axis in change else same(axis, start[axis], entry[axis])
            for axis in AXES
        )
    ]


def _cost(entries: dict[str, dict[str, Any]], contexts: Sequence[tuple[str, ...]]) -> dict[str, float | None]:
    pairs = [(entries[a], entries[b]) for a, b in contexts]

    def ratio(name: str) -> float | None:
        found = [b[name] / a[name] for a, b in pairs if a[name] and b[name]]
        return float(np.exp(np.mean(np.log(found)))) if found else None

    return {
        "params": float(np.mean([b["params"] - a["params"] for a, b in pairs])),
        "state_bytes": float(np.mean([b["state_bytes"] - a["state_bytes"] for a, b in pairs])),
        "flops": ratio("flops_per_token"),
        "time": ratio("ms_per_step"),
    }


def _judged(table: pl.DataFrame, declared: Mapping[str, int]) -> pl.DataFrame:
    """Add ``p_holm``, ``needed`` and ``claim``."""
    longest = pl.col("eval_length") == pl.col("eval_length").max().over("task", "task_params")
    table = table.with_row_index("row")
    adjusted: dict[int, float] = {}
    needed: dict[str, int] = {}
    for kind in ("main", "interaction"):
        family = table.filter(longest, pl.col("kind") == kind)
        if family.height:
            unseen = max(0, declared.get(kind, 0) - family.height)
            p_holm = holm(family["p"].to_list() + [1.0] * unseen)
            adjusted |= dict(zip(family["row"], p_holm.tolist(), strict=False))
            needed[kind] = max(claim_seeds(len(p_holm), ALPHA), declared.get("seeds", 0))
    table = table.with_columns(
        p_holm=pl.col("row").replace_strict(adjusted, default=None, return_dtype=pl.Float64),
        needed=pl.col("kind").replace_strict(needed, default=None, return_dtype=pl.Int64),
    )
    apart = (pl.col("low") > 0) | (pl.col("high") < 0)
    return table.with_columns(
        claim=((pl.col("p_holm") <= ALPHA) & apart & (pl.col("seeds") >= pl.col("needed"))).fill_null(False)
    ).drop("row")


def _costs(
    table: pl.DataFrame, ledger: pl.DataFrame | None
) -> dict[tuple[str, str, str], dict[str, float | None]]:
    """(task, task_params, arm) -> ``flops_per_token`` and ``ms_per_step``."""
    if ledger is None or ledger.is_empty():
        ledger = (
            table.group_by("task", "task_params", "arm")
            .agg(ms_per_step=(1000 * pl.col("wall_s") / pl.col("steps")).filter(pl.col("steps") > 0).mean())
            .with_columns(flops_per_token=pl.lit(None, dtype=pl.Float64))
        )
    names = ("flops_per_token", "ms_per_step")
    return {
        (row["task"], row["task_params"], row["arm"]): {name: row[name] for name in names}
        for row in ledger.iter_rows(named=True)
    }
