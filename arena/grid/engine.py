"""The local engine: worker processes on this machine, each with its own share of the cores.

An engine takes fleets from a queue, has them trained and yields events. It decides nothing: what a failure
means, and what is stored, is the driver's business (``arena.grid.driver``). The workers write no files: they
send finished bytes to the driver, so there is one writer, and a worker that outlives its driver can do no
harm.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

from arena.grid.plan import Fleet
from arena.plugins import explicit, load

Work = Callable[[Fleet, Callable[[int], None]], Mapping[str, Mapping[str, bytes]]]
"""What a worker does with a fleet: (fleet, progress) -> run id -> file name -> bytes; importable by name."""

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
OUT_OF_MEMORY = ("FleetOutOfMemory", "OutOfMemoryError", "MemoryError")
_PROGRESS_INTERVAL = 0.2  # seconds between two messages of a worker


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to a fleet."""

    kind: Literal["started", "progress", "done", "error", "memory", "died"]
    """``memory``: it does not fit; ``died``: the worker process ended without a word."""
    fleet: Fleet
    steps: int = 0
    """Of ``progress``: steps done."""
    results: Mapping[str, Mapping[str, bytes]] | None = None
    """Of ``done``: the files of each run."""
    reason: str = ""
    """Of ``error``, ``memory``, ``died``: one line."""
    detail: str = ""
    """Of ``error`` and ``memory``: the traceback."""


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    slot: int
    fleet: Fleet | None = None


def run_local(
    queue: deque[Fleet], work: Work, *, workers: int, threads: int, gpus: int = 0
) -> Generator[Event, None, None]:
    """Train fleets in processes of this machine; one event for each thing that happens.

    The caller may append to ``queue`` between two events. Closing the iterator ends the workers.

    Args:
        queue: fleets, taken from the left.
        work: what to do with each.
        workers: number of processes.
        threads: torch threads of each: processes with default threads on shared cores are many times slower.
        gpus: when not 0, worker i sees GPU ``i % gpus`` only.
    """
    crew: list[_Worker] = []
    free = list(range(workers))
    try:
        while queue or any(w.fleet is not None for w in crew):
            idle = [w for w in crew if w.fleet is None]
            while queue and (idle or free):
                if not idle:
                    crew.append(_start(work, free.pop(0), threads, gpus))
                    idle.append(crew[-1])
                worker = idle.pop()
                worker.fleet = queue.popleft()
                with contextlib.suppress(OSError):  # a dead one shows in the wait below
                    worker.pipe.send(worker.fleet)
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
                    crew.remove(worker)
                    free.append(worker.slot)
                    yield Event(kind="died", fleet=fleet, reason=_ending(worker.process.exitcode))
                    continue
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


def _start(work: Work, slot: int, threads: int, gpus: int) -> _Worker:
    """Start a worker. Its environment is set here, as torch reads it when it is imported."""
    wanted = dict.fromkeys(THREAD_VARIABLES, str(threads))
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        wanted["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % gpus]
    before = {name: os.environ.get(name) for name in wanted}
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_worker, args=(theirs, work, explicit()), daemon=True)
    # Ctrl-C reaches every process of the terminal: a blocked signal is inherited, so only the driver sees it
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        os.environ.update(wanted)
        process.start()
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    theirs.close()  # so that a dead worker's pipe ends
    return _Worker(process=process, pipe=ours, slot=slot)


def _worker(pipe: Connection, work: Work, plugins: tuple[str, ...]) -> None:
    """The main function of a worker process: fleets in, results out, until the driver is gone."""
    threading.Thread(target=_end_with_driver, daemon=True).start()
    while True:
        try:
            fleet = pipe.recv()
        except EOFError:
            return
        message: tuple[str, dict[str, Any]]
        try:
            load(plugins, measurements=False)
            message = ("done", {"results": work(fleet, _Progress(pipe))})
        except Exception as error:
            # by name: the engine itself needs no torch, so that starting it is quick
            kind = "memory" if type(error).__name__ in OUT_OF_MEMORY else "error"
            message = (kind, {"reason": _reason(error), "detail": traceback.format_exc()})
        pipe.send(message)


class _Progress:
    """Sends the number of steps done, a few times a second at most."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self.last = 0.0

    def __call__(self, steps: int) -> None:
        now = time.monotonic()
        if now - self.last >= _PROGRESS_INTERVAL:
            self.last = now
            self.pipe.send(("progress", {"steps": steps}))


def _end_with_driver() -> None:
    driver = multiprocessing.parent_process()
    if driver is not None:
        driver.join()
        os._exit(1)


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _ending(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        hint = " (the system kills processes this way when memory runs out)" if name == "SIGKILL" else ""
        return f"the worker process was ended by {name}{hint}"
    return f"the worker process ended with exit status {exitcode}"
