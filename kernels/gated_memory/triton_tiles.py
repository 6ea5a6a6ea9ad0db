"""What the Triton kernels of the gated memory share: loads, products, and the scores of one chunk.

A chunk is C tokens (rows). Its two triangular matrices are

    T[r, s] = e_r^T exp(G_r - G_s) k_s   (r > s)        A[r, s] = q_r^T exp(G_r - G_s) k_s   (r >= s)

with e = erase * k and G the cumulative log decay. exp(G_r) and exp(-G_s) apart would overflow, so the
triangle is cut into the off-diagonal blocks of a binary recursion: at level m (m = 1, 2, 4, ... C/2) row r
lies in an odd block of m rows and s in the even block before it, and the decay between them is a product of
two factors, the decay *inside* the odd block up to r and the decay *inside* the even block after s. Each is
the exponential of a sum of log decays (<= 0) that is summed afresh, so nothing overflows, nothing is a
difference of large sums, and no later gate enters. The same recursion gives X = (I + T)^-1 by substitution
of blocks: X <- X - X T_m X, exact at every level.

Products come in three precisions, which are one and the same for fp32 inputs: EXACT for the sums of log
decays and the solve; CARRY for what the erase feeds back into the state, where the error of a repeated key
repeats at every token; PRECISION for the rest.

Gate kinds are compile-time numbers: 0 absent, 1 one scalar a token, 2 one value a channel. The levels run in
a loop and not unrolled: unrolled, their masks are kept in registers all through the sequence, and all spills.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Log decays are taken to base 2 as they are loaded. 2^-256 is 0 in fp32: what lies below it, -inf included,
# erases exactly, and its gradient is 0.
LOG2_E = tl.constexpr(1.4426950408889634)
LOG2_FLOOR = tl.constexpr(-256.0)


@triton.jit
def halves(x):
    """Split fp32 into its nearest tf32 value and the rest; rounding (not cutting) keeps the rest unbiased."""
    high = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """Matrix product with fp32 accumulation.

    ``split`` takes three tf32 products of halves (good to about 2^-23), ``pair`` three bf16 products of
    halves (2^-16), ``bf16`` one of rounded operands (2^-8); ``ieee`` is Triton's.
    """
    if PRECISION == "split":
        a_high, a_low = halves(a)
        b_high, b_low = halves(b)
        product = tl.dot(a_low, b_high, input_precision="tf32")
        product = tl.dot(a_high, b_low, product, input_precision="tf32")
        product = tl.dot(a_high, b_high, product, input_precision="tf32")
    elif PRECISION == "pair":
        a_high = a.to(tl.bfloat16)
        b_high = b.to(tl.bfloat16)
        product = tl.dot((a - a_high.to(tl.float32)).to(tl.bfloat16), b_high)
        product = tl.dot(a_high, (b - b_high.to(tl.float32)).to(tl.bfloat16), product)
        product = tl.dot(a_high, b_high, product)
    elif PRECISION == "bf16":
        product = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    else:
        product = tl.dot(a, b, input_precision="ieee")
    return product


@triton.jit
def sum_rows(mask, x, PRECISION: tl.constexpr):
    """``mask @ x`` for a mask of 0/1, which needs no splitting."""
    if PRECISION == "split":
        high, low = halves(x)
        product = tl.dot(mask, low, input_precision="tf32")
        product = tl.dot(mask, high, product, input_precision="tf32")
    else:
        product = tl.dot(mask, x, input_precision="ieee")
    return product


@triton.jit
def load_rows(pointer, rows, n_rows, stride, WIDTH: tl.constexpr, columns, RAGGED: tl.constexpr):
    """Load [C, block] in fp32, zeros outside ``n_rows`` x ``WIDTH``; ``RAGGED``: something lies outside."""
    where = pointer + rows[:, None] * stride + columns[None, :]
    if RAGGED:
        tile = tl.load(where, mask=(rows[:, None] < n_rows) & (columns[None, :] < WIDTH), other=0.0)
    else:
        tile = tl.load(where)
    return tile.to(tl.float32)


@triton.jit
def store_rows(pointer, tile, rows, n_rows, stride, WIDTH: tl.constexpr, columns, RAGGED: tl.constexpr):
    """Store [C, block] where it lies inside ``n_rows`` x ``WIDTH``, in the type of the memory."""
    where = pointer + rows[:, None] * stride + columns[None, :]
    tile = tile.to(pointer.dtype.element_ty)
    if RAGGED:
        tl.store(where, tile, mask=(rows[:, None] < n_rows) & (columns[None, :] < WIDTH))
    else:
        tl.store(where, tile)


@triton.jit
def load_gate(
    pointer, rows, n_rows, heads, WIDTH: tl.constexpr, columns, KIND: tl.constexpr, RAGGED: tl.constexpr
):
    """Load a gate as a [C, block] (channel) or [C, 1] (scalar) tile in fp32."""
    if KIND == 2:
        gate = load_rows(pointer, rows, n_rows, heads * WIDTH, WIDTH, columns, RAGGED)
    else:
        gate = tl.load(pointer + rows * heads, mask=rows < n_rows, other=0.0).to(tl.float32)[:, None]
    return gate


@triton.jit
def store_gate(
    pointer, tile, rows, n_rows, heads, WIDTH: tl.constexpr, columns, KIND: tl.constexpr, RAGGED: tl.constexpr
):
    """Store the gradient of a gate from its [C, block] tile; a scalar gate takes the sum over channels."""
    if KIND == 2:
        store_rows(pointer, tile, rows, n_rows, heads * WIDTH, WIDTH, columns, RAGGED)
    else:
        total = tl.sum(tile, 1).to(pointer.dtype.element_ty)
        tl.store(pointer + rows * heads, total, mask=rows < n_rows)


@triton.jit
def load_keys(
    q_ptr,
    k_ptr,
    log_decay_ptr,
    erase_ptr,
    first,
    rows,
    T,
    H,
    scale,
    K: tl.constexpr,
    kk,
    DECAY: tl.constexpr,
    ERASE: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """The key side of a chunk: scaled q, k, the erase gate, the log2 decay (k stands in for absent gates)."""
    q = load_rows(q_ptr + first * K, rows, T, H * K, K, kk, RAGGED) * scale
    k = load_rows(k_ptr + first * K, rows, T, H * K, K, kk, RAGGED)
    erase = k
    log_decay = k
    if ERASE == 2:
        erase = load_gate(erase_ptr + first * K, rows, T, H, K, kk, 2, RAGGED)
    elif ERASE == 1:
        erase = load_gate(erase_ptr + first, rows, T, H, K, kk, 1, RAGGED)
    if DECAY == 2:
        log_decay = load_gate(log_decay_ptr + first * K, rows, T, H, K, kk, 2, RAGGED)
    elif DECAY == 1:
        log_decay = load_gate(log_decay_ptr + first, rows, T, H, K, kk, 1, RAGGED)
    if DECAY != 0:
        log_decay = tl.maximum(log_decay * LOG2_E, LOG2_FLOOR)
    return q, k, erase, log_decay


@triton.jit
def load_square(pointer, index, C: tl.constexpr):
    """Load the [C, C] matrix number ``index`` of an array of them."""
    r = tl.arange(0, C)[:, None]
    s = tl.arange(0, C)[None, :]
    return tl.load(pointer + index * (C * C) + r * C + s)


@triton.jit
def store_square(pointer, tile, index, C: tl.constexpr):
    """Store a [C, C] matrix as number ``index``."""
    r = tl.arange(0, C)[:, None]
    s = tl.arange(0, C)[None, :]
    tl.store(pointer + index * (C * C) + r * C + s, tile)


@triton.jit
def mask_of(condition):
    """0/1 in fp32, for sums that are matrix products."""
    return tl.where(condition, 1.0, 0.0)


@triton.jit
def level_pairs(C: tl.constexpr, level):
    """[C, C]: row in an odd block of 2^level rows, column in the even block before it."""
    r = tl.arange(0, C)[:, None] >> level
    s = tl.arange(0, C)[None, :] >> level
    return ((r & 1) == 1) & (r == s + 1)


@triton.jit
def level_sums(C: tl.constexpr, level):
    """[C, C] of 0/1: row t sums, inside its block of 2^level, up to t (odd block) or after t (even block)."""
    t = tl.arange(0, C)[:, None]
    i = tl.arange(0, C)[None, :]
    odd = ((t >> level) & 1) == 1
    return mask_of(((t >> level) == (i >> level)) & ((i <= t) == odd))


@triton.jit
def chunk_decay(log_decay, C: tl.constexpr, KIND: tl.constexpr, EXACT: tl.constexpr):
    """Decay from the chunk's start up to each row, after each row to its end, and over all of it.

    Returns [C, K], [C, K], [K, 1] for a decay a channel; [C, 1], [C, 1], [1, 1] for a scalar one.
    """
    t = tl.arange(0, C)[:, None]
    i = tl.arange(0, C)[None, :]
    if KIND == 2:
        before = tl.exp2(sum_rows(mask_of(i <= t), log_decay, EXACT))
        after = tl.exp2(sum_rows(mask_of(i > t), log_decay, EXACT))
        whole = tl.exp2(tl.sum(log_decay, 0))[:, None]
    else:
        row = tl.trans(tl.broadcast_to(log_decay, (C, C)))
        before = tl.exp2(tl.sum(tl.where(i <= t, row, 0.0), 1))[:, None]
        after = tl.exp2(tl.sum(tl.where(i > t, row, 0.0), 1))[:, None]
        whole = tl.exp2(tl.sum(log_decay, 0))[:, None]
    return before, after, whole


@triton.jit
def pair_decay(log_decay, C: tl.constexpr, EXACT: tl.constexpr):
    """[C, C]: exp(G_r - G_s) for r >= s of a scalar log decay [C, 1], 0 above the diagonal."""
    r = tl.arange(0, C)[:, None]
    s = tl.arange(0, C)[None, :]
    # sum over s < i <= r, as (i <= r) @ (g_i where i > s)
    sums = sum_rows(mask_of(s <= r), tl.where(r > s, tl.broadcast_to(log_decay, (C, C)), 0.0), EXACT)
    return tl.where(r >= s, tl.exp2(sums), 0.0)


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
    CARRY: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Scores A [C, C] (decay and diagonal included) and the inverse X = (I + T)^-1 [C, C] of one chunk."""
    r = tl.arange(0, C)[:, None]
    s = tl.arange(0, C)[None, :]
    x = mask_of(r == s)
    if DECAY == 2:
        scores = tl.where(r == s, tl.sum(q * k, 1)[:, None], 0.0)
        for level in range(LEVELS):
            pairs = level_pairs(C, level)
            factor = tl.exp2(sum_rows(level_sums(C, level), log_decay, EXACT))
            key = tl.trans(k * factor)
            scores += tl.where(pairs, dot(q * factor, key, PRECISION), 0.0)
            if ERASE != 0:
                t_level = tl.where(pairs, dot(e * factor, key, CARRY), 0.0)
                x -= dot(dot(x, t_level, EXACT), x, EXACT)
    else:
        key = tl.trans(k)
        scores = tl.where(r >= s, dot(q, key, PRECISION), 0.0)
        if DECAY == 1:
            between = pair_decay(log_decay, C, EXACT)
            scores *= between
        if ERASE != 0:
            t = dot(e, key, CARRY)
            if DECAY == 1:
                t *= between
            for level in range(LEVELS):
                x -= dot(dot(x, tl.where(level_pairs(C, level), t, 0.0), EXACT), x, EXACT)
    return scores, x
