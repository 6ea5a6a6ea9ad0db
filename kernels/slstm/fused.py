"""The sLSTM with a token loop of few, in-place operations and a hand-derived gradient.

The loop does not carry (c, n, m) but the memory's mean y = c / n and the true log-normaliser L = m + log n.
With g = logsigmoid(f) the recurrence becomes

    A_t = L_{t-1} + g_t       a_t = sigmoid(i_t - A_t)                  (share of the new value in the mean)
    L_t = logaddexp(A_t, i_t) y_t = y_{t-1} + a_t (tanh(z_t) - y_{t-1})        h_t = sigmoid(o_t) y_t

which needs no stabiliser. m is carried along for the state alone. With incoming dh, dL and dy its adjoint is

    u_t = dy_t + sigmoid(o_t) dh_t + (1 - a_{t+1}) u_{t+1}
    l_{t-1} = (1 - a_t) (l_t - u_t (y_t - y_{t-1}))                     (l_T = dL)
    di_t = l_t - l_{t-1}      df_t = l_{t-1} sigmoid(-f_t)
    dz_t = u_t a_t (1 - tanh(z_t)^2)      do_t = dh_t y_t sigmoid(o_t) (1 - sigmoid(o_t))

where dh_t gathers the output's gradient and R applied to the four gate gradients of token t + 1.

Axes: G replicas (size 1 outside ``torch.func.vmap``), B batch, T tokens, H heads, K channels. In the loop
replicas are folded into heads, tokens come first and gates next, so that every operand is contiguous:
[T,4,G*H,B,K].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.folding import fold, unfold
from kernels.slstm.reference import State, empty_state


def slstm_fused(
    gates: Tensor, recurrent: Tensor, initial_state: State | None, compiled: bool
) -> tuple[Tensor, State]:
    """Shapes and equations of :func:`kernels.slstm`; ``compiled``: with the loops of ``numba_loops.py``."""
    B, T, _, H, K = gates.shape
    if T == 0:
        return gates.new_zeros(B, 0, H, K), initial_state or empty_state(gates, B, H, K)
    inputs = (gates, recurrent, *enter(gates, B, H, K, initial_state))
    out, y, log_n, m, _, _ = _SLSTM.apply(*(x[None] for x in inputs), compiled)
    # squeeze, for the gradient of x[0] is a copy into zeros
    out, y, log_n, m = (x.squeeze(0) for x in (out, y, log_n, m))
    return out, leave(out[:, -1], y, log_n, m)


def enter(like: Tensor, batch: int, heads: int, channels: int, initial_state: State | None) -> State:
    """The state (h, c, n, m) as the loops carry it: (h, y, log_n, m). None: the empty one, like ``like``."""
    if initial_state is None:
        h, y, _, m = empty_state(like, batch, heads, channels)
        return h, y, m, m
    h, c, n, m = initial_state
    seen = n != 0
    safe = torch.where(seen, n, 1)
    m = torch.where(seen, m, -torch.inf)
    return h, torch.where(seen, c / safe, 0), m + safe.log(), m


def leave(h: Tensor, y: Tensor, log_n: Tensor, m: Tensor) -> State:
    """Undo :func:`enter`."""
    n = torch.exp(log_n - m)
    return h, y * n, n, m


def run_forward(
    raw: Tensor, weight: Tensor, means: Tensor, h: Tensor, log_n: Tensor, m: Tensor
) -> tuple[Tensor, Tensor]:
    """The token loop.

    Args:
        raw: [T,4,H,B,K], the input pre-activations; overwritten by a, f, tanh(z), sigmoid(o).
        weight: [4*H,K,K].
        means: [T+1,H,B,K]; row 0 is the initial y, the rest is filled in.
        h, log_n, m: [H,B,K], before the first token.

    Returns:
        log_n and m after the last token.
    """
    h4 = h.expand(4, *h.shape).contiguous()
    h_flat, raw_flat = h4.flatten(0, 1), raw.flatten(1, 2).unbind(0)
    now, kept = torch.stack([log_n, m]), torch.empty_like(torch.stack([log_n, m]))
    (log_n, m), (log_kept, m_kept) = now.unbind(0), kept.unbind(0)
    slots = [raw[:, gate].unbind(0) for gate in range(4)]
    y = means.unbind(0)
    both = raw[:, 0::3].unbind(0)
    # bmm needs h once for each gate; out= does not broadcast, so its factors are repeated.
    o4, y4 = (x[:, None].expand(-1, 4, -1, -1, -1).unbind(0) for x in (raw[:, 3], means[1:]))
    for t, (pre, i, f, z) in enumerate(zip(raw_flat, *slots[:3], strict=True)):
        pre.baddbmm_(h_flat, weight)
        torch.add(now, F.logsigmoid(f), out=kept)
        torch.maximum(m_kept, i, out=m)
        torch.logaddexp(log_kept, i, out=log_n)
        i.sub_(log_kept)
        both[t].sigmoid_()
        z.tanh_()
        torch.lerp(y[t], z, i, out=y[t + 1])
        torch.mul(o4[t], y4[t], out=h4)
    return log_n, m


def run_backward(
    saved: Tensor,
    weight: Tensor,
    means: Tensor,
    h: Tensor,
    dh: Tensor,
    u: Tensor,
    l: Tensor,
    inject: Tensor | None,
) -> tuple[Tensor, ...]:
    """The adjoint loop: local derivatives of all tokens first, then what has to be sequential.

    Args:
        saved: [T,4,H,B,K], what :func:`run_forward` left in ``raw``.
        weight: [4*H,K,K].
        means: [T+1,H,B,K].
        h: [H,B,K], the output before the first token.
        dh: [T,H,B,K], gradient of the outputs.
        u, l: [H,B,K], gradients of the last y and log_n.
        inject: [T,2,H,B,K], what the gradient of the last m adds to those of i and f, or None.

    Returns:
        Gradients of the pre-activations [T,4,H,B,K], of the weight, and of the initial h, y and log_n
        [H,B,K].
    """
    a, f, z, o = saved.unbind(1)
    T = len(a)
    # Each local derivative lies where the gradient made from it will be written: fresh memory is dear.
    d_raw = torch.empty_like(saved)
    pull, to_f, to_z, to_o = d_raw.unbind(1)
    torch.sub(means[1:], means[:-1], out=pull)
    pull.addcmul_(pull, a, value=-1)
    torch.neg(f, out=to_f).sigmoid_()
    torch.mul(z, z, out=to_z)
    torch.addcmul(a, to_z, a, value=-1, out=to_z)
    torch.addcmul(o, o, o, value=-1, out=to_o).mul_(means[1:])
    back = torch.empty_like(saved[0])
    back_flat, transposed = back.flatten(0, 1), weight.transpose(1, 2)
    u, l, kept = u.clone(), l.clone(), torch.empty_like(l)
    lists = [x.unbind(0) for x in (dh, o, a, pull, to_f, to_z, to_o, d_raw.flatten(1, 2))]
    for t in range(T - 1, -1, -1):
        dh_t, o_t, a_t, di, df, dz, do, _ = (x[t] for x in lists)
        if t < T - 1:
            torch.bmm(lists[-1][t + 1], transposed, out=back_flat)
            dh_t = torch.sum(back, 0).add_(dh_t)
        do.mul_(dh_t)
        u.addcmul_(dh_t, o_t)
        dz.mul_(u)
        torch.addcmul(l, l, a_t, value=-1, out=kept)
        kept.addcmul_(u, di, value=-1)
        torch.sub(l, kept, out=di)
        df.mul_(kept)
        u.addcmul_(u, a_t, value=-1)
        l, kept = kept, l
        if inject is not None:
            d_raw[t, :2].add_(inject[t])
    torch.bmm(lists[-1][0], transposed, out=back_flat)
    d_weight = _weight_gradient(_outputs_before(saved, means, h).transpose(0, 1), d_raw)
    return d_raw, d_weight.flatten(0, 1), back.sum(0), u, l


def _outputs_before(saved: Tensor, means: Tensor, h: Tensor) -> Tensor:
    """h_{t-1} [T,H,B,K] of every token, from what :func:`run_forward` left."""
    before = torch.empty_like(means[1:])
    before[0] = h
    torch.mul(saved[:-1, 3], means[1:-1], out=before[1:])
    return before


def _stabiliser_gradient(i: Tensor, f: Tensor, dm: Tensor, m0: Tensor) -> tuple[Tensor, Tensor]:
    """How m_T = max(max_t (i_t + sum_{s>t} g_s), m_0 + sum_s g_s) hands its gradient to i, f and m_0."""
    g = F.logsigmoid(f)
    after = g.flip(0).cumsum(0).flip(0)
    candidates = torch.cat([(m0 + after[0])[None], i + after - g])
    winner = torch.zeros_like(candidates).scatter_(0, candidates.argmax(0, keepdim=True), dm[None])
    passed = winner.cumsum(0)[:-1]  # the gates after the winner are in its sum
    return torch.stack([winner[1:], passed * torch.sigmoid(-f)], 1), winner[0]


class _SLSTM(torch.autograd.Function):
    """Gates [G,B,T,4,H,K], recurrent [G,4,H,K,K] and state [G,B,H,K] to outputs, state and saved buffers."""

    @staticmethod
    def forward(
        gates: Tensor, recurrent: Tensor, h: Tensor, y: Tensor, log_n: Tensor, m: Tensor, compiled: bool
    ) -> tuple[Tensor, ...]:
        G, B, T, _, H, K = gates.shape
        raw = gates.new_empty(T, 4, G, H, B, K)
        raw.copy_(gates.permute(2, 3, 0, 4, 1, 5))
        means = gates.new_empty(T + 1, G, H, B, K)
        means[0] = y.transpose(1, 2)
        log_n, m = _loops(compiled)[0](
            raw.flatten(2, 3),
            _heads_first(recurrent),
            means.flatten(1, 2),
            *(x.transpose(1, 2).flatten(0, 1) for x in (h, log_n, m)),
        )
        out = torch.empty(G, B, T, H, K, dtype=gates.dtype, device=gates.device)
        torch.mul(raw[:, 3], means[1:], out=out.permute(2, 0, 3, 1, 4))
        ends = (x.unflatten(0, (G, H)).transpose(1, 2) for x in (means[-1].flatten(0, 1), log_n, m))
        return out, *ends, raw.movedim(2, 0), means.movedim(1, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[4:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], inputs[1], inputs[2], inputs[5], *output[4:])
        ctx.compiled = inputs[6]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_SLSTMGradient.apply(*grads[:4], *ctx.saved_tensors, ctx.compiled), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        """Fold the mapped axis into G."""
        folded = fold(info.batch_size, in_dims[:6], args[:6])
        return unfold(info.batch_size, _SLSTM.apply(*folded, args[6]))


class _SLSTMGradient(torch.autograd.Function):
    """A Function of its own, so that a vmap over a gradient folds as well."""

    @staticmethod
    def forward(
        d_out: Tensor | None,
        d_y: Tensor | None,
        d_log_n: Tensor | None,
        d_m: Tensor | None,
        gates: Tensor,
        recurrent: Tensor,
        h: Tensor,
        m: Tensor,
        raw: Tensor,
        means: Tensor,
        compiled: bool,
    ) -> tuple[Tensor, ...]:
        G, H = gates.shape[0], gates.shape[4]
        saved, means = raw.movedim(0, 2).flatten(2, 3), means.movedim(0, 1).flatten(1, 2)
        h0 = h.transpose(1, 2).flatten(0, 1)
        u, l, dm = (
            torch.zeros_like(means[0]) if x is None else x.transpose(1, 2).flatten(0, 1)
            for x in (d_y, d_log_n, d_m)
        )
        dh = torch.zeros_like(means[1:]) if d_out is None else _tokens_first(d_out)
        inject, d_m0 = None, None
        if d_m is not None:
            reads = _outputs_before(saved, means, h0) @ recurrent[:, 0].flatten(0, 1)
            i = _tokens_first(gates.select(3, 0)) + reads
            inject, d_m0 = _stabiliser_gradient(i, saved[:, 1], dm, m.transpose(1, 2).flatten(0, 1))
        d_raw, d_recurrent, d_h, u, l = _loops(compiled)[1](
            saved, _heads_first(recurrent), means, h0, dh, u, l, inject
        )
        d_gates = d_raw.unflatten(2, (G, H)).permute(2, 4, 0, 1, 3, 5)
        starts = (
            torch.zeros_like(h) if x is None else x.unflatten(0, (G, H)).transpose(1, 2)
            for x in (d_h, u, l, d_m0)
        )
        return d_gates, d_recurrent.unflatten(0, (4, G, H)).movedim(1, 0), *starts

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError("slstm has no second derivative; backend='reference' has")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        """Fold the mapped axis into G."""
        folded = fold(info.batch_size, in_dims[:10], args[:10])
        return unfold(info.batch_size, _SLSTMGradient.apply(*folded, args[10]))


def _loops(compiled: bool) -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., tuple[Tensor, ...]]]:
    """The forward and the backward token loop."""
    if compiled:
        from kernels.slstm import numba_loops

        return numba_loops.run_forward, numba_loops.run_backward
    return run_forward, run_backward


def _weight_gradient(before: Tensor, d_raw: Tensor) -> Tensor:
    """sum_t h_{t-1} x d_raw_t for h_{t-1} [G*H,T,B,K], d_raw [T,4,G*H,B,K]: [4,G*H,K,K].

    In pieces of some tokens, for a copy that stays in cache is cheaper than one of the whole gradient.
    """
    heads, T, B, K = before.shape
    gradient = before.new_zeros(4, heads, K, K)
    tokens = max(1, min(T, 2**16 // max(1, heads * B * K)))
    piece = before.new_empty(heads, tokens, B, K)
    for start in range(0, T, tokens):
        size = min(tokens, T - start)
        rows = before[:, start : start + size].flatten(1, 2).transpose(1, 2)
        for gate in range(4):
            piece[:, :size] = d_raw[start : start + size, gate].transpose(0, 1)
            gradient[gate].baddbmm_(rows, piece[:, :size].flatten(1, 2))
    return gradient


def _heads_first(recurrent: Tensor) -> Tensor:
    """[G,4,H,K,K] to [4*G*H,K,K]."""
    return recurrent.movedim(1, 0).flatten(0, 2)


def _tokens_first(x: Tensor) -> Tensor:
    """[G,B,T,H,K] to [T,G*H,B,K]."""
    return x.permute(2, 0, 3, 1, 4).contiguous().flatten(1, 2)
