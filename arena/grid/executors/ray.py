"""A Ray cluster: Ray places the fleets, watches its nodes and runs again what a lost node or worker had."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from arena.grid.environment import cpu_count
from arena.grid.executors.base import (
    Event,
    Message,
    Slots,
    T,
    Throttle,
    Work,
    attempt,
    limit_threads,
    one_reason,
)
from arena.grid.fields import ExperimentError
from arena.grid.plan import Fleet

_LOOK = 0.5
"""Seconds between two looks at the board."""


@dataclass(frozen=True, kw_only=True)
class RayExecutor:
    """Fleets as Ray tasks, all of them submitted at once. A task whose worker or node is lost is run again by
    Ray (``max_retries``, 3 unless the cluster says otherwise).

    Workers need this toolkit installed in the versions of the driver. No folder need be shared. That a fleet
    was run again is told where Ray delivers it in time; results do not depend on that.
    """

    address: str | None = None
    """Of a cluster: ``auto``, ``HOST:PORT``, ``ray://HOST:PORT``; None: one on this machine, which ends with
    this process."""
    cpus: float = 1
    """CPUs of a fleet, which has as many threads."""
    gpus: float = 0
    """GPUs of a fleet, or a fraction of one."""
    name = "ray"

    def slots(self, fleets: int) -> Slots:
        """What the cluster has now; it may grow.

        Raises:
            ExperimentError: Ray is not installed, there is no cluster at the address, or a cluster on this
                machine has too little.
        """
        ray = self._connect()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        wanted = {"CPU": self.cpus, "GPU": self.gpus}
        room = sum(
            int(min(node.get(what, 0) / amount for what, amount in wanted.items() if amount))
            for node in nodes
        )
        if not room and self.address is None:
            has = ", ".join(f"{nodes[0].get(what, 0):g} {what}s" for what in wanted)
            raise ExperimentError(
                f"a fleet asks for {self.cpus:g} CPUs and {self.gpus:g} GPUs; Ray on this machine has {has}"
            )
        if self.gpus:
            share = min(1.0, self.gpus)
        else:  # that part of a machine's memory which it is of the CPUs
            share = min(1.0, self.cpus / min([n["CPU"] for n in nodes if n.get("CPU")] or [self.cpus]))
        return Slots(workers=max(1, min(room, fleets)), threads=max(1, int(self.cpus)), share=share)

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """The value of a function on a worker that has what a fleet asks for."""
        ray = self._connect()
        task = ray.remote(_call).options(num_cpus=self.cpus, num_gpus=self.gpus)
        outcome, value = ray.get(task.remote(_pack((function, arguments))))
        if outcome == "refused":
            raise ExperimentError(value)
        return value

    def run(self, queue: deque[Fleet], work: Work, slots: Slots) -> Generator[Event, None, None]:
        """Submit the queue, and what is appended to it; closing the iterator cancels what is not done.

        Args:
            queue: of fleets.
            work: what to do with each.
            slots: as :meth:`slots` gave them.
        """
        ray = self._connect()
        # where the driver is, so that it is not lost with a worker's node
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=True
        )
        board = ray.remote(_Board).options(num_cpus=0, scheduling_strategy=here).remote()
        task = ray.remote(_perform).options(num_cpus=self.cpus, num_gpus=self.gpus)
        fleets: dict[str, Fleet] = {}
        waiting: dict[Any, str] = {}  # task -> fleet
        started: set[str] = set()
        packed = ray.put(_pack(work))
        try:
            while queue or waiting:
                while queue:
                    fleet = queue.popleft()
                    fleets[fleet.id] = fleet
                    waiting[task.remote(packed, fleet, slots.threads, board)] = fleet.id
                done, _ = ray.wait(list(waiting), num_returns=1, timeout=_LOOK)
                with contextlib.suppress(ray.exceptions.RayError):  # progress is told, not relied on
                    for fleet_id, kind, content in ray.get(board.take.remote(), timeout=10):
                        if fleet_id not in waiting.values():
                            continue
                        if kind == "started" and fleet_id in started:
                            kind, content = (
                                "retried",
                                {"reason": f"lost; Ray runs it again {content['where']}"},
                            )
                        elif kind == "started":
                            started.add(fleet_id)
                            content = {}
                        yield Event(kind=kind, fleet=fleets[fleet_id], **content)
                for ref in done:
                    fleet = fleets[waiting.pop(ref)]
                    if fleet.id not in started:
                        started.add(fleet.id)
                        yield Event(kind="started", fleet=fleet)
                    kind, content = _outcome(ray, ref)
                    del ref  # frees the result in the cluster's memory
                    yield Event(kind=kind, fleet=fleet, **content)  # type: ignore[arg-type]
        finally:
            for ref in waiting:
                with contextlib.suppress(ray.exceptions.RayError, ValueError):
                    ray.cancel(ref, force=True)
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(board)

    def _connect(self) -> Any:
        """The module ``ray``, connected."""
        try:
            import ray
            import ray.util.scheduling_strategies
        except ImportError:
            raise ExperimentError('ray is not installed: pip install "memory-arena[cluster]"') from None
        if ray.is_initialized():
            return ray
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if self.address is not None:
            try:
                ray.init(address=self.address, **quiet)
            except Exception as error:  # Ray has a kind for each way of not finding a cluster
                raise ExperimentError(f"no Ray cluster at {self.address}: {one_reason(error)}") from None
            return ray
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # a fleet that Ray stops for its memory is not run again as it is: the driver halves it
        ray.init(
            address="local",
            num_cpus=cpu_count(),
            include_dashboard=False,
            _system_config={"task_oom_retries": 0},
            **quiet,
        )
        return ray


class _Board:
    """An actor that keeps what workers tell until the driver looks."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, str, dict[str, Any]]] = []

    def put(self, fleet_id: str, kind: str, content: dict[str, Any]) -> None:
        self.entries.append((fleet_id, kind, content))

    def take(self) -> list[tuple[str, str, dict[str, Any]]]:
        entries, self.entries = self.entries, []
        return entries


def _pack(value: Any) -> tuple[bytes, list[str]]:
    """What names functions, to be sent to a worker."""
    from ray import cloudpickle

    return cloudpickle.dumps(value), sys.path


def _unpack(packed: tuple[bytes, list[str]]) -> Any:
    """In the worker. Modules are found where the driver finds them too, after the worker's own places."""
    from ray import cloudpickle

    code, paths = packed
    sys.path += [path for path in paths if path not in sys.path]
    return cloudpickle.loads(code)  # the driver's, through Ray


def _perform(packed: tuple[bytes, list[str]], fleet: Fleet, threads: int, board: Any) -> Message:
    """The task."""
    limit_threads(threads)
    work: Work = _unpack(packed)
    where = f"on {socket.gethostname()}, process {os.getpid()}"
    import ray

    # waited for, so that a start is on the board before the driver can see the end
    with contextlib.suppress(ray.exceptions.RayError):
        ray.get(board.put.remote(fleet.id, "started", {"where": where}), timeout=10)

    def tell(steps: int) -> None:
        board.put.remote(fleet.id, "progress", {"steps": steps})

    return attempt(work, fleet, Throttle(tell, _LOOK))


def _call(packed: tuple[bytes, list[str]]) -> tuple[str, Any]:
    function, arguments = _unpack(packed)
    try:
        return "done", function(*arguments)
    except ExperimentError as error:
        return "refused", str(error)


def _outcome(ray: Any, ref: Any) -> Message:
    """What became of a task that has ended, whatever way."""
    try:
        return ray.get(ref)
    except ray.exceptions.OutOfMemoryError as error:
        return "memory", {"reason": one_reason(error), "detail": ""}
    except ray.exceptions.RayTaskError as error:  # before the work began: a module that the worker lacks
        return "error", {"reason": one_reason(error.cause or error), "detail": str(error)}
    except ray.exceptions.RayError as error:
        return "died", {"reason": f"lost, and Ray has given up: {one_reason(error)}"}
