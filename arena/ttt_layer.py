"""The layers of :mod:`arena.ttt`, whose updated MLP takes weights of a sequence's own."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from arena.blocks.attention import Attention
from arena.blocks.base import State
from arena.blocks.outer import RMSNorm
from arena.layer import Layer
from arena.mlp import GatedMLP

Fast = tuple[Tensor, ...]
"""Updated weights, two of each updated layer: gate_up [B,2F,D] and down [B,D,F]."""


class TTTLayer(nn.Module):
    """x + attention, [+ updated MLP], + MLP; every branch behind a norm, and before one where ``post``."""

    def __init__(self, layer: Layer, *, post: bool, updated: bool) -> None:
        super().__init__()
        width = layer.block.d_model
        assert isinstance(layer.mlp, GatedMLP) and layer.mlp_norm is not None
        self.norm, self.block = layer.norm, cast(Attention, layer.block)
        self.mlp_norm, self.mlp = layer.mlp_norm, layer.mlp
        self.post_norm = RMSNorm(width) if post else None
        self.mlp_post_norm = RMSNorm(width) if post else None
        if updated:
            self.fast_norm, self.fast_post_norm = RMSNorm(width), RMSNorm(width)
            self.fast = GatedMLP(width, layer.mlp.down.in_features, gelu=False)
        self.updated = updated

    def forward(self, x: Tensor, state: State | None, fast: Fast | None = None) -> tuple[Tensor, State]:
        """Map x [B,T,D]; ``fast`` are the weights of this layer's updated MLP, None: those it starts from."""
        y, state = self.block(self.norm(x), state)
        x = x + (y if self.post_norm is None else self.post_norm(y))
        if self.updated:
            into = self.fast_norm(x)
            x = x + self.fast_post_norm(self.fast(into) if fast is None else gated_mlp(into, *fast))
        y = self.mlp(self.mlp_norm(x))
        return x + (y if self.mlp_post_norm is None else self.mlp_post_norm(y)), state


def gated_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """:class:`~arena.model.GatedMLP` with weights of each sequence's own."""
    gate, up = (x @ gate_up.mT.to(x.dtype)).chunk(2, -1)
    return (F.silu(gate) * up) @ down.mT.to(x.dtype)


class Tail(nn.Module):
    """The updated layers and the norm after them; a view of a model's parts, made for a call."""

    def __init__(self, layers: list[TTTLayer], norm: RMSNorm) -> None:
        super().__init__()
        self.layers, self.norm = nn.ModuleList(layers), norm

    def forward(self, x: Tensor, states: list[State], fast: Fast | None) -> tuple[Tensor, list[State]]:
        """Map x [B,T,D] and the states of the layers' attention to the next ones."""
        after = []
        for index, layer in enumerate(self.layers):
            own = None if fast is None else fast[2 * index : 2 * index + 2]
            x, state = layer(x, states[index], own)
            after.append(state)
        return self.norm(x), after
