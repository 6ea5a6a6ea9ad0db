"""Training what tuning asks for, together with other processes that do the same.

Several ``arena tune`` of one experiment may run at once. In one result folder they share out the fleets by
locks that the system drops when a process dies. Through one database (``--storage``) they do so from folders
of their own: a trial then belongs to the process that set it running, as long as that one shows that it is
alive. Training is deterministic, so a trial that two processes train after all is trained for nothing, but
not wrongly.
"""

from __future__ import annotations

import fcntl
import os
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import polars as pl
from optuna.trial import FrozenTrial, TrialState

from arena.grid.driver import GridReport, Pending, bound_work, take
from arena.grid.executors import Event, Executor, Slots, Work
from arena.grid.fleets import plan_fleets, split_fleet
from arena.grid.plan import Fleet, Run
from arena.grid.store import Store, write_whole
from arena.tuning.study import Desk

BEAT = 10.0
"""Seconds between two signs of life of a process in a shared database."""
GRACE = 180.0
"""Seconds without one after which its trials are taken over."""
POLL = 1.0
"""Seconds between two looks at what other processes do."""

Trials = Mapping[str, tuple[Desk, int]]
"""Run id -> the study and the point that it is trained for."""


class Claims:
    """Which fleets this process works on, for all that share the result folder: locked bytes of one file."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self.held: set[str] = set()

    def take(self, fleet_id: str) -> bool:
        """Claim a fleet; False where another living process has it."""
        try:
            fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _byte(fleet_id))
        except OSError:
            return False
        self.held.add(fleet_id)
        return True

    def drop(self, fleet_id: str) -> None:
        """Give a fleet back."""
        if fleet_id in self.held:
            self.held.remove(fleet_id)
            fcntl.lockf(self._handle, fcntl.LOCK_UN, 1, _byte(fleet_id))

    def close(self) -> None:
        """Give everything back."""
        os.close(self._handle)
        self.held.clear()


def _byte(fleet_id: str) -> int:
    return int(fleet_id[:15], 16)


class Crew:
    """Trains lists of runs into a shared store and tells their trials."""

    def __init__(
        self,
        store: Store,
        folder: Path,
        name: str,
        *,
        fleet_size: int,
        executor: Executor,
        work: Work | None,
        report: GridReport,
        score: Callable[[Desk, Sequence[pl.DataFrame]], tuple[float, dict]],
        shows_life: bool,
        say: Callable[[str], None],
        on_start: Callable[[Pending], None] | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        """Join the work.

        Args:
            store: open, shared.
            folder: ``DIR/tuning``.
            name: of the folder, see :func:`identity`.
            fleet_size: most runs that train together.
            executor: where fleets train.
            work: what a worker does with a fleet; None: train it.
            report: counts and failures are kept there.
            score: study and the rows of a point's runs -> the trial's score and its notes.
            shows_life: whether processes with other folders may be at work in the same studies.
            say: called with a line when there is nothing left but to wait for other processes.
            on_start: called before each list, with what is missing.
            on_event: called for everything that happens to a fleet.
        """
        self.store, self.fleet_size, self.executor, self.work = store, fleet_size, executor, work
        self.report, self.score, self.shows_life = report, score, shows_life
        self.say, self.on_start, self.on_event = say, on_start, on_event
        self.claims = Claims(folder / "claims")
        self.folder = name
        self.owner = {"host": os.uname().nodename, "process": os.getpid(), "folder": self.folder}
        self.finished: set[str] = set()
        self.elsewhere: set[str] = set()
        self._seen: dict[tuple[str, int], tuple[object, float]] = {}
        self._mine: dict[str, list[tuple[Desk, FrozenTrial]]] = {}
        self._last_beat = 0.0

    def train(self, runs: Sequence[Run], trials: Trials) -> bool:
        """Train those of ``runs`` that no process has trained yet, and wait for the others.

        Returns:
            Whether every run has a result now, here or in another folder.
        """
        self.finished |= self.store.finished(run.id for run in runs if run.id not in self.finished)
        fleets = plan_fleets(runs, self.fleet_size, self.store.recorded_fleets())
        self._settle(runs, trials)
        missing = [fleet for fleet in fleets if self._open(fleet)]
        if missing:
            slots = self.executor.slots(len(missing))
            if self.on_start is not None:
                self.on_start(
                    Pending(
                        fleets=missing,
                        planned=len(runs),
                        stored=sum(run.id in self.finished for run in runs),
                        others=0,
                        slots=slots,
                    )
                )
            try:
                self._work_off(missing, trials, slots)
            except KeyboardInterrupt:
                self.report.interrupted = True
            finally:
                for fleet_id in list(self.claims.held):
                    self.claims.drop(fleet_id)
        return all(run.id in self.finished or run.id in self.elsewhere for run in runs)

    def _work_off(self, fleets: Sequence[Fleet], trials: Trials, slots: Slots) -> None:
        queue: deque[Fleet] = deque()
        waited = False
        while any(self._open(fleet) for fleet in fleets):
            self._fill(queue, fleets, trials, slots.workers)
            if not queue:
                if not waited and any(self._open(fleet) for fleet in fleets):
                    self.say("what is missing is being trained by other processes: waiting for them")
                waited = True
                time.sleep(POLL)
                continue
            events = self.executor.run(queue, bound_work(self.work, slots), slots)
            try:
                for event in events:
                    if event.kind == "memory" and len(event.fleet.runs) > 1:
                        for piece in split_fleet(event.fleet, event.fits)[0]:  # before others can see them
                            self.claims.take(piece.id)
                    take(event, self.store, queue, self.finished, self.report)
                    if self.on_event is not None:
                        self.on_event(event)
                    self._show_life()
                    if event.kind == "done":
                        self._settle(event.fleet.runs, trials)
                    if event.kind in ("done", "error"):
                        self._release(event.fleet)
                        self._fill(queue, fleets, trials, 1)
            finally:
                events.close()
            self._give_up(trials)

    def _fill(self, queue: deque[Fleet], fleets: Sequence[Fleet], trials: Trials, wanted: int) -> None:
        """Claim fleets until ``wanted`` wait in the queue."""
        for fleet in fleets:
            if len(queue) >= wanted:
                return
            if fleet.id in self.claims.held or not self._open(fleet) or not self.claims.take(fleet.id):
                continue
            here = [run.id for run in fleet.runs if (self.store.runs / run.id).is_dir()]
            self.finished.update(here)  # by another process in this folder
            self._settle(fleet.runs, trials)
            if self._open(fleet) and self._own(fleet, trials):
                queue.append(fleet)
            else:
                self.claims.drop(fleet.id)

    def _open(self, fleet: Fleet) -> bool:
        """Whether something of a fleet is still to be trained by someone."""
        ended = self.finished, self.elsewhere, self.report.failed
        return any(not any(run.id in group for group in ended) for run in fleet.runs)

    def _own(self, fleet: Fleet, trials: Trials) -> bool:
        """Set the trials of a claimed fleet running; False where a living process has one of them."""
        owned = []
        held: dict[str, dict[int, FrozenTrial]] = {}
        for run in fleet.runs:
            if run.id not in trials:
                continue
            desk, point = trials[run.id]
            if desk.name not in held:
                held[desk.name] = desk.trials()
            trial = held[desk.name].get(point)
            if trial is None:
                reason = "failed in another process that tunes the same study"
                self.report.failed[run.id] = reason
                self.report.labels[run.id] = run.label
            elif trial.state is TrialState.COMPLETE:
                if trial.user_attrs.get("owner", {}).get("folder") != self.folder:
                    self.elsewhere.add(run.id)
            elif trial.state is TrialState.WAITING:
                if not desk.claim(trial, self.owner):
                    return False
                owned.append((desk, trial))
            elif trial.user_attrs.get("owner") == self.owner:  # by another fleet of the same point
                owned.append((desk, trial))
            elif self._is_stale(desk, trial):
                attempts = int(trial.user_attrs.get("attempts", 1)) + 1
                desk.note(trial, "owner", self.owner)
                desk.note(trial, "attempts", attempts)
                owned.append((desk, trial))
            else:
                return False
        self._mine[fleet.id] = owned
        return self._open(fleet)

    def _is_stale(self, desk: Desk, trial: FrozenTrial) -> bool:
        """Whether the process that set a trial running is gone.

        In this folder it is, as its lock on the fleet is free. From other folders it has to show life; how
        long it has not is measured by the clock here, as clocks differ.
        """
        owner = trial.user_attrs.get("owner")
        if owner is not None and owner["folder"] == self.folder:
            return True
        sign, now = (owner, trial.user_attrs.get("beat")), time.monotonic()
        last, since = self._seen.setdefault((desk.name, trial.number), (sign, now))
        if last != sign:
            self._seen[desk.name, trial.number] = (sign, now)
            return False
        return now - since > GRACE

    def _show_life(self) -> None:
        now = time.monotonic()
        if self.shows_life and now - self._last_beat > BEAT:
            self._last_beat = now
            for desk, trial in (entry for owned in self._mine.values() for entry in owned):
                desk.note(trial, "beat", round(now, 1))

    def _release(self, fleet: Fleet) -> None:
        self._mine.pop(fleet.id, None)
        self.claims.drop(fleet.id)

    def _settle(self, runs: Sequence[Run], trials: Trials) -> None:
        """Tell the trials whose runs are all stored."""
        touched = {trials[run.id][0].name: trials[run.id][0] for run in runs if run.id in trials}
        points = {(trials[run.id][0].name, trials[run.id][1]) for run in runs if run.id in trials}
        members: dict[tuple[str, int], list[str]] = {}
        for run_id, (desk, point) in trials.items():
            if (desk.name, point) in points:
                members.setdefault((desk.name, point), []).append(run_id)
        held = {name: desk.trials() for name, desk in touched.items()}
        for (name, point), run_ids in members.items():
            trial = held[name].get(point)
            if trial is None or trial.state is TrialState.COMPLETE:
                continue
            if all(run_id in self.finished for run_id in run_ids):
                if trial.state is TrialState.WAITING and not touched[name].claim(trial, self.owner):
                    continue
                rows = [pl.read_parquet(self.store.runs / run_id / "rows.parquet") for run_id in run_ids]
                score, notes = self.score(touched[name], rows)
                touched[name].tell(trial, score, {"owner": self.owner, "runs": run_ids, **notes})

    def _give_up(self, trials: Trials) -> None:
        """Fail the trials of runs that failed, so that the next start enqueues their points again."""
        for run_id in self.report.failed:
            if run_id in trials:
                desk, point = trials[run_id]
                trial = desk.trials().get(point)
                if trial is not None and trial.state is TrialState.RUNNING:
                    desk.fail(trial, self.report.failed[run_id])


def identity(path: Path) -> str:
    """A name for this result folder that no other has, also where another machine sees it by another path.

    Args:
        path: of the file that keeps it; made by one process at a time.
    """
    if not path.exists():
        write_whole(path, uuid.uuid4().hex.encode())
    return path.read_text()
