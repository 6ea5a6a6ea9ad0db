"""One token of the gated memory in one launch, for decoding: the state is read and written once."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gated_memory.triton_tiles import LOG2_E, LOG2_FLOOR


@triton.jit
def step_kernel(
    q_ptr,  # [B, H, K]
    k_ptr,  # [B, H, K]
    v_ptr,  # [B, H, V]
    log_decay_ptr,  # [B, H] or [B, H, K]
    erase_ptr,  # [B, H] or [B, H, K]
    write_ptr,  # [B, H] or [B, H, V]
    sign_ptr,  # [B, H] or [B, H, K]
    state_ptr,  # [B, H, K, V] fp32
    o_ptr,  # [B, H, V]
    next_ptr,  # [B, H, K, V] fp32; may be state_ptr
    scale,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    ERASE: tl.constexpr,
    WRITE: tl.constexpr,
    SIGN: tl.constexpr,
    HAS_STATE: tl.constexpr,
):
    """S' = (I - k e^T) D S + k z^T, o = S'^T q; a program owns all keys of a tile of value columns."""
    n = tl.program_id(0).to(tl.int64)
    kk = tl.arange(0, BK)
    vv = tl.program_id(1) * BV + tl.arange(0, BV)
    in_k = kk < K
    in_v = vv < V
    cell = n * K * V + kk.to(tl.int64)[:, None] * V + vv[None, :]
    inside = in_k[:, None] & in_v[None, :]

    q = tl.load(q_ptr + n * K + kk, mask=in_k, other=0.0).to(tl.float32) * scale
    k = tl.load(k_ptr + n * K + kk, mask=in_k, other=0.0).to(tl.float32)
    z = tl.load(v_ptr + n * V + vv, mask=in_v, other=0.0).to(tl.float32)
    if WRITE == 2:
        z *= tl.load(write_ptr + n * V + vv, mask=in_v, other=0.0).to(tl.float32)
    elif WRITE == 1:
        z *= tl.load(write_ptr + n).to(tl.float32)
    if HAS_STATE:
        state = tl.load(state_ptr + cell, mask=inside, other=0.0).to(tl.float32)
        if DECAY != 0:
            if DECAY == 2:
                log_decay = tl.load(log_decay_ptr + n * K + kk, mask=in_k, other=0.0).to(tl.float32)
            else:
                log_decay = tl.load(log_decay_ptr + n).to(tl.float32) + tl.zeros((BK,), tl.float32)
            decay = tl.exp2(tl.maximum(log_decay * LOG2_E, LOG2_FLOOR))
            if SIGN == 2:
                decay *= tl.load(sign_ptr + n * K + kk, mask=in_k, other=1.0).to(tl.float32)
            elif SIGN == 1:
                decay *= tl.load(sign_ptr + n).to(tl.float32)
            state *= decay[:, None]
        if ERASE != 0:
            if ERASE == 2:
                e = k * tl.load(erase_ptr + n * K + kk, mask=in_k, other=0.0).to(tl.float32)
            else:
                e = k * tl.load(erase_ptr + n).to(tl.float32)
            z -= tl.sum(state * e[:, None], 0)
        state += k[:, None] * z[None, :]
    else:
        state = k[:, None] * z[None, :]
    o = tl.sum(state * q[:, None], 0)
    tl.store(o_ptr + n * V + vv, o.to(o_ptr.dtype.element_ty), mask=in_v)
    tl.store(next_ptr + cell, state, mask=inside)
