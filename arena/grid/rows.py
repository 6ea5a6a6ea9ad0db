"""The rows of all runs of a result folder as one table, by way of the cache."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from arena.grid.cache import FROM_RUNS, MOST_FILES, cache_files, read_cache, stamps, unchanged, write_cache
from arena.grid.plan import digest
from arena.grid.store import CHECKSUMS, StoreError

_KIND = "rows"
_FILES = (CHECKSUMS, "rows.parquet")
_WITHIN = ["run_id", "split", "eval_length", "metric"]


def stored_rows(
    directory: Path, run_ids: Sequence[str], schema: Mapping[str, Any], read: Callable[[str], pl.DataFrame]
) -> pl.DataFrame:
    """The rows of runs: those of a run together, ordered by split, length and metric.

    Args:
        directory: the result folder.
        run_ids: of folders in ``DIR/runs``.
        schema: columns of the rows.
        read: the rows of a run, from its own folder. Raises StoreError where they cannot be used: the run is
            left out with a warning.
    """
    stamped = stamps(directory / "runs", run_ids, _FILES)
    frames, taken, files = _cached(directory, stamped, schema)
    fresh = []
    for run_id in run_ids:
        if run_id not in taken:
            try:
                fresh.append(read(run_id))
            except StoreError as error:
                warnings.warn(f"left out: {error}; the next arena grid trains it again", stacklevel=4)
    if fresh:
        rows = pl.concat(fresh).sort(_WITHIN, nulls_last=True)
        frames.append(rows)
        if len(fresh) >= FROM_RUNS:
            _keep(directory, rows, stamped, schema)
    if len(files) > MOST_FILES:
        merge_rows(directory, schema)
    return pl.concat(frames) if frames else pl.DataFrame(schema=dict(schema))


def keep_rows(
    directory: Path, run_ids: Iterable[str], schema: Mapping[str, Any], read: Callable[[str], pl.DataFrame]
) -> set[str]:
    """Put rows into the cache.

    Args:
        directory: as in :func:`stored_rows`; so are the others.
        run_ids: of runs whose rows are not in it.
        schema: columns.
        read: the rows of a run.

    Returns:
        Those whose files are at rest: the others can be kept later.
    """
    stamped = stamps(directory / "runs", run_ids, _FILES)
    fresh = []
    for run_id in stamped:
        try:
            fresh.append(read(run_id))
        except StoreError:  # whoever wants its rows is told
            continue
    if fresh:
        _keep(directory, pl.concat(fresh).sort(_WITHIN, nulls_last=True), stamped, schema)
    if len(cache_files(directory, _KIND)) > MOST_FILES:
        merge_rows(directory, schema)
    return set(stamped)


def merge_rows(directory: Path, schema: Mapping[str, Any]) -> None:
    """Make one file of those in the cache, without what is no longer so."""
    files = cache_files(directory, _KIND)
    known: set[str] = set()
    for path in files:
        tables = read_cache(path, digest(list(schema)))
        if tables is not None and "run_id" in tables[0].columns:
            known.update(tables[0]["run_id"].to_list())
    stamped = stamps(directory / "runs", known, _FILES)
    frames, taken, _ = _cached(directory, stamped, schema)
    if taken:
        _keep(directory, pl.concat(frames), stamped, schema, files)


def in_order(frame: pl.DataFrame, keys: Sequence[str]) -> pl.DataFrame:
    """Rows whose runs stand together, with the runs sorted by ``keys`` (the same in all rows of a run)."""
    if frame.is_empty():
        return frame
    starts = _starts(frame)
    heads = frame.select(keys)[starts].with_row_index("_place")
    order = heads.sort(keys, nulls_last=True)["_place"].to_numpy().astype(np.int64)
    if (np.diff(order) == 1).all():
        return frame
    lengths = np.diff(np.append(starts, frame.height))[order]
    shift = starts[order] - (np.cumsum(lengths) - lengths)
    return frame[np.arange(frame.height) + np.repeat(shift, lengths)]


def _starts(frame: pl.DataFrame) -> np.ndarray:
    """Where a run begins."""
    ids = frame["run_id"]
    return ids.ne_missing(ids.shift(1)).arg_true().to_numpy().astype(np.int64)


def _cached(
    directory: Path, stamped: dict[str, bytes], schema: Mapping[str, Any]
) -> tuple[list[pl.DataFrame], set[str], list[Path]]:
    """What the cache has of the runs that are still as stamped, which runs, and its files."""
    frames, taken, files = [], set[str](), cache_files(directory, _KIND)
    for path in files:
        tables = read_cache(path, digest(list(schema)))
        if tables is None:
            continue
        seen = set(taken)
        try:
            runs, rows = tables
            kept = unchanged(runs, stamped, seen)
            frame = pl.concat([runs[rows["run"]], rows], how="horizontal").select(list(schema))
            if not all(kept):
                frame = frame.filter(pl.Series(kept, dtype=pl.Boolean)[rows["run"]])
        except (ValueError, pl.exceptions.PolarsError, IndexError):
            continue
        if dict(frame.schema) == dict(schema):
            frames.append(frame)
            taken = seen
    return frames, taken, files


def _keep(
    directory: Path,
    rows: pl.DataFrame,
    stamped: dict[str, bytes],
    schema: Mapping[str, Any],
    instead_of: Iterable[Path] = (),
) -> None:
    """Write rows to the cache: what is the same in all rows of a run once, the rest row by row."""
    rows = rows.filter(pl.col("run_id").is_in(pl.Series(list(stamped), dtype=pl.String).implode()))
    if rows.is_empty():
        return
    starts = _starts(rows)
    place = np.repeat(np.arange(len(starts), dtype=np.uint32), np.diff(np.append(starts, rows.height)))
    runs = rows[starts]
    same = [name for name in schema if rows[name].eq_missing(runs[name][place]).all()]
    stamp = pl.Series("stamp", [stamped[run_id] for run_id in runs["run_id"]], dtype=pl.Binary)
    varying = rows.drop(same).with_columns(pl.Series("run", place))
    write_cache(
        directory, _KIND, digest(list(schema)), [runs.select(same).with_columns(stamp), varying], instead_of
    )
