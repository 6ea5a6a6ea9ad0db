"""Measure the trained models of a result folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl

import synthetic_tasks
from arena.blocks.registry import near
from arena.dynamics.dictionary import data_dictionary
from arena.dynamics.measure import measure
from arena.grid.plan import TESTED_STAGES
from arena.grid.results import load_model, load_results

SCORE = "chance_scaled_accuracy"
_RUN_COLUMNS = ["run_id", "arm", "arch", "task", "task_params", "seed", "trial", "stage"]
_TRAIN_COLUMNS = ["train_length_min", "train_length_max"]


def choose_runs(
    directory: str | Path,
    *,
    runs: Sequence[str] | None = None,
    arms: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    per_arm: int | None = 1,
) -> pl.DataFrame:
    """The runs of a folder to look into: of each arm and task the best ones on split valid.

    Only runs that are reported count (stages ``grid`` and ``final``) and that are done. The best have the
    highest mean of chance-scaled accuracy over the validation lengths, ties by the lower mean loss.

    Args:
        directory: A result folder, as given to ``arena grid --out``.
        runs: Run ids; then these, whatever their stage and score.
        arms: Arms (or architectures) to keep; None: all.
        tasks: Tasks to keep; None: all.
        per_arm: How many of each arm and task; None: all.

    Returns:
        One row a run: run_id, arm, arch, task, task_params, seed, trial, stage, train_length_min,
        train_length_max, score and loss (means on split valid), test_lengths.

    Raises:
        StoreError: the folder does not exist or holds no results.
        ValueError: an unknown run, arm or task; nothing is left.
    """
    if per_arm is not None and per_arm < 1:
        raise ValueError(f"per_arm must be at least 1, not {per_arm}")
    rows = load_results(directory, all_requests=runs is not None).filter(pl.col("status") == "done")
    for column, names in (("run_id", runs), ("arm", arms), ("task", tasks)):
        known = rows[column].unique().sort().to_list()
        for name in names or ():
            if name not in known:
                raise ValueError(f"{directory} holds no finished {column} {name!r}{near(name, known)}")
        if names is not None:
            rows = rows.filter(pl.col(column).is_in(list(names)))
    if runs is None:
        rows = rows.filter(pl.col("stage").is_in(TESTED_STAGES))

    def mean(metric: str) -> pl.Expr:
        return pl.col("value").filter((pl.col("metric") == metric) & ~pl.col("reported")).mean()

    chosen = (
        rows.group_by([*_RUN_COLUMNS, *_TRAIN_COLUMNS])
        .agg(
            mean(SCORE).alias("score"),
            mean("loss").alias("loss"),
            pl.col("eval_length").filter(pl.col("reported")).unique().sort().alias("test_lengths"),
        )
        .sort("task", "task_params", "arm", pl.col("score").neg(), "loss", "run_id", nulls_last=True)
    )
    if runs is None and per_arm is not None:
        chosen = chosen.group_by("task", "task_params", "arm", maintain_order=True).head(per_arm)
    if chosen.is_empty():
        raise ValueError(f"{directory} holds no finished run of the stages {', '.join(TESTED_STAGES)}")
    return chosen.select([*_RUN_COLUMNS, *_TRAIN_COLUMNS, "score", "loss", "test_lengths"])


def measured_lengths(task: synthetic_tasks.Task, row: dict[str, Any]) -> list[int]:
    """Where a run is looked at: about its longest training length, and far beyond it.

    Far is its longest reported length, or four times the training length where that is longer.
    """
    longest = row["train_length_max"]
    far = max([4 * longest, *(row["test_lengths"] or [])])
    return sorted({task.legal_length(longest), task.legal_length(far)})


def measure_runs(
    directory: str | Path,
    chosen: pl.DataFrame,
    *,
    lengths: Sequence[int] | None = None,
    examples: int = 8,
    split: str = "valid",
    **options: Any,
) -> Iterator[pl.DataFrame]:
    """Measure runs one by one, so that no more than one table has to be held.

    Args:
        directory: The result folder.
        chosen: Runs, as :func:`choose_runs` gives them.
        lengths: Sequence lengths; None: :func:`measured_lengths`. One that a task does not accept is moved to
            the next that it does.
        examples: Sequences of each length, samples 0, 1, ... of seed 0.
        split: Split that they are from. Nothing is trained on ``valid``.
        **options: Of :func:`~arena.dynamics.measure.measure`.

    Yields:
        For each run and length the table of ``measure``, with the columns run_id, arm, arch, task,
        task_params, seed and length in front.
    """
    options = {"points": 64, **options}
    for row in chosen.iter_rows(named=True):
        task = synthetic_tasks.get(row["task"], **json.loads(row["task_params"]))
        model = load_model(directory, row["run_id"])
        wanted = measured_lengths(task, row) if lengths is None else lengths
        for length in sorted({task.legal_length(length) for length in wanted}):
            batch = task.sample(batch_size=examples, length=length, seed=0, split=split)
            frame = measure(model, batch, task=task, train_length=row["train_length_max"], **options)
            own = ["run_id", "arm", "arch", "task", "task_params", "seed"]
            labels = [pl.lit(row[name]).alias(name) for name in own]
            yield frame.select(*labels, pl.lit(length, pl.Int64).alias("length"), pl.all())


def measure_directory(
    directory: str | Path,
    *,
    runs: Sequence[str] | None = None,
    arms: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    per_arm: int | None = 1,
    **options: Any,
) -> dict[str, pl.DataFrame]:
    """Look into the best trained models of a result folder.

    Args:
        directory: A result folder, as given to ``arena grid --out``.
        runs: As in :func:`choose_runs`, with ``arms``, ``tasks`` and ``per_arm``.
        **options: Of :func:`measure_runs` and :func:`~arena.dynamics.measure.measure`.

    Returns:
        ``runs``: what was looked at; ``measurements``: all tables, one under the other; ``dictionary``: name,
        unit, meaning and equation of every quantity.

    Raises:
        StoreError: the folder does not exist or holds no results.
        ValueError: an unknown run, arm, task or quantity.
    """
    chosen = choose_runs(directory, runs=runs, arms=arms, tasks=tasks, per_arm=per_arm)
    tables = list(measure_runs(directory, chosen, **options))
    return {"runs": chosen, "measurements": pl.concat(tables), "dictionary": data_dictionary()}


def summarise(measurements: pl.DataFrame) -> pl.DataFrame:
    """Rows of single tokens, sequences and contributions taken together over a role.

    Returns:
        For every run and length (where there are any), layer, block, head, role, micro-step and quantity:
        mean, std, min, q05, median, q95, max and n of ``value``. Quantities that a block does not have keep a
        row of nulls.
    """
    labels = ["run_id", "arm", "arch", "task", "task_params", "seed", "length"]
    keys = [*(c for c in labels if c in measurements.columns), "layer", "block", "head", "role"]
    keys += ["micro", "quantity"]
    value = pl.col("value")
    return (
        measurements.filter(pl.col("statistic") == "value")
        .group_by(keys, maintain_order=True)
        .agg(
            value.mean().alias("mean"),
            value.std(ddof=0).alias("std"),
            value.min().alias("min"),
            value.quantile(0.05, "linear").alias("q05"),
            value.median().alias("median"),
            value.quantile(0.95, "linear").alias("q95"),
            value.max().alias("max"),
            value.count().alias("n"),
        )
    )
