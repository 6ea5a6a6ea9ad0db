"""Processes of this machine: one a core, or one a GPU, each with its own share of the cores."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from arena.grid.environment import cpu_count
from arena.grid.executors.base import THREAD_VARIABLES, Event, Slots, T, Throttle, Work, attempt
from arena.grid.plan import Fleet

_PROGRESS_INTERVAL = 0.2  # seconds between two messages of a worker


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    slot: int
    fleet: Fleet | None = None


@dataclass(frozen=True, kw_only=True)
class LocalExecutor:
    """Worker processes of this machine. A fleet whose process dies is run once more, in another process: it
    may have been the machine, not the fleet.
    """

    workers: int | None = None
    """Processes; None: one a GPU, without GPUs one a core."""
    gpus: int = 0
    """When not 0, worker i sees GPU ``i % gpus`` only."""
    name = "local"

    def slots(self, fleets: int) -> Slots:
        """No more processes than fleets; the cores shared out among them."""
        wanted = self.workers if self.workers is not None else self.gpus or None
        count, threads = share_cores(wanted, fleets)
        per_device = -(-count // self.gpus) if self.gpus else count
        return Slots(workers=count, threads=threads, share=1 / per_device)

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Here and now: this machine has the device."""
        return function(*arguments)

    def run(self, queue: deque[Fleet], work: Work, slots: Slots) -> Generator[Event, None, None]:
        """Train fleets, taken from the left of the queue; closing the iterator ends the workers.

        Args:
            queue: of fleets.
            work: what to do with each.
            slots: as :meth:`slots` gave them. Processes with default threads on shared cores are many times
                slower than with their share.
        """
        crew: list[_Worker] = []
        free = list(range(slots.workers))
        lost: set[str] = set()
        try:
            while queue or any(w.fleet is not None for w in crew):
                idle = [w for w in crew if w.fleet is None]
                while queue and (idle or free):
                    if not idle:
                        crew.append(_start(work, free.pop(0), slots, self.gpus))
                        idle.append(crew[-1])
                    worker = idle.pop()
                    worker.fleet = queue.popleft()
                    with contextlib.suppress(OSError):  # a dead one shows in the wait below
                        worker.pipe.send(worker.fleet)
                    if worker.fleet.id not in lost:
                        yield Event(kind="started", fleet=worker.fleet)
                busy = {w.pipe: w for w in crew if w.fleet is not None}
                for pipe in wait(list(busy), timeout=1.0):  # wakes up for a signal that another thread took
                    worker = busy[pipe]  # type: ignore[index]
                    fleet = worker.fleet
                    assert fleet is not None
                    try:
                        kind, content = worker.pipe.recv()
                    except (EOFError, OSError):
                        worker.process.join()
                        worker.pipe.close()
                        crew.remove(worker)
                        free.append(worker.slot)
                        kind, content = "died", {"reason": _ending(worker.process.exitcode)}
                        if fleet.id not in lost:
                            lost.add(fleet.id)
                            queue.append(fleet)
                            kind = "retried"
                    if kind != "progress":
                        worker.fleet = None
                    yield Event(kind=kind, fleet=fleet, **content)
        finally:
            for worker in crew:
                worker.process.terminate()
            for worker in crew:
                worker.process.join(timeout=5)
                if worker.process.is_alive():
                    worker.process.kill()
                    worker.process.join()
                worker.pipe.close()


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


def core_group(slot: int, workers: int) -> list[int] | None:
    """The cores of one worker: neighbours, none of them another worker's.

    None where the system has no such thing, and where there are more workers than cores.
    """
    if not hasattr(os, "sched_getaffinity"):  # macOS and Windows
        return None
    cores = sorted(os.sched_getaffinity(0))
    if workers > len(cores):
        return None
    return cores[slot * len(cores) // workers : (slot + 1) * len(cores) // workers]


def _start(work: Work, slot: int, slots: Slots, gpus: int) -> _Worker:
    """Start a worker. Its environment is set here, as torch reads it when it is imported."""
    wanted = dict.fromkeys(THREAD_VARIABLES, str(slots.threads))
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        wanted["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % gpus]
    before = {name: os.environ.get(name) for name in wanted}
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    cores = core_group(slot, slots.workers)
    process = context.Process(target=_worker, args=(theirs, work, cores), daemon=True)
    with _later_interrupts():
        try:
            os.environ.update(wanted)
            process.start()
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
    theirs.close()  # so that a dead worker's pipe ends
    return _Worker(process=process, pipe=ours, slot=slot)


@contextlib.contextmanager
def _later_interrupts() -> Iterator[None]:
    """Start processes that Ctrl-C does not reach, and let it reach this one afterwards only.

    Ctrl-C goes to every process of the terminal: a blocked signal is inherited, so only the driver sees it. A
    thread of a library may take it although it is blocked here; Python would then stop this one half-way
    through the start, and the new process would complain that its instructions are cut off.
    """
    taken: list[int] = []
    here = threading.current_thread() is threading.main_thread()  # Python has handlers there only
    before = signal.signal(signal.SIGINT, lambda number, frame: taken.append(number)) if here else None
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        if here:
            signal.signal(signal.SIGINT, before)
        if taken:
            signal.raise_signal(signal.SIGINT)


def _worker(pipe: Connection, work: Work, cores: Sequence[int] | None) -> None:
    """The main function of a worker process: fleets in, results out, until the driver is gone."""
    threading.Thread(target=_end_with_driver, daemon=True).start()
    if cores is not None:
        with contextlib.suppress(OSError):  # a core that has been taken away: anywhere, then
            os.sched_setaffinity(0, cores)
    while True:
        try:
            fleet = pipe.recv()
        except EOFError:
            return

        def tell(steps: int) -> None:
            pipe.send(("progress", {"steps": steps}))

        pipe.send(attempt(work, fleet, Throttle(tell, _PROGRESS_INTERVAL)))


def _end_with_driver() -> None:
    driver = multiprocessing.parent_process()
    if driver is not None:
        driver.join()
        os._exit(1)


def _ending(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        hint = " (the system kills processes this way when memory runs out)" if name == "SIGKILL" else ""
        return f"the worker process was ended by {name}{hint}"
    return f"the worker process ended with exit status {exitcode}"
