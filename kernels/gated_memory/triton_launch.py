"""How the Triton kernels of the gated memory are launched, and how exact their products are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """How the kernels are launched; chosen by :func:`launch_of`."""

    chunk: int
    """Tokens a chunk: 16, 32 or 64."""
    prepare_warps: int
    """Warps a program of the kernel that prepares all chunks at once."""
    value_block: int
    """Value columns a program of the two kernels that carry the state through the chunks."""
    state_warps: int
    """Warps a program of those two."""
    stages: int
    """Chunks whose loads are under way at once in those two; each takes its share of shared memory."""
    key_block: int
    """Key columns at a time in the backward over all chunks at once."""
    chunk_warps: int
    """Warps a program of the two kernels of that backward."""
    chunk_stages: int
    """Value tiles whose loads are under way at once in those two."""
    pair_block: int
    """Key columns at a time in the kernels that form the decay between two tokens for every channel."""
    pair_warps: int
    """Warps a program of the backward one of those."""


def launch_of(k: Tensor, v: Tensor, log_decay: Tensor | None) -> Launch:
    """The settings for a shape, by measurement on a H100 (``python -m kernels.gpu_check sweep``).

    An earlier form met an illegal memory access with Triton 3.6 (sums over 64 rows as one masked product, in
    a loop over tiles of 32 columns, four warps or more; cause not established). Now such sums go by blocks
    of 16 rows. Check settings that are new: ``python -m kernels.gpu_check check``.
    """
    width = block_of(k.shape[-1])
    many = k.shape[0] * k.shape[2] >= 1024
    narrow, channels = narrow_products(k, v), kind_of(log_decay) == 2
    if width <= 32:
        numbers = (32, 2, 32, 2, 2, width, 1 if narrow else 2, 1, width, 2)
        if many:
            numbers = (16, 1, 32, 1, 3 if narrow else 2, width, 1, 1, width, 1)
    elif not narrow:
        numbers = (16, 1, 32, 4, 2, 32, 2, 1, 32, 1) if width <= 64 else (32, 4, 32, 4, 2, 32, 4, 1, 16, 2)
        numbers = numbers if width <= 128 else (16, 2, 32, 8, 1, 32, 4, 1, 32, 1)
    elif width <= 64:
        numbers = (64, 2, 64, 4, 2, 64, 4, 1, 32, 2)
        if channels:
            numbers = (32, 2, 64, 4, 2, 64, 4, 1, 32, 2)
    elif width <= 128:
        numbers = (64, 2, 64, 4, 2, 128, 8, 2, 16, 4)
        if channels:
            numbers = (64, 4, 64, 4, 2, 64, 4, 2, 16, 4)
    else:
        numbers = (32, 2, 32, 4, 1, 64, 4, 1, 32, 2)
    return Launch(*numbers)


def narrow_products(k: Tensor, v: Tensor) -> bool:
    """Whether products may take 16-bit operands: only where keys and values are bf16 themselves."""
    return k.dtype == v.dtype == torch.bfloat16


def block_of(width: int) -> int:
    """The block that holds a head dimension: a power of two, at least the 16 that a matrix product needs."""
    return max(16, triton.next_power_of_2(width))


def constants(
    k: Tensor, v: Tensor, log_decay: Tensor | None, erase: Tensor | None, chunk: int
) -> tuple[dict, dict]:
    """The compile-time arguments that all kernels take: sizes, and which gates there are."""
    sizes = {"K": k.shape[-1], "V": v.shape[-1], "C": chunk, "RAGGED": k.shape[1] % chunk != 0}
    return sizes, {"DECAY": kind_of(log_decay), "ERASE": kind_of(erase)}


def precisions(narrow: bool, v: Tensor) -> dict[str, str]:
    """How exact the kinds of products are; names as in triton_tiles.dot."""
    if narrow:
        return {"PRECISION": "bf16", "LEFT": "left", "RIGHT": "right", "EXACT": "split"}
    return dict.fromkeys(("PRECISION", "LEFT", "RIGHT", "EXACT"), "split" if on_nvidia(v) else "ieee")


def product_type(k: Tensor, v: Tensor) -> torch.dtype:
    """The type of stored operands of products."""
    return torch.bfloat16 if narrow_products(k, v) and on_nvidia(v) else torch.float32


def on_nvidia(x: Tensor) -> bool:
    """Whether x is on an NVIDIA GPU: the interpreter and other GPUs have plain fp32 products only."""
    return x.is_cuda and torch.version.hip is None


def kind_of(gate: Tensor | None) -> int:
    """0 absent, 1 a scalar a token, 2 a value a channel."""
    return 0 if gate is None else gate.dim() - 2
