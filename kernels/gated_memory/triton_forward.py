"""The state through the chunks in order, and the outputs.

R = X (Z - Ebar S)      O = Qbar S + A R      S <- D S + Kbar^T R
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gated_memory.triton_tiles import (
    dot,
    dot_inverse,
    load_gate,
    load_inverse,
    load_square,
    load_tile,
    store_tile,
)


@triton.jit
def scalar_decay(decays_ptr, index, C: tl.constexpr):
    """Of chunk number ``index``: decay up to each row [C], after each row [C], over all of it."""
    rows = tl.arange(0, C)
    before = tl.load(decays_ptr + index * (2 * C) + rows)
    after = tl.load(decays_ptr + index * (2 * C) + C + rows)
    return before, after, tl.load(decays_ptr + index * (2 * C) + C - 1)


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    q_ptr,  # [B, T, H, K], or Qbar [B, H, chunks * C, K] where the decay is a channel's
    k_ptr,  # the same, or Kbar
    v_ptr,  # [B, T, H, V]
    erase_ptr,  # [B, T, H]
    write_ptr,  # [B, T, H] or [B, T, H, V]
    initial_ptr,  # [B, H, K, V]
    scores_ptr,  # [B, H, chunks, C, C]
    inverse_ptr,  # [B, H, chunks, 1 or 2, C, C]
    e_in_ptr,  # [B, H, chunks * C, K]: Ebar, where decay or erase is a channel's
    r_ptr,  # [B, H, chunks * C, V]: R, with STORE and an erase gate
    decays_ptr,  # [B, H, chunks, 2, C] or [B, H, chunks, K] fp32
    o_ptr,  # [B, T, H, V]
    final_ptr,  # [B, H, K, V] fp32
    states_ptr,  # [B, H, chunks, K, V], the state that enters each chunk
    scale,
    T,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    ERASE: tl.constexpr,
    WRITE: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    STORE: tl.constexpr,
    NARROW: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    RIGHT: tl.constexpr,
):
    """One program a (batch, head, tile of value columns). ``STORE`` keeps what the backward needs."""
    RAGGED_K: tl.constexpr = K != BK or (RAGGED and DECAY != 2)
    RAGGED_V: tl.constexpr = V % BV != 0
    REPEATED: tl.constexpr = PRECISION if ERASE == 0 else RIGHT  # errors that repeat with a repeated key
    n = tl.program_id(0).to(tl.int64)
    first = (n // H) * T * H + n % H
    kk = tl.arange(0, BK)
    vv = tl.program_id(1) * BV + tl.arange(0, BV)
    columns = vv[None, :]
    cell = kk[:, None] * V + columns
    inside = (kk[:, None] < K) & (columns < V)
    n_chunks = tl.cdiv(T, C)
    if DECAY == 2:
        q_ptr += n * n_chunks * (C * K)
        k_ptr += n * n_chunks * (C * K)
    else:
        q_ptr += first * K
        k_ptr += first * K
    e_in_ptr += n * n_chunks * (C * K)
    r_ptr += n * n_chunks * (C * V)
    states_ptr += n * n_chunks * (K * V)

    if HAS_INITIAL:
        state = tl.load(initial_ptr + n * K * V + cell, mask=inside, other=0.0).to(tl.float32)
    else:
        state = tl.zeros((BK, BV), tl.float32)
    for chunk in range(0, n_chunks):
        start = chunk * C
        rows = start + tl.arange(0, C)
        row = rows[:, None]
        if STORE:
            tl.store(states_ptr + chunk * K * V + cell, state.to(states_ptr.dtype.element_ty), mask=inside)
        if DECAY == 2:
            q = load_tile(q_ptr, row, n_chunks * C, K, K, kk[None, :], RAGGED_K)
            k = load_tile(k_ptr, row, n_chunks * C, K, K, kk[None, :], RAGGED_K)
        else:
            q = load_tile(q_ptr, row, T, H * K, K, kk[None, :], RAGGED_K)
            k = load_tile(k_ptr, row, T, H * K, K, kk[None, :], RAGGED_K)
        scores = load_square(scores_ptr, n * n_chunks + chunk, C, True)
        r = load_tile(v_ptr + first * V, row, T, H * V, V, columns, RAGGED_V or RAGGED)
        if WRITE == 2:
            r = r * load_gate(write_ptr, first, row, T, H, V, columns, 2, RAGGED_V or RAGGED)
        elif WRITE == 1:
            r = r * load_gate(write_ptr, first, row, T, H, V, columns, 1, RAGGED)
        o = dot(q, state, PRECISION)
        if DECAY == 1:
            before, after, whole = scalar_decay(decays_ptr, n * n_chunks + chunk, C)
            o *= (before * scale)[:, None]
        elif DECAY == 0:
            o *= scale
        if ERASE != 0:
            if DECAY == 2 or ERASE == 2:
                e = load_tile(e_in_ptr, row, n_chunks * C, K, K, kk[None, :], K != BK)
            else:
                e = k
            x, x_low = load_inverse(inverse_ptr, n * n_chunks + chunk, C, NARROW)
            erased = dot(e, state, RIGHT)
            if ERASE == 1:
                erased *= load_gate(erase_ptr, first, row, T, H, K, kk, 1, RAGGED)
            if DECAY == 1:
                erased *= before[:, None]
            r = dot_inverse(x, x_low, r - erased, NARROW, RIGHT)
            if STORE:
                store_tile(r_ptr, r, row, n_chunks * C, V, V, columns, RAGGED_V)
        o += dot(scores, r, REPEATED)
        store_tile(o_ptr + first * V, o, row, T, H * V, V, columns, RAGGED_V or RAGGED)
        if DECAY == 2:
            state *= tl.load(decays_ptr + (n * n_chunks + chunk) * K + kk, mask=kk < K, other=0.0)[:, None]
        elif DECAY == 1:
            state *= whole
            r = r * after[:, None]
        state += dot(tl.trans(k), r, REPEATED)
    tl.store(final_ptr + n * K * V + cell, state, mask=inside)
