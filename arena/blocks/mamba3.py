"""Mamba-3: a memory that rotates, and writes every token by the trapezoidal rule.

Lahoti et al., arXiv 2603.15569, section 3. Per head, with keys B, queries C, values x and a step size Delta,

    h_t = alpha_t h_{t-1} + beta_t b_{t-1} x_{t-1}^T + gamma_t b_t x_t^T        y_t = h_t^T c_t
    alpha = exp(Delta A)    beta = (1 - lambda) Delta alpha    gamma = lambda Delta

where b_t and c_t are B_t and C_t turned back by the sum of all angles theta_1 + ... + theta_t, channel pair
by pair. That is the real form of a complex memory: in the frame of B and C themselves, h turns by theta_t at
every token, so that the eigenvalues of its transition are alpha_t exp(+-i theta_t). (Code that turns B and C
forward has the opposite sign of theta.) All of A, Delta, lambda and theta come from the
token: Delta = softplus(. + dt_bias), A = -max(act(.), 1e-4), lambda = sigmoid(.), theta = pi tanh(.) Delta
with one pre-activation for all heads. MIMO of rank R writes and reads R keys and queries a token,
h_t = alpha_t h_{t-1} + sum_r (...) b_{t,r} (m_r * x_t)^T, m_r a learned vector.

**On one operator.** What a token leaves behind is written once, when the next one comes and its gates are
known: p_t = h_t - gamma_t b_t x_t^T follows

    p_t = alpha_t p_{t-1} + alpha_t (gamma_{t-1} + (1 - lambda_t) Delta_t) b_{t-1} x_{t-1}^T

which is ``kernels.gated_memory`` on the keys and values of the token before, and the read is
p_t^T c_t + gamma_t (c_t . b_t) x_t. Nothing is subtracted and no gate of a later token is used, so that this
is exact for any gates and causal to the last bit. (One write of weight gamma_t + (1 - lambda_{t+1})
Delta_{t+1} less a diagonal term would lose as many digits as the next step is larger than this one.) The R
writes of MIMO are R micro-steps of the operator; read r misses the writes that come after it there, which are
added.

The sum of the angles is float64 and is kept modulo 2 pi.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arena.blocks.base import Block, State, no_weight_decay
from arena.blocks.mamba2 import head_sizes
from arena.blocks.matrix import MatrixMemoryBlock
from arena.blocks.memory_block import Inputs
from arena.blocks.outer import COMMON, RMSNorm, ShortConv, l2_norm
from arena.blocks.registry import near, register
from arena.blocks.trapezoid import Mamba3Memory
from arena.memory import GateSpec

_SPEC = GateSpec(decay="scalar", write="scalar", coupling="step", qk_map="none")
"""Mamba-2's point of gate space: what Mamba-3 has beyond it, gate space has no name for."""


class CommonMamba3(Mamba3Memory, MatrixMemoryBlock):
    """Mamba-3's memory in the layer that all architectures share.

    Its memory is the recurrence, with its gates and the biases of B and C. The layer's normalisation of q and
    k to length 1 stands in the place of their RMSNorm; so that biases keep their size beside them, they start
    at K^-1/2 instead of 1. Nothing else is the paper's: the short convolution, SiLU, the norm and gate of the
    output and the read scale K^-1/2 are the common layer's, and there is no skip D x. MIMO has R times the
    keys and queries, and the vectors of a rank on values and reads, but none on the output gate.
    """

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int,
        conv: str | None,
        output_gate: Any,
        rank: int,
        memory: Mapping[str, Any],
    ) -> None:
        layer = replace(COMMON, key_ratio=rank)  # keys of all ranks side by side
        if output_gate is not None:
            layer = replace(layer, output_gate=output_gate)
        super().__init__(d_model=d_model, n_heads=n_heads, spec=_SPEC, layer=layer, conv=conv)
        self.key_dim //= rank
        self.make_memory(rank, bias_start=self.key_dim**-0.5, **memory)
        self.gate_in = nn.Linear(d_model, sum(self.token_gates.widths), bias=False)

    def make_gates(self) -> None:
        """Nothing yet: :meth:`make_memory` creates them."""

    def inputs(self, x: Tensor, state: State | None) -> Inputs:
        """See :class:`Mamba3Memory`."""
        mixed, rows = self.conv(self.qkv(x), x, None if state is None else state.get("conv"))
        q, k, v = (y.unflatten(-1, (self.n_heads, -1)) for y in mixed.split(self.widths, -1))
        q, k = (l2_norm(y.unflatten(-1, (self.rank, -1))) for y in (q, k))
        gates = self.token_gates(self.gate_in(x))
        return Inputs(*self.biased(q, k), v, gates, {} if rows is None else {"conv": rows})

    def output(self, x: Tensor, into: Inputs, read: Tensor) -> Tensor:
        """See :class:`~arena.blocks.matrix.MemoryBlock`."""
        return super().output(x, into, self.combined(read))


class OfficialMamba3(Mamba3Memory):
    """The layer of the paper: one projection to (z, x, B, C, Delta, A, lambda, theta), then a SwiGLU MLP.

    No convolution (the ``conv`` option puts one with bias and SiLU on x, B and C); B and C shared by all
    heads, RMSNorm over d_state, then biases of each head that start at 1; read scale 1; D x added to what a
    head reads; times SiLU(z); expansion 2. Neighbouring channels turn together (the paper's MIMO kernel pairs
    i with i + d_state / 2: the same but for the order of the channels). MIMO has R B's and C's a token and
    learned vectors on x, z and y for each rank; D x is added and the gate applied for each read, then they
    are summed. Sizes as in the official Mamba-2 of this package: ``headdim`` = ``d_state`` = d_model / (2
    n_heads), 4 n_heads heads (arXiv 2605.22791, appendix E.1; the paper's d_state is 128).
    """

    map_out = "out"
    scale = 1.0

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int,
        conv: str | None,
        headdim: int | None,
        d_state: int | None,
        out_norm: bool,
        rank: int,
        memory: Mapping[str, Any],
    ) -> None:
        headdim, d_state, heads = head_sizes(d_model, n_heads, headdim, d_state)
        inner = heads * headdim
        super().__init__(d_model=d_model, n_heads=heads, spec=_SPEC, key_dim=d_state, value_dim=headdim)
        self.make_memory(rank, bias_start=1.0, **memory)
        self.widths = [inner, inner + 2 * rank * d_state, sum(self.token_gates.widths)]
        self.project = nn.Linear(d_model, sum(self.widths), bias=False)
        self.conv = ShortConv(
            conv or "none",
            d_model,
            [inner, rank * d_state, rank * d_state],
            bias=True,
            activation=conv not in (None, "none"),
        )
        self.k_norm, self.q_norm = RMSNorm(d_state), RMSNorm(d_state)
        self.D = no_weight_decay(nn.Parameter(torch.ones(heads, 1, 1)))
        self.mimo_z = None
        if rank > 1:
            self.mimo_z = no_weight_decay(nn.Parameter(torch.ones(heads, rank, headdim)))
        self.norm = None
        if out_norm:
            self.norm = RMSNorm(headdim)
            self.norm.weight = no_weight_decay(nn.Parameter(torch.ones(heads, 1, headdim)))
        self.out = nn.Linear(inner, d_model, bias=False)

    def inputs(self, x: Tensor, state: State | None) -> Inputs:
        """See :class:`Mamba3Memory`; the skip is z."""
        z, mixed, f = self.project(x).split(self.widths, -1)
        mixed, rows = self.conv(mixed, x, None if state is None else state.get("conv"))
        value, key, query = mixed.split(self.conv.widths, -1)
        k, q = (
            norm(y.unflatten(-1, (self.rank, -1)))[:, :, None].expand(-1, -1, self.n_heads, -1, -1)
            for norm, y in ((self.k_norm, key), (self.q_norm, query))
        )
        v = value.unflatten(-1, (self.n_heads, -1))
        carry = {} if rows is None else {"conv": rows}
        return Inputs(*self.biased(q, k), v, self.token_gates(f), carry, skip=z)

    def output_gate(self, x: Tensor, into: Inputs) -> Tensor:
        """SiLU(z), [B,T,H,V]; with MIMO that of each rank side by side, [B,T,H,R V]."""
        assert into.skip is not None
        z = into.skip.unflatten(-1, (self.n_heads, 1, -1))
        return F.silu(z if self.mimo_z is None else z * self.mimo_z).flatten(-2)

    def output(self, x: Tensor, into: Inputs, read: Tensor) -> Tensor:
        """See :class:`~arena.blocks.matrix.MemoryBlock`."""
        y = read + self.D * self.values(into.v)
        if self.norm is not None:
            y = self.norm(y)
        y = y * self.output_gate(x, into).unflatten(-1, (self.rank, -1))
        return self.out(self.combined(y).flatten(-2))


@register("mamba3")
def build_mamba3(
    *,
    d_model: int,
    n_heads: int,
    outer: str,
    conv: str | None,
    depth: float,
    rank: int = 1,
    a_activation: str = "softplus",
    rope_fraction: float = 0.5,
    rotary: str = "data",
    trapezoid: float | None = None,
    bias: bool = True,
    headdim: int | None = None,
    d_state: int | None = None,
    out_norm: bool | None = None,
    output_gate: str | None = None,
) -> Block:
    """Mamba-3; the defaults are the paper's.

    Args:
        d_model: D.
        n_heads: H of the common layer; the official one has 4 times as many, as Mamba-2's has.
        outer: Layer.
        conv: Short convolution in place of the layer's.
        depth: Not used.
        rank: R of MIMO; 1 is SISO.
        a_activation: ``"softplus"`` or ``"heavy-tail"``, see :class:`Mamba3Gates`.
        rope_fraction: Share of the key channels that turn, 0.5 or 1; at least one pair does.
        rotary: ``"data"``, ``"fixed"`` or ``"none"``, see :class:`Mamba3Gates`.
        trapezoid: Fixes lambda at a number in [0, 1]; None: learned.
        bias: Learned biases of B and C.
        headdim: Of the official layer, V.
        d_state: Of the official layer, K.
        out_norm: Of the official layer: RMSNorm over each head's y before the gate, a weight for every head
            and channel, which the paper advises for hybrids; None: no.
        output_gate: Of the common layer: ``"silu"``, ``"sigmoid"`` or ``"none"``.

    Raises:
        ValueError: A value makes no sense; the message says what would.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    for name, value, known in (
        ("a_activation", a_activation, ("softplus", "heavy-tail")),
        ("rotary", rotary, ("data", "fixed", "none")),
    ):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}{near(value, known)}")
    if rope_fraction not in (0.5, 1):
        raise ValueError(f"rope_fraction must be 0.5 or 1, got {rope_fraction}")
    if trapezoid is not None and not 0 <= trapezoid <= 1:
        raise ValueError(f"trapezoid fixes lambda at a number in [0, 1], got {trapezoid}")
    key_dim = d_model // n_heads
    if outer == "official":
        key_dim = head_sizes(d_model, n_heads, headdim, d_state)[1]
    if rotary != "none" and key_dim < 2:
        raise ValueError(
            f"a rotation needs heads of at least 2 key channels, got {key_dim} (or rotary='none')"
        )
    memory = {
        "a_activation": a_activation,
        "pairs": 0 if rotary == "none" else max(1, key_dim // int(2 / rope_fraction)),
        "rotary": rotary,
        "trapezoid": trapezoid,
        "bias": bias,
    }
    if outer == "official":
        if output_gate is not None:
            raise ValueError(
                "the official Mamba-3 layer has its own output gate; use outer='common' to change it"
            )
        return OfficialMamba3(
            d_model=d_model,
            n_heads=n_heads,
            conv=conv,
            headdim=headdim,
            d_state=d_state,
            out_norm=bool(out_norm),
            rank=rank,
            memory=memory,
        )
    if headdim is not None or d_state is not None or out_norm is not None:
        raise ValueError(
            "headdim, d_state and out_norm belong to the official Mamba-3 layer (outer='official')"
        )
    return CommonMamba3(
        d_model=d_model, n_heads=n_heads, conv=conv, output_gate=output_gate, rank=rank, memory=memory
    )
