"""A convolution after every linear map: equal to loops, to steps and halves, to plain layers at zero taps."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, stack_module_state, vmap

from arena.blocks.registry import model_names
from arena.model import ModelConfig, arch_names, build_model, model_params

KINDS = ["static", "dynamic-lowrank", "dynamic-headwise", "gate"]
OUTERS = ["common", "official"]


def config(arch: str, **changes) -> ModelConfig:
    sizes = {"vocab_size": 11, "n_classes": 7, "d_model": 16, "conv_on": "all"}
    return ModelConfig(**{"arch": arch, **sizes, **changes})


def make(arch: str, seed: int = 1, **changes):
    """A model whose generators of taps are away from zero."""
    model = build_model(config(arch, **changes), seed=seed).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(0))


def convolved(conv, raw: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
    """One convolution by hand, token by token and lag by lag: what it adds to its map, and that."""
    out, at = raw.clone(), 0
    for part, width in enumerate(conv.widths):
        here = slice(at, at + width)
        for t in range(raw.shape[1]):
            for lag in range(min(t + 1, conv.weight.shape[0])):
                taps = conv.weight[lag, here].expand(len(raw), width)
                if conv.kind in ("dynamic-lowrank", "gate"):
                    z = (read[:, t] @ conv.down.weight.T).chunk(len(conv.widths), -1)[part]
                    taps = taps + z @ conv.up[:, lag, here]
                elif conv.kind == "dynamic-headwise":
                    made = (read[:, t] @ conv.filters.weight.T).unflatten(-1, (4, -1))[:, lag]
                    made = made.split(conv.groups, -1)[part]
                    taps = taps + made.repeat_interleave(width // made.shape[1], 1)
                out[:, t, here] += taps * raw[:, t - lag, here]
        at += width
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outer", OUTERS)
def test_by_hand(kind, outer):
    model = make("attention", n_layers=1, conv=kind, outer=outer)
    layer = model.layers[0]
    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    read, _ = layer.block(layer.norm(x))
    y = x + convolved(layer.conv_out, read @ layer.map_out.weight.T, read)
    h = layer.mlp_norm(y)
    gate, up = convolved(layer.conv_up, h @ layer.mlp.gate_up.weight.T, h).chunk(2, -1)
    hidden = gate * torch.sigmoid(gate) * up
    want = y + convolved(layer.conv_down, hidden @ layer.mlp.down.weight.T, hidden)
    torch.testing.assert_close(layer(x, None)[0], want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("arch", [arch for arch in arch_names() if arch not in model_names()])
@pytest.mark.parametrize("outer", OUTERS)
def test_with_taps_of_zero_it_is_the_plain_layer(arch, outer):
    """So the map that was taken off the block is the very last thing that the block does."""
    plain = build_model(config(arch, outer=outer, conv="dynamic-lowrank", conv_on="qkv"), seed=2).double()
    model = build_model(config(arch, outer=outer, conv="dynamic-lowrank"), seed=2).double()
    weights = plain.state_dict()
    for index, layer in enumerate(model.layers):
        if layer.map_out is not None:
            name = f"layers.{index}.block.{layer.block.map_out}.weight"
            weights[f"layers.{index}.map_out.weight"] = weights.pop(name)
    found = model.load_state_dict(weights, strict=False)
    assert not found.unexpected_keys
    own = {"conv_out", "conv_up", "conv_down"}
    assert all(own & set(name.split(".")) for name in found.missing_keys)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if own & set(name.split(".")) and name.endswith(".weight") and "down.weight" not in name[-12:]:
                parameter.zero_()
            if own & set(name.split(".")) and name.split(".")[-2] in own:
                parameter.zero_()
    x = tokens(2, 8)
    torch.testing.assert_close(model(x)[0], plain(x)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("arch", "outer", "kind"),
    [
        *(("gdn2+swa", "common", kind) for kind in KINDS),
        *((arch, "official", "dynamic-lowrank") for arch in ("attention+mamba2", "mlstm+slstm", "gdn2+lstm")),
    ],
)
def test_forward_is_steps_is_halves_and_causal(arch, outer, kind):
    model = make(arch, outer=outer, conv=kind)
    x = tokens(2, 9)
    logits, state = model(x)
    running, steps = model.initial_state(2), []
    for t in range(9):
        step, running = model.step(x[:, t], running)
        steps.append(step)
    torch.testing.assert_close(torch.stack(steps, 1), logits, rtol=1e-8, atol=1e-8)
    for cut in (2, 5):
        first, middle = model(x[:, :cut])
        second, last = model(x[:, cut:], middle)
        torch.testing.assert_close(torch.cat([first, second], 1), logits, rtol=1e-8, atol=1e-8)
        for ends in (last, running):
            for ours, theirs in zip(state, ends, strict=True):
                assert ours.keys() == theirs.keys()
                for name in ours:
                    torch.testing.assert_close(ours[name], theirs[name], rtol=1e-8, atol=1e-8)
    changed = x.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 11
    torch.testing.assert_close(model(changed)[0][:, :5], logits[:, :5], rtol=1e-12, atol=1e-12)
    (same, _), first = model(x, model.initial_state(2)), logits
    torch.testing.assert_close(same, first, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_counted(kind):
    model = build_model(config("gdn2+attention", conv=kind), seed=0)
    for length in (1, 6):
        _, state = model(tokens(1, length))
        measured = sum(x.numel() * x.element_size() for layer in state for x in layer.values())
        assert model.state_bytes(length) == measured
    assert ("conv_up" in state[0]) == (kind != "gate")


def test_the_paper_s_parameters_per_layer():
    """Low-rank on every map: D_in R + R W D + W D for each, arXiv 2606.03825 (ranks R 16, width W 4)."""
    sizes = {"outer": "official", "n_layers": 1, "mlp_hidden": 24, "conv": "dynamic-lowrank"}
    one, plain = (
        model_params(build_model(config("attention", **{**sizes, **changes}), seed=0))
        for changes in ({}, {"conv": "none", "conv_on": "qkv"})
    )
    D, H = 16, 24
    maps = [(D, D)] * 4 + [(D, H)] * 2 + [(H, D)]
    assert one - plain == sum(d_in * 16 + 16 * 4 * d + 4 * d for d_in, d in maps)


@pytest.mark.parametrize("kind", ["static", "dynamic-lowrank"])
def test_vmap_is_a_loop_with_gradients(kind):
    models = [make("gdn2+swa", seed=seed, conv=kind) for seed in range(3)]
    stacked, buffers = stack_module_state(models)
    stacked = {name: value.detach().requires_grad_() for name, value in stacked.items()}
    x = tokens(3, 2, 7)

    def one(parameters, buffer, x_bt):
        return functional_call(models[0], (parameters, buffer), (x_bt,))[0].square().sum()

    together = vmap(one)(stacked, buffers, x)
    together.sum().backward()
    for index, (model, x_bt) in enumerate(zip(models, x, strict=True)):
        alone = model(x_bt)[0].square().sum()
        alone.backward()
        torch.testing.assert_close(together[index], alone, rtol=1e-9, atol=1e-9)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(stacked[name].grad[index], parameter.grad, rtol=1e-8, atol=1e-8)
            assert parameter.grad.abs().sum() > 0, name


def test_a_block_that_does_not_say_how_it_ends_is_refused(monkeypatch):
    from arena.blocks.matrix import MatrixMemoryBlock

    for name in (None, "norm"):
        monkeypatch.setattr(MatrixMemoryBlock, "map_out", name)
        with pytest.raises(ValueError, match="map_out does not name a linear map"):
            build_model(config("gdn", conv="static"), seed=0)
