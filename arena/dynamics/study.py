"""Measure the trained memories of a result folder: which runs, at which lengths, into which tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import torch

import synthetic_tasks
from arena.dynamics.added import added_dictionary, keep_added, measure_added
from arena.dynamics.classes import token_classes
from arena.dynamics.dictionary import COLUMNS, data_dictionary_markdown
from arena.dynamics.directory import choose_runs, measure_runs
from arena.dynamics.effects import (
    EFFECT_COLUMNS,
    EIGENVALUE_COLUMNS,
    LOOKED_AT,
    Intervention,
    head_eigenvalues,
    measure_effects,
)
from arena.dynamics.fields import FIELD_COLUMNS, measure_fields
from arena.dynamics.intervene import parse_edit
from arena.dynamics.probe import PROBE_COLUMNS, measure_decodability
from arena.grid.experiment import ExperimentError
from arena.grid.plan import TESTED_STAGES
from arena.grid.results import load_model, load_results
from arena.grid.store import StoreError
from arena.report.tables import SOLVED, chosen_points, scores

SEQUENCES = 8
"""Whose gates, states, transitions, retention and edits are measured (token by token)."""
_TOKENS = 16_384

RUN_COLUMNS: dict[str, tuple[Any, str]] = {
    "run_id": (pl.String, "the run in DIR/runs"),
    "arm": (pl.String, "name in the experiment: an arm's or the architecture's"),
    "arch": (pl.String, "architecture"),
    "task": (pl.String, "name of the task"),
    "task_params": (pl.String, "its parameters, canonical JSON"),
    "seed": (pl.Int64, "of the run"),
    "length": (pl.Int64, "of the sequences that are measured"),
}
"""What every table says about a run."""
ACCURACY_COLUMNS: dict[str, tuple[Any, str]] = {
    "train_length_max": (pl.Int64, "longest training length"),
    "accuracy": (pl.Float64, "on split test, from the grid; null where it was not evaluated at that length"),
    "chance": (pl.Float64, "accuracy of an uninformed guess"),
    "solved": (pl.Boolean, f"chance-scaled accuracy at least {SOLVED}"),
}


class Tables(NamedTuple):
    """What was measured; every table begins with the columns of :data:`RUN_COLUMNS`."""

    runs: pl.DataFrame
    """A row a run and length, with its accuracy."""
    measurements: pl.LazyFrame
    """One row a number, columns as in ``arena.dynamics.COLUMNS``."""
    eigenvalues: pl.DataFrame
    """Least eigenvalue by head and class of tokens."""
    effects: pl.DataFrame
    """Interventions."""
    decodability: pl.DataFrame
    """Linear probes."""
    fields: pl.DataFrame
    """Of ``partial_update``: whether the field is in the key."""
    added: Mapping[str, pl.DataFrame] = {}
    """What the measurements of plug-ins say, by name."""


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


_SCHEMAS: dict[str, dict[str, Any]] = {
    "eigenvalues": EIGENVALUE_COLUMNS,
    "effects": EFFECT_COLUMNS,
    "decodability": PROBE_COLUMNS,
    "fields": FIELD_COLUMNS,
}


def chosen_runs(directory: str | Path, choice: Choice) -> pl.DataFrame:
    """The finished runs of a folder that a choice asks for: columns of ``runs`` in :class:`Tables`.

    All seeds of an arm count, and of several learning rates of a plain grid the one that is best on split
    valid.

    Raises:
        StoreError: no result folder, or no finished run in it.
        ExperimentError: an arm, task or length that is not there; one line with the near ones.
    """
    rows = load_results(directory)
    if not (rows["status"] == "done").any():
        raise StoreError(f"{directory} holds no finished run yet: arena grid trains them")
    try:
        found = choose_runs(directory, arms=choice.arms or None, tasks=choice.tasks or None, per_arm=None)
    except ValueError as error:
        raise ExperimentError(" ".join(str(error).split())) from None
    reported = rows.filter(pl.col("stage").is_in(TESTED_STAGES))
    keys = ["task", "task_params", "arm", "trial"]
    found = found.join(chosen_points(reported).select(keys), on=keys, how="semi")
    cells = []
    for run in found.sort("task", "task_params", "arm", "seed").iter_rows(named=True):
        task = synthetic_tasks.get(run["task"], **json.loads(run["task_params"]))
        for length in _lengths(task, run["train_length_max"], run["test_lengths"], choice.lengths):
            cells.append({**run, "length": length})
    accuracies = scores(rows).select(
        "run_id", pl.col("eval_length").alias("length"), "accuracy", "chance", "solved"
    )
    names = [*RUN_COLUMNS, "train_length_max"]
    frame = pl.DataFrame([{name: cell[name] for name in names} for cell in cells], schema=_schema(names))
    return frame.join(accuracies, on=["run_id", "length"], how="left", maintain_order="left")


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


def _schema(names: Iterable[str]) -> dict[str, Any]:
    columns = RUN_COLUMNS | ACCURACY_COLUMNS
    return {name: columns[name][0] for name in names}


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

    Files in ``out``: runs, eigenvalues, effects, decodability and fields as .parquet and .csv; the same of
    each measurement of a plug-in in added/; measurements/*.parquet (one file a run and length, for they are
    long); and dictionary.md, which says what every column and quantity is.

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
    runs = chosen_runs(directory, choice)
    _check_interventions(directory, runs, wanted)
    folder = out / "measurements"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.parquet"):
        old.unlink()
    parts: dict[str, list[pl.DataFrame]] = {
        "eigenvalues": [], "effects": [], "decodability": [], "fields": []
    }  # fmt: skip
    added: dict[str, list[pl.DataFrame]] = {}
    for index, run in enumerate(runs.iter_rows(named=True)):
        about, length = {name: run[name] for name in RUN_COLUMNS}, run["length"]
        where = f"{run['task']}, {run['arm']}, seed {run['seed']}, length {length}"
        if on_line is not None:
            on_line(f"{index + 1}/{len(runs)} {where}")
        model = load_model(directory, run["run_id"])
        task = synthetic_tasks.get(run["task"], **json.loads(run["task_params"]))
        count = n_sequences or min(256, max(64, _TOKENS // length))
        row = runs[index].with_columns(test_lengths=pl.lit(None))
        (frame,) = measure_runs(directory, row, lengths=[length], examples=SEQUENCES)
        frame.write_parquet(folder / f"{run['run_id']}-{length}.parquet")
        look = task.sample(LOOKED_AT, length, split="valid")
        classes = {"all": torch.ones_like(look.targets, dtype=torch.bool)}
        classes |= token_classes(task, look.tokens, look.targets)
        parts["eigenvalues"].append(_about(head_eigenvalues(model, look.tokens, classes), about))
        if wanted is None or wanted:
            table = measure_effects(model, task, length, interventions=wanted, n_sequences=count)
            parts["effects"].append(_about(table, about))
        parts["fields"].append(_about(measure_fields(model, task, length), about))
        kinds = _schema(about)
        labels = {name: pl.lit(value, dtype=kinds[name]) for name, value in about.items()}
        for name, frame in measure_added(model, task, length, labels, where).items():
            added.setdefault(name, []).append(frame)
        lengths = runs.filter(run_id=run["run_id"])["length"].to_list()
        if length == max(lengths):
            table = measure_decodability(model, task, lengths, n_fit=4 * count, n_test=2 * count)
            del about["length"]  # the table has its own
            parts["decodability"].append(_about(table, about))
    tables = {"runs": runs}
    for name, frames in parts.items():
        columns = RUN_COLUMNS | _SCHEMAS[name]
        empty = pl.DataFrame(schema={column: kind for column, (kind, _) in columns.items()})
        tables[name] = pl.concat([empty, *(frame.select(empty.columns) for frame in frames)])
    for name, frame in tables.items():
        frame.write_parquet(out / f"{name}.parquet")
        frame.write_csv(out / f"{name}.csv")
    own = keep_added(added, out / "added")
    words = dictionary_markdown() + "\n".join(["", *added_dictionary(list(own))])
    (out / "dictionary.md").write_text(words, encoding="utf-8")
    return Tables(measurements=pl.scan_parquet(folder / "*.parquet"), added=own, **tables)


def read_study(out: str | Path) -> Tables | None:
    """The tables that :func:`study` wrote to ``out``; None where there is no finished study.

    Raises:
        StoreError: they are damaged, or of another version, whose columns are not today's.
    """
    out = Path(out)
    names = ("runs", *_SCHEMAS)
    if not all((out / f"{name}.parquet").exists() for name in names):
        return None
    measurements = pl.scan_parquet(out / "measurements" / "*.parquet")
    try:
        tables = {name: pl.read_parquet(out / f"{name}.parquet") for name in names}
        added = {path.stem: pl.read_parquet(path) for path in sorted((out / "added").glob("*.parquet"))}
        known = [(tables[name].columns, schema) for name, schema in _SCHEMAS.items()]
        known.append((measurements.collect_schema().names(), COLUMNS))
    except (OSError, pl.exceptions.PolarsError) as error:
        raise StoreError(f"{out} cannot be read ({type(error).__name__}): arena dynamics makes it") from None
    if not all(set(schema) <= set(columns) for columns, schema in known):
        raise StoreError(f"the study in {out} is of another version: arena dynamics makes it anew")
    return Tables(measurements=measurements, added=added, **tables)


def _about(frame: pl.DataFrame, about: dict[str, Any]) -> pl.DataFrame:
    """The frame with what it is about in front."""
    kinds = _schema(about)
    columns = [pl.lit(value, dtype=kinds[name]).alias(name) for name, value in about.items()]
    return frame.select(*columns, pl.all())


def _check_interventions(directory: Path, runs: pl.DataFrame, wanted: Iterable[Intervention] | None) -> None:
    """Refuse interventions that a chosen model cannot take, by trying them before anything is written."""
    for run in runs.unique("run_id", maintain_order=True).iter_rows(named=True) if wanted else ():
        model = load_model(directory, run["run_id"])
        task = synthetic_tasks.get(run["task"], **json.loads(run["task_params"]))
        try:
            measure_effects(model, task, run["length"], interventions=list(wanted or ()), n_sequences=1)
        except ValueError as error:
            where = f"{run['arm']} on {run['task']}"
            raise ExperimentError(f"{where}: {error}; choose arms and tasks with --arch and --task") from None


def dictionary_markdown() -> str:
    """What every column of every table is."""
    lines = ["# Data dictionary", "", "Every table begins with the columns of the run.", ""]
    sections = {
        "The run": RUN_COLUMNS,
        "runs": ACCURACY_COLUMNS,
        "eigenvalues": EIGENVALUE_COLUMNS,
        "effects": EFFECT_COLUMNS,
        "decodability": PROBE_COLUMNS,
        "fields": FIELD_COLUMNS,
    }
    for title, columns in sections.items():
        lines += [f"## {title}", "", "| column | meaning |", "|---|---|"]
        lines += [f"| `{name}` | {meaning} |" for name, (_, meaning) in columns.items()]
        lines.append("")
    lines += ["## measurements", "", data_dictionary_markdown()]
    return "\n".join(lines)
