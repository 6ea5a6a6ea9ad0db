"""Every gate of a model passes through a function: the blocks know nothing of it.

Methods are wrapped on the instances, and restored when the context ends, so that training never meets them.
Contexts may be nested: each sees the gates as the other one leaves them.

Axes: B batch, T tokens, H heads, C channels of a gate (1, or the head's K or V).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from arena.blocks.attention import Attention
from arena.blocks.base import Block, State
from arena.blocks.gates import GateValues
from arena.blocks.memory_block import Inputs, MemoryBlock
from arena.blocks.outer import OutputGate
from arena.blocks.recurrent import RecurrentBlock
from arena.dynamics.record import blocks_of

Hook = Callable[[int, dict[str, Tensor], int | None], dict[str, Tensor]]
"""(layer, gate values by name, each [B,T,H,C], position of the first token) -> values to use instead.

The position counts on where a state continues a sequence; None: the state is not from within the context.

Names and values are those of the trace vocabulary: ``decay`` (signed), ``erase``, ``write`` (in mLSTM, sLSTM
and LSTM the value of the input gate), ``output``. With n micro-steps a token, erase and write have those of
all of them side by side, [B,T,H,n C], the first one's first; decay is that of the token, and RWKV-7's erase
that of the micro-step that has one."""

_LOGIT = 80.0
"""Pre-activation that stands for a gate of exactly 0 or 1: exp(-80) is 2e-35."""


@torch.no_grad()
def gates_of(block: Block) -> list[str]:
    """Which gates of that meaning a block has."""
    x = next(block.parameters()).new_zeros(1, 1, block.d_model)
    if isinstance(block, MemoryBlock):
        kind = type(block)  # its methods as they are outside of every context
        into = kind.inputs(block, x, None)
        names = list(_memory_gates(into.gates))
        return [*names, "output"] if kind.output_gate(block, x, into) is not None else names
    if isinstance(block, RecurrentBlock):
        return ["decay", "write", "output"]
    return [] if _gate_of(block) is None else ["output"]


def _gate_of(block: Block) -> OutputGate | None:
    """The output gate of attention, unless it is in an inner loop, which hides the positions of tokens."""
    return block.gate_out if isinstance(block, Attention) and not block.composed else None


@dataclass
class _Place:
    """Where in the sequence a block is."""

    start: int | None = 0
    """Position of the first token of its present call; None: unknown."""
    read: int = 0
    """Tokens of the call that its cell has read."""


@contextlib.contextmanager
def hooked(model: nn.Module, hook: Hook) -> Iterator[None]:
    """Within the context every gate of ``model`` (a model or a block) passes through ``hook``.

    The gates of a matrix memory come in one call over all tokens, its output gate in another; those of a
    recurrent cell come token by token, for they read its last output. ``trace`` shows the changed gates.
    """
    wrapped: list[tuple[nn.Module, str, Any]] = []
    positions = WeakTensorKeyDictionary()  # a tensor of a state -> how many tokens have been read

    def wrap(owner: nn.Module, name: str, make: Callable[[Any], Any]) -> None:
        before = owner.__dict__.get(name)  # of a context around this one
        setattr(owner, name, make(getattr(owner, name)))
        wrapped.append((owner, name, before))

    try:
        for layer, block in enumerate(blocks_of(model)):
            place = _Place()
            for name in ("forward", "trace", "initial_state") if gates_of(block) else ():
                wrap(block, name, _follow(name, place, positions))
            if isinstance(block, MemoryBlock):
                wrap(block, "inputs", _hook_inputs(layer, hook, place, block))
                wrap(block, "output_gate", _hook_output_gate(layer, hook, place))
            elif isinstance(block, RecurrentBlock):
                wrap(block, "cell", _hook_cell(layer, block, hook, place))
                wrap(block, "describe", _hook_describe(layer, block, hook, place))
            elif (gate := _gate_of(block)) is not None:
                wrap(gate, "forward", _hook_module(layer, hook, place))
        yield
    finally:
        for owner, name, before in reversed(wrapped):
            if before is None:
                delattr(owner, name)  # the method of the class is seen again
            else:
                setattr(owner, name, before)


def _follow(name: str, place: _Place, positions: WeakTensorKeyDictionary) -> Callable[[Any], Any]:
    """Keep ``place``: a state that a call returned says where the next call goes on."""

    def mark(state: State, position: int | None) -> None:
        positions[next(iter(state.values()))] = position

    def make(method: Callable[..., Any]) -> Any:
        def create(*args: Any, **options: Any) -> State:
            state = method(*args, **options)
            mark(state, 0)
            return state

        def run(x: Tensor, state: State | None = None, **options: Any) -> Any:
            place.start = 0 if state is None else positions.get(next(iter(state.values())))
            place.read = 0
            found = method(x, state, **options)
            if name == "forward":
                mark(found[1], None if place.start is None else place.start + x.shape[1])
            return found

        return create if name == "initial_state" else run

    return make


def _hook_inputs(layer: int, hook: Hook, place: _Place, block: MemoryBlock) -> Callable[[Any], Any]:
    def make(inputs: Callable[[Tensor, State | None], Inputs]) -> Any:
        def changed(x: Tensor, state: State | None) -> Inputs:
            into = inputs(x, state)
            return into._replace(gates=_changed_gates(into.gates, layer, hook, place.start, block))

        return changed

    return make


def _hook_output_gate(layer: int, hook: Hook, place: _Place) -> Callable[[Any], Any]:
    def make(output_gate: Callable[[Tensor, Inputs], Tensor | None]) -> Any:
        def changed(x: Tensor, into: Inputs) -> Tensor | None:
            factor = output_gate(x, into)
            return None if factor is None else hook(layer, {"output": factor}, place.start)["output"]

        return changed

    return make


def _hook_module(layer: int, hook: Hook, place: _Place) -> Callable[[Any], Any]:
    def make(forward: Callable[[Tensor], Tensor]) -> Any:
        return lambda x: hook(layer, {"output": forward(x)}, place.start)["output"]

    return make


def _memory_gates(gates: GateValues) -> dict[str, Tensor]:
    """Decay (signed), erase, write and angle where they exist, [B,T,H] or [B,T,H,C]."""
    values = {}
    if gates.log_decay is not None:
        decay = gates.log_decay.exp()
        values["decay"] = decay if gates.decay_sign is None else decay * gates.decay_sign
    if gates.erase is not None:
        values["erase"] = gates.erase
    if gates.write is not None:
        values["write"] = gates.write
    if gates.angle is not None:
        values["angle"] = gates.angle
    return values


def gated_steps(name: str, block: Block) -> int:
    """So many of a token's micro-steps, the first ones, have this gate to themselves."""
    if not isinstance(block, MemoryBlock) or name not in ("erase", "write"):
        return 1
    return (block.erasing_steps if name == "erase" else None) or block.gate_steps


def _side_by_side(gate: Tensor, n: int, count: int) -> Tensor:
    """A gate of the first ``count`` of n micro-steps, [B,T n,H,C], as a hook sees it: [B,T,H,count C]."""
    return gate.unflatten(1, (-1, n))[:, :, :count].movedim(2, 3).flatten(3)


def _one_by_one(gate: Tensor, n: int, count: int, *, elsewhere: float) -> Tensor:
    """The inverse of :func:`_side_by_side`; the other micro-steps have the gate's neutral value."""
    steps = gate.unflatten(3, (count, -1)).movedim(3, 2)
    return F.pad(steps, (0, 0, 0, 0, 0, n - count), value=elsewhere).flatten(1, 2)


def _changed_gates(
    gates: GateValues, layer: int, hook: Hook, start: int | None, block: MemoryBlock
) -> GateValues:
    before = {
        name: value[..., None] if value.dim() == 3 else value for name, value in _memory_gates(gates).items()
    }
    n = block.gate_steps
    if n == 1:
        after = hook(layer, dict(before), start)
    else:
        counts = {name: gated_steps(name, block) for name in before}
        seen = {name: _side_by_side(value, n, counts[name]) for name, value in before.items()}
        found = hook(layer, dict(seen), start)
        after = {
            name: before[name]
            if value is seen[name]
            else _one_by_one(value, n, counts[name], elsewhere=float(name == "decay"))
            for name, value in found.items()
        }
    exponential = gates.input_gate is not None and gates.forget_gate is not None
    changes: dict[str, Tensor] = {}
    for name, value in after.items():
        if value is before[name]:
            continue
        same = value == before[name]
        if value.shape[-1] == 1 and name != "angle":
            value, same = value[..., 0], same[..., 0]
        if name == "decay":
            if bool((value.abs() > 1).any()):
                raise ValueError("a decay cannot leave [-1, 1]")
            changes["log_decay"] = _kept(same, gates.log_decay, value.abs().log())
            if gates.decay_sign is not None or bool((value < 0).any()):
                changes["decay_sign"] = torch.where(value < 0, -1.0, 1.0).to(value.dtype)
            if exponential:
                changes["forget_gate"] = _kept(same, gates.forget_gate, _logit(value))
        else:
            changes[name] = value
            if exponential and name == "write":
                changes["input_gate"] = _kept(same, gates.input_gate, value.log().clamp_min(-_LOGIT))
    return gates._replace(**changes)


def _kept(same: Tensor, old: Tensor | None, new: Tensor) -> Tensor:
    """``old`` where the gate has its old value: there and back through exp and log it would lose bits."""
    assert old is not None
    if old.dim() < new.dim():
        old = old[..., None]
    return torch.where(same, old.to(new.dtype), new)


def _changed_cell(
    gates: dict[str, Tensor], block: RecurrentBlock, layer: int, hook: Hook, start: int | None
) -> dict[str, Tensor]:
    """The pre-activations i, f and o of a cell, each [B,T,H,K], with their gates changed; z as it is."""
    exponential = "n" in block.memory  # sLSTM's input gate is an exponential, LSTM's a sigmoid
    before = {
        "write": gates["i"].exp() if exponential else torch.sigmoid(gates["i"]),
        "decay": torch.sigmoid(gates["f"]),
        "output": torch.sigmoid(gates["o"]),
    }
    after = hook(layer, dict(before), start)
    changed = dict(gates)
    for name, key in (("write", "i"), ("decay", "f"), ("output", "o")):
        same = after[name] == before[name]
        if not same.all():
            logarithm = exponential and name == "write"
            new = after[name].log().clamp_min(-_LOGIT) if logarithm else _logit(after[name])
            changed[key] = _kept(same, gates[key], new)
    return changed


def _hook_cell(layer: int, block: RecurrentBlock, hook: Hook, place: _Place) -> Callable[[Any], Any]:
    def make(cell: Callable[..., tuple[Tensor, tuple[Tensor, ...]]]) -> Any:
        def changed(gates: Tensor, memory: tuple[Tensor, ...] | None) -> Any:
            if memory is None:
                state = block.initial_state(gates.shape[0], device=gates.device, dtype=gates.dtype)
                memory = tuple(state[name] for name in block.memory)
            outputs = []
            for gates_t in gates.split(1, 1):
                back = torch.einsum("bhk,ghkl->bghl", memory[0].to(gates.dtype), block.recurrent)[:, None]
                now = dict(zip("ifzo", (gates_t + back).unbind(2), strict=True))
                at = None if place.start is None else place.start + place.read
                now = _changed_cell(now, block, layer, hook, at)
                place.read += 1
                # the cell adds what it reads back
                h, memory = cell(torch.stack([now[key] for key in "ifzo"], 2) - back, memory)
                outputs.append(h)
            return torch.cat(outputs, 1), memory

        return changed

    return make


def _hook_describe(layer: int, block: RecurrentBlock, hook: Hook, place: _Place) -> Callable[[Any], Any]:
    def make(describe: Callable[..., dict[str, Tensor]]) -> Any:
        def changed(memory: dict[str, Tensor], gates: dict[str, Tensor]) -> dict[str, Tensor]:
            return describe(memory, _changed_cell(gates, block, layer, hook, place.start))

        return changed

    return make


def _logit(value: Tensor) -> Tensor:
    """The inverse of the sigmoid, within +-80."""
    if bool(((value < 0) | (value > 1)).any()):
        raise ValueError("a gate that is a sigmoid cannot leave [0, 1]")
    return torch.logit(value.double()).clamp(-_LOGIT, _LOGIT).to(value.dtype)
