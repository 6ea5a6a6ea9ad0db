"""Which implementation of an operator runs."""

from __future__ import annotations

import os


def resolve_backend(backend: str, available: tuple[str, ...]) -> str:
    """The implementation to run: ``backend`` itself, or for ``"auto"`` the operator's default.

    The environment variable ``ARENA_BACKEND`` takes the place of the default in every operator that has an
    implementation of that name; the others keep their default.

    Args:
        backend: ``"auto"`` or one of ``available``.
        available: Implementations of the operator, the default first.

    Raises:
        ValueError: If the operator has no such implementation.
    """
    if backend == "auto":
        wanted = os.environ.get("ARENA_BACKEND", "auto")
        return wanted if wanted in available else available[0]
    if backend not in available:
        raise ValueError(f"unknown backend {backend!r}; known: auto, {', '.join(available)}")
    return backend
