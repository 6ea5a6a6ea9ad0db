"""Forward and backward of the gated memory over the chunks of a few sequences; plain tensors, no autograd.

Inside a chunk of C tokens that starts from the state S (rows are tokens; GDN-2, arXiv 2605.22791, section
3.3):

    (I + L) R = Z - E' S      O = Q' S + P R      S_next = diag(d) S + K''^T R

E' and Q' carry the decay since the chunk began, K'' the decay to its end, d the decay of the whole chunk. L
(below the diagonal) and P (with it) are the products of erase vectors and of queries with keys under the
decay between them. Row c of R is what token c really adds to the memory. With A = (I + L)^-1, Y = A E' and U
= A Z for all chunks at once, only R = U - Y S and S_next remain to be done chunk after chunk. A comes from
forward substitution in float64: with repeated keys and erase = 2, Neumann doubling is wrong by orders of
magnitude.

Axes: j = chunk, x = batch x heads, n = (j, x), c (s) = token in the chunk, k, v = channels, r = c queries
then c erase vectors (or none).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.gated_memory.decay import (
    MAX_CHANNEL_CHUNK,
    MIN_LOG_DECAY,
    Decay,
    decay_of,
    scores,
    scores_backward,
    unit_lower_inverse,
)

# Tokens in a chunk unless the decay is per channel: the fastest of 16, 32 and 64 for heads of 32 channels.
CHUNK = 32


class Inputs(NamedTuple):
    """The inputs of the operator in one dtype, shaped as in :func:`kernels.gated_memory`."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    erase: Tensor | None
    write: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """Apply a function to the tensors that are there."""
        gates = (None if x is None else function(x) for x in self[3:])
        return Inputs(function(self.q), function(self.k), function(self.v), *gates)

    def part(self, sequences: slice) -> Inputs:
        """Return some of the sequences."""
        return self.map(lambda x: x[sequences])


def chunks_of(inputs: Inputs) -> tuple[int, int]:
    """Return the number of chunks and the tokens in each: as equal as can be, so that little is padding."""
    T = inputs.k.shape[1]
    per_channel = inputs.log_decay is not None and inputs.log_decay.dim() == 4
    longest = MAX_CHANNEL_CHUNK if per_channel else CHUNK
    J = max(1, -(-T // longest))
    return J, max(1, -(-T // J))


def split(x: Tensor, C: int) -> Tensor:
    """View [B,J*C,H] or [B,J*C,H,D] as [J,B,H,C,1 or D]."""
    B, T, H = x.shape[:3]
    return x.reshape(B, T // C, C, H, -1).permute(1, 0, 3, 2, 4)


def contiguous(x: Tensor, factor: Tensor | None = None) -> Tensor:
    """Return x (times a factor) from :func:`split` as a contiguous [n,C,D]."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if factor is None:
        out.copy_(x)
    else:
        torch.mul(x, factor, out=out)
    return out.view(-1, *out.shape[3:])


def prepare(inputs: Inputs, scale: float, C: int) -> tuple[Tensor, Tensor, Decay | None]:
    """Split, scale and gate: rows [n,r,k] (queries, then erase vectors), keys [n,c,k], and the decay."""
    q, k, _, log_decay, erase, _ = inputs
    k_chunks = split(k, C)
    J, B, H, _, K = k_chunks.shape
    R = C if erase is None else 2 * C
    rows = k.new_empty(J, B, H, R, K)
    torch.mul(split(q, C), scale, out=rows[..., :C, :])
    if erase is not None:
        torch.mul(k_chunks, split(erase, C), out=rows[..., C:, :])
    decay = None
    if log_decay is not None:
        decay = decay_of(contiguous(split(log_decay, C)), per_channel=log_decay.dim() == 4)
    return rows.view(-1, R, K), contiguous(k_chunks), decay


def gated_values(inputs: Inputs, C: int) -> Tensor:
    """Return Z = write * v, [n,c,v]."""
    return contiguous(split(inputs.v, C), None if inputs.write is None else split(inputs.write, C))


def decayed(x: Tensor, factor: Tensor | None) -> Tensor:
    """Return x * factor, or x without a factor."""
    return x if factor is None else x * factor


def keep(state: Tensor, kept: Tensor | None, out: Tensor) -> None:
    """Write the state after the decay of one chunk into ``out``."""
    if kept is None:
        out.copy_(state)
    else:
        torch.mul(state, kept, out=out)


def forward(inputs: Inputs, state_xkv: Tensor, scale: float, out: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Write the outputs [B,J*C,H,V] into ``out``.

    Returns:
        The last state [x,K,V], and what the backward pass wants: P, S, and with erase R, A, Y.
    """
    J, C = chunks_of(inputs)
    rows, keys, decay = prepare(inputs, scale, C)
    values = gated_values(inputs, C)
    (N, _, K), V, X = keys.shape, values.shape[-1], len(state_xkv)
    start, end = (None, None) if decay is None else (decay.start_ncx, decay.end_ncx)
    read_pairs, erase_pairs = scores(rows, keys, decay)
    saved: list[Tensor] = []

    key_end = decayed(keys, end).view(J, X, C, K).transpose(2, 3)
    kept: Sequence[Tensor | None] = [None] * J if decay is None else decay.total_nx.view(J, X, -1, 1).unbind()
    states = keys.new_empty(J + 1, X, K, V)
    states[0] = state_xkv
    if erase_pairs is None:
        torch.bmm(key_end.flatten(0, 1), values, out=states[1:].view(N, K, V))
        for j in range(J):
            accumulate(states[j + 1], kept[j], states[j])
    else:
        wide_ncs = unit_lower_inverse(erase_pairs)
        # Rounded once: Y acts on the state again in every chunk, the same way where keys repeat.
        y_nck = torch.bmm(wide_ncs, decayed(rows[:, C:], start).double()).to(keys.dtype)
        inverse_ncs = wide_ncs.to(keys.dtype)
        values = torch.bmm(inverse_ncs, values)
        saved += [values, inverse_ncs, y_nck]
        y = y_nck.view(J, X, C, K)
        steps = zip(values.view(J, X, C, V), y, key_end, kept, states[:-1], states[1:], strict=True)
        for r, y_j, keys_t, d, before, after in steps:
            r.baddbmm_(y_j, before, alpha=-1)
            keep(before, d, after)
            after.baddbmm_(keys_t, r)
    states_nkv = states[:J].view(N, K, V)
    o_ncv = torch.bmm(decayed(rows[:, :C], start), states_nkv).baddbmm_(read_pairs, values)
    place(o_ncv, out, C)
    return states[J], [read_pairs, states_nkv, *saved]


def backward(
    inputs: Inputs, saved: list[Tensor], grad_o: Tensor, grad_state_xkv: Tensor, scale: float, out: Inputs
) -> Tensor:
    """Write the gradients of the inputs into ``out``; return that of the initial state [x,K,V]."""
    J, C = chunks_of(inputs)
    read_pairs, states_nkv, *erasing = saved
    rows, keys, decay = prepare(inputs, scale, C)
    (N, _, K), V, X = keys.shape, grad_o.shape[-1], len(grad_state_xkv)
    start, end = (None, None) if decay is None else (decay.start_ncx, decay.end_ncx)
    grad_o_ncv = contiguous(split(grad_o, C))
    grad_tokens = torch.bmm(read_pairs.transpose(1, 2), grad_o_ncv)

    # grad_states[j] is the gradient of the state before chunk j; its outputs give a first part.
    key_end = decayed(keys, end)
    kept: Sequence[Tensor | None] = [None] * J if decay is None else decay.total_nx.view(J, X, -1, 1).unbind()
    grad_states = keys.new_empty(J + 1, X, K, V)
    grad_states[J] = grad_state_xkv
    reads = decayed(rows[:, :C], start)
    torch.bmm(reads.transpose(1, 2), grad_o_ncv, out=grad_states[:J].view(N, K, V))
    if erasing:
        values, inverse_ncs, y_nck = erasing
        y_t = y_nck.view(J, X, C, K).transpose(2, 3)
        steps = list(zip(grad_tokens.view(J, X, C, V), y_t, key_end.view(J, X, C, K), kept, strict=True))
        for j, (grad_r, y_j, keys_j, d) in reversed(list(enumerate(steps))):
            grad_r.baddbmm_(keys_j, grad_states[j + 1])
            accumulate(grad_states[j], d, grad_states[j + 1])
            grad_states[j].baddbmm_(y_j, grad_r, alpha=-1)
    else:
        for j in reversed(range(J)):
            accumulate(grad_states[j], kept[j], grad_states[j + 1])
        values = gated_values(inputs, C)
        grad_tokens.baddbmm_(key_end, grad_states[1:].view(N, K, V))
    grad_next = grad_states[1:].view(N, K, V)
    grad_z, grad_reads = grad_tokens, grad_o_ncv
    if erasing:
        grad_z = torch.bmm(inverse_ncs.transpose(1, 2), grad_tokens)
        grad_reads = torch.cat([grad_o_ncv, -grad_z], 1)

    direct = torch.bmm(grad_reads, states_nkv.transpose(1, 2)).unflatten(1, (-1, C))
    grad_pairs = torch.bmm(grad_reads, values.transpose(1, 2))
    grad_pairs[:, :C].tril_()
    grad_pairs[:, C:].tril_(-1)
    grad_rows, grad_keys = scores_backward(grad_pairs, rows, keys, decay)
    accumulate(grad_rows.unflatten(1, (-1, C)), None if start is None else start[:, None], direct)
    grad_end = decayed(torch.bmm(values, grad_next.transpose(1, 2)), end)
    grad_keys += grad_end

    if out.log_decay is not None and inputs.log_decay is not None and decay is not None:
        # A row's log-gradient is <row, its gradient>, a key's the negative: the sums G enter in no other way.
        grad_sum = rows[:, :C] * grad_rows[:, :C]
        if erasing:
            grad_sum.addcmul_(rows[:, C:], grad_rows[:, C:])
        grad_sum.addcmul_(keys, grad_keys, value=-1)
        grad_total = (states_nkv * grad_next).sum(-1).mul_(decay.total_nx)
        grad_sum[:, -1] += (keys * grad_end).sum(1) + grad_total
        if out.log_decay.dim() == 3:
            grad_log = grad_sum.sum(-1).flip(1).cumsum(1).flip(1)[..., None]
        else:
            from_here = torch.ones(C, C, dtype=keys.dtype, device=keys.device).triu_().expand(N, C, C)
            grad_log = torch.bmm(from_here, grad_sum)
        place(grad_log, out.log_decay, C)
        out.log_decay.masked_fill_(inputs.log_decay < MIN_LOG_DECAY, 0.0)
    place(grad_rows[:, :C], out.q, C, None if scale == 1.0 else scale)
    if out.erase is not None and inputs.erase is not None:
        grad_e = grad_rows[:, C:]
        place(grad_e, out.erase, C, keys)
        erase = split(inputs.erase, C)
        grad_keys.view(*erase.shape[:4], K).addcmul_(grad_e.unflatten(0, erase.shape[:3]), erase)
    place(grad_keys, out.k, C)
    if out.write is not None and inputs.write is not None:
        place(grad_z, out.write, C, split(inputs.v, C))
        place(grad_z, out.v, C, split(inputs.write, C))
    else:
        place(grad_z, out.v, C)
    return grad_states[0]


def accumulate(to: Tensor, factor: Tensor | None, x: Tensor) -> None:
    """Add factor * x (or x) to ``to``."""
    if factor is None:
        to.add_(x)
    else:
        to.addcmul_(factor, x)


def place(x_ncd: Tensor, out: Tensor, C: int, factor: Tensor | float | None = None) -> None:
    """Write x (times a factor) to ``out``, [B,J*C,H,D]; or [B,J*C,H], then the channels are summed."""
    to = split(out, C)
    x = x_ncd.unflatten(0, to.shape[:3])
    if isinstance(factor, Tensor):
        factor = factor.reshape(*to.shape[:4], -1) if factor.dim() == 3 else factor
    if out.dim() == 3:
        to.copy_((x if factor is None else x * factor).sum(-1, keepdim=True))
    elif factor is None:
        to.copy_(x)
    else:
        torch.mul(x, factor, out=to)
