"""Dynamic short convolution: every token brings its own filter (arXiv 2606.03825, section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backends import resolve_backend, triton_refusal
from kernels.short_conv.packing import (
    Packing,
    last_rows_packed,
    packing_of,
    places,
    unpacked,
    with_state,
)
from kernels.short_conv.reference import check_activation, kernel_refusal, last_rows


def dynamic_short_conv(
    x: Tensor,
    *,
    z: Tensor | None = None,
    u: Tensor | None = None,
    filters: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: bool = True,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution whose taps are made from the current token.

    y_t = [x_t +] act(sum_{j < W} (g_t[j] + bias[j]) * x_{t-j}), with no norm on the taps. Either

    - low-rank: g_t[j, d] = sum_r z_t[r] u[r, j, d], or
    - head-wise: g_t[j, d] = filters_t[j, d // (D/G)], one filter for each of G groups of D/G channels.

    Args:
        x: [B,T,D].
        z: [B,T,R], low-rank coefficients; goes with ``u``.
        u: [R,W,D], the R filters that ``z`` mixes.
        filters: [B,T,W,G] with D a multiple of G, instead of ``z`` and ``u``.
        bias: [W,D], the static part of the taps (not an offset of y), or None.
        activation: None or ``"silu"``, before the residual is added.
        residual: Add x.
        initial_state: [B,W-1,D], the W-1 rows before x, oldest first; None means zeros.
        cu_seqlens: [S+1] integers from 0 to T: x [1,T,D] holds S sequences one behind the other (empty ones
            too), each starting afresh at its limit; states are then [S,W-1,D]. None: one sequence a row.
        backend: ``"fused"`` (torch, one pass a tap, any rank and width), ``"triton"`` (GPU, one pass; width
            up to 8, rank up to 64 in 16 bits (62 at widths above 4), to 30 in fp32 (14 there), not fp64),
            ``"reference"`` (token loop) or ``"auto"``: what the table in ``kernels/backends.py`` says.

    Returns:
        y [B,T,D] and the state [B,W-1,D] that continues the sequence, both of x's type.

    Raises:
        ValueError: If not exactly one form is given, shapes do not fit, or a name is unknown.
    """
    check_activation(activation)
    packing = packing_of(cu_seqlens, x)
    width = _check(x, z, u, filters, bias, initial_state, packing)
    if packing is None:
        end = last_rows(x, initial_state, width - 1)
    else:
        end = last_rows_packed(packing, x, initial_state, width - 1)
    refusal = kernel_refusal(x, width, 1 if u is None else u.shape[0])
    others = {"triton": lambda: refusal or triton_refusal(x)}
    chosen = resolve_backend("dynamic_short_conv", backend, ("fused", "reference"), x=x, others=others)
    if chosen == "triton":
        from kernels.short_conv.triton_dynamic import dynamic_triton

        y = dynamic_triton(x, z, u, filters, bias, activation, residual, initial_state, packing)
        return y, end
    if packing is not None:
        x = with_state(packing, x, initial_state, width - 1)
        z, filters = (None if a is None else unpacked(packing, a, width - 1) for a in (z, filters))
        initial_state = None
    if filters is not None:
        filters = filters.repeat_interleave(x.shape[2] // filters.shape[3], 3)
    run = _loop if chosen == "reference" else _passes
    y = run(x, z, u, filters, bias, width, initial_state)
    if activation == "silu":
        y = F.silu(y)
    if residual:
        y = x + y
    return (y if packing is None else y.index_select(1, places(packing, width - 1))), end


def _taps(
    z: Tensor | None, u: Tensor | None, filters: Tensor | None, bias: Tensor | None, lag: int
) -> Tensor:
    """The taps of one lag for all tokens, [B,T,D]."""
    if filters is not None:
        taps = filters[:, :, lag]
    else:
        assert z is not None and u is not None
        taps = z @ u[:, lag]
    return taps if bias is None else taps + bias[lag]


def _passes(
    x: Tensor,
    z: Tensor | None,
    u: Tensor | None,
    filters: Tensor | None,
    bias: Tensor | None,
    width: int,
    initial_state: Tensor | None,
) -> Tensor:
    rows = torch.cat([last_rows(x[:, :0], initial_state, width - 1), x], 1)
    y = _taps(z, u, filters, bias, 0) * x
    for lag in range(1, width):
        start = width - 1 - lag
        y = torch.addcmul(y, _taps(z, u, filters, bias, lag), rows[:, start : start + x.shape[1]])
    return y


def _loop(
    x: Tensor,
    z: Tensor | None,
    u: Tensor | None,
    filters: Tensor | None,
    bias: Tensor | None,
    width: int,
    initial_state: Tensor | None,
) -> Tensor:
    state = last_rows(x[:, :0], initial_state, width - 1)
    outputs = []
    for t in range(x.shape[1]):
        window = torch.cat([state, x[:, t : t + 1]], 1)
        if filters is not None:
            taps = filters[:, t]
        else:
            assert z is not None and u is not None
            taps = torch.einsum("br,rwd->bwd", z[:, t], u)
        if bias is not None:
            taps = taps + bias
        outputs.append((taps * window.flip(1)).sum(1))
        state = window[:, 1:]
    return torch.stack(outputs, 1) if outputs else x.new_zeros(x.shape)


def _check(
    x: Tensor,
    z: Tensor | None,
    u: Tensor | None,
    filters: Tensor | None,
    bias: Tensor | None,
    initial_state: Tensor | None,
    packing: Packing | None,
) -> int:
    """Refuse what does not fit together; return the width W."""
    low_rank = z is not None and u is not None and filters is None
    head_wise = z is None and u is None and filters is not None
    if not (low_rank or head_wise):
        raise ValueError("give either z and u (low-rank) or filters (head-wise)")
    B, T, D = x.shape
    if filters is not None:
        width, groups = filters.shape[-2:]
        if filters.shape != (B, T, width, groups) or groups < 1 or D % groups:
            raise ValueError(f"filters must be [B,T,W,G] with G a divisor of {D}, got {tuple(filters.shape)}")
    else:
        assert z is not None and u is not None
        width = u.shape[-2]
        if z.shape != (B, T, u.shape[0]) or u.shape != (u.shape[0], width, D):
            raise ValueError(f"z must be [B,T,R] and u [R,W,D], got {tuple(z.shape)} and {tuple(u.shape)}")
    if width < 1:
        raise ValueError("the width W must be at least 1")
    if bias is not None and bias.shape != (width, D):
        raise ValueError(f"bias must be [W,D] = [{width}, {D}], got {tuple(bias.shape)}")
    states = B if packing is None else len(packing.starts)
    if initial_state is not None and initial_state.shape != (states, width - 1, D):
        raise ValueError(
            f"initial_state must be [B,W-1,D] = {[states, width - 1, D]}, got {tuple(initial_state.shape)}"
        )
    return width
