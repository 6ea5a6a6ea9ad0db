"""What the Triton kernels of the gated memory share: loads, products, decays, and the inverse of a triangle.

A chunk is C tokens (rows). Its two triangular matrices are

    T[r, s] = e_r^T exp(G_r - G_s) k_s   (r > s)        A[r, s] = scale q_r^T exp(G_r - G_s) k_s   (r >= s)

with e = erase * k and G the cumulative log decay. exp(G_r) and exp(-G_s) apart would overflow, so the
triangle is cut into the off-diagonal blocks of a binary recursion: at level m (m = 1, 2, 4, ... C/2) row r
lies in an odd block of m rows and s in the even block before it, and the decay between them is a product of
two factors, the decay *inside* the odd block up to r and the decay *inside* the even block after s. Each is
the exponential of a sum of log decays (<= 0) that is summed afresh, so nothing overflows, nothing is a
difference of large sums, and no later gate enters. The same recursion gives X = (I + T)^-1 by substitution
of blocks: X <- X - X T_m X, exact at every level. The levels below 16 are done under masks inside blocks of
16 rows (tiles [blocks, 16, 16], a product a block), those from 16 on as products of whole blocks.

Products come in three precisions, which are one and the same for fp32 inputs: EXACT for the solve; LEFT and
RIGHT for what the erase feeds back into the state, where the error of a repeated key repeats at every token
(the factor on that side is kept to 2^-16); PRECISION for the rest.

Gate kinds are compile-time numbers: 0 absent, 1 one scalar a token, 2 one value a channel.
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
def narrow_halves(x):
    """Split fp32 into its nearest bf16 value and the rest, rounded to bf16: together good to 2^-16."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """Matrix product with fp32 accumulation.

    ``split`` takes three tf32 products of halves (good to about 2^-23); ``left`` and ``right`` two bf16
    products, of the halves of that factor (2^-16) and the other rounded to bf16 (the inputs are); ``bf16``
    one of rounded factors; ``ieee`` is Triton's.
    """
    if PRECISION == "split":
        a_high, a_low = halves(a.to(tl.float32))
        b_high, b_low = halves(b.to(tl.float32))
        product = tl.dot(a_low, b_high, input_precision="tf32")
        product = tl.dot(a_high, b_low, product, input_precision="tf32")
        product = tl.dot(a_high, b_high, product, input_precision="tf32")
    elif PRECISION == "left":
        a_high, a_low = narrow_halves(a)
        b_high = b.to(tl.bfloat16)
        product = tl.dot(a_low, b_high)
        product = tl.dot(a_high, b_high, product)
    elif PRECISION == "right":
        a_high = a.to(tl.bfloat16)
        b_high, b_low = narrow_halves(b)
        product = tl.dot(a_high, b_low)
        product = tl.dot(a_high, b_high, product)
    elif PRECISION == "bf16":
        product = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    else:
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return product


@triton.jit
def sum_rows(mask, x, PRECISION: tl.constexpr):
    """``mask @ x`` for a condition [rows, rows]: faster than a scan, whose rows lie in many threads.

    0 and 1 need no splitting: two products of halves are exact to 2^-23 (tf32) or 2^-16 (bf16, ``right``).
    """
    weights = tl.where(mask, 1.0, 0.0)
    if PRECISION == "split":
        high, low = halves(x)
        product = tl.dot(weights, low, input_precision="tf32")
        product = tl.dot(weights, high, product, input_precision="tf32")
    else:
        product = dot(weights, x, PRECISION)
    return product


@triton.jit
def ordered(P: tl.constexpr, M: tl.constexpr, KIND: tl.constexpr):
    """[P, M, M] (one block: [M, M]): whether column i is, by KIND, 0 <= t, 1 > t, 2 >= t, 3 < row t."""
    zero = tl.zeros((M, M), tl.int32) if P == 1 else tl.zeros((P, M, M), tl.int32)
    t = on_rows(block_rows(0, P, M, 0), P) + zero
    i = on_columns(block_rows(0, P, M, 0), P) + zero
    if KIND == 0:
        mask = i <= t
    elif KIND == 1:
        mask = i > t
    elif KIND == 2:
        mask = i >= t
    else:
        mask = i < t
    return mask


@triton.jit
def load_inverse(pointer, index, C: tl.constexpr, NARROW: tl.constexpr):
    """Load X number ``index``: for bf16 products its rounded value and the rest, else itself (twice)."""
    high = load_square(pointer, index * (2 if NARROW else 1), C, False)
    low = high
    if NARROW:
        low = load_square(pointer, index * 2 + 1, C, False)
    return high, low


@triton.jit
def dot_inverse(x, x_low, y, NARROW: tl.constexpr, EXACT: tl.constexpr):
    """X y: good to 2^-16 for bf16 products (three of them), else as EXACT says."""
    if NARROW:
        y_high, y_low = narrow_halves(y)
        product = tl.dot(x_low, y_high)
        product = tl.dot(x, y_low, product)
        product = tl.dot(x, y_high, product)
    else:
        product = dot(x, y, EXACT)
    return product


@triton.jit
def load_tile(pointer, rows, n_rows, stride, WIDTH: tl.constexpr, columns, RAGGED: tl.constexpr):
    """Load rows x columns (shaped to broadcast) as they are, zeros outside ``n_rows`` x ``WIDTH``.

    ``RAGGED``: something lies outside.
    """
    where = pointer + rows * stride + columns
    if RAGGED:
        tile = tl.load(where, mask=(rows < n_rows) & (columns < WIDTH), other=0.0)
    else:
        tile = tl.load(where)
    return tile


@triton.jit
def store_tile(pointer, tile, rows, n_rows, stride, WIDTH: tl.constexpr, columns, RAGGED: tl.constexpr):
    """Store rows x columns where they lie inside ``n_rows`` x ``WIDTH``, in the type of the memory."""
    where = pointer + rows * stride + columns
    tile = tile.to(pointer.dtype.element_ty)
    if RAGGED:
        tl.store(where, tile, mask=(rows < n_rows) & (columns < WIDTH))
    else:
        tl.store(where, tile)


@triton.jit
def load_gate(
    pointer,
    first,
    rows,
    n_rows,
    heads,
    WIDTH: tl.constexpr,
    columns,
    KIND: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Load a gate in fp32: a value a channel as rows x columns, a scalar shaped as ``rows``."""
    if KIND == 2:
        gate = load_tile(pointer + first * WIDTH, rows, n_rows, heads * WIDTH, WIDTH, columns, RAGGED)
    else:
        gate = tl.load(pointer + first + rows * heads, mask=rows < n_rows, other=0.0)
    return gate.to(tl.float32)


@triton.jit
def load_log_decay(
    pointer,
    first,
    rows,
    end,
    T,
    heads,
    WIDTH: tl.constexpr,
    columns,
    KIND: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Load log2 decays of rows before ``end`` (and T), 0 elsewhere."""
    inside = rows < tl.minimum(end, T)
    if KIND == 2:
        where = pointer + first * WIDTH + rows * (heads * WIDTH) + columns
        gate = tl.load(where, mask=inside & (columns < WIDTH), other=0.0)
    else:
        gate = tl.load(pointer + first + rows * heads, mask=inside, other=0.0)
    return tl.maximum(gate.to(tl.float32) * LOG2_E, LOG2_FLOOR)


@triton.jit
def store_scalar_gate(pointer, tile, rows, n_rows, heads):
    """Store a scalar gate's gradient."""
    tl.store(pointer + rows * heads, tile.to(pointer.dtype.element_ty), mask=rows < n_rows)


@triton.jit
def level_pairs(level):
    """[1, 16, 16]: row in an odd block of 2^level rows, column in the even block before it."""
    r = tl.arange(0, 16)[None, :, None] >> level
    s = tl.arange(0, 16)[None, None, :] >> level
    return ((r & 1) == 1) & (r == s + 1)


@triton.jit
def chunk_sums(x, N: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr):
    """Sums over the N * 16 rows of a chunk [N, 16, columns], for each row those that :func:`ordered` names.

    Inside a block by a masked product, across blocks by their totals (scans over rows are slow: the rows lie
    in many threads).
    """
    mask = tl.reshape(ordered(N, 16, KIND), (N, 16, 16))
    totals = tl.sum(x, 1)[None, :, :]
    block = tl.arange(0, N)[:, None, None]
    other = tl.arange(0, N)[None, :, None]
    if KIND == 0 or KIND == 3:
        beyond = tl.sum(tl.where(other < block, totals, 0.0), 1)
    else:
        beyond = tl.sum(tl.where(other > block, totals, 0.0), 1)
    return sum_rows(mask, x, PRECISION) + beyond[:, None, :]


@triton.jit
def level_sums(level):
    """[1, 16, 16]: row t sums, inside its block of 2^level, up to t (odd block) or after t (even block)."""
    t = tl.arange(0, 16)[None, :, None]
    i = tl.arange(0, 16)[None, None, :]
    odd = ((t >> level) & 1) == 1
    return ((t >> level) == (i >> level)) & ((i <= t) == odd)


@triton.jit
def block_pair_decay(log_decay):
    """[blocks, 16, 16]: exp(G_r - G_s) for r >= s of scalar log2 decays [blocks, 16], 0 above the diagonal.

    The sums are fp64: their differences keep a weak decay beside a strong one.
    """
    r = tl.arange(0, 16)[None, :, None]
    s = tl.arange(0, 16)[None, None, :]
    sums = tl.cumsum(log_decay.to(tl.float64), 1)
    between = tl.minimum((sums[:, :, None] - sums[:, None, :]).to(tl.float32), 0.0)
    return tl.where(r >= s, tl.exp2(between), 0.0)


@triton.jit
def pair_decay(log_decay, C: tl.constexpr):
    """[C, C]: as :func:`block_pair_decay` for one block of C rows."""
    r = tl.arange(0, C)[:, None]
    s = tl.arange(0, C)[None, :]
    sums = tl.cumsum(log_decay.to(tl.float64), 0)
    between = tl.minimum((sums[:, None] - sums[None, :]).to(tl.float32), 0.0)
    return tl.where(r >= s, tl.exp2(between), 0.0)


@triton.jit
def load_square(pointer, index, C: tl.constexpr, LOWER: tl.constexpr):
    """Load the [C, C] matrix number ``index``; ``LOWER``: what is above the diagonal counts as 0."""
    r = tl.arange(0, C)[:, None]
    s = tl.arange(0, C)[None, :]
    tile = tl.load(pointer + index * (C * C) + r * C + s)
    if LOWER:
        tile = tl.where(r >= s, tile, tl.zeros_like(tile))
    return tile


@triton.jit
def store_square(pointer, tile, index, C: tl.constexpr):
    """Store a [C, C] matrix as number ``index``."""
    r = tl.arange(0, C)[:, None]
    s = tl.arange(0, C)[None, :]
    tl.store(pointer + index * (C * C) + r * C + s, tile.to(pointer.dtype.element_ty))


@triton.jit
def block_rows(start, P: tl.constexpr, M: tl.constexpr, STRIDE: tl.constexpr):
    """Rows of P blocks of M, each STRIDE after the one before: [P, M], or [M] for a single block.

    A product over a batch of one would be done by every warp: single blocks are matrices, here and below.
    """
    if P == 1:
        rows = start + tl.arange(0, M)
    else:
        rows = start + tl.arange(0, P)[:, None] * STRIDE + tl.arange(0, M)[None, :]
    return rows


@triton.jit
def on_rows(x, P: tl.constexpr):
    """[P, M] -> [P, M, 1]."""
    return x[:, None] if P == 1 else x[:, :, None]


@triton.jit
def on_columns(x, P: tl.constexpr):
    """[P, M] -> [P, 1, M]; [M] -> [1, M]."""
    return x[None, :] if P == 1 else x[:, None, :]


@triton.jit
def channels(kk, P: tl.constexpr):
    """[K] -> [1, 1, K], or [1, K] for a single block."""
    return kk[None, :] if P == 1 else kk[None, None, :]


@triton.jit
def flip(x, P: tl.constexpr):
    """Transpose the last two axes."""
    return tl.trans(x) if P == 1 else tl.permute(x, (0, 2, 1))


@triton.jit
def block_cells(C: tl.constexpr, P: tl.constexpr, M: tl.constexpr, STRIDE: tl.constexpr, ROW: tl.constexpr):
    """Offsets [P, M, M] in a [C, C] matrix: block p starts at row ROW + p STRIDE, column p STRIDE."""
    rows = on_rows(block_rows(ROW, P, M, STRIDE), P)
    return rows * C + on_columns(block_rows(0, P, M, STRIDE), P)


@triton.jit
def block_inverse(t, N: tl.constexpr, EXACT: tl.constexpr):
    """(I + T)^-1 of N strictly lower triangles [N, 16, 16]."""
    r = tl.arange(0, 16)[None, :, None]
    s = tl.arange(0, 16)[None, None, :]
    x = tl.broadcast_to(tl.where(r == s, 1.0, 0.0), (N, 16, 16))
    for level in range(4):
        x -= dot(dot(x, tl.where(level_pairs(level), t, 0.0), EXACT), x, EXACT)
    return x


@triton.jit
def merge_inverses(x, t, P: tl.constexpr, M: tl.constexpr, EXACT: tl.constexpr):
    """From the inverses [2P, M, M] of diagonal blocks and T between them [P, M, M]: inverses [P, 2M, 2M]."""
    even, odd = tl.split(tl.permute(tl.reshape(x, (P, 2, M, M)), (0, 2, 3, 1)))
    if P == 1:
        even = tl.reshape(even, (M, M))
        odd = tl.reshape(odd, (M, M))
    corner = -dot(dot(odd, t, EXACT), even, EXACT)
    both = tl.join(tl.join(even, tl.zeros_like(even)), tl.join(corner, odd))
    if P == 1:
        merged = tl.reshape(tl.permute(both, (3, 0, 2, 1)), (2 * M, 2 * M))
    else:
        merged = tl.reshape(tl.permute(both, (0, 4, 1, 3, 2)), (P, 2 * M, 2 * M))
    return merged
