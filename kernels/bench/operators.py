"""Time the comparisons of contenders.py: rows of plain numbers, ours and theirs in turn in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.backends import recording
from kernels.bench.contenders import OTHER, Comparison, Contender, Operator
from kernels.bench.timing import gpu_seconds, graph_of, medians, memory_of, synchronise

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
    "gradient_error": float,
    "note": str,
}
"""Columns of a row. ``ms``: median of a call as a user makes it. ``graph_ms``: the GPU's own time: the
same replayed as a CUDA graph or, where it can't be captured, the profiler's sum over its kernels.
``ours_times_faster``: its ms over that of ours (auto). ``bytes_s``: bytes that any
implementation must move (inputs, output and their gradients, once) a second; ``of_copy``: that, over the
measured copy. ``flop_s``: operations of the recurrence itself a second (backward counted twice);
``of_matmul``: that, over the measured product. ``memory_mb``: on a GPU the peak of a call, else what is kept
for backward.
``error``: norm of the output's difference from the float64 token loop, over its norm, on the first tokens of
the first sequences; ``gradient_error``: the largest such of all gradients."""
ROWS, TOKENS = 2, 512
"""Sequences and tokens that are compared with the loop."""


def rows(
    comparisons: Iterable[Comparison],
    device: str,
    ceilings: dict[str, float],
    *,
    rounds: int,
    directions: Iterable[str] = DIRECTIONS,
    without: tuple[str, ...] = (),
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[dict[str, Any]]:
    """Measure; a contender that fails has a row with the reason as its note and no numbers.

    Ours by a backend's name is left out where that backend is what runs by default.

    Args:
        comparisons: Of contenders.py.
        device: ``cpu`` or ``cuda``.
        ceilings: As timing.py measures them.
        rounds: Timed turns of each contender.
        directions: Of :data:`DIRECTIONS`.
        without: Contenders with one of these in their name are left out.
        say: Told what is being measured.
    """
    directions = list(directions)
    for comparison in comparisons:
        name = f"{comparison.operator} {comparison.setting} {comparison.shape}"
        say(name)
        truth = _truth(comparison)
        wanted = [x for x in comparison.contenders if not any(word in x.name for word in without)]
        checked = [(x, _check(x, comparison, truth)) for x in wanted]
        default = next((found.used for x, found in checked if x.name == "ours (auto)"), None)
        checked = [
            (x, found)
            for x, found in checked
            if x.name == "ours (auto)" or not x.ours or found.used != default
        ]
        for direction in directions:
            yield from _direction(comparison, checked, direction, device, ceilings, rounds)
        del checked, wanted, comparison, truth
        if device == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Checked:
    """What a contender computes."""

    error: float | None = None
    """Of the output."""
    gradient_error: float | None = None
    """The largest of its gradients."""
    used: str = ""
    """Our backends that ran."""
    problem: str = ""
    """Why it can't run, if so."""


def _check(contender: Contender, comparison: Comparison, truth: tuple[Tensor, list[Tensor]]) -> Checked:
    leaves = comparison.contenders[0].leaves

    def call(*inputs: Tensor) -> Tensor:
        return contender.back(contender.call(*(contender.layout(x) for x in inputs)))

    try:
        with torch.no_grad(), recording() as record:
            contender.call(*contender.leaves)  # in full: what runs may depend on the size
        used = " ".join(f"{key}={value}" for key, value in sorted(record.items()))
        if contender.note == OTHER:
            return Checked(used=used)
        o, gradients = _both(call, _short(leaves), comparison.dtype)
        worst = max(_error(x, y) for x, y in zip(gradients, truth[1], strict=True))
        return Checked(error=_error(o, truth[0]), gradient_error=worst, used=used)
    except Exception as problem:
        text = " ".join(str(problem).split())[:160]
        return Checked(problem=f"cannot run: {type(problem).__name__}: {text}")


def _truth(comparison: Comparison) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients by the token loop in float64."""
    leaves = comparison.contenders[0].leaves
    return _both(comparison.truth, [x.double() for x in _short(leaves)], comparison.dtype)


def _short(leaves: list[Tensor]) -> list[Tensor]:
    """What of the inputs is compared with the loop, which keeps every token's state for its gradients."""
    B, T = leaves[0].shape[:2]
    return [x[:ROWS, :TOKENS] if x.shape[:2] == (B, T) else x for x in leaves]


def _both(operator: Operator, leaves: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients of a fixed random sum of it, whose weights ``dtype`` can hold."""
    inputs = [x.detach().clone().requires_grad_() for x in leaves]
    o = operator(*inputs)
    weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(o)
    return o.detach(), list(torch.autograd.grad(o, inputs, weight))


def _error(x: Tensor, truth: Tensor) -> float:
    return float((x.double() - truth).norm() / truth.norm())


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
    checked: list[tuple[Contender, Checked]],
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
    able: list[tuple[Contender, Any, Any, Checked]] = []
    failed: list[tuple[Contender, str]] = []
    for contender, found in checked:
        if found.problem:
            failed.append((contender, found.problem))
            continue
        try:
            forward, run = _runs(contender, direction)
            run()
            synchronise(device)
            able.append((contender, forward, run, found))
        except Exception as reason:
            text = " ".join(str(reason).split())[:160]
            failed.append((contender, f"cannot run: {type(reason).__name__}: {text}"))
    times = medians([run for _, _, run, _ in able], device, rounds=rounds)
    graphs: list[float | None] = [None] * len(able)
    if device == "cuda":
        captured = [(i, graph) for i, x in enumerate(able) if (graph := graph_of(x[2])) is not None]
        replayed = medians([graph for _, graph in captured], device, rounds=rounds)
        for (i, _), seconds in zip(captured, replayed, strict=True):
            graphs[i] = seconds
        for i in set(range(len(able))) - {i for i, _ in captured}:
            graphs[i] = gpu_seconds(able[i][2])
        del captured
    both = direction != "forward"
    moved = comparison.bytes_both if both else comparison.bytes_forward
    flop = comparison.flop * (3 if both else 1)
    base = next((t for t, x in zip(times, able, strict=True) if x[0].name == "ours (auto)"), None)
    for (contender, forward, run, found), seconds, graph_s in zip(able, times, graphs, strict=True):
        fastest = seconds if graph_s is None else graph_s
        yield {
            **dict.fromkeys(FIELDS),
            **common,
            "contender": contender.name,
            "backend": found.used,
            "ours": contender.ours,
            "ms": 1e3 * seconds,
            "graph_ms": None if graph_s is None else 1e3 * graph_s,
            "ours_times_faster": None if base is None else seconds / base,
            "bytes_s": moved / fastest,
            "of_copy": moved / fastest / ceilings["copy_bytes_s"],
            "flop_s": flop / fastest,
            "of_matmul": flop / fastest / ceilings[f"matmul_flop_s_{dtype}"],
            "memory_mb": memory_of(forward, run, device) / 2**20,
            "error": found.error,
            "gradient_error": found.gradient_error,
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
