"""The token loops of the sLSTM as Triton kernels: a whole sequence in one launch forward, one backward.

Equations and adjoint are those of ``fused.py`` (mean y = c / n and log-normaliser L instead of c, n, m). A
program owns one head of one replica and a tile of the batch. Its state stays on chip for all tokens, and so
does its part of R where it fits (``RESIDENT``; else R comes from the L2 cache for every token, in pieces).

Axes: G replicas, B batch, T tokens, H heads, K channels. Tiles: BB rows of the batch, BK >= K channels.
Gates and their gradients are ordered i, f, z, o.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_products import operand, product

PIECE = tl.constexpr(16)  # rows of R at a time where it is not resident


@triton.jit
def sigmoid(x):
    """Logistic function without overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x > 0, 1.0, e) / (1.0 + e)


@triton.jit
def tanh(x):
    """Hyperbolic tangent without overflow."""
    e = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    return tl.where(x > 0, y, -y)


@triton.jit
def log_of_one_plus(x):
    """log(1 + x) for 0 <= x <= 1 as 2 artanh(x / (2 + x)): small x keep their digits."""
    s = x / (x + 2.0)
    q = s * s
    p = q * (2.0 / 13.0) + 2.0 / 11.0
    p = p * q + 2.0 / 9.0
    p = p * q + 2.0 / 7.0
    p = p * q + 2.0 / 5.0
    p = p * q + 2.0 / 3.0
    return s * (p * q + 2.0)


@triton.jit
def load_weight(pointer, where, inside, HALF: tl.constexpr, PRECISION: tl.constexpr):
    """One gate's part of R, prepared as a factor."""
    return operand(tl.load(pointer + where, mask=inside, other=0.0).to(tl.float32), HALF, PRECISION)


@triton.jit
def load_weights(pointer, stride, where, inside, HALF: tl.constexpr, PRECISION: tl.constexpr):
    """R's parts for i, f, z, o, ``stride`` apart, each as a prepared factor of two."""
    wi, wi_low = load_weight(pointer, where, inside, HALF, PRECISION)
    wf, wf_low = load_weight(pointer + stride, where, inside, HALF, PRECISION)
    wz, wz_low = load_weight(pointer + 2 * stride, where, inside, HALF, PRECISION)
    wo, wo_low = load_weight(pointer + 3 * stride, where, inside, HALF, PRECISION)
    return wi, wi_low, wf, wf_low, wz, wz_low, wo, wo_low


@triton.jit
def load_four(pointer, stride, inside):
    """Four tiles ``stride`` apart in fp32, zeros outside the mask."""
    a = tl.load(pointer, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(pointer + stride, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(pointer + 2 * stride, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(pointer + 3 * stride, mask=inside, other=0.0).to(tl.float32)
    return a, b, c, d


@triton.jit
def locate(B, H: tl.constexpr, K: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr):
    """What a program owns: replica, head, rows of the batch, channels, which of them exist, and where.

    The last two: the row of [G * B], and the cell of [G, B, H, K].
    """
    g = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    b = tl.program_id(1) * BB + tl.arange(0, BB)
    kk = tl.arange(0, BK)
    inside = (b < B)[:, None] & (kk < K)[None, :]
    row = g * B + b
    cell = row[:, None] * (H * K) + head * K + kk[None, :]
    return g, head, b, kk, inside, row, cell


@triton.jit(do_not_specialize=["B", "T"])
def forward_kernel(
    gates_ptr,  # [G, B, T, 4, H, K]
    recurrent_ptr,  # [G, 4, H, K, K]
    h_ptr,  # [G, B, H, K] fp32, as are the three below: the state before the first token
    y_ptr,
    l_ptr,
    m_ptr,
    out_ptr,  # [G, B, T, H, K]
    h_end_ptr,  # [G, B, H, K] fp32, as are the three below: the state after the last token
    y_end_ptr,
    l_end_ptr,
    m_end_ptr,
    won_ptr,  # [G, B, H, K] int32: the last token whose input gate set m; -1: none
    saved_ptr,  # [G, B, T, 5, H, K] fp32: a, sigmoid(-f), tanh(z), sigmoid(o), y before the token
    B,
    T,
    H: tl.constexpr,
    K: tl.constexpr,
    BB: tl.constexpr,
    BK: tl.constexpr,
    STORE: tl.constexpr,
    RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Outputs, the last state and what the backward needs."""
    HALF: tl.constexpr = gates_ptr.dtype.element_ty
    g, head, b, kk, inside, row, cell = locate(B, H, K, BB, BK)
    gate = gates_ptr + row[:, None] * T * (4 * H * K) + head * K + kk[None, :]
    out = out_ptr + row[:, None] * T * (H * K) + head * K + kk[None, :]
    saved = saved_ptr + row[:, None] * T * (5 * H * K) + head * K + kk[None, :]
    square = kk[:, None] * K + kk[None, :]
    in_square = (kk[:, None] < K) & (kk[None, :] < K)
    weight = recurrent_ptr + (g * 4 * H + head) * K * K
    if RESIDENT:
        wi, wi_low, wf, wf_low, wz, wz_low, wo, wo_low = load_weights(
            weight, H * K * K, square, in_square, HALF, PRECISION
        )

    h = tl.load(h_ptr + cell, mask=inside, other=0.0)
    y = tl.load(y_ptr + cell, mask=inside, other=0.0)
    l = tl.load(l_ptr + cell, mask=inside, other=0.0)
    m = tl.load(m_ptr + cell, mask=inside, other=0.0)
    won = tl.full((BB, BK), -1, tl.int32)
    # the gates of a token are loaded while the token before it is computed
    i, f, z, o = load_four(gate, H * K, inside)
    for t in range(0, T):
        if RESIDENT:
            x, x_low = operand(h, HALF, PRECISION)
            i += product(x, x_low, wi, wi_low, PRECISION)
            f += product(x, x_low, wf, wf_low, PRECISION)
            z += product(x, x_low, wz, wz_low, PRECISION)
            o += product(x, x_low, wo, wo_low, PRECISION)
        else:
            tl.store(h_end_ptr + cell, h, mask=inside)  # on its way to the product h goes through memory
            tl.debug_barrier()
            for start in range(0, K, PIECE):
                cc = start + tl.arange(0, PIECE)
                here = (b < B)[:, None] & (cc < K)[None, :]
                h_piece = h_end_ptr + row[:, None] * (H * K) + head * K + cc[None, :]
                x, x_low = operand(tl.load(h_piece, mask=here, other=0.0), HALF, PRECISION)
                part = cc[:, None] * K + kk[None, :]
                in_part = (cc < K)[:, None] & (kk < K)[None, :]
                w, w_low = load_weight(weight, part, in_part, HALF, PRECISION)
                i += product(x, x_low, w, w_low, PRECISION)
                w, w_low = load_weight(weight + H * K * K, part, in_part, HALF, PRECISION)
                f += product(x, x_low, w, w_low, PRECISION)
                w, w_low = load_weight(weight + 2 * H * K * K, part, in_part, HALF, PRECISION)
                z += product(x, x_low, w, w_low, PRECISION)
                w, w_low = load_weight(weight + 3 * H * K * K, part, in_part, HALF, PRECISION)
                o += product(x, x_low, w, w_low, PRECISION)
            tl.debug_barrier()
        gate += 4 * H * K
        ahead = inside & (t + 1 + 0 * b < T)[:, None]
        next_i, next_f, next_z, next_o = load_four(gate, H * K, ahead)

        e = tl.exp(-tl.abs(f))
        log_keep = tl.minimum(f, 0.0) - log_of_one_plus(e)
        kept = l + log_keep
        m += log_keep
        won = tl.where(i > m, t, won)
        m = tl.maximum(m, i)
        d = i - kept
        e_d = tl.exp(-tl.abs(d))
        l = tl.maximum(i, kept) + log_of_one_plus(e_d)
        a = tl.where(d > 0, 1.0, e_d) / (1.0 + e_d)
        z = tanh(z)
        o = sigmoid(o)
        if STORE:
            tl.store(saved, a, mask=inside)
            tl.store(saved + H * K, tl.where(f > 0, e, 1.0) / (1.0 + e), mask=inside)
            tl.store(saved + 2 * H * K, z, mask=inside)
            tl.store(saved + 3 * H * K, o, mask=inside)
            tl.store(saved + 4 * H * K, y, mask=inside)
            saved += 5 * H * K
        y += a * (z - y)
        h = o * y
        tl.store(out, h.to(out_ptr.dtype.element_ty), mask=inside)
        out += H * K
        i = next_i
        f = next_f
        z = next_z
        o = next_o
    tl.store(h_end_ptr + cell, h, mask=inside)
    tl.store(y_end_ptr + cell, y, mask=inside)
    tl.store(l_end_ptr + cell, l, mask=inside)
    tl.store(m_end_ptr + cell, m, mask=inside)
    if STORE:
        tl.store(won_ptr + cell, won, mask=inside)


@triton.jit(do_not_specialize=["B", "T"])
def backward_kernel(
    recurrent_ptr,  # [G, 4, H, K, K]
    saved_ptr,  # [G, B, T, 5, H, K] fp32
    won_ptr,  # [G, B, H, K] int32
    d_out_ptr,  # [G, B, T, H, K]
    dh_end_ptr,  # [G, B, H, K] fp32, as are the three below: gradients of the last state
    dy_end_ptr,
    dl_end_ptr,
    dm_end_ptr,
    d_gates_ptr,  # [G, B, T, 4, H, K]
    dh_ptr,  # [G, B, H, K] fp32, as are the three below: gradients of the first state
    dy_ptr,
    dl_ptr,
    dm_ptr,
    B,
    T,
    H: tl.constexpr,
    K: tl.constexpr,
    BB: tl.constexpr,
    BK: tl.constexpr,
    HAS_OUT: tl.constexpr,
    HAS_END: tl.constexpr,
    HAS_M: tl.constexpr,
    RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of the gates and of the first state; that of R is a product of matrices afterwards."""
    HALF: tl.constexpr = d_gates_ptr.dtype.element_ty
    g, head, b, kk, inside, row, cell = locate(B, H, K, BB, BK)
    last = row[:, None] * T + T - 1
    saved = saved_ptr + last * (5 * H * K) + head * K + kk[None, :]
    d_gate = d_gates_ptr + last * (4 * H * K) + head * K + kk[None, :]
    d_out = d_out_ptr + last * (H * K) + head * K + kk[None, :]
    square = kk[:, None] + kk[None, :] * K  # transposed
    in_square = (kk[:, None] < K) & (kk[None, :] < K)
    weight = recurrent_ptr + (g * 4 * H + head) * K * K
    if RESIDENT:
        wi, wi_low, wf, wf_low, wz, wz_low, wo, wo_low = load_weights(
            weight, H * K * K, square, in_square, HALF, PRECISION
        )

    dh = tl.zeros((BB, BK), tl.float32)
    u = tl.zeros((BB, BK), tl.float32)
    dl = tl.zeros((BB, BK), tl.float32)
    if HAS_END:
        dh += tl.load(dh_end_ptr + cell, mask=inside, other=0.0)
        u += tl.load(dy_end_ptr + cell, mask=inside, other=0.0)
        dl += tl.load(dl_end_ptr + cell, mask=inside, other=0.0)
    if HAS_M:
        dm = tl.load(dm_end_ptr + cell, mask=inside, other=0.0)
        won = tl.load(won_ptr + cell, mask=inside, other=-1)
    a, s, z, o = load_four(saved, H * K, inside)
    y = tl.load(saved + 4 * H * K, mask=inside, other=0.0)
    if HAS_OUT:
        dh += tl.load(d_out, mask=inside, other=0.0).to(tl.float32)
    for back in range(0, T):
        t = T - 1 - back
        ahead = inside & (t + 0 * b > 0)[:, None]
        saved -= 5 * H * K
        next_a, next_s, next_z, next_o = load_four(saved, H * K, ahead)
        next_y = tl.load(saved + 4 * H * K, mask=ahead, other=0.0)
        if HAS_OUT:
            d_out -= H * K
            next_dh = tl.load(d_out, mask=ahead, other=0.0).to(tl.float32)

        moved = a * (z - y)
        u += dh * o
        d_o = dh * (y + moved) * o * (1.0 - o)
        d_z = u * a * (1.0 - z * z)
        kept = (1.0 - a) * (dl - u * moved)
        d_i = dl - kept
        d_f = kept * s
        if HAS_M:  # m_T is the sum of the last winner's input gate and the log decays after it
            d_i += tl.where(t == won, dm, 0.0)
            d_f += tl.where(t > won, dm, 0.0) * s
        u *= 1.0 - a
        dl = kept
        tl.store(d_gate, d_i.to(d_gates_ptr.dtype.element_ty), mask=inside)
        tl.store(d_gate + H * K, d_f.to(d_gates_ptr.dtype.element_ty), mask=inside)
        tl.store(d_gate + 2 * H * K, d_z.to(d_gates_ptr.dtype.element_ty), mask=inside)
        tl.store(d_gate + 3 * H * K, d_o.to(d_gates_ptr.dtype.element_ty), mask=inside)
        d_gate -= 4 * H * K

        if RESIDENT:
            x, x_low = operand(d_i, HALF, PRECISION)
            dh = product(x, x_low, wi, wi_low, PRECISION)
            x, x_low = operand(d_f, HALF, PRECISION)
            dh += product(x, x_low, wf, wf_low, PRECISION)
            x, x_low = operand(d_z, HALF, PRECISION)
            dh += product(x, x_low, wz, wz_low, PRECISION)
            x, x_low = operand(d_o, HALF, PRECISION)
            dh += product(x, x_low, wo, wo_low, PRECISION)
        else:  # the gradients just stored come back in pieces
            dh = tl.zeros((BB, BK), tl.float32)
            tl.debug_barrier()
            for start in range(0, K, PIECE):
                cc = start + tl.arange(0, PIECE)
                here = (b < B)[:, None] & (cc < K)[None, :]
                piece = d_gates_ptr + (row[:, None] * T + t) * (4 * H * K) + head * K + cc[None, :]
                part = cc[:, None] + kk[None, :] * K
                in_part = (cc < K)[:, None] & (kk < K)[None, :]
                for q in range(0, 4):
                    x = tl.load(piece + q * H * K, mask=here, other=0.0).to(tl.float32)
                    x, x_low = operand(x, HALF, PRECISION)
                    w, w_low = load_weight(weight + q * H * K * K, part, in_part, HALF, PRECISION)
                    dh += product(x, x_low, w, w_low, PRECISION)
        if HAS_OUT:
            dh += next_dh
        a = next_a
        s = next_s
        z = next_z
        o = next_o
        y = next_y
    tl.store(dh_ptr + cell, dh, mask=inside)
    tl.store(dy_ptr + cell, u, mask=inside)
    tl.store(dl_ptr + cell, dl, mask=inside)
    if HAS_M:
        tl.store(dm_ptr + cell, tl.where(won < 0, dm, 0.0), mask=inside)
