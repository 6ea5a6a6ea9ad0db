"""The gated matrix memory: one operator for the whole gate space."""

from __future__ import annotations

from torch import Tensor

from kernels.gated_memory.reference import gated_memory_reference

__all__ = ["gated_memory"]


def gated_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    erase: Tensor | None = None,
    write: Tensor | None = None,
    *,
    decay_sign: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Read and edit a matrix memory: S_t = (I - k_t e_t^T) D_t S_{t-1} + k_t z_t^T, o_t = S_t^T q_t."""
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    o, state = gated_memory_reference(q, k, v, log_decay, erase, write, decay_sign, scale, initial_state)
    return o.to(v.dtype), state
