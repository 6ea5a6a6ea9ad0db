"""The dynamic short convolution as Triton kernels: one pass over x forward, one over x and dy backward.

A program owns a tile of channels and a run of tokens, which it walks through BT tokens at a time. The filters
of a token exist on chip only. Backward, the gradients of U and of the static taps stay on chip for the whole
run and leave it as one partial sum; that of z (or of filters whose group is wider than a tile) leaves one
partial sum a tile of channels. The partial sums are added up afterwards in a fixed order.

Axes: G replicas, B sequences a replica, N = G * B, T tokens, W lags, D channels, R ranks, Q groups of
channels. ``PACKED``: S sequences a replica lie one behind the other in one row of tokens (B = 1).
"""

# Triton knows tuples with +, but not unpacking; to mypy these are tuples that change their type
# ruff: noqa: RUF005
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_products import multiply


@triton.jit
def channels_of(
    tile, D: tl.constexpr, Q: tl.constexpr, BD: tl.constexpr, SPAN: tl.constexpr, LOW_RANK: tl.constexpr
):
    """The channels of a tile, whether they exist, and the groups they are in.

    For the head-wise form a tile is BD / SPAN whole groups (padded to SPAN channels), or a part of one group.
    """
    c = tl.arange(0, BD)
    if LOW_RANK:
        d = tile * BD + c
        inside = d < D
        group = c * 0
    else:
        tiles: tl.constexpr = (D // Q + SPAN - 1) // SPAN  # tiles a group
        group = (tile // tiles) * (BD // SPAN) + c // SPAN
        member = (tile % tiles) * SPAN + c % SPAN
        d = group * (D // Q) + member
        inside = (member < D // Q) & (group < Q)
    return d, inside, group


@triton.jit
def load_lag(
    x_ptr, state_ptr, home, r, left, pos, j: tl.constexpr, d, in_d,
    D: tl.constexpr, W: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """The rows j tokens back: from x, before the first token from the state (whose first row is ``home``)."""
    inside = (r < left) & (pos >= j)
    x = tl.load(x_ptr + (r - j)[:, None] * D + d[None, :], mask=inside[:, None] & in_d[None, :], other=0.0)
    x = x.to(tl.float32)
    if HAS_STATE and j > 0:
        before = (r < left) & (pos < j)
        old = state_ptr + (home + (W - 1 - j) + pos)[:, None] * D + d[None, :]
        x += tl.load(old, mask=before[:, None] & in_d[None, :], other=0.0).to(tl.float32)
    return x


@triton.jit
def load_ranks(z_ptr, r, inside, R: tl.constexpr, BR: tl.constexpr):
    """Rows of z in its own type, padded with zeros to BR ranks."""
    rr = tl.arange(0, BR)
    return tl.load(z_ptr + r[:, None] * R + rr[None, :], mask=inside[:, None] & (rr < R)[None, :], other=0.0)


@triton.jit
def taps_of(
    z, mixer, weight, filters_ptr, r, inside, j: tl.constexpr, group, in_d,
    W: tl.constexpr, Q: tl.constexpr, LOW_RANK: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The taps of lag j at rows r, [BT, BD]."""
    if LOW_RANK:
        taps = multiply(z, mixer, HALF, PRECISION)
    else:
        where = filters_ptr + r[:, None] * (W * Q) + j * Q + group[None, :]
        taps = tl.load(where, mask=inside[:, None] & in_d[None, :], other=0.0).to(tl.float32)
    if HAS_WEIGHT:
        taps += tl.load(weight, mask=in_d, other=0.0).to(tl.float32)[None, :]
    return taps


@triton.jit
def load_mixer(
    u_ptr, g, j: tl.constexpr, d, in_d,
    D: tl.constexpr, W: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, LOW_RANK: tl.constexpr,
):  # fmt: skip
    """Lag j's slice of U, [BR, BD] in its own type (zero for the head-wise form)."""
    u = 0.0
    if LOW_RANK:
        rr = tl.arange(0, BR)
        where = u_ptr + (g * R + rr)[:, None] * (W * D) + j * D + d[None, :]
        u = tl.load(where, mask=(rr < R)[:, None] & in_d[None, :], other=0.0)
    return u


@triton.jit
def slope_of(before):
    """Derivative of silu."""
    e = tl.exp(-tl.abs(before))
    s = tl.where(before > 0, 1.0, e) / (1.0 + e)
    return s * (1.0 + before * (1.0 - s))


@triton.jit(do_not_specialize=["T", "run", "B", "S"])
def forward_kernel(
    x_ptr,  # [N, T, D]
    z_ptr,  # [N, T, R]
    u_ptr,  # [G, R, W, D]
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
    R: tl.constexpr,
    Q: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    SPAN: tl.constexpr,
    LOW_RANK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr,
    SILU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    STORE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Make y = [x +] act(sum_j taps_j * x_{t-j})."""
    HALF: tl.constexpr = x_ptr.dtype.element_ty
    runs = tl.cdiv(T, run)
    n = (tl.program_id(0) // runs).to(tl.int64)
    first = (tl.program_id(0) % runs) * run
    g = n // B
    d, in_d, group = channels_of(tl.program_id(1), D, Q, BD, SPAN, LOW_RANK)
    weight_ptr += g * W * D
    mixers = ()
    for j in tl.static_range(W):
        mixers = mixers + (load_mixer(u_ptr, g, j, d, in_d, D, W, R, BR, LOW_RANK),)
    r = tl.arange(0, BT)
    for t in range(first, tl.minimum(first + run, T), BT):
        row = n * T + t
        left = T - t
        inside = r < left
        if PACKED:
            pos = tl.load(pos_ptr + row + r, mask=inside, other=0)
            home = (g * S + tl.load(seq_ptr + row + r, mask=inside, other=0)) * (W - 1)
        else:
            pos = t + r
            home = n * (W - 1)
        z = 0.0
        if LOW_RANK:
            z = load_ranks(z_ptr + row * R, r, inside, R, BR)
        x = load_lag(x_ptr + row * D, state_ptr, home, r, left, pos, 0, d, in_d, D, W, HAS_STATE)
        filters = filters_ptr + row * (W * Q)
        y = x * taps_of(
            z, mixers[0], weight_ptr + d, filters, r, inside, 0, group, in_d,
            W, Q, LOW_RANK, HAS_WEIGHT, HALF, PRECISION,
        )  # fmt: skip
        for j in tl.static_range(1, W):
            old = load_lag(x_ptr + row * D, state_ptr, home, r, left, pos, j, d, in_d, D, W, HAS_STATE)
            y += old * taps_of(
                z, mixers[j], weight_ptr + j * D + d, filters, r, inside, j, group, in_d,
                W, Q, LOW_RANK, HAS_WEIGHT, HALF, PRECISION,
            )  # fmt: skip
        where = row * D + r[:, None] * D + d[None, :]
        mask = inside[:, None] & in_d[None, :]
        if SILU:
            if STORE:
                tl.store(before_ptr + where, y.to(before_ptr.dtype.element_ty), mask=mask)
            e = tl.exp(-tl.abs(y))
            y *= tl.where(y > 0, 1.0, e) / (1.0 + e)
        if RESIDUAL:
            y += x
        tl.store(y_ptr + where, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_upstream(dy_ptr, before_ptr, r, mask_r, d, in_d, D: tl.constexpr, SILU: tl.constexpr):
    """Gradients of y and of the convolution (before the activation) at rows r, zeros outside the mask."""
    mask = mask_r[:, None] & in_d[None, :]
    where = r[:, None] * D + d[None, :]
    dy = tl.load(dy_ptr + where, mask=mask, other=0.0).to(tl.float32)
    dc = dy
    if SILU:
        dc = dy * slope_of(tl.load(before_ptr + where, mask=mask, other=0.0).to(tl.float32))
    return dy, dc


@triton.jit(do_not_specialize=["T", "run", "B", "S"])
def backward_kernel(
    x_ptr,  # [N, T, D]
    z_ptr,  # [N, T, R]
    u_ptr,  # [G, R, W, D]
    filters_ptr,  # [N, T, W, Q]
    weight_ptr,  # [G, W, D]
    state_ptr,  # [G, S, W-1, D]
    pos_ptr,  # [N, T] int32
    seq_ptr,  # [N, T] int32
    before_ptr,  # [N, T, D]
    dy_ptr,  # [N, T, D]
    dx_ptr,  # [N, T, D]
    dz_ptr,  # [tiles, N, T, R] fp32
    du_ptr,  # [N, runs, R, W, D] fp32
    d_filters_ptr,  # [tiles of a group, N, T, W, Q]
    d_weight_ptr,  # [N, runs, W, D] fp32
    T,
    run,
    B,
    S,
    D: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    Q: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    SPAN: tl.constexpr,
    LOW_RANK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr,
    SILU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
    SUMS: tl.constexpr,
):
    """All gradients but the state's. ``SUMS`` is the precision of the products that give dU and dz."""
    HALF: tl.constexpr = x_ptr.dtype.element_ty
    TILES: tl.constexpr = (D // Q + SPAN - 1) // SPAN  # tiles a group
    runs = tl.cdiv(T, run)
    tile = tl.program_id(1)
    n = (tl.program_id(0) // runs).to(tl.int64)
    first = (tl.program_id(0) % runs) * run
    g = n // B
    N = tl.num_programs(0) // runs
    d, in_d, group = channels_of(tile, D, Q, BD, SPAN, LOW_RANK)
    weight_ptr += g * W * D
    d_mixers = ()
    d_weights = ()
    for _lag in tl.static_range(W):
        d_mixers = d_mixers + (tl.zeros((BR, BD if LOW_RANK else 1), tl.float32),)
        d_weights = d_weights + (tl.zeros((BD if HAS_WEIGHT and not LOW_RANK else 1,), tl.float32),)
    # row j: the sum of what lag j gives to its static taps, by a product with a row of ones
    d_static = tl.zeros((16, BD if HAS_WEIGHT and LOW_RANK else 1), tl.float32)
    lags = tl.arange(0, 16)
    r = tl.arange(0, BT)
    rr = tl.arange(0, BR)
    for t in range(first, tl.minimum(first + run, T), BT):
        row = n * T + t
        left = T - t
        inside = r < left
        if PACKED:
            pos = tl.load(pos_ptr + row + r, mask=inside, other=0)
            home = (g * S + tl.load(seq_ptr + row + r, mask=inside, other=0)) * (W - 1)
        else:
            pos = t + r
            home = n * (W - 1)
        z = 0.0
        if LOW_RANK:
            z = load_ranks(z_ptr + row * R, r, inside, R, BR)
            dz = tl.zeros((BT, BR), tl.float32)
        filters = filters_ptr + row * (W * Q)
        dy, dc = load_upstream(dy_ptr + row * D, before_ptr + row * D, r, inside, d, in_d, D, SILU)
        mixer = load_mixer(u_ptr, g, 0, d, in_d, D, W, R, BR, LOW_RANK)
        taps = taps_of(
            z, mixer, weight_ptr + d, filters, r, inside, 0, group, in_d,
            W, Q, LOW_RANK, HAS_WEIGHT, HALF, PRECISION,
        )  # fmt: skip
        dx = dc * taps
        if RESIDUAL:
            dx += dy
        sums_u = ()
        sums_w = ()
        for j in tl.static_range(W):
            # loaded anew, for all W slices and the sums over the run do not fit in registers
            mixer = load_mixer(u_ptr, g, j, d, in_d, D, W, R, BR, LOW_RANK)
            # what lag j gives to its taps: dc_t x_{t-j}
            p = dc * load_lag(x_ptr + row * D, state_ptr, home, r, left, pos, j, d, in_d, D, W, HAS_STATE)
            if HAS_WEIGHT and not LOW_RANK:
                sums_w = sums_w + (d_weights[j] + tl.sum(p, 0),)
            else:
                sums_w = sums_w + (d_weights[j],)
            if HAS_WEIGHT and LOW_RANK:
                ones = tl.where((lags == j)[:, None] & (r >= 0)[None, :], 1.0, 0.0)
                d_static += multiply(ones, p, HALF, SUMS)
            if LOW_RANK:
                sums_u = sums_u + (d_mixers[j] + multiply(tl.trans(z), p, HALF, SUMS),)
                dz += multiply(p, tl.trans(mixer), HALF, SUMS)
            else:
                sums_u = sums_u + (d_mixers[j],)
                total = tl.sum(tl.reshape(p, (BT, BD // SPAN, SPAN)), 2)
                q = (tile // TILES) * (BD // SPAN) + tl.arange(0, BD // SPAN)
                part = (tile % TILES) * (N * T) + row
                where = (part + r)[:, None] * (W * Q) + j * Q + q[None, :]
                total = total.to(d_filters_ptr.dtype.element_ty)
                tl.store(d_filters_ptr + where, total, mask=inside[:, None] & (q < Q)[None, :])
            # what token t + j hands back to token t
            if j > 0:
                later = r + j < left
                if PACKED:
                    later = later & (tl.load(pos_ptr + row + j + r, mask=later, other=0) >= j)
                z_later = 0.0
                if LOW_RANK:
                    z_later = load_ranks(z_ptr + (row + j) * R, r, later, R, BR)
                up = (row + j) * D
                _, dc_later = load_upstream(dy_ptr + up, before_ptr + up, r, later, d, in_d, D, SILU)
                dx += dc_later * taps_of(
                    z_later, mixer, weight_ptr + j * D + d, filters + j * (W * Q), r, later, j, group, in_d,
                    W, Q, LOW_RANK, HAS_WEIGHT, HALF, PRECISION,
                )  # fmt: skip
        d_mixers = sums_u
        d_weights = sums_w
        where = row * D + r[:, None] * D + d[None, :]
        tl.store(dx_ptr + where, dx.to(dx_ptr.dtype.element_ty), mask=inside[:, None] & in_d[None, :])
        if LOW_RANK:
            where = (tile.to(tl.int64) * N * T + row + r)[:, None] * R + rr[None, :]
            tl.store(dz_ptr + where, dz, mask=inside[:, None] & (rr < R)[None, :])
    part = tl.program_id(0).to(tl.int64)  # n * runs + run
    for j in tl.static_range(W):
        if LOW_RANK:
            where = (part * R + rr)[:, None] * (W * D) + j * D + d[None, :]
            tl.store(du_ptr + where, d_mixers[j], mask=(rr < R)[:, None] & in_d[None, :])
        if HAS_WEIGHT and not LOW_RANK:
            tl.store(d_weight_ptr + (part * W + j) * D + d, d_weights[j], mask=in_d)
    if HAS_WEIGHT and LOW_RANK:
        where = (part * W + lags)[:, None] * D + d[None, :]
        tl.store(d_weight_ptr + where, d_static, mask=(lags < W)[:, None] & in_d[None, :])
