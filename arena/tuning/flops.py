"""FLOPs of a forward pass, counted as it runs on the operators' slow references.

The references are the definition of each operator, token by token, so the count neither depends on the
backend that trains nor on the size of its chunks, and a plug-in block needs no formula. What counts:

- matrix products and convolutions: 2 for every multiplication and addition, as ``torch.utils.flop_counter``;
- every other floating-point operation: 1 for each element of its output (sums and the like: of its input);
- nothing for copies, views, comparisons, indexing and embedding.

Softmax attention counts the whole square of positions, masked ones too. A training step is about three
forward passes, for ``ttt_e2e`` more: its inner steps are in the forward pass, and their second derivatives in
the backward one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_REDUCTIONS = {
    "sum", "mean", "prod", "amax", "amin", "max", "min", "logsumexp", "cumsum", "cumprod", "logcumsumexp",
    "cummax", "var", "std", "linalg_vector_norm", "norm", "_softmax", "_safe_softmax", "_log_softmax",
    "softmax", "log_softmax", "log_sigmoid_forward",
}  # fmt: skip
_FREE = {
    "clone",
    "copy",
    "_to_copy",
    "fill",
    "zero",
    "zeros_like",
    "ones_like",
    "where",
    "masked_fill",
    "full_like",
}


def flops_per_token(config: Any, length: int) -> float:
    """FLOPs of one forward pass over a sequence, in evaluation mode, by its number of positions.

    Args:
        config: ``arena.model.ModelConfig``.
        length: positions: attention costs more for each, the longer the sequence is.
    """
    from arena.model import build_model

    model = build_model(config, seed=0).eval()  # a naive ttt_e2e makes its updates there alone
    shape = (1, length) if config.tokens_per_position == 1 else (1, length, config.tokens_per_position)
    tokens = torch.zeros(shape, dtype=torch.int64)
    with torch.no_grad(), _references(), sdpa_kernel(SDPBackend.MATH), _Counter() as counter:
        model(tokens)
    return counter.total / length


class _Counter(TorchDispatchMode):
    """Adds up what the operations inside of it cost."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        name = packet.__name__.rstrip("_") or packet.__name__
        first = out[0] if isinstance(out, (tuple, list)) and out else out
        if packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        elif not isinstance(first, Tensor) or not first.is_floating_point() or name in _FREE:
            pass
        elif name in _REDUCTIONS and isinstance(args[0], Tensor):
            self.total += args[0].numel()
        elif torch.Tag.pointwise in func.tags:
            self.total += first.numel()
        return out


@contextmanager
def _references() -> Iterator[None]:
    held = os.environ.get("ARENA_BACKEND")
    os.environ["ARENA_BACKEND"] = "reference"
    try:
        yield
    finally:
        if held is None:
            del os.environ["ARENA_BACKEND"]
        else:
            os.environ["ARENA_BACKEND"] = held


def relative(value: float, reference: float) -> float:
    """(value - reference) / reference."""
    return (value - reference) / reference if reference else math.inf
