"""The sLSTM: a recurrence through its own output, with exponential gates and a normaliser."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from kernels.backends import resolve_backend, triton_refusal
from kernels.slstm.fused import slstm_fused
from kernels.slstm.reference import State, slstm_reference

__all__ = ["slstm"]

MAX_TRITON_DIM = 128


def slstm(
    gates: Tensor,
    recurrent: Tensor,
    *,
    initial_state: State | None = None,
    backend: str = "auto",
) -> tuple[Tensor, State]:
    """The sLSTM over a sequence (arXiv 2405.04517, section 2.2, stabilised as in its appendix A).

    With raw_t = gates_t + h_{t-1} R, per head and channel:

        m_t = max(i_t, logsigmoid(f_t) + m_{t-1})
        write = exp(i_t - m_t)                    keep = exp(logsigmoid(f_t) + m_{t-1} - m_t)
        c_t = keep c_{t-1} + write tanh(z_t)      n_t = keep n_{t-1} + write      h_t = sigmoid(o_t) c_t / n_t

    Args:
        gates: [B,T,4,H,K], input pre-activations with biases, in the order i, f, z, o.
        recurrent: [4,H,K,K] for the same four gates. ``recurrent[gate, head, a, b]`` goes from channel a of h
            to channel b of the gate: raw[gate, head, b] += sum_a h[head, a] recurrent[gate, head, a, b].
        initial_state: (h, c, n, m), each [B,H,K], as returned; c and n stand for c exp(m) and n exp(m). Where
            n is 0 nothing has been seen and c and m are not looked at, so zeros are an empty state. None is
            the empty one: zeros, with m = -inf, so that m_1 = i_1.
        backend: ``"fused"`` (torch, hand-derived gradient), ``"numba"`` (the same with its elementwise work
            compiled; fp32 on CPU where numba is installed), ``"triton"`` (a launch for the whole sequence, on
            GPUs; up to 128 channels a head, not fp64), ``"reference"`` (token loop) or ``"auto"``:
            what ARENA_BACKEND names, else the table of :mod:`kernels.backends`.

    Returns:
        h [B,T,H,K] of the gates' type, and the state (h, c, n, m) after the last token in fp32 (fp64 for fp64
        inputs): a sequence continued from it equals the unbroken one, gradients included.

    Raises:
        ValueError: If shapes do not fit, or the backend is unknown or can't run here.
    """
    if gates.dim() != 5 or gates.shape[2] != 4:
        raise ValueError(f"gates must be [B,T,4,H,K], got {tuple(gates.shape)}")
    B, _, _, H, K = gates.shape
    if recurrent.shape != (4, H, K, K):
        raise ValueError(f"recurrent must be [4,H,K,K] = {[4, H, K, K]}, got {tuple(recurrent.shape)}")
    if initial_state is not None and any(x.shape != (B, H, K) for x in initial_state):
        raise ValueError(
            f"the initial state must be four tensors [B,H,K] = {[B, H, K]}, "
            f"got {[tuple(x.shape) for x in initial_state]}"
        )
    work = torch.float64 if gates.dtype == torch.float64 else torch.float32
    can_compile = work == torch.float32 and gates.device.type == "cpu" and _has_numba()
    others = (*(["numba"] if can_compile else []), "fused", "reference")
    refusal = "does not take float64" if work == torch.float64 else None
    if K > MAX_TRITON_DIM:
        refusal = f"takes heads of up to {MAX_TRITON_DIM} channels, not {K}"
    extra = {"triton": lambda: refusal or triton_refusal(gates)}
    backend = resolve_backend("slstm", backend, others, x=gates, others=extra)
    if initial_state is not None:
        h, c, n, m = initial_state
        initial_state = h.to(work), c.to(work), n.to(work), m.to(work)
    if backend == "triton":
        from kernels.slstm.triton import slstm_triton

        return slstm_triton(gates, recurrent, initial_state)
    gates_work, recurrent = gates.to(work), recurrent.to(work)
    if backend == "reference":
        h, state = slstm_reference(gates_work, recurrent, initial_state)
    else:
        h, state = slstm_fused(gates_work, recurrent, initial_state, backend == "numba")
    return h.to(gates.dtype), state


@cache
def _has_numba() -> bool:
    return find_spec("numba") is not None
