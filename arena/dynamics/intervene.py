"""Interventions: gates of a trained model changed at evaluation.

A measured gate says what a memory does, not whether the answer depends on it. Here a gate is frozen, clamped,
swapped or set to zero, in the layers, heads and tokens of an :class:`Edit`, while everything else runs as
trained::

    edits = prepare(model, [parse_edit("erase:clamp:0:1@head=0")], other_tokens, {})
    with edited(model, edits, classes):
        logits, _ = model(tokens)

What it does to the answers is measured in :mod:`arena.dynamics.effects`.

Axes: B batch, T tokens, H heads, C channels of a gate (1, or the head's K or V).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from arena.blocks.recurrent import RecurrentBlock
from arena.blocks.registry import near
from arena.dynamics.hooks import Hook, gated_steps, gates_of, hooked
from arena.dynamics.record import blocks_of

GATES = ("decay", "erase", "write", "angle", "output")
Action = Literal["zero", "freeze", "clamp", "swap"]


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One change of one gate.

    Gates have the names and values of the trace vocabulary: ``decay`` (signed), ``erase``, ``write`` (in
    mLSTM, sLSTM and LSTM the value of the input gate; ``input`` means the same there; in Mamba-3 the step
    that both of a token's writes share), ``angle``, ``output``. Gates that are tied in training are changed
    one by one: clamping the erase of DeltaNet leaves its write alone.

    Raises:
        ValueError: a field makes no sense; the message says what would.
    """

    gate: str
    """``decay``, ``erase``, ``write`` (or ``input``), ``angle`` or ``output``."""
    action: Action
    """``zero``; ``freeze`` at ``value``, or at the mean of each head and channel over the chosen tokens of
    other data; ``clamp`` into [low, high]; ``swap`` with what ``other`` says."""
    low: float | None = None
    high: float | None = None
    value: float | None = None
    other: str | None = None
    """Of ``swap``: ``heads`` (each chosen head takes the gate of the next one), ``tokens`` (each chosen token
    takes the gate of another one of its sequence, at random) or another gate, whose place ``gate`` takes and
    which takes its place."""
    layer: int | None = None
    """None: every layer."""
    heads: tuple[int, ...] | None = None
    """None: every head."""
    tokens: str | None = None
    """A class of tokens; None: every token."""
    micro: int | None = None
    """Where a token updates the memory several times: which of them, from 0; None: all."""
    means: Mapping[int, Tensor] | None = dataclasses.field(default=None, repr=False, compare=False)
    """Layer -> [H,C]: filled by :func:`prepare`."""

    def __post_init__(self) -> None:
        if self.gate == "input":
            object.__setattr__(self, "gate", "write")
        if self.gate not in GATES:
            raise ValueError(
                f"there is no gate {self.gate!r}; gates: decay, erase, write, input, angle, output"
            )
        if self.action not in get_args(Action):
            raise ValueError(f"cannot {self.action!r} a gate; actions: {', '.join(get_args(Action))}")
        clamp = self.action == "clamp"
        if clamp and (self.low is None or self.high is None or not self.low <= self.high):
            raise ValueError(f"clamp needs low <= high, got {self.low} and {self.high}")
        if not clamp and (self.low is not None or self.high is not None):
            raise ValueError(f"low and high belong to clamp, not to {self.action}")
        if self.value is not None and self.action != "freeze":
            raise ValueError(f"a value belongs to freeze, not to {self.action}")
        if (self.other is not None) != (self.action == "swap"):
            raise ValueError("swap, and nothing else, needs what to swap with: heads, tokens or a gate")
        if self.other is not None and self.other not in ("heads", "tokens", "decay", "erase", "write"):
            raise ValueError(f"cannot swap with {self.other!r}: heads, tokens, decay, erase or write")
        if self.other == self.gate or (self.gate in ("output", "angle") and self.other in GATES):
            raise ValueError(f"cannot swap {self.gate} with {self.other}")

    @property
    def what(self) -> str:
        """The change in words, without its place."""
        gate = self.gate if self.micro is None else f"{self.gate} of micro-step {self.micro}"
        if self.action == "zero":
            return f"{gate} = 0"
        if self.action == "clamp":
            return f"{gate} clamped to [{self.low:g}, {self.high:g}]"
        if self.action == "swap":
            return f"{gate} swapped with {self.other}"
        return f"{gate} frozen at " + ("its mean" if self.value is None else f"{self.value:g}")


_EDIT = re.compile(r"(?P<gate>[a-z]+):(?P<action>[a-z]+)(?P<args>(:[^:@]+)*)(?P<where>(@[a-z]+=[^@]+)*)")


def parse_edit(text: str) -> Edit:
    """An edit as the command line writes it.

    ``GATE:ACTION[:ARGUMENT...][@layer=N][@head=N,N][@class=NAME][@micro=N]``: ``erase:clamp:0:1``,
    ``write:zero``, ``decay:freeze`` (at its mean), ``decay:freeze:0.9@layer=0@head=1,3``,
    ``erase:swap:write@class=query``, ``erase:zero@micro=1``.

    Raises:
        ValueError: one line that says what would be right.
    """
    found = _EDIT.fullmatch(text.strip())
    places = "[@layer=N][@head=N,N][@class=NAME][@micro=N]"
    form = f"GATE:ACTION[:ARGUMENT...]{places}, such as erase:clamp:0:1@head=0"
    if found is None:
        raise ValueError(f"cannot read the intervention {text!r}; write {form}")
    arguments = [word for word in found["args"].split(":") if word]
    fields: dict[str, Any] = {"gate": found["gate"], "action": found["action"]}
    names = {"clamp": ("low", "high"), "freeze": ("value",), "swap": ("other",)}.get(found["action"], ())
    if len(arguments) > len(names):
        raise ValueError(f"{found['action']} takes {len(names)} arguments, not {len(arguments)}: {text!r}")
    try:
        for name, word in zip(names, arguments, strict=False):
            fields[name] = word if name == "other" else float(word)
        for part in filter(None, found["where"].split("@")):
            name, _, word = part.partition("=")
            if name in ("layer", "micro"):
                fields[name] = int(word)
            elif name in ("head", "heads"):
                fields["heads"] = tuple(int(number) for number in word.split(","))
            elif name == "class":
                fields["tokens"] = word
            else:
                raise ValueError(f"there is no place {name!r} (layer, head, class, micro)")
    except ValueError as error:
        raise ValueError(f"cannot read the intervention {text!r}: {error}; write {form}") from None
    return Edit(**fields)


def check(model: nn.Module, edits: Sequence[Edit]) -> None:
    """Refuse an edit that a model cannot take.

    Raises:
        ValueError: no such layer, head or gate; the message says what there is.
    """
    blocks = blocks_of(model)
    for edit in edits:
        if edit.layer is not None and not 0 <= edit.layer < len(blocks):
            raise ValueError(f"{edit.what}: there is no layer {edit.layer}, layers are 0..{len(blocks) - 1}")
        for layer in range(len(blocks)) if edit.layer is None else [edit.layer]:
            block = blocks[layer]
            known = gates_of(block)
            for gate in [edit.gate, edit.other]:
                if gate in GATES and gate not in known:
                    have = f"its gates: {', '.join(known)}" if known else "it has no gates"
                    name = type(block).__name__
                    raise ValueError(f"{edit.what}: layer {layer} ({name}) has no {gate} gate; {have}")
            if edit.other in GATES and block.gate_steps > 1 and "decay" in (edit.gate, edit.other):
                count = block.gate_steps
                raise ValueError(f"{edit.what}: a token of layer {layer} has one decay, {count} of the other")
            steps = gated_steps(edit.gate, block)
            if edit.micro is not None and not 0 <= edit.micro < steps:
                had = "one of it" if steps == 1 else f"micro-steps 0..{steps - 1}"
                raise ValueError(f"{edit.what}: a token of layer {layer} has {had}")
            n_heads = int(block.n_heads)  # type: ignore[arg-type]
            for head in edit.heads or ():
                if not 0 <= head < n_heads:
                    raise ValueError(f"{edit.what}: there is no head {head}, heads are 0..{n_heads - 1}")
            if isinstance(block, RecurrentBlock):
                if edit.other == "tokens":
                    raise ValueError(
                        f"{edit.what}: the gates of layer {layer} read the cell's last output, "
                        "so that they cannot be swapped over tokens"
                    )
                zero = edit.action == "zero" or edit.value == 0.0
                if "n" in block.memory and edit.gate == "write" and zero and edit.tokens is None:
                    raise ValueError(
                        f"{edit.what}: sLSTM divides by the sum of its input gates, which would be 0 / 0; "
                        "give a class of tokens, or freeze it at another value"
                    )


def edited(
    model: nn.Module, edits: Sequence[Edit], classes: Mapping[str, Tensor], *, seed: int = 0
) -> AbstractContextManager[None]:
    """Within the context ``model`` runs with the edits; arguments as of :func:`editor`."""
    return hooked(model, editor(model, edits, classes, seed=seed))


def editor(model: nn.Module, edits: Sequence[Edit], classes: Mapping[str, Tensor], *, seed: int = 0) -> Hook:
    """The hook that makes the edits, one after the other.

    Args:
        model: a model or a block.
        edits: prepared where they freeze at a mean.
        classes: class of tokens -> bool [B,T] of the batch that the model is given.
        seed: of swaps over tokens.
    """
    _check_classes(edits, classes)
    blocks = blocks_of(model)

    def hook(layer: int, values: dict[str, Tensor], start: int | None) -> dict[str, Tensor]:
        for edit in edits:
            if edit.gate not in values or edit.layer not in (None, layer):
                continue
            old = values[edit.gate]
            where = _places(edit, old, classes, start)
            if edit.micro is not None:  # a gate's micro-steps lie side by side
                width = old.shape[-1] // gated_steps(edit.gate, blocks[layer])
                where = where & (torch.arange(old.shape[-1], device=old.device) // width == edit.micro)
            if edit.other in values:
                other = values[edit.other]
                if old.shape[-1] != other.shape[-1] and 1 not in (old.shape[-1], other.shape[-1]):
                    raise ValueError(
                        f"{edit.what}: they have {old.shape[-1]} and {other.shape[-1]} values a head"
                    )
                values[edit.gate] = torch.where(where, other.to(old.dtype), old)
                values[edit.other] = torch.where(where, old.to(other.dtype), other)
            else:
                values[edit.gate] = torch.where(where, _new_value(edit, layer, old, where, seed), old)
        return values

    return hook


def _check_classes(edits: Sequence[Edit], classes: Mapping[str, Tensor]) -> None:
    for edit in edits:
        if edit.tokens is not None and edit.tokens not in classes:
            near_ones = near(edit.tokens, list(classes)) or "; there are none"
            raise ValueError(f"{edit.what}: there is no class of tokens {edit.tokens!r}{near_ones}")


def _places(edit: Edit, value: Tensor, classes: Mapping[str, Tensor], start: int | None) -> Tensor:
    """Bool [B,T,H,1]: where an edit applies."""
    B, T, H, _ = value.shape
    if edit.other == "tokens" and start != 0:
        raise ValueError(f"{edit.what}: that takes whole sequences, in one call and without a state")
    heads = torch.zeros(H, dtype=torch.bool, device=value.device)
    heads[list(range(H) if edit.heads is None else edit.heads)] = True
    where = heads[None, None, :, None].expand(B, T, H, 1)
    if edit.tokens is None:
        return where
    if start is None:
        raise ValueError(
            f"{edit.what}: nothing tells which position a state from outside of the context has reached, and "
            f"so which tokens are {edit.tokens!r}; begin the sequence within it"
        )
    mask = classes[edit.tokens].to(value.device)[:, start : start + T]
    if mask.shape != (B, T):
        raise ValueError(f"class {edit.tokens!r} is {tuple(mask.shape)}, the model reads {(B, T)}")
    return where & mask[:, :, None, None]


def _new_value(edit: Edit, layer: int, old: Tensor, where: Tensor, seed: int) -> Tensor:
    if edit.action == "zero":
        return torch.zeros_like(old)
    if edit.action == "clamp":
        return old.clamp(edit.low, edit.high)
    if edit.action == "freeze":
        if edit.value is not None:
            return torch.full_like(old, edit.value)
        if edit.means is None:
            raise ValueError(f"{edit.what}: give the edit to prepare() first, which measures the mean")
        return edit.means[layer].to(old).expand_as(old)
    if edit.other == "heads":
        chosen = list(range(old.shape[2]) if edit.heads is None else edit.heads)
        source = list(range(old.shape[2]))
        for head, following in zip(chosen, [*chosen[1:], chosen[0]], strict=True):
            source[head] = following
        return old[:, :, source]
    return old.gather(1, _shuffled(where[..., 0].any(-1), seed)[:, :, None, None].expand_as(old))


def _shuffled(chosen: Tensor, seed: int) -> Tensor:
    """int64 [B,T]: for each chosen token another chosen one of its sequence; all others stay."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.arange(chosen.shape[1]).repeat(len(chosen), 1)
    for row, mask in zip(source, chosen.cpu(), strict=True):
        places = mask.nonzero()[:, 0]
        row[places] = places[torch.randperm(len(places), generator=generator)]
    return source.to(chosen.device)


@torch.no_grad()
def changed_share(
    model: nn.Module, edits: Sequence[Edit], tokens: Tensor, classes: Mapping[str, Tensor]
) -> float:
    """Share of the gates' values, over all tokens in the heads of the edits, that the edits change.

    An edit that changes next to nothing is no evidence that nothing depends on those heads.

    Args:
        model: a model.
        edits: prepared.
        tokens: [B,T].
        classes: class of tokens -> bool [B,T] of these tokens.
    """
    change = editor(model, edits, classes)
    changed = total = 0

    def look(layer: int, values: dict[str, Tensor], start: int | None) -> dict[str, Tensor]:
        nonlocal changed, total
        after = change(layer, dict(values), start)
        for edit in edits:
            if edit.gate in values and edit.layer in (None, layer):
                heads = slice(None) if edit.heads is None else list(edit.heads)
                different = (after[edit.gate] != values[edit.gate])[:, :, heads]
                changed += int(different.sum())
                total += different.numel()
        return values

    with hooked(model, look):
        model(tokens)
    return changed / max(total, 1)


@torch.no_grad()
def prepare(
    model: nn.Module, edits: Sequence[Edit], tokens: Tensor, classes: Mapping[str, Tensor]
) -> list[Edit]:
    """Check the edits and measure the means that they freeze gates at.

    Args:
        model: a model (or a block, then ``tokens`` is its input [B,T,D]).
        edits: any.
        tokens: [B,T], other data than the effect is measured on.
        classes: class of tokens -> bool [B,T] of these tokens.

    Raises:
        ValueError: as :func:`check`; no token of a class.
    """
    check(model, edits)
    _check_classes(edits, classes)
    wanting = [edit for edit in edits if edit.action == "freeze" and edit.value is None]
    if not wanting:
        return list(edits)
    totals: dict[tuple[int, str, str | None], Tensor] = {}
    counts: dict[tuple[int, str, str | None], float] = {}

    def record(layer: int, values: dict[str, Tensor], start: int | None) -> dict[str, Tensor]:
        assert start is not None  # the model is given no state
        for gate, name in {(edit.gate, edit.tokens) for edit in wanting}:
            if gate not in values:
                continue
            value = values[gate].double()
            weight = torch.ones(value.shape[:2], dtype=torch.float64)
            if name is not None:
                weight = classes[name][:, start : start + value.shape[1]].double()
            key = (layer, gate, name)
            total = (value * weight.to(value.device)[:, :, None, None]).sum((0, 1))
            totals[key] = totals[key] + total if key in totals else total
            counts[key] = counts.get(key, 0.0) + float(weight.sum())
        return values

    with hooked(model, record):
        model(tokens)
    for (layer, gate, name), count in counts.items():
        if count == 0:
            raise ValueError(f"no token of class {name!r} to take the mean {gate} of layer {layer} from")
    return [
        dataclasses.replace(
            edit,
            means={
                layer: total / counts[layer, gate, name]
                for (layer, gate, name), total in totals.items()
                if (gate, name) == (edit.gate, edit.tokens)
            },
        )
        if edit in wanting
        else edit
        for edit in edits
    ]
