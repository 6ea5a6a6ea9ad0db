"""Scores inside a chunk: rows times keys under the decay between two tokens, exact to rounding, and the
gradient.

Axes: n = all chunks, c (s) = token in the chunk, r = stacked rows (c queries, then c erase vectors or none),
k = key channel, x = 1 for a scalar decay or k for a decay per channel.

With G_c the log-decay summed over the chunk up to and including token c, a row at c sees a key at s <= c
through exp(G_c - G_s) <= 1. Sums of log-decays and products of decays are float64: after one strong decay a
float32 sum would have lost the weak ones. The products that end up in the triangular system are float64 too:
a repeated key repeats its rounding error.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# A decay below e^-80 (2e-35) a step counts as e^-80: far below rounding even in float64. It bounds the
# exponents of the factored form: with chunks of 16 tokens |exponent| <= 15 * 80 / 2 = 600, and float64 ends
# at 709.
MIN_LOG_DECAY = -80.0
MAX_CHANNEL_CHUNK = 16
_SHIFT = -MIN_LOG_DECAY * (MAX_CHANNEL_CHUNK - 1) / 2


class Decay(NamedTuple):
    """The decay of all chunks, in the forms that the operator needs ("wide" is float64)."""

    start_ncx: Tensor  # from the state before the chunk to token c, inclusive: exp(G_c)
    end_ncx: Tensor  # from token c, exclusive, to the end of the chunk: exp(G_last - G_c)
    pair_ncs: Tensor | None  # scalar decay: exp(G_c - G_s) for s <= c, else 0
    row_nck: Tensor | None  # decay per channel: exp(G_c - G_0 + shift); wide
    key_nck: Tensor | None  # decay per channel: its reciprocal; wide

    @property
    def total_nx(self) -> Tensor:
        """The decay of the whole chunk, exp(G_last)."""
        return self.start_ncx[:, -1]


def decay_of(log_ncx: Tensor, *, per_channel: bool) -> Decay:
    """Bring the log-decays of all chunks (overwritten) into the forms above; ``per_channel``: factored."""
    dtype = log_ncx.dtype
    log_ncx.clamp_(min=MIN_LOG_DECAY)
    if not per_channel:
        sum_ncx = log_ncx.double().cumsum(1)
        pair_ncs = (sum_ncx - sum_ncx.transpose(1, 2)).to(dtype).clamp_(max=0.0).exp_().tril_()
        end_ncx = (sum_ncx[:, -1:] - sum_ncx).exp_().to(dtype)
        return Decay(sum_ncx.exp_().to(dtype), end_ncx, pair_ncs, None, None)
    row_nck = log_ncx.exp_().double()
    first_n1k = row_nck[:, :1] * math.exp(-_SHIFT)
    # A constant shift (not the exponent of a middle row) uses the whole range without looking at later gates.
    row_nck[:, 0] = math.exp(_SHIFT)
    for c in range(1, row_nck.shape[1]):
        row_nck[:, c] *= row_nck[:, c - 1]
    key_nck = row_nck.reciprocal()
    start_nck = (row_nck * first_n1k).to(dtype)
    return Decay(start_nck, (row_nck[:, -1:] * key_nck).to(dtype), None, row_nck, key_nck)


def scores(rows_nrk: Tensor, keys_nck: Tensor, decay: Decay | None) -> tuple[Tensor, Tensor | None]:
    """Return queries . keys, and erase vectors . keys (wide; None without them), under the decay between
    them.

    Both [n,c,s]; the first is 0 where s > c, the second holds anything from its diagonal on.
    """
    C = keys_nck.shape[1]
    if decay is not None and decay.row_nck is not None:
        rows, keys = _factors(rows_nrk, keys_nck, decay)
        pairs_nrs = torch.bmm(rows, keys.transpose(1, 2))
        erased = pairs_nrs[:, C:] if rows.shape[1] > C else None
        return pairs_nrs[:, :C].tril().to(keys_nck.dtype), erased
    reads = torch.bmm(rows_nrk[:, :C], keys_nck.transpose(1, 2))
    erased = None
    if rows_nrk.shape[1] > C:
        erased = torch.bmm(rows_nrk[:, C:].double(), keys_nck.double().transpose(1, 2))
    if decay is None or decay.pair_ncs is None:
        return reads.tril_(), erased
    return reads.mul_(decay.pair_ncs), None if erased is None else erased.mul_(decay.pair_ncs.double())


def scores_backward(
    grad_nrs: Tensor, rows_nrk: Tensor, keys_nck: Tensor, decay: Decay | None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of :func:`scores` for rows and keys; ``grad_nrs`` must be 0 where s > c.

    The gradient of the log-decays follows from these two, see passes.py.
    """
    N, R, K = rows_nrk.shape
    C = keys_nck.shape[1]
    if decay is not None and decay.row_nck is not None and decay.key_nck is not None:
        rows, keys = _factors(rows_nrk, keys_nck, decay)
        wide_nrs = grad_nrs.double()
        grad_rows = torch.bmm(wide_nrs, keys)
        grad_rows.view(N, R // C, C, K).mul_(decay.row_nck[:, None])
        grad_keys = torch.bmm(wide_nrs.transpose(1, 2), rows).mul_(decay.key_nck)
        return grad_rows.to(rows_nrk.dtype), grad_keys.to(keys_nck.dtype)
    if decay is not None and decay.pair_ncs is not None:
        grad_nrs = (grad_nrs.view(N, R // C, C, C) * decay.pair_ncs[:, None]).view(N, R, C)
    return torch.bmm(grad_nrs, keys_nck), torch.bmm(grad_nrs.transpose(1, 2), rows_nrk)


def _factors(rows_nrk: Tensor, keys_nck: Tensor, decay: Decay) -> tuple[Tensor, Tensor]:
    """Rows and keys, wide, each with its half of the decay; over s <= c their products do not overflow."""
    assert decay.row_nck is not None and decay.key_nck is not None
    N, R, K = rows_nrk.shape
    C = keys_nck.shape[1]
    rows = rows_nrk.to(torch.float64, copy=True)
    rows.view(N, R // C, C, K).mul_(decay.row_nck[:, None])
    return rows, keys_nck.to(torch.float64, copy=True).mul_(decay.key_nck)


def unit_lower_inverse(lower_ncs: Tensor) -> Tensor:
    """Return (I + what is below the diagonal)^-1 by forward substitution; the rest is not read."""
    C = lower_ncs.shape[-1]
    eye = torch.eye(C, dtype=lower_ncs.dtype, device=lower_ncs.device).expand_as(lower_ncs)
    return torch.linalg.solve_triangular(lower_ncs, eye, upper=False, unitriangular=True)
