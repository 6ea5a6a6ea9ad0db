"""The matrix memory itself, from the trace: S_t = (I - k_t e_t^T) D_t S_{t-1} + k_t z_t^T, in float64.

With an ``angle`` in the trace (Mamba-3) D_t R_t stands in the place of D_t.

A trace with ``k``, ``v``, ``decay``, ``erase`` and ``write`` determines the memory, so that one matrix a head
is carried through the sequence and no block has to keep all of them. With n micro-steps a token these fields
have n entries a token, and the memory after a token is that after the last of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from arena.blocks.trapezoid import rotated

MATRIX_FIELDS = ("k", "v", "decay", "erase", "write", "read")
"""A trace with these is that of a matrix memory."""


TRANSITION_FIELDS = ("k", "decay", "erase", "angle")
"""What a token does to the memory that is there."""


def is_matrix_memory(trace: Mapping[str, Tensor]) -> bool:
    """Whether the trace is that of a matrix memory (not of attention, not of a cell)."""
    return all(name in trace for name in MATRIX_FIELDS)


def micro_steps(trace: Mapping[str, Tensor]) -> int:
    """How often a token updates the memory: n of DeltaProduct; 1 for everything without keys."""
    return trace["k"].shape[1] // trace["read"].shape[1] if {"k", "read"} <= trace.keys() else 1


def by_token(x: Tensor, n: int) -> Tensor:
    """A field of n micro-steps a token, [B,T n,...] to [B,T,n,...]."""
    return x.unflatten(1, (-1, n))


def transition_fields(trace: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of :data:`TRANSITION_FIELDS` that a trace has, [B,T,n,H,*] float64, n its micro-steps."""
    n = micro_steps(trace)
    return {name: by_token(trace[name].double(), n) for name in TRANSITION_FIELDS if name in trace}


def value_lags(trace: Mapping[str, Tensor]) -> list[int]:
    """For each micro-step how many tokens before its own the value was read (``lag``)."""
    n = micro_steps(trace)
    return [int(lag) for lag in trace["lag"][0, :n, 0, 0]] if "lag" in trace else [0] * n


def writing_step(trace: Mapping[str, Tensor]) -> int | None:
    """The one micro-step at which tokens write (RWKV-7's second); None where several do or none does."""
    n = micro_steps(trace)
    if n == 1:
        return 0
    writes = by_token(trace["write"], n).ne(0).movedim(2, 0).flatten(1).any(1).nonzero()[:, 0]
    return int(writes[0]) if len(writes) == 1 else None


def write_gate(trace: Mapping[str, Tensor]) -> Tensor:
    """The write gate in float64; an exponential one from its pre-activation, as float32 ends at e^88."""
    write = trace["write"].double()
    if "input_gate" not in trace:
        return write
    return torch.where(write.isinf(), trace["input_gate"].double().exp(), write)


def advance(
    trace: Mapping[str, Tensor], state: Tensor, wanted: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    """Carry the memory through the tokens of a trace.

    Args:
        trace: Fields [B,T,H,*], ``read`` among them.
        state: [B,H,K,C] float64, the memory before the first token; it is overwritten. Columns beyond the V
            of the values follow the same recurrence with nothing written to them.
        wanted: Tokens of the trace, rising, to stop after.

    Yields:
        Each wanted token, and the memory after it: ``state`` itself, which the caller may change.
    """
    k, decay, erase = (trace[name].double() for name in ("k", "decay", "erase"))
    z = write_gate(trace) * trace["v"].double()
    extra = state.shape[-1] - z.shape[-1]
    if extra:
        z = torch.nn.functional.pad(z, (0, extra))
    erases = bool((erase != 0).any())
    e_t, k_t = (erase * k)[..., None, :].unbind(1), k[..., None].unbind(1)
    decay_t, z_t = decay[..., None].unbind(1), z[..., None, :].unbind(1)
    stops, n = set(wanted), micro_steps(trace)
    angle = trace["angle"].double() if "angle" in trace else None
    for m in range(k.shape[1]):
        if angle is not None and m % n == 0:
            state.copy_(rotated(state.mT, angle[:, m, :, None]).mT)
        state.mul_(decay_t[m])
        new = z_t[m] - e_t[m] @ state if erases else z_t[m]
        state.addcmul_(k_t[m], new)
        t, j = divmod(m, n)
        if j == n - 1 and t in stops:
            yield t, state


def effective_rank(singular: Tensor) -> Tensor:
    """exp(-sum p_i ln p_i), p = s / sum s (Roy and Vetterli 2007), from singular values [...,R]: [...].

    0 for a memory that is zero.
    """
    total = singular.sum(-1, keepdim=True)
    share = singular / total.masked_fill(total == 0, 1.0)
    return torch.special.entr(share).sum(-1).exp() * (total[..., 0] != 0)


def growth_exponent(tokens: Tensor, norms: Tensor) -> Tensor:
    """Slope of ln ||S_t||_F over ln t by least squares.

    0: the memory has saturated; 1/2: it grows as a random walk does; 1: as a counter does.

    Args:
        tokens: [n], numbers of tokens read, t >= 1.
        norms: [...,n].

    Returns:
        [...]; NaN for fewer than 2 tokens or a norm of 0.
    """
    x = tokens.double().log()
    x = x - x.mean()
    y = norms.double().log()
    return ((y - y.mean(-1, keepdim=True)) * x).sum(-1) / x.square().sum()
