"""Time the comparisons of contenders.py: rows of plain numbers, ours and theirs in turn in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from kernels.backends import recording
from kernels.bench.contenders import OTHER, Comparison, Contender
from kernels.bench.timing import graph_of, medians, memory_of, synchronise

DIRECTIONS = ("forward", "forward+backward")
FIELDS = {
    "operator": str,
    "setting": str,
    "shape": str,
    "dtype": str,
    "direction": str,
    "contender": str,
    "backend": str,
    "ours": bool,
    "ms": float,
    "graph_ms": float,
    "ours_times_faster": float,
    "bytes_s": float,
    "of_copy": float,
    "flop_s": float,
    "of_matmul": float,
    "memory_mb": float,
    "error": float,
    "note": str,
}
"""Columns of a row. ``ms``: median of a call as a user makes it. ``graph_ms``: the same replayed as a CUDA
graph, the GPU's own time. ``ours_times_faster``: its ms over that of ours (auto). ``bytes_s``: bytes that any
implementation must move (inputs, output and their gradients, once) a second; ``of_copy``: that, over the
measured copy. ``flop_s``: operations of the recurrence itself a second (backward counted twice);
``of_matmul``: that, over the measured product. ``memory_mb``: on a GPU the peak of a call, else what is kept
for backward.
``error``: norm of the output's difference from the float32 token loop, over its norm."""


def rows(
    comparisons: Iterable[Comparison],
    device: str,
    ceilings: dict[str, float],
    *,
    rounds: int,
    directions: Iterable[str] = DIRECTIONS,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[dict[str, Any]]:
    """Measure; a contender that fails has a row with the reason as its note and no numbers."""
    directions = list(directions)
    for comparison in comparisons:
        name = f"{comparison.operator} {comparison.setting} {comparison.shape}"
        say(name)
        with torch.no_grad():
            truth = comparison.truth()
        checked = [_check(contender, truth) for contender in comparison.contenders]
        for direction in directions:
            yield from _direction(comparison, checked, direction, device, ceilings, rounds)
        del truth, checked, comparison
        if device == "cuda":
            torch.cuda.empty_cache()


def _check(contender: Contender, truth: Tensor) -> tuple[float | None, str, str]:
    """Error of the output, what ran, and why it can't run if so."""
    try:
        with torch.no_grad(), recording() as used:
            o = contender.back(contender.call(*contender.leaves)).to(truth)
        error = None
        if contender.note != OTHER:
            error = float((o - truth).norm() / truth.norm())
        return error, " ".join(f"{key}={value}" for key, value in sorted(used.items())), ""
    except Exception as problem:
        return None, "", f"cannot run: {type(problem).__name__}: {' '.join(str(problem).split())[:160]}"


def _runs(contender: Contender, direction: str) -> tuple[Callable[[], Tensor], Callable[[], Any]]:
    """A function that calls it with gradients on, and the one that is timed."""
    leaves = [x.detach().clone().requires_grad_() for x in contender.leaves]

    def forward() -> Tensor:
        return contender.call(*leaves)

    if direction == "forward":

        def without_gradients() -> Tensor:
            with torch.no_grad():
                return forward()

        return forward, without_gradients
    weight = torch.randn_like(forward())
    return forward, lambda: torch.autograd.grad(forward(), leaves, weight)


def _direction(
    comparison: Comparison,
    checked: list[tuple[float | None, str, str]],
    direction: str,
    device: str,
    ceilings: dict[str, float],
    rounds: int,
) -> Iterator[dict[str, Any]]:
    dtype = str(comparison.dtype).removeprefix("torch.")
    common = {
        "operator": comparison.operator,
        "setting": comparison.setting,
        "shape": comparison.shape,
        "dtype": dtype,
        "direction": direction,
    }
    able: list[tuple[Contender, Any, Any, float | None, str]] = []
    failed: list[tuple[Contender, str]] = []
    for contender, (error, used, problem) in zip(comparison.contenders, checked, strict=True):
        if problem:
            failed.append((contender, problem))
            continue
        try:
            forward, run = _runs(contender, direction)
            run()
            synchronise(device)
            able.append((contender, forward, run, error, used))
        except Exception as reason:
            text = " ".join(str(reason).split())[:160]
            failed.append((contender, f"cannot run: {type(reason).__name__}: {text}"))
    times = medians([run for _, _, run, _, _ in able], device, rounds=rounds)
    graphs: list[float | None] = [None] * len(able)
    if device == "cuda":
        captured = [(i, graph) for i, x in enumerate(able) if (graph := graph_of(x[2])) is not None]
        replayed = medians([graph for _, graph in captured], device, rounds=rounds)
        for (i, _), seconds in zip(captured, replayed, strict=True):
            graphs[i] = seconds
        del captured
    both = direction != "forward"
    moved = comparison.bytes_both if both else comparison.bytes_forward
    flop = comparison.flop * (3 if both else 1)
    base = next((t for t, x in zip(times, able, strict=True) if x[0].name == "ours (auto)"), None)
    for (contender, forward, run, error, used), seconds, graph_s in zip(able, times, graphs, strict=True):
        fastest = seconds if graph_s is None else graph_s
        yield {
            **dict.fromkeys(FIELDS),
            **common,
            "contender": contender.name,
            "backend": used,
            "ours": contender.ours,
            "ms": 1e3 * seconds,
            "graph_ms": None if graph_s is None else 1e3 * graph_s,
            "ours_times_faster": None if base is None else seconds / base,
            "bytes_s": moved / fastest,
            "of_copy": moved / fastest / ceilings["copy_bytes_s"],
            "flop_s": flop / fastest,
            "of_matmul": flop / fastest / ceilings[f"matmul_flop_s_{dtype}"],
            "memory_mb": memory_of(forward, run, device) / 2**20,
            "error": error,
            "note": contender.note,
        }
    for contender, problem in failed:
        yield {
            **dict.fromkeys(FIELDS),
            **common,
            "contender": contender.name,
            "ours": contender.ours,
            "note": problem,
        }
