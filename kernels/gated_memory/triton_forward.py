"""The gated memory forward, a whole sequence in one launch: one program a (batch, head, tile of value columns)."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gated_memory.triton_tiles import (
    LOG_FLOOR,
    chunk_decay,
    chunk_scores,
    dot,
    load_gate,
    load_rows,
    store_rows,
)


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    v_ptr,  # [B, T, H, V]
    log_decay_ptr,  # [B, T, H] or [B, T, H, K]
    erase_ptr,  # [B, T, H] or [B, T, H, K]
    write_ptr,  # [B, T, H] or [B, T, H, V]
    initial_ptr,  # [B, H, K, V] fp32
    o_ptr,  # [B, T, H, V]
    final_ptr,  # [B, H, K, V] fp32
    states_ptr,  # [B, H, chunks, K, V] fp32, the state that enters each chunk
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
    HAS_INITIAL: tl.constexpr,
    STORE_STATES: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):
    """o_t and the last state; the chunk algorithm of facts 2.1 with one right-hand side, R = X (Z - Ebar S)."""
    n = tl.program_id(0).to(tl.int64)
    first = (n // H) * T * H + n % H  # row of token 0 of this head, in units of [B, T, H]
    kk = tl.arange(0, BK)
    vv = tl.program_id(1) * BV + tl.arange(0, BV)
    cell = kk.to(tl.int64)[:, None] * V + vv[None, :]
    inside = (kk[:, None] < K) & (vv[None, :] < V)

    if HAS_INITIAL:
        state = tl.load(initial_ptr + n * K * V + cell, mask=inside, other=0.0).to(tl.float32)
    else:
        state = tl.zeros((BK, BV), tl.float32)
    n_chunks = tl.cdiv(T, C)
    for chunk in range(0, n_chunks):
        if STORE_STATES:
            tl.store(states_ptr + (n * n_chunks + chunk) * K * V + cell, state, mask=inside)
        rows = chunk * C + tl.arange(0, C).to(tl.int64)
        q = load_rows(q_ptr + first * K, rows, kk, T, H * K, K) * scale
        k = load_rows(k_ptr + first * K, rows, kk, T, H * K, K)
        z = load_rows(v_ptr + first * V, rows, vv, T, H * V, V)
        if WRITE == 2:
            z *= load_gate(write_ptr + first * V, rows, vv, T, H, V, 2)
        elif WRITE == 1:
            z *= load_gate(write_ptr + first, rows, vv, T, H, V, 1)
        e = k
        if ERASE == 2:
            e = k * load_gate(erase_ptr + first * K, rows, kk, T, H, K, 2)
        elif ERASE == 1:
            e = k * load_gate(erase_ptr + first, rows, kk, T, H, K, 1)
        log_decay = q
        if DECAY == 2:
            log_decay = tl.maximum(load_gate(log_decay_ptr + first * K, rows, kk, T, H, K, 2), LOG_FLOOR)
        elif DECAY == 1:
            log_decay = tl.maximum(load_gate(log_decay_ptr + first, rows, kk, T, H, K, 1), LOG_FLOOR)

        scores, x = chunk_scores(q, k, e, log_decay, C, LEVELS, DECAY, ERASE, PRECISION, EXACT)
        key = k
        if DECAY != 0:
            before, after, whole = chunk_decay(log_decay, C, DECAY, EXACT)
            q *= before
            e *= before
            key = k * after
        if ERASE != 0:
            z = dot(x, z - dot(e, state, PRECISION), EXACT)
        o = dot(q, state, PRECISION) + dot(scores, z, PRECISION)
        store_rows(o_ptr + first * V, o, rows, vv, T, H * V, V)
        if DECAY != 0:
            state *= whole
        state += dot(tl.trans(key), z, PRECISION)
    tl.store(final_ptr + n * K * V + cell, state, mask=inside)
