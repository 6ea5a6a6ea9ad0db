"""The exploratory memory whose write gate multiplies the whole correction, value and read-back alike.

    S_t = D_t S_{t-1} + k_t (write_t * (v_t - r_t))^T        r_t = (D_t S_{t-1})^T (erase_t * k_t)

No architecture of the literature has it. In column j of S it is the gated memory with erase write_j * erase
and write write_j, so that a gate on value channels also decides where something is erased; with a scalar
write and erase frozen at 1 it is the tied delta rule.
"""

from __future__ import annotations

import torch
from torch import Tensor

import kernels
from arena.blocks.gates import GateValues


def correction_memory(
    q: Tensor, k: Tensor, v: Tensor, gates: GateValues, *, scale: float | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run the memory column by column: every (head, value channel) is a head with one value channel.

    Reference backend only.

    Args:
        q: [B,T,H,K].
        k: [B,T,H,K], of length 1.
        v: [B,T,H,V].
        gates: With erase and write.
        scale: On q; None means K ** -0.5.
        initial_state: [B,H,K,V] or None.

    Returns:
        What is read [B,T,H,V], and the state [B,H,K,V].
    """
    assert gates.erase is not None and gates.write is not None
    H, V = v.shape[2:]

    def columns(x: Tensor | None) -> Tensor | None:
        """[B,T,H(,K)] to [B,T,H*V(,K)]."""
        return None if x is None else torch.repeat_interleave(x, V, 2)

    write = columns(gates.write) if gates.write.dim() == 3 else gates.write.flatten(2)
    erase = columns(gates.erase)
    assert write is not None and erase is not None
    erase = erase * (write if erase.dim() == 3 else write[..., None])
    state = None if initial_state is None else initial_state.transpose(2, 3).flatten(1, 2)[..., None]
    read, state = kernels.gated_memory(
        torch.repeat_interleave(q, V, 2),
        torch.repeat_interleave(k, V, 2),
        v.flatten(2)[..., None],
        columns(gates.log_decay),
        erase,
        write,
        decay_sign=columns(gates.decay_sign),
        scale=scale,
        initial_state=state,
        backend="reference",
    )
    return read[..., 0].unflatten(2, (H, V)), state[..., 0].unflatten(1, (H, V)).transpose(2, 3)
