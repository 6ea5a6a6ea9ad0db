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
from kernels.short_conv import triton_headwise_kernels, triton_lowrank_kernels
from kernels.short_conv.packing import Packing
from kernels.short_conv.reference import padded
from kernels.short_conv.triton_common import (
    add_parts,
    contiguous,
    device_of,
    filled,
    first_tokens,
    places_of,
    precision_of,
    silu_slope,
    state_gradient,
)

__all__ = ["dynamic_triton"]

SLICE = 32
"""Channels that the low-rank kernels take at a time."""
ENOUGH = 264
"""Programs that fill a GPU: runs of tokens are cut shorter until there are that many."""


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

    What it takes: ``reference.triton_refusal``. Low-rank in 16 bits: products take 16-bit operands.
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
    """Tokens at a time, a power of two, at least 16 (low-rank: 16 a warp)."""
    channels: int
    """Channels a program, a power of two of at least 16 (low-rank: of at least 32)."""
    run: int
    """Tokens that one program walks through, a multiple of ``time_block``."""
    warps: int
    """Warps a program."""
    registers: int | None = None
    """Registers a thread at most, so that more programs fit on the chip; None: as many as there are."""


def launch_of(x: Tensor, ranks: int, backward: bool) -> Launch:
    """The settings: from sweeps on an H100 (``kernels.gpu_bench_conv``).

    Args:
        x: [G,B,T,D].
        ranks: W times the padded number of ranks; 0 for the head-wise form.
        backward: For the backward kernel.
    """
    G, B, T, D = x.shape
    wide = x.element_size() == 2
    run = 1024
    if ranks > 0:
        channels, time, warps = (32, 64, 4) if wide else (32, 32, 2)
        if backward:
            run = 2048
        elif wide and D > 32:
            channels = 64
    elif wide:
        channels, time, warps = (64, 16, 2) if backward else (128, 16, 4)
        run = 256
    else:
        channels, time, warps = 32, 32, 4
    if ranks == 0:
        channels = min(channels, max(16, triton.next_power_of_2(D)))
    tiles = triton.cdiv(D, channels)
    while run > time and G * B * triton.cdiv(T, run) * tiles < ENOUGH:
        run //= 2
    return Launch(time_block=time, channels=channels, run=run, warps=warps)


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
        inputs = contiguous(x, z, u, filters, bias, state, pos, seq)
        x = inputs[0]
        y = torch.empty_like(x)
        before = torch.empty_like(x) if keep else x.new_empty(*x.shape[:3], 0)
        if y.numel() > 0:
            kernels, programs, pointers, numbers, names = call_of(False, *inputs)
            with device_of(x):
                kernels.forward_kernel[(programs[0] * programs[1],)](
                    *pointers, y, before, *numbers, SILU=silu, RESIDUAL=residual, STORE=keep, **names
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
        dy, before, *inputs = contiguous(dy, before, x, z, u, filters, bias, state, pos, seq)
        x, z, u, filters, bias, state = inputs[:6]
        kernels, programs, pointers, numbers, names = call_of(True, *inputs)
        G, B, T, D = x.shape
        dx = torch.empty_like(x)

        def room(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(*size, dtype=dtype, device=x.device)

        runs, W = programs[0] // max(1, G * B), names["W"]
        if u is not None:
            ranks = u.shape[1] + (bias is not None)
            parts = room(programs[1], G, B, T, u.shape[1]), room(G, B * runs, ranks, W, D)
        else:
            assert filters is not None
            tiles = triton.cdiv(D // names["Q"], names["SPAN"])  # of one group
            exact = filters.dtype if tiles == 1 else torch.float32
            parts = room(tiles, *filters.shape, dtype=exact), room(G, B * runs, W, 0 if bias is None else D)
        if x.numel() > 0:
            with device_of(x):
                kernels.backward_kernel[(programs[0] * programs[1],)](
                    *pointers, before, dy, dx, *parts, *numbers, SILU=silu, RESIDUAL=residual, **names
                )
        d_state = None
        if state is not None:
            d_state = state_gradient(
                first_slopes(dy, before if silu else None, head, W - 1),
                first_taps(x, z, u, filters, bias, head, W - 1),
            ).to(state.dtype)
        dz = du = d_filters = d_bias = None
        if u is not None and z is not None:
            dz = add_parts(parts[0][None], z.dtype)[0]
            du, d_bias = split_ranks(parts[1], u, bias)
        else:
            assert filters is not None
            d_filters = parts[0][0] if len(parts[0]) == 1 else add_parts(parts[0][None], filters.dtype)[0]
            d_bias = None if bias is None else add_parts(parts[1], bias.dtype)
        return dx, dz, du, d_filters, d_bias, d_state

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


def call_of(
    backward: bool,
    x: Tensor,
    z: Tensor | None,
    u: Tensor | None,
    filters: Tensor | None,
    bias: Tensor | None,
    state: Tensor | None,
    pos: Tensor | None,
    seq: Tensor | None,
) -> tuple[Any, tuple[int, int], list[Tensor], tuple[int, ...], dict[str, Any]]:
    """What a launch over contiguous inputs takes.

    Returns:
        Kernels, programs over tokens and over channels, first pointers, sizes, compile-time arguments.
    """
    G, B, T, D = x.shape
    launch = launch_of(x, 0 if u is None else u.shape[2] * padded(u.shape[1] + 2), backward)
    names: dict[str, Any] = {
        "D": D,
        "BT": launch.time_block,
        "HAS_WEIGHT": bias is not None,
        "HAS_STATE": state is not None,
        "PACKED": pos is not None,
        "num_warps": launch.warps,
        "num_stages": 1,
    }
    if u is not None:
        R, W = u.shape[1:3]
        names |= {
            "W": W,
            "R": R,
            "BR": padded(R + 2 * (bias is not None)),
            "SLICES": launch.channels // SLICE,
            "WARPS": launch.warps,
            "PRECISION": precision_of(x, all(a is None or a.dtype == x.dtype for a in (z, u))),
        }
        if backward:
            names["BZ"] = padded(R)
        kernels: Any = triton_lowrank_kernels
        pointers, tiles = filled(x, x, z, u, bias, state, pos, seq), triton.cdiv(D, launch.channels)
    else:
        assert filters is not None
        W, Q = filters.shape[3:]
        span = min(launch.channels, triton.next_power_of_2(D // Q))
        vector = min(span, 16 // x.element_size())  # 16 bytes
        names |= {"W": W, "Q": Q, "BD": launch.channels, "SPAN": span, "VEC": vector}
        kernels = triton_headwise_kernels
        pointers = filled(x, x, filters, bias, state, pos, seq)
        tiles = triton.cdiv(Q, launch.channels // span) * triton.cdiv(D // Q, span)
    if launch.registers is not None and x.is_cuda:
        names["maxnreg"] = launch.registers
    states = B if state is None else state.shape[1]
    programs = G * B * triton.cdiv(T, launch.run), tiles
    return kernels, programs, pointers, (T, launch.run, B, states), names


def split_ranks(parts: Tensor, u: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gradients of U and of the static taps from partial sums [G,P,R or R+1,W,D] of both."""
    if bias is None:
        return add_parts(parts, u.dtype), None
    both = add_parts(parts, u.dtype if u.dtype == bias.dtype else torch.float32)
    return both[:, :-1].to(u.dtype), both[:, -1].to(bias.dtype)


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
