"""The results of an experiment on disk, safe against a kill at any instant.

    DIR/experiment.toml        a copy of the request
    DIR/plan.json              the runs that the last request asked for
    DIR/runs/<run id>/         one folder a finished run, moved into place whole:
        config.json, environment.json, rows.parquet, curve.parquet, model.safetensors, checksums.json
    DIR/fleets/<fleet id>.json   who trained together
    DIR/failures/<run id>.json   why a run has no result yet
    DIR/events.jsonl           what happened to fleets beside being trained: halved, retried, failed
    DIR/staging/               results on their way; emptied at the next start
    DIR/damaged/               folders that failed their checksums, set aside
    DIR/cache/                 of very many runs: what need not be read again (see ``arena.grid.cache``)

Only one process writes (or several that share the folder, in turns), under a lock that the system drops when
that process dies. A fleet's result is written to ``staging/<fleet id>.partial``, flushed to disk and renamed
to ``staging/<fleet id>``: from that instant it counts. Then its runs are renamed one by one into ``runs/``,
and whatever a kill interrupts is completed by the next process. So a run is in ``runs/`` whole or not at all,
and a fleet's runs are all kept or all lost.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from arena.grid.cache import FROM_RUNS, MOST_FILES, cache_files, read_cache, stamps, unchanged, write_cache
from arena.grid.plan import Fleet, Run
from arena.grid.untrusted import check_plan, is_id, link_in, open_own, read_own

RUN_FILES = ("config.json", "environment.json", "rows.parquet", "curve.parquet", "model.safetensors")
CHECKSUMS = "checksums.json"
_CHECKED = (*RUN_FILES, CHECKSUMS)


class StoreError(RuntimeError):
    """The store cannot be used; the message is one line."""


class Store:
    """The writing side of a result folder; reading needs no lock (see ``arena.grid.results``).

    Use it as a context manager: entering takes the lock and completes what a killed process left behind.

    Args:
        directory: the folder.
        shared: let other processes that open it so write too: each write then waits for its turn.

    Raises:
        StoreError: on entering, when another process writes there, or the folder holds other files or cannot
            be written; later, when it holds another experiment or the disk is full.
    """

    def __init__(self, directory: str | Path, *, shared: bool = False) -> None:
        self.directory = Path(directory)
        self.shared = shared
        self.runs = self.directory / "runs"
        self.staging = self.directory / "staging"
        self.fleets = self.directory / "fleets"
        self.failures = self.directory / "failures"
        self.damaged = self.directory / "damaged"
        self.new: list[str] = []
        """Runs stored since :meth:`note_checked` was told of them."""
        self._lock: int | None = None

    def __enter__(self) -> Store:
        with self._writing():
            self.directory.mkdir(parents=True, exist_ok=True)
            held = set(os.listdir(self.directory))
            if held - {"slurm"} and not held & {
                ".lock",
                "plan.json",
                "runs",
            }:  # nothing of others is ever overwritten
                raise StoreError(
                    f"{self.directory} holds other files and is no result folder: choose another --out"
                )
            link = link_in(self.directory)
            if link is not None:
                raise StoreError(f"{link} is a link: a result folder holds its own files")
            lock = open_own(self.directory / ".lock", os.O_RDWR)
            for folder in (self.runs, self.staging, self.fleets, self.failures):
                folder.mkdir(exist_ok=True)
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if self.shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(lock, 100).decode(errors="replace").strip()
            os.close(lock)
            raise StoreError(
                f"{self.directory} is in use by another arena process ({holder or 'unknown'}): wait "
                "for it, or choose another --out"
            ) from None
        self._lock = lock
        try:
            with self._writing(), self.turn():
                os.ftruncate(lock, 0)
                os.pwrite(lock, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
                self._complete()
        except StoreError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)  # drops the lock
            self._lock = None

    def commit(self, fleet: Fleet, results: Mapping[str, Mapping[str, bytes]]) -> None:
        """Store the results of a fleet: all of them or, when killed before the rename, none.

        Args:
            fleet: who trained together.
            results: run id -> name of a file of ``RUN_FILES`` -> its bytes. A run that is stored already is
                left as it is.
        """
        self.record_fleet(fleet)
        partial, whole = self.staging / f"{fleet.id}.partial", self.staging / fleet.id
        with self._writing(), self.turn():
            if self.shared:
                self._complete()  # what a process that died beside this one has left
            shutil.rmtree(partial, ignore_errors=True)
            for run_id, files in results.items():
                folder = partial / run_id
                folder.mkdir(parents=True)
                sums = {name: hashlib.sha256(files[name]).hexdigest() for name in RUN_FILES}
                for name in RUN_FILES:
                    _write(folder / name, files[name])
                _write(folder / CHECKSUMS, json.dumps(sums, indent=1).encode())
                _flush_folder(folder)
            _flush_folder(partial)
            os.rename(partial, whole)
            _flush_folder(self.staging)
            self._move_in(whole)
        self.new += results

    def finished(self, run_ids: Iterable[str]) -> set[str]:
        """Those of ``run_ids`` that have a result. One whose checksums fail is set aside, and counts as
        missing.

        Of very many runs, those whose checksums held before and whose files have the same sizes and times
        still are not read again.
        """
        there = set(os.listdir(self.runs))
        wanted = [run_id for run_id in run_ids if run_id in there]
        stamped = stamps(self.runs, wanted, _CHECKED) if len(wanted) >= FROM_RUNS else {}
        found, files = self._checked(stamped)
        before = len(found)
        for run_id in wanted:
            folder = self.runs / run_id
            if run_id in found or not folder.is_dir():
                continue
            problem = damage(folder)
            if problem is None:
                found.add(run_id)
            else:
                with self.turn():
                    if folder.is_dir() and damage(folder) is not None:  # another process may have been faster
                        self._set_aside(folder, problem)
        if len(found) - before >= FROM_RUNS or len(files) > MOST_FILES:
            self._note(found, stamped, files)
        return found

    def note_checked(self, run_ids: Iterable[str]) -> None:
        """Check runs, so that :meth:`finished` need not do it at the next start."""
        stamped = stamps(self.runs, run_ids, _CHECKED)
        self._note((run_id for run_id in stamped if damage(self.runs / run_id) is None), stamped, [])

    def _checked(self, stamped: dict[str, bytes]) -> tuple[set[str], list[Path]]:
        """Which runs the cache knows to be whole, and its files."""
        found, files = set[str](), cache_files(self.directory, "checked") if stamped else []
        for path in files:
            tables = read_cache(path, "checked")
            if tables is not None:
                unchanged(tables[0], stamped, found)
        return found, files

    def _note(self, run_ids: Iterable[str], stamped: dict[str, bytes], instead_of: Iterable[Path]) -> None:
        known = [run_id for run_id in run_ids if run_id in stamped]
        table = {"run_id": known, "stamp": [stamped[run_id] for run_id in known]}
        if known:
            write_cache(self.directory, "checked", "checked", [pl.DataFrame(table)], instead_of)

    def record_fleet(self, fleet: Fleet) -> None:
        """Remember who trains together, so that it stays so."""
        path = self.fleets / f"{fleet.id}.json"
        if not path.exists():
            with self._writing(), self.turn():
                write_whole(path, json.dumps([run.id for run in fleet.runs]).encode())

    def recorded_fleets(self) -> list[list[str]]:
        """Ids of the members of every recorded fleet."""
        return [self._members(path.stem) for path in sorted(self.fleets.glob("*.json"))]

    def record_failure(self, runs: Sequence[Run], reason: str, detail: str) -> None:
        """Note why runs have no result; the next request tries them again.

        Args:
            runs: the members of a fleet.
            reason: one line.
            detail: the traceback, or empty.
        """
        for run in runs:
            record = {"config": run.config, **run.notes, "reason": reason, "detail": detail}
            with self._writing(), self.turn():
                write_whole(self.failures / f"{run.id}.json", json.dumps(record, indent=1).encode())

    def record_event(self, event: str, fleet: Fleet, reason: str, **more: Any) -> None:
        """Append to the log of what happened to fleets.

        Args:
            event: ``halved``, ``retried``, ``failed``.
            fleet: to which.
            reason: one line.
            more: other facts.
        """
        entry = {"event": event, "fleet": fleet.id, "runs": len(fleet.runs), "reason": reason, **more}
        with self._writing(), self.turn(), open(self.directory / "events.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")

    def record_request(self, name: str, text: str, runs: Sequence[Run]) -> int:
        """Write down the experiment and its runs: what reports are about.

        Args:
            name: of the experiment.
            text: its file, resolved.
            runs: all of its runs.

        Returns:
            The number of stored runs that belong to earlier requests only.

        Raises:
            StoreError: the folder holds another experiment.
        """
        held = read_plan(self.directory)
        if held is not None and held["experiment"] != name:
            raise StoreError(
                f"{self.directory} holds experiment {held['experiment']!r}, not {name!r}: "
                "choose another --out"
            )
        plan = {"experiment": name, "runs": {run.id: run.notes for run in runs}}
        with self._writing(), self.turn():
            write_whole(self.directory / "experiment.toml", text.encode())
            write_whole(self.directory / "plan.json", json.dumps(plan).encode())
        return sum(1 for run_id in os.listdir(self.runs) if run_id not in plan["runs"])

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """In a shared folder, wait until no other process writes. Not to be nested."""
        if not self.shared:
            yield
            return
        with open(open_own(self.directory / ".turn", os.O_WRONLY), "w") as file:
            fcntl.flock(
                file, fcntl.LOCK_EX
            )  # the system drops it when the file is closed or the process dies
            yield

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn what the system says (a full disk, a read-only folder) into one line."""
        try:
            yield
        except OSError as error:
            raise StoreError(f"cannot write to {self.directory}: {error.strerror or error}") from None

    def _complete(self) -> None:
        """Finish what a killed process left in staging."""
        for entry in sorted(self.staging.iterdir()):
            if entry.name.endswith(".partial"):
                shutil.rmtree(entry)
            elif entry.is_dir():
                self._move_in(entry)
        for folder in (self.directory, self.fleets, self.failures):
            for leftover in folder.glob("*.writing"):
                leftover.unlink()

    def _move_in(self, whole: Path) -> None:
        for folder in sorted(whole.iterdir()):
            target = self.runs / folder.name
            if target.exists():
                shutil.rmtree(folder)
            else:
                os.rename(folder, target)
        _flush_folder(self.runs)
        for run_id in self._members(whole.name):
            (self.failures / f"{run_id}.json").unlink(missing_ok=True)
        whole.rmdir()

    def _members(self, fleet_id: str) -> list[str]:
        path = self.fleets / f"{fleet_id}.json"
        members = read_record(path) if path.exists() else []
        if not isinstance(members, list) or not all(is_id(run_id) for run_id in members):
            raise StoreError(f"{path} does not list runs: delete it and run the grid again")
        return members

    def _set_aside(self, folder: Path, problem: str) -> None:
        self.damaged.mkdir(exist_ok=True)
        number = 0
        while (target := self.damaged / f"{folder.name}-{number}").exists():
            number += 1
        os.rename(folder, target)
        write_whole(self.damaged / f"{target.name}.txt", f"{problem}\n".encode())


def damage(folder: Path) -> str | None:
    """What is wrong with the folder of a run, or None: every file is there and has its checksum."""
    if folder.is_symlink():
        return "the folder is a link"
    try:
        sums = json.loads(read_own(folder / CHECKSUMS))
    except (OSError, ValueError, RecursionError):
        return f"{CHECKSUMS} cannot be read"
    if not isinstance(sums, dict) or set(sums) != set(RUN_FILES):
        return f"{CHECKSUMS} does not list the files of a run"
    for name, expected in sums.items():
        try:
            found = hashlib.sha256(read_own(folder / name)).hexdigest()
        except OSError as error:
            return f"{name}: {error.strerror or error}"
        if found != expected:
            return f"{name} does not have its checksum"
    return None


def read_plan(directory: Path) -> dict[str, Any] | None:
    """The last request of a result folder, ``experiment`` and ``runs`` (id -> ``Run.notes``), or None."""
    try:
        plan = json.loads(read_own(directory / "plan.json"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"{directory / 'plan.json'} cannot be read: {error}") from None
    problem = check_plan(plan)
    if problem is not None:
        raise StoreError(
            f"{directory / 'plan.json'} is not a plan ({problem}); delete it and run the grid again"
        )
    return plan


def read_record(path: Path) -> Any:
    """The content of a JSON file of the store; StoreError where it is damaged."""
    try:
        return json.loads(read_own(path))
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(
            f"{path} cannot be read ({type(error).__name__}): delete it and run the grid again"
        ) from None


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that readers, also after a crash, see the old content or the new, never a part."""
    temporary = path.with_name(path.name + ".writing")
    _write(temporary, data)
    os.replace(temporary, path)
    _flush_folder(path.parent)


def _write(path: Path, data: bytes) -> None:
    with open(open_own(path, os.O_WRONLY | os.O_TRUNC), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
