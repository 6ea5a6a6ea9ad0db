"""mLSTM: C_t = f_t C_{t-1} + i_t k_t v_t^T, n_t = f_t n_{t-1} + i_t k_t, h_t = C_t^T q_t / max(|n_t^T q_t|,
1).

Beck et al., xLSTM, arXiv 2405.04517, equations 19 to 27: i = exp of its pre-activation, f = sigmoid of its
own, both one a head and independent of each other; k is scaled by K ** -0.5. Under ``common`` the
pre-activations are linear in x (as in xLSTM 7B, arXiv 2503.13427, without its soft cap); they start at weight
0, forget bias 3 to 6 over the heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arena.blocks.base import Block, State, no_weight_decay
from arena.blocks.gates import exponential_gates
from arena.blocks.matrix import matrix_block
from arena.blocks.memory_block import Inputs, MemoryBlock
from arena.blocks.outer import ShortConv
from arena.blocks.registry import register
from arena.memory import NAMED

QKV_BLOCK = 4


class OfficialMLSTM(MemoryBlock):
    """The original block, with its up-projection before the memory and no MLP after it (appendix A.4, figure
    11).

    d_model to two branches x' and z of twice the width (so the state is 4 times that of the common block);
    convolution with bias and SiLU on x'; q and k from the convolved x', v from x' itself, each by a
    block-diagonal map of blocks of 4; gates from (q, k, v); LayerNorm per head, plus a learnable multiple of
    the convolved x', times SiLU(z), down. Initial weights are normal: sqrt(2 / (5 d_model)) going in, 2 /
    (n_blocks sqrt(d_model)) going out; ``n_blocks`` is the depth of the stack, which a model gives it (2: a
    block alone).
    """

    mlp = "none"
    map_out = "down"

    def __init__(self, *, d_model: int, n_heads: int, conv: str | None, n_blocks: int) -> None:
        inner = 2 * d_model
        if inner % QKV_BLOCK:
            raise ValueError(f"official mLSTM needs an even d_model, got {d_model}")
        if n_blocks < 1:
            raise ValueError(f"n_blocks must be at least 1, got {n_blocks}")
        dim = inner // n_heads
        super().__init__(d_model=d_model, n_heads=n_heads, spec=NAMED["mlstm"], key_dim=dim, value_dim=dim)
        conv = conv or "static"
        self.up = nn.Linear(d_model, 2 * inner, bias=False)
        self.conv = ShortConv(conv, d_model, [inner], bias=True, activation=conv != "none")
        # [3 (q, k, v), blocks, in, out]
        self.qkv = nn.Parameter(torch.empty(3, inner // QKV_BLOCK, QKV_BLOCK, QKV_BLOCK))
        self.gate = nn.Linear(3 * inner, 2 * n_heads)
        self.norm_weight = no_weight_decay(nn.Parameter(torch.ones(n_heads, dim)))
        self.skip = nn.Parameter(torch.ones(inner))
        self.down = nn.Linear(inner, d_model, bias=False)
        nn.init.normal_(self.up.weight, std=math.sqrt(2 / (5 * d_model)))
        nn.init.normal_(self.qkv, std=math.sqrt(2 / (5 * d_model)))
        nn.init.normal_(self.down.weight, std=2 / n_blocks / math.sqrt(d_model))
        nn.init.zeros_(self.gate.weight)
        no_weight_decay(self.gate.bias)
        with torch.no_grad():
            self.gate.bias[:n_heads].normal_(std=0.1)
            self.gate.bias[n_heads:] = torch.linspace(3.0, 6.0, n_heads)

    def inputs(self, x: Tensor, state: State | None) -> Inputs:
        """See :class:`~arena.blocks.matrix.MemoryBlock`; the skip is (convolved x', z)."""
        raw, z = self.up(x).chunk(2, -1)
        mixed, rows = self.conv(raw, x, None if state is None else state.get("conv"))
        sources = torch.stack([mixed, mixed, raw], 2).unflatten(-1, (-1, QKV_BLOCK))
        qkv = torch.einsum("btcni,cnio->btcno", sources, self.qkv).flatten(-2)
        input_gate, forget_gate = self.gate(qkv.flatten(-2)).chunk(2, -1)
        q, k, v = (y.unflatten(-1, (self.n_heads, -1)) for y in qkv.unbind(2))
        carry = {} if rows is None else {"conv": rows}
        return Inputs(q, k, v, exponential_gates(input_gate, forget_gate), carry, torch.cat([mixed, z], -1))

    def output_gate(self, x: Tensor, into: Inputs) -> Tensor:
        """SiLU(z)."""
        assert into.skip is not None
        return F.silu(into.skip.chunk(2, -1)[1]).unflatten(-1, (self.n_heads, -1))

    def output(self, x: Tensor, into: Inputs, read: Tensor) -> Tensor:
        """See :class:`~arena.blocks.matrix.MemoryBlock`."""
        assert into.skip is not None
        normed = F.layer_norm(read, read.shape[-1:], eps=1e-5) * self.norm_weight
        past = (self.skip * into.skip.chunk(2, -1)[0]).unflatten(-1, (self.n_heads, -1))
        return self.down(((normed + past) * self.output_gate(x, into)).flatten(-2))


@register("mlstm")
def _build(
    *,
    d_model: int,
    n_heads: int,
    outer: str,
    conv: str | None,
    depth: float,
    n_blocks: int | None = None,
    gates: Mapping[str, Any] | None = None,
    output_gate: str | None = None,
) -> Block:
    if outer == "official":
        if gates or output_gate is not None:
            raise ValueError("the official mLSTM layer has fixed gates; use outer='common' to change them")
        return OfficialMLSTM(
            d_model=d_model, n_heads=n_heads, conv=conv, n_blocks=2 if n_blocks is None else n_blocks
        )
    if n_blocks is not None:
        raise ValueError("n_blocks belongs to the official mLSTM layer (outer='official')")
    return matrix_block(
        NAMED["mlstm"], d_model=d_model, n_heads=n_heads, conv=conv, gates=gates, output_gate=output_gate
    )
