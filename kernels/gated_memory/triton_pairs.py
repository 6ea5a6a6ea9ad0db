"""The rest of the backward where the decay is a channel's: q, k, erase and the decay through A and T."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gated_memory.triton_tiles import (
    LOG2_FLOOR,
    chunk_sums,
    dot,
    level_pairs,
    level_sums,
    load_gate,
    load_log_decay,
    load_square,
    load_tile,
    store_scalar_gate,
    store_tile,
    sum_rows,
)


@triton.jit
def level_factor(log_decay, N: tl.constexpr, LEVEL: tl.constexpr, PRECISION: tl.constexpr):
    """[N, 16, columns]: decay inside a block of 2^LEVEL >= 16 rows, up to each (odd) or after it (even)."""
    S: tl.constexpr = LEVEL - 4
    block = tl.arange(0, N)[:, None, None]
    other = tl.arange(0, N)[None, :, None]
    odd = ((block >> S) & 1) == 1
    t = tl.arange(0, 16)[None, :, None]
    i = tl.arange(0, 16)[None, None, :]
    inside = sum_rows((i <= t) == odd, log_decay, PRECISION)
    if S > 0:
        beyond = ((block >> S) == (other >> S)) & (block != other) & ((other < block) == odd)
        inside += tl.sum(tl.where(beyond, tl.sum(log_decay, 1)[None, :, :], 0.0), 1)[:, None, :]
    return tl.exp2(inside)


@triton.jit
def level_backward(
    dq, dk, de, q, k, e, factor, d_scores, d_t, pairs, C: tl.constexpr, BK: tl.constexpr,
    ERASE: tl.constexpr, PRECISION: tl.constexpr, LEFT: tl.constexpr,
):  # fmt: skip
    """Add what comes through the pairs of one level of at least 16 rows; all tiles [C, BK] or [C, C]."""
    factor = tl.reshape(factor, (C, BK))
    key = k * factor
    d_pairs = tl.where(pairs, d_scores, tl.zeros_like(d_scores))
    dq += dot(d_pairs, key, PRECISION if ERASE == 0 else LEFT) * factor
    d_key = dot(tl.trans(d_pairs), q * factor, PRECISION)
    if ERASE != 0:
        d_pairs = tl.where(pairs, d_t, tl.zeros_like(d_t))
        de += dot(d_pairs, key, LEFT) * factor
        d_key += dot(tl.trans(d_pairs), e * factor, PRECISION)
    dk += d_key * factor
    return dq, dk, de


@triton.jit(do_not_specialize=["T"])
def pair_backward_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    log_decay_ptr,  # [B, T, H, K]
    erase_ptr,  # [B, T, H] or [B, T, H, K]
    d_scores_ptr,  # [B, H, chunks, C, C], from value_backward_kernel
    d_triangle_ptr,  # likewise
    dq_ptr,  # this one and those below hold what key_backward_kernel found
    dk_ptr,
    de_ptr,  # [B, T, H, K]
    d_log_decay_ptr,  # fp32
    d_erase_ptr,  # like erase; only written
    T,
    H,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    ERASE: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    LEFT: tl.constexpr,
    SUMS: tl.constexpr,
):
    """One chunk a program, tile by tile of key channels; the levels below 16 inside blocks of 16 rows."""
    N: tl.constexpr = C // 16
    RAGGED_K: tl.constexpr = RAGGED or (K % BK != 0)
    n_chunks = tl.cdiv(T, C)
    n = (tl.program_id(0) // n_chunks).to(tl.int64)
    chunk = tl.program_id(0) % n_chunks
    at = n * n_chunks + chunk
    first = (n // H) * T * H + n % H
    start = chunk * C
    flat = start + tl.arange(0, C)
    block = tl.arange(0, N)[:, None, None]
    rows = start + block * 16 + tl.arange(0, 16)[None, :, None]
    r = tl.arange(0, C)[:, None]
    s = tl.arange(0, C)[None, :]
    cells = (block * 16 + tl.arange(0, 16)[None, :, None]) * C + block * 16 + tl.arange(0, 16)[None, None, :]
    d_scores_ptr += at * (C * C)
    d_triangle_ptr += at * (C * C)
    d_beta = tl.zeros((C,), tl.float32)
    for key_tile in range(0, tl.cdiv(K, BK)):
        kk = key_tile * BK + tl.arange(0, BK)
        columns = kk[None, None, :]
        log_decay = load_log_decay(log_decay_ptr, first, rows, T, T, H, K, columns, 2, RAGGED_K)
        q = load_tile(q_ptr + first * K, rows, T, H * K, K, columns, RAGGED_K)
        k = load_tile(k_ptr + first * K, rows, T, H * K, K, columns, RAGGED_K)
        e = k
        if ERASE != 0:
            e = k * load_gate(erase_ptr, first, rows, T, H, K, columns, ERASE, RAGGED_K)
        dq = tl.zeros((N, 16, BK), tl.float32)
        dk = tl.zeros((N, 16, BK), tl.float32)
        de = tl.zeros((N, 16, BK), tl.float32)
        d_scores = tl.load(d_scores_ptr + cells)
        d_t = d_scores
        if ERASE != 0:
            d_t = tl.load(d_triangle_ptr + cells)
        for level in range(4):
            pairs = level_pairs(level)
            sums = tl.broadcast_to(level_sums(level), (N, 16, 16))
            factor = tl.exp2(sum_rows(sums, log_decay, SUMS))
            key = k * factor
            d_pairs = tl.where(pairs, d_scores, tl.zeros_like(d_scores))
            dq += dot(d_pairs, key, PRECISION if ERASE == 0 else LEFT) * factor
            d_key = dot(tl.permute(d_pairs, (0, 2, 1)), q * factor, PRECISION)
            if ERASE != 0:
                d_pairs = tl.where(pairs, d_t, tl.zeros_like(d_t))
                de += dot(d_pairs, key, LEFT) * factor
                d_key += dot(tl.permute(d_pairs, (0, 2, 1)), e * factor, PRECISION)
            dk += d_key * factor
        dq = tl.reshape(dq, (C, BK))
        dk = tl.reshape(dk, (C, BK))
        de = tl.reshape(de, (C, BK))

        columns = kk[None, :]
        row = flat[:, None]
        q = load_tile(q_ptr + first * K, row, T, H * K, K, columns, RAGGED_K)
        k = load_tile(k_ptr + first * K, row, T, H * K, K, columns, RAGGED_K)
        e = k
        if ERASE != 0:
            erase = load_gate(erase_ptr, first, row, T, H, K, columns, ERASE, RAGGED_K)
            e = k * erase
        if C >= 32:
            scores_2 = load_square(d_scores_ptr, 0, C, False)
            t_2 = scores_2
            if ERASE != 0:
                t_2 = load_square(d_triangle_ptr, 0, C, False)
            pairs = ((r >> 4) == (s >> 4) + 1) & (((r >> 4) & 1) == 1)
            factor = level_factor(log_decay, N, 4, SUMS)
            dq, dk, de = level_backward(
                dq, dk, de, q, k, e, factor, scores_2, t_2, pairs, C, BK, ERASE, PRECISION, LEFT
            )
            if C >= 64:
                pairs = ((r >> 5) == (s >> 5) + 1) & (((r >> 5) & 1) == 1)
                factor = level_factor(log_decay, N, 5, SUMS)
                dq, dk, de = level_backward(
                    dq, dk, de, q, k, e, factor, scores_2, t_2, pairs, C, BK, ERASE, PRECISION, LEFT
                )
        # a pair (r, s) has the gates s + 1 ... r between: those up to r less those up to s
        through = q * dq - k * dk
        if ERASE != 0:
            through += e * de
        dg = tl.reshape(chunk_sums(tl.reshape(through, (N, 16, BK)), N, 2, SUMS), (C, BK))
        dg += load_tile(d_log_decay_ptr + first * K, row, T, H * K, K, columns, RAGGED_K)
        log_decay = load_log_decay(log_decay_ptr, first, row, T, T, H, K, columns, 2, RAGGED_K)
        dg = tl.where(log_decay > LOG2_FLOOR, dg, 0.0)
        store_tile(d_log_decay_ptr + first * K, dg, row, T, H * K, K, columns, RAGGED_K)
        # the diagonal of A has no decay
        diagonal = tl.load(d_scores_ptr + tl.arange(0, C) * (C + 1)).to(tl.float32)[:, None]
        dq += diagonal * k
        dk += diagonal * q
        dq += load_tile(dq_ptr + first * K, row, T, H * K, K, columns, RAGGED_K)
        dk += load_tile(dk_ptr + first * K, row, T, H * K, K, columns, RAGGED_K)
        if ERASE != 0:
            de += load_tile(de_ptr + first * K, row, T, H * K, K, columns, RAGGED_K)
            dk += de * erase
        if ERASE == 2:
            store_tile(d_erase_ptr + first * K, de * k, row, T, H * K, K, columns, RAGGED_K)
        elif ERASE == 1:
            d_beta += tl.sum(de * k, 1)
        store_tile(dq_ptr + first * K, dq, row, T, H * K, K, columns, RAGGED_K)
        store_tile(dk_ptr + first * K, dk, row, T, H * K, K, columns, RAGGED_K)
    if ERASE == 1:
        store_scalar_gate(d_erase_ptr + first, d_beta, flat, T, H)
