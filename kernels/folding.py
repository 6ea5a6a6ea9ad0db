"""How a vmap rule folds the mapped axis of replicas into the leading axis of an operator's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def fold(size: int, dims: Sequence[int | None], tensors: Sequence[Tensor | None]) -> list[Any]:
    """Move each mapped axis to the front and merge it with the first axis: [A, ...] becomes [size * A, ...].

    Args:
        size: Number of replicas.
        dims: The mapped axis of each tensor; None: it has none, and every replica gets the same tensor (an
            expanded view, not a copy, where A is 1).
        tensors: None stays None.
    """
    return [
        None if x is None else (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)
        for x, dim in zip(tensors, dims, strict=True)
    ]


def unfold(size: int, tensors: Sequence[Tensor | None]) -> tuple[tuple[Any, ...], tuple[int | None, ...]]:
    """Undo :func:`fold` on outputs; return them with their mapped axes, as a vmap rule does."""
    outputs = tuple(None if x is None else x.unflatten(0, (size, -1)) for x in tensors)
    return outputs, tuple(None if x is None else 0 for x in tensors)
