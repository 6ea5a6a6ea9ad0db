"""Blocks whose memory is a matrix: one class for the whole gate space.

To add an architecture, name its point of gate space,

    register_memory("mine", GateSpec(decay="scalar", write="scalar"))

or, where its gates are computed in a way of its own, subclass :class:`MatrixMemoryBlock`, override
:meth:`~MatrixMemoryBlock.gates` (and whatever else differs) and pass the class to :func:`register_memory`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from arena.blocks.base import Block, State
from arena.blocks.gates import Gates, GateValues, micro_heads
from arena.blocks.memory_block import Inputs, MemoryBlock
from arena.blocks.outer import COMMON, LayerSpec, OutputGate, RMSNorm, ShortConv, l2_norm, xavier_
from arena.blocks.registry import register, register_family
from arena.memory import MOST_MICRO_STEPS, NAMED, GateSpec


class MatrixMemoryBlock(MemoryBlock):
    """q, k, v and gates from x, the memory, and the layer of a :class:`~arena.blocks.outer.LayerSpec`.

    Args:
        d_model: D.
        n_heads: H.
        spec: The memory.
        layer: What stands around it.
        conv: Short convolution in place of the layer's; None keeps it.
    """

    map_out = "out"

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int,
        spec: GateSpec,
        layer: LayerSpec = COMMON,
        conv: str | None = None,
    ) -> None:
        key_dim, value_dim = layer.head_dims(d_model, n_heads)
        super().__init__(d_model=d_model, n_heads=n_heads, spec=spec, key_dim=key_dim, value_dim=value_dim)
        self.layer = layer
        updates = n_heads * self.keys_a_token
        self.widths = [n_heads * key_dim, updates * key_dim, updates * value_dim]
        conv = conv or layer.conv
        activation = layer.activation == "silu" or conv != "none"
        self.qkv = nn.Linear(d_model, sum(self.widths), bias=False)
        self.conv = ShortConv(conv, d_model, self.widths, activation=activation, width=layer.conv_width)
        self.make_gates()
        self.norm = RMSNorm(value_dim, layer.norm_eps) if layer.norm == "rms" else None
        self.gate_out = None
        if layer.output_gate != "none":
            self.gate_out = OutputGate(layer, d_model, n_heads, value_dim)
        self.out = nn.Linear(n_heads * value_dim, d_model, bias=False)
        if layer.init == "xavier":
            xavier_(self, {self.qkv: self.widths})

    @property
    def keys_a_token(self) -> int:
        """How many keys and values are projected for a token."""
        return self.micro_steps

    def make_gates(self) -> None:
        """Create the parameters that :meth:`gates` uses; override both together."""
        self.gate = Gates(
            self.spec,
            d_model=self.d_model,
            n_heads=self.n_heads,
            key_dim=self.key_dim,
            value_dim=self.value_dim,
        )

    def gates(self, x: Tensor) -> GateValues:
        """The gates of x [B,T,D]; override it for an architecture that computes them in its own way."""
        return self.gate(x)

    def inputs(self, x: Tensor, state: State | None) -> Inputs:
        """See :class:`MemoryBlock`."""
        mixed, rows = self.conv(self.qkv(x), x, None if state is None else state.get("conv"))
        steps = (1, self.keys_a_token, self.keys_a_token)
        q, k, v = (
            micro_heads(y, n, self.n_heads) for y, n in zip(mixed.split(self.widths, -1), steps, strict=True)
        )
        if self.spec.qk_map == "l2":
            q, k = l2_norm(q), l2_norm(k)
        elif self.spec.qk_map == "elu1":
            q, k = F.elu(q) + 1, F.elu(k) + 1
        gates = self.gates(x)
        if gates.key is not None:
            k = k * gates.key.to(k.dtype)
        return Inputs(q, k, v, gates, {} if rows is None else {"conv": rows})

    def output_gate(self, x: Tensor, into: Inputs) -> Tensor | None:
        """See :class:`MemoryBlock`."""
        return None if self.gate_out is None else self.gate_out(x)

    def output(self, x: Tensor, into: Inputs, read: Tensor) -> Tensor:
        """See :class:`MemoryBlock`."""
        if self.norm is not None:
            read = self.norm(read)
        factor = self.output_gate(x, into)
        return self.out((read if factor is None else read * factor).flatten(-2))


def matrix_block(
    spec: GateSpec,
    *,
    d_model: int,
    n_heads: int,
    conv: str | None,
    layer: LayerSpec = COMMON,
    gates: Mapping[str, Any] | None = None,
    output_gate: Any = None,
    block: type[MatrixMemoryBlock] = MatrixMemoryBlock,
) -> Block:
    """A block at a point of gate space.

    Args:
        spec: The point.
        d_model: D.
        n_heads: H.
        conv: Short convolution in place of the layer's; None keeps it.
        layer: What stands around the memory.
        gates: Fields of the point to change, ``{"erase": "scalar"}`` say.
        output_gate: ``"silu"``, ``"sigmoid"`` or ``"none"`` in place of the layer's; None keeps it.
        block: The class to build.
    """
    return block(
        d_model=d_model,
        n_heads=n_heads,
        spec=spec.replace(**(gates or {})),
        layer=replace(layer, output_gate=output_gate) if output_gate is not None else layer,
        conv=conv,
    )


def register_memory(
    name: str,
    spec: GateSpec,
    *,
    official: LayerSpec = COMMON,
    official_gates: Mapping[str, Any] | None = None,
    block: type[MatrixMemoryBlock] = MatrixMemoryBlock,
) -> None:
    """Make an architecture known to ``build_block``; arguments as of :func:`memory_builder`."""
    register(name)(memory_builder(spec, official=official, official_gates=official_gates, block=block))


def memory_builder(
    spec: GateSpec,
    *,
    official: LayerSpec = COMMON,
    official_gates: Mapping[str, Any] | None = None,
    block: type[MatrixMemoryBlock] = MatrixMemoryBlock,
) -> Callable[..., Block]:
    """What builds an architecture, with the options ``gates`` and ``output_gate`` of :func:`matrix_block`,
    and ``layer``, fields of its official layer (:class:`~arena.blocks.outer.LayerSpec`) to change.

    Args:
        spec: The memory.
        official: The layer of the paper.
        official_gates: Where the memory itself is another one in the paper than in the common layer.
        block: A subclass, for gates that are computed in another way.
    """

    def build(
        *,
        d_model: int,
        n_heads: int,
        outer: str,
        conv: str | None,
        depth: float,
        gates: Mapping[str, Any] | None = None,
        output_gate: str | None = None,
        layer: Mapping[str, Any] | None = None,
    ) -> Block:
        around, point = COMMON, spec
        if outer == "official":
            around, point = official.changed(layer), spec.replace(**(official_gates or {}))
        elif layer:
            raise ValueError("the common layer is one for all: layer is for outer='official'")
        return matrix_block(
            point,
            d_model=d_model,
            n_heads=n_heads,
            conv=conv,
            layer=around,
            gates=gates,
            output_gate=output_gate,
            block=block,
        )

    return build


def register_product(name: str, base: str, *, official: LayerSpec) -> None:
    """Make the family ``name`` known: the architecture ``base`` with n micro-steps a token."""

    @register_family(name, largest=MOST_MICRO_STEPS)
    def build(n: int) -> Callable[..., Block]:
        return memory_builder(NAMED[base].replace(micro_steps=n), official=official)
