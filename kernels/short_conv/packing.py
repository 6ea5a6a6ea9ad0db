"""Several sequences of any length one behind the other in one row of tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """Where the tokens of S packed sequences are; nothing in it has a shape that depends on the lengths."""

    pos: Tensor
    """[T] int32: place of a token in its sequence."""
    seq: Tensor
    """[T] int32: its sequence."""
    starts: Tensor
    """[S] int64: first token of a sequence."""
    ends: Tensor
    """[S] int64: the token after its last."""


def packing_of(cu_seqlens: Tensor | None, x: Tensor) -> Packing | None:
    """Check the limits [S+1] of sequences packed in x [1,T,D] (the values on CPU only: no waiting)."""
    if cu_seqlens is None:
        return None
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be integers [S+1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    if x.shape[0] != 1:
        raise ValueError(f"packed sequences lie in one row, x must be [1,T,D], got {tuple(x.shape)}")
    T = x.shape[1]
    if cu_seqlens.device.type == "cpu":
        limits = cu_seqlens.tolist()
        if limits[0] != 0 or limits[-1] != T or limits != sorted(limits):
            raise ValueError(f"cu_seqlens must go up from 0 to T = {T}, got {limits[:8]}...")
    limits_long = cu_seqlens.to(torch.int64)
    token = torch.arange(T, device=x.device)
    seq = torch.searchsorted(limits_long[1:].contiguous(), token, right=True)
    pos = token - limits_long[seq]
    return Packing(pos.to(torch.int32), seq.to(torch.int32), limits_long[:-1], limits_long[1:])


def unpacked(packing: Packing, a: Tensor, rows: int) -> Tensor:
    """A row of tokens a [1,T,...] with ``rows`` rows of zeros before each sequence, [1,T+S*rows,...]."""
    size = a.shape[1] + packing.starts.shape[0] * rows
    return a.new_zeros(1, size, *a.shape[2:]).index_copy(1, places(packing, rows), a)


def places(packing: Packing, rows: int) -> Tensor:
    """Where :func:`unpacked` puts the tokens, [T]."""
    seq = packing.seq.to(torch.int64)
    return packing.starts[seq] + packing.pos + (seq + 1) * rows


def with_state(packing: Packing, x: Tensor, state: Tensor | None, rows: int) -> Tensor:
    """:func:`unpacked` with the states [S,rows,D] in the place of the zeros."""
    spread = unpacked(packing, x, rows)
    if state is None or rows == 0:
        return spread
    first = packing.starts + torch.arange(len(packing.starts), device=x.device) * rows
    where = (first[:, None] + torch.arange(rows, device=x.device)).flatten()
    return spread.index_copy(1, where, state.flatten(0, 1)[None].to(x.dtype))


def last_rows_packed(packing: Packing, x: Tensor, state: Tensor | None, rows: int) -> Tensor:
    """The last ``rows`` rows of every sequence, its initial state (or zeros) counted in: [S,rows,D]."""
    if state is None:
        state = x.new_zeros(len(packing.starts), rows, x.shape[2])
    if x.shape[1] == 0 or rows == 0:
        return state.to(x.dtype)
    lag = torch.arange(rows, device=x.device)
    row = packing.ends[:, None] - rows + lag
    old = row - packing.starts[:, None] + rows  # in the state, where it lies before the sequence
    mine = x[0].index_select(0, row.clamp(min=0).flatten()).unflatten(0, row.shape)
    index = old.clamp(max=rows - 1)[..., None].expand(-1, -1, x.shape[2])
    return torch.where((old >= rows)[..., None], mine, state.to(x.dtype).gather(1, index))
