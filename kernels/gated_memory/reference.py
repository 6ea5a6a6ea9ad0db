"""The gated matrix memory, one token at a time: slow, obvious, the truth that every fast path is held to."""

from __future__ import annotations

import torch
from torch import Tensor


def gated_memory_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase: Tensor | None,
    write: Tensor | None,
    decay_sign: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run S_t = (I - k_t e_t^T) D_t S_{t-1} + k_t z_t^T, o_t = S_t^T q_t token by token.

    Shapes as in :func:`kernels.gated_memory`; gates may be scalar per head ([B,T,H]) or per channel.
    """
    B, T, H, K = k.shape
    V = v.shape[-1]
    state_type = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v = (x.to(state_type) for x in (q, k, v))
    state = k.new_zeros(B, H, K, V) if initial_state is None else initial_state.to(state_type)
    outputs = []
    for t in range(T):
        if log_decay is not None:
            decay = _channels(log_decay[:, t].to(state_type), 2).exp()
            if decay_sign is not None:
                decay = decay * _channels(decay_sign[:, t].to(state_type), 2)
            state = state * decay[..., None]
        z = v[:, t] if write is None else v[:, t] * _channels(write[:, t].to(state_type), 2)
        if erase is not None:
            e = k[:, t] * _channels(erase[:, t].to(state_type), 2)
            z = z - torch.einsum("bhk,bhkv->bhv", e, state)
        state = state + k[:, t, :, :, None] * z[:, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * scale, state))
    o = torch.stack(outputs, 1) if outputs else v.new_zeros(B, 0, H, V)
    return o, state


def _channels(gate: Tensor, dims: int) -> Tensor:
    """Give a gate that is scalar per head a channel axis of size 1."""
    return gate[..., None] if gate.dim() == dims else gate
