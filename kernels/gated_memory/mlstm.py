"""The mLSTM as a gated memory: its normaliser is one more value column, its stabiliser a scalar scan."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backends import asked_for, override, resolve_backend
from kernels.external import nxai
from kernels.gated_memory.operator import gated_memory

EPS = 1e-6
# A forget gate below e^-100 counts as e^-100 in the stabiliser (not in the memory): keeps its running sums
# finite.
MIN_LOG_FORGET = -100.0


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    *,
    initial_state: tuple[Tensor, Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Matrix LSTM, exponential input gate, sigmoid forget gate (xLSTM, arXiv 2405.04517, equations 19 to 27).

        m_t = max(log sigmoid(f_t) + m_{t-1}, i_t)
        f'_t = exp(log sigmoid(f_t) + m_{t-1} - m_t)        i'_t = exp(i_t - m_t)
        C_t = f'_t C_{t-1} + i'_t (k_t / sqrt K) v_t^T      n_t = f'_t n_{t-1} + i'_t (k_t / sqrt K)
        h_t = C_t^T q_t / (max(|n_t . q_t|, exp(-m_t)) + 1e-6)      (1e-6 as in the authors' code)

    Without an initial state m starts at -inf. The stabiliser m cancels, except beside the 1e-6; gradients are
    exact all the same.

    Args:
        q: Queries [B,T,H,K].
        k: Keys [B,T,H,K]; the factor K ** -0.5 is applied here.
        v: Values [B,T,H,V].
        input_gate: Pre-activation i, [B,T,H]; -inf means that nothing is written.
        forget_gate: Pre-activation f, [B,T,H].
        initial_state: (C [B,H,K,V], n [B,H,K], m [B,H]), as returned.
        backend: As for :func:`kernels.gated_memory`, which does the work; or ``"mlstm_kernels"``, NX-AI's
            package, where it is installed.

    Returns:
        h [B,T,H,V] in the dtype of v, and the state (C, n, m) after the last token in float32 (float64 for
        float64 inputs); handing it to the next call continues the sequence exactly.

    Raises:
        ValueError: If a shape, dtype or backend is wrong.
    """
    _check(q, k, v, input_gate, forget_gate, initial_state)
    B, T, H, K = k.shape
    V = v.shape[-1]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if initial_state is None:
        memory_0 = k.new_zeros(B, H, K, V + 1, dtype=dtype)
        m_0 = k.new_full((B, H), -torch.inf, dtype=dtype)
    else:
        c_0, n_0, m_0 = (x.to(dtype) for x in initial_state)
        memory_0 = torch.cat([c_0, n_0[..., None]], -1)
    if T == 0:
        return v, (memory_0[..., :V], memory_0[..., V], m_0)

    i, log_f = input_gate.to(dtype), F.logsigmoid(forget_gate.to(dtype))
    m = stabiliser(i, log_f, m_0)
    wanted = asked_for("mlstm", backend)
    if wanted == "mlstm_kernels":
        others = {"mlstm_kernels": lambda: nxai.refusal(q, v, initial_state)}
        if resolve_backend("mlstm", backend, ("gated_memory",), others=others) == "mlstm_kernels":
            return nxai.mlstm_nxai(q, k, v, input_gate, forget_gate, initial_state, m[:, -1])
    elif "mlstm" in override():
        backend = wanted
    # Any m gives the same h, so its gradient is dropped where it would only cancel: it is kept for the
    # initial m (which says how large the initial state is), beside EPS, and in the returned state.
    fixed_m = m.detach()
    previous_m = torch.cat([m_0[:, None], fixed_m[:, :-1]], 1)
    nothing_yet = previous_m == -torch.inf
    log_decay = log_f + (previous_m.masked_fill(nothing_yet, 0.0) - fixed_m.masked_fill(nothing_yet, 0.0))
    log_decay = log_decay.masked_fill(nothing_yet, 0.0)
    finite_m = m.masked_fill(m == -torch.inf, 0.0)
    fixed_m = finite_m.detach()
    drift = (finite_m - fixed_m).exp()  # 1, with the gradient of exp(m - constant)

    o, memory = gated_memory(
        q.to(dtype),
        k.to(dtype),
        torch.cat([v.to(dtype), v.new_ones(B, T, H, 1, dtype=dtype)], -1),
        log_decay,
        None,
        (i - fixed_m).exp() * K**-0.5,
        scale=1.0,
        initial_state=memory_0,
        backend=backend,
    )
    # One split and a reciprocal: the gradients of slices and of a quotient take twice as many passes.
    numerator, normaliser = o.split((V, 1), -1)
    size = torch.maximum(normaliser.abs(), (-fixed_m).exp()[..., None]) + (EPS * drift)[..., None]
    h = numerator * size.reciprocal()
    memory = memory / drift[:, -1, :, None, None]
    return h.to(v.dtype), (memory[..., :V], memory[..., V], m[:, -1])


def stabiliser(i_bth: Tensor, log_f_bth: Tensor, m_0_bh: Tensor) -> Tensor:
    """Solve m_t = max(log_f_t + m_{t-1}, i_t) by running sums (float64: they grow with T) and maxima.

    Args:
        i_bth: Pre-activation of the input gate, [B,T,H].
        log_f_bth: Logarithm of the forget gate, [B,T,H].
        m_0_bh: [B,H]; -inf before the first token.

    Returns:
        m [B,T,H].
    """
    sum_bth = log_f_bth.double().clamp(min=MIN_LOG_FORGET).cumsum(1)
    top_bth = torch.maximum((i_bth - sum_bth).cummax(1).values, m_0_bh[:, None].double())
    return (top_bth + sum_bth).to(i_bth.dtype)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    initial_state: tuple[Tensor, Tensor, Tensor] | None,
) -> None:
    if k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"k must be [B,T,H,K] and v [B,T,H,V], not {list(k.shape)} and {list(v.shape)}")
    B, T, H, K = k.shape
    for name, gate in (("input_gate", input_gate), ("forget_gate", forget_gate)):
        if gate.shape != (B, T, H):
            raise ValueError(f"{name} must be {[B, T, H]}, not {list(gate.shape)}")
        if not gate.dtype.is_floating_point:
            raise ValueError(f"{name} must be a float tensor, not {gate.dtype}")
    if initial_state is not None:
        shapes = [tuple(x.shape) for x in initial_state]
        wanted = [(B, H, K, v.shape[-1]), (B, H, K), (B, H)]
        if shapes != wanted:
            raise ValueError(f"initial_state must be (C, n, m) with shapes {wanted}, not {shapes}")
