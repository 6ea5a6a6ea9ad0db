"""Short causal depthwise convolutions: one filter for all tokens, or a filter made anew for every token."""

from __future__ import annotations

from torch import Tensor

from kernels.backends import resolve_backend
from kernels.short_conv.dynamic import dynamic_short_conv
from kernels.short_conv.fused import short_conv_fused
from kernels.short_conv.reference import check_activation, last_rows, short_conv_reference

__all__ = ["dynamic_short_conv", "short_conv"]


def short_conv(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: bool = False,
    initial_state: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Static causal depthwise convolution over time.

    y_t = [x_t +] act(sum_{j < W} weight[j] * x_{t-j} + bias), where rows before the first token come from
    ``initial_state``, or are zeros.

    Args:
        x: [B,T,D], any T, also T < W - 1 and T = 0.
        weight: [W,D], W >= 1; row j multiplies the token j steps back.
        bias: [D], or None.
        activation: None or ``"silu"``; applied to the convolution, before the residual is added.
        residual: Add x.
        initial_state: [B,W-1,D], the W-1 rows before x, oldest first; None means zeros.
        backend: ``"fused"`` (hand-derived gradient, the default), ``"reference"`` (token loop) or ``"auto"``.

    Returns:
        y [B,T,D] and the state [B,W-1,D] that continues the sequence, both of x's type.

    Raises:
        ValueError: If shapes do not fit, or the activation or backend is unknown.
    """
    check_activation(activation)
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[1] != x.shape[2] or weight.shape[0] < 1:
        raise ValueError(
            f"x must be [B,T,D] and weight [W,D], got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != x.shape[2:]:
        raise ValueError(f"bias must be [D] = [{x.shape[2]}], got {tuple(bias.shape)}")
    rows = (x.shape[0], weight.shape[0] - 1, x.shape[2])
    if initial_state is not None and initial_state.shape != rows:
        raise ValueError(f"initial_state must be [B,W-1,D] = {list(rows)}, got {tuple(initial_state.shape)}")
    if resolve_backend("short_conv", backend, ("fused", "reference")) == "reference":
        return short_conv_reference(x, weight, bias, activation, residual, initial_state)
    y = short_conv_fused(x, weight, bias, activation, residual, initial_state)
    return y, last_rows(x, initial_state, weight.shape[0] - 1)
