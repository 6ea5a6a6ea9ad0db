"""Outputs, states and weights: what a block does in one pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from arena.blocks.base import Block, State
from arena.conformance.subject import BATCH, LONG, SHORT, Failed, Subject, close, must, tokens
from arena.memory import state_bytes

_VALUES_DECIDE = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "equal")
"""Operators whose result, or its shape, the Python side learns from the data."""


def _run_steps(block: Block, x: Tensor) -> tuple[Tensor, State]:
    state = block.initial_state(x.shape[0])
    outputs = []
    for t in range(x.shape[1]):
        y, state = block.step(x[:, t], state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


def _same_state(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float, what: str
) -> None:
    must(set(found) == set(wanted), f"{what}: state has {sorted(found)}, not {sorted(wanted)}")
    for key in wanted:
        close(found[key], wanted[key], tolerance, f"{what}: state {key!r}")


def _each_type(subject: Subject, check: Callable[[Block, float], float]) -> str:
    notes = []
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
        notes.append(f"{str(dtype).removeprefix('torch.')} {check(subject.make(dtype=dtype), tolerance):.0e}")
    return ", ".join(notes) + " apart"


def forward_is_steps(subject: Subject) -> str:
    """``forward`` over a sequence equals ``step`` token by token, outputs and state."""

    def check(block: Block, tolerance: float) -> float:
        apart = []
        for length in (1, SHORT, LONG):
            x = tokens(block, length=length)
            y, state = block(x)
            must(y.shape == x.shape and y.dtype == x.dtype, f"y is {y.dtype} {list(y.shape)}, x {x.dtype} "
                  f"{list(x.shape)}")  # fmt: skip
            stepped, step_state = _run_steps(block, x)
            apart.append(close(stepped, y, tolerance, f"steps and forward at T {length}"))
            _same_state(step_state, state, tolerance, f"steps and forward at T {length}")
        return max(apart)

    return _each_type(subject, check)


def state_continues(subject: Subject) -> str:
    """Two halves joined by the state equal the whole, wherever it is cut."""

    def check(block: Block, tolerance: float) -> float:
        apart = []
        for length, cuts in ((SHORT, (1, 4, SHORT - 1)), (LONG, (64, 65))):
            x = tokens(block, length=length)
            y, state = block(x)
            for cut in cuts:
                first, middle = block(x[:, :cut])
                second, end = block(x[:, cut:], middle)
                joined = torch.cat([first, second], 1)
                apart.append(close(joined, y, tolerance, f"T {length} cut at {cut}"))
                _same_state(end, state, tolerance, f"T {length} cut at {cut}")
        return max(apart)

    return _each_type(subject, check)


def initial_state_is_no_state(subject: Subject) -> str:
    """``initial_state`` given explicitly changes nothing."""
    block = subject.make()
    x = tokens(block)
    y, state = block(x)
    initial = block.initial_state(BATCH)
    same, same_state = block(x, initial)
    close(same, y, 1e-12, "forward with initial_state")
    _same_state(same_state, state, 1e-12, "forward with initial_state")
    for key, value in initial.items():
        must(
            value.dtype == state[key].dtype, f"state {key!r} begins as {value.dtype}, then {state[key].dtype}"
        )
    return ""


def causal(subject: Subject) -> str:
    """No output depends on a later token, and every output on its own."""
    block = subject.make()
    x = tokens(block)
    y, _ = block(x)
    for t in (0, 3, SHORT - 1):
        changed = x.clone()
        changed[:, t:] = tokens(block, seed=1)[:, t:] * 3
        after, _ = block(changed)
        close(after[:, :t], y[:, :t], 1e-12, f"outputs before token {t}, which was changed")
        must(not torch.allclose(after[:, t], y[:, t]), f"the output at token {t} does not depend on it")
    return ""


def rows_are_independent(subject: Subject) -> str:
    """No sequence of a batch depends on another."""
    block = subject.make()
    x = tokens(block)
    y, _ = block(x)
    changed = x.clone()
    changed[1] = tokens(block, seed=2)[1]
    close(block(changed)[0][0], y[0], 1e-12, "row 0, of a batch whose row 1 was changed")
    close(block(x[:1])[0], y[:1], 1e-12, "row 0 alone")
    return ""


def deterministic(subject: Subject) -> str:
    """The same input gives the same output, state and gradient, bit for bit: again, after another input, in
    training and evaluation mode, and from a copy.
    """
    block = subject.make(dtype=torch.float32)
    x = tokens(block)

    def outcome(block: Block) -> dict[str, Tensor]:
        block.zero_grad()
        y, state = block(x)
        y.square().sum().backward()
        grads = {f"gradient of {key}": p.grad for key, p in block.named_parameters() if p.grad is not None}
        return {"y": y.detach(), **{f"state {key}": v.detach() for key, v in state.items()}, **grads}

    first = {key: value.clone() for key, value in outcome(block).items()}
    twin = copy.deepcopy(block)
    block(tokens(block, seed=3, length=4))
    for what, other in (("again", block), ("in evaluation mode", block.eval()), ("from a copy", twin)):
        for key, value in outcome(other).items():
            must(torch.equal(value, first[key]), f"{key} differs {what}")
    return ""


def initial_weights(subject: Subject) -> str:
    """Initial weights are finite and come from torch's global generator alone."""

    def weights(seed: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return torch.cat([p.detach().flatten() for p in subject.build().parameters()])

    first = weights(3)
    must(first.isfinite().all(), "an initial weight is not finite")
    must(torch.equal(first, weights(3)), "two blocks built from one seed differ")
    must(not torch.equal(first, weights(4)), "two seeds give the same weights")
    return f"{first.numel()} parameters"


class _NoLook(TorchDispatchMode):
    """Refuses operators that tell the Python side what is in a tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith(_VALUES_DECIDE):
            raise Failed(
                f"forward calls {name}: what Python does then depends on the data (.item(), nonzero)"
            )
        return func(*args, **(kwargs or {}))


def pure(subject: Subject) -> str:
    """``forward`` looks at no value (``.item()``), keeps nothing, changes neither its inputs nor its buffers,
    and draws no random number: a fleet of replicas can share it.
    """
    block = subject.make()
    x, state = tokens(block), {k: v.detach() for k, v in block(tokens(block, seed=5))[1].items()}
    inputs = {"x": x, **{f"state {key}": value for key, value in state.items()}}
    inputs |= {f"weight or buffer {key}": value for key, value in block.state_dict().items()}
    before = {key: value.clone() for key, value in inputs.items()}
    kept = {name: dict(vars(module)) for name, module in block.named_modules()}
    random = torch.get_rng_state()
    with _NoLook(), torch.no_grad():
        block(x, state)
        block.step(x[:, 0], state)
    must(torch.equal(random, torch.get_rng_state()), "forward draws random numbers")
    for key, value in before.items():
        must(torch.equal(inputs[key], value), f"forward changes {key} in place")
    for name, module in block.named_modules():
        new = {key for key, value in vars(module).items() if kept[name].get(key) is not value}
        new |= kept[name].keys() - vars(module).keys()
        must(not new, f"forward sets {', '.join(sorted(new))} of {name or 'the block'}")
    return ""


def state_is_what_it_says(subject: Subject) -> str:
    """A flat dictionary of batch-first tensors; ``initial_state`` has their names (and their shapes, unless
    they grow); ``state_bytes`` is what one sequence really carries.
    """
    block = subject.make(dtype=torch.float32)
    with torch.no_grad():
        for length in (0, 1, 6):
            sizes = []
            for batch in (BATCH, 3):
                state = block.initial_state(batch)
                state = block(tokens(block, batch=batch, length=length))[1] if length else state
                must(isinstance(state, dict), f"the state is a {type(state).__name__}, not a dictionary")
                for key, value in state.items():
                    must(
                        isinstance(value, Tensor), f"state {key!r} is a {type(value).__name__}, not a tensor"
                    )
                    must(
                        value.dim() > 0 and value.shape[0] == batch,
                        f"state {key!r} is {list(value.shape)} at batch size {batch}: batch comes first",
                    )
                sizes.append({key: value.shape[1:] for key, value in state.items()})
            must(sizes[0] == sizes[1], "shapes of the state depend on the batch size")
            expected = sum(v.numel() * v.element_size() for v in state.values()) // batch
            told = block.state_bytes(length)
            must(told == expected == state_bytes(state), f"state_bytes({length}) is {told}, not {expected}")
            if length == 0:
                initial, carried = sizes[0], told
            must(
                sizes[0].keys() == initial.keys(), f"state has {sorted(sizes[0])}, at first {sorted(initial)}"
            )
            must(told > carried or sizes[0] == initial, "initial_state has other shapes than the state")
    return f"{carried} bytes" + ("" if told == carried else ", growing")
