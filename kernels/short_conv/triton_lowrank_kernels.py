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

from kernels.short_conv.triton_tiles import finish, load_lag, load_upstream, locate, slope
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
def beside(parts, W: tl.constexpr, LAGS: tl.constexpr):
    """Tiles [A, SLICE] of W lags side by side, [A, LAGS * SLICE]; LAGS is the next power of two."""
    if LAGS == 1:
        joined = parts[0]
    elif LAGS == 2:
        joined = pair(parts[0], parts[1])
    else:
        half: tl.constexpr = LAGS // 2
        low = ()
        high = ()
        for j in tl.static_range(half):
            low = low + (parts[j],)
            high = high + (parts[half + j] if half + j < W else tl.zeros_like(parts[0]),)
        joined = pair(beside(low, half, half), beside(high, half, half))
    return joined


@triton.jit
def pair(a, b):
    """[A, N] and [A, N] to [A, 2 N]."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def token_of(m, WARPS: tl.constexpr):
    """The token of a tile that row m of a product stands for."""
    return m // (16 * WARPS) * (16 * WARPS) + m // 8 % 2 * (8 * WARPS) + m // 16 % WARPS * 8 + m % 8


@triton.jit
def channel_of(n):
    """The channel of a slice that column n of a product stands for."""
    return n // 2 % 4 * 8 + n // 8 * 2 + n % 2


@triton.jit
def load_ranks(z_ptr, r, inside, R: tl.constexpr, BR: tl.constexpr, HAS_WEIGHT: tl.constexpr):
    """Rows of z, padded with zeros to BR ranks; the first two of those are 1 for the static taps."""
    rr = tl.arange(0, BR)
    rest = tl.where(HAS_WEIGHT & (rr >= R) & (rr < R + 2), 1.0, 0.0).to(z_ptr.dtype.element_ty)
    where = z_ptr + (r[:, None] * R + rr[None, :])
    return tl.load(where, mask=inside[:, None] & (rr < R)[None, :], other=rest[None, :])


@triton.jit
def load_taps(
    u_ptr, weight_ptr, g, first, lag, n, D: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
    BR: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """Columns n (of lags ``lag``) of U at the slice from channel ``first`` on, [BR, len(n)].

    With static taps those follow as two more ranks: rounded to U's type, and what that takes from them.
    """
    rr = tl.arange(0, BR)
    d = first + channel_of(n % SLICE)
    where = lag * D + d
    real = (lag < W) & (d < D)
    pointers = u_ptr + ((g * R + rr)[:, None] * (W * D) + where[None, :])
    u = tl.load(pointers, mask=(rr < R)[:, None] & real[None, :], other=0.0)
    if HAS_WEIGHT:
        w = tl.load(weight_ptr + (g * (W * D) + where), mask=real, other=0.0).to(tl.float32)
        high = w.to(u.dtype)
        low = (w - high.to(tl.float32)).to(u.dtype)
        u = tl.where((rr == R)[:, None], high[None, :], tl.where((rr == R + 1)[:, None], low[None, :], u))
    return u


@triton.jit
def channels_left(start, D: tl.constexpr, EVEN: tl.constexpr):
    """The channels of a slice and whether they exist (``EVEN``: all do)."""
    c = tl.arange(0, SLICE)
    return c, (c >= 0 if EVEN else c < D - start)


@triton.jit
def load_slices(x_ptr, r, inside, first, D: tl.constexpr, SLICES: tl.constexpr, EVEN: tl.constexpr):
    """A tuple of the slices from channel ``first`` on, [BT, SLICE] each, at rows r."""
    tiles = ()
    for s in tl.static_range(SLICES):
        d, in_d = channels_left(first + s * SLICE, D, EVEN)
        where = x_ptr + (first + s * SLICE) + (r[:, None] * D + d[None, :])
        tiles = tiles + (tl.load(where, mask=inside[:, None] & in_d[None, :], other=0.0),)
    return tiles


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
    SLICES: tl.constexpr,
    WARPS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr,
    SILU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    STORE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Make y = [x +] act(sum_j taps_j * x_{t-j}). BR holds the ranks and those of the static taps."""
    HALF: tl.constexpr = x_ptr.dtype.element_ty
    EVEN: tl.constexpr = D % (SLICES * 32) == 0
    TILES: tl.constexpr = (D + SLICES * 32 - 1) // (SLICES * 32)
    runs = tl.cdiv(T, run)
    part = tl.program_id(0) // TILES  # neighbours in memory run at the same time
    channel = (tl.program_id(0) % TILES) * (SLICES * SLICE)
    n = (part // runs).to(tl.int64)
    first = (part % runs) * run
    stop = tl.minimum(first + run, T)
    g = n // B
    r = tl.arange(0, BT)
    c = tl.arange(0, SLICE)
    token = token_of(r, WARPS)
    weights = ()
    for s in tl.static_range(SLICES):
        for j in tl.static_range(W):
            start = channel + s * SLICE
            made = load_taps(u_ptr, weight_ptr, g, start, j + 0 * c, c, D, W, R, BR, HAS_WEIGHT)
            weights = weights + (made,)
    for t in range(first, stop, BT):
        row = n * T + t
        left = stop - t
        pos, home = locate(pos_ptr, seq_ptr, row + r, t + r, n, g, r < left, S, W, PACKED)
        z = load_ranks(z_ptr + row * R, token, token < left, R, BR, HAS_WEIGHT)
        for s in tl.static_range(SLICES):
            start = channel + s * SLICE
            d, in_d = channels_left(start, D, EVEN)
            here = row * D + start
            xs = ()
            for j in tl.static_range(W):  # all on their way before the first is used
                x = load_lag(x_ptr + here, state_ptr + start, home, r, left, pos, j, d, in_d, D, W, HAS_STATE)
                xs = xs + (x,)
            now = xs[0].to(tl.float32)
            y = now * from_product(multiply(z, weights[s * W], HALF, PRECISION), BT, WARPS)
            for j in tl.static_range(1, W):
                taps = from_product(multiply(z, weights[s * W + j], HALF, PRECISION), BT, WARPS)
                y += xs[j].to(tl.float32) * taps
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
    BZ: tl.constexpr,
    SLICES: tl.constexpr,
    WARPS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr,
    SILU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All gradients but the state's."""
    HALF: tl.constexpr = x_ptr.dtype.element_ty
    EVEN: tl.constexpr = D % (SLICES * 32) == 0
    ROWS: tl.constexpr = R + 1 if HAS_WEIGHT else R
    LAGS: tl.constexpr = 1 if W == 1 else 2 if W == 2 else 4 if W <= 4 else 8
    TILES: tl.constexpr = (D + SLICES * 32 - 1) // (SLICES * 32)
    runs = tl.cdiv(T, run)
    part = tl.program_id(0) // TILES  # n * runs + run; neighbours in memory run at the same time
    tile = tl.program_id(0) % TILES
    n = (part // runs).to(tl.int64)
    first = (part % runs) * run
    stop = tl.minimum(first + run, T)
    g = n // B
    N = tl.num_programs(0) // TILES // runs
    channel = tile * (SLICES * SLICE)
    r = tl.arange(0, BT)
    rr = tl.arange(0, BZ)
    token = token_of(r, WARPS)
    column = tl.arange(0, LAGS * SLICE)
    weights = ()
    mixers = ()
    sums = ()
    for s in tl.static_range(SLICES):
        start = channel + s * SLICE
        for j in tl.static_range(W):
            c = tl.arange(0, SLICE)
            made = load_taps(u_ptr, weight_ptr, g, start, j + 0 * c, c, D, W, R, BR, HAS_WEIGHT)
            weights = weights + (made,)
        # for dz, where the static taps have no part
        made = load_taps(u_ptr, weight_ptr, g, start, column // SLICE, column, D, W, R, BZ, False)
        mixers = mixers + (made,)
        sums = sums + (tl.zeros((LAGS * SLICE, BR), tl.float32),)
    # a tile of tokens is on its way while the one before it is computed; only lag 0, the others find it in L1
    row = n * T + first
    inside = r < stop - first
    z = load_ranks(z_ptr + row * R, token, token < stop - first, R, BR, HAS_WEIGHT)
    tiles = load_slices(x_ptr + row * D, r, inside, channel, D, SLICES, EVEN)
    dys = load_slices(dy_ptr + row * D, r, inside, channel, D, SLICES, EVEN)
    for t in range(first, stop, BT):
        row = n * T + t
        left = T - t
        inside = r < stop - t
        pos, home = locate(pos_ptr, seq_ptr, row + r, t + r, n, g, inside, S, W, PACKED)
        soon = r < stop - t - BT
        ahead = row + BT
        next_tiles = load_slices(x_ptr + ahead * D, r, soon, channel, D, SLICES, EVEN)
        next_dys = load_slices(dy_ptr + ahead * D, r, soon, channel, D, SLICES, EVEN)
        next_z = load_ranks(z_ptr + ahead * R, token, token < stop - t - BT, R, BR, HAS_WEIGHT)
        dz = tl.zeros((BT, BZ), tl.float32)
        zs = (z,)
        for j in tl.static_range(1, W):
            zs = zs + (load_ranks(z_ptr + (row + j) * R, token, token + j < left, R, BR, HAS_WEIGHT),)
        added = ()
        for s in tl.static_range(SLICES):
            start = channel + s * SLICE
            d, in_d = channels_left(start, D, EVEN)
            here = row * D + start
            before = dys[s]
            if SILU:
                where = before_ptr + here + (r[:, None] * D + d[None, :])
                before = tl.load(where, mask=inside[:, None] & in_d[None, :], other=0.0)
            xs = (tiles[s],)
            ups = ((dys[s], before),)
            for j in tl.static_range(1, W):
                x = load_lag(x_ptr + here, state_ptr + start, home, r, left, pos, j, d, in_d, D, W, HAS_STATE)
                later = r + j < left
                if PACKED:
                    later = later & (tl.load(pos_ptr + row + j + r, mask=later, other=0) >= j)
                up = here + j * D
                xs = xs + (x,)
                ups = ups + (load_upstream(dy_ptr + up, before_ptr + up, r, later, d, in_d, D, SILU),)
            dc = slope(ups[0], SILU)
            ps = ()
            for j in tl.static_range(W):  # what lag j gives to its taps: dc_t x_{t-j}
                if PRECISION == "half":
                    p = dc.to(HALF) * xs[j]
                else:
                    p = dc.to(tl.float32) * xs[j].to(tl.float32)
                ps = ps + (to_product(p, BT, WARPS),)
            p = beside(ps, W, LAGS)
            dz += multiply(p, tl.trans(mixers[s]), HALF, PRECISION)
            added = added + (sums[s] + multiply(tl.trans(p), zs[0], HALF, PRECISION),)
            for j in tl.static_range(W):
                # what token t + j hands back to token t
                taps = from_product(multiply(zs[j], weights[s * W + j], HALF, PRECISION), BT, WARPS)
                if j == 0:
                    dx = dc.to(tl.float32) * taps
                    if RESIDUAL:
                        dx += ups[0][0].to(tl.float32)
                else:
                    dx += slope(ups[j], SILU).to(tl.float32) * taps
            where = here + (r[:, None] * D + d[None, :])
            tl.store(dx_ptr + where, dx.to(dx_ptr.dtype.element_ty), mask=inside[:, None] & in_d[None, :])
        sums = added
        tiles = next_tiles
        dys = next_dys
        z = next_z
        where = (tile.to(tl.int64) * N * T + row) * R + (token[:, None] * R + rr[None, :])
        tl.store(dz_ptr + where, dz, mask=(token < stop - t)[:, None] & (rr < R)[None, :])
    du_ptr += part.to(tl.int64) * ROWS * W * D
    rank = tl.arange(0, BR)
    lag = column // SLICE
    for s in tl.static_range(SLICES):
        d = channel + s * SLICE + channel_of(column % SLICE)
        where = (rank[None, :] * W + lag[:, None]) * D + d[:, None]
        tl.store(du_ptr + where, sums[s], mask=(rank < ROWS)[None, :] & ((lag < W) & (d < D))[:, None])
