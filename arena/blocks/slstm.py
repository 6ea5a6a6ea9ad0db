"""sLSTM: c_t = f_t c_{t-1} + i_t tanh(z_t), n_t = f_t n_{t-1} + i_t, h_t = sigmoid(o_t) c_t / n_t.

Beck et al., xLSTM, arXiv 2405.04517, section 2.2: i = exp and f = sigmoid of pre-activations that are linear
in x_t and in h_{t-1}, each head for itself; all gates per channel. Under both layers the recurrent weights
start at 0, and so do the biases, but that of f: channel j of K has 5 - 12 (j / (K-1))^(0.3 + 1.3 depth).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arena.blocks.base import Block, no_weight_decay
from arena.blocks.outer import ShortConv
from arena.blocks.recurrent import RecurrentBlock
from arena.blocks.registry import register
from kernels import slstm


class SLSTM(RecurrentBlock):
    """The cell in the common layer."""

    memory = ("h", "c", "n", "m")

    def __init__(self, *, d_model: int, n_heads: int, outer: str, conv: str | None, depth: float) -> None:
        super().__init__(d_model=d_model, n_heads=n_heads, outer=outer)
        channel = torch.arange(self.head_dim) / max(self.head_dim - 1, 1)
        self.bias.data[1] = 5 - 12 * channel ** (0.3 + 1.3 * depth)
        if outer == "common":
            self.make_common(conv)

    def cell(self, gates: Tensor, memory: tuple[Tensor, ...] | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See :class:`~arena.blocks.recurrent.RecurrentBlock`."""
        before = None if memory is None else (memory[0], memory[1], memory[2], memory[3])
        return slstm(gates, self.recurrent, initial_state=before)

    def describe(self, memory: dict[str, Tensor], gates: dict[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`~arena.blocks.recurrent.RecurrentBlock`; cell and normaliser are relative to exp(m)."""
        return {
            "input_gate": gates["i"],
            "forget_gate": gates["f"],
            "decay": torch.sigmoid(gates["f"]),
            "log_decay": F.logsigmoid(gates["f"]),
            "v": torch.tanh(gates["z"]),
            "cell": memory["c"],
            "normaliser": memory["n"],
            "read": memory["c"] / memory["n"],
            "output_gate": torch.sigmoid(gates["o"]),
        }


class OfficialSLSTM(SLSTM):
    """The block of the xLSTM paper (figure 10, without its MLP, which the model adds: ``mlp``).

    A convolution with bias and SiLU feeds i and f only (the paper's formal-language runs use none:
    ``conv="none"``); maps within a head, N(0, 2 / (5 d_model)) at the start; LayerNorm per head, no map out.
    """

    mlp = "gelu"
    map_out = ""

    def __init__(self, *, d_model: int, n_heads: int, conv: str | None, depth: float) -> None:
        super().__init__(d_model=d_model, n_heads=n_heads, outer="official", conv=conv, depth=depth)
        conv = conv or "static"
        self.conv = ShortConv(conv, d_model, [d_model], bias=True, activation=conv != "none")
        self.weight = nn.Parameter(torch.empty(4, n_heads, self.head_dim, self.head_dim))
        nn.init.normal_(self.weight, std=math.sqrt(2 / (5 * d_model)))
        self.norm_weight = no_weight_decay(nn.Parameter(torch.ones(n_heads, self.head_dim)))

    def inputs(self, x: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See :class:`~arena.blocks.recurrent.RecurrentBlock`."""
        mixed, rows = self.conv(x, x, rows)
        sources = torch.stack([mixed, mixed, x, x], 2).unflatten(-1, (self.n_heads, -1))
        return torch.einsum("btghk,ghkl->btghl", sources, self.weight), rows

    def output(self, x: Tensor, h: Tensor) -> Tensor:
        """See :class:`~arena.blocks.recurrent.RecurrentBlock`."""
        return (F.layer_norm(h, h.shape[-1:], eps=1e-5) * self.norm_weight).flatten(-2)


@register("slstm")
def _build(*, d_model: int, n_heads: int, outer: str, conv: str | None, depth: float) -> Block:
    if outer == "official":
        return OfficialSLSTM(d_model=d_model, n_heads=n_heads, conv=conv, depth=depth)
    return SLSTM(d_model=d_model, n_heads=n_heads, outer=outer, conv=conv, depth=depth)
