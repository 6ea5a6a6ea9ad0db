"""What the Triton operators of the short convolutions share."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.short_conv.packing import Packing
from kernels.short_conv.triton_tiles import sum_kernel

SUM_ROWS, SUM_BLOCK = 16, 256


def places_of(packing: Packing | None, width: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Place and sequence of every token [T], and the first W-1 tokens of each sequence [S,W-1] (-1: none)."""
    if packing is None:
        return None, None, None
    head = packing.starts[:, None] + torch.arange(width - 1, device=packing.starts.device)
    return packing.pos, packing.seq, torch.where(head < packing.ends[:, None], head, -1)


def first_tokens(a: Tensor, head: Tensor | None, rows: int) -> Tensor:
    """The first tokens of each sequence of a [G,B,T,...]: [G,S,rows or fewer,...], zeros where none is."""
    if head is None:
        return a[:, :, :rows]
    replica = torch.arange(a.shape[0], device=a.device)[:, None, None]
    mine = a[:, 0][replica, head.clamp(min=0)]
    return mine * (head >= 0).reshape(*head.shape, *[1] * (a.dim() - 3))


def state_gradient(dc: Tensor, taps: Tensor) -> Tensor:
    """The gradient of the state, which only the first tokens of a sequence see.

    Args:
        dc: [G,S,P,D], P <= W-1: gradient of the convolution at the first tokens of each sequence.
        taps: [G,S,P,W,D] (S and P may be 1: the same for all).

    Returns:
        [G,S,W-1,D]: row i gets dc_p taps_p[j] from token p = i + j - (W - 1).
    """
    G, S, P, D = dc.shape
    W = taps.shape[3]
    gradient = dc.new_zeros(G, S, W - 1, D)
    products = dc[:, :, :, None] * taps
    for p in range(P):
        # lags p+1 .. W-1 of token p reach rows W-2 .. p of the state
        gradient[:, :, p:] += products[:, :, p, p + 1 :].flip(2)
    return gradient


def silu_slope(before: Tensor) -> Tensor:
    """Derivative of silu."""
    s = torch.sigmoid(before)
    return s * (1 + before * (1 - s))


def add_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the second axis of partial sums [A,P,...] in fp32, added up in a fixed order."""
    A, P = parts.shape[:2]
    out = torch.empty(A, *parts.shape[2:], dtype=dtype, device=parts.device)
    if out.numel() > 0 and P > 0:
        count = out.numel() // A
        grid = triton.cdiv(count, SUM_BLOCK), A
        with device_of(parts):
            sum_kernel[grid](parts, out, count, P, SUM_ROWS, SUM_BLOCK, num_warps=4)
        return out
    return out.zero_()


def precision_of(x: Tensor, half: bool) -> str:
    """How products are taken; ``half``: all factors have, or may be rounded to, x's 16-bit type."""
    if not x.is_cuda or torch.version.hip is not None:
        return "ieee"
    if x.dtype == torch.float32:
        return "split"
    return "half" if half else "tf32"


def filled(default: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """A pointer for every argument of a kernel: absent tensors, which it does not touch, get the default."""
    return [default if x is None else x for x in tensors]


def contiguous(*tensors: Tensor | None) -> list[Any]:
    """Row-major copies where needed: the kernels address by shape."""
    return [None if x is None else x.contiguous() for x in tensors]


def device_of(x: Tensor) -> Any:
    """Make the tensor's GPU the current one for a launch."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
