"""The static short convolution as Triton kernels, each one pass over the data.

A program owns a vector of channels and a run of tokens. It walks through the tokens one by one with the last
W-1 rows of x (backward also the unfinished rows of dx) in registers, so that every row is loaded once;
``AHEAD`` rows are loaded before the first of them is used. Backward the run is followed by the W-1 tokens
that reach back into it. Weight gradients leave as one partial sum a run; those are added up in a fixed order.

Axes: G replicas, B sequences a replica, N = G * B, T tokens, W lags, D channels. ``PACKED``: S sequences a
replica lie one behind the other in one row of tokens (B = 1).
"""

# Triton knows tuples with +, but not unpacking; to mypy these are tuples that change their type
# ruff: noqa: RUF005
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from kernels.short_conv.triton_tiles import sigmoid


@triton.jit
def part_of(T, run, D: tl.constexpr, BD: tl.constexpr):
    """What a program owns: its part n * runs + run, the row n, the first token and the one after the last.

    Tiles of channels that are neighbours in memory run at the same time.
    """
    tiles: tl.constexpr = (D + BD - 1) // BD
    runs = tl.cdiv(T, run)
    part = tl.program_id(0) // tiles
    first = (part % runs) * run
    return part, (part // runs).to(tl.int64), first, tl.minimum(first + run, T)


@triton.jit
def channels_of(D: tl.constexpr, BD: tl.constexpr):
    """The channels of a program and whether they exist."""
    tiles: tl.constexpr = (D + BD - 1) // BD
    d = tl.program_id(0) % tiles * BD + tl.arange(0, BD)
    return d, d < D


@triton.jit
def locate(pos_ptr, seq_ptr, row, t, n, g, S, W: tl.constexpr, PACKED: tl.constexpr):
    """Place of the token ``row`` (number t of row n) in its sequence, and the first row of its state."""
    if PACKED:
        pos = tl.load(pos_ptr + row)
        home = (g * S + tl.load(seq_ptr + row)) * (W - 1)
    else:
        pos = t
        home = n * (W - 1)
    return pos, home


@triton.jit
def load_weights(weight_ptr, g, d, in_d, D: tl.constexpr, W: tl.constexpr):
    """A tuple of the W taps [BD]."""
    weights = ()
    for j in tl.static_range(W):
        w = tl.load(weight_ptr + (g * W + j) * D + d, mask=in_d, other=0.0).to(tl.float32)
        weights = weights + (w,)
    return weights


@triton.jit
def load_ahead(x_ptr, t, end, d, in_d, D: tl.constexpr, AHEAD: tl.constexpr):
    """A tuple of the next rows, zeros from ``end`` on."""
    rows = ()
    for i in tl.static_range(AHEAD):
        rows = rows + (tl.load(x_ptr + i * D + d, mask=in_d & (t + i + 0 * d < end), other=0.0),)
    return rows


@triton.jit
def load_window(
    x_ptr, state_ptr, home, pos, d, in_d, D: tl.constexpr, W: tl.constexpr, HAS_STATE: tl.constexpr
):
    """The rows 1 .. W-1 tokens back (W = 1: a row of zeros); before the first token those of the state."""
    window = ()
    for j in tl.static_range(1, W):
        here = pos + 0 * d >= j
        x = tl.load(x_ptr - j * D + d, mask=in_d & here, other=0.0).to(tl.float32)
        if HAS_STATE:
            row = home + (W - 1 - j) + pos
            x += tl.load(state_ptr + row * D + d, mask=in_d & (pos + 0 * d < j), other=0.0).to(tl.float32)
        window = window + (x,)
    if W == 1:
        window = window + (tl.zeros_like(d).to(tl.float32),)
    return window


@triton.jit
def restart(window, state_ptr, home, pos, d, in_d, D: tl.constexpr, W: tl.constexpr, HAS_STATE: tl.constexpr):
    """The window, or where a sequence starts its state."""
    fresh = ()
    first = pos + 0 * d == 0
    for j in tl.static_range(1, W):
        x = tl.where(first, 0.0, window[j - 1])
        if HAS_STATE:
            row = home + (W - 1 - j)
            x += tl.load(state_ptr + row * D + d, mask=in_d & first, other=0.0).to(tl.float32)
        fresh = fresh + (x,)
    if W == 1:
        fresh = window
    return fresh


@triton.jit
def convolve(x, window, weights, offset, W: tl.constexpr):
    """sum_j w_j x_{t-j} + offset."""
    y = x * weights[0] + offset
    for j in tl.static_range(1, W):
        y += window[j - 1] * weights[j]
    return y


@triton.jit
def shift(x, window, W: tl.constexpr):
    """The window of the next token."""
    moved = (x,)
    for j in tl.static_range(1, W - 1):
        moved = moved + (window[j - 1],)
    return moved


@triton.jit(do_not_specialize=["T", "run", "B", "S"])
def forward_kernel(
    x_ptr,  # [N, T, D]
    weight_ptr,  # [G, W, D]
    bias_ptr,  # [G, D]
    state_ptr,  # [G, S, W-1, D]
    pos_ptr,  # [N, T] int32: place of a token in its sequence
    seq_ptr,  # [N, T] int32: its sequence
    y_ptr,  # [N, T, D]
    T,
    run,
    B,
    S,
    D: tl.constexpr,
    W: tl.constexpr,
    BD: tl.constexpr,
    AHEAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr,
    SILU: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """Make y = [x +] act(sum_j w_j x_{t-j} + bias)."""
    _, n, first, end = part_of(T, run, D, BD)
    g = n // B
    d, in_d = channels_of(D, BD)
    weights = load_weights(weight_ptr, g, d, in_d, D, W)
    offset = tl.zeros((BD,), tl.float32)
    if HAS_BIAS:
        offset += tl.load(bias_ptr + g * D + d, mask=in_d, other=0.0).to(tl.float32)
    row = n * T + first
    pos, home = locate(pos_ptr, seq_ptr, row, first, n, g, S, W, PACKED)
    window = load_window(x_ptr + row * D, state_ptr, home, pos, d, in_d, D, W, HAS_STATE)
    for t in range(first, end, AHEAD):
        row = n * T + t
        rows = load_ahead(x_ptr + row * D, t, end, d, in_d, D, AHEAD)
        for i in tl.static_range(AHEAD):
            x = rows[i].to(tl.float32)
            if PACKED:
                token = tl.minimum(row + i, n * T + T - 1)
                pos, home = locate(pos_ptr, seq_ptr, token, first, n, g, S, W, PACKED)
                window = restart(window, state_ptr, home, pos, d, in_d, D, W, HAS_STATE)
            y = convolve(x, window, weights, offset, W)
            if SILU:
                y *= sigmoid(y)
            if RESIDUAL:
                y += x
            where = (row + i) * D + d
            tl.store(y_ptr + where, y.to(y_ptr.dtype.element_ty), mask=in_d & (t + i + 0 * d < end))
            window = shift(x, window, W)


@triton.jit(do_not_specialize=["T", "run", "B", "S"])
def backward_kernel(
    x_ptr,  # [N, T, D]
    weight_ptr,  # [G, W, D]
    bias_ptr,  # [G, D]
    state_ptr,  # [G, S, W-1, D]
    pos_ptr,  # [N, T] int32
    seq_ptr,  # [N, T] int32
    dy_ptr,  # [N, T, D]
    dx_ptr,  # [N, T, D]
    d_weight_ptr,  # [N, runs, W, D] fp32
    d_bias_ptr,  # [N, runs, D] fp32
    T,
    run,
    B,
    S,
    D: tl.constexpr,
    W: tl.constexpr,
    BD: tl.constexpr,
    AHEAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr,
    SILU: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """All gradients but the state's; the convolution itself is made again where the activation needs it."""
    part, n, first, end = part_of(T, run, D, BD)
    reach = tl.minimum(first + run + W - 1, T)
    g = n // B
    d, in_d = channels_of(D, BD)
    weights = load_weights(weight_ptr, g, d, in_d, D, W)
    offset = tl.zeros((BD,), tl.float32)
    if HAS_BIAS and SILU:
        offset += tl.load(bias_ptr + g * D + d, mask=in_d, other=0.0).to(tl.float32)
    row = n * T + first
    pos, home = locate(pos_ptr, seq_ptr, row, first, n, g, S, W, PACKED)
    window = load_window(x_ptr + row * D, state_ptr, home, pos, d, in_d, D, W, HAS_STATE)
    pending = ()  # dx of the rows 1 .. W-1 tokens back, as far as it is known
    sums = ()
    for _ in tl.static_range(W - 1 if W > 1 else 1):
        pending = pending + (tl.zeros((BD,), tl.float32),)
    for _ in tl.static_range(W):
        sums = sums + (tl.zeros((BD,), tl.float32),)
    d_bias = tl.zeros((BD,), tl.float32)
    for t in range(first, end + W - 1, AHEAD):
        row = n * T + t
        rows = load_ahead(x_ptr + row * D, t, reach, d, in_d, D, AHEAD)
        upstream = load_ahead(dy_ptr + row * D, t, reach, d, in_d, D, AHEAD)
        for i in tl.static_range(AHEAD):
            x = rows[i].to(tl.float32)
            dy = upstream[i].to(tl.float32)
            if PACKED:
                token = tl.minimum(row + i, n * T + T - 1)
                pos, home = locate(pos_ptr, seq_ptr, token, first, n, g, S, W, PACKED)
                window = restart(window, state_ptr, home, pos, d, in_d, D, W, HAS_STATE)
            dc = dy
            if SILU:
                before = convolve(x, window, weights, offset, W)
                s = sigmoid(before)
                dc = dy * s * (1.0 + before * (1.0 - s))
            done = dc * weights[0]
            if RESIDUAL:
                done += dy
            mine = tl.where(t + i + 0 * d < end, dc, 0.0)
            if HAS_BIAS:
                d_bias += mine
            added = (sums[0] + mine * x,)
            known = (done,)
            for j in tl.static_range(1, W):
                added = added + (sums[j] + mine * window[j - 1],)
                back = dc * weights[j]
                if PACKED:
                    back = tl.where(pos + 0 * d >= j, back, 0.0)
                done = pending[j - 1] + back
                if j < W - 1:
                    known = known + (done,)
            sums = added
            pending = known
            back_row = t + i - (W - 1) + 0 * d
            where = (row + i - (W - 1)) * D + d
            inside = in_d & (back_row >= first) & (back_row < end)
            tl.store(dx_ptr + where, done.to(dx_ptr.dtype.element_ty), mask=inside)
            window = shift(x, window, W)
    part = part.to(tl.int64)
    for j in tl.static_range(W):
        tl.store(d_weight_ptr + (part * W + j) * D + d, sums[j], mask=in_d)
    if HAS_BIAS:
        tl.store(d_bias_ptr + part * D + d, d_bias, mask=in_d)
