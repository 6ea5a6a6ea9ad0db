"""The head-wise dynamic convolution as Triton kernels: one pass over the data forward, one backward.

A program owns a tile of channels and a run of tokens, which it walks through BT tokens at a time. A tile is
BD / SPAN whole groups of channels (padded to SPAN channels), or a part of one group; the gradient of filters
whose group is wider than a tile leaves as one partial sum a tile. The gradient of the static taps stays on
chip for the whole run and leaves it as one partial sum. ``sum_kernel`` adds them up in a fixed order.

Axes: G replicas, B sequences a replica, N = G * B, T tokens, W lags, D channels, Q groups of channels.
"""

# Triton knows tuples with +, but not unpacking; to mypy these are tuples that change their type
# ruff: noqa: RUF005
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from kernels.short_conv.triton_tiles import finish, load_lag, load_upstream, locate, slope


@triton.jit
def channels_of(tile, c, D: tl.constexpr, Q: tl.constexpr, BD: tl.constexpr, SPAN: tl.constexpr):
    """The channels at places c of a tile, whether they exist, and the groups they are in."""
    tiles: tl.constexpr = (D // Q + SPAN - 1) // SPAN  # tiles a group
    group = (tile // tiles) * (BD // SPAN) + c // SPAN
    member = (tile % tiles) * SPAN + c % SPAN
    return group * (D // Q) + member, (member < D // Q) & (group < Q), group


@triton.jit
def load_taps(filters_ptr, r, inside, j: tl.constexpr, group, W: tl.constexpr, Q: tl.constexpr):
    """Lag j's generated taps at rows r, [BT, BD / VEC]: one for each vector of channels, which share it."""
    mask = inside[:, None] & (group < Q)[None, :]
    return tl.load(filters_ptr + r[:, None] * (W * Q) + j * Q + group[None, :], mask=mask, other=0.0)


@triton.jit
def spread(taps, static, VEC: tl.constexpr):
    """Taps [BT, BD / VEC] plus the static ones [BD] for all channels, [BT, BD] in fp32."""
    taps = taps.to(tl.float32)[:, :, None] + tl.reshape(static, (1, taps.shape[1], VEC))
    return tl.reshape(taps, (taps.shape[0], taps.shape[1] * VEC))


@triton.jit
def load_static(weight_ptr, d, in_d, D: tl.constexpr, W: tl.constexpr, HAS_WEIGHT: tl.constexpr):
    """A tuple of the W static taps [BD] in fp32; zeros where there are none."""
    static = ()
    for j in tl.static_range(W):
        if HAS_WEIGHT:
            w = tl.load(weight_ptr + j * D + d, mask=in_d, other=0.0).to(tl.float32)
        else:
            w = tl.zeros_like(d).to(tl.float32)
        static = static + (w,)
    return static


@triton.jit(do_not_specialize=["T", "run", "B", "S"])
def forward_kernel(
    x_ptr,  # [N, T, D]
    filters_ptr,  # [N, T, W, Q]
    weight_ptr,  # [G, W, D]
    state_ptr,  # [G, S, W-1, D]
    pos_ptr,  # [N, T] int32: place of a token in its sequence
    seq_ptr,  # [N, T] int32: its sequence
    y_ptr,  # [N, T, D]
    before_ptr,  # [N, T, D]: y before the activation
    T,
    run,
    B,
    S,
    D: tl.constexpr,
    W: tl.constexpr,
    Q: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    SPAN: tl.constexpr,
    VEC: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr,
    SILU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    STORE: tl.constexpr,
):
    """Make y = [x +] act(sum_j taps_j * x_{t-j})."""
    TILES: tl.constexpr = (D // Q + SPAN - 1) // SPAN  # tiles a group
    GROUPS: tl.constexpr = (Q + BD // SPAN - 1) // (BD // SPAN)
    runs = tl.cdiv(T, run)
    tile = tl.program_id(0) % (TILES * GROUPS)  # neighbours in memory run at the same time
    part = tl.program_id(0) // (TILES * GROUPS)
    n = (part // runs).to(tl.int64)
    first = (part % runs) * run
    g = n // B
    d, in_d, _ = channels_of(tile, tl.arange(0, BD), D, Q, BD, SPAN)
    _, _, shared = channels_of(tile, tl.arange(0, BD // VEC) * VEC, D, Q, BD, SPAN)
    static = load_static(weight_ptr + g * W * D, d, in_d, D, W, HAS_WEIGHT)
    r = tl.arange(0, BT)
    for t in range(first, tl.minimum(first + run, T), BT):
        row = n * T + t
        left = T - t
        inside = r < left
        pos, home = locate(pos_ptr, seq_ptr, row + r, t + r, n, g, inside, S, W, PACKED)
        xs = ()
        taps = ()
        for j in tl.static_range(W):  # all on their way before the first is used
            x = load_lag(x_ptr + row * D, state_ptr, home, r, left, pos, j, d, in_d, D, W, HAS_STATE)
            xs = xs + (x,)
            taps = taps + (load_taps(filters_ptr + row * (W * Q), r, inside, j, shared, W, Q),)
        now = xs[0].to(tl.float32)
        y = now * spread(taps[0], static[0], VEC)
        for j in tl.static_range(1, W):
            y += xs[j].to(tl.float32) * spread(taps[j], static[j], VEC)
        where = row * D + r[:, None] * D + d[None, :]
        finish(y, now, y_ptr, before_ptr, where, inside[:, None] & in_d[None, :], SILU, RESIDUAL, STORE)


@triton.jit(do_not_specialize=["T", "run", "B", "S"])
def backward_kernel(
    x_ptr,  # [N, T, D]
    filters_ptr,  # [N, T, W, Q]
    weight_ptr,  # [G, W, D]
    state_ptr,  # [G, S, W-1, D]
    pos_ptr,  # [N, T] int32
    seq_ptr,  # [N, T] int32
    before_ptr,  # [N, T, D]
    dy_ptr,  # [N, T, D]
    dx_ptr,  # [N, T, D]
    d_filters_ptr,  # [tiles of a group, N, T, W, Q]
    d_weight_ptr,  # [N, runs, W, D] fp32
    T,
    run,
    B,
    S,
    D: tl.constexpr,
    W: tl.constexpr,
    Q: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    SPAN: tl.constexpr,
    VEC: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr,
    SILU: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """All gradients but the state's."""
    TILES: tl.constexpr = (D // Q + SPAN - 1) // SPAN  # tiles a group
    GROUPS: tl.constexpr = (Q + BD // SPAN - 1) // (BD // SPAN)
    runs = tl.cdiv(T, run)
    tile = tl.program_id(0) % (TILES * GROUPS)  # neighbours in memory run at the same time
    part = tl.program_id(0) // (TILES * GROUPS)  # n * runs + run
    n = (part // runs).to(tl.int64)
    first = (part % runs) * run
    g = n // B
    N = tl.num_programs(0) // (TILES * GROUPS) // runs
    d, in_d, _ = channels_of(tile, tl.arange(0, BD), D, Q, BD, SPAN)
    _, _, shared = channels_of(tile, tl.arange(0, BD // VEC) * VEC, D, Q, BD, SPAN)
    q = (tile // TILES) * (BD // SPAN) + tl.arange(0, BD // SPAN)
    static = load_static(weight_ptr + g * W * D, d, in_d, D, W, HAS_WEIGHT)
    sums = ()
    for _lag in tl.static_range(W):
        sums = sums + (tl.zeros((BT, BD if HAS_WEIGHT else 1), tl.float32),)
    r = tl.arange(0, BT)
    for t in range(first, tl.minimum(first + run, T), BT):
        row = n * T + t
        left = T - t
        inside = r < left
        pos, home = locate(pos_ptr, seq_ptr, row + r, t + r, n, g, inside, S, W, PACKED)
        xs = ()
        ups = ()
        taps = ()
        for j in tl.static_range(W):  # all on their way before the first is used
            x = load_lag(x_ptr + row * D, state_ptr, home, r, left, pos, j, d, in_d, D, W, HAS_STATE)
            later = r + j < left
            if PACKED:
                later = later & (tl.load(pos_ptr + row + j + r, mask=later, other=0) >= j)
            up = (row + j) * D
            xs = xs + (x,)
            ups = ups + (load_upstream(dy_ptr + up, before_ptr + up, r, later, d, in_d, D, SILU),)
            taps = taps + (load_taps(filters_ptr + (row + j) * (W * Q), r, later, j, shared, W, Q),)
        dc = slope(ups[0], SILU).to(tl.float32)
        dx = dc * spread(taps[0], static[0], VEC)
        if RESIDUAL:
            dx += ups[0][0].to(tl.float32)
        made = d_filters_ptr + ((tile % TILES) * (N * T) + row) * (W * Q)
        added = ()
        for j in tl.static_range(W):
            # what lag j gives to its taps: dc_t x_{t-j}
            p = dc * xs[j].to(tl.float32)
            added = added + (sums[j] + p if HAS_WEIGHT else sums[j],)
            total = tl.sum(tl.reshape(p, (BT, BD // SPAN, SPAN)), 2).to(d_filters_ptr.dtype.element_ty)
            where = made + r[:, None] * (W * Q) + j * Q + q[None, :]
            tl.store(where, total, mask=inside[:, None] & (q < Q)[None, :])
            # what token t + j hands back to token t
            if j > 0:
                dx += slope(ups[j], SILU).to(tl.float32) * spread(taps[j], static[j], VEC)
        sums = added
        where = row * D + r[:, None] * D + d[None, :]
        tl.store(dx_ptr + where, dx.to(dx_ptr.dtype.element_ty), mask=inside[:, None] & in_d[None, :])
    if HAS_WEIGHT:
        for j in tl.static_range(W):
            where = (part.to(tl.int64) * W + j) * D + d
            tl.store(d_weight_ptr + where, tl.sum(sums[j], 0), mask=in_d)
