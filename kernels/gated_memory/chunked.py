"""The gated matrix memory in chunks of tokens: matrix products, exact gradients, any batch of replicas.

Inside a chunk of C tokens that starts from the state S (rows are tokens; GDN-2 paper, arXiv 2605.22791, section 3.3):

    (I + L) R = Z - E' S      O = Q' S + P R      S_next = diag(d) S + K''^T R

E', Q' carry the decay since the chunk began, K'' the decay to its end, d the decay of the whole chunk; L (below the
diagonal) and P (with it) are the products of erase vectors and queries with keys under the decay between them; row c of
R is what token c really adds to the memory. With A = (I + L)^-1 (forward substitution in float64: with repeated keys
and erase = 2 anything faster is wrong) the state only needs one product a chunk: S_next = M S + W, where
M = diag(d) - K''^T A E' and W = K''^T A Z; all else is done for all chunks at once.

Axes: x = batch x heads, j = chunk, n = (j, x), c (s) = token in the chunk, k, v = channels, r = c queries then c
erase vectors, m = k state rows then c token rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from kernels.folding import fold, unfold
from kernels.gated_memory.decay import (
    MAX_CHANNEL_CHUNK,
    MIN_LOG_DECAY,
    Decay,
    decay_of,
    scores,
    scores_backward,
    unit_lower_inverse,
)

CHUNK = MAX_CHANNEL_CHUNK


def gated_memory_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase: Tensor | None,
    write: Tensor | None,
    decay_sign: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute what ``gated_memory_reference`` computes, chunk by chunk; arguments as there.

    Exact gradients; under ``torch.func.vmap`` replicas are folded into the batch. Outputs are in the dtype of the
    state.
    """
    B, T, H, K = k.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    state = (
        k.new_zeros(B, H, K, v.shape[-1], dtype=dtype) if initial_state is None else initial_state.to(dtype)
    )
    if T == 0:
        return v.to(dtype), state
    if decay_sign is not None:
        # S_t = diag(sign_1 ... sign_t) S'_t, where S' decays by |decay|: the running sign moves into q, k and so e.
        sign = (1 - 2 * ((decay_sign < 0).cumsum(1) % 2)).to(q.dtype)
        sign = sign[..., None] if sign.dim() == 3 else sign
        q, k = q * sign, k * sign
    q, k, v, log_decay, erase, write = (
        None if x is None else x.to(dtype) for x in (q, k, v, log_decay, erase, write)
    )
    advance = _one_token if T == 1 else _Forward.apply
    o, state, *_ = advance(q, k, v, log_decay, erase, write, state, scale)
    return o, state if decay_sign is None else state * sign[:, -1, :, :, None].to(dtype)


def _one_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase: Tensor | None,
    write: Tensor | None,
    state: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One step of the recurrence, in plain differentiable operations: what decoding token by token calls."""
    q_bhk, k_bhk, z_bhv = q[:, 0], k[:, 0], v[:, 0]
    if write is not None:
        z_bhv = z_bhv * write[:, 0].reshape(*z_bhv.shape[:2], -1)
    if log_decay is not None:
        state = state * log_decay[:, 0].reshape(*k_bhk.shape[:2], -1, 1).exp()
    if erase is not None:
        e_bhk = k_bhk * erase[:, 0].reshape(*k_bhk.shape[:2], -1)
        z_bhv = z_bhv - (e_bhk[..., None, :] @ state)[..., 0, :]
    state = state + k_bhk[..., None] * z_bhv[..., None, :]
    return (q_bhk[:, None, :, None, :] * scale @ state[:, None])[..., 0, :], state


class _Forward(Function):
    """Outputs, last state, and what the backward pass would be slow to compute again."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        erase: Tensor | None,
        write: Tensor | None,
        initial_state: Tensor,
        scale: float,
    ) -> tuple[Tensor, ...]:
        return _forward(q, k, v, log_decay, erase, write, initial_state, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, scale = inputs
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*tensors[:-1], *output[2:])
        ctx.scale = scale

    @staticmethod
    def backward(ctx: Any, grad_o: Tensor, grad_state: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grads = _Backward.apply(*ctx.saved_tensors, grad_o, grad_state, ctx.scale)
        gates = ctx.saved_tensors[3:6]
        optional = iter(grads[4:])
        return *grads[:3], *(None if gate is None else next(optional) for gate in gates), grads[3], None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], Any]:
        return _fold_replicas(_Forward, info.batch_size, in_dims, args)


class _Backward(Function):
    """The gradient as a function of its own, so that vmap over grad folds replicas too."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError("gated_memory: second derivatives need backend='reference'")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], Any]:
        return _fold_replicas(_Backward, info.batch_size, in_dims, args)


def _fold_replicas(
    function: type[Function], replicas: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """Run ``function`` with the replicas on the batch axis, which is the first of every tensor."""
    *tensors, scale = args
    return unfold(replicas, function.apply(*fold(replicas, in_dims[:-1], tensors), scale))


class _Chunks(NamedTuple):
    """The inputs, chunk by chunk."""

    rows_nrk: Tensor  # scaled queries, then (if there is an erase gate) erase vectors
    keys_nck: Tensor
    values_ncv: Tensor  # gated by write
    decay: Decay | None


def _split(T: int) -> tuple[int, int]:
    """Return the number of chunks and the tokens in each: as equal as can be, so that padding is rare."""
    J = max(1, -(-T // CHUNK))
    return J, max(1, -(-T // J))


def _view(x: Tensor, J: int, C: int) -> Tensor:
    """View [B,T,H] or [B,T,H,D] as [J,B,H,C,1 or D]; tokens beyond T are 0 (and then it is a copy)."""
    if x.dim() == 3:
        x = x[..., None]
    B, T, H, D = x.shape
    if T < J * C:
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, J * C - T))
    return x.reshape(B, J, C, H, D).permute(1, 0, 3, 2, 4)


def _flat(x_jbhcd: Tensor, dtype: torch.dtype) -> Tensor:
    return x_jbhcd.to(dtype=dtype, memory_format=torch.contiguous_format).reshape(-1, *x_jbhcd.shape[3:])


def _unflat(x_ncd: Tensor, like: Tensor, J: int) -> Tensor:
    """Bring [n,C,D] to the shape of ``like``, [B,T,H,D]; or [B,T,H], then channels are summed."""
    B, T, H = like.shape[:3]
    if like.dim() == 3:
        x_ncd = x_ncd.sum(-1, keepdim=True)
    C, D = x_ncd.shape[1:]
    x = x_ncd.view(J, B, H, C, D).permute(1, 0, 3, 2, 4).reshape(B, J * C, H, D)[:, :T]
    return x.reshape(like.shape).to(like.dtype)


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase: Tensor | None,
    write: Tensor | None,
    scale: float,
) -> _Chunks:
    B, T, H, K = k.shape
    J, C = _split(T)
    R = C if erase is None else 2 * C
    rows = torch.empty(J, B, H, R, K, dtype=k.dtype, device=k.device)
    torch.mul(_view(q, J, C), scale, out=rows[..., :C, :])
    k_chunks = _view(k, J, C)
    if erase is not None:
        torch.mul(k_chunks, _view(erase, J, C), out=rows[..., C:, :])
    z_chunks = _view(v, J, C)
    if write is not None:
        z_chunks = z_chunks * _view(write, J, C)
    decay = None
    if log_decay is not None:
        log_chunks = _flat(_view(log_decay, J, C), torch.float64)
        decay = decay_of(log_chunks, per_channel=log_decay.dim() == 4, dtype=k.dtype)
    return _Chunks(rows.view(-1, R, K), _flat(k_chunks, k.dtype), _flat(z_chunks, k.dtype), decay)


def _decayed(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _chunk_transition(key_end_nck: Tensor, y_nck: Tensor, decay: Decay | None) -> Tensor:
    """Return M = diag(d) - K''^T Y of every chunk."""
    m_nkk = torch.bmm(key_end_nck.transpose(1, 2), y_nck).neg_()
    m_nkk.diagonal(dim1=1, dim2=2).add_(1.0 if decay is None else decay.total_nx)
    return m_nkk


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase: Tensor | None,
    write: Tensor | None,
    initial_state: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    B, T, H, K = k.shape
    V = v.shape[-1]
    J, C = _split(T)
    X, N = B * H, J * B * H
    rows, keys, values, decay = _prepare(q, k, v, log_decay, erase, write, scale)
    start, end = (None, None) if decay is None else (decay.start_ncx, decay.end_ncx)
    pairs = scores(rows, keys, decay)
    # Two stacks, so that one product gives the outputs: O = [Q' P] [S; R].
    reads_ncm = torch.cat([_decayed(rows[:, :C], start), pairs[:, :C].tril().to(keys.dtype)], -1)
    sources_nmv = torch.empty(N, K + C, V, dtype=keys.dtype, device=keys.device)
    states = sources_nmv.view(J, X, K + C, V)[:, :, :K]
    state = initial_state.reshape(X, K, V)
    key_end = _decayed(keys, end).transpose(1, 2)
    saved = [reads_ncm, sources_nmv]
    if erase is None:
        sources_nmv[:, K:] = values
        added = torch.bmm(key_end, values).view(J, X, K, V)
        kept = None if decay is None else decay.total_nx.view(J, X, -1, 1)
        for j in range(J):
            states[j] = state
            state = added[j] + (state if kept is None else kept[j] * state)
    else:
        inverse_ncs = unit_lower_inverse(pairs[:, C:].double()).to(keys.dtype)
        saved.append(inverse_ncs)
        y_nck = torch.bmm(inverse_ncs, _decayed(rows[:, C:], start))
        u_ncv = torch.bmm(inverse_ncs, values)
        m = _chunk_transition(_decayed(keys, end), y_nck, decay).view(J, X, K, K)
        added = torch.bmm(key_end, u_ncv).view(J, X, K, V)
        for j in range(J):
            states[j] = state
            state = torch.baddbmm(added[j], m[j], state)
        sources_nmv[:, K:] = u_ncv.baddbmm_(y_nck, sources_nmv[:, :K], alpha=-1)
    o = _unflat(torch.bmm(reads_ncm, sources_nmv), v, J)
    # Saved tensors get the batch axis first: that is the axis that replicas are folded into.
    views = (x.view(J, B, H, *x.shape[1:]).transpose(0, 1) for x in saved)
    return o, state.reshape(B, H, K, V).clone(), *views


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase: Tensor | None,
    write: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """Return the gradients of q, k, v, the initial state, and of the gates that are there."""
    *saved, grad_o, grad_state, scale = rest
    B, T, H, K = k.shape
    V = v.shape[-1]
    J, C = _split(T)
    X, N = B * H, J * B * H
    reads_ncm, sources_nmv, *inverse = (x.transpose(0, 1).reshape(N, *x.shape[3:]) for x in saved)
    rows, keys, _, decay = _prepare(q, k, v, log_decay, erase, write, scale)
    start, end = (None, None) if decay is None else (decay.start_ncx, decay.end_ncx)
    key_end = _decayed(keys, end)
    grad_o_ncv = _flat(_view(grad_o, J, C), keys.dtype)
    grad_sources = torch.bmm(reads_ncm.transpose(1, 2), grad_o_ncv)
    read_states, read_tokens = grad_sources[:, :K], grad_sources[:, K:]
    grad_next = torch.empty(J, X, K, V, dtype=keys.dtype, device=keys.device)
    grad = grad_state.reshape(X, K, V)
    if erase is None:
        read_states = read_states.reshape(J, X, K, V)
        kept = None if decay is None else decay.total_nx.view(J, X, -1, 1)
        for j in reversed(range(J)):
            grad_next[j] = grad
            grad = read_states[j] + (grad if kept is None else kept[j] * grad)
    else:
        y_nck = torch.bmm(inverse[0], _decayed(rows[:, C:], start))
        m = _chunk_transition(key_end, y_nck, decay).view(J, X, K, K).transpose(2, 3)
        read_states = torch.baddbmm(read_states, y_nck.transpose(1, 2), read_tokens, alpha=-1).view(
            J, X, K, V
        )
        for j in reversed(range(J)):
            grad_next[j] = grad
            grad = torch.baddbmm(read_states[j], m[j], grad)
    grad_next_nkv = grad_next.view(N, K, V)
    grad_r = torch.baddbmm(read_tokens, key_end, grad_next_nkv)
    if erase is None:
        grad_z, grad_reads = grad_r, grad_o_ncv
    else:
        grad_z = torch.bmm(inverse[0].transpose(1, 2), grad_r)
        grad_reads = torch.cat([grad_o_ncv, -grad_z], 1)
    grad_reads = torch.bmm(grad_reads, sources_nmv.transpose(1, 2))
    grad_pairs = grad_reads[:, :, K:]
    grad_pairs[:, :C].tril_()
    grad_pairs[:, C:].tril_(-1)
    grad_rows, grad_keys = scores_backward(grad_pairs.contiguous(), rows, keys, decay)
    grad_rows += _decayed(
        grad_reads[:, :, :K].view(N, -1, C, K), start if start is None else start[:, None]
    ).view_as(rows)
    grad_end = _decayed(torch.bmm(sources_nmv[:, K:], grad_next_nkv.transpose(1, 2)), end)
    grad_keys += grad_end
    grads = {}
    if log_decay is not None:
        assert decay is not None
        grad_sum = (rows * grad_rows).view(N, -1, C, K).sum(1) - keys * grad_keys
        total = (sources_nmv[:, :K] * grad_next_nkv).sum(-1) * decay.total_nx
        grad_sum[:, -1] += (keys * grad_end).sum(1) + total
        if log_decay.dim() == 3:
            grad_sum = grad_sum.sum(-1, keepdim=True)
        grad_log = _unflat(grad_sum.flip(1).cumsum(1).flip(1), log_decay, J)
        grads["log_decay"] = grad_log.masked_fill_(log_decay < MIN_LOG_DECAY, 0.0)
    if erase is not None:
        grad_e = grad_rows[:, C:]
        grads["erase"] = _unflat(grad_e * keys, erase, J)
        grad_keys += grad_e * _flat(_view(erase, J, C), keys.dtype)
    if write is not None:
        grads["write"] = _unflat(grad_z * _flat(_view(v, J, C), keys.dtype), write, J)
        grad_z = grad_z * _flat(_view(write, J, C), keys.dtype)
    first = (
        _unflat(grad_rows[:, :C] * scale, q, J),
        _unflat(grad_keys, k, J),
        _unflat(grad_z, v, J),
        grad.reshape(B, H, K, V),
    )
    return *first, *grads.values()
