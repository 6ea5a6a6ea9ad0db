"""The LSTM with a token loop of few, in-place operations and a hand-derived gradient.

Axes: G replicas (size 1 outside ``torch.func.vmap``), B batch, T tokens, D channels. In the loop tokens come
first and the four gates are side by side, so that a token costs one matrix product: [T,G,B,4*D].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.folding import fold, unfold

State = tuple[Tensor, Tensor]


def lstm_fused(gates: Tensor, recurrent: Tensor, state: State) -> tuple[Tensor, State]:
    """Shapes and equations of :func:`kernels.lstm.lstm`."""
    if gates.shape[1] == 0:
        return torch.zeros_like(gates[:, :, 0]), state
    h, c, _, _ = _LSTM.apply(gates[None], recurrent[None], state[0][None], state[1][None])
    return h[0], (h[0, :, -1], c[0])


class _LSTM(torch.autograd.Function):
    """Gates [G,B,T,4,D], recurrent [G,4,D,D], h and c [G,B,D] to outputs, the last c, and saved buffers."""

    @staticmethod
    def forward(gates: Tensor, recurrent: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        G, B, T, _, D = gates.shape
        raw = gates.new_empty(T, G, B, 4, D).copy_(gates.permute(2, 0, 1, 3, 4)).flatten(3)
        weight = _side_by_side(recurrent)
        cells = gates.new_empty(T + 1, G, B, D)
        cells[0] = c
        hidden = gates.new_empty(T + 1, G, B, D)
        hidden[0] = h
        i, f, z, o = (x.unbind(0) for x in raw.split(D, -1))
        pairs = raw[..., : 2 * D].unbind(0)
        squashed = torch.empty_like(cells[0])
        c_t, h_t = cells.unbind(0), hidden.unbind(0)
        for t, raw_t in enumerate(raw.unbind(0)):
            raw_t.baddbmm_(h_t[t], weight)
            pairs[t].sigmoid_()
            z[t].tanh_()
            o[t].sigmoid_()
            torch.mul(f[t], c_t[t], out=c_t[t + 1])
            c_t[t + 1].addcmul_(i[t], z[t])
            torch.tanh(c_t[t + 1], out=squashed)
            torch.mul(o[t], squashed, out=h_t[t + 1])
        out = hidden[1:].permute(1, 2, 0, 3).contiguous()
        return out, cells[-1].clone(), raw.unflatten(3, (4, D)).movedim(0, 1), cells.movedim(0, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, recurrent, h, _ = inputs
        out, _, raw, cells = output
        ctx.mark_non_differentiable(raw, cells)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(recurrent, h, out, raw, cells)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, ...]:
        return _LSTMGradient.apply(*grads[:2], *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        """Fold the mapped axis into G."""
        return unfold(info.batch_size, _LSTM.apply(*fold(info.batch_size, in_dims, args)))


class _LSTMGradient(torch.autograd.Function):
    """A Function of its own, so that a vmap over a gradient folds as well."""

    @staticmethod
    def forward(
        d_out: Tensor | None,
        d_c: Tensor | None,
        recurrent: Tensor,
        h: Tensor,
        out: Tensor,
        raw: Tensor,
        cells: Tensor,
    ) -> tuple[Tensor, ...]:
        G, B, T, D = out.shape
        i, f, z, o = raw.movedim(1, 0).unbind(3)
        cells = cells.movedim(1, 0)
        squashed = torch.tanh(cells[1:])
        # Each local derivative lies where the gradient made from it will be written.
        d_raw = out.new_empty(T, G, B, 4, D)
        to_i, to_f, to_z, to_o = d_raw.unbind(3)
        torch.addcmul(i, i, i, value=-1, out=to_i).mul_(z)
        torch.addcmul(f, f, f, value=-1, out=to_f).mul_(cells[:-1])
        torch.addcmul(i, z * z, i, value=-1, out=to_z)
        torch.addcmul(o, o, o, value=-1, out=to_o).mul_(squashed)
        to_c = o * (1 - squashed.square_())
        from_c = d_raw[..., :3, :]
        dh_out = out.new_zeros(T, G, B, D) if d_out is None else d_out.permute(2, 0, 1, 3).contiguous()
        transposed = _side_by_side(recurrent).transpose(1, 2)
        dc = torch.zeros_like(h) if d_c is None else d_c.clone()
        flat = d_raw.flatten(3).unbind(0)
        dh = dh_out[T - 1]
        for t in range(T - 1, -1, -1):
            dc.addcmul_(dh, to_c[t])
            to_o[t].mul_(dh)
            from_c[t].mul_(dc[:, :, None])
            dc.mul_(f[t])
            if t > 0:
                dh = torch.baddbmm(dh_out[t - 1], flat[t], transposed)
        dh = torch.bmm(flat[0], transposed)
        before = torch.cat([h[:, :, None], out[:, :, :-1]], 2).flatten(1, 2)
        d_gates = d_raw.permute(1, 2, 0, 3, 4).contiguous()
        d_recurrent = torch.bmm(before.transpose(1, 2), d_gates.reshape(G, B * T, 4 * D))
        return d_gates, d_recurrent.unflatten(2, (4, D)).transpose(1, 2), dh, dc

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError("lstm has no second derivative; backend='reference' has")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        """Fold the mapped axis into G."""
        return unfold(info.batch_size, _LSTMGradient.apply(*fold(info.batch_size, in_dims, args)))


def _side_by_side(recurrent: Tensor) -> Tensor:
    """[G,4,D,D] to [G,D,4*D]."""
    return recurrent.transpose(1, 2).flatten(2)
