"""Two result folders side by side: measurements that both have, and settings that differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from arena.report.about import flat
from arena.report.tables import chosen_points, environment_facts
from arena.statistics import (
    MIN_UNITS,
    difference_interval,
    holm,
    interquartile_mean,
    paired_difference,
    paired_difference_interval,
    permutation_test,
    sign_flip_test,
)

ALPHA = 0.05
METRICS = ("accuracy", "chance_scaled_accuracy", "sequence_accuracy", "loss")
CELL = ("task", "task_params", "arm", "split", "eval_length", "metric")

DIFFERENCE_SCHEMA: dict[str, Any] = {
    **dict.fromkeys(("task", "task_params", "arm", "split"), pl.String),
    "eval_length": pl.Int64,
    "metric": pl.String,
    "paired": pl.Boolean,
    **dict.fromkeys(("runs_a", "runs_b", "pairs", "identical"), pl.Int64),
    **dict.fromkeys(("mean_a", "mean_b", "mean_difference", "iqm_difference", "low", "high"), pl.Float64),
    **dict.fromkeys(("least", "most"), pl.Float64),
    "values": pl.List(pl.Float64),
    **dict.fromkeys(("p", "p_holm"), pl.Float64),
    "beyond": pl.Boolean,
    "reason": pl.String,
}
"""Columns of the differences, B less A. ``paired``: by seed; ``pairs``: runs of the same seed, ``identical``:
those of equal value. ``iqm_difference``: of the interquartile means, with its 95 % interval ``low``,
``high`` (null below 10 runs, and where it has no width). ``least``, ``most``: the smallest and the
largest difference of a pair (unpaired: of any run of B and any of A). ``values``: the paired differences,
lowest first (unpaired: empty). ``p``: of the sign-flip test (unpaired: of the permutation test),
``p_holm``: corrected over all rows of its metric. ``beyond``: beyond noise; ``reason``: why not."""


def tested_rows(rows: pl.DataFrame) -> pl.DataFrame:
    """The runs that a report is about: winners on fresh seeds, or of a grid the points best on valid."""
    stages = set(rows["stage"])
    tested = rows.filter(pl.col("stage") == ("grid" if stages <= {"grid"} else "final"))
    keys = ["task", "task_params", "arm", "trial"]
    points = chosen_points(tested)
    failed = tested.filter(pl.col("status") == "failed")
    return pl.concat([tested.join(points.select(keys), on=keys, how="semi"), failed]).unique(
        maintain_order=True
    )


def difference_table(a: pl.DataFrame, b: pl.DataFrame) -> pl.DataFrame:
    """A row for each (task, parameters, arm, split, length, metric) that both folders measured.

    Runs are paired by seed where at least half of the smaller folder's seeds are in both; else all runs of
    both are compared unpaired. A difference is beyond noise where at least 10 runs (pairs) are there, means
    and interquartile means agree in sign, the 95 % interval excludes 0 (or has no width, and all pairs agree
    in sign) and p, Holm-corrected over all rows of the metric, is at most 0.05.

    Args:
        a: of :func:`tested_rows`.
        b: the same of the other folder.
    """
    sides = [_by_cell(side) for side in (a, b)]
    found = [
        _compared(dict(zip(CELL, cell, strict=True)), sides[0][cell], sides[1][cell])
        for cell in sides[0]
        if cell in sides[1]
    ]
    for metric in METRICS:
        family = [row for row in found if row["metric"] == metric]
        for row, p_holm in zip(family, holm([row["p"] for row in family]) if family else [], strict=True):
            row["p_holm"] = float(p_holm)
            _judge(row)
    return pl.DataFrame(
        [{name: row.get(name) for name in DIFFERENCE_SCHEMA} for row in found], schema=DIFFERENCE_SCHEMA
    )


def _by_cell(rows: pl.DataFrame) -> dict[tuple[Any, ...], dict[int, float]]:
    """Cell -> seed -> value, of what is reported."""
    kept = rows.filter(
        pl.col("reported"), pl.col("status") != "failed", pl.col("metric").is_in(METRICS)
    ).sort(CELL)
    found: dict[tuple[Any, ...], dict[int, float]] = {}
    for *cell, seed, value in kept.select(*CELL, "seed", "value").iter_rows():
        found.setdefault(tuple(cell), {}).setdefault(seed, value)
    return found


def _compared(cell: dict[str, Any], a: Mapping[int, float], b: Mapping[int, float]) -> dict[str, Any]:
    common = sorted(set(a) & set(b))
    paired = 2 * len(common) >= min(len(a), len(b))
    xs, ys = (
        np.array([side[seed] for seed in (common if paired else side)], dtype=np.float64) for side in (a, b)
    )
    row = cell | {
        "paired": paired, "runs_a": len(a), "runs_b": len(b), "pairs": len(common), "values": [],
        "identical": sum(a[seed] == b[seed] for seed in common), "p": 1.0,
        "mean_a": float(xs.mean()), "mean_b": float(ys.mean()),
    }  # fmt: skip
    if not (np.isfinite(xs).all() and np.isfinite(ys).all()):  # the loss of a diverged run
        row["reason"] = "a diverged run has no finite loss"
        return row
    row["mean_difference"] = float(ys.mean() - xs.mean())
    enough = min(len(xs), len(ys)) >= MIN_UNITS
    every = ys - xs if paired else ys[:, None] - xs
    row["least"], row["most"] = float(every.min()), float(every.max())
    if paired:
        row["values"] = sorted((ys - xs).tolist())
        row["p"] = sign_flip_test(ys - xs)
        interval = paired_difference_interval([ys], [xs])
        middle = paired_difference([ys], [xs])
    else:
        row["p"] = permutation_test(ys, xs)
        interval = difference_interval(ys, xs)
        middle = float(interquartile_mean(ys) - interquartile_mean(xs))
    row["iqm_difference"] = middle if enough else None
    row["low"], row["high"] = interval or (None, None)
    return row


def _judge(row: dict[str, Any]) -> None:
    row["beyond"] = False
    if row.get("reason"):
        return
    values, low = row["values"], row["low"]
    runs = len(values) if row["paired"] else min(row["runs_a"], row["runs_b"])
    same = row["mean_difference"] == 0 and (not values or values[0] == values[-1] == 0)
    agree = bool(values) and (values[0] > 0 or values[-1] < 0)
    if same:
        row["reason"] = "no difference"
    elif runs < MIN_UNITS:
        row["reason"] = f"{runs} of {MIN_UNITS} {'pairs' if row['paired'] else 'runs'}"
    elif low is None and not agree:
        row["reason"] = "no interval, for want of spread"
    elif row["iqm_difference"] * row["mean_difference"] <= 0:
        row["reason"] = "means and interquartile means disagree"
    elif low is not None and low <= 0 <= row["high"]:
        row["reason"] = "the interval holds 0"
    elif row["p_holm"] > ALPHA:
        row["reason"] = f"p = {row['p_holm']:.2g} after Holm's correction"
    else:
        row["beyond"] = True


Change = tuple[str, str, str, str]
"""Setting, its values in A and in B, and where that is so."""


def request_changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Change]:
    """Settings of the experiment files that differ; titles and claims are no settings."""
    first, second = (_settings(request) for request in (a, b))
    for name in dict.fromkeys([*first, *second]):
        if first.get(name) != second.get(name):
            yield name, _words(first.get(name)), _words(second.get(name)), "experiment file"


def _settings(request: Mapping[str, Any]) -> dict[str, Any]:
    data = {key: value for key, value in request.items() if key not in ("name", "title", "claim", "tasks")}
    found = flat(data)
    for number, entry in enumerate(request.get("tasks", [])):
        named = [other for other in request["tasks"][:number] if other.get("name") == entry.get("name")]
        label = f"task {entry.get('name')}" + (f" {len(named) + 1}" if named else "")
        found |= flat({key: value for key, value in entry.items() if key != "name"}, label)
    return {name: value for name, value in found.items() if value not in ({}, [])}


_FACTS = (
    "steps", "lr", "weight_decay", "train_length_min", "train_length_max", "n_examples", "params",
    "state_bytes", "train_tokens", "device", "dtype",
)  # fmt: skip


def run_changes(a: pl.DataFrame, b: pl.DataFrame, labels: Mapping[tuple[str, str], str]) -> Iterator[Change]:
    """What differs between runs of the same task and arm, as they ran: model, training, backends, versions.

    Args:
        a: of :func:`tested_rows`.
        b: the same of the other folder.
        labels: short names of the tasks.
    """
    sides = [_facts(side) for side in (a, b)]
    common = [key for key in sides[0] if key in sides[1]]
    found: dict[tuple[str, str, str], list[tuple[str, str, str]]] = {}
    for key in common:
        first, second = sides[0][key], sides[1][key]
        for name in dict.fromkeys([*first, *second]):
            if first.get(name) != second.get(name):
                change = name, _words(first.get(name)), _words(second.get(name))
                found.setdefault(change, []).append(key)
    for change, keys in found.items():
        where = "all runs in both" if len(keys) == len(common) else _where(keys, labels)
        yield *change, where


def _facts(rows: pl.DataFrame) -> dict[tuple[str, str, str], dict[str, Any]]:
    done = rows.filter(pl.col("status") != "failed")
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for (task, params, arm), part in done.group_by("task", "task_params", "arm", maintain_order=True):
        facts = {f"model.{name}": value for name, value in flat(json.loads(part["model_params"][0])).items()}
        facts |= {name: sorted(part[name].drop_nulls().unique()) for name in _FACTS}
        for column, label in (("backend", "backend of"), ("version", "result version of")):
            for word in sorted(
                {word for text in part[column].drop_nulls().unique() for word in text.split()}
            ):
                name, _, value = word.partition("=")
                facts.setdefault(f"{label} {name}", []).append(value)
        found[str(task), str(params), str(arm)] = facts
    return found


def _where(keys: Sequence[tuple[str, str, str]], labels: Mapping[tuple[str, str], str]) -> str:
    texts = [f"{arm} on {labels[task, params]}" for task, params, arm in keys]
    return ", ".join(texts[:4]) + (f" and {len(texts) - 4} more" if len(texts) > 4 else "")


def environment_changes(
    a: Mapping[str, Mapping[str, Any]], b: Mapping[str, Mapping[str, Any]]
) -> Iterator[Change]:
    """Packages, machine and commit, where the folders differ in them."""
    first, second = environment_facts(a), environment_facts(b)
    for name in dict.fromkeys([*first, *second]):
        values = [sorted(side.get(name, set())) for side in (first, second)]
        if values[0] != values[1]:
            yield name, _words(values[0]), _words(values[1]), "environment"


def only_in_one(
    a: pl.DataFrame, b: pl.DataFrame, labels: Mapping[tuple[str, str], str]
) -> tuple[list[str], list[str]]:
    """Lines about the runs that only A has, and those that only B has, by task and arm."""
    keys = ["task", "task_params", "arm", "seed"]
    found = []
    for one, other in ((a, b), (b, a)):
        alone = one.select(keys).unique().join(other.select(keys).unique(), on=keys, how="anti").sort(keys)
        found.append(
            [
                f"{arm} on {labels[task, params]}: seeds {_some(part['seed'].to_list())}"
                for (task, params, arm), part in alone.group_by(*keys[:3], maintain_order=True)
            ]
        )
    return found[0], found[1]


def _some(values: Sequence[Any], most: int = 12) -> str:
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(map(str, values[:most])) + more


def _words(value: Any) -> str:
    if value is None or value == []:
        return "-"
    if isinstance(value, list):
        return ", ".join(f"{entry:g}" if isinstance(entry, float) else str(entry) for entry in value)
    return str(value) if not isinstance(value, dict) else json.dumps(value)
