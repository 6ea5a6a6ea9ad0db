"""The tables of a report, as polars frames: tidy, with every number that a claim needs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from arena.statistics import MIN_UNITS, bootstrap_interval, clopper_pearson, interquartile_mean

SOLVED = 0.95
"""A run solves a length when its chance-scaled accuracy, (accuracy - chance) / (1 - chance), is at least
this."""
MATCHED = 0.02
"""Architectures are matched where parameters and training tokens are within 2 % of the median; states:
equal."""

CELL = (
    "task", "task_params", "arm", "arch", "model_params", "trial", "lr", "weight_decay", "split",
    "eval_length",
)  # fmt: skip


def scores(rows: pl.DataFrame) -> pl.DataFrame:
    """One row a run and reported length: the metrics side by side, and whether the run solved it.

    Split ``test``, and ``train`` where a task's sequences of that length are so few that training may have
    met them all; split ``valid`` is no result.
    """
    measured = ("accuracy", "chance_scaled_accuracy", "sequence_accuracy", "loss")
    kept = rows.filter(pl.col("reported"), pl.col("status") != "failed", pl.col("metric").is_in(measured))
    wide = kept.pivot(
        on="metric",
        index=[*CELL, "seed", "run_id", "status", "state_bytes"],
        values="value",
        aggregate_function="first",
    )
    chance = kept.filter(metric="accuracy").select("run_id", "split", "eval_length", "chance")
    for name in measured:
        if name not in wide.columns:
            wide = wide.with_columns(pl.lit(None, dtype=pl.Float64).alias(name))
    wide = wide.join(chance, on=["run_id", "split", "eval_length"], how="left")
    return wide.with_columns(solved=pl.col("chance_scaled_accuracy") >= SOLVED)


def accuracy_table(rows: pl.DataFrame) -> pl.DataFrame:
    """Accuracy by task, architecture, point and length, over the seeds.

    Columns: those of a cell, then ``runs``, ``mean``, ``min``, ``max`` of the accuracy, ``iqm`` with
    ``iqm_low`` and ``iqm_high`` (null below 10 runs and where it would have no width), ``chance``,
    ``chance_scaled``, ``sequence_accuracy``, ``solved`` with ``solve_rate`` and its exact 95 % interval
    ``solve_low``, ``solve_high``, ``diverged``, ``state_bytes`` and ``values`` (the runs' accuracies, worst
    first).
    """
    cells = (
        scores(rows)
        .group_by(CELL, maintain_order=True)
        .agg(
            runs=pl.len(),
            mean=pl.col("accuracy").mean(),
            min=pl.col("accuracy").min(),
            max=pl.col("accuracy").max(),
            chance=pl.col("chance").first(),
            chance_scaled=pl.col("chance_scaled_accuracy").mean(),
            sequence_accuracy=pl.col("sequence_accuracy").mean(),
            solved=pl.col("solved").sum().cast(pl.Int64),
            diverged=(pl.col("status") == "diverged").sum().cast(pl.Int64),
            state_bytes=pl.col("state_bytes").max(),
            values=pl.col("accuracy").sort(),
        )
    )
    extra = []
    for solved, runs, values in cells.select("solved", "runs", "values").iter_rows():
        solve_low, solve_high = clopper_pearson(solved, runs)
        enough = runs >= MIN_UNITS
        interval = bootstrap_interval([values])
        extra.append(
            {
                "solve_rate": solved / runs,
                "solve_low": solve_low,
                "solve_high": solve_high,
                "iqm": float(interquartile_mean(values)) if enough else None,
                "iqm_low": interval[0] if interval else None,
                "iqm_high": interval[1] if interval else None,
            }
        )
    names = ("solve_rate", "solve_low", "solve_high", "iqm", "iqm_low", "iqm_high")
    cells = pl.concat([cells, pl.DataFrame(extra, schema=dict.fromkeys(names, pl.Float64))], how="horizontal")
    return cells.sort("task", "task_params", "eval_length", "arm", "trial")


def point_scores(rows: pl.DataFrame, metric: str = "accuracy", lengths: Sequence[int] = ()) -> pl.DataFrame:
    """Each trained point and its score on valid: what a choice may look at, never what is reported.

    Args:
        rows: as ``load_results`` gives them.
        metric: what the score is the mean of; of ``loss``, the negative.
        lengths: valid lengths it is taken at; empty: all.

    Returns:
        task, task_params, arm, stage, trial, lr, weight_decay, ``score``: mean over the valid lengths and
        the seeds, ``loss``: the same of the valid loss, ``diverged``: whether any of its runs did,
        ``seeds``: how many runs it is a mean of. The best of each (task, arm) comes first: highest score;
        ties by loss, then by the smaller rate. Failed runs have no score and are left out.
    """
    at = pl.col("eval_length").is_in(list(lengths)) if lengths else pl.lit(True)

    def mean(name: str, where: pl.Expr) -> pl.Expr:
        return pl.col("value").filter(pl.col("metric") == name, ~pl.col("reported"), where).mean()

    score = mean(metric, at)
    return (
        rows.filter(pl.col("status") != "failed")
        .group_by("task", "task_params", "arm", "stage", "trial", "lr", "weight_decay")
        .agg(
            score=-score if metric == "loss" else score,
            loss=mean("loss", at),
            diverged=(pl.col("status") == "diverged").any(),
            seeds=pl.col("run_id").n_unique(),
        )
        .sort(
            ["task", "task_params", "arm", "score", "loss", "lr", "trial"],
            descending=[False, False, False, True, False, False, False],
            nulls_last=True,
        )
    )


def chosen_points(rows: pl.DataFrame) -> pl.DataFrame:
    """The point (lr, weight decay) of each task and architecture that is best on valid: the first of
    :func:`point_scores`.

    Returns:
        task, task_params, arm, trial, and ``points``: how many there were.
    """
    return (
        point_scores(rows)
        .group_by("task", "task_params", "arm", maintain_order=True)
        .agg(trial=pl.col("trial").first(), points=pl.len())
    )


def overall_table(rows: pl.DataFrame) -> pl.DataFrame:
    """Each architecture over all tasks, at the longest reported length of each: chance-scaled accuracy and
    solve rate.

    A unit is a (task, seed). ``low`` and ``high`` are the stratified-bootstrap interval of the interquartile
    mean from 10 units on; below that they are null, and ``min`` and ``max`` tell the spread.
    """
    table = scores(rows)
    if table.is_empty():
        return pl.DataFrame()
    longest = table.group_by("task", "task_params").agg(eval_length=pl.col("eval_length").max())
    table = table.join(longest, on=["task", "task_params", "eval_length"])
    found = []
    for (arm,), part in table.group_by("arm", maintain_order=True):
        strata = [
            group["chance_scaled_accuracy"].to_list() for _, group in part.group_by("task", "task_params")
        ]
        units = [value for group in strata for value in group]
        interval = bootstrap_interval(strata)
        solved = int(part["solved"].sum())
        solve_low, solve_high = clopper_pearson(solved, len(units))
        found.append(
            {
                "arm": arm,
                "tasks": len(strata),
                "units": len(units),
                "mean": sum(units) / len(units),
                "min": min(units),
                "max": max(units),
                "iqm": float(interquartile_mean(units)) if len(units) >= MIN_UNITS else None,
                "low": interval[0] if interval else None,
                "high": interval[1] if interval else None,
                "solved": solved,
                "solve_low": solve_low,
                "solve_high": solve_high,
            }
        )
    return pl.DataFrame(found, infer_schema_length=None).sort("mean", "arm", descending=[True, False])


def budget_table(rows: pl.DataFrame) -> pl.DataFrame:
    """What each architecture was given on each task, and where that is not the same for all.

    Columns: task, task_params, arm, ``params``, ``active_params`` (without the experts that a token does not
    go through; null in folders from before there were any), ``state_bytes`` (of one sequence at the longest
    reported length), ``train_tokens`` (the most of any run), ``wall_s`` (mean of a run's share of its fleet's
    time) and ``unmatched``: the names of what differs from the median architecture by more than 2 % (states:
    at all).
    """
    done = rows.filter(pl.col("reported"), pl.col("status") != "failed")
    table = done.group_by("task", "task_params", "arm", maintain_order=True).agg(
        params=pl.col("params").max(),
        active_params=pl.col("active_params").max(),
        state_bytes=pl.col("state_bytes").max(),
        train_tokens=pl.col("train_tokens").max(),
        wall_s=pl.col("wall_s").mean(),
    )
    flags = []
    for name, margin in (("params", MATCHED), ("state_bytes", 0.0), ("train_tokens", MATCHED)):
        middle = pl.col(name).median().over("task", "task_params")
        differs = ((pl.col(name) - middle).abs() > margin * middle).fill_null(False)
        flags.append(pl.when(differs).then(pl.lit(name)))
    return table.with_columns(unmatched=pl.concat_str(flags, separator=", ", ignore_nulls=True))


def runs_table(rows: pl.DataFrame) -> pl.DataFrame:
    """One row a run: what it was, how it ended, what it took."""
    names = [
        "task", "task_params", "arm", "arch", "trial", "stage", "seed", "status", "reason", "steps", "params",
        "train_tokens", "lr", "weight_decay", "wall_s", "device", "backend", "dtype", "version", "space",
        "environment", "verdict", "fleet_id", "run_id",
    ]  # fmt: skip
    return rows.select(names).unique("run_id", maintain_order=True)


def task_labels(rows: pl.DataFrame) -> dict[tuple[str, str], str]:
    """(task, task_params) -> a short name; where a task occurs with several parameters, with those that
    differ.
    """
    pairs = sorted(set(rows.select("task", "task_params").iter_rows()))
    labels = {}
    for task, text in pairs:
        others = [json.loads(params) for name, params in pairs if name == task]
        mine = json.loads(text)
        differing = sorted(
            {key for other in others for key in {*other, *mine} if other.get(key) != mine.get(key)}
        )
        values = ", ".join(f"{key}={mine.get(key)}" for key in differing)
        labels[task, text] = f"{task} ({values})" if values else task
    return labels


def mixtures(rows: pl.DataFrame, environments: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for all that should be one and is several: versions, devices, packages, machines, commits."""
    lines = []
    done = rows.filter(pl.col("status") != "failed")
    for name in ("device", "dtype"):
        if done[name].n_unique() > 1:
            lines.append(f"{name}: " + " / ".join(sorted(done[name].unique())))
    backends: dict[str, set[str]] = {}  # by operator: architectures use different ones
    for word in {word for text in done["backend"].unique() for word in text.split()}:
        operator, _, backend = word.partition("=")
        backends.setdefault(operator, set()).add(backend)
    lines += [
        f"backend of {operator}: " + " / ".join(sorted(found))
        for operator, found in sorted(backends.items())
        if len(found) > 1
    ]
    for (task,), part in done.group_by("task", maintain_order=True):  # a version names the task's own one
        if part["version"].n_unique() > 1:
            lines.append(f"version of {task}: " + " / ".join(sorted(part["version"].unique())))
    facts = environment_facts(environments)
    lines += [f"{name}: " + " / ".join(sorted(found)) for name, found in facts.items() if len(found) > 1]
    return lines


def environment_facts(environments: Mapping[str, Mapping[str, Any]]) -> dict[str, set[str]]:
    """What the environments of runs say, by name (``packages torch``, ``commit``): the values that occur."""
    facts: dict[str, set[str]] = {}
    for around in {id(around): around for around in environments.values()}.values():  # many runs share one
        for key, value in around.items():
            inner = value if isinstance(value, dict) else {"": value}
            entries = {f"{key} {part}".strip(): entry for part, entry in inner.items()}
            for name, entry in entries.items():
                facts.setdefault(name, set()).add(_short(entry))
    return facts


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    commit, plus, rest = text.partition("+")
    return commit[:10] + plus + rest if len(commit) == 40 else text
