"""From an experiment to a complete store: plan, train what is missing, keep what comes back."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from arena.grid.cache import FROM_RUNS
from arena.grid.environment import foreign_kernels
from arena.grid.executors import Event, Executor, Slots, Work, make_executor
from arena.grid.experiment import Experiment, ExperimentError
from arena.grid.fleets import plan_fleets, split_fleet
from arena.grid.plan import Fleet, Run, plan_runs
from arena.grid.results import cache_results
from arena.grid.store import Store
from arena.grid.toml import to_toml
from arena.plugins import explicit, load


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
    slots: Slots
    """What the engine has for them."""


def train_here(
    fleet: Fleet, progress: Callable[[int], None], *, share: float = 1.0
) -> dict[str, dict[str, bytes]]:
    """The default work of a worker (imported late: the driver needs no torch for it).

    Args:
        fleet: to be trained.
        progress: called with the number of steps done.
        share: part of the device's memory that the fleet may use.
    """
    from arena.grid.worker import train

    return train(fleet, progress, share=share)


def run_experiment(
    experiment: Experiment,
    directory: str | Path,
    *,
    device: str = "cpu",
    workers: int | None = None,
    executor: Executor | str = "local",
    work: Work | None = None,
    on_start: Callable[[Pending], None] | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> GridReport:
    """Train what is missing of an experiment and store it; safe to kill at any instant and to start again.

    Args:
        experiment: what to train.
        directory: the result folder.
        device: ``cpu`` or ``cuda``.
        workers: processes; None: one a core on the CPU, one a GPU otherwise.
        executor: where fleets train: ``local``, ``ray``, ``slurm``, or what
            :func:`arena.grid.executors.make_executor` made.
        work: what a worker does with a fleet; None: train it.
        on_start: called once, when it is known what is missing.
        on_event: called for everything that happens to a fleet.

    Raises:
        ExperimentError: the experiment asks for something that does not exist; nothing was started.
        StoreError: the folder is in use, holds another experiment, or cannot be written; nothing was started.
    """
    problem = foreign_kernels()
    if problem is not None:
        raise ExperimentError(problem)
    # refused before planning, which tries the models out on the device
    engine = as_executor(executor, directory, device=device, workers=workers)
    plan = functools.partial(plan_runs, experiment, device=device)
    runs = plan() if has_device(device) else engine.call(plan)
    return train_runs(
        runs,
        directory,
        name=experiment.name,
        request=to_toml(experiment.model_dump(exclude_none=True)),
        fleet_size=experiment.fleet_size,
        executor=engine,
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
    executor: Executor | str = "local",
    work: Work | None = None,
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
        executor: where fleets train.
        work: what a worker does with a fleet.
        on_start: called once.
        on_event: called for everything that happens to a fleet.
    """
    engine = as_executor(executor, directory, device=device, workers=workers)
    with Store(directory) as store:
        others = store.record_request(name, request, runs)
        finished = store.finished(run.id for run in runs)
        fleets = [
            fleet
            for fleet in plan_fleets(runs, fleet_size, store.recorded_fleets())
            if any(run.id not in finished for run in fleet.runs)
        ]
        slots = engine.slots(len(fleets))
        report = GridReport(planned=len(runs), stored=len(finished), others=others)
        queue = deque(fleets)
        events = engine.run(queue, bound_work(work, slots), slots)
        try:
            if on_start is not None:
                on_start(
                    Pending(
                        fleets=fleets,
                        planned=len(runs),
                        stored=len(finished),
                        others=others,
                        slots=slots,
                    )
                )
            for event in events:
                take(event, store, queue, finished, report)
                if on_event is not None:
                    on_event(event)
        except KeyboardInterrupt:
            report.interrupted = True
        finally:
            events.close()
        report.stored = len(finished)
    return report


def take(event: Event, store: Store, queue: deque[Fleet], finished: set[str], report: GridReport) -> None:
    """Do what an event asks for: store results, split a fleet that does not fit, note a failure.

    Args:
        event: what happened.
        store: the open store.
        queue: of the engine; the halves of a fleet that does not fit are appended.
        finished: ids of the runs with a result; grows.
        report: failures are added.
    """
    fleet = event.fleet
    if event.kind == "done":
        assert event.results is not None
        store.commit(fleet, event.results)
        finished.update(event.results)
        if len(store.new) >= FROM_RUNS:
            noted = cache_results(store.directory, store.new)
            store.note_checked(noted)
            store.new = [run_id for run_id in store.new if run_id not in noted]
    elif event.kind == "memory" and len(fleet.runs) > 1:
        pieces, passed = split_fleet(fleet, event.fits)
        for known in (
            fleet,
            *passed,
            *pieces,
        ):  # in this order: a kill in between leaves what can be completed
            store.record_fleet(known)
        queue.extend(pieces)
        store.record_event("halved", fleet, event.reason, into=[piece.id for piece in pieces])
    elif event.kind == "retried":
        store.record_event("retried", fleet, event.reason)
    elif event.kind in ("memory", "died", "error"):
        missing: list[Run] = [run for run in fleet.runs if run.id not in finished]
        store.record_failure(missing, event.reason, event.detail)
        store.record_event("failed", fleet, event.reason)
        for run in missing:
            report.failed[run.id] = event.reason
            report.labels[run.id] = run.label


def bound_work(work: Work | None, slots: Slots) -> Work:
    """The work with all that a worker must know beside the fleet: its share, and the plug-ins.

    Args:
        work: None: train.
        slots: of the engine.
    """
    plain = work if work is not None else functools.partial(train_here, share=slots.share)
    return functools.partial(_with_plugins, plain, explicit())


def _with_plugins(
    work: Work, plugins: tuple[str, ...], fleet: Fleet, progress: Callable[[int], None]
) -> Mapping[str, Mapping[str, bytes]]:
    """In the worker: load the plug-ins of the driver, then work."""
    load(plugins, measurements=False)
    return work(fleet, progress)


def as_executor(
    executor: Executor | str, directory: str | Path, *, device: str, workers: int | None
) -> Executor:
    """The engine, where only its name was given."""
    if isinstance(executor, str):
        return make_executor(executor, directory=directory, device=device, workers=workers)
    return executor


def has_device(device: str) -> bool:
    """Whether this machine has such a device."""
    if device != "cuda":
        return True
    import torch

    return torch.cuda.device_count() > 0
