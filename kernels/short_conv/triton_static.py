"""The static short convolution on a GPU: Triton kernels in an autograd function, safe under vmap.

Import this module only where Triton is installed. ``TRITON_INTERPRET=1``, set before Triton is imported, runs
the same kernels on CPU tensors (slowly).

Axes: G replicas (size 1 outside vmap), B sequences, T tokens, W lags, D channels, S states (B of them, or one
a packed sequence).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.folding import fold, unfold
from kernels.short_conv.packing import Packing
from kernels.short_conv.triton_common import (
    add_parts,
    contiguous,
    device_of,
    filled,
    first_tokens,
    places_of,
    silu_slope,
    state_gradient,
)
from kernels.short_conv.triton_static_kernels import backward_kernel, forward_kernel

__all__ = ["short_conv_triton"]


def short_conv_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: bool,
    initial_state: Tensor | None,
    packing: Packing | None,
) -> Tensor:
    """The output of :func:`kernels.short_conv`. Sums in fp32; deterministic; width up to 8, not fp64."""
    tensors = (x, weight, bias, initial_state, *places_of(packing, weight.shape[0]))
    stacked = (None if a is None else a[None] for a in tensors)
    return StaticConv.apply(*stacked, activation == "silu", residual).squeeze(0)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a kernel is launched; chosen by :func:`launch_of`."""

    channel_block: int
    """Channels a program, a power of two."""
    run: int
    """Tokens a program."""
    ahead: int
    """Rows loaded at once."""
    warps: int
    """Warps a program."""


def launch_of(x: Tensor, backward: bool) -> Launch:
    """The settings for x [G,B,T,D]: from a sweep on an H100, B4 T4096 D2048 (``kernels.gpu_check_conv``)."""
    width = max(32, triton.next_power_of_2(x.shape[-1]))
    if backward:
        return Launch(channel_block=min(128, width), run=128, ahead=4, warps=1)
    return Launch(channel_block=min(256, width), run=64, ahead=8, warps=1)


class StaticConv(torch.autograd.Function):
    """The tensors of :func:`short_conv_triton` with a leading G -> y."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor | None,
        pos: Tensor | None,
        seq: Tensor | None,
        head: Tensor | None,
        silu: bool,
        residual: bool,
    ) -> Tensor:
        """Launch the forward kernel."""
        tensors = contiguous(x, weight, bias, state, pos, seq, head)
        y = torch.empty_like(tensors[0])
        if y.numel() > 0:
            _, grid, numbers, names = geometry(launch_of(x, False), *tensors)
            with device_of(x):
                forward_kernel[grid](
                    *filled(y, *tensors[:6]), y, *numbers, SILU=silu, RESIDUAL=residual, **names
                )
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the inputs."""
        ctx.save_for_backward(*inputs[:7])
        ctx.silu, ctx.residual = inputs[7:]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Hand over to the backward's own function, which has a batching rule of its own."""
        grads = StaticConvGradient.apply(dy, *ctx.saved_tensors, ctx.silu, ctx.residual)
        return *grads, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        """Fold the mapped axis into G."""
        y = StaticConv.apply(*fold(info.batch_size, in_dims[:7], args[:7]), *args[7:])
        return y.unflatten(0, (info.batch_size, -1)), 0


class StaticConvGradient(torch.autograd.Function):
    """The gradient of y and the inputs of :class:`StaticConv` -> gradients of x, weight, bias, state."""

    @staticmethod
    def forward(
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor | None,
        pos: Tensor | None,
        seq: Tensor | None,
        head: Tensor | None,
        silu: bool,
        residual: bool,
    ) -> tuple[Tensor | None, ...]:
        """Launch the backward kernel, add up its partial sums."""
        dy, *tensors = contiguous(dy, x, weight, bias, state, pos, seq, head)
        x, weight, bias, state = tensors[:4]
        G, D = x.shape[0], x.shape[3]
        W = weight.shape[1]
        parts, grid, numbers, names = geometry(launch_of(x, True), *tensors)
        dx = torch.empty_like(x)
        d_weight = torch.empty(G, parts, W, D, dtype=torch.float32, device=x.device)
        d_bias = torch.empty(G, parts, D if bias is not None else 0, dtype=torch.float32, device=x.device)
        if x.numel() > 0:
            with device_of(x):
                backward_kernel[grid](
                    *filled(x, *tensors[:6]), dy, dx, d_weight, d_bias, *numbers,
                    SILU=silu, RESIDUAL=residual, **names,
                )  # fmt: skip
        d_state = None
        if state is not None:
            dc = first_tokens(dy, head, W - 1).to(torch.float32)
            if silu:
                dc = dc * silu_slope(first_outputs(x, weight, bias, state, head))
            d_state = state_gradient(dc, weight[:, None, None].to(torch.float32)).to(state.dtype)
        d_bias_sum = None if bias is None else add_parts(d_bias, bias.dtype)
        return dx, add_parts(d_weight, weight.dtype), d_bias_sum, d_state

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        """Nothing is kept: there is no second derivative."""

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Second derivatives are not implemented."""
        raise NotImplementedError("short_conv has no second derivative; backend='reference' has")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        """Fold the mapped axis into G."""
        size = info.batch_size
        return unfold(size, StaticConvGradient.apply(*fold(size, in_dims[:8], args[:8]), *args[8:]))


def geometry(
    launch: Launch,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    pos: Tensor | None,
    seq: Tensor | None,
    head: Tensor | None,
) -> tuple[int, tuple[int], tuple[int, ...], dict[str, Any]]:
    """Partial sums of a replica, grid, sizes and compile-time arguments of both kernels."""
    G, B, T, D = x.shape
    names = {
        "D": D,
        "W": weight.shape[1],
        "BD": launch.channel_block,
        "AHEAD": launch.ahead,
        "HAS_BIAS": bias is not None,
        "HAS_STATE": state is not None and weight.shape[1] > 1,
        "PACKED": pos is not None,
        "num_warps": launch.warps,
    }
    parts = B * triton.cdiv(T, launch.run)
    return (
        parts,
        (G * parts * triton.cdiv(D, launch.channel_block),),
        (T, launch.run, B, B if state is None else state.shape[1]),
        names,
    )


def first_outputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, head: Tensor | None
) -> Tensor:
    """The convolution, before the activation, at the first tokens of each sequence: [G,S,P,D] in fp32."""
    W = weight.shape[1]
    first = first_tokens(x, head, W - 1).to(torch.float32)
    rows = torch.cat([state.to(torch.float32), first], 2)
    y = torch.zeros_like(first) if bias is None else bias[:, None, None].to(torch.float32) + 0 * first
    for j in range(W):
        y = (
            y
            + weight[:, j, None, None].to(torch.float32) * rows[:, :, W - 1 - j : W - 1 - j + first.shape[2]]
        )
    return y
