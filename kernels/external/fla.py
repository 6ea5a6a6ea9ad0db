"""flash-linear-attention (0.6 or newer) as a backend of ``gated_memory`` and ``short_conv``.

Which of its kernels stands for which gate setting:

    erase and write                      decay     kernel
    no erase, any write                  none      chunk_simple_gla
                                         scalar    chunk_simple_gla
                                         channel   chunk_gla
    one tensor for both, one gate a head none      chunk_delta_rule; in float32, which it refuses, chunk_kda
                                         scalar    chunk_gated_delta_rule
                                         channel   chunk_kda
    any other                            any       chunk_gdn2

Gates that a kernel wants per channel are expanded; a write gate that it does not know is multiplied into v.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.external.common import can_import, folded, version_of

KERNELS = {
    "simple_gla": "chunk_simple_gla",
    "gla": "chunk_gla",
    "delta_rule": "chunk_delta_rule",
    "gated_delta_rule": "chunk_gated_delta_rule",
    "kda": "chunk_kda",
    "gdn2": "chunk_gdn2",
}
"""Module below ``fla.ops`` -> its function."""
MIN_LOG_DECAY = -80.0
"""Decays below e^-80 (2e-35) count as that: the kernels subtract sums of log-decays, and inf - inf is NaN."""


def refusal(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase: Tensor | None,
    write: Tensor | None,
    decay_sign: Tensor | None,
) -> str | None:
    """Why these inputs of ``gated_memory`` do not go to flash-linear-attention, or None."""
    if decay_sign is not None:
        return "has no kernel for signed decays"
    if max(k.shape[3], v.shape[3]) > 256:
        return f"takes head dimensions up to 256, not {max(k.shape[3], v.shape[3])}"
    kernel = kernel_of(k.dtype, log_decay, erase, write)
    return _general_refusal(k) or _fault(kernel, has_decay=log_decay is not None) or _loads(kernel)


def conv_refusal(x: Tensor) -> str | None:
    """Why x of ``short_conv`` does not go to flash-linear-attention, or None."""
    reason = _general_refusal(x)
    if reason is None and (error := can_import("fla.modules.causal_conv1d")):
        reason = f"can't be imported ({error})"
    return reason


def _general_refusal(x: Tensor) -> str | None:
    version = version_of("fla-core", "flash-linear-attention")
    if version is None:
        return "needs the package flash-linear-attention, which is not installed"
    if version < (0, 6):
        found = ".".join(map(str, version))
        return f"needs flash-linear-attention 0.6 or newer, not {found} (its gates leaked into the past)"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 or float16, not {x.dtype}"
    if x.shape[1] == 0:
        return "takes sequences of at least one token"
    return None if x.is_cuda else f"needs tensors on a GPU, not on {x.device.type}"


def _fault(kernel: str, *, has_decay: bool) -> str | None:
    """The package's known fault with one gated backward, on Hopper GPUs."""
    if kernel not in ("gated_delta_rule", "simple_gla") or not has_decay or not _is_hopper():
        return None
    version = version_of("triton") or (0,)
    if (3, 4) <= version < (3, 7, 1):
        return (
            f"gives wrong gate gradients with Triton {'.'.join(map(str, version))} on Hopper GPUs "
            "(flash-linear-attention issue 640; Triton 3.7.1 is right)"
        )
    if version_of("tilelang") is not None and os.environ.get("FLA_TILELANG") != "0":
        return "takes tilelang's backward, which races (its issue 889): set FLA_TILELANG=0"
    return None


def _is_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def _loads(kernel: str) -> str | None:
    error = can_import(f"fla.ops.{kernel}")
    return None if error is None else f"can't be imported ({error})"


def kernel_of(
    dtype: torch.dtype, log_decay: Tensor | None, erase: Tensor | None, write: Tensor | None
) -> str:
    """The module below ``fla.ops`` whose kernel covers this gate setting."""
    per_channel = log_decay is not None and log_decay.dim() == 4
    if erase is None:
        return "gla" if per_channel else "simple_gla"
    if erase is not write or erase.dim() == 4:
        return "gdn2"
    if log_decay is None:
        return "kda" if dtype == torch.float32 else "delta_rule"
    return "kda" if per_channel else "gated_delta_rule"


def gated_memory_fla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase: Tensor | None,
    write: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute what ``gated_memory_reference`` computes with the kernel of :func:`kernel_of`."""
    name = kernel_of(k.dtype, log_decay, erase, write)
    kernel = _load(name)
    options: dict[str, Any] = {"scale": scale, "output_final_state": True}
    g = None if log_decay is None else log_decay.float().clamp(min=MIN_LOG_DECAY)
    if name == "kda" and g is None:
        g = torch.zeros(k.shape, dtype=torch.float32, device=k.device)
    if name == "gdn2":
        g = torch.zeros(k.shape[:3], dtype=torch.float32, device=k.device) if g is None else g
        write = v.new_ones(v.shape[:3]) if write is None else write
        assert erase is not None
        g, erase = _wide(g, k), _wide(erase, k)
        tensors = (q, k, v, g, erase.to(k.dtype), _wide(write, v).to(v.dtype), initial_state)

        def run(q: Any, k: Any, v: Any, g: Any, b: Any, w: Any, start: Any) -> Any:
            return kernel(q, k, v, g=g, b=b, w=w, initial_state=start, **options)

        return _pair(folded(run, *tensors))
    beta = None
    if erase is None:
        v = v if write is None else (v * write.reshape(*v.shape[:3], -1)).to(v.dtype)
    else:
        beta = erase.to(v.dtype)

    def run_tied(q: Any, k: Any, v: Any, g: Any, beta: Any, start: Any) -> Any:
        gates = {name: x for name, x in (("g", g), ("beta", beta)) if x is not None}
        return kernel(q, k, v, **gates, initial_state=start, **options)

    return _pair(folded(run_tied, q, k, v, g, beta, initial_state))


def short_conv_fla(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: bool,
    initial_state: Tensor | None,
) -> Tensor:
    """Compute what ``short_conv_reference`` computes; its weights are [D,W], the last column lag 0."""
    from fla.modules.causal_conv1d import causal_conv1d

    start = None
    if initial_state is not None:  # theirs has a row more, the oldest, which no output reads
        start = torch.cat([torch.zeros_like(x[:, :1]), initial_state.to(x.dtype)], 1).transpose(1, 2)
        start = start.contiguous()

    def run(x: Any, weight: Any, bias: Any, start: Any) -> Any:
        return causal_conv1d(
            x, weight, bias, residual=x if residual else None, initial_state=start, activation=activation
        )[:1]

    return folded(run, x.contiguous(), weight.flip(0).t().contiguous(), bias, start)[0]


def _load(name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"fla.ops.{name}"), KERNELS[name])


def _wide(gate: Tensor, like: Tensor) -> Tensor:
    """A gate per head as one per channel."""
    return (gate if gate.dim() == 4 else gate[..., None].expand(like.shape)).contiguous()


def _pair(outputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    o, state = outputs
    return o, state.float()
