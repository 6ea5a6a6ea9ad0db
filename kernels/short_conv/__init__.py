"""Short causal depthwise convolutions: one filter for all tokens, or a filter made anew for every token."""

from __future__ import annotations

from torch import Tensor

from kernels.backends import resolve_backend, triton_refusal
from kernels.external import fla
from kernels.short_conv.dynamic import dynamic_short_conv
from kernels.short_conv.fused import short_conv_fused
from kernels.short_conv.packing import last_rows_packed, packing_of, places, with_state
from kernels.short_conv.reference import check_activation, kernel_refusal, last_rows, short_conv_reference

__all__ = ["dynamic_short_conv", "short_conv"]


def short_conv(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
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
        cu_seqlens: [S+1] integers from 0 to T: x [1,T,D] holds S sequences one behind the other (empty ones
            too), each starting afresh at its limit; states are then [S,W-1,D]. None: one sequence a row.
        backend: ``"fused"`` (torch, hand-derived gradient), ``"triton"`` (GPU; width up to 8, not fp64),
            ``"fla"`` (flash-linear-attention, where it is installed), ``"reference"`` (token loop) or
            ``"auto"``: what ARENA_BACKEND names, else the table of :mod:`kernels.backends`, else fused.

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
    packing = packing_of(cu_seqlens, x)
    W = weight.shape[0]
    rows = (x.shape[0] if packing is None else len(packing.starts), W - 1, x.shape[2])
    if initial_state is not None and initial_state.shape != rows:
        raise ValueError(f"initial_state must be [B,W-1,D] = {list(rows)}, got {tuple(initial_state.shape)}")
    others = {
        "triton": lambda: kernel_refusal(x, W) or triton_refusal(x),
        "fla": lambda: "has no packed sequences here" if packing is not None else fla.conv_refusal(x),
    }
    name = resolve_backend("short_conv", backend, ("fused", "reference"), x=x, others=others)
    if packing is None:
        end = last_rows(x, initial_state, W - 1)
    else:
        end = last_rows_packed(packing, x, initial_state, W - 1)
    if name == "triton":
        from kernels.short_conv.triton_static import short_conv_triton

        return short_conv_triton(x, weight, bias, activation, residual, initial_state, packing), end
    if name == "fla":
        return fla.short_conv_fla(x, weight, bias, activation, residual, initial_state), end
    run = short_conv_reference if name == "reference" else short_conv_fused
    if packing is None:
        return run(x, weight, bias, activation, residual, initial_state), end
    y = run(with_state(packing, x, initial_state, W - 1), weight, bias, activation, residual, None)
    return y.index_select(1, places(packing, W - 1)), end
