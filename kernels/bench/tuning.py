"""Autotuning of other people's Triton kernels, kept within minutes.

Triton's autotuner compiles every setting of a kernel's list (block sizes, warps, stages) one after the other
and times each for an eighth of a second: hundreds of compilations before a package's first result. Within
:func:`tuning` a list is cut to a few settings that are as unlike as can be, those are compiled side by side
and timed in a few milliseconds, and what was chosen among how many is kept for the record.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

TIMED = 9
"""Timed calls of a setting."""
AHEAD = 2_000_000
"""Cycles (about a millisecond) that the GPU is kept busy while those calls are queued."""


@contextmanager
def tuning(limit: int | None) -> Iterator[list[dict[str, Any]]]:
    """Limit Triton's autotuning inside the ``with`` block; needs Triton 3.6.

    Args:
        limit: Settings of a kernel that are tried; None: all, and Triton's own way.

    Yields:
        What was chosen so far: ``kernel``, ``key`` (what the choice is for: sizes and dtypes), ``tried``,
        ``of`` (settings that the package would try) and ``best``. With a limit only.
    """
    found: list[dict[str, Any]] = []
    if limit is None:
        yield found
        return
    from triton.runtime.autotuner import Autotuner

    prune, bench, look = Autotuner.prune_configs, Autotuner._bench, Autotuner.check_disk_cache
    waiting: dict[int, dict[str, Any]] = {}

    def prune_few(tuner: Any, kwargs: Any) -> Any:
        whole = prune(tuner, kwargs)
        chosen = few(whole, limit)
        entry = {"kernel": tuner.base_fn.__name__, "tried": len(chosen), "of": len(whole)}
        found.append({**entry, "key": _key(tuner, kwargs), "best": None})
        waiting[id(tuner)] = {"configs": chosen, "row": found[-1], "times": {}}
        return chosen

    def bench_few(tuner: Any, *args: Any, config: Any, **meta: Any) -> Any:
        state = waiting[id(tuner)]
        if not state["times"]:
            compile_all(tuner.fn, args, meta, state["configs"])
            tuner.do_bench = brief
        times = bench(tuner, *args, config=config, **meta)
        state["times"][words(config)] = times[0]
        if len(state["times"]) == len(state["configs"]):
            state["row"]["best"] = min(state["times"], key=state["times"].get)
        return times

    def look_and_tell(tuner: Any, key: Any, configs: Any, run: Any) -> bool:
        known = look(tuner, key, configs, run)
        waiting[id(tuner)]["row"]["best"] = words(tuner.cache[key])
        return known

    Autotuner.prune_configs, Autotuner._bench, Autotuner.check_disk_cache = (
        prune_few,
        bench_few,
        look_and_tell,
    )
    try:
        yield found
    finally:
        Autotuner.prune_configs, Autotuner._bench, Autotuner.check_disk_cache = prune, bench, look


def _key(tuner: Any, kwargs: dict[str, Any]) -> str:
    """What the choice is for, as the autotuner sees it."""
    given = {**tuner.nargs, **kwargs}
    sizes = [f"{name}={given[name]}" for name in tuner.keys if name in given]
    dtypes = [str(x.dtype).removeprefix("torch.") for x in given.values() if hasattr(x, "dtype")]
    return " ".join([*sizes, *dict.fromkeys(dtypes)])


def few(configs: Sequence[Any], limit: int) -> list[Any]:
    """The first ``limit`` of the settings, ordered so that each differs in most from those before it.

    The first is the one with the largest blocks among those nearest to 4 warps and 3 stages.
    """
    left = sorted(
        configs,
        key=lambda c: (abs(c.num_warps - 4) + abs(c.num_stages - 3), *(-x for x in _numbers(c))),
    )
    taken: list[Any] = []
    while left and len(taken) < limit:
        best = max(left, key=lambda c: min((_unlike(c, x) for x in taken), default=0))
        taken.append(best)
        left.remove(best)
    return taken


def words(config: Any) -> str:
    """A setting for people."""
    sizes = [f"{name} {value}" for name, value in config.kwargs.items()]
    return ", ".join([*sizes, f"{config.num_warps} warps", f"{config.num_stages} stages"])


def _numbers(config: Any) -> list[int]:
    return [x for x in config.kwargs.values() if isinstance(x, int)]


def _unlike(a: Any, b: Any) -> int:
    return sum(x != y for x, y in zip(_settings(a), _settings(b), strict=False))


def _settings(config: Any) -> list[Any]:
    return [config.num_warps, config.num_stages, *(config.kwargs[name] for name in sorted(config.kwargs))]


def compile_all(kernel: Any, args: Sequence[Any], meta: dict[str, Any], configs: Sequence[Any]) -> None:
    """Compile a kernel's settings side by side, in threads; one that can't be says so when it runs."""
    from triton import AsyncCompileMode

    threads = min(len(configs), os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool, AsyncCompileMode(pool, ignore_errors=True):
        for config in configs:
            kernel.run(*args, **{**meta, **config.all_kwargs(), "warmup": True})


def brief(call: Callable[[], Any], quantiles: Sequence[float]) -> list[float]:
    """Milliseconds of a kernel on the GPU at the quantiles 0.5, 0.2 and 0.8, as the autotuner asks for them.

    The calls are queued behind other work, so that the time between two events is the GPU's own.
    """
    call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(TIMED + 1)]
    torch.cuda._sleep(AHEAD)
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in pairwise(events))
    return [statistics.median(times), times[TIMED // 5], times[-1 - TIMED // 5]]
