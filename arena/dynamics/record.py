"""Run a model or a block over long sequences, chunk by chunk, and see what every block did.

Between chunks only the state that the blocks themselves carry is kept. Memory is that of the traces of one
chunk, whatever the length of the sequence (softmax attention excepted: its own state grows).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from arena.blocks.base import Block


class Chunk(NamedTuple):
    """A piece of the sequences and what the blocks did there."""

    start: int
    """Position of its first token in the sequence."""
    stop: int
    """One past its last token."""
    traces: list[dict[str, Tensor]]
    """One of each block, first layer first; fields as in ``arena.memory.TRACE_FIELDS``."""
    output: Tensor
    """Logits [B,T,n_classes] of a model, y [B,T,D] of a block."""


def blocks_of(module: nn.Module) -> list[Block]:
    """The blocks of a model, first layer first, or the block itself.

    Any module counts as a model that has ``blocks`` and is called with (tokens, state), and as a block that
    has ``trace`` and is called with (x, state), as ``arena.blocks.base.Block`` is.

    Raises:
        ValueError: it is neither.
    """
    if hasattr(module, "blocks"):
        return list(cast(Any, module).blocks)
    if hasattr(module, "trace"):
        return [cast(Block, module)]
    raise ValueError(
        f"{type(module).__name__} is neither a model (blocks) nor a block (trace): see arena.blocks.base"
    )


@torch.no_grad()
def record(module: nn.Module, inputs: Tensor, *, chunk: int = 256) -> Iterator[Chunk]:
    """Run ``module`` over the sequences in chunks and yield what every block did.

    The module is put into evaluation mode while it runs. Whatever changes its forward pass and its traces
    alike (a gate that is clamped, say) shows in both.

    Args:
        module: A model or a block, see :func:`blocks_of`.
        inputs: Tokens [B,T] or [B,T,C] for a model, x [B,T,D] for a block.
        chunk: Tokens in one piece.

    Raises:
        ValueError: a chunk or a sequence of no token; x for a model or tokens for a block.
    """
    blocks = blocks_of(module)
    if chunk < 1 or inputs.dim() < 2 or inputs.shape[1] < 1:
        raise ValueError(f"chunks and sequences need a token, got chunk {chunk}, inputs {list(inputs.shape)}")
    if inputs.is_floating_point() == hasattr(module, "blocks"):
        raise ValueError("a model reads integer tokens, a block reads x [B,T,D] of floating point")
    seen: dict[int, tuple[Tensor, Any]] = {}

    def remember(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            state = args[1] if len(args) > 1 else kwargs.get("state")
            seen[index] = args[0], state

        return hook

    training = module.training
    handles = [
        block.register_forward_pre_hook(remember(index), with_kwargs=True)
        for index, block in enumerate(blocks)
    ]
    module.eval()
    # A model that learns as it reads traces itself: its blocks do not know of that.
    own_trace = getattr(module, "trace", None) if hasattr(module, "blocks") else None
    try:
        state, device = None, next((p.device for p in module.parameters()), inputs.device)
        for start in range(0, inputs.shape[1], chunk):
            piece = inputs[:, start : start + chunk].to(device)
            before = state
            output, state = module(piece, before)
            if own_trace is None:
                traces = [block.trace(*seen[index]) for index, block in enumerate(blocks)]
            else:
                traces = own_trace(piece, before)
            yield Chunk(start, start + piece.shape[1], traces, output)
    finally:
        for handle in handles:
            handle.remove()
        module.train(training)
