"""From an experiment to a complete store: plan, train what is missing, keep what comes back."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from arena.grid.engine import Event, Work, run_local
from arena.grid.environment import cpu_count, foreign_kernels
from arena.grid.experiment import Experiment, ExperimentError
from arena.grid.plan import Fleet, Run, plan_fleets, plan_runs, split_fleet
from arena.grid.store import Store
from arena.grid.toml import to_toml


@dataclass(kw_only=True)
class GridReport:
    """How a grid stands."""

    planned: int
    """Runs of the experiment."""
    stored: int = 0
    """Of these, runs with a result."""
    failed: dict[str, str] = field(default_factory=dict)
    """Run id -> reason, for what was tried now and failed."""
    labels: dict[str, str] = field(default_factory=dict)
    """Run id -> architecture, task and seed of the failed runs."""
    others: int = 0
    """Stored runs of earlier requests, which reports leave out."""
    interrupted: bool = False
    """Ended by Ctrl-C."""


@dataclass(frozen=True, kw_only=True)
class Pending:
    """What a grid is about to do."""

    fleets: list[Fleet]
    """To be trained, in this order."""
    planned: int
    """Runs of the experiment."""
    stored: int
    """Runs that are there already."""
    others: int
    """Stored runs of earlier requests."""
    workers: int
    """Processes."""
    threads: int
    """Torch threads of each."""


def train_here(fleet: Fleet, progress: Callable[[int], None]) -> dict[str, dict[str, bytes]]:
    """The default work of a worker (imported late: the driver needs no torch for it)."""
    from arena.grid.worker import train

    return train(fleet, progress)


def run_experiment(
    experiment: Experiment,
    directory: str | Path,
    *,
    device: str = "cpu",
    workers: int | None = None,
    work: Work = train_here,
    on_start: Callable[[Pending], None] | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> GridReport:
    """Train what is missing of an experiment and store it; safe to kill at any instant and to start again.

    Args:
        experiment: what to train.
        directory: the result folder.
        device: ``cpu`` or ``cuda``.
        workers: processes; None: one a core on the CPU, one a GPU otherwise.
        work: what a worker does with a fleet.
        on_start: called once, when it is known what is missing.
        on_event: called for everything that happens to a fleet.

    Raises:
        ExperimentError: the experiment asks for something that does not exist; nothing was started.
        StoreError: the folder is in use, holds another experiment, or cannot be written; nothing was started.
    """
    problem = foreign_kernels()
    if problem is not None:
        raise ExperimentError(problem)
    gpu_count(device)  # refuse before planning, which tries the models out on the device
    runs = plan_runs(experiment, device=device)
    return train_runs(
        runs,
        directory,
        name=experiment.name,
        request=to_toml(experiment.model_dump(exclude_none=True)),
        fleet_size=experiment.fleet_size,
        device=device,
        workers=workers,
        work=work,
        on_start=on_start,
        on_event=on_event,
    )


def train_runs(
    runs: Sequence[Run],
    directory: str | Path,
    *,
    name: str,
    request: str,
    fleet_size: int,
    device: str = "cpu",
    workers: int | None = None,
    work: Work = train_here,
    on_start: Callable[[Pending], None] | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> GridReport:
    """Train those of ``runs`` that are not stored, and store them: :func:`run_experiment` behind its
    planning.

    Args:
        runs: all that is wanted.
        directory: the result folder.
        name: of the experiment.
        request: the text to keep as experiment.toml.
        fleet_size: most runs that train together.
        device: as in :func:`run_experiment`; so are the others.
        workers: processes.
        work: what a worker does with a fleet.
        on_start: called once.
        on_event: called for everything that happens to a fleet.
    """
    gpus = gpu_count(device)
    with Store(directory) as store:
        others = store.record_request(name, request, runs)
        finished = store.finished(run.id for run in runs)
        fleets = [
            fleet
            for fleet in plan_fleets(runs, fleet_size, store.recorded_fleets())
            if any(run.id not in finished for run in fleet.runs)
        ]
        count, threads = share_cores(workers if workers is not None else gpus or None, len(fleets))
        report = GridReport(planned=len(runs), stored=len(finished), others=others)
        queue = deque(fleets)
        events = run_local(queue, work, workers=count, threads=threads, gpus=gpus)
        died: set[str] = set()
        try:
            if on_start is not None:
                on_start(
                    Pending(
                        fleets=fleets,
                        planned=len(runs),
                        stored=len(finished),
                        others=others,
                        workers=count,
                        threads=threads,
                    )
                )
            for event in events:
                take(event, store, queue, finished, died, report)
                if on_event is not None:
                    on_event(event)
        except KeyboardInterrupt:
            report.interrupted = True
        finally:
            events.close()
        report.stored = len(finished)
    return report


def take(
    event: Event, store: Store, queue: deque[Fleet], finished: set[str], died: set[str], report: GridReport
) -> None:
    """Do what an event asks for: store results, split a fleet that does not fit, note a failure.

    Args:
        event: what happened.
        store: the open store.
        queue: of the engine; a fleet that is to be tried again is appended.
        finished: ids of the runs with a result; grows.
        died: ids of the fleets whose process died once; grows.
        report: failures are added.
    """
    fleet = event.fleet
    if event.kind == "done":
        assert event.results is not None
        store.commit(fleet, event.results)
        finished.update(event.results)
    elif event.kind == "memory" and len(fleet.runs) > 1:
        for half in split_fleet(fleet):
            store.record_fleet(half)
            queue.append(half)
    elif event.kind == "died" and fleet.id not in died:
        died.add(fleet.id)  # once more: it may have been the machine, not the fleet
        queue.append(fleet)
    elif event.kind in ("memory", "died", "error"):
        missing: list[Run] = [run for run in fleet.runs if run.id not in finished]
        store.record_failure(missing, event.reason, event.detail)
        for run in missing:
            report.failed[run.id] = event.reason
            report.labels[run.id] = run.label


def gpu_count(device: str) -> int:
    """GPUs to use: 0 on the CPU.

    Raises:
        ExperimentError: ``cuda`` without one.
    """
    if device != "cuda":
        return 0
    import torch

    if torch.cuda.device_count() == 0:
        raise ExperimentError("--device cuda: torch sees no GPU on this machine (arena doctor says more)")
    return torch.cuda.device_count()


def share_cores(workers: int | None, fleets: int) -> tuple[int, int]:
    """(processes, threads of each) for this machine: no more processes than fleets, no more threads than
    cores.

    A thread count set in the environment is an upper bound.
    """
    cores = cpu_count()
    count = max(1, min(workers or cores, fleets))
    threads = max(1, cores // count)
    limit = os.environ.get("OMP_NUM_THREADS", "")
    if limit.isdigit() and int(limit) > 0:
        threads = min(threads, int(limit))
    return count, threads
