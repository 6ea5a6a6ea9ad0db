"""What the Triton kernels of the gated memory share: masks, loads, and the scores of one chunk.

A chunk is C tokens (rows). Its two triangular matrices are

    T[r, s] = e_r^T exp(G_r - G_s) k_s   (r > s)        A[r, s] = q_r^T exp(G_r - G_s) k_s   (r >= s)

with e = erase * k and G the cumulative log decay. exp(G_r) and exp(-G_s) apart would overflow, so the triangle is cut
into the off-diagonal blocks of a binary recursion: at level m (m = 1, 2, 4, ... C/2) row r lies in an odd block of m
rows and s in the even block before it, and the decay between them is a product of two factors, the decay *inside* the
odd block up to r and the decay *inside* the even block after s. Each is the exponential of a sum of log decays
(<= 0) that is summed afresh, so nothing overflows, nothing is a difference of large sums, and no later gate enters.
The same recursion gives X = (I + T)^-1 by substitution of blocks: X <- X - X T_m X, exact at every level.

Gate kinds are compile-time numbers: 0 absent, 1 one scalar a token, 2 one value a channel.
"""

from __future__ import annotations

import triton
import triton.language as tl

# exp(-200) is 0 in fp32: a log decay below it, -inf included, erases exactly, and its gradient is 0.
LOG_FLOOR = tl.constexpr(-200.0)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """Matrix product with fp32 accumulation; ``bf16`` rounds the operands, the rest are Triton's precisions."""
    if PRECISION == "bf16":
        product = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    else:
        product = tl.dot(a, b, input_precision=PRECISION)
    return product


@triton.jit
def load_rows(pointer, rows, columns, n_rows, stride, WIDTH: tl.constexpr):
    """Load [C, block] in fp32, zeros outside ``n_rows`` x ``WIDTH``; ``rows`` are int64."""
    inside = (rows[:, None] < n_rows) & (columns[None, :] < WIDTH)
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_rows(pointer, tile, rows, columns, n_rows, stride, WIDTH: tl.constexpr):
    """Store [C, block] where it lies inside ``n_rows`` x ``WIDTH``, in the type of the memory."""
    inside = (rows[:, None] < n_rows) & (columns[None, :] < WIDTH)
    tl.store(pointer + rows[:, None] * stride + columns[None, :], tile.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def load_gate(pointer, rows, columns, n_rows, stride, WIDTH: tl.constexpr, KIND: tl.constexpr):
    """Load a gate as a [C, block] (channel) or [C, 1] (scalar) tile in fp32; ``stride`` is the heads' count."""
    if KIND == 2:
        gate = load_rows(pointer, rows, columns, n_rows, stride * WIDTH, WIDTH)
    else:
        gate = tl.load(pointer + rows * stride, mask=rows < n_rows, other=0.0).to(tl.float32)[:, None]
    return gate


@triton.jit
def store_gate(pointer, tile, rows, columns, n_rows, stride, WIDTH: tl.constexpr, KIND: tl.constexpr):
    """Store the gradient of a gate from its [C, block] tile; a scalar gate takes the sum over the channels."""
    if KIND == 2:
        store_rows(pointer, tile, rows, columns, n_rows, stride * WIDTH, WIDTH)
    else:
        total = tl.sum(tile, 1).to(pointer.dtype.element_ty)
        tl.store(pointer + rows * stride, total, mask=rows < n_rows)


@triton.jit
def mask_of(condition):
    """0/1 in fp32, for sums that are matrix products."""
    return tl.where(condition, 1.0, 0.0)


@triton.jit
def level_pairs(C: tl.constexpr, M: tl.constexpr):
    """[C, C]: row in an odd block of M rows, column in the even block before it."""
    r = tl.arange(0, C)[:, None]
    s = tl.arange(0, C)[None, :]
    return ((r // M) == (s // M) + 1) & (((r // M) % 2) == 1)


@triton.jit
def level_sums(C: tl.constexpr, M: tl.constexpr):
    """[C, C] of 0/1: row t sums, inside its block of M, up to t (odd block) or after t (even block)."""
    t = tl.arange(0, C)[:, None]
    i = tl.arange(0, C)[None, :]
    odd = ((t // M) % 2) == 1
    return mask_of(((t // M) == (i // M)) & ((odd & (i <= t)) | ((odd == 0) & (i > t))))


@triton.jit
def level_decay(log_decay, C: tl.constexpr, M: tl.constexpr, EXACT: tl.constexpr):
    """[C, K]: the decay inside the block of M rows up to row t (odd block) or after it (even block)."""
    return tl.exp(dot(level_sums(C, M), log_decay, EXACT))


@triton.jit
def chunk_decay(log_decay, C: tl.constexpr, KIND: tl.constexpr, EXACT: tl.constexpr):
    """Decay from the chunk's start up to each row, after each row to its end, and over all of it.

    Returns [C, K], [C, K], [K, 1] for a decay a channel; [C, 1], [C, 1], [1, 1] for a scalar one.
    """
    t = tl.arange(0, C)[:, None]
    i = tl.arange(0, C)[None, :]
    if KIND == 2:
        before = tl.exp(dot(mask_of(i <= t), log_decay, EXACT))
        after = tl.exp(dot(mask_of(i > t), log_decay, EXACT))
        whole = tl.exp(tl.sum(log_decay, 0))[:, None]
    else:
        row = tl.trans(tl.broadcast_to(log_decay, (C, C)))
        before = tl.exp(tl.sum(tl.where(i <= t, row, 0.0), 1))[:, None]
        after = tl.exp(tl.sum(tl.where(i > t, row, 0.0), 1))[:, None]
        whole = tl.exp(tl.sum(log_decay, 0))[:, None]
    return before, after, whole


@triton.jit
def pair_decay(log_decay, C: tl.constexpr, EXACT: tl.constexpr):
    """[C, C]: exp(G_r - G_s) for r >= s of a scalar log decay [C, 1], 0 above the diagonal."""
    r = tl.arange(0, C)[:, None]
    s = tl.arange(0, C)[None, :]
    # sum over s < i <= r, as (i <= r) @ (g_i where i > s)
    sums = dot(mask_of(s <= r), tl.where(r > s, tl.broadcast_to(log_decay, (C, C)), 0.0), EXACT)
    return tl.where(r >= s, tl.exp(sums), 0.0)


@triton.jit
def chunk_scores(
    q,
    k,
    e,
    log_decay,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    DECAY: tl.constexpr,
    ERASE: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Scores A [C, C] (decay included, diagonal included) and the inverse X = (I + T)^-1 [C, C] of one chunk."""
    r = tl.arange(0, C)[:, None]
    s = tl.arange(0, C)[None, :]
    x = mask_of(r == s)
    if DECAY == 2:
        scores = tl.where(r == s, tl.sum(q * k, 1)[:, None], 0.0)
        for level in tl.static_range(LEVELS):
            pairs = level_pairs(C, 2**level)
            factor = level_decay(log_decay, C, 2**level, EXACT)
            key = tl.trans(k * factor)
            scores += tl.where(pairs, dot(q * factor, key, PRECISION), 0.0)
            if ERASE != 0:
                t_level = tl.where(pairs, dot(e * factor, key, PRECISION), 0.0)
                if level == 0:
                    x -= t_level
                else:
                    x -= dot(dot(x, t_level, EXACT), x, EXACT)
    else:
        key = tl.trans(k)
        scores = tl.where(r >= s, dot(q, key, PRECISION), 0.0)
        if DECAY == 1:
            between = pair_decay(log_decay, C, EXACT)
            scores *= between
        if ERASE != 0:
            t = dot(e, key, PRECISION)
            if DECAY == 1:
                t *= between
            for level in tl.static_range(LEVELS):
                t_level = tl.where(level_pairs(C, 2**level), t, 0.0)
                if level == 0:
                    x -= t_level
                else:
                    x -= dot(dot(x, t_level, EXACT), x, EXACT)
    return scores, x
