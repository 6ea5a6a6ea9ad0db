"""What every registered block must do, in both outer layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.func import functional_call, stack_module_state, vmap

from arena.blocks import Block, block_names, build_block
from arena.memory import TRACE_FIELDS, state_bytes

D, H, B, T = 8, 2, 2, 9
POINTS = {
    "gates averaged": dict(decay="mean", erase="mean", write="mean"),
    "gates averaged, signed": dict(decay="mean", erase="mean", write="channel", signed=True),
    "frozen erase": dict(erase="scalar", erase_value=1.5),
    "frozen write": dict(write="scalar", write_value=0.5),
    "tied channels": dict(coupling="tied", erase_range=2),
    "complement": dict(decay="scalar", write="scalar", coupling="complement", erase_range=2),
    "complement of averages": dict(decay="mean", write="mean", coupling="complement", signed=True),
    "complement on k": dict(erase="none", coupling="complement", signed=True),
    "complement on k, normaliser": dict(erase="none", coupling="complement", normaliser="max_abs"),
    "dial": dict(coupling="dial", dial=0.25, erase_range=2),
    "dial of scalars": dict(coupling="dial", dial=0.75, erase="scalar", write="mean"),
    "correction": dict(erase="scalar", erase_value=1.0, write_on="correction"),
    "correction, all gates": dict(erase_range=2, write_on="correction", signed=True),
    "correction, scalar": dict(decay="scalar", erase="scalar", write="scalar", write_on="correction"),
}
"""Points of gate space that no architecture has, as changes to gdn2."""

OPTIONS = {"mamba3, MIMO": ("mamba3", dict(rank=2))}
"""Blocks whose options change what they carry."""

CASES = [(name, outer) for name in [*block_names(), *POINTS, *OPTIONS] for outer in ("common", "official")]
each_block = pytest.mark.parametrize(("name", "outer"), CASES, ids=[f"{n}-{o}" for n, o in CASES])


def build(name, **arguments) -> Block:
    if name in POINTS:
        return build_block("gdn2", d_model=D, n_heads=H, gates=POINTS[name], **arguments)
    name, options = OPTIONS.get(name, (name, {}))
    return build_block(name, d_model=D, n_heads=H, **options, **arguments)


def make(name, outer, *, seed=0, dtype=torch.float64) -> Block:
    """A block whose weights are all away from zero, so that nothing is hidden by an initialisation."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        block = build(name, outer=outer, depth=0.5)
        for parameter in block.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return block.to(dtype)


def tokens(seed=0, *, batch=B, length=T, dtype=torch.float64):
    return torch.randn(
        batch, length, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def run_steps(block, x, state=None):
    state = block.initial_state(x.shape[0]) if state is None else state
    outputs = []
    for t in range(x.shape[1]):
        y, state = block.step(x[:, t], state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


def close(a, b, tolerance):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@each_block
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_forward_is_steps_is_two_halves(name, outer, dtype, tolerance):
    block, x = make(name, outer, dtype=dtype), tokens(dtype=dtype)
    y, state = block(x)
    stepped, step_state = run_steps(block, x)
    assert y.shape == x.shape and y.dtype == dtype
    close(stepped, y, tolerance)
    for cut in (1, 4, T - 1):
        first, middle = block(x[:, :cut])
        second, end = block(x[:, cut:], middle)
        close(torch.cat([first, second], 1), y, tolerance)
        assert set(end) == set(state) == set(step_state) == set(block.initial_state(B))
        for key in state:
            assert state[key].shape[0] == B
            close(end[key], state[key], tolerance)
            close(step_state[key], state[key], tolerance)


@each_block
def test_initial_state_is_no_state(name, outer):
    block, x = make(name, outer), tokens()
    y, state = block(x)
    same, same_state = block(x, block.initial_state(B))
    close(same, y, 1e-12)
    for key, value in block.initial_state(B).items():
        assert value.dtype == state[key].dtype
        close(same_state[key], state[key], 1e-12)


@each_block
def test_causal_and_rows_are_independent(name, outer):
    block, x = make(name, outer), tokens()
    y, _ = block(x)
    for t in (0, 3, T - 1):
        changed = x.clone()
        changed[:, t:] = tokens(seed=1)[:, t:] * 3
        close(block(changed)[0][:, :t], y[:, :t], 1e-12)
        assert not torch.allclose(block(changed)[0][:, t], y[:, t])
    changed = x.clone()
    changed[1] = tokens(seed=2)[1]
    close(block(changed)[0][0], y[0], 1e-12)
    close(block(x[:1])[0], y[:1], 1e-12)


@each_block
def test_vmap_over_weights_is_a_loop(name, outer):
    blocks = [make(name, outer, seed=seed) for seed in range(3)]
    parameters, buffers = stack_module_state(blocks)
    parameters = {key: value.detach().requires_grad_() for key, value in parameters.items()}
    base = copy.deepcopy(blocks[0]).to("meta")
    x = torch.stack([tokens(seed=seed) for seed in range(3)])

    def loss(weights, frozen, sequence):
        y, _ = functional_call(base, (weights, frozen), (sequence,))
        return y.square().mul(torch.linspace(0.5, 1.5, T, dtype=y.dtype)[:, None]).sum()

    together = vmap(loss)(parameters, buffers, x)
    together.sum().backward()
    for r, block in enumerate(blocks):
        alone = loss(dict(block.named_parameters()), dict(block.named_buffers()), x[r])
        close(together[r], alone, 1e-9)
        alone.backward()
        for key, parameter in block.named_parameters():
            close(parameters[key].grad[r], parameter.grad, 1e-9)


@each_block
def test_gradient_reaches_everything(name, outer):
    block, x = make(name, outer), tokens().requires_grad_()
    _, state = block(tokens(seed=5))
    state = {key: value.detach().requires_grad_() for key, value in state.items()}
    y, after = block(x, state)
    (y.square().sum() + sum(value.square().sum() for value in after.values())).backward()
    for key, parameter in [*block.named_parameters(), ("x", x), *state.items()]:
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, key


@each_block
def test_trace_speaks_the_vocabulary(name, outer):
    block, x = make(name, outer), tokens()
    for trace in (block.trace(x), block.trace(x, block(tokens(seed=3))[1], states=True)):
        sizes = {"B": B, "T": T, "M": T * block.micro_steps}
        for field, value in trace.items():
            axes = TRACE_FIELDS[field].axes.split()
            assert value.dim() == len(axes), field
            for axis, size in zip(axes, value.shape, strict=True):
                if not (axis.endswith("|1") and size == 1):
                    assert sizes.setdefault(axis.removesuffix("|1"), size) == size, (field, axis)


@each_block
def test_trace_of_halves_continues(name, outer):
    block, x = make(name, outer), tokens()
    whole = block.trace(x)
    second = block.trace(x[:, 4:], block(x[:, :4])[1])
    for field, value in whole.items():
        if field != "attention":
            steps = block.micro_steps if "M" in TRACE_FIELDS[field].axes else 1
            close(second[field], value[:, 4 * steps :], 1e-9)


@each_block
def test_state_bytes_is_measured(name, outer):
    block = make(name, outer, dtype=torch.float32)
    for length in (0, 1, 6):
        state = block(tokens(length=length, dtype=torch.float32))[1] if length else block.initial_state(B)
        expected = sum(value.numel() * value.element_size() for value in state.values()) // B
        assert block.state_bytes(length) == expected == state_bytes(state)


@each_block
def test_initial_weights_come_from_the_global_generator_alone(name, outer):
    def weights(seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return torch.cat([p.detach().flatten() for p in build(name, outer=outer).parameters()])

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))
    assert weights(3).isfinite().all()
