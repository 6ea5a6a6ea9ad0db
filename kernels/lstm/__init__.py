"""The plain LSTM in a form that a fleet of replicas can run (``nn.LSTM`` has no batching rule)."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backends import resolve_backend
from kernels.lstm.fused import lstm_fused

__all__ = ["lstm"]

State = tuple[Tensor, Tensor]


def lstm(
    gates: Tensor, recurrent: Tensor, *, initial_state: State | None = None, backend: str = "auto"
) -> tuple[Tensor, State]:
    """The LSTM (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000).

    With raw_t = gates_t + h_{t-1} R, per channel:

        c_t = sigmoid(f_t) c_{t-1} + sigmoid(i_t) tanh(z_t)        h_t = sigmoid(o_t) tanh(c_t)

    Args:
        gates: [B,T,4,D], input pre-activations with biases, in the order i, f, z, o (torch's i, f, g, o).
        recurrent: [4,D,D]; ``recurrent[gate, a, b]`` goes from channel a of h to channel b of the gate, the
            transpose of each block of ``nn.LSTM.weight_hh_l0``.
        initial_state: (h, c), each [B,D]; None means zeros.
        backend: ``"fused"`` (hand-derived gradient, the default), ``"reference"`` (token loop) or ``"auto"``.

    Returns:
        h [B,T,D] of the gates' type, and the state (h, c) in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: If shapes do not fit or the backend is unknown.
    """
    if gates.dim() != 4 or gates.shape[2] != 4:
        raise ValueError(f"gates must be [B,T,4,D], got {tuple(gates.shape)}")
    B, _, _, D = gates.shape
    if recurrent.shape != (4, D, D):
        raise ValueError(f"recurrent must be [4,D,D] = {[4, D, D]}, got {tuple(recurrent.shape)}")
    if initial_state is not None and any(x.shape != (B, D) for x in initial_state):
        raise ValueError(f"the initial state must be two tensors [B,D] = {[B, D]}")
    work = torch.float64 if gates.dtype == torch.float64 else torch.float32
    if initial_state is None:
        initial_state = gates.new_zeros(B, D), gates.new_zeros(B, D)
    state = initial_state[0].to(work), initial_state[1].to(work)
    chosen = resolve_backend("lstm", backend, ("fused", "reference"))
    run = lstm_reference if chosen == "reference" else lstm_fused
    h, state = run(gates.to(work), recurrent.to(work), state)
    return h.to(gates.dtype), state


def lstm_reference(gates: Tensor, recurrent: Tensor, state: State) -> tuple[Tensor, State]:
    """One token at a time, differentiated by autograd."""
    h, c = state
    outputs = []
    for gates_t in gates.unbind(1):
        i, f, z, o = (gates_t + torch.einsum("bk,gkl->bgl", h, recurrent)).unbind(1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(z)
        h = torch.sigmoid(o) * torch.tanh(c)
        outputs.append(h)
    return (torch.stack(outputs, 1) if outputs else torch.zeros_like(gates[:, :, 0])), (h, c)
