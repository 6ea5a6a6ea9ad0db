"""The public gated matrix memory: arguments checked, backend chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backends import resolve_backend, triton_refusal
from kernels.external import fla, mamba
from kernels.gated_memory.chunked import gated_memory_chunked
from kernels.gated_memory.reference import gated_memory_reference


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
    """Read and edit a matrix memory S, token by token: decay, erase along the key, write, read.

        S_t = (I - k_t e_t^T) D_t S_{t-1} + k_t z_t^T        o_t = S_t^T (scale q_t)
        D_t = diag(sign_t exp(log_decay_t))    e_t = erase_t * k_t    z_t = write_t * v_t    (* elementwise)

    This is GDN-2 (arXiv 2605.22791, equations 8 to 10); other settings of the gates give KDA, Gated DeltaNet,
    DeltaNet, GLA, Mamba-2, mLSTM and linear attention (docs/gate-space.md). A model that updates the memory
    several times a token (DeltaProduct, RWKV-7) has that many tokens here; a query of 0 reads 0.
    Differentiable once in everything but ``decay_sign``; safe under ``torch.func.vmap``; a gate that is None
    costs nothing. The state, the sums of log-decays and all products are float32 (float64 for float64
    inputs), whatever the dtype of the inputs.

    Args:
        q: Queries [B,T,H,K]; any T, also 0 and 1.
        k: Keys [B,T,H,K]; with ``erase`` the caller gives them unit length.
        v: Values [B,T,H,V]; q, k and v share one dtype.
        log_decay: Natural log of |decay|, [B,T,H] (one a head) or [B,T,H,K] (one a key channel), <= 0;
            -inf is legal, with gradient 0. None: no decay.
        erase: [B,T,H] or [B,T,H,K], usually in [0, 1] or [0, 2]. None: nothing is erased.
        write: [B,T,H] or [B,T,H,V]. None: 1.
        decay_sign: +1 or -1, shaped like ``log_decay``: decays may be negative.
        scale: Factor on q; None: K ** -0.5.
        initial_state: [B,H,K,V]; None: zeros.
        backend: ``"reference"`` (token loop), ``"chunked"`` (torch), ``"triton"`` (GPU), the packages
            ``"fla"`` and ``"mamba_ssm"`` for the gate settings that they cover, or ``"auto"``: what
            ARENA_BACKEND names, else the table of :mod:`kernels.backends`, else chunked.

    Returns:
        Outputs [B,T,H,V] in the dtype of v, and the state after the last token [B,H,K,V] in float32 (float64
        for float64 inputs), which continues the sequence as ``initial_state``.

    Raises:
        ValueError: If a shape, dtype or backend is wrong; the message says what would be right.
    """
    _check(q, k, v, log_decay, erase, write, decay_sign, initial_state)
    others = {
        "triton": lambda: _kernel_refusal(k, v) or triton_refusal(k),
        "fla": lambda: fla.refusal(k, v, log_decay, erase, write, decay_sign),
        "mamba_ssm": lambda: mamba.refusal(k, log_decay, erase, decay_sign),
    }
    name = resolve_backend("gated_memory", backend, ("chunked", "reference"), x=k, others=others)
    scale = k.shape[-1] ** -0.5 if scale is None else float(scale)
    arguments = (q, k, v, log_decay, erase, write, decay_sign, scale, initial_state)
    if name == "triton":
        from kernels.gated_memory.triton import gated_memory_triton

        return gated_memory_triton(*arguments)
    if name in ("fla", "mamba_ssm"):
        start = None if initial_state is None else initial_state.float()
        if name == "fla":
            o, state = fla.gated_memory_fla(q, k, v, log_decay, erase, write, scale, start)
        else:
            assert log_decay is not None
            o, state = mamba.gated_memory_mamba(q, k, v, log_decay, write, scale, start)
        return o.to(v.dtype), state
    o, state = (gated_memory_reference if name == "reference" else gated_memory_chunked)(*arguments)
    return o.to(v.dtype), state


def _kernel_refusal(k: Tensor, v: Tensor) -> str | None:
    """Why the Triton kernels do not take these inputs, or None."""
    width = max(k.shape[3], v.shape[3])
    if k.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 or float16, not {k.dtype}"
    if width > 256:
        return f"takes head dimensions up to 256, not {width}"
    if k.shape[1] * k.shape[2] * width >= 2**31:
        return "takes sequences of fewer than 2^31 numbers"
    return None


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase: Tensor | None,
    write: Tensor | None,
    decay_sign: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    if k.dim() != 4 or 0 in k.shape[2:]:
        raise ValueError(f"k must be [B,T,H,K] with H and K of at least 1, not {list(k.shape)}")
    B, T, H, K = k.shape
    if q.shape != k.shape:
        raise ValueError(f"q must have the shape of k, {[B, T, H, K]}, not {list(q.shape)}")
    if v.dim() != 4 or v.shape[:3] != k.shape[:3] or v.shape[3] == 0:
        raise ValueError(f"v must be {[B, T, H]} + [V], not {list(v.shape)}")
    if not (q.dtype == k.dtype == v.dtype and q.dtype.is_floating_point):
        raise ValueError(f"q, k and v must share one float dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    V = v.shape[3]
    for name, gate, width in (("log_decay", log_decay, K), ("erase", erase, K), ("write", write, V)):
        if gate is None:
            continue
        if gate.shape != (B, T, H) and gate.shape != (B, T, H, width):
            raise ValueError(f"{name} must be {[B, T, H]} or {[B, T, H, width]}, not {list(gate.shape)}")
        if not gate.dtype.is_floating_point:
            raise ValueError(f"{name} must be a float tensor, not {gate.dtype}")
    if decay_sign is not None:
        if log_decay is None:
            raise ValueError("decay_sign needs log_decay (zeros, if only the sign matters)")
        if decay_sign.shape != log_decay.shape:
            raise ValueError(f"decay_sign must be {list(log_decay.shape)}, not {list(decay_sign.shape)}")
        if decay_sign.dtype == torch.bool or decay_sign.dtype.is_complex:
            raise ValueError(f"decay_sign must hold +1 and -1, not {decay_sign.dtype}")
    if initial_state is not None:
        if initial_state.shape != (B, H, K, V):
            raise ValueError(f"initial_state must be {[B, H, K, V]}, not {list(initial_state.shape)}")
        if not initial_state.dtype.is_floating_point:
            raise ValueError(f"initial_state must be a float tensor, not {initial_state.dtype}")
    tensors = (q, k, v, log_decay, erase, write, decay_sign, initial_state)
    devices = {str(x.device) for x in tensors if x is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, not on {', '.join(sorted(devices))}")
