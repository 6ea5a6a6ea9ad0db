"""Measure the trained memories of a result folder: which runs, at which lengths, into which tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import torch

import synthetic_tasks
from arena.dynamics.dictionary import data_dictionary_markdown
from arena.dynamics.effects import (
    EFFECT_COLUMNS,
    EIGENVALUE_COLUMNS,
    Intervention,
    head_eigenvalues,
    measure_effects,
    token_classes,
)
from arena.dynamics.intervene import parse_edit
from arena.dynamics.measure import measure
from arena.dynamics.probe import PROBE_COLUMNS, measure_decodability
from arena.grid.experiment import ExperimentError, near
from arena.grid.plan import TESTED_STAGES
from arena.grid.results import load_model, load_results
from arena.grid.store import StoreError
from arena.report.tables import SOLVED, chosen_points, scores

SEQUENCES = 8
"""Whose gates, states, transitions, retention and edits are measured (token by token)."""
LOOKED_AT = 64
"""Whose eigenvalues are averaged."""
_TOKENS = 16_384

RUN_COLUMNS: dict[str, tuple[Any, str]] = {
    "run_id": (pl.String, "the run in DIR/runs"),
    "task": (pl.String, "name of the task"),
    "task_params": (pl.String, "its parameters, canonical JSON"),
    "arm": (pl.String, "name in the experiment: an arm's or the architecture's"),
    "arch": (pl.String, "architecture"),
    "seed": (pl.Int64, "of the run"),
    "train_length_max": (pl.Int64, "longest training length"),
    "eval_length": (pl.Int64, "length of the sequences that are measured"),
}
"""What every table says about a run."""
ACCURACY_COLUMNS: dict[str, tuple[Any, str]] = {
    "accuracy": (
        pl.Float64,
        "on split test as stored by the grid; null where it was not evaluated at that length",
    ),
    "chance": (pl.Float64, "accuracy of an uninformed guess"),
    "solved": (pl.Boolean, f"chance-scaled accuracy at least {SOLVED}"),
}


class Tables(NamedTuple):
    """What was measured; every table begins with the columns of :data:`RUN_COLUMNS`."""

    runs: pl.DataFrame
    """A row a run and length, with its accuracy."""
    measurements: pl.LazyFrame
    """One row a number, columns as in ``arena.dynamics.dictionary.COLUMNS``."""
    eigenvalues: pl.DataFrame
    """Least eigenvalue by head and class of tokens."""
    effects: pl.DataFrame
    """Interventions."""
    decodability: pl.DataFrame
    """Linear probes."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which part of a result folder to measure, and how to intervene."""

    arms: Sequence[str] = ()
    """Arms or architectures; none: all."""
    tasks: Sequence[str] = ()
    """Tasks; none: all."""
    lengths: Sequence[int] = ()
    """Of the sequences; none: the longest training length and the longest reported one."""
    interventions: Sequence[str] = ("standard",)
    """``standard``, ``none``, or texts as :func:`~arena.dynamics.intervene.parse_edit` reads them."""


def choose_runs(directory: str | Path, choice: Choice) -> pl.DataFrame:
    """The finished runs of a folder that a choice asks for: columns of ``runs`` in :class:`Tables`.

    Only runs with reported rows count (a tuner's trials have none), and of several learning rates of a plain
    grid the one that is best on split valid.

    Raises:
        StoreError: no result folder, or no finished run in it.
        ExperimentError: an arm, task or length that is not there; one line with the near ones.
    """
    rows = load_results(directory).filter(pl.col("status") == "done", pl.col("stage").is_in(TESTED_STAGES))
    if rows.is_empty():
        raise StoreError(f"{directory} holds no finished run yet: arena grid trains them")
    keys = ["task", "task_params", "arm", "trial"]
    rows = rows.join(chosen_points(rows).select(keys), on=keys, how="semi")
    known_arms = sorted({*rows["arm"], *rows["arch"]})
    for arm in choice.arms:
        if arm not in known_arms:
            raise ExperimentError(f"{directory} has no arm {arm!r}{near(arm, known_arms)}")
    known_tasks = sorted(set(rows["task"]))
    for name in choice.tasks:
        if name not in known_tasks:
            raise ExperimentError(f"{directory} has no task {name!r}{near(name, known_tasks)}")
    if choice.arms:
        rows = rows.filter(pl.col("arm").is_in(choice.arms) | pl.col("arch").is_in(choice.arms))
    if choice.tasks:
        rows = rows.filter(pl.col("task").is_in(choice.tasks))
    if rows.is_empty():
        raise ExperimentError(f"{directory} has no finished run of these arms on these tasks")
    accuracies = scores(rows).select("run_id", "eval_length", "accuracy", "chance", "solved")
    found = []
    for run in rows.unique("run_id").sort("task", "task_params", "arm", "seed").iter_rows(named=True):
        task = synthetic_tasks.get(run["task"], **json.loads(run["task_params"]))
        reported = accuracies.filter(run_id=run["run_id"])["eval_length"].to_list()
        for length in _lengths(task, run["train_length_max"], reported, choice.lengths):
            found.append({name: run.get(name) for name in RUN_COLUMNS} | {"eval_length": length})
    frame = pl.DataFrame(found, schema=_schema(RUN_COLUMNS))
    return frame.join(accuracies, on=["run_id", "eval_length"], how="left", maintain_order="left")


def _lengths(task: Any, trained: int, reported: Sequence[int], wanted: Sequence[int]) -> list[int]:
    if not wanted:
        longest = max(reported, default=trained)
        legal = {length for length in (trained, longest) if _is_legal(task, length)}
        return sorted(legal or {task.legal_length(longest)})
    for length in wanted:
        try:
            task.check_length(length)
        except ValueError as error:
            raise ExperimentError(" ".join(str(error).split())) from None
    return sorted(set(wanted))


def _is_legal(task: Any, length: int) -> bool:
    try:
        task.check_length(length)
    except ValueError:
        return False
    return True


def _schema(columns: dict[str, tuple[Any, str]]) -> dict[str, Any]:
    return {name: kind for name, (kind, _) in columns.items()}


def interventions_of(texts: Sequence[str]) -> list[Intervention] | None:
    """The interventions that texts ask for; None: the standard ones; an empty list: none.

    Raises:
        ExperimentError: a text that cannot be read, or ``standard`` or ``none`` beside others.
    """
    if list(texts) == ["standard"]:
        return None
    if list(texts) == ["none"]:
        return []
    if "standard" in texts or "none" in texts:
        raise ExperimentError("interventions are standard, none, or a list of your own")
    try:
        return [Intervention(edits=(parse_edit(text),)) for text in texts]
    except ValueError as error:
        raise ExperimentError(str(error)) from None


def study(
    directory: str | Path,
    out: str | Path,
    choice: Choice,
    *,
    n_sequences: int | None = None,
    on_line: Callable[[str], None] | None = None,
) -> Tables:
    """Measure the chosen runs of a folder and write the tables to ``out``.

    Files in ``out``: runs, eigenvalues, effects and decodability as .parquet and .csv, measurements/*.parquet
    (one file a run and length, for they are long), and dictionary.md, which says what every column and
    quantity is.

    Args:
        directory: a result folder.
        out: made where it does not exist; tables of an earlier study in it are replaced.
        choice: which runs, lengths and interventions.
        n_sequences: on which effects are measured; probes are fitted on four times and scored on twice as
            many. None: 256, fewer where they are long (16,384 tokens together), at least 64.
        on_line: told what is being measured.

    Raises:
        StoreError: no result folder, or no finished run in it.
        ExperimentError: the choice does not fit the folder.
    """
    directory, out = Path(directory), Path(out)
    wanted = interventions_of(choice.interventions)
    runs = choose_runs(directory, choice)
    _check_interventions(directory, runs, wanted)
    folder = out / "measurements"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.parquet"):
        old.unlink()
    parts: dict[str, list[pl.DataFrame]] = {"eigenvalues": [], "effects": [], "decodability": []}
    for index, run in enumerate(runs.iter_rows(named=True)):
        if on_line is not None:
            where = f"{run['task']}, {run['arm']}, seed {run['seed']}, length {run['eval_length']}"
            on_line(f"{index + 1}/{len(runs)} {where}")
        model = load_model(directory, run["run_id"])
        task = synthetic_tasks.get(run["task"], **json.loads(run["task_params"]))
        about = {name: run[name] for name in RUN_COLUMNS}
        length = run["eval_length"]
        count = n_sequences or min(256, max(64, _TOKENS // length))
        batch = task.sample(SEQUENCES, length, split="test")
        frame = measure(model, (batch.tokens, batch.targets), task=task, train_length=run["train_length_max"])
        _about(frame, about).write_parquet(folder / f"{run['run_id']}-{length}.parquet")
        look = task.sample(LOOKED_AT, length, split="valid")
        classes = token_classes(task, look.tokens, look.targets)
        everywhere = {"all": torch.ones_like(look.targets, dtype=torch.bool)}
        parts["eigenvalues"].append(_about(head_eigenvalues(model, look.tokens, everywhere | classes), about))
        if wanted is None or wanted:
            table = measure_effects(model, task, length, interventions=wanted, n_sequences=count)
            parts["effects"].append(_about(table, about))
        lengths = runs.filter(run_id=run["run_id"])["eval_length"].to_list()
        if length == max(lengths):
            table = measure_decodability(model, task, lengths, n_fit=4 * count, n_test=2 * count)
            parts["decodability"].append(
                _about(table, {k: v for k, v in about.items() if k != "eval_length"})
            )
    schemas = {"eigenvalues": EIGENVALUE_COLUMNS, "effects": EFFECT_COLUMNS, "decodability": PROBE_COLUMNS}
    tables = {"runs": runs}
    for name, frames in parts.items():
        empty = pl.DataFrame(schema=_schema(RUN_COLUMNS | schemas[name]))
        tables[name] = pl.concat([empty, *(frame.select(empty.columns) for frame in frames)])
    for name, frame in tables.items():
        frame.write_parquet(out / f"{name}.parquet")
        frame.write_csv(out / f"{name}.csv")
    (out / "dictionary.md").write_text(dictionary_markdown(), encoding="utf-8")
    return Tables(measurements=pl.scan_parquet(folder / "*.parquet"), **tables)


def _about(frame: pl.DataFrame, about: dict[str, Any]) -> pl.DataFrame:
    """The frame with what it is about in front."""
    kinds = _schema(RUN_COLUMNS)
    columns = [pl.lit(value, dtype=kinds[name]).alias(name) for name, value in about.items()]
    return frame.select(*columns, pl.all())


def _check_interventions(directory: Path, runs: pl.DataFrame, wanted: Iterable[Intervention] | None) -> None:
    """Refuse interventions that a chosen model cannot take, before anything is measured."""
    from arena.dynamics.intervene import check

    for run in runs.unique("run_id", maintain_order=True).iter_rows(named=True) if wanted else ():
        model = load_model(directory, run["run_id"])
        task = synthetic_tasks.get(run["task"], **json.loads(run["task_params"]))
        batch = task.sample(1, run["eval_length"])
        classes = token_classes(task, batch.tokens, batch.targets)
        for intervention in wanted or ():
            try:
                check(model, intervention.edits)
            except ValueError as error:
                raise ExperimentError(
                    f"{run['arm']} on {run['task']}: {error}; choose arms with --arch"
                ) from None
            for name in {edit.tokens for edit in intervention.edits} - {None}:
                if name not in classes:
                    known = near(str(name), list(classes))
                    raise ExperimentError(f"{run['task']} has no class of tokens {name!r}{known}")


def dictionary_markdown() -> str:
    """What every column of every table is."""
    lines = ["# Data dictionary", "", "Every table begins with the columns of the run.", ""]
    sections = {
        "The run": RUN_COLUMNS,
        "runs": ACCURACY_COLUMNS,
        "eigenvalues": EIGENVALUE_COLUMNS,
        "effects": EFFECT_COLUMNS,
        "decodability": PROBE_COLUMNS,
    }
    for title, columns in sections.items():
        lines += [f"## {title}", "", "| column | meaning |", "|---|---|"]
        lines += [f"| `{name}` | {meaning} |" for name, (_, meaning) in columns.items()]
        lines.append("")
    lines += ["## measurements", "", data_dictionary_markdown()]
    return "\n".join(lines)
