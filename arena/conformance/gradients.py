"""Gradients: of a fleet, against differences, and in float32."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap

from arena.blocks.base import Block
from arena.conformance.subject import SHORT, Subject, close, must, tokens


def fleet_is_singles(subject: Subject) -> str:
    """``vmap`` over stacked weights equals a loop over the blocks, gradients included."""
    blocks = [subject.make(seed) for seed in range(3)]
    parameters, buffers = stack_module_state(list(blocks))
    parameters = {key: value.detach().requires_grad_() for key, value in parameters.items()}
    base = copy.deepcopy(blocks[0]).to("meta")
    x = torch.stack([tokens(blocks[0], seed) for seed in range(3)])

    def loss(weights: Any, frozen: Any, sequence: Tensor) -> Tensor:
        y, _ = functional_call(base, (weights, frozen), (sequence,))
        return y.square().mul(torch.linspace(0.5, 1.5, SHORT, dtype=y.dtype)[:, None]).sum()

    together = vmap(loss)(parameters, buffers, x)
    together.sum().backward()
    apart = []
    for r, block in enumerate(blocks):
        alone = loss(dict(block.named_parameters()), dict(block.named_buffers()), x[r])
        apart.append(close(together[r], alone, 1e-9, f"loss of replica {r}"))
        alone.backward()
        for key, parameter in block.named_parameters():
            found, wanted = parameters[key].grad, parameter.grad
            must(found is not None and wanted is not None, f"{key} gets no gradient")
            assert found is not None and wanted is not None
            apart.append(close(found[r], wanted, 1e-9, f"gradient of {key} in replica {r}"))
    return f"3 replicas, {max(apart):.0e} apart"


def _leaves(block: Block, seed: int = 5) -> dict[str, Tensor]:
    """All that a gradient must reach: parameters, x, and a state that has seen tokens."""
    with torch.no_grad():
        state = block(tokens(block, seed))[1]
    leaves: dict[str, Tensor] = {f"parameter {key}": value for key, value in block.named_parameters()}
    leaves["x"] = tokens(block).requires_grad_()
    return leaves | {f"state {key}": value.detach().requires_grad_() for key, value in state.items()}


def _loss(block: Block, leaves: Mapping[str, Tensor]) -> Tensor:
    state = {key.removeprefix("state "): value for key, value in leaves.items() if key.startswith("state ")}
    y, after = block(leaves["x"], state)
    return y.square().sum() + sum(value.square().sum() for value in after.values())


def gradient(subject: Subject) -> str:
    """A finite gradient reaches every parameter, x and the state; it is the slope of the loss (float64, by
    central differences along a random direction); and float32 gives the same.
    """
    block = subject.make()
    leaves = _leaves(block)
    _loss(block, leaves).backward()
    for key, value in leaves.items():
        must(value.grad is not None, f"{key} gets no gradient")
        assert value.grad is not None
        must(value.grad.isfinite().all(), f"{key} gets a gradient that is not finite")
        must(value.grad.abs().sum() > 0, f"{key} gets a gradient of zero")
    worst = 0.0
    for key, value in leaves.items():
        assert value.grad is not None
        direction = torch.randn(value.shape, generator=torch.Generator().manual_seed(7), dtype=value.dtype)
        direction, size = direction / direction.norm(), 1e-5
        with torch.no_grad():
            value += size * direction
            high = _loss(block, leaves)
            value -= 2 * size * direction
            low = _loss(block, leaves)
            value += size * direction
            slope, told = ((high - low) / (2 * size)).item(), (value.grad * direction).sum().item()
        apart = abs(slope - told) / max(abs(told), value.grad.norm().item(), 1e-3)
        must(apart < 1e-5, f"the gradient of {key} says {told:.6g}, differences say {slope:.6g}")
        worst = max(worst, apart)
    return f"differences {worst:.0e} apart"


def gradient_in_float32(subject: Subject) -> str:
    """float32 gives the gradient of float64."""
    found: list[dict[str, Tensor]] = []
    for dtype in (torch.float64, torch.float32):
        block = subject.make(dtype=dtype)
        x = tokens(block).requires_grad_()
        y, state = block(x)
        (y.square().sum() + sum(value.square().sum() for value in state.values())).backward()
        leaves = {**dict(block.named_parameters()), "x": x}
        found.append({key: value.grad for key, value in leaves.items() if value.grad is not None})
    double, single = found
    must(set(double) == set(single), f"gradients reach {sorted(set(double) ^ set(single))} in one type only")
    apart = 0.0
    for key, wanted in double.items():
        scale = wanted.abs().max().clamp(min=1e-3)
        apart = max(apart, close(single[key].double() / scale, wanted / scale, 1e-3, f"gradient of {key}"))
    return f"{apart:.0e} apart"
