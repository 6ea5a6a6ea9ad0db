"""What need not be read twice in a result folder of very many runs: ``DIR/cache``.

The folders of the runs are the truth. A file of the cache says something of many runs (their rows; that their
checksums hold) and, for each, the size, times and mode that its files had *before* they were read. It is
believed of a run only while they are the same. The time of the last change (ctime) is among them, which no
program sets as it likes: a file that was altered and given its old date is read again, and so is every file
of a folder that was copied, so that nobody's cache is believed but this file system's own. Files that
changed in the last seconds are not recorded, as a second change might bear the same time.

A file of the cache is named by the hash of its content, is put into place by a rename and never changed, so
readers and writers need no lock: what is missing, damaged or of another version is passed over, and the runs
are read instead. Deleting the folder is always safe. Where it cannot be written there is none.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from arena.grid.untrusted import open_own, read_own

FROM_RUNS = 256
"""So many runs make a file of the cache; smaller result folders have none and are always read whole."""
MOST_FILES = 32
"""More files of a kind are merged into one."""
REST = 2.0
"""Seconds for which a file must not have changed before its times are relied upon."""
_VERSION = 1


def stamps(runs: Path, run_ids: Iterable[str], names: Sequence[str]) -> dict[str, bytes]:
    """Run id -> fingerprint of the sizes, times and modes of files of its folder, where all are there and at
    rest.

    Args:
        runs: ``DIR/runs``.
        run_ids: of folders in it.
        names: of files in these.
    """
    found = {}
    latest = time.time_ns() - int(REST * 1e9)
    handle = os.open(runs, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for run_id in run_ids:
            facts = []
            try:
                for name in names:
                    s = os.stat(f"{run_id}/{name}", dir_fd=handle, follow_symlinks=False)
                    if s.st_ctime_ns > latest:
                        break
                    facts += [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_mode]
                else:
                    found[run_id] = hashlib.blake2b(repr(facts).encode(), digest_size=16).digest()
            except OSError:
                continue
    finally:
        os.close(handle)
    return found


def cache_files(directory: Path, kind: str) -> list[Path]:
    """The files of one kind in the cache of a result folder, and those that a kill left half written."""
    try:
        with os.scandir(directory / "cache") as entries:
            return sorted(Path(e.path) for e in entries if e.name.endswith((f".{kind}", f".{kind}.writing")))
    except OSError:
        return []


def read_cache(path: Path, schema: str) -> list[pl.DataFrame] | None:
    """The tables of a file of the cache; None where it cannot be used.

    Args:
        path: of the file.
        schema: what its writer must have called the form of the tables.
    """
    try:
        data = read_own(path)
        if hashlib.sha256(data).hexdigest() != path.name.partition(".")[0]:
            return None
        head, _, body = data.partition(b"\n")
        form, sizes = json.loads(head)
        if form != [_VERSION, schema]:
            return None
        frames = []
        for size in sizes:
            frames.append(pl.read_parquet(io.BytesIO(body[:size])))
            body = body[size:]
        return frames
    except BaseException as error:  # a broken file makes polars panic, which is no Exception
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            return None
        raise


def write_cache(
    directory: Path, kind: str, schema: str, frames: Sequence[pl.DataFrame], instead_of: Iterable[Path] = ()
) -> None:
    """Add a file to the cache; nothing happens where it cannot be written.

    Args:
        directory: the result folder.
        kind: ending of the file's name.
        schema: what its form is called.
        frames: the tables.
        instead_of: files of the cache that it takes the place of.
    """
    parts = []
    for frame in frames:
        buffer = io.BytesIO()
        frame.write_parquet(buffer, compression="lz4", statistics=False)
        parts.append(buffer.getvalue())
    head = json.dumps([[_VERSION, schema], [len(part) for part in parts]]).encode()
    data = b"\n".join([head, b"".join(parts)])
    path = directory / "cache" / f"{hashlib.sha256(data).hexdigest()}.{kind}"
    temporary = path.with_name(f"{os.getpid()}-{path.name}.writing")
    with contextlib.suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        with open(open_own(temporary, os.O_WRONLY | os.O_TRUNC), "wb") as file:
            file.write(data)
        os.replace(temporary, path)
        for other in instead_of:
            if other != path:
                other.unlink(missing_ok=True)


def unchanged(table: pl.DataFrame, stamped: dict[str, bytes], taken: set[str]) -> list[bool]:
    """For each line of a table of run ids and stamps, whether it is still so; those are added to ``taken``,
    and a run that is in it already counts no more.
    """
    kept: list[Any] = []
    for run_id, stamp in zip(table["run_id"].to_list(), table["stamp"].to_list(), strict=True):
        same = run_id not in taken and stamp is not None and stamped.get(run_id) == stamp
        if same:
            taken.add(run_id)
        kept.append(same)
    return kept
