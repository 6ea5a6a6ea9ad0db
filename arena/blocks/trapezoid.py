"""Mamba-3's memory: it rotates, and writes every token by the trapezoidal rule; see ``mamba3.py``."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from arena.blocks.base import State, memory_dtype, no_weight_decay
from arena.blocks.gates import GateValues, at_micro_step, step_bias
from arena.blocks.memory_block import Inputs, MemoryBlock

A_FLOOR = 1e-4
ROTARY_BASE = 10000.0


class Mamba3Gates(nn.Module):
    """Pre-activations of a token to its gates: decay, write (Delta), lambda and angles.

    Args:
        n_heads: H.
        pairs: P, rotated pairs of key channels.
        a_activation: Of A: ``"softplus"`` (the paper and flash-linear-attention) or ``"heavy-tail"``, 1 + x
            for x >= 0 and 1 / (1 - x) below (state-spaces/mamba since June 2026).
        rotary: ``"data"``; ``"fixed"``: the same angles 10000^(-i/P) at every token (the paper's "standard
            RoPE"); ``"none"``.
        trapezoid: A number in [0, 1] fixes lambda at it: 1 is Mamba-2's Euler rule, 1/2 the classical
            trapezoid.
    """

    def __init__(
        self, *, n_heads: int, pairs: int, a_activation: str, rotary: str, trapezoid: float | None
    ) -> None:
        super().__init__()
        self.n_heads, self.pairs = n_heads, pairs
        self.a_activation, self.rotary, self.trapezoid = a_activation, rotary, trapezoid
        self.dt_bias = step_bias(n_heads)
        self.widths = [n_heads, n_heads]
        if trapezoid is None:
            self.widths.append(n_heads)
        if rotary == "data":
            self.widths.append(pairs)

    def forward(self, f: Tensor) -> GateValues:
        """Gates of f [B,T,F], F the sum of ``widths``: Delta, A, lambda and angles side by side."""
        step_in, a_in, *rest = f.to(memory_dtype(f.dtype)).split(self.widths, -1)
        step = F.softplus(step_in + self.dt_bias)
        if self.a_activation == "softplus":
            rate = F.softplus(a_in)
        else:
            rate = torch.where(a_in >= 0, 1 + a_in, 1 / (1 - a_in.clamp_max(0)))
        if self.trapezoid is None:
            present = torch.sigmoid(rest.pop(0))
        else:
            present = torch.full_like(step, self.trapezoid)
        angle = None
        if self.rotary == "data":
            angle = torch.tanh(rest.pop(0)).double()[..., None, :] * (math.pi * step.double())[..., None]
        elif self.rotary == "fixed":
            place = torch.arange(self.pairs, dtype=torch.float64, device=f.device) / self.pairs
            angle = (ROTARY_BASE**-place).expand(*step.shape, self.pairs)
        log_decay = -rate.clamp_min(A_FLOOR) * step
        return GateValues(log_decay, write=step, step=step, present=present, angle=angle)


class Mamba3Memory(MemoryBlock):
    """The memory; the layer is the subclass's.

    ``inputs`` gives q and k as [B,T,H,R,K], not yet turned, and v as [B,T,H,V]; ``recall`` gives one read for
    each query, [B,T,H,R,V]. An intervention on ``write`` changes Delta in both writes of a token.

    State: ``memory`` [B,H,K,V], ``key`` [B,H,R,K] and ``value`` [B,H,V], those of the last token, whose
    second part of the write is pending, and ``angle`` [B,H,P] float64, modulo 2 pi; memory and key are in the
    frame that turns with that angle.
    """

    rank: int
    pairs: int

    def make_memory(self, rank: int, *, pairs: int, bias: bool, bias_start: float, **gates: Any) -> None:
        """Create the parameters: gates, biases of q and k, and the vectors of MIMO on values and reads."""
        self.rank, self.pairs = rank, pairs
        self.micro_steps = 2 * rank
        self.token_gates = Mamba3Gates(n_heads=self.n_heads, pairs=pairs, **gates)
        shape = (self.n_heads, rank, self.key_dim)
        self.q_bias = self.k_bias = None
        if bias:
            self.q_bias = no_weight_decay(nn.Parameter(torch.full(shape, bias_start)))
            self.k_bias = no_weight_decay(nn.Parameter(torch.full(shape, bias_start)))
        self.mimo_x = self.mimo_o = None
        if rank > 1:
            vectors = torch.full((self.n_heads, rank, self.value_dim), 1 / rank)
            self.mimo_x = no_weight_decay(nn.Parameter(vectors))
            self.mimo_o = no_weight_decay(nn.Parameter(vectors.clone()))

    def biased(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Add the biases to q and k [B,T,H,R,K]."""
        if self.q_bias is None or self.k_bias is None:
            return q, k
        return q + self.q_bias, k + self.k_bias

    def values(self, v: Tensor) -> Tensor:
        """The value of every write, [...,H,R,V], from v [...,H,V]."""
        return v[..., None, :] if self.mimo_x is None else v[..., None, :] * self.mimo_x

    def combined(self, reads: Tensor) -> Tensor:
        """What the reads [...,H,R,V] give together, [...,H,V]."""
        return reads[..., 0, :] if self.mimo_o is None else (reads * self.mimo_o).sum(-2)

    def recall(self, into: Inputs, state: State | None) -> tuple[Tensor, State]:
        """See :class:`~arena.blocks.matrix.MemoryBlock`; here one read for each query, [B,T,H,R,V]."""
        gates, v, R, T = into.gates, into.v, self.rank, into.v.shape[1]
        log_decay, step, present = gates.log_decay, gates.write, gates.present
        assert log_decay is not None and step is not None and present is not None
        if state is None:
            state = self.initial_state(v.shape[0], device=v.device, dtype=v.dtype)
        q, k = into.q * (self.key_dim**-0.5 if self.scale is None else self.scale), into.k
        new: State = {}
        if gates.angle is not None:
            angle = torch.cat([state["angle"][:, None], gates.angle], 1).cumsum(1)
            cos, sin = _cos_sin(-angle[:, 1:, :, None], q.dtype)
            q, k = _turned(q, cos, sin), _turned(k, cos, sin)
            new["angle"] = torch.remainder(angle[:, -1] + math.pi, 2 * math.pi) - math.pi
        # from here on index t of k_all, v_all and now_all is the token before token t
        k_all = torch.cat([state["key"][:, None].to(k.dtype), k], 1)
        v_all = torch.cat([state["value"][:, None].to(v.dtype), v], 1)
        now = present * step
        now_all = F.pad(now, (0, 0, 1, 0))  # 0: that part of the last call's token is in the memory
        weight = decay_of(gates) * (now_all[:, :T] + (1 - present) * step)
        sign = gates.decay_sign
        k_before, x_before = k_all[:, :T], self.values(v_all[:, :T])

        o, memory = kernels.gated_memory(
            _micro(q),
            _micro(k_before),
            _micro(x_before),
            at_micro_step(log_decay, 0, R),
            None,
            weight[:, :, None].expand(-1, -1, R, -1).flatten(1, 2),
            decay_sign=None if sign is None else at_micro_step(sign, 0, R, elsewhere=1.0),
            scale=1.0,
            initial_state=state["memory"],
        )
        reads = o.unflatten(1, (T, R)).transpose(2, 3)
        reads = reads + _mixed(now, q, k, self.values(v))
        if R > 1:
            reads = reads + _mixed(weight, q, k_before, x_before, later=True)
        last = self.values(v_all[:, -1].to(memory.dtype)) * now_all[:, -1, :, None, None]
        new["memory"] = memory + k_all[:, -1].to(memory.dtype).mT @ last
        new["key"], new["value"] = (x[:, -1].to(memory.dtype) for x in (k_all, v_all))
        return reads.to(v.dtype), new

    def initial_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """See :class:`~arena.blocks.base.Block`."""
        device, dtype = self._placement(device, dtype)
        H, K, V, wide = self.n_heads, self.key_dim, self.value_dim, memory_dtype(dtype)
        shapes = {"memory": (H, K, V), "key": (H, self.rank, K), "value": (H, V)}
        state = {n: torch.zeros(batch_size, *s, device=device, dtype=wide) for n, s in shapes.items()}
        if self.pairs:
            state["angle"] = torch.zeros(batch_size, H, self.pairs, device=device, dtype=torch.float64)
        if self.conv.rows:
            rows = (batch_size, self.conv.rows, sum(self.conv.widths))
            state["conv"] = torch.zeros(rows, device=device, dtype=dtype)
        return state

    def trace(self, x: Tensor, state: State | None = None, *, states: bool = False) -> dict[str, Tensor]:
        """See :class:`~arena.blocks.base.Block`.

        2 R micro-steps a token, in the frame of q and k as they are before they are turned, so that
        ``state^T q`` is the read: the first one turns the memory by ``angle``, lets it decay and begins to
        write the token before (``lag`` 1; its key turned along) with weight beta, the last R write this one
        with weight gamma. With R > 1 a token has R queries, for which the vocabulary has no name: ``q`` is
        left out, and so is the output gate of the official layer; ``read`` is what the reads give together.
        """
        into = self.inputs(x, state)
        gates, R, T = into.gates, self.rank, x.shape[1]
        log_decay, step, present = gates.log_decay, gates.write, gates.present
        assert log_decay is not None and step is not None and present is not None
        if state is None:
            state = self.initial_state(x.shape[0], device=x.device, dtype=x.dtype)
        key = state["key"].to(x.dtype)
        if gates.angle is not None:
            key = rotated(key, state["angle"][:, :, None])  # out of the frame that turns
        k_all = torch.cat([key[:, None], into.k], 1)
        v_all = self.values(torch.cat([state["value"][:, None].to(x.dtype), into.v], 1))
        k_before = k_all[:, :T]
        if gates.angle is not None:
            k_before = rotated(k_before, gates.angle[:, :, :, None])
        lag = log_decay.new_tensor([1.0] * R + [0.0] * R).repeat(T)[None, :, None, None]
        decay = decay_of(gates)
        writes = torch.stack([decay * (1 - present) * step, present * step], 2)
        log_decay = at_micro_step(log_decay, 0, 2 * R)[..., None]
        trace = {
            "k": _micro(torch.cat([k_before, into.k], 3)),
            "v": _micro(torch.cat([v_all[:, :T], v_all[:, 1:]], 3)),
            "decay": at_micro_step(decay, 0, 2 * R, elsewhere=1.0)[..., None],
            "log_decay": log_decay,
            "erase": torch.zeros_like(log_decay),
            "write": writes.repeat_interleave(R, 2).flatten(1, 2)[..., None],
            "step": step.repeat_interleave(2 * R, 1)[..., None],
            "lag": lag.expand(x.shape[0], -1, self.n_heads, -1),
            "read": self.combined(self.recall(into, state)[0]),
        }
        if gates.angle is not None:
            trace["angle"] = at_micro_step(gates.angle, 0, 2 * R)
        factor = self.output_gate(x, into)
        if R == 1:
            trace["q"] = into.q[:, :, :, 0] * (self.key_dim**-0.5 if self.scale is None else self.scale)
        if factor is not None and factor.shape[-1] == self.value_dim:
            trace["output_gate"] = factor
        if states:
            trace["state"] = self._every_state(into, state)
        return trace

    def _every_state(self, into: Inputs, state: State | None) -> Tensor:
        """The memory after every token, [B,T,H,K,V], in the frame of the trace."""
        every = []
        for t in range(into.v.shape[1]):
            q, k, v = (y[:, t : t + 1] for y in (into.q, into.k, into.v))
            gates = GateValues(*(None if y is None else y[:, t : t + 1] for y in into.gates))
            _, state = self.recall(Inputs(q, k, v, gates, {}), state)
            memory = state["memory"]
            if "angle" in state:
                memory = rotated(memory.mT, state["angle"][:, :, None]).mT
            every.append(memory)
        return torch.stack(every, 1)


def decay_of(gates: GateValues) -> Tensor:
    """The decay [B,T,H]; it has a sign where an intervention gives it one."""
    assert gates.log_decay is not None
    decay = gates.log_decay.exp()
    return decay if gates.decay_sign is None else decay * gates.decay_sign


def rotated(x: Tensor, angle: Tensor) -> Tensor:
    """The first 2 P channels of x [...,K] turned by angle [...,P] in pairs (2 i, 2 i + 1)."""
    return _turned(x, *_cos_sin(angle, x.dtype))


def _cos_sin(angle: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pairs = 2 * cos.shape[-1]
    a, b = x[..., :pairs].unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    return torch.cat([turned, x[..., pairs:]], -1)


def _micro(x: Tensor) -> Tensor:
    """[B,T,H,R,C] to [B,T R,H,C], the micro-steps of a token side by side."""
    return x.transpose(2, 3).flatten(1, 2)


def _mixed(weight: Tensor, q: Tensor, k: Tensor, values: Tensor, *, later: bool = False) -> Tensor:
    """What queries read of keys that are not in the memory: sum_s weight (q_r . k_s) values_s, [B,T,H,R,V].

    Args:
        weight: [B,T,H].
        q: [B,T,H,R,K].
        k: [B,T,H,R,K].
        values: [B,T,H,R,V].
        later: Only s > r.
    """
    q, k, values = (x.to(weight.dtype) for x in (q, k, values))
    if q.shape[-2] == 1:
        return torch.linalg.vecdot(q, k)[..., None] * weight[..., None, None] * values
    scores = (q @ k.mT) * weight[..., None, None]
    return (scores.triu(1) if later else scores) @ values
