"""Work that is the same for the GPU each time, recorded once for every shape and replayed: CUDA graphs.

A training step of a small model is many small kernels, which Python launches one by one; a replay launches
all of them. No GPU has run this yet: ``train_fleet`` does not use it unless it is asked to.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOST_GRAPHS = 256
"""Shapes that are recorded; what is met after them runs kernel by kernel."""
_ROOM = 2.0
"""Free memory that a recording must find, in units of what the work needs: its own, and as much again for
work of other shapes that runs kernel by kernel afterwards."""

Capture = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]
"""Work -> (a function that does the work again, what the work returned and will write its results to)."""


@dataclass(frozen=True)
class _Recorded:
    inputs: tuple[Tensor, ...]
    replay: Callable[[], None]
    output: Any


class Graphs:
    """Runs work on a device; the second time that it comes with inputs of one shape, it is recorded.

    The first time it runs as it is: that compiles kernels, and a shape that is met once costs nothing more. A
    replay runs the same kernels on the same memory in the same order, which should give the same bits.

    What the work reads beside its inputs is read anew each time, from where it lay at the recording; so
    whatever changes between calls must be a tensor that is changed in place. Nothing in it may wait for the
    device. What it returns is overwritten when work of any shape runs next.

    Where a recording fails, for lack of memory or since the work does what a recording can't hold, work of
    that name runs as it is from then on, and a warning says so.
    """

    def __init__(self, device: torch.device, capture: Capture | None = None) -> None:
        """Start with nothing recorded.

        Args:
            device: Where inputs go to.
            capture: What records; None: a :class:`Recorder`.
        """
        self._device, self._capture = device, capture or Recorder()
        self._recorded: dict[tuple[Any, ...], _Recorded] = {}
        self._met: set[tuple[Any, ...]] = set()
        self._given_up: set[str] = set()

    def run(self, name: str, work: Callable[..., Any], *inputs: Tensor) -> Any:
        """``work(*inputs)``.

        Args:
            name: What the work is, for people; the same name is the same work.
            work: Not kept, so that it may belong to the owner of this object.
            *inputs: On the device or on the host; pinned ones are copied without waiting.
        """
        key = (name, *(x.shape for x in inputs))
        if key in self._met and key not in self._recorded and name not in self._given_up:
            self._record(key, work, inputs)
        self._met.add(key)
        recorded = self._recorded.get(key)
        if recorded is None:
            return work(*(x.to(self._device, non_blocking=True) for x in inputs))
        for own, given in zip(recorded.inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        recorded.replay()
        return recorded.output

    def count(self, name: str) -> int:
        """Number of shapes in which work of this name is replayed."""
        return sum(key[0] == name for key in self._recorded)

    def _record(self, key: tuple[Any, ...], work: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
        name = key[0]
        if len(self._recorded) >= MOST_GRAPHS:
            return self._give_up(name, f"further shapes than the first {MOST_GRAPHS} run")
        own = tuple(x.to(self._device, copy=True) for x in inputs)
        try:
            replay, output = self._capture(lambda: work(*own))
        except Exception as error:  # whatever it is: the work itself, run as it is, tells whether it matters
            cause = error.__context__ or error  # what broke the recording, not that it was broken
            said = " ".join(str(cause).split())[:200]
            return self._give_up(name, f"no CUDA graph could be recorded ({said}); it runs")
        self._recorded[key] = _Recorded(own, replay, output)

    def _give_up(self, name: str, why: str) -> None:
        self._given_up.add(name)
        warnings.warn(f"{name}: {why} kernel by kernel", RuntimeWarning, stacklevel=4)


class Recorder:
    """Records on a GPU. All that one recorder records shares memory, and is never to run at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()
        torch.cuda.reset_peak_memory_stats()

    def __call__(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Record; the work is not done by that.

        Raises:
            RuntimeError: The work can't be recorded, or there is too little memory to.
        """
        torch.cuda.synchronize()
        needs = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        if torch.cuda.mem_get_info()[0] + cached < _ROOM * needs:
            raise RuntimeError(f"{_ROOM:g} x {needs / 2**30:.1f} GiB are not free")
        graph = torch.cuda.CUDAGraph()
        # What the collector throws away may belong to another stream, which a recording does not stand.
        collects = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.stream(self._stream):
                graph.capture_begin(pool=self._pool)
                try:
                    output = work()
                finally:
                    graph.capture_end()
        finally:
            if collects:
                gc.enable()
        return graph.replay, output
