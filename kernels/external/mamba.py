"""mamba_ssm's SSD kernels (Mamba-2) as a backend of ``gated_memory`` with a scalar decay and nothing erased.

SSD has one step for decay and write: S_t = exp(A step) S_{t-1} + step B x^T. A decay and a write of their own
become step = -log_decay, A = -1, x = write v / step. A step below 2^-24 counts as that: the decay is 1 to a
rounding of float32. The decay's gradient then is a difference that a small step magnifies: 16 bits do not do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.external.common import can_import, folded, version_of

SMALLEST_STEP, LARGEST_STEP = 2.0**-24, 80.0
MODULE = "mamba_ssm.ops.triton.ssd_combined"


def refusal(
    k: Tensor, log_decay: Tensor | None, erase: Tensor | None, decay_sign: Tensor | None
) -> str | None:
    """Why these inputs of ``gated_memory`` do not go to mamba_ssm, or None."""
    if erase is not None or decay_sign is not None or log_decay is None or log_decay.dim() == 4:
        return "covers one positive decay a head and no erase gate (Mamba-2)"
    if version_of("mamba-ssm") is None:
        return "needs the package mamba-ssm, which is not installed"
    if k.dtype != torch.float32:
        return f"takes float32 here, not {k.dtype} (a write apart from the step is divided by the step)"
    if k.shape[1] == 0:
        return "takes sequences of at least one token"
    if not k.is_cuda:
        return f"needs tensors on a GPU, not on {k.device.type}"
    error = can_import(MODULE)
    return None if error is None else f"can't be imported ({error})"


def gated_memory_mamba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    write: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute what ``gated_memory_reference`` computes."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    step = (-log_decay.float()).clamp(SMALLEST_STEP, LARGEST_STEP)
    x = v / step[..., None] if write is None else v * (write.reshape(*v.shape[:3], -1) / step[..., None])
    chunk = max(16, min(256, 1 << (k.shape[1] - 1).bit_length()))

    def run(x: Any, step: Any, k: Any, q: Any, start: Any) -> Any:
        minus_one = -torch.ones(k.shape[2], device=k.device)
        return mamba_chunk_scan_combined(
            x, step, minus_one, k, q, chunk, initial_states=start, return_final_states=True
        )

    start = None if initial_state is None else initial_state.transpose(2, 3).contiguous()
    o, state = folded(run, x.contiguous(), step.contiguous(), k.contiguous(), q * scale, start)
    return o, state.float().transpose(2, 3)
