"""What early pruning would have cost, read from the unpruned search.

Recall is learned in jumps: a long plateau, then a sudden rise. A pruner that ranks by early scores throws out
who jumps late, and does so more to the architectures that do.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from arena.report.evidence_tables import INDEX
from arena.report.tables import SOLVED, point_scores

RUNGS = (0.25, 0.5)
"""Where successive halving would have cut, as fractions of the steps: the better half goes on."""


def halving_table(
    rows: pl.DataFrame, curves: pl.DataFrame, metric: str = "accuracy", lengths: Sequence[int] = ()
) -> pl.DataFrame:
    """Solvers that successive halving with identical rungs would have lost, by task and arm.

    At each of :data:`RUNGS` the better half of the trials left, by their last learning-curve point up to
    there, would have gone on (of equal scores, the smaller valid loss). A trial solves where its final
    chance-scaled accuracy on valid is at least ``SOLVED``.

    Args:
        rows: as ``load_results`` gives them; those of the paired search count.
        curves: as ``load_curves`` gives them.
        metric: that ranks, as in ``point_scores``.
        lengths: valid lengths it is taken at; empty: all.

    Returns:
        task, task_params, arm, ``trials``, ``kept`` (after the last rung), ``solvers``, ``lost``: solvers
        among those cut, ``best_lost``: whether the best trial was. Without curves that reach back to the
        first rung there are no rows.
    """
    search, seen = rows.filter(stage="search"), curves.filter(stage="search", split="valid")
    found = []
    for key, part in search.group_by(INDEX, maintain_order=True):
        cell = dict(zip(INDEX, key, strict=True))
        curve = seen.filter(**cell)
        steps = max(part["steps"].drop_nulls().to_list(), default=0)
        if curve.filter(pl.col("step") <= RUNGS[0] * steps).is_empty():
            continue
        finals = point_scores(part, metric, lengths)
        if finals.is_empty():
            continue
        scaled = point_scores(part, "chance_scaled_accuracy")
        solvers = set(scaled.filter(pl.col("score") >= SOLVED)["trial"])
        alive = set(finals["trial"])
        for rung in RUNGS:
            alive = _better_half(curve, alive, rung * steps, metric, lengths)
        found.append(
            {
                **cell,
                "trials": finals.height,
                "kept": len(alive),
                "solvers": len(solvers),
                "lost": len(solvers - alive),
                "best_lost": finals["trial"][0] not in alive,
            }
        )
    return pl.DataFrame(found, infer_schema_length=None)


def _better_half(
    curve: pl.DataFrame, alive: set[int], step: float, metric: str, lengths: Sequence[int]
) -> set[int]:
    """The trials that go on at a rung; one without any point so far comes last."""
    last = curve.filter(pl.col("step") <= step).filter(
        pl.col("step") == pl.col("step").max().over("run_id"),
        pl.col("eval_length").is_in(list(lengths)) if lengths else pl.lit(True),
    )
    sign = -1.0 if metric == "loss" else 1.0
    means = last.group_by("trial").agg(
        score=sign * pl.col("value").filter(pl.col("metric") == metric).mean(),
        loss=pl.col("value").filter(pl.col("metric") == "loss").mean(),
    )
    ranked = (
        pl.DataFrame({"trial": sorted(alive)}, schema={"trial": pl.Int64})
        .join(means, on="trial", how="left")
        .sort(["score", "loss", "trial"], descending=[True, False, False], nulls_last=True)
    )
    return set(ranked["trial"].head(-(-len(alive) // 2)))
