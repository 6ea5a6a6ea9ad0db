"""The gated memory forward: the scores of all chunks in parallel, then the state through the chunks in order.

With ``FUSED`` the second kernel makes the scores itself: one launch for the whole sequence.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gated_memory.triton_tiles import (
    chunk_decay,
    chunk_scores,
    dot,
    load_gate,
    load_keys,
    load_rows,
    load_square,
    store_rows,
    store_square,
)


@triton.jit(do_not_specialize=["T"])
def scores_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    log_decay_ptr,  # [B, T, H] or [B, T, H, K]
    erase_ptr,  # [B, T, H] or [B, T, H, K]
    squares_ptr,  # [B, H, chunks, 1 or 2, C, C] fp32: A, and X where there is an erase gate
    scale,
    T,
    H,
    K: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    BK: tl.constexpr,
    DECAY: tl.constexpr,
    ERASE: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    CARRY: tl.constexpr,
    EXACT: tl.constexpr,
):
    """A and X = (I + T)^-1 of one chunk a program."""
    SQUARES: tl.constexpr = 1 if ERASE == 0 else 2
    n_chunks = tl.cdiv(T, C)
    n = (tl.program_id(0) // n_chunks).to(tl.int64)
    chunk = tl.program_id(0) % n_chunks
    first = (n // H) * T * H + n % H  # row of token 0 of this head, in units of [B, T, H]
    rows = chunk * C + tl.arange(0, C)
    q, k, erase, log_decay = load_keys(
        q_ptr, k_ptr, log_decay_ptr, erase_ptr, first, rows, T, H, scale,
        K, tl.arange(0, BK), DECAY, ERASE, RAGGED or (K != BK),
    )  # fmt: skip
    scores, x = chunk_scores(q, k, k * erase, log_decay, C, LEVELS, DECAY, ERASE, PRECISION, CARRY, EXACT)
    store_square(squares_ptr, scores, (n * n_chunks + chunk) * SQUARES, C)
    if ERASE != 0:
        store_square(squares_ptr, x, (n * n_chunks + chunk) * SQUARES + 1, C)


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    v_ptr,  # [B, T, H, V]
    log_decay_ptr,  # [B, T, H] or [B, T, H, K]
    erase_ptr,  # [B, T, H] or [B, T, H, K]
    write_ptr,  # [B, T, H] or [B, T, H, V]
    initial_ptr,  # [B, H, K, V]
    squares_ptr,  # [B, H, chunks, 1 or 2, C, C] fp32: A, and X where there is an erase gate
    o_ptr,  # [B, T, H, V]
    final_ptr,  # [B, H, K, V] fp32
    states_ptr,  # [B, H, chunks, K, V], the state that enters each chunk
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
    STORE: tl.constexpr,
    FUSED: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    CARRY: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Outputs and the last state: R = X (Z - Ebar S), O = Qbar S + A R, S <- D S + Kbar^T R chunk by chunk.

    One program a (batch, head, tile of value columns). ``STORE`` keeps what the backward needs: the chunk
    states and, where ``FUSED``, the scores.
    """
    n = tl.program_id(0).to(tl.int64)
    first = (n // H) * T * H + n % H
    kk = tl.arange(0, BK)
    vv = tl.program_id(1) * BV + tl.arange(0, BV)
    cell = kk[:, None] * V + vv[None, :]
    inside = (kk[:, None] < K) & (vv[None, :] < V)

    if HAS_INITIAL:
        state = tl.load(initial_ptr + n * K * V + cell, mask=inside, other=0.0).to(tl.float32)
    else:
        state = tl.zeros((BK, BV), tl.float32)
    SQUARES: tl.constexpr = 1 if ERASE == 0 else 2
    n_chunks = tl.cdiv(T, C)
    for chunk in range(0, n_chunks):
        at = n * n_chunks + chunk
        if STORE:
            tl.store(states_ptr + at * K * V + cell, state.to(states_ptr.dtype.element_ty), mask=inside)
        rows = chunk * C + tl.arange(0, C)
        q, k, erase, log_decay = load_keys(
            q_ptr, k_ptr, log_decay_ptr, erase_ptr, first, rows, T, H, scale,
            K, kk, DECAY, ERASE, RAGGED or (K != BK),
        )  # fmt: skip
        z = load_rows(v_ptr + first * V, rows, T, H * V, V, vv, RAGGED or (V % BV != 0))
        if WRITE == 2:
            z *= load_gate(write_ptr + first * V, rows, T, H, V, vv, 2, RAGGED or (V % BV != 0))
        elif WRITE == 1:
            z *= load_gate(write_ptr + first, rows, T, H, V, vv, 1, RAGGED)
        e = k * erase
        if FUSED:
            scores, x = chunk_scores(q, k, e, log_decay, C, LEVELS, DECAY, ERASE, PRECISION, CARRY, EXACT)
            if STORE:
                store_square(squares_ptr, scores, at * SQUARES, C)
                if ERASE != 0:
                    store_square(squares_ptr, x, at * SQUARES + 1, C)
        else:
            scores = load_square(squares_ptr, at * SQUARES, C)
            if ERASE != 0:
                x = load_square(squares_ptr, at * SQUARES + 1, C)

        if DECAY != 0:
            before, after, whole = chunk_decay(log_decay, C, DECAY, EXACT)
            q *= before
            e *= before
            k *= after
        if ERASE != 0:
            z = dot(x, z - dot(e, state, CARRY), CARRY)
        o = dot(q, state, PRECISION) + dot(scores, z, PRECISION)
        store_rows(o_ptr + first * V, o, rows, T, H * V, V, vv, RAGGED or (V % BV != 0))
        if DECAY != 0:
            state *= whole
        state += dot(tl.trans(k), z, CARRY if ERASE != 0 else PRECISION)
    tl.store(final_ptr + n * K * V + cell, state, mask=inside)
