"""Every fast path of every operator here against the float64 token loop: outputs and every gradient.

``python -m kernels.doctor`` prints a line a path, and ends with status 1 when one is wrong (``arena doctor``
does the same, also for the shapes of an experiment, and keeps the verdict).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels import dynamic_short_conv, gated_memory, mlstm, short_conv, slstm
from kernels.backends import asked_for
from kernels.check import errors, flat, gated_memory_inputs, outputs_and_gradients
from kernels.experts import experts
from kernels.lstm import lstm

BACKENDS = {
    "gated_memory": ("chunked", "triton", "fla", "mamba_ssm"),
    "mlstm": ("chunked", "triton", "mlstm_kernels"),
    "slstm": ("fused", "numba", "triton"),
    "short_conv": ("fused", "triton", "fla"),
    "dynamic_short_conv": ("fused", "triton"),
    "lstm": ("fused",),
    "experts": ("fused",),
}
"""What there may be beside the reference."""
PACKAGES = ("fla", "mamba_ssm", "mlstm_kernels")
"""Backends that are other people's packages."""
LIMIT = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Largest error of an output or gradient against float64 on the same inputs, relative to its largest entry
(or to 1)."""
PACKAGE_LIMIT = 1e-2
"""That of other people's packages in float32: their products round to TF32 (10 bits)."""
NO_GRADIENT = "no gradient"
"""What a path says that runs forward only."""
LOOP_FACTOR = 20
"""Where the token loop in the same dtype is itself that much off, the limit is this many times its error."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operator on one kind of inputs."""

    operator: str
    """A key of :data:`BACKENDS`."""
    label: str
    """What is special about the inputs; with the operator it names the case."""
    run: Callable[..., Any]
    """Called with the inputs and ``backend``."""
    inputs: dict[str, Any]
    """By argument name; float64 tensors, None, or what is no tensor."""
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    """Of the inputs of the fast paths; what is not float32 is for GPUs."""

    @property
    def name(self) -> str:
        """For people, and the key of a verdict."""
        return f"{self.operator}: {self.label}" if self.label else self.operator


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What became of one path in one case."""

    case: str
    backend: str
    device: str
    dtype: str
    verdict: str
    """``ok``, ``WRONG``, ``cannot run`` (it raised), or ``refused`` (it said that it does not take such
    inputs)."""
    detail: str
    """The largest error and where, or the reason."""

    def __str__(self) -> str:
        """One line."""
        what = f"{self.case:58} {self.backend:13} {self.device:4} {self.dtype:8}"
        return f"{what} {self.verdict} {self.detail}"


def tied(**inputs: Any) -> Any:
    """The gated memory with one gate for erase and write."""
    return gated_memory(**inputs, write=inputs["erase"])


def routed(x: Tensor, weights: Tensor, **options: Any) -> Tensor:
    """Experts in turn: token t goes through t, t + 1, ..., modulo their number."""
    E, k = options["gate_up"].shape[0], weights.shape[-1]
    turn = torch.arange(x.shape[1], device=x.device)[:, None] + torch.arange(k, device=x.device)
    return experts(x, weights=weights, chosen=(turn % E).expand(x.shape[0], -1, -1), **options)


POINTS: dict[str, tuple[str | None, str | None, str | None]] = {
    "linear attention": (None, None, None),
    "GLA": ("channel", None, None),
    "Mamba-2": ("scalar", None, "scalar"),
    "DeltaNet": (None, "scalar", "tied"),
    "GDN": ("scalar", "scalar", "tied"),
    "KDA": ("channel", "scalar", "tied"),
    "GDN-2": ("channel", "channel", "channel"),
}
"""Named points of gate space: decay, erase, write."""
ALL_DTYPES = (torch.float32, torch.bfloat16)


def memory_case(point: str, label: str, *, T: int, K: int, dtypes: Any = ALL_DTYPES, **traps: Any) -> Case:
    """A case of the gated memory; ``traps`` as in :func:`kernels.check.gated_memory_inputs`."""
    decay, erase, write = POINTS[point]
    gates: dict[str, Any] = {"log_decay": decay, "erase": erase, "write": None if write == "tied" else write}
    inputs: dict[str, Any] = dict(gated_memory_inputs(shape=(2, T, 2, K, K), **gates, **traps))
    if write == "tied":
        inputs.pop("write")
    return Case(
        operator="gated_memory",
        label=f"{point}, T {T}, K {K}" + (f", {label}" if label else ""),
        run=tied if write == "tied" else gated_memory,
        inputs=inputs,
        dtypes=dtypes,
    )


def default_cases() -> Iterator[Case]:
    """Head dimension 16 to 128, T 1 to 512, and the gates and keys that are hardest on numerics."""
    for point in POINTS:
        yield memory_case(point, "", T=130, K=16)
    for point in ("GDN", "GDN-2"):
        yield memory_case(point, "", T=1, K=16)
        yield memory_case(point, "", T=512, K=32, dtypes=(torch.float32,))
        for K in (32, 64, 128):
            yield memory_case(point, "", T=70, K=K)
    exact: dict[str, Any] = {"T": 130, "K": 16, "dtypes": (torch.float32,)}
    for point in ("DeltaNet", "GDN", "KDA", "GDN-2"):
        for n_keys, label in ((1, "one key"), (2, "two keys")):
            yield memory_case(point, f"{label}, erase 2, decay 1", **exact, n_keys=n_keys, regime="double")
    for point in ("Mamba-2", "GLA", "GDN", "KDA", "GDN-2"):
        yield memory_case(point, "strong decay", **exact, regime="strong")
    for point in ("GLA", "GDN", "GDN-2"):
        yield memory_case(point, "decays 0, 1 and e^-30", **exact, extreme=True)
    for point in ("Mamba-2", "GDN-2"):
        yield memory_case(point, "decay 1, other gates near 0", **exact, regime="closed")

    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float32).double()

    B, H = 2, 2
    for T, K, input_bias, forget_bias, label in (
        (130, 16, 0.0, 2.0, ""),
        (1, 16, 0.0, 2.0, ""),
        (512, 32, 0.0, 2.0, ""),
        (70, 64, 10.0, 30.0, ", gates open"),
        (70, 128, -30.0, -30.0, ", gates near 0"),
    ):
        inputs = {name: normal(B, T, H, K) for name in ("q", "k", "v")}
        inputs |= {
            "input_gate": normal(B, T, H) + input_bias,
            "forget_gate": normal(B, T, H) + forget_bias,
        }
        yield Case(operator="mlstm", label=f"T {T}, K {K}{label}", run=mlstm, inputs=inputs)
    for T, K in ((130, 16), (1, 32), (70, 64)):
        inputs = {"gates": normal(B, T, 4, H, K), "recurrent": normal(4, H, K, K) / K**0.5}
        yield Case(operator="slstm", label=f"T {T}, K {K}", run=slstm, inputs=inputs)
    inputs = {"gates": normal(B, 130, 4, 16), "recurrent": normal(4, 16, 16) / 4}
    yield Case(operator="lstm", label="T 130, D 16", run=lstm, inputs=inputs)
    for E, k, D, F in ((4, 1, 16, 24), (8, 2, 32, 16)):
        inputs = {"x": normal(B, 130, D), "weights": normal(B, 130, k)}
        inputs |= {"gate_up": normal(E, 2 * F, D) / D**0.5, "down": normal(D, E, F) / F**0.5}
        yield Case(operator="experts", label=f"{k} of {E}, D {D}, F {F}", run=routed, inputs=inputs)
    for T, D, W in ((130, 16, 4), (2, 48, 4), (70, 128, 3)):
        inputs = {"x": normal(B, T, D), "weight": normal(W, D), "initial_state": normal(B, W - 1, D)}
        run = partial(short_conv, activation="silu")
        yield Case(
            operator="short_conv", label=f"T {T}, D {D}, W {W}", run=run, inputs=inputs, dtypes=ALL_DTYPES
        )
    T, D, W, R = 130, 32, 4, 8
    low_rank = {"z": normal(B, T, R) / 3, "u": normal(R, W, D), "bias": normal(W, D)}
    for label, inputs in (("low rank", low_rank), ("head-wise", {"filters": normal(B, T, W, 4)})):
        inputs = {"x": normal(B, T, D), "initial_state": normal(B, W - 1, D), **inputs}
        yield Case(
            operator="dynamic_short_conv",
            label=f"{label}, T {T}, D {D}",
            run=dynamic_short_conv,
            inputs=inputs,
            dtypes=ALL_DTYPES,
        )


def findings(case: Case, devices: Iterable[str]) -> Iterator[Finding]:
    """Every path of one case on some devices, as they are found."""
    for device in devices:
        for dtype in case.dtypes:
            if dtype != torch.float32 and device == "cpu":
                continue
            rounded = {name: _rounded(x, dtype) for name, x in case.inputs.items()}
            reference = partial(case.run, backend="reference")
            truth = outputs_and_gradients(reference, rounded)
            of_loop: dict[str, float] | None = None
            for backend in BACKENDS[case.operator]:
                there = {name: _to(x, device) for name, x in rounded.items()}
                found = _attempt(partial(case.run, backend=backend), there, dtype)
                forward_only = ""
                if found == NO_GRADIENT:
                    forward_only = "; forward only"
                    found = _attempt(partial(case.run, backend=backend), there, dtype, gradients=False)
                if isinstance(found, str):
                    verdict, _, detail = found.partition(": ")
                else:
                    if of_loop is None:
                        of_loop = errors(outputs_and_gradients(reference, rounded, dtype=dtype), truth)
                    limit = LIMIT[dtype]
                    if backend in PACKAGES:
                        limit = max(limit, PACKAGE_LIMIT)
                    verdict, detail = judge(found, truth, of_loop, limit)
                    detail += forward_only
                yield Finding(
                    case=case.name,
                    backend=backend,
                    device=device,
                    dtype=str(dtype).removeprefix("torch."),
                    verdict=verdict,
                    detail=detail,
                )


def judge(
    found: dict[str, Tensor], truth: dict[str, Tensor], of_loop: dict[str, float], limit: float
) -> tuple[str, str]:
    """``ok`` or ``WRONG``, and the largest error with its place."""
    of_fast = errors({name: x.cpu() for name, x in found.items()}, {name: truth[name] for name in found})
    fine = all(error <= max(limit, LOOP_FACTOR * of_loop[name]) for name, error in of_fast.items())
    worst = max(of_fast, key=lambda name: of_fast[name])
    return "ok" if fine else "WRONG", f"{of_fast[worst]:.1e} ({worst})"


def _attempt(
    run: Callable[..., Any], inputs: dict[str, Any], dtype: torch.dtype, *, gradients: bool = True
) -> dict[str, Tensor] | str:
    """Outputs and gradients; or ``refused: ...``, ``cannot run: ...`` or :data:`NO_GRADIENT`."""
    if inputs and any(isinstance(x, Tensor) and x.is_cuda for x in inputs.values()):
        _poison()
    try:
        if gradients:
            return outputs_and_gradients(run, inputs, dtype=dtype)
        with torch.no_grad():
            found = flat(run(**{name: _cast(x, dtype) for name, x in inputs.items()}))
            return {f"output {i}": x for i, x in enumerate(found)}
    except NotImplementedError:  # a backward that says that it is not there
        return NO_GRADIENT
    except ValueError as error:
        text = " ".join(str(error).split())
        return f"{'refused' if 'backend' in text else 'cannot run'}: {text[:200]}"
    except Exception as error:  # a compiler that fails, a kernel that asks too much of the device
        return f"cannot run: {type(error).__name__}: {' '.join(str(error).split())[:120]}"


def _poison() -> None:
    """Leave NaN in the allocator's free blocks, so that what a kernel does not write shows."""
    torch.cuda.empty_cache()
    blocks = [torch.full((1 << n,), float("nan"), device="cuda") for n in (22, 20, 18, 16, 14)]
    del blocks


def _rounded(x: Any, dtype: torch.dtype) -> Any:
    return _cast(_cast(x, dtype), torch.float64)


def _cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def _to(x: Any, device: str) -> Any:
    return x.to(device) if isinstance(x, Tensor) else x


def defaults() -> Iterator[str]:
    """The table of what ``backend="auto"`` runs, and what ARENA_BACKEND asks for instead, a line each."""
    from kernels.backends import CHOICES

    yield from (str(choice) for choice in CHOICES)
    for operator in BACKENDS:
        wanted = asked_for(operator, "auto")
        if wanted in (*BACKENDS[operator], "reference"):
            yield f"{operator:19} ARENA_BACKEND asks for {wanted}"


def devices_here() -> list[str]:
    """``cpu``, and ``cuda`` where there is one."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def examine(
    cases: Iterable[Case], devices: Iterable[str], say: Callable[[str], None] = print
) -> list[Finding]:
    """Examine and say what is found, a line each; what was refused once for each reason, at the end.

    Returns:
        All findings.
    """
    devices = list(devices)
    found: list[Finding] = []
    for case in cases:
        for finding in findings(case, devices):
            found.append(finding)
            if finding.verdict != "refused":
                say(str(finding))
    for reason in dict.fromkeys(finding.detail for finding in found if finding.verdict == "refused"):
        say(f"not examined: {reason}")
    return found


def main() -> None:
    """Examine the default list on all devices."""
    for line in defaults():
        print(line)
    found = examine(default_cases(), devices_here(), partial(print, flush=True))
    counts = {word: sum(x.verdict == word for x in found) for word in ("ok", "WRONG", "cannot run")}
    print(", ".join(f"{count} {word}" for word, count in counts.items()))
    sys.exit(int(counts["WRONG"] > 0))


if __name__ == "__main__":
    main()
