"""Medians of contenders that take turns, so that other load on the machine meets them all; its ceilings."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]
SLICE_S = 0.01
"""Calls on a GPU are timed in groups of about this many seconds: one is shorter than the clock's grain."""


def synchronise(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def in_turn(runs: Sequence[Run], device: str, *, rounds: int) -> list[list[float]]:
    """Seconds a call of each contender, one number a round, after a round of warm-up that is not counted.

    Args:
        runs: Called in this order in every round.
        device: ``cpu``, or ``cuda``: then groups of calls are timed until the device is done.
        rounds: Numbers for each.
    """
    calls = []
    for run in runs:
        run()
        synchronise(device)
        start = time.perf_counter()
        run()
        synchronise(device)
        once = time.perf_counter() - start
        calls.append(1 if device == "cpu" else max(1, min(200, round(SLICE_S / max(once, 1e-6)))))
    taken: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for index, run in enumerate(runs):
            synchronise(device)
            start = time.perf_counter()
            for _ in range(calls[index]):
                run()
            synchronise(device)
            taken[index].append((time.perf_counter() - start) / calls[index])
    return taken


def medians(runs: Sequence[Run], device: str, *, rounds: int) -> list[float]:
    """The medians of :func:`in_turn`."""
    return [statistics.median(x) for x in in_turn(runs, device, rounds=rounds)]


def graph_of(run: Run) -> Run | None:
    """A CUDA graph of the call, to be replayed without Python; None where it can't be captured."""
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        graph.replay()
        torch.cuda.synchronize()
        return graph.replay
    except Exception:  # a kernel that chooses its settings or allocates on the host while it runs
        torch.cuda.synchronize()
        return None


def gpu_seconds(run: Run, *, calls: int = 5) -> float | None:
    """The GPU's own time of a call, summed over its kernels by the profiler; None where it saw none."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    total = sum(event.self_device_time_total for event in record.key_averages())
    return total / calls / 1e6 or None


def memory_of(forward: Callable[[], Tensor], run: Run, device: str) -> float:
    """Bytes of one call: on a GPU the peak above what was allocated before, else what backward keeps."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - before)
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        forward()
    return float(sum(kept.values()))


def ceilings(device: str, dtypes: Sequence[torch.dtype]) -> dict[str, float]:
    """Measured limits: ``copy_bytes_s`` (bytes read and written a second by a large copy) and for each dtype
    ``matmul_flop_s_DTYPE`` (of a large square product; float32 as torch runs it, without TF32).
    """
    size = 2**28 if device == "cuda" else 2**24
    source, target = torch.rand(size, device=device), torch.empty(size, device=device)
    (copy_s,) = medians([lambda: target.copy_(source)], device, rounds=7)
    found = {"copy_bytes_s": 2 * source.nbytes / copy_s}
    n = 8192 if device == "cuda" else 1024
    for dtype in dtypes:
        a, b = (torch.rand(n, n, device=device).to(dtype) for _ in range(2))
        (product_s,) = medians([partial(torch.matmul, a, b)], device, rounds=7)
        found[f"matmul_flop_s_{str(dtype).removeprefix('torch.')}"] = 2 * n**3 / product_s
    return found


def machine(device: str) -> dict[str, Any]:
    """What the numbers were taken on."""
    import importlib.metadata

    versions = {}
    for name in (
        "triton",
        "numba",
        "fla-core",
        "flash-linear-attention",
        "mlstm-kernels",
        "mamba-ssm",
        "causal-conv1d",
    ):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **versions,
    }


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
