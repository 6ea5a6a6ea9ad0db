"""Decay inside a chunk: pairwise scores under the decay between two tokens, exact to rounding, and their gradient.

Axes: n = batch x heads x chunks, c (s) = token in the chunk, r = stacked rows (queries, then erase vectors),
k = key channel, x = 1 for a scalar decay or k for a decay per channel.

With G_c the log-decay summed over the chunk up to and including token c, a row at c sees a key at s <= c through
exp(G_c - G_s) <= 1. The sums are float64: after one strong decay a float32 sum would have lost the weak ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# A decay below e^-80 (2e-35) a step counts as e^-80: far below rounding even in float64. It bounds the exponents
# of the factored form: with chunks of 16 tokens |exponent| <= 15 * 80 / 2 = 600, and float64 ends at 709.
MIN_LOG_DECAY = -80.0
MAX_CHANNEL_CHUNK = 16
_SHIFT = -MIN_LOG_DECAY * (MAX_CHANNEL_CHUNK - 1) / 2


class Decay(NamedTuple):
    """The decay of all chunks, in the forms that the operator needs (float64 where it says wide)."""

    start_ncx: Tensor  # from the state before the chunk to token c, inclusive: exp(G_c)
    end_ncx: Tensor  # from token c, exclusive, to the end of the chunk: exp(G_last - G_c)
    total_nx: Tensor  # the whole chunk: exp(G_last)
    pair_ncs: Tensor | None  # scalar decay: exp(G_c - G_s) for s <= c, else 0
    wide_row_nck: Tensor | None  # decay per channel: exp(G_c - G_0 + shift), wide
    wide_key_nck: Tensor | None  # decay per channel: its reciprocal, wide


def decay_of(log_decay_ncx: Tensor, *, per_channel: bool, dtype: torch.dtype) -> Decay:
    """Sum up the log-decays of each chunk; ``per_channel`` selects the factored form (chunks of <= 16 tokens)."""
    log_ncx = log_decay_ncx.double().clamp(min=MIN_LOG_DECAY)
    sum_ncx = log_ncx.cumsum(1)
    if not per_channel:
        last_n1x = sum_ncx[:, -1:]
        pair_ncs = (sum_ncx - sum_ncx.transpose(1, 2)).clamp_(max=0.0).exp_().tril_().to(dtype)
        start_ncx = sum_ncx.exp().to(dtype)
        end_ncx = (last_n1x - sum_ncx).exp_().to(dtype)
        return Decay(start_ncx, end_ncx, start_ncx[:, -1], pair_ncs, None, None)
    # Shifting by a constant (not by a middle row) uses the whole exponent range without looking at later gates.
    first_n1x = log_ncx[:, :1]
    row_nck = sum_ncx.sub_(first_n1x).add_(_SHIFT).exp_()
    key_nck = row_nck.reciprocal()
    start_ncx = (row_nck * (first_n1x - _SHIFT).exp()).to(dtype)
    end_ncx = (row_nck[:, -1:] * key_nck).to(dtype)
    return Decay(start_ncx, end_ncx, start_ncx[:, -1], None, row_nck, key_nck)


def scores(rows_nrk: Tensor, keys_nck: Tensor, decay: Decay | None) -> Tensor:
    """Return rows . keys under the decay between them, one block of c rows under the other; entries s > c are junk.

    The result is wide for a decay per channel, else in the dtype of the rows.
    """
    N, R, K = rows_nrk.shape
    C = keys_nck.shape[1]
    if decay is None or decay.pair_ncs is not None:
        scores_nrs = torch.bmm(rows_nrk, keys_nck.transpose(1, 2))
        if decay is not None and decay.pair_ncs is not None:
            scores_nrs.view(N, R // C, C, C).mul_(decay.pair_ncs[:, None])
        return scores_nrs
    assert decay.wide_row_nck is not None and decay.wide_key_nck is not None
    wide_rows = rows_nrk.double().view(N, R // C, C, K) * decay.wide_row_nck[:, None]
    wide_keys = keys_nck.double() * decay.wide_key_nck
    return torch.bmm(wide_rows.view(N, R, K), wide_keys.transpose(1, 2))


def scores_backward(
    grad_nrs: Tensor, rows_nrk: Tensor, keys_nck: Tensor, decay: Decay | None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of :func:`scores` for rows and keys; ``grad_nrs`` must be 0 where s > c.

    Both come in the dtype that ``scores`` gives. The decay's own gradient follows from them, see chunked.py.
    """
    N, R, K = rows_nrk.shape
    C = keys_nck.shape[1]
    if decay is None or decay.pair_ncs is not None:
        if decay is not None and decay.pair_ncs is not None:
            grad_nrs = (grad_nrs.view(N, R // C, C, C) * decay.pair_ncs[:, None]).view(N, R, C)
        return torch.bmm(grad_nrs, keys_nck), torch.bmm(grad_nrs.transpose(1, 2), rows_nrk)
    assert decay.wide_row_nck is not None and decay.wide_key_nck is not None
    grad_nrs = grad_nrs.double()
    wide_rows = rows_nrk.double().view(N, R // C, C, K) * decay.wide_row_nck[:, None]
    wide_keys = keys_nck.double() * decay.wide_key_nck
    grad_rows = torch.bmm(grad_nrs, wide_keys)
    grad_rows.view(N, R // C, C, K).mul_(decay.wide_row_nck[:, None])
    grad_keys = torch.bmm(grad_nrs.transpose(1, 2), wide_rows.view(N, R, K)).mul_(decay.wide_key_nck)
    return grad_rows, grad_keys


def unit_lower_inverse(lower_ncs: Tensor) -> Tensor:
    """Return (I + strictly lower part)^-1 by forward substitution; the diagonal and what is above it are not read."""
    C = lower_ncs.shape[-1]
    eye = torch.eye(C, dtype=lower_ncs.dtype, device=lower_ncs.device).expand_as(lower_ncs)
    return torch.linalg.solve_triangular(lower_ncs, eye, upper=False, unitriangular=True)
