"""What the Triton kernels of the short convolutions share: where rows lie, how they are loaded, activation.

``PACKED``: S sequences a replica lie one behind the other in one row of tokens (B = 1); ``pos`` is then the
place of a token in its own sequence, and ``home`` the first row of that sequence's state [W-1, D].
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def locate(pos_ptr, seq_ptr, row, t, n, g, inside, S, W: tl.constexpr, PACKED: tl.constexpr):
    """Place of the tokens ``row`` (number ``t`` of row n) in their sequence, and the first row of its state.

    Args:
        row: n * T + t; a scalar or a block, like t.
        inside: Which of them exist; the others get a place all the same.
    """
    if PACKED:
        pos = tl.load(pos_ptr + row, mask=inside, other=0)
        home = (g * S + tl.load(seq_ptr + row, mask=inside, other=0)) * (W - 1)
    else:
        pos = t
        home = n * (W - 1)
    return pos, home


@triton.jit
def load_lag(
    x_ptr, state_ptr, home, r, left, pos, j: tl.constexpr, d, in_d,
    D: tl.constexpr, W: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """The rows j tokens back, in x's type: from x, before the first token from the state, else zeros."""
    inside = (r < left) & (pos >= j)
    where = r[:, None] * D + d[None, :]
    x = tl.load(x_ptr - j * D + where, mask=inside[:, None] & in_d[None, :], other=0.0)
    if HAS_STATE and j > 0:
        before = (r < left) & (pos < j)
        old = state_ptr + (home + (W - 1 - j) + pos)[:, None] * D + d[None, :]
        x += tl.load(old, mask=before[:, None] & in_d[None, :], other=0.0).to(x.dtype)
    return x


@triton.jit
def load_upstream(dy_ptr, before_ptr, r, mask_r, d, in_d, D: tl.constexpr, SILU: tl.constexpr):
    """Gradient of y and what the activation was applied to (without one: again the gradient) at rows r.

    Zeros outside the mask.
    """
    mask = mask_r[:, None] & in_d[None, :]
    where = r[:, None] * D + d[None, :]
    dy = tl.load(dy_ptr + where, mask=mask, other=0.0)
    before = dy
    if SILU:
        before = tl.load(before_ptr + where, mask=mask, other=0.0)
    return dy, before


@triton.jit
def slope(upstream, SILU: tl.constexpr):
    """The gradient of the convolution, before the activation, from :func:`load_upstream`."""
    dc = upstream[0]
    if SILU:
        dc = dc.to(tl.float32) * silu_slope(upstream[1].to(tl.float32))
    return dc


@triton.jit
def sigmoid(x):
    """Logistic function without overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x > 0, 1.0, e) / (1.0 + e)


@triton.jit
def silu_slope(before):
    """Derivative of silu."""
    s = sigmoid(before)
    return s * (1.0 + before * (1.0 - s))


@triton.jit
def finish(
    y, x, y_ptr, before_ptr, where, mask, SILU: tl.constexpr, RESIDUAL: tl.constexpr, STORE: tl.constexpr
):
    """Store y after activation and residual; ``STORE``: also what it was before them."""
    if SILU:
        if STORE:
            tl.store(before_ptr + where, y.to(before_ptr.dtype.element_ty), mask=mask)
        y *= sigmoid(y)
    if RESIDUAL:
        y += x
    tl.store(y_ptr + where, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])
def sum_kernel(
    parts_ptr,  # [A, P, count] fp32
    out_ptr,  # [A, count]
    count,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up partial sums in a fixed order."""
    batch = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p = tl.arange(0, ROWS)
    parts_ptr += batch * P * count
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, P, ROWS):
        where = (start + p).to(tl.int64)[:, None] * count + c[None, :]
        inside = (start + p < P)[:, None] & (c < count)[None, :]
        total += tl.sum(tl.load(parts_ptr + where, mask=inside, other=0.0), 0)
    tl.store(out_ptr + batch * count + c, total.to(out_ptr.dtype.element_ty), mask=c < count)
