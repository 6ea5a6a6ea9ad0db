"""Which implementation of an operator runs, and a record of which one did."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

NAMES = ("reference", "chunked", "fused", "numba", "triton")
"""Every backend that some operator has; ARENA_BACKEND must be one of them, or ``auto``."""

_RECORD: ContextVar[dict[str, str] | None] = ContextVar("record", default=None)


def resolve_backend(operator: str, backend: str, available: tuple[str, ...]) -> str:
    """The implementation to run: ``backend`` itself, or for ``"auto"`` the operator's default.

    The environment variable ``ARENA_BACKEND`` takes the place of the default in every operator that has an
    implementation of that name; the others keep their default.

    Args:
        operator: Name of the operator, for :func:`recording`.
        backend: ``"auto"`` or one of ``available``.
        available: Implementations of the operator that can run on these inputs, the default first.

    Raises:
        ValueError: If the operator has no such implementation, or ARENA_BACKEND names none at all.
    """
    if backend == "auto":
        wanted = os.environ.get("ARENA_BACKEND", "auto")
        if wanted not in ("auto", *NAMES):
            raise ValueError(f"ARENA_BACKEND is {wanted!r}; known: auto, {', '.join(NAMES)}")
        backend = wanted if wanted in available else available[0]
    if backend not in available:
        raise ValueError(f"{operator} has no backend {backend!r} here; known: auto, {', '.join(available)}")
    record = _RECORD.get()
    if record is not None:
        record[operator] = backend
    return backend


@contextmanager
def recording() -> Iterator[dict[str, str]]:
    """Collect operator -> backend for every operator that runs inside the ``with`` block."""
    used: dict[str, str] = {}
    token = _RECORD.set(used)
    try:
        yield used
    finally:
        _RECORD.reset(token)


def with_triton(
    operator: str, backend: str, others: tuple[str, ...], x: Tensor, refusal: str | None
) -> tuple[str, ...]:
    """The implementations for :func:`resolve_backend` of an operator that also has Triton kernels.

    Those are never the default: they run where ``ARENA_BACKEND`` or the caller names them. Where
    ``ARENA_BACKEND`` does but they can't run, the first of ``others`` takes their place and a warning says
    why, once for each reason.

    Args:
        operator: Its name, for messages.
        backend: What was asked for.
        others: The other implementations that can run on these inputs, the default first.
        x: An input: where it lies decides.
        refusal: Why the kernels do not take these inputs (a dtype, a size); None: they do.

    Raises:
        ValueError: If Triton is asked for by name and can't run.
    """
    refusal = refusal or _triton_refusal(x)
    if refusal is None:
        return (*others, "triton")
    if backend == "triton":
        raise ValueError(f"{operator}: backend 'triton' {refusal}; use '{others[0]}'")
    if backend == "auto" and os.environ.get("ARENA_BACKEND") == "triton":
        _warn_once(f"{operator}: backend 'triton' {refusal}; '{others[0]}' runs in its place")
    return others


def _triton_refusal(x: Tensor) -> str | None:
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
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)
