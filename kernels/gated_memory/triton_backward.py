"""The gated memory backward: the state's gradient through the chunks in reverse; then the value side.

That, and the key side in triton_keys.py and triton_pairs.py, takes all chunks at once. No atomics: a program
owns a chunk and goes through the value columns in a fixed order. The gradient of a scalar log decay adds each
pair (r, s) to the gates between s and r: no difference of large sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gated_memory.triton_forward import scalar_decay
from kernels.gated_memory.triton_tiles import (
    dot,
    dot_inverse,
    load_gate,
    load_inverse,
    load_log_decay,
    load_square,
    load_tile,
    ordered,
    pair_decay,
    store_scalar_gate,
    store_square,
    store_tile,
    sum_rows,
)


@triton.jit(do_not_specialize=["T"])
def state_backward_kernel(
    q_ptr,  # [B, T, H, K], or Qbar [B, H, chunks * C, K] where the decay is a channel's
    k_ptr,  # the same, or Kbar
    erase_ptr,  # [B, T, H]
    scores_ptr,  # [B, H, chunks, C, C]
    inverse_ptr,  # [B, H, chunks, 1 or 2, C, C]
    e_in_ptr,  # [B, H, chunks * C, K]: Ebar, where decay or erase is a channel's
    decays_ptr,  # [B, H, chunks, 2, C] or [B, H, chunks, K] fp32
    do_ptr,  # [B, T, H, V]
    d_final_ptr,  # [B, H, K, V]
    dz_ptr,  # [B, H, chunks * C, V]
    d_states_ptr,  # [B, H, chunks, K, V], the gradient of the state that leaves each chunk
    d_initial_ptr,  # [B, H, K, V] fp32
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
    HAS_FINAL: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    NARROW: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    RIGHT: tl.constexpr,
):
    """From the last chunk to the first: dZ = X^T (A^T dO + Kbar dS), dS <- D dS + Qbar^T dO - Ebar^T dZ."""
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
    dz_ptr += n * n_chunks * (C * V)
    d_states_ptr += n * n_chunks * (K * V)

    if HAS_FINAL:
        d_state = tl.load(d_final_ptr + n * K * V + cell, mask=inside, other=0.0).to(tl.float32)
    else:
        d_state = tl.zeros((BK, BV), tl.float32)
    for step in range(0, n_chunks):
        chunk = n_chunks - 1 - step
        start = chunk * C
        rows = start + tl.arange(0, C)
        row = rows[:, None]
        tl.store(d_states_ptr + chunk * K * V + cell, d_state.to(d_states_ptr.dtype.element_ty), mask=inside)
        if DECAY == 2:
            q = load_tile(q_ptr, row, n_chunks * C, K, K, kk[None, :], RAGGED_K)
            k = load_tile(k_ptr, row, n_chunks * C, K, K, kk[None, :], RAGGED_K)
        else:
            q = load_tile(q_ptr, row, T, H * K, K, kk[None, :], RAGGED_K)
            k = load_tile(k_ptr, row, T, H * K, K, kk[None, :], RAGGED_K)
        do = load_tile(do_ptr + first * V, row, T, H * V, V, columns, RAGGED_V or RAGGED)
        scores = load_square(scores_ptr, n * n_chunks + chunk, C, True)
        dz = dot(k, d_state, REPEATED)
        if DECAY == 1:
            before, after, whole = scalar_decay(decays_ptr, n * n_chunks + chunk, C)
            dz *= after[:, None]
        dz += dot(tl.trans(scores), do, PRECISION)
        if ERASE != 0:
            x, x_low = load_inverse(inverse_ptr, n * n_chunks + chunk, C, NARROW)
            dz = dot_inverse(tl.trans(x), tl.trans(x_low), dz, NARROW, RIGHT)
        store_tile(dz_ptr, dz, row, n_chunks * C, V, V, columns, RAGGED_V)
        if DECAY == 2:
            d_state *= tl.load(decays_ptr + (n * n_chunks + chunk) * K + kk, mask=kk < K, other=0.0)[:, None]
            d_state += dot(tl.trans(q), do, PRECISION)
        elif DECAY == 1:
            d_state *= whole
            d_state += dot(tl.trans(q), do * (before * scale)[:, None], PRECISION)
        else:
            d_state += dot(tl.trans(q), do, PRECISION) * scale
        if ERASE != 0:
            if DECAY == 2 or ERASE == 2:
                e = load_tile(e_in_ptr, row, n_chunks * C, K, K, kk[None, :], K != BK)
            else:
                e = k
            if ERASE == 1:
                dz *= load_gate(erase_ptr, first, row, T, H, K, kk, 1, RAGGED)
            if DECAY == 1:
                dz *= before[:, None]
            d_state -= dot(tl.trans(e), dz, RIGHT)
    if HAS_INITIAL:
        tl.store(d_initial_ptr + n * K * V + cell, d_state, mask=inside)


@triton.jit(do_not_specialize=["T"])
def value_backward_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    v_ptr,  # [B, T, H, V]
    log_decay_ptr,  # [B, T, H]
    erase_ptr,  # [B, T, H] or [B, T, H, K]
    write_ptr,  # [B, T, H] or [B, T, H, V]
    r_ptr,  # [B, H, chunks * C, V] fp32: R, with an erase gate
    dz_ptr,  # [B, H, chunks * C, V]
    do_ptr,  # [B, T, H, V]
    dv_ptr,  # [B, T, H, V]
    d_write_ptr,  # like write
    d_log_decay_ptr,  # [B, T, H]: what comes through A and T, for key_backward_kernel to add to
    d_scores_ptr,  # [B, H, chunks, C, C]: the gradient of q^T k in A (a scalar decay included)
    d_triangle_ptr,  # [B, H, chunks, C, C]: of e^T k in T
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
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    RIGHT: tl.constexpr,
):
    """Gradients of v and write, A and T of one chunk, and of a scalar decay through A and T."""
    RAGGED_K: tl.constexpr = RAGGED or (K != BK)
    RAGGED_V: tl.constexpr = RAGGED or (V % BV != 0)
    n_chunks = tl.cdiv(T, C)
    n = (tl.program_id(0) // n_chunks).to(tl.int64)
    chunk = tl.program_id(0) % n_chunks
    at = n * n_chunks + chunk
    first = (n // H) * T * H + n % H
    rows = chunk * C + tl.arange(0, C)
    row = rows[:, None]
    local = tl.arange(0, C)[:, None]
    r_ptr += at * (C * V)
    dz_ptr += at * (C * V)
    d_scores = tl.zeros((C, C), tl.float32)
    d_t = tl.zeros((C, C), tl.float32)
    d_write = tl.zeros((C,), tl.float32)
    for tile in range(0, tl.cdiv(V, BV)):
        columns = tile * BV + tl.arange(0, BV)[None, :]
        v = load_tile(v_ptr + first * V, row, T, H * V, V, columns, RAGGED_V)
        do = load_tile(do_ptr + first * V, row, T, H * V, V, columns, RAGGED_V)
        dz = load_tile(dz_ptr, local, C, V, V, columns, V % BV != 0)
        if WRITE != 0:
            write = load_gate(write_ptr, first, row, T, H, V, columns, WRITE, RAGGED_V)
        if ERASE != 0:
            r = load_tile(r_ptr, local, C, V, V, columns, V % BV != 0)
            d_t -= dot(dz, tl.trans(r), RIGHT)
            d_scores += dot(do, tl.trans(r), RIGHT)
        else:
            r = v
            if WRITE != 0:
                r = v * write
            d_scores += dot(do, tl.trans(r), PRECISION)
        dz = dz.to(tl.float32)
        if WRITE == 2:
            store_tile(d_write_ptr + first * V, dz * v, row, T, H * V, V, columns, RAGGED_V)
        elif WRITE == 1:
            d_write += tl.sum(dz * v, 1)
        if WRITE != 0:
            dz *= write
        store_tile(dv_ptr + first * V, dz, row, T, H * V, V, columns, RAGGED_V)
    if WRITE == 1:
        store_scalar_gate(d_write_ptr + first, d_write, rows, T, H)

    s = tl.arange(0, C)[None, :]
    d_scores = tl.where(local >= s, d_scores, 0.0)
    d_t = tl.where(local > s, d_t, 0.0)
    if DECAY == 1:
        log_decay = load_log_decay(log_decay_ptr, first, rows, T, T, H, K, rows, 1, RAGGED)
        between = pair_decay(log_decay, C)
        d_scores *= between
        kk = tl.arange(0, BK)[None, :]
        q = load_tile(q_ptr + first * K, row, T, H * K, K, kk, RAGGED_K)
        k = load_tile(k_ptr + first * K, row, T, H * K, K, kk, RAGGED_K)
        through = d_scores * (dot(q, tl.trans(k), PRECISION) * scale)
        if ERASE != 0:
            d_t *= between
            if ERASE == 2:
                e = k * load_gate(erase_ptr, first, row, T, H, K, kk, 2, RAGGED_K)
                through += d_t * dot(e, tl.trans(k), PRECISION)
            else:
                beta = load_gate(erase_ptr, first, row, T, H, K, kk, 1, RAGGED_K)
                through += d_t * (dot(k, tl.trans(k), PRECISION) * beta)
        # gate i takes every pair with s < i <= r: until[i, r] sums the pairs of row r with s < i
        until = sum_rows(ordered(1, C, 3), tl.trans(through), RIGHT)
        store_scalar_gate(d_log_decay_ptr + first, tl.sum(tl.where(s >= local, until, 0.0), 1), rows, T, H)
    store_square(d_scores_ptr, d_scores * scale, at, C)
    if ERASE != 0:
        store_square(d_triangle_ptr, d_t, at, C)
