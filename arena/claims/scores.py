"""What a claim is judged by, and what is kept of a run in the repository: one small tidy table."""

from __future__ import annotations

from typing import Any

import polars as pl

from arena.report.evidence_tables import panel_table
from arena.report.tables import scores

SCORE_SCHEMA: dict[str, Any] = {
    **dict.fromkeys(("stage", "task", "task_params", "arm", "arch"), pl.String),
    **dict.fromkeys(("seed", "eval_length"), pl.Int64),
    "status": pl.String,
    **dict.fromkeys(("score", "accuracy", "sequence_accuracy", "chance", "lr", "weight_decay"), pl.Float64),
    **dict.fromkeys(("params", "state_bytes", "steps", "train_tokens"), pl.Int64),
}
"""Columns of a claim's scores. ``stage``: ``final`` (a retrained winner on split test, a row for each run and
length) or ``panel`` (a run of the learning-rate panel on split valid; ``eval_length`` is null, the score is
the mean over the valid lengths). ``score``: chance-scaled accuracy; a diverged run has the worst.
``state_bytes``: of one sequence of that length."""


def score_table(rows: pl.DataFrame) -> pl.DataFrame:
    """The scores of a result folder.

    Args:
        rows: as ``load_results`` gives them.

    Returns:
        Columns as in :data:`SCORE_SCHEMA`, in a fixed order.
    """
    costs = rows.select("run_id", "params", "steps", "train_tokens").unique("run_id")
    finals = (
        scores(rows.filter(stage="final"))
        .filter(split="test")
        .join(costs, on="run_id")
        .with_columns(stage=pl.lit("final"), score=pl.col("chance_scaled_accuracy"))
    )
    parts = [finals]
    panel = panel_table(rows, "chance_scaled_accuracy")
    if not panel.is_empty():
        status = pl.when("diverged").then(pl.lit("diverged")).otherwise(pl.lit("done"))
        parts.append(panel.with_columns(stage=pl.lit("panel"), status=status))
    filled = [
        part.select(
            (pl.col(name) if name in part.columns else pl.lit(None)).cast(kind).alias(name)
            for name, kind in SCORE_SCHEMA.items()
        )
        for part in parts
    ]
    return pl.concat(filled).sort("stage", "task", "task_params", "arm", "seed", "eval_length", "lr")


def windows(panel: pl.DataFrame) -> pl.DataFrame:
    """The window of good learning rates of every seed of a panel.

    Returns:
        task, task_params, arm, seed, ``decades`` (as ``arena.report.evidence_tables.window_table`` measures
        it, for one seed), ``best``, and ``open``: the window reaches an end of the panel, the true one is
        wider.
    """
    from arena.report.evidence_tables import window_table

    parts = [
        window_table(part).with_columns(seed=pl.lit(seed, dtype=pl.Int64))
        for (seed,), part in panel.group_by("seed", maintain_order=True)
    ]
    if not parts:
        names = {"task": pl.String, "task_params": pl.String, "arm": pl.String, "seed": pl.Int64}
        return pl.DataFrame(schema={**names, "decades": pl.Float64, "best": pl.Float64, "open": pl.Boolean})
    return (
        pl.concat(parts)
        .with_columns(open=pl.col("open_low") | pl.col("open_high"))
        .select("task", "task_params", "arm", "seed", "decades", "best", "open")
    )
