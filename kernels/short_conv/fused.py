"""The static short convolution with a hand-derived gradient, one fused multiply-add pass a tap.

Axes: G replicas (size 1 outside ``torch.func.vmap``), B batch, T tokens, W width, D channels. Replicas have
their own axis rather than a share of D, so that a fleet is one call without a transposed copy of x.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.folding import fold, unfold


def short_conv_fused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: bool,
    initial_state: Tensor | None,
) -> Tensor:
    """The output of :func:`kernels.short_conv`; half precision is computed in fp32."""
    dtype = x.dtype
    work = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    tensors = (None if a is None else a.to(work)[None] for a in (x, weight, bias, initial_state))
    return _ShortConv.apply(*tensors, activation == "silu", residual)[0].squeeze(0).to(dtype)


def _shifted_sum(x: Tensor, weight: Tensor, state: Tensor | None) -> Tensor:
    """sum_j weight[:, j] * x_{t-j} for x [G,B,T,D], weight [G,W,D]."""
    T, W = x.shape[2], weight.shape[1]
    y = x * weight[:, 0, None, None]
    for j in range(1, W):
        tap = weight[:, j, None, None]
        if j < T:
            y[:, :, j:].addcmul_(x[:, :, : T - j], tap)
        if state is not None:
            old = min(j, T)  # the first tokens reach back into the state, whose row r is token r - (W - 1)
            y[:, :, :old].addcmul_(state[:, :, W - 1 - j : W - 1 - j + old], tap)
    return y


class _ShortConv(torch.autograd.Function):
    """x [G,B,T,D], weight [G,W,D], bias [G,D] or None, state [G,B,W-1,D] or None -> y [G,B,T,D]."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, silu: bool, residual: bool
    ) -> tuple[Tensor, Tensor | None]:
        y = _shifted_sum(x, weight, state)
        if bias is not None:
            y += bias[:, None, None]
        # The pre-activation is returned only because setup_context can save nothing but inputs and outputs.
        before = y if silu else None
        if silu:
            y = F.silu(y)
        if residual:
            y += x
        return y, before

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        x, weight, _, state, _, ctx.residual = inputs
        before = output[1]
        if before is not None:
            ctx.mark_non_differentiable(before)
        ctx.save_for_backward(x, weight, state, before)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        needs = tuple(ctx.needs_input_grad[:4])
        return *_ShortConvGradient.apply(dy, *ctx.saved_tensors, ctx.residual, needs), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        """Fold the mapped axis into G."""
        return unfold(
            info.batch_size, _ShortConv.apply(*fold(info.batch_size, in_dims[:4], args[:4]), *args[4:])
        )


class _ShortConvGradient(torch.autograd.Function):
    """A Function of its own, so that a vmap over a gradient folds as well."""

    @staticmethod
    def forward(
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        state: Tensor | None,
        before: Tensor | None,
        residual: bool,
        needs: tuple[bool, bool, bool, bool],
    ) -> tuple[Tensor | None, ...]:
        T, W = x.shape[2], weight.shape[1]
        dout = dy
        if before is not None:
            dy = torch.ops.aten.silu_backward(dy, before)
        dx = dy * weight[:, 0, None, None] if needs[0] else None
        dweight = torch.zeros_like(weight) if needs[1] else None
        dbias = dy.sum((1, 2)) if needs[2] else None
        dstate = torch.zeros_like(state) if state is not None and needs[3] else None
        product = torch.empty_like(x)
        for j in range(W):
            tap = weight[:, j, None, None]
            if dx is not None and 0 < j < T:
                dx[:, :, : T - j].addcmul_(dy[:, :, j:], tap)
            if dweight is not None and j < T:
                torch.mul(dy[:, :, j:], x[:, :, : T - j], out=product[:, :, j:])
                dweight[:, j] = product[:, :, j:].sum((1, 2))
            if state is not None and j > 0:
                old = min(j, T)
                rows = slice(W - 1 - j, W - 1 - j + old)
                if dweight is not None:
                    dweight[:, j] += (dy[:, :, :old] * state[:, :, rows]).sum((1, 2))
                if dstate is not None:
                    dstate[:, :, rows].addcmul_(dy[:, :, :old], tap)
        if dx is not None and residual:
            dx += dout
        return dx, dweight, dbias, dstate

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError("short_conv has no second derivative; backend='reference' has")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        """Fold the mapped axis into G."""
        return unfold(
            info.batch_size,
            _ShortConvGradient.apply(*fold(info.batch_size, in_dims[:5], args[:5]), *args[5:]),
        )
