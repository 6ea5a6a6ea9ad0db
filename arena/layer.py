"""A layer of a model: (norm, block, residual, [norm, MLP, residual]), and the same with a convolution after
every linear map.

Axes: B batch, T positions, D model width.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from arena.blocks import Block
from arena.blocks.base import State
from arena.blocks.outer import RMSNorm, ShortConv
from arena.mlp import GatedMLP, MixtureMLP, Routing


class Layer(nn.Module):
    """One block and its MLP, each behind a norm and beside a residual."""

    def __init__(self, block: Block, mlp: GatedMLP | MixtureMLP | None) -> None:
        super().__init__()
        self.norm = RMSNorm(block.d_model)
        self.block = block
        self.mlp_norm = RMSNorm(block.d_model) if mlp is not None else None
        self.mlp = mlp

    def forward(self, x: Tensor, state: State | None) -> tuple[Tensor, State, Routing | None]:
        """Map x [B,T,D] and a state to the next ones, and say where the tokens went, if there are experts."""
        y, state = self.block(self.norm(x), state)
        x, routing = self._feed(x + y)
        return x, state, routing

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """Map one position x_t [B,D]."""
        y_t, state = self.block.step(self.norm(x_t), state)
        return self._feed(x_t + y_t)[0], state

    def initial_state(self, batch_size: int) -> State:
        """State before the first position."""
        return self.block.initial_state(batch_size)

    def state_bytes(self, length: int) -> int:
        """Bytes that one sequence carries after ``length`` positions."""
        return self.block.state_bytes(length)

    def _feed(self, x: Tensor) -> tuple[Tensor, Routing | None]:
        if self.mlp is None or self.mlp_norm is None:
            return x, None
        if isinstance(self.mlp, MixtureMLP):
            y, routing = self.mlp(self.mlp_norm(x))
            return x + y, routing
        return x + self.mlp(self.mlp_norm(x)), None


class ConvolvedLayer(Layer):
    """A layer with a short convolution after the block's map out and after gate, up and down of the MLP.

    With those on q, k and v, which are the block's own (``conv``), that is the convolution after every linear
    map of attention and MLP of arXiv 2606.03825. Each adds its result to what the map gave, without an
    activation, the static kind too; each dynamic one makes its taps from what its map read (for the maps out
    and down the paper's sources leave that open). Maps that make gates or factors of a read have none.

    The block's map out is done here, as its convolution reads what the map reads: the block itself ends
    before it. State: the block's, and ``conv_out``, ``conv_up`` and ``conv_down`` [B,W-1,*], the rows before.

    Raises:
        ValueError: the block does not say which linear map is its last one (``Block.map_out``).
    """

    def __init__(self, block: Block, mlp: GatedMLP | None, kind: str) -> None:
        super().__init__(block, mlp)
        width = block.d_model

        def conv(d_in: int, *widths: int) -> ShortConv:
            return ShortConv(kind, d_in, widths, activation=False, residual=True)

        self.map_out = _take_map_out(block)
        self.conv_out = None if self.map_out is None else conv(self.map_out.in_features, width)
        hidden = 0 if mlp is None else mlp.down.in_features
        self.conv_up = conv(width, hidden, hidden) if mlp is not None else None
        self.conv_down = conv(hidden, width) if mlp is not None else None

    def forward(self, x: Tensor, state: State | None) -> tuple[Tensor, State, None]:
        """See :class:`Layer`."""
        own = {} if state is None else {name: state[name] for name in self._rows() if name in state}
        before = None if state is None else {name: y for name, y in state.items() if name not in own}

        def convolve(name: str, y: Tensor, read: Tensor) -> Tensor:
            y, rows = cast(ShortConv, getattr(self, name))(y, read, own.get(name))
            if rows is not None:
                after[name] = rows
            return y

        y, after = self.block(self.norm(x), before)
        after = dict(after)
        if self.map_out is not None:
            y = convolve("conv_out", self.map_out(y), y)
        x = x + y
        if self.mlp is not None and self.mlp_norm is not None:
            mlp = cast(GatedMLP, self.mlp)
            read = self.mlp_norm(x)
            hidden = mlp.hidden(convolve("conv_up", mlp.gate_up(read), read))
            x = x + convolve("conv_down", mlp.down(hidden), hidden)
        return x, after, None

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """See :class:`Layer`."""
        x, state, _ = self(x_t[:, None], state)
        return x[:, 0], state

    def initial_state(self, batch_size: int) -> State:
        """See :class:`Layer`."""
        like = self.norm.weight
        rows = {
            name: torch.zeros(batch_size, *shape, device=like.device, dtype=like.dtype)
            for name, shape in self._rows().items()
        }
        return {**self.block.initial_state(batch_size), **rows}

    def state_bytes(self, length: int) -> int:
        """See :class:`Layer`."""
        values = sum(rows * width for rows, width in self._rows().values())
        return self.block.state_bytes(length) + values * self.norm.weight.element_size()

    def _rows(self) -> dict[str, tuple[int, int]]:
        """Name -> shape of the rows of each convolution that has some."""
        convs = {"conv_out": self.conv_out, "conv_up": self.conv_up, "conv_down": self.conv_down}
        return {
            name: (conv.rows, sum(conv.widths))
            for name, conv in convs.items()
            if conv is not None and conv.rows
        }


def _take_map_out(block: Block) -> nn.Linear | None:
    """Take the last linear map off a block, which then gives what the map would have read."""
    name = block.map_out
    if name == "":
        return None
    found = None if name is None else getattr(block, name, None)
    if name is None or not isinstance(found, nn.Linear):
        raise ValueError(
            f"conv_on = 'all' is not known for {type(block).__name__}: its map_out does not name a linear map"
        )
    setattr(block, name, nn.Identity())
    return found
