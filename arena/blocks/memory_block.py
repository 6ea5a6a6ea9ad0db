"""The memory of a point of gate space, apart from what computes its inputs: :class:`MemoryBlock`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import kernels
from arena.blocks.base import Block, State, memory_dtype
from arena.blocks.correction import correction_memory
from arena.blocks.gates import GateValues, at_micro_step
from arena.blocks.outer import ShortConv
from arena.memory import GateSpec
from kernels.gated_memory.mlstm import EPS, stabiliser


class Inputs(NamedTuple):
    """What a memory gets, and what the layer keeps for later; M = T * micro_steps."""

    q: Tensor
    """[B,T,H,K]"""
    k: Tensor
    """[B,M,H,K]"""
    v: Tensor
    """[B,M,H,V]"""
    gates: GateValues
    """Of the M updates."""
    carry: State
    """State of the layer apart from the memory (rows of the convolution)."""
    skip: Tensor | None = None
    """[B,T,*]: what official layers lead past the memory."""


class MemoryBlock(Block):
    """The memory of a :class:`~arena.memory.GateSpec` in a layer that the subclass defines.

    The subclass sets ``self.conv`` and implements :meth:`inputs`, :meth:`output_gate` and :meth:`output`.

    State: ``memory`` [B,H,K,V] (with a normaliser that is not mLSTM's, V+1 columns, the last one the
    normaliser); mLSTM also ``normaliser`` [B,H,K] and ``stabiliser`` [B,H], where the true memory and
    normaliser are those of the state times exp(stabiliser); ``conv``, the last rows of the convolution, where
    there is one.
    """

    scale: float | None = None
    """On q; None means K ** -0.5."""
    erasing_steps: int | None = None
    """So many of a token's micro-steps, the first ones, have an erase gate; None: all."""
    conv: ShortConv

    def __init__(self, *, d_model: int, n_heads: int, spec: GateSpec, key_dim: int, value_dim: int) -> None:
        super().__init__(d_model)
        self.spec = spec
        self.micro_steps = self.gate_steps = spec.micro_steps
        self.n_heads = n_heads
        self.key_dim = key_dim
        self.value_dim = value_dim

    def inputs(self, x: Tensor, state: State | None) -> Inputs:
        """q, k, v and gates of x [B,T,D]."""
        raise NotImplementedError

    def output_gate(self, x: Tensor, into: Inputs) -> Tensor | None:
        """The factor on the read, [B,T,H,V], or None."""
        raise NotImplementedError

    def output(self, x: Tensor, into: Inputs, read: Tensor) -> Tensor:
        """From what the heads read, [B,T,H,V], to y [B,T,D]."""
        raise NotImplementedError

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """See :class:`~arena.blocks.base.Block`."""
        into = self.inputs(x, state)
        read, memory = self.recall(into, state)
        return self.output(x, into, read), {**memory, **into.carry}

    def recall(self, into: Inputs, state: State | None) -> tuple[Tensor, State]:
        """Run the memory: what the heads read [B,T,H,V], after the normaliser, and the memory's new state.

        With micro-steps the query stands at a token's last one; at the others it is 0 and the read dropped.
        """
        q, k, v, gates = into.q, into.k, into.v, into.gates
        if gates.input_gate is not None and gates.forget_gate is not None:
            held = None if state is None else (state["memory"], state["normaliser"], state["stabiliser"])
            read, (memory, normaliser, stabiliser) = kernels.mlstm(
                q, k, v, gates.input_gate, gates.forget_gate, initial_state=held
            )
            return read, {"memory": memory, "normaliser": normaliser, "stabiliser": stabiliser}
        before = None if state is None else state["memory"]
        last = self.micro_steps - 1
        q = at_micro_step(q, last, self.micro_steps)
        if self.spec.write_on == "correction":
            read, memory = correction_memory(q, k, v, gates, scale=self.scale, initial_state=before)
            return read[:, last :: self.micro_steps], {"memory": memory}
        if self.spec.normaliser != "none":
            v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        read, memory = kernels.gated_memory(
            q,
            k,
            v,
            gates.log_decay,
            gates.erase,
            gates.write,
            decay_sign=gates.decay_sign,
            scale=self.scale,
            initial_state=before,
        )
        read = read[:, last :: self.micro_steps]
        if self.spec.normaliser != "none":
            read = read[..., :-1] / self.divisor(read[..., -1:])
        return read, {"memory": memory}

    def divisor(self, total: Tensor) -> Tensor:
        """What a read is divided by, from n^T q."""
        return total.abs().clamp_min(1.0) if self.spec.normaliser == "max_abs" else total + 1e-6

    def initial_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """See :class:`~arena.blocks.base.Block`."""
        device, dtype = self._placement(device, dtype)
        exponential = self.spec.write == "exponential"
        extra = self.spec.normaliser != "none" and not exponential
        shapes: dict[str, tuple[int, ...]] = {"memory": (self.n_heads, self.key_dim, self.value_dim + extra)}
        if exponential:
            shapes |= {"normaliser": (self.n_heads, self.key_dim), "stabiliser": (self.n_heads,)}
        state = {
            name: torch.zeros(batch_size, *shape, device=device, dtype=memory_dtype(dtype))
            for name, shape in shapes.items()
        }
        if exponential:
            state["stabiliser"].fill_(-torch.inf)  # the maximum over no token
        if self.conv.rows:
            rows = (batch_size, self.conv.rows, sum(self.conv.widths))
            state["conv"] = torch.zeros(rows, device=device, dtype=dtype)
        return state

    def trace(self, x: Tensor, state: State | None = None, *, states: bool = False) -> dict[str, Tensor]:
        """See :class:`~arena.blocks.base.Block`; absent gates appear with their neutral value, [B,M,H,1].

        Where write gates the whole correction, erase is one number for every pair of a key and a value
        channel, for which the vocabulary has no name: it is left out.
        """
        into = self.inputs(x, state)
        q, k, v, gates = into.q, into.k, into.v, into.gates
        scale = self.key_dim**-0.5 if self.scale is None else self.scale
        if self.spec.write == "exponential":
            k, scale = k * scale, 1.0  # mLSTM scales its keys instead of its queries
        one = k.new_ones(*k.shape[:3], 1)
        log_decay = 0 * one if gates.log_decay is None else _with_axis(gates.log_decay)
        sign = one if gates.decay_sign is None else _with_axis(gates.decay_sign)
        trace = {
            "q": q * scale,
            "k": k,
            "v": v,
            "decay": sign * log_decay.exp(),
            "log_decay": log_decay,
            "erase": 0 * one if gates.erase is None else _with_axis(gates.erase),
            "write": one if gates.write is None else _with_axis(gates.write),
            "read": self.recall(into, state)[0],
        }
        if self.spec.write_on == "correction":
            del trace["erase"]
        for name in ("step", "input_gate", "forget_gate"):
            value = getattr(gates, name)
            if value is not None:
                trace[name] = _with_axis(value)
        factor = self.output_gate(x, into)
        if factor is not None:
            trace["output_gate"] = factor
        if self.spec.normaliser != "none":
            trace["normaliser"] = self.divisor(self._total(into, state)) + self._beside(into, state)
        if states:
            trace["state"] = self._every_state(into, state)
        return trace

    def _total(self, into: Inputs, state: State | None) -> Tensor:
        """n^T q at every token, [B,T,H,1], n the same memory of the constant 1; float64: it can be e^100."""
        gates, scale = into.gates, self.scale
        k, write = into.k, gates.write
        start = None if state is None else state["memory"][..., -1:]
        if gates.input_gate is not None:
            k, scale, write = k * self.key_dim**-0.5, 1.0, gates.input_gate.double().exp()
            if state is not None:
                start = state["normaliser"][..., None] * state["stabiliser"].double().exp()[..., None, None]
        last = self.micro_steps - 1
        return kernels.gated_memory(
            at_micro_step(into.q.double(), last, self.micro_steps),
            k.double(),
            torch.ones_like(into.v[..., :1], dtype=torch.float64),
            gates.log_decay,
            gates.erase,
            write,
            decay_sign=gates.decay_sign,
            scale=scale,
            initial_state=start,
        )[0][:, last :: self.micro_steps]

    def _beside(self, into: Inputs, state: State | None) -> Tensor | float:
        """What mLSTM adds to its divisor, 1e-6 relative to its stabiliser: 1e-6 exp(m), [B,T,H,1]."""
        i, log_f = into.gates.input_gate, into.gates.log_decay
        if i is None or log_f is None:
            return 0.0
        start = i.new_full(i[:, 0].shape, -torch.inf) if state is None else state["stabiliser"]
        return EPS * stabiliser(i.double(), log_f.double(), start).exp()[..., None]

    def _every_state(self, into: Inputs, state: State | None) -> Tensor:
        """The memory after every token, [B,T,H,K,V]."""
        every, n = [], self.micro_steps
        for t in range(into.q.shape[1]):
            k, v = (y[:, t * n : (t + 1) * n] for y in (into.k, into.v))
            gates = GateValues(*(None if y is None else y[:, t * n : (t + 1) * n] for y in into.gates))
            _, state = self.recall(Inputs(into.q[:, t : t + 1], k, v, gates, {}), state)
            memory = state["memory"][..., : self.value_dim]
            if "stabiliser" in state:
                memory = memory * state["stabiliser"].exp()[..., None, None]
            every.append(memory)
        return torch.stack(every, 1)


def _with_axis(gate: Tensor) -> Tensor:
    """[B,T,H] to [B,T,H,1]; [B,T,H,C] stays."""
    return gate[..., None] if gate.dim() == 3 else gate
