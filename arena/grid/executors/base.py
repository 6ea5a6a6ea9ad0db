"""What the engines share: the interface, the events, and how a worker goes through a fleet.

An engine takes fleets from a queue, has them trained and yields events. It decides nothing about results:
what a failure means, and what is stored, is the driver's business (``arena.grid.driver``). Workers write no
files: they send finished bytes to the driver, so there is one writer, no folder need be shared, and a worker
that outlives its driver can do no harm.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from arena.grid.plan import Fleet

T = TypeVar("T")

Work = Callable[[Fleet, Callable[[int], None]], Mapping[str, Mapping[str, bytes]]]
"""What a worker does with a fleet: (fleet, progress) -> run id -> file name -> bytes; importable by name."""

Message = tuple[str, dict[str, Any]]
"""What became of a fleet, as a worker tells it: the kind of the event and its other fields."""

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
OUT_OF_MEMORY = ("FleetOutOfMemory", "OutOfMemoryError", "MemoryError")


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to a fleet. ``started`` comes first, once."""

    kind: Literal["started", "progress", "done", "error", "memory", "retried", "died"]
    """``memory``: it does not fit; ``retried``: its worker was lost and the engine runs it again; ``died``:
    its worker was lost, and the engine has given up."""
    fleet: Fleet
    steps: int = 0
    """Of ``progress``: steps done."""
    results: Mapping[str, Mapping[str, bytes]] | None = None
    """Of ``done``: the files of each run."""
    reason: str = ""
    """Of ``error``, ``memory``, ``retried``, ``died``: one line."""
    detail: str = ""
    """Of ``error`` and ``memory``: the traceback."""
    fits: int | None = None
    """Of ``memory``: the number of runs that would fit, where it was measured."""


@dataclass(frozen=True, kw_only=True)
class Slots:
    """What an engine has for fleets at the same time."""

    workers: int
    """Fleets that train at once."""
    threads: int
    """Torch threads of each."""
    share: float = 1.0
    """Part of a GPU's memory, on the CPU of a machine's memory, that one fleet may use."""


class Executor(Protocol):
    """An engine: where fleets train, and who restarts what is lost."""

    name: str

    def slots(self, fleets: int) -> Slots:
        """How many of so many fleets can train at once, and with what."""

    def run(self, queue: deque[Fleet], work: Work, slots: Slots) -> Generator[Event, None, None]:
        """Train fleets; one event for each thing that happens to one.

        The caller may append to ``queue`` between two events. Closing the iterator ends what still trains.
        """

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """The value of a function where fleets train: on a machine that has their device."""


def attempt(work: Work, fleet: Fleet, progress: Callable[[int], None]) -> Message:
    """Go through a fleet: what an engine's worker calls. Whatever the work raises becomes a message."""
    try:
        return "done", {"results": work(fleet, progress)}
    except Exception as error:
        # by name: the engines need no torch, so that starting them is quick
        kind = "memory" if type(error).__name__ in OUT_OF_MEMORY else "error"
        content: dict[str, Any] = {"reason": one_reason(error), "detail": traceback.format_exc()}
        if kind == "memory":
            content["fits"] = getattr(error, "fits", None)
        return kind, content


def one_reason(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def limit_threads(threads: int) -> None:
    """Bound the threads of this process, also where torch has been imported already."""
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(threads)


class Throttle:
    """Passes on the number of steps done, but not more often than an interval allows."""

    def __init__(self, tell: Callable[[int], None], interval: float) -> None:
        """``interval`` in seconds."""
        self.tell, self.interval = tell, interval
        self.last = time.monotonic() - interval

    def __call__(self, steps: int) -> None:
        """Tell, or leave it."""
        now = time.monotonic()
        if now - self.last >= self.interval:
            self.last = now
            self.tell(steps)
