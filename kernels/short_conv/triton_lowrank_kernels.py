"""The low-rank dynamic convolution as Triton kernels: one pass over x forward, one over x and dy backward.

A program owns ``SLICES`` slices of 32 channels and a run of tokens, which it walks through BT tokens at a
time. The filters of a token exist on chip only, as the product of its ranks with the taps of a slice
(``FOLD``: the static taps are two more ranks, their value in 16 bits and what that rounds off, whose
coefficients are 1; so they cost no pass of their own). Backward, the gradients of U and of the static taps
stay on chip for the whole run and leave it as one partial sum; that of z leaves one partial sum for each tile
of channels. ``sum_kernel`` adds the partial sums up in a fixed order.

Rows and columns of a product on tensor cores lie across threads in another pattern than a tile that is loaded
16 bytes a thread. So the products are taken of permuted tokens (:func:`token_of`) and channels
(:func:`channel_of`); put back in order (:func:`from_product`), every number is then in the thread that needs
it, and the tile of x or dy does not go through shared memory. The permutation is one for 16-bit types and
``WARPS`` warps; elsewhere it costs an exchange, but changes no result.

Axes: G replicas, B sequences a replica, N = G * B, T tokens, W lags, D channels, R ranks.
"""

# Triton knows tuples with +, but not unpacking; to mypy these are tuples that change their type
# ruff: noqa: RUF005
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from kernels.short_conv.triton_tiles import finish, load_lag, load_upstream, locate
from kernels.triton_products import multiply

SLICE = tl.constexpr(32)


@triton.jit
def to_product(x, BT: tl.constexpr, WARPS: tl.constexpr):
    """A tile [BT, SLICE] with rows and columns in the order of a product."""
    x = tl.reshape(x, (BT // (16 * WARPS), 2, WARPS, 8, 4, 4, 2))
    return tl.reshape(tl.permute(x, (0, 2, 1, 3, 5, 4, 6)), (BT, SLICE))


@triton.jit
def from_product(x, BT: tl.constexpr, WARPS: tl.constexpr):
    """Undo :func:`to_product`."""
    x = tl.reshape(x, (BT // (16 * WARPS), WARPS, 2, 8, 4, 4, 2))
    return tl.reshape(tl.permute(x, (0, 2, 1, 3, 5, 4, 6)), (BT, SLICE))


@triton.jit
def token_of(m, WARPS: tl.constexpr):
    """The token of a tile that row m of a product stands for."""
    return m // (16 * WARPS) * (16 * WARPS) + m // 8 % 2 * (8 * WARPS) + m // 16 % WARPS * 8 + m % 8


@triton.jit
def channel_of(n):
    """The channel of a slice that column n of a product stands for."""
    return n // 2 % 4 * 8 + n // 8 * 2 + n % 2


@triton.jit
def load_ranks(z_ptr, r, inside, R: tl.constexpr, BR: tl.constexpr, FOLD: tl.constexpr):
    """Rows of z, padded with zeros to BR ranks; ``FOLD``: with the two ones of the static taps after them."""
    rr = tl.arange(0, BR)
    rest = tl.where(FOLD & ((rr == R) | (rr == R + 1)), 1.0, 0.0).to(z_ptr.dtype.element_ty)
    where = z_ptr + (r[:, None] * R + rr[None, :])
    return tl.load(where, mask=inside[:, None] & (rr < R)[None, :], other=rest[None, :])


@triton.jit
def load_taps(
    u_ptr, weight_ptr, g, j: tl.constexpr, d, D: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
    BR: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """Lag j's part of U at channels d, [BR, SLICE]; ``FOLD``: and the static taps as two more ranks."""
    rr = tl.arange(0, BR)
    in_d = d < D
    where = u_ptr + (g * R + rr)[:, None] * (W * D) + j * D + d[None, :]
    u = tl.load(where, mask=(rr < R)[:, None] & in_d[None, :], other=0.0)
    if FOLD:
        w = tl.load(weight_ptr + (g * W + j) * D + d, mask=in_d, other=0.0).to(tl.float32)
        high = w.to(u.dtype)
        low = (w - high.to(tl.float32)).to(u.dtype)
        u = tl.where((rr == R)[:, None], high[None, :], tl.where((rr == R + 1)[:, None], low[None, :], u))
    return u


@triton.jit
def channels_left(start, D: tl.constexpr, EVEN: tl.constexpr):
    """The channels of a slice and whether they exist (``EVEN``: all do)."""
    c = tl.arange(0, SLICE)
    return c, (c >= 0 if EVEN else c < D - start)


@triton.jit(do_not_specialize=["T", "run", "B", "S"])
def forward_kernel(
    x_ptr,  # [N, T, D]
    z_ptr,  # [N, T, R]
    u_ptr,  # [G, R, W, D]
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
    BT: tl.constexpr,
    BR: tl.constexpr,
    BF: tl.constexpr,
    SLICES: tl.constexpr,
    WARPS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr,
    SILU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    STORE: tl.constexpr,
    FOLD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Make y = [x +] act(sum_j taps_j * x_{t-j}). BR holds the ranks, BF those and the folded ones."""
    HALF: tl.constexpr = x_ptr.dtype.element_ty
    EVEN: tl.constexpr = D % (SLICES * 32) == 0
    runs = tl.cdiv(T, run)
    n = (tl.program_id(0) // runs).to(tl.int64)
    first = (tl.program_id(0) % runs) * run
    g = n // B
    r = tl.arange(0, BT)
    token = token_of(r, WARPS)
    mixers = ()
    for s in tl.static_range(SLICES):
        d = (tl.program_id(1) * SLICES + s) * SLICE + channel_of(tl.arange(0, SLICE))
        for j in tl.static_range(W):
            mixers = mixers + (load_taps(u_ptr, weight_ptr, g, j, d, D, W, R, BF, FOLD),)
    for t in range(first, tl.minimum(first + run, T), BT):
        row = n * T + t
        left = T - t
        pos, home = locate(pos_ptr, seq_ptr, row + r, t + r, n, g, r < left, S, W, PACKED)
        z = load_ranks(z_ptr + row * R, token, token < left, R, BF, FOLD)
        for s in tl.static_range(SLICES):
            start = (tl.program_id(1) * SLICES + s) * SLICE
            d, in_d = channels_left(start, D, EVEN)
            here = row * D + start
            for j in tl.static_range(W):
                x = load_lag(x_ptr + here, state_ptr + start, home, r, left, pos, j, d, in_d, D, W, HAS_STATE)
                x = x.to(tl.float32)
                taps = from_product(multiply(z, mixers[s * W + j], HALF, PRECISION), BT, WARPS)
                if HAS_WEIGHT and not FOLD:
                    static = weight_ptr + (g * W + j) * D + start + d
                    taps += tl.load(static, mask=in_d, other=0.0).to(tl.float32)[None, :]
                if j == 0:
                    now = x
                    y = x * taps
                else:
                    y += x * taps
            where = r[:, None] * D + d[None, :]
            mask = (r < left)[:, None] & in_d[None, :]
            finish(y, now, y_ptr + here, before_ptr + here, where, mask, SILU, RESIDUAL, STORE)


@triton.jit(do_not_specialize=["T", "run", "B", "S"])
def backward_kernel(
    x_ptr,  # [N, T, D]
    z_ptr,  # [N, T, R]
    u_ptr,  # [G, R, W, D]
    weight_ptr,  # [G, W, D]
    state_ptr,  # [G, S, W-1, D]
    pos_ptr,  # [N, T] int32
    seq_ptr,  # [N, T] int32
    before_ptr,  # [N, T, D]
    dy_ptr,  # [N, T, D]
    dx_ptr,  # [N, T, D]
    dz_ptr,  # [tiles, N, T, R] fp32
    du_ptr,  # [N, runs, R (with static taps R+1, theirs last), W, D] fp32
    T,
    run,
    B,
    S,
    D: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BF: tl.constexpr,
    SLICES: tl.constexpr,
    WARPS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr,
    SILU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FOLD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All gradients but the state's."""
    HALF: tl.constexpr = x_ptr.dtype.element_ty
    EVEN: tl.constexpr = D % (SLICES * 32) == 0
    ROWS: tl.constexpr = R + 1 if HAS_WEIGHT else R
    runs = tl.cdiv(T, run)
    tile = tl.program_id(1)
    n = (tl.program_id(0) // runs).to(tl.int64)
    first = (tl.program_id(0) % runs) * run
    g = n // B
    N = tl.num_programs(0) // runs
    r = tl.arange(0, BT)
    rr = tl.arange(0, BR)
    row16 = tl.arange(0, 16)
    token = token_of(r, WARPS)
    weights = ()
    mixers = ()
    sums_u = ()
    sums_w = ()
    for s in tl.static_range(SLICES):
        d = (tile * SLICES + s) * SLICE + channel_of(tl.arange(0, SLICE))
        for j in tl.static_range(W):
            weights = weights + (load_taps(u_ptr, weight_ptr, g, j, d, D, W, R, BF, FOLD),)
            mixers = mixers + (load_taps(u_ptr, weight_ptr, g, j, d, D, W, R, BR, False),)
            sums_u = sums_u + (tl.zeros((BR, SLICE), tl.float32),)
            sums_w = sums_w + (tl.zeros((16, SLICE if HAS_WEIGHT else 1), tl.float32),)
    # row 0 of a product with it is the sum over tokens; tensor cores want 16 rows
    ones = tl.where((row16 == 0)[None, :] & (r >= 0)[:, None], 1.0, 0.0).to(HALF)
    for t in range(first, tl.minimum(first + run, T), BT):
        row = n * T + t
        left = T - t
        pos, home = locate(pos_ptr, seq_ptr, row + r, t + r, n, g, r < left, S, W, PACKED)
        dz = tl.zeros((BT, BR), tl.float32)
        z = load_ranks(z_ptr + row * R, token, token < left, R, BR, False)
        zs = ()
        for j in tl.static_range(W):
            zs = zs + (load_ranks(z_ptr + (row + j) * R, token, token + j < left, R, BF, FOLD),)
        new_u = ()
        new_w = ()
        for s in tl.static_range(SLICES):
            start = (tile * SLICES + s) * SLICE
            d, in_d = channels_left(start, D, EVEN)
            here = row * D + start
            dy, dc = load_upstream(dy_ptr + here, before_ptr + here, r, r < left, d, in_d, D, SILU)
            for j in tl.static_range(W):
                # what lag j gives to its taps: dc_t x_{t-j}
                x = load_lag(x_ptr + here, state_ptr + start, home, r, left, pos, j, d, in_d, D, W, HAS_STATE)
                if PRECISION == "half":
                    p = to_product(dc.to(HALF) * x, BT, WARPS)
                else:
                    p = to_product(dc.to(tl.float32) * x.to(tl.float32), BT, WARPS)
                dz += multiply(p, tl.trans(mixers[s * W + j]), HALF, PRECISION)
                new_u = new_u + (sums_u[s * W + j] + multiply(tl.trans(z), p, HALF, PRECISION),)
                if HAS_WEIGHT:
                    new_w = new_w + (sums_w[s * W + j] + multiply(tl.trans(ones), p, HALF, PRECISION),)
                else:
                    new_w = new_w + (sums_w[s * W + j],)
                # what token t + j hands back to token t
                dc_later = dc
                if j > 0:
                    later = r + j < left
                    if PACKED:
                        later = later & (tl.load(pos_ptr + row + j + r, mask=later, other=0) >= j)
                    up = here + j * D
                    _, dc_later = load_upstream(dy_ptr + up, before_ptr + up, r, later, d, in_d, D, SILU)
                taps = from_product(multiply(zs[j], weights[s * W + j], HALF, PRECISION), BT, WARPS)
                if HAS_WEIGHT and not FOLD:
                    static = weight_ptr + (g * W + j) * D + start + d
                    taps += tl.load(static, mask=in_d, other=0.0).to(tl.float32)[None, :]
                if j == 0:
                    dx = dc.to(tl.float32) * taps
                    if RESIDUAL:
                        dx += dy.to(tl.float32)
                else:
                    dx += dc_later.to(tl.float32) * taps
            where = here + (r[:, None] * D + d[None, :])
            tl.store(dx_ptr + where, dx.to(dx_ptr.dtype.element_ty), mask=(r < left)[:, None] & in_d[None, :])
        sums_u = new_u
        sums_w = new_w
        where = (tile.to(tl.int64) * N * T + row) * R + (token[:, None] * R + rr[None, :])
        tl.store(dz_ptr + where, dz, mask=(token < left)[:, None] & (rr < R)[None, :])
    du_ptr += tl.program_id(0).to(tl.int64) * ROWS * W * D  # program 0 is n * runs + run
    for s in tl.static_range(SLICES):
        d = (tile * SLICES + s) * SLICE + channel_of(tl.arange(0, SLICE))
        for j in tl.static_range(W):
            where = (rr[:, None] * W + j) * D + d[None, :]
            tl.store(du_ptr + where, sums_u[s * W + j], mask=(rr < R)[:, None] & (d < D)[None, :])
            if HAS_WEIGHT:
                where = ((R + row16)[:, None] * W + j) * D + d[None, :]
                tl.store(du_ptr + where, sums_w[s * W + j], mask=(row16 == 0)[:, None] & (d < D)[None, :])
