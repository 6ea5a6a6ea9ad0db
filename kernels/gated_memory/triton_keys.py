"""The gated memory backward for q, k, erase and the log decay, all chunks at once."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gated_memory.triton_forward import scalar_decay
from kernels.gated_memory.triton_tiles import (
    LOG2_FLOOR,
    chunk_sums,
    dot,
    load_gate,
    load_log_decay,
    load_square,
    load_tile,
    store_scalar_gate,
    store_tile,
)


@triton.jit(do_not_specialize=["T"])
def key_backward_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    v_ptr,  # [B, T, H, V]
    log_decay_ptr,  # [B, T, H] or [B, T, H, K]
    erase_ptr,  # [B, T, H] or [B, T, H, K]
    write_ptr,  # [B, T, H] or [B, T, H, V]
    states_ptr,  # [B, H, chunks, K, V]
    d_states_ptr,  # [B, H, chunks, K, V]
    r_ptr,  # [B, H, chunks * C, V]: R, with an erase gate
    dz_ptr,  # [B, H, chunks * C, V]: dZ, with an erase gate
    do_ptr,  # [B, T, H, V]
    d_scores_ptr,  # [B, H, chunks, C, C], from value_backward_kernel
    d_triangle_ptr,  # likewise
    decays_ptr,  # [B, H, chunks, 2, C] or [B, H, chunks, K] fp32
    dq_ptr,  # the gradients are shaped like their tensors
    dk_ptr,
    de_ptr,  # [B, T, H, K], where the decay is a channel's: of erase * k
    d_log_decay_ptr,  # fp32; of a scalar decay holds what value_backward_kernel found
    d_erase_ptr,
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
    LEFT: tl.constexpr,
    SUMS: tl.constexpr,
):
    """One chunk a program, tile by tile of key channels; here BK may be less than K.

    Where the decay is a channel's, all but what comes through A and T: pair_backward_kernel adds that.
    """
    N: tl.constexpr = C // 16
    RAGGED_K: tl.constexpr = RAGGED or (K % BK != 0)
    RAGGED_V: tl.constexpr = RAGGED or (V % BV != 0)
    n_chunks = tl.cdiv(T, C)
    n = (tl.program_id(0) // n_chunks).to(tl.int64)
    chunk = tl.program_id(0) % n_chunks
    at = n * n_chunks + chunk
    first = (n // H) * T * H + n % H
    start = chunk * C
    rows = start + tl.arange(0, C)
    row = rows[:, None]
    rows_3 = start + tl.arange(0, N)[:, None, None] * 16 + tl.arange(0, 16)[None, :, None]
    local = tl.arange(0, C)[:, None]
    r_ptr += at * (C * V)
    dz_ptr += at * (C * V)
    states_ptr += at * (K * V)
    d_states_ptr += at * (K * V)
    if DECAY == 1:
        before, after, whole = scalar_decay(decays_ptr, at, C)
    entering = tl.zeros((C,), tl.float32)
    leaving = tl.zeros((C,), tl.float32)
    kept_sum = tl.zeros((1,), tl.float32)
    d_beta = tl.zeros((C,), tl.float32)
    for key_tile in range(0, tl.cdiv(K, BK)):
        kk = key_tile * BK + tl.arange(0, BK)
        dq = tl.zeros((C, BK), tl.float32)
        dk = tl.zeros((C, BK), tl.float32)
        de = tl.zeros((C, BK), tl.float32)
        kept = tl.zeros((BK,), tl.float32)
        for tile in range(0, tl.cdiv(V, BV)):
            columns = tile * BV + tl.arange(0, BV)[None, :]
            state = load_tile(states_ptr, kk[:, None], K, V, V, columns, K % BK != 0 or V % BV != 0)
            d_state = load_tile(d_states_ptr, kk[:, None], K, V, V, columns, K % BK != 0 or V % BV != 0)
            do = load_tile(do_ptr + first * V, row, T, H * V, V, columns, RAGGED_V)
            if ERASE != 0:
                r = load_tile(r_ptr, local, C, V, V, columns, V % BV != 0)
                dz = load_tile(dz_ptr, local, C, V, V, columns, V % BV != 0)
                de -= dot(dz, tl.trans(state), PRECISION)
            else:
                r = load_tile(v_ptr + first * V, row, T, H * V, V, columns, RAGGED_V)
                if WRITE != 0:
                    r = r * load_gate(write_ptr, first, row, T, H, V, columns, WRITE, RAGGED_V)
            dq += dot(do, tl.trans(state), PRECISION)
            dk += dot(r, tl.trans(d_state), PRECISION)
            if DECAY != 0:
                kept += tl.sum(d_state.to(tl.float32) * state.to(tl.float32), 1)

        q = load_tile(q_ptr + first * K, row, T, H * K, K, kk[None, :], RAGGED_K)
        k = load_tile(k_ptr + first * K, row, T, H * K, K, kk[None, :], RAGGED_K)
        e = k
        if ERASE != 0:
            erase = load_gate(erase_ptr, first, row, T, H, K, kk[None, :], ERASE, RAGGED_K)
            e = k * erase
        dq *= scale
        if DECAY == 1:
            dq *= before[:, None]
            de *= before[:, None]
            dk *= after[:, None]
            enter = q * dq
            if ERASE != 0:
                enter += e * de
            entering += tl.sum(enter, 1)
            leaving += tl.sum(k * dk, 1)
            kept_sum += tl.sum(kept, 0)
        elif DECAY == 2:
            columns_3 = kk[None, None, :]
            log_decay = load_log_decay(log_decay_ptr, first, rows_3, T, T, H, K, columns_3, 2, RAGGED_K)
            upto = tl.reshape(tl.exp2(chunk_sums(log_decay, N, 0, SUMS)), (C, BK))
            dq *= upto
            de *= upto
            dk *= tl.reshape(tl.exp2(chunk_sums(log_decay, N, 1, SUMS)), (C, BK))
            enter = q * dq
            if ERASE != 0:
                enter += e * de
                store_tile(de_ptr + first * K, de, row, T, H * K, K, kk[None, :], RAGGED_K)
            # a key that leaves the chunk passes the gates after it, a row that enters it those up to it
            dg = chunk_sums(tl.reshape(enter, (N, 16, BK)), N, 2, SUMS)
            dg += chunk_sums(tl.reshape(k * dk, (N, 16, BK)), N, 3, SUMS)
            dg += (tl.load(decays_ptr + at * K + kk, mask=kk < K, other=0.0) * kept)[None, None, :]
            store_tile(d_log_decay_ptr + first * K, dg, rows_3, T, H * K, K, columns_3, RAGGED_K)
        if DECAY != 2:
            d_scores = load_square(d_scores_ptr, at, C, False)
            dq += dot(d_scores, k, PRECISION if ERASE == 0 else LEFT)
            dk += dot(tl.trans(d_scores), q, PRECISION)
            if ERASE != 0:
                d_t = load_square(d_triangle_ptr, at, C, False)
                de += dot(d_t, k, LEFT)
                dk += dot(tl.trans(d_t), e, PRECISION)
        if ERASE != 0 and DECAY != 2:
            if ERASE == 2:
                store_tile(d_erase_ptr + first * K, de * k, row, T, H * K, K, kk[None, :], RAGGED_K)
            else:
                d_beta += tl.sum(de * k, 1)
            dk += de * erase
        store_tile(dq_ptr + first * K, dq, row, T, H * K, K, kk[None, :], RAGGED_K)
        store_tile(dk_ptr + first * K, dk, row, T, H * K, K, kk[None, :], RAGGED_K)
    if ERASE == 1 and DECAY != 2:
        store_scalar_gate(d_erase_ptr + first, d_beta, rows, T, H)
    if DECAY == 1:
        log_decay = load_log_decay(log_decay_ptr, first, rows, T, T, H, K, rows, 1, RAGGED)
        dg = tl.load(d_log_decay_ptr + first + rows * H, mask=rows < T, other=0.0)
        dg += tl.cumsum(entering, 0, reverse=True) + (tl.cumsum(leaving, 0) - leaving) + whole * kept_sum
        store_scalar_gate(d_log_decay_ptr + first, tl.where(log_decay > LOG2_FLOOR, dg, 0.0), rows, T, H)
