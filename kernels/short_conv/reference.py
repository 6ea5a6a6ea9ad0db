"""Short convolutions one token at a time: slow, obvious, and the truth that the fast paths are held to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_TRITON_WIDTH = 8
MAX_TRITON_RANK = 64
MAX_TRITON_SUMS = 512


def check_activation(activation: str | None) -> None:
    """Refuse an activation that is neither None nor ``"silu"``."""
    if activation not in (None, "silu"):
        raise ValueError(f"activation must be None or 'silu', got {activation!r}")


def kernel_refusal(x: Tensor, width: int, rank: int = 1) -> str | None:
    """Why the Triton kernels do not take these inputs, or None."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 or float16, not {x.dtype}"
    if width > MAX_TRITON_WIDTH or rank > MAX_TRITON_RANK:
        return f"takes widths up to {MAX_TRITON_WIDTH} and ranks up to {MAX_TRITON_RANK}, not {width}, {rank}"
    most = MAX_TRITON_SUMS // (4 if x.dtype == torch.float32 else 1) // width
    if rank > 1 and padded(rank + 2) > most:  # with the two of the static taps; their sums are kept on chip
        return (
            f"takes ranks up to {(1 << most.bit_length() - 1) - 2} at width {width} in {x.dtype}, not {rank}"
        )
    return None


def padded(ranks: int) -> int:
    """The block that holds the ranks: a power of two, at least the 16 that a matrix product needs."""
    return 1 << max(4, (ranks - 1).bit_length())


def last_rows(x: Tensor, initial_state: Tensor | None, rows: int) -> Tensor:
    """The last ``rows`` rows of the sequence that ends with x [B,T,D]; what is missing before it is zero."""
    B, T, D = x.shape
    if rows > T:
        before = x.new_zeros(B, rows, D) if initial_state is None else initial_state.to(x.dtype)
        return torch.cat([before, x], 1)[:, T:]
    return x[:, T - rows :]


def short_conv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: bool,
    initial_state: Tensor | None,
) -> Tensor:
    """Shapes and equation as in :func:`kernels.short_conv`."""
    state = last_rows(x[:, :0], initial_state, weight.shape[0] - 1)
    outputs = []
    for x_t in x.unbind(1):
        window = torch.cat([state, x_t[:, None]], 1)
        y_t = (window.flip(1) * weight).sum(1)
        if bias is not None:
            y_t = y_t + bias
        if activation == "silu":
            y_t = F.silu(y_t)
        outputs.append(x_t + y_t if residual else y_t)
        state = window[:, 1:]
    return torch.stack(outputs, 1) if outputs else x.new_zeros(x.shape)
