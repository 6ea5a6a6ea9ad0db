"""Tables of the evidence of tuning: was every arm given the same, was it enough, how sensitive is it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from arena.report.tables import point_scores
from arena.statistics import expected_best, expected_best_band

TUNED = ("search", "extension", "exploit")
"""Stages whose trials an arm's choice is made from."""
SPENT = (*TUNED, "panel", "final", "pilot")
WINDOW = 0.05
"""The window of good learning rates: scores within 5 % of the best."""

INDEX = ("task", "task_params", "arm")


def best_of_n_table(points: pl.DataFrame) -> pl.DataFrame:
    """Expected best score of n trials, by task and arm, both estimators with 95 % bootstrap bands.

    Only the paired points of stage ``search`` count: those of an adaptive stage depend on each other, those
    of an extension lie elsewhere.

    Args:
        points: of ``point_scores``.

    Returns:
        task, task_params, arm, ``n``, ``points`` (N), ``unbiased``, ``unbiased_low``, ``unbiased_high``
        (Tang), ``replaced``, ``replaced_low``, ``replaced_high`` (Dodge), ``trusted``: n <= N / 2.
    """
    frames = []
    for key, part in points.filter(stage="search").group_by(INDEX, maintain_order=True):
        values = part["score"].to_numpy()
        sizes = np.arange(1, len(values) + 1)
        frame: dict[str, Any] = dict(zip(INDEX, key, strict=True)) | {"n": sizes, "points": len(values)}
        for name, unbiased in (("unbiased", True), ("replaced", False)):
            frame[name] = expected_best(values, sizes, unbiased=unbiased)
            low, high = expected_best_band(values, sizes, unbiased=unbiased)
            frame |= {f"{name}_low": low, f"{name}_high": high}
        frames.append(
            pl.DataFrame(frame).with_columns(
                pl.col("n", "points").cast(pl.Int64), trusted=pl.col("n") <= pl.col("points") / 2
            )
        )
    return pl.concat(frames) if frames else pl.DataFrame()


def panel_table(rows: pl.DataFrame, metric: str = "accuracy", lengths: Sequence[int] = ()) -> pl.DataFrame:
    """The learning-rate panel: task, task_params, arm, lr, seed, ``score`` on valid (as ``point_scores``) and
    ``diverged``, of every run of stage ``panel``.
    """
    parts = [
        point_scores(part, metric, lengths).with_columns(seed=pl.lit(seed, dtype=pl.Int64))
        for (seed,), part in rows.filter(stage="panel").group_by("seed")
    ]
    names = [*INDEX, "lr", "seed", "score", "diverged"]
    return pl.concat(parts).select(names).sort(names[:5]) if parts else pl.DataFrame()


def window_table(panel: pl.DataFrame) -> pl.DataFrame:
    """How sensitive each arm is to the learning rate.

    The curve is the mean over the seeds, linear in log lr between the rates of the panel; the window is
    where it stays within 5 % of its best around the best.

    Returns:
        task, task_params, arm, ``rates``, ``seeds``, ``best``, ``best_lr``, ``low_lr``, ``high_lr``,
        ``decades``: width of the window, ``open_low``, ``open_high``: it reaches the end of the panel, so the
        true one is wider, ``window_mean``: mean of the curve over the window, ``panel_mean``: over all rates.
    """
    found = []
    for key, part in panel.group_by(INDEX, maintain_order=True):
        curve = part.group_by("lr").agg(pl.col("score").mean()).sort("lr")
        rates, scores = curve["lr"].log10().to_numpy(), curve["score"].to_numpy()
        top = int(scores.argmax())
        low, high = (_edge(rates, scores, top, step) for step in (-1, 1))
        inside = np.unique(np.clip([low, *rates, high], low, high))
        heights = np.interp(inside, rates, scores)
        mean = np.trapezoid(heights, inside) / (high - low) if high > low else scores[top]
        found.append(
            {
                **dict(zip(INDEX, key, strict=True)),
                "rates": len(rates),
                "seeds": part["seed"].n_unique(),
                "best": scores[top],
                "best_lr": 10 ** rates[top],
                "low_lr": 10**low,
                "high_lr": 10**high,
                "decades": high - low,
                "open_low": bool(low == rates[0]),
                "open_high": bool(high == rates[-1]),
                "window_mean": float(mean),
                "panel_mean": float(scores.mean()),
            }
        )
    return pl.DataFrame(found, infer_schema_length=None)


def _edge(rates: np.ndarray, scores: np.ndarray, top: int, step: int) -> float:
    """log10 of the rate at which the curve leaves the window, going from the best in direction ``step``."""
    floor = scores[top] - WINDOW * abs(scores[top])
    at = top
    while 0 <= at + step < len(rates):
        if scores[at + step] < floor:
            share = (scores[at] - floor) / (scores[at] - scores[at + step])
            return float(rates[at] + share * (rates[at + step] - rates[at]))
        at += step
    return float(rates[at])


def spent_table(rows: pl.DataFrame, everything: pl.DataFrame) -> pl.DataFrame:
    """What each arm was given on each task, by stage.

    Args:
        rows: of the last request.
        everything: also of earlier requests in the same folder: their runs are pilots, and they count.

    Returns:
        task, task_params, arm, ``stage`` (``pilot`` for earlier requests), ``trials``: points with a result,
        ``runs``, ``failed`` (runs without a result), ``diverged``, ``tokens``, ``wall_s``: the runs' shares
        of their fleets' time.
    """
    present = pl.col("run_id").is_in(rows["run_id"].unique().to_list())
    runs = everything.unique("run_id").with_columns(
        stage=pl.when(present).then(pl.col("stage")).otherwise(pl.lit("pilot"))
    )
    done = pl.col("status") != "failed"
    order = pl.col("stage").replace_strict({name: place for place, name in enumerate(SPENT)}, default=99)
    return (
        runs.group_by(*INDEX, "stage")
        .agg(
            trials=pl.col("trial").filter(done).n_unique().cast(pl.Int64),
            runs=pl.len().cast(pl.Int64),
            failed=(~done).sum().cast(pl.Int64),
            diverged=(pl.col("status") == "diverged").sum().cast(pl.Int64),
            tokens=pl.col("train_tokens").filter(done).sum(),
            wall_s=pl.col("wall_s").filter(done).sum(),
        )
        .sort(*INDEX, order)
    )


def tuning_trials(spent: pl.DataFrame) -> dict[tuple[str, str, str], int]:
    """(task, task_params, arm) -> trials that its choice was made from."""
    table = spent.filter(pl.col("stage").is_in(TUNED)).group_by(*INDEX).agg(pl.col("trials").sum())
    return {(task, params, arm): trials for task, params, arm, trials in table.iter_rows()}


def importance_table(studies: Mapping[tuple[str, str, str], Any]) -> pl.DataFrame:
    """Which parameter the score depends on, by Optuna's default evaluator (PED-ANOVA in Optuna 5).

    Args:
        studies: (task, task_params, arm) -> Optuna study.

    Returns:
        task, task_params, arm, ``parameter``, ``importance`` (they sum to 1), ``trials`` (complete ones). A
        study with fewer than two of them, or equal scores only, says nothing and has no rows.
    """
    from optuna.importance import get_param_importances
    from optuna.trial import TrialState

    found = []
    for key, study in studies.items():
        trials = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        if len({trial.value for trial in trials}) < 2:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few trials: the report says so beside the numbers
            importances = get_param_importances(study)
        for parameter, importance in importances.items():
            cell = dict(zip(INDEX, key, strict=True))
            found.append({**cell, "parameter": parameter, "importance": importance, "trials": len(trials)})
    return pl.DataFrame(found, infer_schema_length=None)
