"""Mamba-2: S_t = exp(-A step_t) S_{t-1} + step_t B_t x_t^T, y_t = S_t^T C_t + D x_t.

Dao and Gu, arXiv 2405.21060: keys B, queries C, values x; step = softplus(w u + dt_bias) is one a head and is
at once the write gate and, through the decay, the forget gate. ``mamba2-neg`` has decay 2 exp(-A step) - 1 in
[-1, 1]. It is ours and unpublished: arXiv 2411.12537 does this to Mamba-1 only, as Mamba-2 cumulates decays
as logarithms; here the sign is carried beside the logarithm (``decay_sign``).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arena.blocks.base import Block, State, no_weight_decay
from arena.blocks.gates import GateValues, StepDecay, signed_decay
from arena.blocks.matrix import matrix_block
from arena.blocks.memory_block import Inputs, MemoryBlock
from arena.blocks.outer import CONV_WIDTH, RMSNorm, ShortConv
from arena.blocks.registry import register
from arena.memory import NAMED, GateSpec


class OfficialMamba2(MemoryBlock):
    """The layer of the paper: one projection to (z, x, B, C, step), no MLP after it.

    Convolution with bias and SiLU on (x, B, C); B and C shared by all heads and not normalised; read scale 1;
    D x added to what a head reads; RMSNorm over all heads of (y * SiLU(z)); expansion 2 unless told. Sizes
    follow arXiv 2605.22791, appendix E.1, which equalises the state with the delta rules: heads of width
    ``headdim`` = d_model / (2 n_heads), 4 n_heads of them, and ``d_state`` as wide (64 and 64 at d_model 2048
    and 16 heads; the paper's d_state is 128).
    """

    mlp = "none"
    map_out = "out"
    scale = 1.0

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int,
        spec: GateSpec,
        conv: str | None,
        headdim: int | None,
        d_state: int | None,
        expand: int = 2,
        conv_width: int = CONV_WIDTH,
        conv_bias: bool = True,
        norm_eps: float = 1e-5,
    ) -> None:
        headdim, d_state, heads = head_sizes(d_model, n_heads, headdim, d_state, expand)
        inner = heads * headdim
        super().__init__(d_model=d_model, n_heads=heads, spec=spec, key_dim=d_state, value_dim=headdim)
        self.widths = [inner, inner + 2 * d_state, heads]
        self.project = nn.Linear(d_model, sum(self.widths), bias=False)
        self.conv = ShortConv(
            conv or "static", d_model, [inner, d_state, d_state], bias=conv_bias, width=conv_width
        )
        self.decay = StepDecay(heads, 1, spec.a_range)
        self.D = no_weight_decay(nn.Parameter(torch.ones(heads, 1)))
        self.norm = RMSNorm(inner, norm_eps)
        self.out = nn.Linear(inner, d_model, bias=False)

    def inputs(self, x: Tensor, state: State | None) -> Inputs:
        """See :class:`~arena.blocks.matrix.MemoryBlock`; the skip is z."""
        z, mixed, f = self.project(x).split(self.widths, -1)
        mixed, rows = self.conv(mixed, x, None if state is None else state.get("conv"))
        value, key, query = mixed.split(self.conv.widths, -1)
        key, query = (y[:, :, None].expand(-1, -1, self.n_heads, -1) for y in (key, query))
        log_decay, step = (y[..., 0] for y in self.decay(f[..., None]))
        sign = None
        if self.spec.signed:
            log_decay, sign = signed_decay(log_decay)
        gates = GateValues(log_decay, write=step, decay_sign=sign, step=step)
        v = value.unflatten(-1, (self.n_heads, -1))
        return Inputs(query, key, v, gates, {} if rows is None else {"conv": rows}, skip=z)

    def output_gate(self, x: Tensor, into: Inputs) -> Tensor:
        """SiLU(z); it comes before the norm here."""
        assert into.skip is not None
        return F.silu(into.skip).unflatten(-1, (self.n_heads, -1))

    def output(self, x: Tensor, into: Inputs, read: Tensor) -> Tensor:
        """See :class:`~arena.blocks.matrix.MemoryBlock`."""
        y = (read + self.D * into.v) * self.output_gate(x, into)
        return self.out(self.norm(y.flatten(-2)))


def head_sizes(
    d_model: int, n_heads: int, headdim: int | None, d_state: int | None, expand: int = 2
) -> tuple[int, int, int]:
    """headdim, d_state and number of heads of an official layer (Mamba-2's, Mamba-3's); None: the default.

    Raises:
        ValueError: They do not fit d_model.
    """
    inner, default = expand * d_model, max(1, d_model // (2 * n_heads))
    headdim = default if headdim is None else headdim
    d_state = default if d_state is None else d_state
    if d_state < 1:
        raise ValueError(f"d_state must be at least 1, got {d_state}")
    if headdim < 1 or inner % headdim:
        raise ValueError(
            f"headdim must divide {expand} d_model = {inner}, got {headdim}; set the option headdim"
        )
    return headdim, d_state, inner // headdim


def _build(
    spec: GateSpec,
    *,
    d_model: int,
    n_heads: int,
    outer: str,
    conv: str | None,
    depth: float,
    headdim: int | None = None,
    d_state: int | None = None,
    expand: int = 2,
    conv_width: int = CONV_WIDTH,
    conv_bias: bool = True,
    norm_eps: float = 1e-5,
    gates: Mapping[str, Any] | None = None,
    output_gate: str | None = None,
) -> Block:
    if outer == "official":
        if gates or output_gate is not None:
            raise ValueError("the official Mamba-2 layer has fixed gates; use outer='common' to change them")
        for name, value in (("expand", expand), ("conv_width", conv_width)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        return OfficialMamba2(
            d_model=d_model,
            n_heads=n_heads,
            spec=spec,
            conv=conv,
            headdim=headdim,
            d_state=d_state,
            expand=expand,
            conv_width=conv_width,
            conv_bias=conv_bias,
            norm_eps=norm_eps,
        )
    if (headdim, d_state, expand, conv_width, conv_bias, norm_eps) != (None, None, 2, CONV_WIDTH, True, 1e-5):
        raise ValueError(
            "headdim, d_state, expand, conv_width, conv_bias and norm_eps belong to the official Mamba-2 "
            "layer (outer='official')"
        )
    return matrix_block(
        spec, d_model=d_model, n_heads=n_heads, conv=conv, gates=gates, output_gate=output_gate
    )


for _name in ("mamba2", "mamba2-neg"):
    register(_name)(partial(_build, NAMED[_name]))
