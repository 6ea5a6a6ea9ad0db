"""Reading a result folder: tidy tables and trained models. No lock is needed, also while a grid is
running.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from arena.grid.plan import canonical, digest
from arena.grid.rows import in_order, keep_rows, stored_rows
from arena.grid.store import CHECKSUMS, StoreError, read_plan, read_record
from arena.grid.untrusted import check_size, is_id, link_in, parse_frame, parse_object, read_own

ROW_SCHEMA: dict[str, Any] = {
    "experiment": pl.String,
    "run_id": pl.String,
    "fleet_id": pl.String,
    "arch": pl.String,
    "arm": pl.String,
    "model_params": pl.String,
    "task": pl.String,
    "task_params": pl.String,
    "seed": pl.Int64,
    "trial": pl.Int64,
    "stage": pl.String,
    "space": pl.String,
    "split": pl.String,
    "eval_length": pl.Int64,
    "reported": pl.Boolean,
    "metric": pl.String,
    "value": pl.Float64,
    "chance": pl.Float64,
    "n_examples": pl.Int64,
    "params": pl.Int64,
    "active_params": pl.Int64,
    "state_bytes": pl.Int64,
    "steps": pl.Int64,
    "train_tokens": pl.Int64,
    "train_length_min": pl.Int64,
    "train_length_max": pl.Int64,
    "lr": pl.Float64,
    "weight_decay": pl.Float64,
    "wall_s": pl.Float64,
    "device": pl.String,
    "backend": pl.String,
    "dtype": pl.String,
    "status": pl.String,
    "version": pl.String,
    "environment": pl.String,
    "verdict": pl.String,
    "reason": pl.String,
}
"""Columns of the result table. ``arm`` is the name that reports group by: an arm's or the architecture's;
``stage`` is one of ``arena.grid.plan.STAGES``; ``space`` is the hash of the search space that a tuned run's
point is from; ``verdict`` is ``ok-`` or ``wrong-`` and a hash of what ``arena doctor`` found in the run's
environment (null: it had not been examined). ``model_params`` and ``task_params`` are canonical JSON;
``reported`` tells a result (at a length of ``eval_lengths``) from what tuning may look at; ``chance`` is the
score of an uninformed guess; ``active_params`` are the parameters without the experts that a token does not
go through; ``state_bytes`` is what one sequence of ``eval_length`` carries; ``status`` is ``done``,
``diverged`` or ``failed`` (then ``value`` is null and ``reason`` says why); ``version`` lists the result
versions; ``environment`` is a digest of the run's environment.json."""

CURVE_SCHEMA: dict[str, Any] = {
    **{key: ROW_SCHEMA[key] for key in ("run_id", "arch", "arm", "task", "task_params", "seed")},
    **{key: ROW_SCHEMA[key] for key in ("trial", "stage", "space")},
    "lr": pl.Float64,
    "weight_decay": pl.Float64,
    "step": pl.Int64,
    **{key: ROW_SCHEMA[key] for key in ("split", "eval_length", "metric", "value", "chance", "n_examples")},
}
"""Columns of the learning curves."""

_NOTES = ("trial", "arm", "stage", "space")


def run_columns(run_id: str, notes: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that a run's configuration and its notes (``Run.notes``) determine."""
    train, replica = config["train"], config["replica"]
    return {
        "run_id": run_id,
        "arch": config["model"]["arch"],
        "model_params": canonical(config["model"]),
        "task": config["task"]["name"],
        "task_params": canonical(config["task"]["params"]),
        "seed": replica["seed"],
        **{key: notes.get(key) for key in _NOTES},
        "arm": notes.get("arm") or config["model"]["arch"],
        "stage": notes.get("stage") or "grid",
        "train_length_min": train["train_lengths"][0],
        "train_length_max": train["train_lengths"][1],
        "lr": replica["lr"],
        "weight_decay": replica["weight_decay"],
        "device": config["device"],
        "backend": config["backend"],
        "dtype": config["dtype"],
        "version": " ".join(f"{part}={number}" for part, number in sorted(config["versions"].items())),
    }


def load_results(directory: str | Path, *, all_requests: bool = False) -> pl.DataFrame:
    """The result table of a folder, one row a measurement, in a fixed order.

    Args:
        directory: a result folder, as given to ``arena grid --out``.
        all_requests: also runs that an earlier request left there and the last one does not name (another
            number of steps, say). Mixed into means they would mislead.

    Returns:
        Columns as in :data:`ROW_SCHEMA`. A failed run has one row without a value.

    Raises:
        StoreError: the folder does not exist or holds no results.
    """
    directory = Path(directory)
    plan, names = _stored(directory, all_requests)
    frame = stored_rows(directory, names, ROW_SCHEMA, _row_reader(directory))
    frame = _as_asked(frame, plan, ROW_SCHEMA)
    failed = _failures(directory, set(frame["run_id"].unique()), None if all_requests else plan)
    if failed:
        frame = pl.concat([frame, pl.DataFrame(failed, schema=ROW_SCHEMA)])
    return in_order(frame, ["task", "task_params", "arm", "trial", "seed", "run_id"])


def cache_results(directory: str | Path, run_ids: Iterable[str]) -> set[str]:
    """Note the rows of runs in ``DIR/cache``, so that :func:`load_results` need not open their folders.

    Returns:
        Those that were noted; files that have just been written wait.
    """
    return keep_rows(Path(directory), run_ids, ROW_SCHEMA, _row_reader(Path(directory)))


def load_curves(directory: str | Path, *, all_requests: bool = False) -> pl.DataFrame:
    """The learning curves of a folder: columns as in :data:`CURVE_SCHEMA`; otherwise as
    :func:`load_results`.
    """
    directory = Path(directory)
    plan, names = _stored(directory, all_requests)
    found = _read_runs(
        directory, names, "curve.parquet", lambda data, run_id: parse_frame(data, run_id, CURVE_SCHEMA)
    )
    frames = [frame for _, frame in found]
    frame = pl.concat(frames) if frames else pl.DataFrame(schema=dict(CURVE_SCHEMA))
    return _as_asked(frame, plan, CURVE_SCHEMA).sort(
        "task", "task_params", "arm", "trial", "seed", "run_id", "step", "split", "eval_length", "metric"
    )


def load_environments(directory: str | Path, rows: pl.DataFrame | None = None) -> dict[str, dict[str, Any]]:
    """Run id -> the environment that it was trained in, for the runs of the last request.

    Args:
        directory: a result folder.
        rows: as :func:`load_results` gives them, where they are at hand: column ``environment`` is a digest
            of the environment, so one run of each digest is read and stands for the others.
    """
    directory = Path(directory)
    _, names = _stored(directory, False)
    same: dict[str, str] = {}
    if rows is not None:
        same = dict(rows.select("run_id", "environment").drop_nulls().unique("run_id").iter_rows())
    found: dict[str, dict[str, Any]] = {}
    known: dict[str, dict[str, Any]] = {}
    for name in names:
        of = same.get(name)
        if of is not None and of in known:
            found[name] = known[of]
            continue
        for _, around in _read_runs(directory, [name], "environment.json", _object):
            found[name] = around
            if of is not None and digest(around) == of:
                known[of] = around
    return found


def load_model(directory: str | Path, run_id: str) -> Any:
    """The trained model of a run, on the CPU, in evaluation mode.

    Raises:
        StoreError: there is no such run, its files are damaged, or it was trained with plug-ins that are not
            loaded, or in another version.
    """
    import safetensors.torch

    from arena.model import ModelConfig, build_model
    from arena.plugins import PluginError, require

    folder = Path(directory) / "runs" / run_id
    if not is_id(run_id) or not folder.is_dir():
        raise StoreError(f"{directory} holds no run {run_id!r}")
    content, stored = _read(folder, "config.json"), _read(folder, "model.safetensors")
    try:
        config = parse_object(content)
        require(config["versions"])
        weights = safetensors.torch.load(stored)
        wanted = ModelConfig(**config["model"])
        check_size(wanted, weights)
        model = build_model(wanted, seed=config["replica"]["seed"])
        model.load_state_dict(weights)
    except PluginError as error:
        raise StoreError(f"{folder}: {error}") from None
    except Exception as error:  # whatever else: the files are not what a run leaves
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise StoreError(f"{folder} does not hold a model that can be built: {text}") from None
    return model.eval()


def _stored(directory: Path, all_requests: bool) -> tuple[dict[str, Any] | None, list[str]]:
    """The plan, and the ids of the runs with a folder: of the last request, or all."""
    link = link_in(directory)
    if link is not None:
        raise StoreError(f"{link} is a link: a result folder holds its own files")
    if not (directory / "runs").is_dir():
        raise StoreError(f"{directory} is not a result folder (it has no runs/); arena grid makes one")
    with os.scandir(directory / "runs") as entries:
        there = {entry.name for entry in entries if entry.is_dir(follow_symlinks=False)}
    plan = read_plan(directory)
    if all_requests or plan is None:
        return plan, sorted(filter(is_id, there))
    return plan, sorted(there & plan["runs"].keys())


def _as_asked(frame: pl.DataFrame, plan: dict[str, Any] | None, schema: Mapping[str, Any]) -> pl.DataFrame:
    """Rows with what each run is to the present request."""
    if plan is not None and plan["runs"]:
        notes = plan["runs"]
        columns = {name: [note.get(name) for note in notes.values()] for name in _NOTES}
        asked = pl.DataFrame(
            {
                "run_id": list(notes),
                "asked": True,
                **{f"{name} asked": pl.Series(of, dtype=schema[name]) for name, of in columns.items()},
            }
        )
        frame = frame.join(asked, on="run_id", how="left", maintain_order="left").select(
            pl.when("asked").then(f"{name} asked").otherwise(name).alias(name) if name in _NOTES else name
            for name in schema
        )
    return frame.with_columns(pl.col("arm").fill_null(pl.col("arch")), pl.col("stage").fill_null("grid"))


def _row_reader(directory: Path) -> Callable[[str], pl.DataFrame]:
    def read(run_id: str) -> pl.DataFrame:
        folder = directory / "runs" / run_id
        return _parsed(folder, "rows.parquet", lambda data, name: parse_frame(data, name, ROW_SCHEMA))

    return read


def _object(data: bytes, _: str) -> dict[str, Any]:
    return parse_object(data)


def _read_runs(
    directory: Path, names: Iterable[str], name: str, parse: Callable[[bytes, str], Any]
) -> list[tuple[str, Any]]:
    """(run id, parsed file) of runs; one with a damaged file is left out with a warning."""
    found = []
    for run_id in names:
        try:
            found.append((run_id, _parsed(directory / "runs" / run_id, name, parse)))
        except StoreError as error:
            warnings.warn(f"left out: {error}; the next arena grid trains it again", stacklevel=4)
    return found


def _parsed(folder: Path, name: str, parse: Callable[[bytes, str], Any]) -> Any:
    data = _read(folder, name)
    try:
        return parse(data, folder.name)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{folder / name} cannot be used: {error}") from None


def _read(folder: Path, name: str) -> bytes:
    """The bytes of a run's file, checked."""
    try:
        expected = json.loads(read_own(folder / CHECKSUMS))[name]
        data = read_own(folder / name)
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise StoreError(f"{folder / name} cannot be read ({type(error).__name__})") from None
    if hashlib.sha256(data).hexdigest() != expected:
        raise StoreError(f"{folder / name} is damaged (its checksum differs)")
    return data


def _failures(directory: Path, finished: set[str], plan: dict[str, Any] | None) -> list[dict[str, Any]]:
    rows = []
    for path in sorted((directory / "failures").glob("*.json")):
        run_id = path.name.removesuffix(".json")
        if run_id in finished or (plan is not None and run_id not in plan["runs"]):
            continue
        record = read_record(path)
        try:
            notes = plan["runs"][run_id] if plan is not None and run_id in plan["runs"] else record
            row = {
                **dict.fromkeys(ROW_SCHEMA),
                "experiment": plan["experiment"] if plan is not None else None,
                **run_columns(run_id, notes, record["config"]),
                "status": "failed",
                "reason": record["reason"],
            }
            pl.DataFrame([row], schema=ROW_SCHEMA)
        except Exception as error:  # not what a grid writes
            warnings.warn(f"left out: {path} records no failure ({type(error).__name__})", stacklevel=4)
            continue
        rows.append(row)
    return rows
