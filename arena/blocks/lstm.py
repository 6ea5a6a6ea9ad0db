"""LSTM, the positive control: c_t = f_t c_{t-1} + i_t tanh(z_t), h_t = o_t tanh(c_t), all gates sigmoid.

Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000, as in ``torch.nn.LSTM``; one cell of
width d_model whatever the number of heads. Recurrent weights and biases start as torch's do: uniform in
+-1/sqrt(d_model), with torch's two biases added into one. Official is the bare cell: no convolution, norm,
gate, map out or MLP.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from arena.blocks.base import Block
from arena.blocks.outer import ShortConv
from arena.blocks.recurrent import RecurrentBlock
from arena.blocks.registry import register
from kernels.lstm import lstm


class LSTM(RecurrentBlock):
    """The cell in the common layer, as one head."""

    memory = ("h", "c")

    def __init__(self, *, d_model: int, outer: str, conv: str | None) -> None:
        super().__init__(d_model=d_model, n_heads=1, outer=outer)
        bound = d_model**-0.5
        nn.init.uniform_(self.recurrent, -bound, bound)
        self.bias.data = torch.empty(2, *self.bias.shape).uniform_(-bound, bound).sum(0)
        if outer == "common":
            self.make_common(conv)

    def cell(self, gates: Tensor, memory: tuple[Tensor, ...] | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See :class:`~arena.blocks.recurrent.RecurrentBlock`."""
        before = None if memory is None else (memory[0][:, 0], memory[1][:, 0])
        h, (h_end, c_end) = lstm(gates.squeeze(3), self.recurrent.squeeze(1), initial_state=before)
        return h[:, :, None], (h_end[:, None], c_end[:, None])

    def describe(self, memory: dict[str, Tensor], gates: dict[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`~arena.blocks.recurrent.RecurrentBlock`."""
        return {
            "input_gate": gates["i"],
            "forget_gate": gates["f"],
            "decay": torch.sigmoid(gates["f"]),
            "write": torch.sigmoid(gates["i"]),
            "v": torch.tanh(gates["z"]),
            "cell": memory["c"],
            "read": torch.tanh(memory["c"]),
            "output_gate": torch.sigmoid(gates["o"]),
        }


class OfficialLSTM(LSTM):
    """The bare cell; a convolution, if asked for, acts on x."""

    mlp = "none"

    map_out = ""

    def __init__(self, *, d_model: int, conv: str | None) -> None:
        super().__init__(d_model=d_model, outer="official", conv=conv)
        conv = conv or "none"
        self.conv = ShortConv(conv, d_model, [d_model], activation=conv != "none")
        self.weight = nn.Linear(d_model, 4 * d_model, bias=False)

    def inputs(self, x: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See :class:`~arena.blocks.recurrent.RecurrentBlock`."""
        mixed, rows = self.conv(x, x, rows)
        return self.weight(mixed).unflatten(-1, (4, 1, self.d_model)), rows

    def output(self, x: Tensor, h: Tensor) -> Tensor:
        """See :class:`~arena.blocks.recurrent.RecurrentBlock`."""
        return h[:, :, 0]


@register("lstm")
def _build(*, d_model: int, n_heads: int, outer: str, conv: str | None, depth: float) -> Block:
    if outer == "official":
        return OfficialLSTM(d_model=d_model, conv=conv)
    return LSTM(d_model=d_model, outer=outer, conv=conv)
