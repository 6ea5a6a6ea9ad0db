"""The gated memory backward: the state's gradient through the chunks in reverse, then all chunks in parallel.

No atomics: a program of the second kernel owns a chunk and goes through the value columns in a fixed order.
The gradient of the log decay adds each pair (r, s) to the gates between s and r through the same 0/1 sums as
the forward: no difference of large sums, and an exact 0 where a gate erases all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gated_memory.triton_tiles import (
    LOG2_FLOOR,
    chunk_decay,
    dot,
    level_pairs,
    level_sums,
    load_gate,
    load_keys,
    load_rows,
    load_square,
    mask_of,
    pair_decay,
    store_gate,
    store_rows,
    sum_rows,
)


@triton.jit(do_not_specialize=["T"])
def state_backward_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    log_decay_ptr,  # [B, T, H] or [B, T, H, K]
    erase_ptr,  # [B, T, H] or [B, T, H, K]
    squares_ptr,  # [B, H, chunks, 1 or 2, C, C] fp32: A, and X where there is an erase gate
    do_ptr,  # [B, T, H, V]
    d_final_ptr,  # [B, H, K, V]
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
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    CARRY: tl.constexpr,
    EXACT: tl.constexpr,
):
    """From the last chunk to the first: dR = X^T (A^T dO + Kbar dS), dS <- D dS + Qbar^T dO - Ebar^T dR."""
    n = tl.program_id(0).to(tl.int64)
    first = (n // H) * T * H + n % H
    kk = tl.arange(0, BK)
    vv = tl.program_id(1) * BV + tl.arange(0, BV)
    cell = kk[:, None] * V + vv[None, :]
    inside = (kk[:, None] < K) & (vv[None, :] < V)

    if HAS_FINAL:
        d_state = tl.load(d_final_ptr + n * K * V + cell, mask=inside, other=0.0).to(tl.float32)
    else:
        d_state = tl.zeros((BK, BV), tl.float32)
    SQUARES: tl.constexpr = 1 if ERASE == 0 else 2
    n_chunks = tl.cdiv(T, C)
    for step in range(0, n_chunks):
        chunk = n_chunks - 1 - step
        at = n * n_chunks + chunk
        tl.store(d_states_ptr + at * K * V + cell, d_state.to(d_states_ptr.dtype.element_ty), mask=inside)
        rows = chunk * C + tl.arange(0, C)
        q, k, erase, log_decay = load_keys(
            q_ptr, k_ptr, log_decay_ptr, erase_ptr, first, rows, T, H, scale,
            K, kk, DECAY, ERASE, RAGGED or (K != BK),
        )  # fmt: skip
        do = load_rows(do_ptr + first * V, rows, T, H * V, V, vv, RAGGED or (V % BV != 0))
        e = k * erase
        if DECAY != 0:
            before, after, whole = chunk_decay(log_decay, C, DECAY, EXACT)
            q *= before
            e *= before
            k *= after
        if ERASE != 0:
            dz = dot(tl.trans(load_square(squares_ptr, at * SQUARES, C)), do, PRECISION)
            dz += dot(k, d_state, CARRY)
            dz = dot(tl.trans(load_square(squares_ptr, at * SQUARES + 1, C)), dz, CARRY)
        if DECAY != 0:
            d_state *= whole
        d_state += dot(tl.trans(q), do, PRECISION)
        if ERASE != 0:
            d_state -= dot(tl.trans(e), dz, CARRY)
    if HAS_INITIAL:
        tl.store(d_initial_ptr + n * K * V + cell, d_state, mask=inside)


@triton.jit
def scores_backward(
    q,
    k,
    e,
    log_decay,
    d_scores,
    d_t,
    dq,
    dk,
    de,
    dg,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    DECAY: tl.constexpr,
    ERASE: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Add to the gradients of q, k, e and the log decay ([C, 1] for a scalar) what comes through A and T."""
    r = tl.arange(0, C)[:, None]
    s = tl.arange(0, C)[None, :]
    if DECAY == 2:
        diagonal = tl.sum(tl.where(r == s, d_scores, 0.0), 1)[:, None]
        dq += diagonal * k
        dk += diagonal * q
        for level in range(LEVELS):
            pairs = level_pairs(C, level)
            sums = level_sums(C, level)
            factor = tl.exp2(sum_rows(sums, log_decay, EXACT))
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
            dg += sum_rows(tl.trans(sums), through, EXACT)
    else:
        if DECAY == 1:
            key = tl.trans(k)
            between = pair_decay(log_decay, C, EXACT)
            d_scores *= between
            through = d_scores * dot(q, key, PRECISION)
            if ERASE != 0:
                d_t *= between
                through += d_t * dot(e, key, PRECISION)
            # gate i takes every pair with s < i <= r: until[i, r] sums the pairs of row r with s < i
            until = sum_rows(mask_of(s < r), tl.trans(through), EXACT)
            dg += tl.sum(tl.where(s >= r, until, 0.0), 1)[:, None]
        dq += dot(d_scores, k, PRECISION)
        dk += dot(tl.trans(d_scores), q, PRECISION)
        if ERASE != 0:
            de += dot(d_t, k, PRECISION)
            dk += dot(tl.trans(d_t), e, PRECISION)
    return dq, dk, de, dg


@triton.jit(do_not_specialize=["T"])
def chunk_backward_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    v_ptr,  # [B, T, H, V]
    log_decay_ptr,  # [B, T, H] or [B, T, H, K]
    erase_ptr,  # [B, T, H] or [B, T, H, K]
    write_ptr,  # [B, T, H] or [B, T, H, V]
    squares_ptr,  # [B, H, chunks, 1 or 2, C, C] fp32: A, and X where there is an erase gate
    states_ptr,  # [B, H, chunks, K, V]
    d_states_ptr,  # [B, H, chunks, K, V]
    do_ptr,  # [B, T, H, V]
    dq_ptr,  # the gradients are shaped like their tensors
    dk_ptr,
    dv_ptr,
    d_log_decay_ptr,
    d_erase_ptr,
    d_write_ptr,
    scale,
    T,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    ERASE: tl.constexpr,
    WRITE: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    CARRY: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One chunk a program, from the state that enters it and the gradient of the one that leaves it."""
    SQUARES: tl.constexpr = 1 if ERASE == 0 else 2
    n_chunks = tl.cdiv(T, C)
    n = (tl.program_id(0) // n_chunks).to(tl.int64)
    chunk = tl.program_id(0) % n_chunks
    at = n * n_chunks + chunk
    first = (n // H) * T * H + n % H
    rows = chunk * C + tl.arange(0, C)
    kk = tl.arange(0, BK)
    r = tl.arange(0, C)[:, None]
    s = tl.arange(0, C)[None, :]
    RAGGED_K: tl.constexpr = RAGGED or (K != BK)
    RAGGED_V: tl.constexpr = RAGGED or (V % BV != 0)

    q_in, k_out, erase, log_decay = load_keys(
        q_ptr, k_ptr, log_decay_ptr, erase_ptr, first, rows, T, H, scale, K, kk, DECAY, ERASE, RAGGED_K
    )
    e_in = k_out * erase
    if DECAY != 0:
        before, after, _ = chunk_decay(log_decay, C, DECAY, EXACT)
        q_in *= before
        e_in *= before
        k_out *= after
    scores = tl.trans(load_square(squares_ptr, at * SQUARES, C))
    if ERASE != 0:
        x = load_square(squares_ptr, at * SQUARES + 1, C)
    d_scores = tl.zeros((C, C), tl.float32)
    d_t = tl.zeros((C, C), tl.float32)
    dq = tl.zeros((C, BK), tl.float32)
    dk = tl.zeros((C, BK), tl.float32)
    de = tl.zeros((C, BK), tl.float32)
    kept = tl.zeros((BK,), tl.float32)
    d_write = tl.zeros((C,), tl.float32)
    for tile in range(0, tl.cdiv(V, BV)):
        vv = tile * BV + tl.arange(0, BV)
        cell = at * K * V + kk[:, None] * V + vv[None, :]
        inside = (kk[:, None] < K) & (vv[None, :] < V)
        state = tl.load(states_ptr + cell, mask=inside, other=0.0).to(tl.float32)
        d_state = tl.load(d_states_ptr + cell, mask=inside, other=0.0).to(tl.float32)
        v = load_rows(v_ptr + first * V, rows, T, H * V, V, vv, RAGGED_V)
        do = load_rows(do_ptr + first * V, rows, T, H * V, V, vv, RAGGED_V)
        z = v
        if WRITE == 2:
            write = load_gate(write_ptr + first * V, rows, T, H, V, vv, 2, RAGGED_V)
            z = v * write
        elif WRITE == 1:
            write = load_gate(write_ptr + first, rows, T, H, V, vv, 1, RAGGED)
            z = v * write
        dz = dot(scores, do, PRECISION) + dot(k_out, d_state, PRECISION)
        if ERASE != 0:
            z = dot(x, z - dot(e_in, state, PRECISION), CARRY)
            dz = dot(tl.trans(x), dz, CARRY)
            d_t -= dot(dz, tl.trans(z), PRECISION)
            de -= dot(dz, tl.trans(state), PRECISION)
        d_scores += dot(do, tl.trans(z), PRECISION)
        dq += dot(do, tl.trans(state), PRECISION)
        dk += dot(z, tl.trans(d_state), PRECISION)
        if DECAY != 0:
            kept += tl.sum(d_state * state, 1)
        if WRITE == 2:
            store_gate(d_write_ptr + first * V, dz * v, rows, T, H, V, vv, 2, RAGGED_V)
            dz *= write
        elif WRITE == 1:
            d_write += tl.sum(dz * v, 1)
            dz *= write
        store_rows(dv_ptr + first * V, dz, rows, T, H * V, V, vv, RAGGED_V)
    if WRITE == 1:
        store_gate(d_write_ptr + first, d_write[:, None], rows, T, H, V, kk, 1, RAGGED)

    # loaded a second time: held through the loop above they would not fit the registers
    q, k, erase, log_decay = load_keys(
        q_ptr, k_ptr, log_decay_ptr, erase_ptr, first, rows, T, H, scale, K, kk, DECAY, ERASE, RAGGED_K
    )
    e = k * erase
    dg = tl.zeros((C, 1), tl.float32)
    if DECAY != 0:
        before, after, whole = chunk_decay(log_decay, C, DECAY, EXACT)
        dq *= before
        de *= before
        dk *= after
        enter = q * dq
        if ERASE != 0:
            enter += e * de
        leave = k * dk
        if DECAY == 2:
            dg = sum_rows(mask_of(r <= s), enter, EXACT) + sum_rows(mask_of(r > s), leave, EXACT)
            dg += (tl.sum(whole, 1) * kept)[None, :]
        else:
            enter_row = tl.trans(tl.broadcast_to(tl.sum(enter, 1)[:, None], (C, C)))
            leave_row = tl.trans(tl.broadcast_to(tl.sum(leave, 1)[:, None], (C, C)))
            dg = tl.sum(tl.where(r <= s, enter_row, 0.0) + tl.where(r > s, leave_row, 0.0), 1)[:, None]
            dg += whole * tl.sum(kept, 0)
    d_scores = tl.where(r >= s, d_scores, 0.0)
    d_t = tl.where(r > s, d_t, 0.0)
    dq, dk, de, dg = scores_backward(
        q, k, e, log_decay, d_scores, d_t, dq, dk, de, dg, C, LEVELS, DECAY, ERASE, PRECISION, EXACT
    )
    if DECAY == 2:
        dg = tl.where(log_decay > LOG2_FLOOR, dg, 0.0)
        store_gate(d_log_decay_ptr + first * K, dg, rows, T, H, K, kk, 2, RAGGED_K)
    elif DECAY == 1:
        dg = tl.where(log_decay > LOG2_FLOOR, dg, 0.0)
        store_gate(d_log_decay_ptr + first, dg, rows, T, H, K, kk, 1, RAGGED)
    if ERASE == 2:
        store_gate(d_erase_ptr + first * K, de * k, rows, T, H, K, kk, 2, RAGGED_K)
        dk += de * erase
    elif ERASE == 1:
        store_gate(d_erase_ptr + first, de * k, rows, T, H, K, kk, 1, RAGGED)
        dk += de * erase
    store_rows(dq_ptr + first * K, dq * scale, rows, T, H * K, K, kk, RAGGED_K)
    store_rows(dk_ptr + first * K, dk, rows, T, H * K, K, kk, RAGGED_K)
