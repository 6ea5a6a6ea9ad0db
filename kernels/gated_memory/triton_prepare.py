"""What of a chunk needs no state, all chunks at once: A, X, decays, and q, k, e under a channel's decay."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gated_memory.triton_tiles import (
    block_cells,
    block_inverse,
    block_pair_decay,
    block_rows,
    channels,
    chunk_sums,
    dot,
    flip,
    level_pairs,
    level_sums,
    load_gate,
    load_log_decay,
    load_tile,
    merge_inverses,
    narrow_halves,
    on_columns,
    on_rows,
    ordered,
    store_square,
    store_tile,
    sum_rows,
)


@triton.jit
def diagonal_blocks(
    q_ptr,
    k_ptr,
    log_decay_ptr,
    erase_ptr,
    scores_ptr,
    first,
    start,
    T,
    H,
    scale,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    DECAY: tl.constexpr,
    ERASE: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    LEFT: tl.constexpr,
    EXACT: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Store A inside the blocks of 16 rows; return, with an erase gate, the inverses [C / 16, 16, 16]."""
    N: tl.constexpr = C // 16
    r = tl.arange(0, 16)[None, :, None]
    s = tl.arange(0, 16)[None, None, :]
    rows = start + tl.arange(0, N)[:, None, None] * 16 + r
    flat = start + tl.arange(0, N)[:, None] * 16 + tl.arange(0, 16)[None, :]
    scores = tl.zeros((N, 16, 16), tl.float32)
    t = tl.zeros((N, 16, 16), tl.float32)
    for key_tile in range(0, tl.cdiv(K, BK)):
        kk = key_tile * BK + tl.arange(0, BK)[None, None, :]
        q = load_tile(q_ptr + first * K, rows, T, H * K, K, kk, RAGGED)
        k = load_tile(k_ptr + first * K, rows, T, H * K, K, kk, RAGGED)
        e = k
        if ERASE == 2:
            e = k * load_gate(erase_ptr, first, rows, T, H, K, kk, 2, RAGGED)
        if DECAY == 2:
            log_decay = load_log_decay(log_decay_ptr, first, rows, T, T, H, K, kk, 2, RAGGED)
            q = q.to(tl.float32)
            k = k.to(tl.float32)
            e = e.to(tl.float32)
            scores += tl.where(r == s, tl.sum(q * k, 2)[:, :, None], 0.0)
            for level in range(4):
                pairs = level_pairs(level)
                factor = tl.exp2(sum_rows(tl.broadcast_to(level_sums(level), (N, 16, 16)), log_decay, SUMS))
                key = tl.permute(k * factor, (0, 2, 1))
                scores += tl.where(pairs, dot(q * factor, key, PRECISION), 0.0)
                if ERASE != 0:
                    t += tl.where(pairs, dot(e * factor, key, LEFT), 0.0)
        else:
            key = tl.permute(k, (0, 2, 1))
            scores += tl.where(r >= s, dot(q, key, PRECISION), 0.0)
            if ERASE != 0:
                t += dot(e, key, LEFT if ERASE == 2 else PRECISION)
    if DECAY == 1:
        between = block_pair_decay(load_log_decay(log_decay_ptr, first, flat, T, T, H, K, flat, 1, RAGGED))
        scores *= between
        t *= between
    if ERASE == 1:
        t *= load_gate(erase_ptr, first, flat, T, H, K, flat, 1, RAGGED)[:, :, None]
    scores *= scale
    cells = tl.reshape(block_cells(C, N, 16, 16, 0), (N, 16, 16))
    tl.store(scores_ptr + cells, scores.to(scores_ptr.dtype.element_ty))
    if ERASE != 0:
        t = block_inverse(t, N, EXACT)
    return t


@triton.jit
def lower_blocks(
    q_ptr,
    k_ptr,
    log_decay_ptr,
    erase_ptr,
    scores_ptr,
    first,
    start,
    T,
    H,
    scale,
    K: tl.constexpr,
    C: tl.constexpr,
    M: tl.constexpr,
    BK: tl.constexpr,
    DECAY: tl.constexpr,
    ERASE: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    LEFT: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Store A between odd blocks of M rows and the even blocks before them; return T there [C / 2M, M, M]."""
    P: tl.constexpr = C // (2 * M)
    AXIS: tl.constexpr = 0 if P == 1 else 1
    flat_even = block_rows(start, P, M, 2 * M)
    flat_odd = flat_even + M
    even = on_rows(flat_even, P)
    odd = on_rows(flat_odd, P)
    cells = block_cells(C, P, M, 2 * M, M)
    scores = tl.zeros_like(cells).to(tl.float32)
    t = tl.zeros_like(cells).to(tl.float32)
    for key_tile in range(0, tl.cdiv(K, BK)):
        kk = channels(key_tile * BK + tl.arange(0, BK), P)
        q = load_tile(q_ptr + first * K, odd, T, H * K, K, kk, RAGGED)
        k = load_tile(k_ptr + first * K, even, T, H * K, K, kk, RAGGED)
        if DECAY == 2:
            log_decay = load_log_decay(log_decay_ptr, first, odd, T, T, H, K, kk, 2, RAGGED)
            inside = tl.exp2(sum_rows(ordered(P, M, 0), log_decay, SUMS))
            log_decay = load_log_decay(log_decay_ptr, first, even, T, T, H, K, kk, 2, RAGGED)
            rest = tl.exp2(sum_rows(ordered(P, M, 1), log_decay, SUMS))
            q = q * inside
            k = k * rest
        key = flip(k, P)
        scores += dot(q, key, PRECISION)
        if ERASE != 0:
            e = load_tile(k_ptr + first * K, odd, T, H * K, K, kk, RAGGED)
            if ERASE == 2:
                e = e * load_gate(erase_ptr, first, odd, T, H, K, kk, 2, RAGGED)
            if DECAY == 2:
                e = e * inside
            t += dot(e, key, LEFT if DECAY == 2 or ERASE == 2 else PRECISION)
    scores *= scale
    if DECAY == 1:
        upto = load_log_decay(log_decay_ptr, first, flat_odd, T, T, H, K, flat_odd, 1, RAGGED)
        ends = block_rows(start, P, M, 2 * M) - block_rows(0, 1, M, 0) + M
        after = load_log_decay(log_decay_ptr, first, flat_even + 1, ends, T, H, K, flat_odd, 1, RAGGED)
        between = on_rows(tl.exp2(tl.cumsum(upto, AXIS)), P)
        between = between * on_columns(tl.exp2(tl.cumsum(after, AXIS, reverse=True)), P)
        scores *= between
        t *= between
    if ERASE == 1:
        t *= on_rows(load_gate(erase_ptr, first, flat_odd, T, H, K, flat_odd, 1, RAGGED), P)
    tl.store(scores_ptr + cells, scores.to(scores_ptr.dtype.element_ty))
    return t


@triton.jit(do_not_specialize=["T"])
def prepare_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    log_decay_ptr,  # [B, T, H] or [B, T, H, K]
    erase_ptr,  # [B, T, H] or [B, T, H, K]
    scores_ptr,  # [B, H, chunks, C, C]: A, what is above the diagonal left as it is
    inverse_ptr,  # [B, H, chunks, 1 or 2, C, C]: X, with an erase gate; NARROW: its bf16 value, then the rest
    q_in_ptr,  # [B, H, chunks * C, K]: Qbar, where the decay is a channel's
    k_out_ptr,  # [B, H, chunks * C, K]: Kbar, likewise
    e_in_ptr,  # [B, H, chunks * C, K]: Ebar (without a scalar erase), where decay or erase is a channel's
    decays_ptr,  # fp32; a scalar decay: [B, H, chunks, 2, C], up to each token and after it; a channel's:
    # [B, H, chunks, K], that of the whole chunk
    scale,
    T,
    H,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    DECAY: tl.constexpr,
    ERASE: tl.constexpr,
    NARROW: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    LEFT: tl.constexpr,
    EXACT: tl.constexpr,
    SUMS: tl.constexpr,
):
    """One chunk a program; BK key channels at a time."""
    RAGGED_K: tl.constexpr = RAGGED or (K % BK != 0)
    N: tl.constexpr = C // 16
    n_chunks = tl.cdiv(T, C)
    n = (tl.program_id(0) // n_chunks).to(tl.int64)
    chunk = tl.program_id(0) % n_chunks
    at = n * n_chunks + chunk
    first = (n // H) * T * H + n % H  # row of token 0 of this head, in units of [B, T, H]
    start = chunk * C
    scores_ptr += at * (C * C)
    x = diagonal_blocks(
        q_ptr, k_ptr, log_decay_ptr, erase_ptr, scores_ptr, first, start, T, H, scale,
        K, C, BK, DECAY, ERASE, RAGGED_K, PRECISION, LEFT, EXACT, SUMS,
    )  # fmt: skip
    if C >= 32:
        t = lower_blocks(
            q_ptr, k_ptr, log_decay_ptr, erase_ptr, scores_ptr, first, start, T, H, scale,
            K, C, 16, BK, DECAY, ERASE, RAGGED_K, PRECISION, LEFT, SUMS,
        )  # fmt: skip
        if ERASE != 0:
            x = merge_inverses(x, t, C // 32, 16, EXACT)
    if C >= 64:
        t = lower_blocks(
            q_ptr, k_ptr, log_decay_ptr, erase_ptr, scores_ptr, first, start, T, H, scale,
            K, C, 32, BK, DECAY, ERASE, RAGGED_K, PRECISION, LEFT, SUMS,
        )  # fmt: skip
        if ERASE != 0:
            x = merge_inverses(x, t, C // 64, 32, EXACT)
    if ERASE != 0:
        x = tl.reshape(x, (C, C))
        if NARROW:
            high, low = narrow_halves(x)
            store_square(inverse_ptr, high, 2 * at, C)
            store_square(inverse_ptr, low, 2 * at + 1, C)
        else:
            store_square(inverse_ptr, x, at, C)

    if DECAY == 1:
        flat = tl.arange(0, C)
        rows = start + flat
        upto = load_log_decay(log_decay_ptr, first, rows, T, T, H, K, rows, 1, RAGGED)
        later = load_log_decay(log_decay_ptr, first, rows + 1, start + C, T, H, K, rows, 1, RAGGED)
        tl.store(decays_ptr + at * (2 * C) + flat, tl.exp2(tl.cumsum(upto, 0)))
        tl.store(decays_ptr + at * (2 * C) + C + flat, tl.exp2(tl.cumsum(later, 0, reverse=True)))
    if DECAY == 2 or ERASE == 2:
        local = tl.arange(0, N)[:, None, None] * 16 + tl.arange(0, 16)[None, :, None]
        rows = start + local
        for key_tile in range(0, tl.cdiv(K, BK)):
            columns = key_tile * BK + tl.arange(0, BK)
            kk = columns[None, None, :]
            k = load_tile(k_ptr + first * K, rows, T, H * K, K, kk, RAGGED_K)
            e = k
            if ERASE == 2:
                e = k * load_gate(erase_ptr, first, rows, T, H, K, kk, 2, RAGGED_K)
            if DECAY == 2:
                log_decay = load_log_decay(log_decay_ptr, first, rows, T, T, H, K, kk, 2, RAGGED_K)
                before = tl.exp2(chunk_sums(log_decay, N, 0, SUMS))
                q = load_tile(q_ptr + first * K, rows, T, H * K, K, kk, RAGGED_K) * (before * scale)
                store_tile(q_in_ptr + at * (C * K), q, local, C, K, K, kk, K % BK != 0)
                after = tl.exp2(chunk_sums(log_decay, N, 1, SUMS))
                store_tile(k_out_ptr + at * (C * K), k * after, local, C, K, K, kk, K % BK != 0)
                whole = tl.exp2(tl.sum(tl.sum(log_decay, 1), 0))
                tl.store(decays_ptr + at * K + columns, whole, mask=columns < K)
                e = e * before
            if ERASE != 0:
                store_tile(e_in_ptr + at * (C * K), e, local, C, K, K, kk, K % BK != 0)
