"""Which implementation of an operator runs, and a record of which one did."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

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
