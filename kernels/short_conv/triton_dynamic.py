"""The dynamic short convolution on a GPU: Triton kernels in an autograd function, safe under vmap.

Import this module only where Triton is installed. ``TRITON_INTERPRET=1``, set before Triton is imported, runs
the same kernels on CPU tensors (slowly).

Axes: G replicas (size 1 outside vmap), B sequences, T tokens, W lags, D channels, R ranks, Q groups of
channels, S states (B of them, or one a packed sequence).
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
    contiguous,
    device_of,
    filled,
    first_tokens,
    places_of,
    precision_of,
    silu_slope,
    state_gradient,
    total,
)
from kernels.short_conv.triton_dynamic_kernels import backward_kernel, forward_kernel

__all__ = ["dynamic_triton"]


def dynamic_triton(
    x: Tensor,
    z: Tensor | None,
    u: Tensor | None,
    filters: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    residual: bool,
    initial_state: Tensor | None,
    packing: Packing | None,
) -> Tensor:
    """The output of :func:`kernels.dynamic_short_conv`. Sums in fp32; deterministic.

    Width up to 8, rank up to 64, not fp64. Low-rank in 16 bits: products take 16-bit operands.
    """
    width = u.shape[1] if u is not None else filters.shape[2]  # type: ignore[union-attr]
    tensors = (x, z, u, filters, bias, initial_state, *places_of(packing, width))
    stacked = (None if a is None else a[None] for a in tensors)
    keep = activation == "silu" and torch.is_grad_enabled()
    return DynamicConv.apply(*stacked, activation == "silu", residual, keep)[0].squeeze(0)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a kernel is launched; chosen by :func:`launch_of`."""

    time_block: int
    """Tokens at a time, a power of two of at least 16."""
    channel_block: int
    """Channels a program, a power of two of at least 16."""
    tiles_a_run: int
    """Time blocks that one program walks through."""
    warps: int
    """Warps a program."""
    stages: int
    """Depth of Triton's software pipeline."""
    registers: int | None = None
    """Registers a thread at most, so that more programs fit on the chip; None: as many as there are."""
    sums: str
    """Precision of the products that sum dU and dz; see ``triton_products.py``."""


def launch_of(x: Tensor, backward: bool, held: int) -> Launch:
    """The settings: in 16 bits from a sweep on an H100, B4 T4096 D2048 W4 R16 (``kernels.gpu_check_conv``).

    Args:
        x: [G,B,T,D].
        backward: For the backward kernel.
        held: Sums that the backward keeps on chip for every channel, W times the padded rank; head-wise 0.
    """
    wide = x.element_size() == 2
    channels = 64 if wide else 32
    if backward and held > 0:
        channels = min(channels, max(16, 4096 // triton.next_power_of_2(held)))
    channels = min(channels, max(16, triton.next_power_of_2(x.shape[-1])))
    time = min(64 if backward and wide else 32, max(16, triton.next_power_of_2(x.shape[2])))
    return Launch(
        time_block=time,
        channel_block=channels,
        tiles_a_run=1024 // time,
        warps=4,
        stages=1,
        sums=precision_of(x, half=True),
    )


def held_by(u: Tensor | None) -> int:
    """W times the padded rank of u [G,R,W,D]; head-wise 0."""
    return 0 if u is None else u.shape[2] * padded(u.shape[1])


def padded(rank: int) -> int:
    """The block that holds the ranks: a power of two, at least the 16 that a matrix product needs."""
    return max(16, triton.next_power_of_2(rank))


class DynamicConv(torch.autograd.Function):
    """The tensors of :func:`dynamic_triton` with a leading G -> y and (``keep``) y before the activation."""

    @staticmethod
    def forward(
        x: Tensor,
        z: Tensor | None,
        u: Tensor | None,
        filters: Tensor | None,
        bias: Tensor | None,
        state: Tensor | None,
        pos: Tensor | None,
        seq: Tensor | None,
        head: Tensor | None,
        silu: bool,
        residual: bool,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        """Launch the forward kernel."""
        tensors = contiguous(x, z, u, filters, bias, state, pos, seq, head)
        x = tensors[0]
        y = torch.empty_like(x)
        before = torch.empty_like(x) if keep else x.new_empty(*x.shape[:3], 0)
        if y.numel() > 0:
            launch = launch_of(x, False, held_by(tensors[2]))
            grid, numbers, names = geometry(launch, *tensors)
            with device_of(x):
                forward_kernel[grid](
                    *filled(x, *tensors[:8]),
                    y,
                    before,
                    *numbers,
                    SILU=silu,
                    RESIDUAL=residual,
                    STORE=keep,
                    **names,
                )
        return y, before

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep the inputs and y before the activation."""
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[:9], output[1])
        ctx.silu, ctx.residual, _ = inputs[9:]

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        """Hand over to the backward's own function, which has a batching rule of its own."""
        grads = DynamicConvGradient.apply(dy, *ctx.saved_tensors, ctx.silu, ctx.residual)
        return *grads, None, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        """Fold the mapped axis into G."""
        size = info.batch_size
        return unfold(size, DynamicConv.apply(*fold(size, in_dims[:9], args[:9]), *args[9:]))


class DynamicConvGradient(torch.autograd.Function):
    """The gradient of y and what :class:`DynamicConv` kept -> gradients of x, z, u, filters, bias, state."""

    @staticmethod
    def forward(
        dy: Tensor,
        x: Tensor,
        z: Tensor | None,
        u: Tensor | None,
        filters: Tensor | None,
        bias: Tensor | None,
        state: Tensor | None,
        pos: Tensor | None,
        seq: Tensor | None,
        head: Tensor | None,
        before: Tensor,
        silu: bool,
        residual: bool,
    ) -> tuple[Tensor | None, ...]:
        """Launch the backward kernel, add up its partial sums."""
        dy, before, *tensors = contiguous(dy, before, x, z, u, filters, bias, state, pos, seq, head)
        x, z, u, filters, bias, state = tensors[:6]
        launch = launch_of(x, True, held_by(u))
        grid, numbers, names = geometry(launch, *tensors)
        G, B, T, D = x.shape
        runs = grid[0] // max(1, G * B)
        dx = torch.empty_like(x)

        def room(wanted: Tensor | None, *size: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
            return None if wanted is None else torch.empty(*size, dtype=dtype, device=x.device)

        W, R = names["W"], names["R"]
        dz = room(z, grid[1], G, B, T, R)
        du = room(u, G, B * runs, R, W, D)
        d_bias = room(bias, G, B * runs, W, D)
        d_filters = None
        if filters is not None:
            parts = triton.cdiv(D // names["Q"], names["SPAN"])
            exact = filters.dtype if parts == 1 else torch.float32
            d_filters = torch.empty(parts, *filters.shape, dtype=exact, device=x.device)
        if x.numel() > 0:
            with device_of(x):
                backward_kernel[grid](
                    *filled(x, *tensors[:8]), before, dy, dx,
                    *filled(dx, dz, du, d_filters, d_bias), *numbers,
                    SILU=silu, RESIDUAL=residual, SUMS=launch.sums, **names,
                )  # fmt: skip
        d_state = None
        if state is not None:
            d_state = state_gradient(
                first_slopes(dy, before if silu else None, head, W - 1),
                first_taps(x, z, u, filters, bias, head, W - 1),
            ).to(state.dtype)
        sums = (total(dz, 0, z), total(du, 1, u), total(d_filters, 0, filters), total(d_bias, 1, bias))
        return dx, *sums, d_state

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        """Nothing is kept: there is no second derivative."""

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Second derivatives are not implemented."""
        raise NotImplementedError("dynamic_short_conv has no second derivative; backend='reference' has")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        """Fold the mapped axis into G."""
        size = info.batch_size
        return unfold(size, DynamicConvGradient.apply(*fold(size, in_dims[:11], args[:11]), *args[11:]))


def geometry(
    launch: Launch,
    x: Tensor,
    z: Tensor | None,
    u: Tensor | None,
    filters: Tensor | None,
    bias: Tensor | None,
    state: Tensor | None,
    pos: Tensor | None,
    seq: Tensor | None,
    head: Tensor | None,
) -> tuple[tuple[int, int], tuple[int, ...], dict[str, Any]]:
    """The grid, the sizes and the compile-time arguments that both dynamic kernels take."""
    G, B, T, D = x.shape
    if u is not None:
        R, W, Q = u.shape[1], u.shape[2], 1
    else:
        assert filters is not None
        R, W, Q = 1, filters.shape[3], filters.shape[4]
    span = min(launch.channel_block, triton.next_power_of_2(D // Q))
    if u is not None:
        tiles = triton.cdiv(D, launch.channel_block)
    else:
        tiles = triton.cdiv(Q, launch.channel_block // span) * triton.cdiv(D // Q, span)
    run = launch.time_block * launch.tiles_a_run
    same = all(a is None or a.dtype == x.dtype for a in (z, u))
    names = {
        "D": D,
        "W": W,
        "R": R,
        "Q": Q,
        "BT": launch.time_block,
        "BD": launch.channel_block,
        "BR": padded(R),
        "SPAN": span,
        "LOW_RANK": u is not None,
        "HAS_WEIGHT": bias is not None,
        "HAS_STATE": state is not None,
        "PACKED": pos is not None,
        "PRECISION": precision_of(x, same),
        "num_warps": launch.warps,
        "num_stages": launch.stages,
    }
    if launch.registers is not None and x.is_cuda:
        names["maxnreg"] = launch.registers
    states = B if state is None else state.shape[1]
    return (G * B * triton.cdiv(T, run), tiles), (T, run, B, states), names


def first_slopes(dy: Tensor, before: Tensor | None, head: Tensor | None, rows: int) -> Tensor:
    """The gradient of the convolution, before the activation, at the first tokens: [G,S,P,D] in fp32."""
    dc = first_tokens(dy, head, rows).to(torch.float32)
    return dc if before is None else dc * silu_slope(first_tokens(before, head, rows).to(torch.float32))


def first_taps(
    x: Tensor,
    z: Tensor | None,
    u: Tensor | None,
    filters: Tensor | None,
    bias: Tensor | None,
    head: Tensor | None,
    rows: int,
) -> Tensor:
    """The taps of the first tokens: [G,S,P,W,D] in fp32."""
    if z is not None and u is not None:
        first = first_tokens(z, head, rows).to(torch.float32)
        taps = torch.einsum("gspr,grwd->gspwd", first, u.to(torch.float32))
    else:
        assert filters is not None
        taps = first_tokens(filters, head, rows).to(torch.float32)
        taps = taps.repeat_interleave(x.shape[3] // taps.shape[4], 4)
    return taps if bias is None else taps + bias[:, None, None].to(torch.float32)
