"""Which implementation of an operator runs, and a record of which one did.

Four things decide, in this order: what the caller names; what the environment variable ``ARENA_BACKEND``
names; the first line of :data:`CHOICES` that fits the inputs; the operator's own order.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

OPERATORS = ("gated_memory", "mlstm", "slstm", "short_conv", "dynamic_short_conv", "lstm", "experts")
NAMES = ("reference", "chunked", "fused", "numba", "triton", "fla", "mlstm_kernels", "mamba_ssm")
"""Every backend that some operator has; the last three are packages of other people, used where installed."""

_RECORD: ContextVar[dict[str, str] | None] = ContextVar("record", default=None)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A line of the table: what ``backend="auto"`` runs, and why."""

    operator: str
    """Its name."""
    device: str
    """Device type, ``cpu`` or ``cuda``."""
    backends: tuple[str, ...]
    """The first that can run on the inputs does."""
    evidence: str
    """The file with the measurement."""
    dtypes: tuple[torch.dtype, ...] = ()
    """Of the inputs that the line is for; empty: any."""
    capability: tuple[int, int] | None = None
    """Compute capability of the GPU that was measured, and that the line is for; None: any."""
    widest: int | None = None
    """Largest last axis (head dimension, channels) that the line is for; None: any."""
    longest: int | None = None
    """Most tokens that the line is for; None: any."""
    caveat: str = ""
    """What the evidence does not show: an input on which it is less exact, a comparison that was not made."""

    def fits(self, x: Tensor) -> bool:
        """Whether the line is for inputs like x, whose axis 1 is time."""
        return (
            x.device.type == self.device
            and (not self.dtypes or x.dtype in self.dtypes)
            and (self.capability is None or _capability(x.device) == self.capability)
            and (self.widest is None or x.shape[-1] <= self.widest)
            and (self.longest is None or x.shape[1] <= self.longest)
        )

    def __str__(self) -> str:
        """One line for people."""
        where = self.device
        if self.capability is not None:
            where += f" {self.capability[0]}.{self.capability[1]}"
        limits = [str(x).removeprefix("torch.") for x in self.dtypes]
        limits += [f"width <= {self.widest}"] * (self.widest is not None)
        limits += [f"T <= {self.longest}"] * (self.longest is not None)
        what = f"{self.operator:19} {where:9} {', else '.join(self.backends):14}"
        caveat = f"; {self.caveat}" if self.caveat else ""
        return f"{what} {' '.join(limits) or 'all inputs':22} ({self.evidence}{caveat})"


CPU_EVIDENCE = "docs/speed.md"
H100 = (9, 0)
UNTIMED = "torch's path was not timed beside it: that one reads x once a tap, this one once"
CHOICES = (
    Choice(operator="gated_memory", device="cpu", backends=("chunked",), evidence=CPU_EVIDENCE),
    Choice(operator="slstm", device="cpu", backends=("numba", "fused"), evidence=CPU_EVIDENCE),
    Choice(
        operator="gated_memory",
        device="cuda",
        capability=H100,
        backends=("triton",),
        dtypes=(torch.float32,),
        widest=256,
        evidence="experiments/benchmarks/gated_memory_h100.json",
    ),
    Choice(
        operator="gated_memory",
        device="cuda",
        capability=H100,
        backends=("triton",),
        dtypes=(torch.bfloat16,),
        widest=256,
        evidence="experiments/benchmarks/gated_memory_h100.json",
        caveat="one key in all 128 tokens: gradient of log_decay off by 2.1e-2 to 2.5e-2, allowed 1.8e-2",
    ),
    Choice(
        operator="slstm",
        device="cuda",
        capability=H100,
        backends=("triton",),
        dtypes=(torch.float32, torch.bfloat16),
        widest=128,
        evidence="experiments/benchmarks/slstm_h100.json",
        caveat="torch's path was not timed beside it: several launches a token, here one a direction",
    ),
    Choice(
        operator="short_conv",
        device="cuda",
        capability=H100,
        backends=("triton",),
        dtypes=(torch.float32, torch.bfloat16),
        evidence="experiments/benchmarks/short_conv_h100.json",
        caveat=UNTIMED,
    ),
    Choice(
        operator="dynamic_short_conv",
        device="cuda",
        capability=H100,
        backends=("triton",),
        dtypes=(torch.float32, torch.bfloat16),
        evidence="experiments/benchmarks/short_conv_h100.json",
        caveat=UNTIMED,
    ),
)
"""Measured choices. What no line fits runs the operator's own torch path. A GPU kernel gets a line where its
check on that GPU (outputs and every gradient) has passed and it is measured to be faster; a caveat names what
is missing."""


def override() -> dict[str, str]:
    """What ``ARENA_BACKEND`` asks for: operator -> backend, or ``""`` -> backend for all that have it.

    Its value is ``auto``, a backend, or ``operator=backend`` with commas between.

    Raises:
        ValueError: It names an operator or a backend that there is not; the message says which there are.
    """
    return dict(_parsed(os.environ.get("ARENA_BACKEND", "auto")))


@functools.cache
def _parsed(text: str) -> tuple[tuple[str, str], ...]:
    wanted = {}
    for part in text.split(","):
        left, equals, right = (word.strip() for word in part.partition("="))
        operator, backend = (left, right) if equals else ("", left)
        if equals and operator not in OPERATORS:
            raise ValueError(f"ARENA_BACKEND names operator {operator!r}; known: {', '.join(OPERATORS)}")
        if backend not in ("auto", *NAMES):
            raise ValueError(f"ARENA_BACKEND is {backend!r}; known: auto, {', '.join(NAMES)}")
        wanted[operator] = backend
    return tuple(wanted.items())


def asked_for(operator: str, backend: str) -> str:
    """The backend that the caller names, or that ARENA_BACKEND names for this operator, or ``"auto"``."""
    if backend != "auto":
        return backend
    wanted = override()
    return wanted.get(operator, wanted.get("", "auto"))


def resolve_backend(
    operator: str,
    backend: str,
    own: tuple[str, ...],
    *,
    x: Tensor | None = None,
    others: Mapping[str, Callable[[], str | None]] | None = None,
) -> str:
    """The implementation to run, as the module's first lines say.

    Where ARENA_BACKEND or the table names one that the operator has and that can't run on these inputs, the
    first of ``own`` takes its place, and a warning says why, once for each reason. Where ARENA_BACKEND names
    one for all operators, those without it keep their default.

    Args:
        operator: Name of the operator, for messages and for :func:`recording`.
        backend: ``"auto"``, or the caller's choice.
        own: Implementations that run wherever torch does, the default first.
        x: The input that the table looks at; None: the table is not asked.
        others: Name -> function that says why that implementation can't run here; None: it can.

    Raises:
        ValueError: The operator has no implementation of that name, or the one that the caller names can't
            run.
    """
    others = others or {}
    wanted = asked_for(operator, backend)
    if backend == "auto" and wanted not in own and wanted not in others:
        wanted = "auto"
    chosen = own[0]
    if wanted != "auto":
        if wanted not in own and wanted not in others:
            known = ", ".join(("auto", *own, *others))
            raise ValueError(f"{operator} has no backend {wanted!r} here; known: {known}")
        reason = None if wanted in own else others[wanted]()
        if reason is not None and backend != "auto":
            raise ValueError(f"{operator}: backend {wanted!r} {reason}; use {own[0]!r}")
        chosen = wanted if reason is None else _instead(operator, wanted, own[0], reason)
    elif x is not None:
        line = next((line for line in CHOICES if line.operator == operator and line.fits(x)), None)
        for name in () if line is None else line.backends:
            reason = None if name in own else others[name]() if name in others else "is not there"
            if reason is None:
                chosen = name
                break
            if name in others:
                _instead(operator, name, own[0], reason)
    record = _RECORD.get()
    if record is not None:
        record[operator] = chosen
    return chosen


def _instead(operator: str, wanted: str, default: str, reason: str) -> str:
    _warn_once(f"{operator}: backend {wanted!r} {reason}; {default!r} runs in its place")
    return default


@contextmanager
def recording() -> Iterator[dict[str, str]]:
    """Collect operator -> backend for every operator that runs inside the ``with`` block."""
    used: dict[str, str] = {}
    token = _RECORD.set(used)
    try:
        yield used
    finally:
        _RECORD.reset(token)


def triton_refusal(x: Tensor) -> str | None:
    """Why no Triton kernel can run on x, or None."""
    if not _has_triton():
        return "needs the package triton, which can't be imported here"
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"needs tensors on a GPU, not on {x.device.type}"
    return None


@functools.cache
def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=5)
