"""What sLSTM and LSTM share: a cell per channel that reads its own last output, in the common layer.

Under ``common`` the pre-activations of z and o are linear in x, and those of i and f in the convolved x with
SiLU, which is where the xLSTM paper has its convolution (arXiv 2405.04517, figure 10): a convolution on z
blurs the token that the cell is to count, and both cells then learn parity much later. The cell's output
takes the place of what a matrix memory reads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from arena.blocks.base import Block, State, memory_dtype, no_weight_decay
from arena.blocks.outer import COMMON, OutputGate, RMSNorm, ShortConv


class RecurrentBlock(Block):
    """Gate pre-activations from x, a cell, and the common layer around it.

    A subclass implements :meth:`cell` and :meth:`describe`, sets the initial values of ``recurrent`` and
    ``bias``, and overrides :meth:`inputs` and :meth:`output` for its official layer.

    State: the cell's memory, each [B,H,K], under the names ``memory``; ``conv``, the rows of the convolution.
    """

    memory: tuple[str, ...]
    conv: ShortConv
    map_out = "out"

    def __init__(self, *, d_model: int, n_heads: int, outer: str) -> None:
        super().__init__(d_model)
        self.n_heads = n_heads
        self.head_dim = d_model // n_heads
        self.outer = outer
        self.recurrent = nn.Parameter(torch.zeros(4, n_heads, self.head_dim, self.head_dim))
        self.bias = no_weight_decay(nn.Parameter(torch.zeros(4, n_heads, self.head_dim)))

    def make_common(self, conv: str | None) -> None:
        """Create the parameters of the common layer."""
        self.conv = ShortConv(conv or COMMON.conv, self.d_model, [self.d_model], activation=conv != "none")
        self.gates = nn.Linear(self.d_model, 2 * self.d_model, bias=False)
        self.values = nn.Linear(self.d_model, 2 * self.d_model, bias=False)
        self.norm = RMSNorm(self.head_dim)
        self.gate_out = OutputGate(COMMON, self.d_model, self.n_heads, self.head_dim)
        self.out = nn.Linear(self.d_model, self.d_model, bias=False)

    def inputs(self, x: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Input pre-activations [B,T,4,H,K] (i, f, z, o) without bias, and the rows of the convolution."""
        mixed, rows = self.conv(x, x, rows)
        gates = torch.cat([self.gates(mixed), self.values(x)], -1)
        return gates.unflatten(-1, (4, self.n_heads, self.head_dim)), rows

    def output(self, x: Tensor, h: Tensor) -> Tensor:
        """From the cell's output h [B,T,H,K] to y [B,T,D]."""
        return self.out((self.norm(h) * self.gate_out(x)).flatten(-2))

    def cell(self, gates: Tensor, memory: tuple[Tensor, ...] | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run the cell over gates [B,T,4,H,K]: h [B,T,H,K] and the memory after the last token."""
        raise NotImplementedError

    def describe(self, memory: dict[str, Tensor], gates: dict[str, Tensor]) -> dict[str, Tensor]:
        """Trace fields of the cell from its memory and its four pre-activations, each [B,T,H,K]."""
        raise NotImplementedError

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """See :class:`~arena.blocks.base.Block`."""
        gates, rows = self.inputs(x, None if state is None else state.get("conv"))
        before = None if state is None else tuple(state[name] for name in self.memory)
        h, memory = self.cell(gates + self.bias, before)
        after = dict(zip(self.memory, memory, strict=True))
        if rows is not None:
            after["conv"] = rows
        return self.output(x, h), after

    def initial_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """See :class:`~arena.blocks.base.Block`."""
        device, dtype = self._placement(device, dtype)
        shape = (batch_size, self.n_heads, self.head_dim)
        state = {name: torch.zeros(shape, device=device, dtype=memory_dtype(dtype)) for name in self.memory}
        if "m" in state:
            state["m"].fill_(-torch.inf)  # the maximum over no token
        if self.conv.rows:
            rows = (batch_size, self.conv.rows, self.d_model)
            state["conv"] = torch.zeros(rows, device=device, dtype=dtype)
        return state

    def trace(self, x: Tensor, state: State | None = None, *, states: bool = False) -> dict[str, Tensor]:
        """See :class:`~arena.blocks.base.Block`; ``output_gate`` is the cell's own, on ``read``."""
        inputs, _ = self.inputs(x, None if state is None else state.get("conv"))
        now = self.initial_state(x.shape[0], device=x.device, dtype=x.dtype) if state is None else state
        memory = tuple(now[name] for name in self.memory)
        every, raw = [], []
        for gates_t in (inputs + self.bias).split(1, 1):
            recurrent = torch.einsum("bhk,ghkl->bghl", memory[0].to(x.dtype), self.recurrent)
            raw.append(gates_t[:, 0] + recurrent)
            _, memory = self.cell(gates_t, memory)
            every.append(memory)
        remembered = {
            name: torch.stack(after, 1)
            for name, after in zip(self.memory, zip(*every, strict=True), strict=True)
        }
        gates = dict(zip("ifzo", torch.stack(raw, 1).unbind(2), strict=True))
        return self.describe(remembered, gates)
