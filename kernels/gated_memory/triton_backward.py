"""The gated memory backward, a whole sequence in one launch: the chunks in reverse, from the stored chunk states.

Every gradient is a sum over value columns of products, so a program that owns a tile of the columns writes its share
and the shares are added afterwards in a fixed order: no atomics. The gradient of the log decay adds each pair (r, s)
to the gates between s and r through the same 0/1 sums as the forward: no difference of large sums, and an exact 0
where a gate erases all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gated_memory.triton_tiles import (
    LOG_FLOOR,
    chunk_decay,
    chunk_scores,
    dot,
    level_decay,
    level_pairs,
    level_sums,
    load_gate,
    load_rows,
    mask_of,
    pair_decay,
    store_gate,
    store_rows,
)


@triton.jit
def scores_backward(
    q,
    k,
    e,
    log_decay,
    d_scores,
    d_t,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    DECAY: tl.constexpr,
    ERASE: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Gradients of q, k, e and the log decay ([C, K], or [C, 1] for a scalar) from those of A and T, both [C, C]."""
    r = tl.arange(0, C)[:, None]
    s = tl.arange(0, C)[None, :]
    if DECAY == 2:
        diagonal = tl.sum(tl.where(r == s, d_scores, 0.0), 1)[:, None]
        dq = diagonal * k
        dk = diagonal * q
        de = tl.zeros_like(k)
        dg = tl.zeros_like(k)
        for level in tl.static_range(LEVELS):
            pairs = level_pairs(C, 2**level)
            factor = level_decay(log_decay, C, 2**level, EXACT)
            key = k * factor
            d_pairs = tl.where(pairs, d_scores, 0.0)
            share = dot(d_pairs, key, PRECISION) * factor
            dq += share
            through = q * share
            d_key = dot(tl.trans(d_pairs), q * factor, PRECISION)
            if ERASE != 0:
                d_pairs = tl.where(pairs, d_t, 0.0)
                share = dot(d_pairs, key, PRECISION) * factor
                de += share
                through += e * share
                d_key += dot(tl.trans(d_pairs), e * factor, PRECISION)
            share = d_key * factor
            dk += share
            through += k * share
            dg += dot(tl.trans(level_sums(C, 2**level)), through, EXACT)
    else:
        key = tl.trans(k)
        dg = tl.zeros((C, 1), tl.float32)
        de = tl.zeros_like(k)
        if DECAY == 1:
            between = pair_decay(log_decay, C, EXACT)
            d_scores *= between
            through = d_scores * dot(q, key, PRECISION)
            if ERASE != 0:
                d_t *= between
                through += d_t * dot(e, key, PRECISION)
            # gate i takes every pair with s < i <= r
            until = dot(through, mask_of(r < s), EXACT)
            dg = tl.sum(tl.trans(tl.where(r >= s, until, 0.0)), 1)[:, None]
        dq = dot(d_scores, k, PRECISION)
        dk = dot(tl.trans(d_scores), q, PRECISION)
        if ERASE != 0:
            de = dot(d_t, k, PRECISION)
            dk += dot(tl.trans(d_t), e, PRECISION)
    return dq, dk, de, dg


@triton.jit(do_not_specialize=["T"])
def backward_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    v_ptr,  # [B, T, H, V]
    log_decay_ptr,  # [B, T, H] or [B, T, H, K]
    erase_ptr,  # [B, T, H] or [B, T, H, K]
    write_ptr,  # [B, T, H] or [B, T, H, V]
    states_ptr,  # [B, H, chunks, K, V] fp32
    do_ptr,  # [B, T, H, V]
    d_final_ptr,  # [B, H, K, V] fp32
    dq_ptr,  # the gradients are shaped like their tensors; those summed over value tiles have the tile in front
    dk_ptr,
    dv_ptr,
    d_log_decay_ptr,
    d_erase_ptr,
    d_write_ptr,
    d_initial_ptr,  # [B, H, K, V] fp32
    scale,
    T,
    H,
    rows_total,  # B * T * H
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    ERASE: tl.constexpr,
    WRITE: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):
    """All gradients, with the state's gradient carried from the last chunk to the first (facts 2.2)."""
    n = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1).to(tl.int64)
    first = (n // H) * T * H + n % H
    share = tile * rows_total + first  # the first row of this tile's share of a summed gradient
    kk = tl.arange(0, BK)
    vv = tl.program_id(1) * BV + tl.arange(0, BV)
    cell = kk.to(tl.int64)[:, None] * V + vv[None, :]
    inside = (kk[:, None] < K) & (vv[None, :] < V)
    r = tl.arange(0, C)[:, None]
    s = tl.arange(0, C)[None, :]

    d_state = tl.load(d_final_ptr + n * K * V + cell, mask=inside, other=0.0).to(tl.float32)
    n_chunks = tl.cdiv(T, C)
    for step in range(0, n_chunks):
        chunk = n_chunks - 1 - step
        state = tl.load(states_ptr + (n * n_chunks + chunk) * K * V + cell, mask=inside, other=0.0)
        rows = chunk * C + tl.arange(0, C).to(tl.int64)
        q = load_rows(q_ptr + first * K, rows, kk, T, H * K, K) * scale
        k = load_rows(k_ptr + first * K, rows, kk, T, H * K, K)
        v = load_rows(v_ptr + first * V, rows, vv, T, H * V, V)
        do = load_rows(do_ptr + first * V, rows, vv, T, H * V, V)
        z = v
        if WRITE == 2:
            write = load_gate(write_ptr + first * V, rows, vv, T, H, V, 2)
            z = v * write
        elif WRITE == 1:
            write = load_gate(write_ptr + first, rows, vv, T, H, V, 1)
            z = v * write
        e = k
        if ERASE == 2:
            erase = load_gate(erase_ptr + first * K, rows, kk, T, H, K, 2)
            e = k * erase
        elif ERASE == 1:
            erase = load_gate(erase_ptr + first, rows, kk, T, H, K, 1)
            e = k * erase
        log_decay = q
        if DECAY == 2:
            log_decay = tl.maximum(load_gate(log_decay_ptr + first * K, rows, kk, T, H, K, 2), LOG_FLOOR)
        elif DECAY == 1:
            log_decay = tl.maximum(load_gate(log_decay_ptr + first, rows, kk, T, H, K, 1), LOG_FLOOR)

        scores, x = chunk_scores(q, k, e, log_decay, C, LEVELS, DECAY, ERASE, PRECISION, EXACT)
        q_in = q
        e_in = e
        k_out = k
        if DECAY != 0:
            before, after, whole = chunk_decay(log_decay, C, DECAY, EXACT)
            q_in = q * before
            e_in = e * before
            k_out = k * after

        # through the outputs and the next state to the solved rows, and through the solve
        dz = dot(tl.trans(scores), do, PRECISION) + dot(k_out, d_state, PRECISION)
        if ERASE != 0:
            z = dot(x, z - dot(e_in, state, PRECISION), EXACT)
            dz = dot(tl.trans(x), dz, EXACT)
        d_scores = tl.where(r >= s, dot(do, tl.trans(z), PRECISION), 0.0)
        d_t = d_scores
        if ERASE != 0:
            d_t = tl.where(r > s, -dot(dz, tl.trans(z), PRECISION), 0.0)
        dq, dk, de, dg = scores_backward(
            q, k, e, log_decay, d_scores, d_t, C, LEVELS, DECAY, ERASE, PRECISION, EXACT
        )

        # through the state that enters the chunk and the one that leaves it
        dq_in = dot(do, tl.trans(state), PRECISION)
        dk_out = dot(z, tl.trans(d_state), PRECISION)
        if DECAY == 0:
            dq += dq_in
            dk += dk_out
        else:
            dq += dq_in * before
            dk += dk_out * after
            enter = q_in * dq_in
        if ERASE != 0:
            de_in = -dot(dz, tl.trans(state), PRECISION)
            if DECAY == 0:
                de += de_in
            else:
                de += de_in * before
                enter += e_in * de_in
        if DECAY == 2:
            through = tl.sum(whole * d_state * state, 1)[None, :]
            dg += dot(mask_of(r <= s), enter, EXACT) + dot(mask_of(r > s), k_out * dk_out, EXACT) + through
        elif DECAY == 1:
            enter_row = tl.trans(tl.broadcast_to(tl.sum(enter, 1)[:, None], (C, C)))
            leave_row = tl.trans(tl.broadcast_to(tl.sum(k_out * dk_out, 1)[:, None], (C, C)))
            dg += tl.sum(tl.where(r <= s, enter_row, 0.0) + tl.where(r > s, leave_row, 0.0), 1)[:, None]
            dg += tl.sum(tl.sum(whole * d_state * state, 1), 0)
        if DECAY != 0:
            d_state *= whole
        d_state += dot(tl.trans(q_in), do, PRECISION)
        if ERASE != 0:
            d_state -= dot(tl.trans(e_in), dz, PRECISION)

        if ERASE == 2:
            store_gate(d_erase_ptr + share * K, de * k, rows, kk, T, H, K, 2)
            dk += de * erase
        elif ERASE == 1:
            store_gate(d_erase_ptr + share, de * k, rows, kk, T, H, K, 1)
            dk += de * erase
        if WRITE == 2:
            store_gate(d_write_ptr + first * V, dz * v, rows, vv, T, H, V, 2)
            dz *= write
        elif WRITE == 1:
            store_gate(d_write_ptr + share, dz * v, rows, vv, T, H, V, 1)
            dz *= write
        if DECAY == 2:
            dg = tl.where(log_decay > LOG_FLOOR, dg, 0.0)
            store_gate(d_log_decay_ptr + share * K, dg, rows, kk, T, H, K, 2)
        elif DECAY == 1:
            dg = tl.where(log_decay > LOG_FLOOR, dg, 0.0)
            store_gate(d_log_decay_ptr + share, dg, rows, kk, T, H, K, 1)
        store_rows(dq_ptr + share * K, dq * scale, rows, kk, T, H * K, K)
        store_rows(dk_ptr + share * K, dk, rows, kk, T, H * K, K)
        store_rows(dv_ptr + first * V, dz, rows, vv, T, H * V, V)
    if HAS_INITIAL:
        tl.store(d_initial_ptr + n * K * V + cell, d_state, mask=inside)
