"""Slurm, through submitit: fleets as tasks of array jobs; Slurm places them and requeues what it preempts."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import os
import subprocess
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arena.grid.executors.base import Event, Message, Slots, T, Work, attempt, limit_threads, one_reason
from arena.grid.fields import ExperimentError
from arena.grid.plan import Fleet

LARGEST_ARRAY = 1000
"""Tasks of one array job; Slurm's MaxArraySize is 1001 where nobody changed it."""
_POLL = {"slurm": 2.0, "local": 0.1, "debug": 0.0}
"""Seconds between two looks at the jobs, by submitit's engine."""


@dataclass(frozen=True, kw_only=True)
class SlurmExecutor:
    """Fleets as tasks of Slurm array jobs. A preempted one is requeued by Slurm and starts anew; one that
    fails for another reason is given up.

    Results and logs pass through ``folder``, which the nodes must share with the driver. submitit writes
    pickles there; only those of jobs that this very process submitted are ever read, and each is deleted as
    soon as its fleet is stored.
    """

    folder: Path
    """Of submitit: scripts, logs, results on their way."""
    cluster: str = "slurm"
    """Of submitit; ``local`` and ``debug`` need no Slurm."""
    workers: int | None = None
    """Fleets at once; None: as many as Slurm lets."""
    cpus: int = 1
    """CPUs of a fleet, which has as many threads."""
    gpus: int = 0
    """GPUs of a fleet."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Of ``sbatch``, as submitit names them: ``time`` (minutes; required for Slurm), ``partition``, ..."""
    shared: bool = False
    """Other drivers use the folder too. Else jobs that a killed driver left in the queue are cancelled."""
    name = "slurm"

    def slots(self, fleets: int) -> Slots:
        """What was asked for."""
        return Slots(workers=max(1, min(self.workers or fleets, fleets)), threads=self.cpus)

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """The value of a function in a job of its own."""
        job = self._executor().submit(_call, function, arguments)
        try:
            outcome, value = job.result()
        except Exception as error:  # submitit's, which hold the log
            raise ExperimentError(f"a job of Slurm failed: {one_reason(error)}") from None
        if outcome == "refused":
            raise ExperimentError(value)
        return value

    def run(self, queue: deque[Fleet], work: Work, slots: Slots) -> Generator[Event, None, None]:
        """Submit the queue as arrays, and what is appended to it; closing the iterator cancels what is left.

        Args:
            queue: of fleets.
            work: what to do with each.
            slots: as :meth:`slots` gave them.
        """
        executor = self._executor()
        self._cancel_orphans()
        task = _Task(work, slots.threads)
        waiting: list[tuple[Any, Fleet]] = []
        started: set[str] = set()
        try:
            while queue or waiting:
                room = LARGEST_ARRAY if self.cluster == "slurm" else slots.workers - len(waiting)
                while queue and room > 0:
                    fleets = [queue.popleft() for _ in range(min(room, len(queue)))]
                    waiting += zip(executor.map_array(task, fleets), fleets, strict=True)
                    room = LARGEST_ARRAY if self.cluster == "slurm" else 0
                ended = False
                for job, fleet in list(waiting):
                    done = job.done()
                    if fleet.id not in started and (done or job.state == "RUNNING"):
                        started.add(fleet.id)
                        yield Event(kind="started", fleet=fleet)
                    if done:
                        ended = True
                        waiting.remove((job, fleet))
                        kind, content = self._outcome(job)
                        yield Event(kind=kind, fleet=fleet, **content)  # type: ignore[arg-type]
                        for path in (job.paths.submitted_pickle, job.paths.result_pickle):
                            path.unlink(missing_ok=True)
                if not ended:
                    time.sleep(_POLL[self.cluster])
        finally:
            _cancel([job for job, _ in waiting], self.cluster)

    def _executor(self) -> Any:
        """submitit's, with the parameters."""
        try:
            import submitit
        except ImportError:
            raise ExperimentError('submitit is not installed: pip install "memory-arena[cluster]"') from None
        given = dict(self.parameters)
        if self.cluster == "slurm" and "time" not in given:
            raise ExperimentError("say how many minutes a fleet may take: --slurm time=MINUTES")
        minutes = given.pop("time", 24 * 60)
        try:
            executor = submitit.AutoExecutor(folder=self.folder, cluster=self.cluster)
            executor.update_parameters(
                name=self._job_name(),
                timeout_min=minutes,
                cpus_per_task=self.cpus,
                gpus_per_node=self.gpus or None,
                slurm_array_parallelism=self.workers,
                **{f"slurm_{key}": value for key, value in given.items()},
            )
        except RuntimeError:
            raise ExperimentError("no Slurm here: the command srun is not found") from None
        except (NameError, ValueError, AssertionError) as error:
            raise ExperimentError(f"--slurm: {one_reason(error)}") from None
        return executor

    def _outcome(self, job: Any) -> Message:
        """What became of a job that has ended, whatever way."""
        try:
            # submitit waits for a slow file system, which is not between this machine and itself
            if self.cluster != "local" or job.paths.result_pickle.exists():
                return job.result()
        except Exception as error:  # submitit's UncompletedJobError and FailedJobError, which hold the log
            if str(job.state).startswith("OUT_OF_MEMORY"):
                return "memory", {"reason": "Slurm ended the job: out of memory", "detail": str(error)}
        return "died", {"reason": f"the job ended without a result ({job.state}); log: {job.paths.stderr}"}

    def _job_name(self) -> str:
        where = hashlib.sha256(str(self.folder.resolve()).encode()).hexdigest()[:12]
        return f"arena-{where}" + (f"-{os.uname().nodename}-{os.getpid()}" if self.shared else "")

    def _cancel_orphans(self) -> None:
        """End the jobs of a killed driver, so that no run is trained twice at the same time."""
        if self.cluster == "slurm" and not self.shared:
            command = ["scancel", f"--user={getpass.getuser()}", f"--name={self._job_name()}"]
            subprocess.run(command, capture_output=True, check=False)


class _Task:
    """What a job calls; submitit asks for ``checkpoint`` when Slurm preempts it."""

    def __init__(self, work: Work, threads: int) -> None:
        self.work, self.threads = work, threads

    def __call__(self, fleet: Fleet) -> Message:
        limit_threads(self.threads)
        return attempt(self.work, fleet, _silent)

    def checkpoint(self, fleet: Fleet) -> Any:
        """To be requeued: the same from the beginning."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, fleet)


def _silent(steps: int) -> None:
    """Progress has no way out of a job."""


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        return "done", function(*arguments)
    except ExperimentError as error:
        return "refused", str(error)


def _cancel(jobs: Sequence[Any], cluster: str) -> None:
    if cluster == "slurm":
        arrays = sorted({job.job_id.split("_")[0] for job in jobs})
        if arrays:
            subprocess.run(["scancel", *arrays], capture_output=True, check=False)
        return
    for job in jobs:
        with contextlib.suppress(OSError):
            job.cancel(check=False)
