"""The model stack: names, layout, initial weights, state, decay flags."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, stack_module_state, vmap

from arena.blocks import block_names
from arena.model import Model, ModelConfig, arch_names, build_model, model_params, parse_arch


def config(arch: str, **changes) -> ModelConfig:
    return ModelConfig(**{"arch": arch, "vocab_size": 11, "n_classes": 7, "d_model": 16, **changes})


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("arch", "n_layers", "names"),
    [
        ("gdn-neg", 3, ["gdn-neg"] * 3),
        ("xlstm[1:1]", 2, ["mlstm", "slstm"]),
        ("xlstm[1:1]", 5, ["mlstm", "slstm", "mlstm", "slstm", "mlstm"]),
        ("xlstm[3:1]", 8, (["mlstm"] * 3 + ["slstm"]) * 2),
        ("xlstm[2:2]", 4, ["mlstm", "mlstm", "slstm", "slstm"]),
        ("xlstm[7:1]", 12, ["mlstm"] * 7 + ["slstm"] + ["mlstm"] * 4),
        ("xlstm[1:0]", 2, ["mlstm"] * 2),
        ("xlstm[7:0]", 2, ["mlstm"] * 2),
        ("xlstm[0:1]", 1, ["slstm"]),
        ("gdn2+swa", 4, ["gdn2", "swa", "gdn2", "swa"]),
        ("gdn+attention", 3, ["gdn", "attention", "gdn"]),
        ("gdn2+swa[3:1]", 8, (["gdn2"] * 3 + ["swa"]) * 2),
        ("gdn2+swa[3:1]", 6, ["gdn2"] * 3 + ["swa"] + ["gdn2"] * 2),
        ("gdn2+swa[1:1]", 3, ["gdn2", "swa", "gdn2"]),
        ("gdn2+swa[2:2]", 4, ["gdn2"] * 2 + ["swa"] * 2),
        ("gdn-neg+mamba2[1:2]", 3, ["gdn-neg", "mamba2", "mamba2"]),
        ("gdn2+swa[first]", 3, ["swa", "gdn2", "gdn2"]),
        ("deltaproduct[2]+swa", 2, ["deltaproduct[2]", "swa"]),
        ("deltaproduct[2]+swa[2:1]", 3, ["deltaproduct[2]", "deltaproduct[2]", "swa"]),
        ("gdn+gdnproduct[3]-neg[1:2]", 3, ["gdn", "gdnproduct[3]-neg", "gdnproduct[3]-neg"]),
        ("gdn+deltaproduct[2][last]", 3, ["gdn", "gdn", "deltaproduct[2]"]),
        ("gdn2+swa[last]", 3, ["gdn2", "gdn2", "swa"]),
    ],
)
def test_parse_arch(arch, n_layers, names):
    assert parse_arch(arch, n_layers) == names


@pytest.mark.parametrize(
    ("arch", "n_layers", "message"),
    [
        ("gnd", 2, "gdn"),
        ("gdn+mlstmm", 2, "'mlstmm' in architecture 'gdn\\+mlstmm'.*did you mean mlstm"),
        ("xlstm[7:1]", 7, "at least 8 layers"),
        ("gdn+attention", 1, "at least 2 layers"),
        ("xlstm[0:0]", 2, "no block"),
        ("gdn+kda+gla", 3, "alternates two"),
        ("xlstm", 2, "xlstm\\[1:1\\]"),
        ("gla-neg", 2, "gla"),
        ("gdn+", 2, "unknown block ''"),
        ("gdn2+swa[3:1]", 3, "at least 4 layers"),
        ("gdn2+swa[first]", 1, "at least 2 layers"),
        ("gdn2+swa[lst]", 3, "'lst' is no place; did you mean last"),
        ("gdn2+swa[:1]", 3, "no place.*a ratio such as gdn2\\+swa\\[3:1\\]"),
        ("gdn2+swa[3:0]", 4, "at least 1; write 'gdn2' alone"),
        ("gdn2+swa[0:1]", 4, "at least 1; write 'swa' alone"),
        ("gdn2+sw[3:1]", 4, "unknown block 'sw' in architecture"),
        (
            "gdn2+deltaproduct[3:1]",
            4,
            "write deltaproduct\\[n\\] or deltaproduct\\[n\\]-neg with its number, such as",
        ),
        ("gdn2+swa[2]", 4, "unknown block 'swa\\[2\\]'"),
        ("gdn2[3:1]", 4, "a ratio is of two blocks, such as gdn2\\+swa\\[3:1\\]"),
        ("[3:1]", 4, "a ratio is of two blocks"),
        ("gdn2+swa+gdn[3:1]", 4, "alternates two"),
    ],
)
def test_bad_arch(arch, n_layers, message):
    with pytest.raises(ValueError, match=message):
        parse_arch(arch, n_layers)
    with pytest.raises(ValueError, match=message):
        config(arch, n_layers=n_layers)


@pytest.mark.parametrize(
    "change",
    [
        {"d_model": 0},
        {"n_layers": 0},
        {"mlp_ratio": 0.0},
        {"tokens_per_position": 3},
        {"options": {"windoww": 3}},
        {"vocab_size": 0},
        {"conv_on": "qkvo"},
        {"conv_on": "all"},
        {"conv_on": "all", "conv": "none"},
        {"conv_on": "all", "conv": "static", "experts": 4},
        {"experts": 0},
        {"experts_per_token": 2},
        {"experts_per_token": 5, "experts": 4},
        {"load_balance": -0.1, "experts": 4},
        {"load_balance": float("nan"), "experts": 4},
        {"load_balance": 0.1},
    ],
)
def test_bad_config(change):
    with pytest.raises(ValueError, match=next(iter(change)) if "options" not in change else "windoww"):
        config("gdn", **change)


def test_options_reach_the_blocks_that_know_them():
    model = build_model(config("gdn2+swa", options={"window": 3}), seed=0)
    assert model.blocks[1].window == 3
    assert build_model(config("swa"), seed=0).blocks[0].window != 3


@pytest.mark.parametrize("arch", arch_names())
def test_initial_weights_are_a_function_of_config_and_seed(arch):
    before = torch.get_rng_state()
    one, same, other = (build_model(config(arch), seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    states = [model.state_dict() for model in (one, same, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["embedding.weight"], states[2]["embedding.weight"])
    assert all(value.isfinite().all() for value in states[0].values())


@pytest.mark.parametrize(
    "arch", [*arch_names(), "gdn2+swa[2:1]", "mamba3+attention[last]", "deltaproduct[2]+slstm[first]"]
)
@pytest.mark.parametrize("outer", ["common", "official"])
def test_forward_equals_steps_equals_halves(arch, outer):
    model = build_model(config(arch, outer=outer, n_layers=3), seed=1).double()
    x = tokens(2, 9)
    logits, state = model(x)
    assert logits.shape == (2, 9, 7)
    first, middle = model(x[:, :4])
    second, last = model(x[:, 4:], middle)
    torch.testing.assert_close(torch.cat([first, second], 1), logits, rtol=1e-8, atol=1e-8)
    running, steps = model.initial_state(2), []
    for t in range(9):
        step, running = model.step(x[:, t], running)
        steps.append(step)
    torch.testing.assert_close(torch.stack(steps, 1), logits, rtol=1e-8, atol=1e-8)
    for ends in (last, running):
        for ours, theirs in zip(state, ends, strict=True):
            assert ours.keys() == theirs.keys()


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-5)


@pytest.mark.parametrize("positions", [1, 2])
def test_layout_against_a_plain_composition(positions):
    model = build_model(config("gdn", tokens_per_position=positions), seed=2).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    x = tokens(3, 6, positions)
    table = model.embedding.weight
    h = torch.cat([table[x[..., slot]] for slot in range(positions)], -1)
    for layer in model.layers:
        h = h + layer.block(rms_norm(h, layer.norm.weight))[0]
        inner = rms_norm(h, layer.mlp_norm.weight)
        gate, up = (inner @ w.T for w in layer.mlp.gate_up.weight.chunk(2, 0))
        h = h + (gate * torch.sigmoid(gate) * up) @ layer.mlp.down.weight.T
    expected = rms_norm(h, model.norm.weight) @ model.head.weight.T
    actual = model(x if positions > 1 else x[..., 0])[0]
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_gelu_mlp_is_gated():
    layer = build_model(config("slstm", outer="official"), seed=0).layers[0]
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    gate, up = (x @ w.T for w in layer.mlp.gate_up.weight.chunk(2, 0))
    torch.testing.assert_close(layer.mlp(x), (F.gelu(gate) * up) @ layer.mlp.down.weight.T)


def test_mlp_follows_the_block_only_in_the_official_layer():
    def hidden(arch: str, outer: str) -> int | None:
        layer = build_model(config(arch, outer=outer, d_model=64), seed=0).layers[0]
        return None if layer.mlp is None else layer.mlp.down.in_features

    assert {hidden(arch, "common") for arch in block_names()} == {168}
    assert hidden("mlstm", "official") is None
    assert hidden("mamba2", "official") is None
    assert hidden("slstm", "official") == 80
    assert hidden("gdn", "official") == 168
    wide = build_model(config("gdn", d_model=64, mlp_ratio=4.0), seed=0)
    assert wide.layers[0].mlp.down.in_features == 256


@pytest.mark.parametrize("arch", arch_names())
def test_decay_flags(arch):
    model = build_model(config(arch, outer="official"), seed=0)
    free = {name for name, p in model.named_parameters() if getattr(p, "no_weight_decay", False)}
    for name, parameter in model.named_parameters():
        if name == "embedding.weight" or name.endswith("bias") or "norm" in name:
            assert name in free, name
        if parameter.dim() == 2 and name.endswith(("head.weight", "gate_up.weight", "down.weight")):
            assert name not in free, name


def test_first_loss_is_that_of_a_uniform_guess():
    logits, _ = build_model(config("gdn", d_model=64), seed=0)(tokens(8, 16))
    loss = F.cross_entropy(logits.flatten(0, 1), tokens(8 * 16, seed=1) % 7)
    assert abs(loss.item() - torch.tensor(7.0).log().item()) < 0.05


def test_state_bytes_and_params():
    model = build_model(config("gdn+attention", d_model=16, n_heads=2), seed=0)
    for length in (1, 5, 40):
        _, state = model(tokens(1, length))
        expected = sum(x.numel() * x.element_size() for block in state for x in block.values())
        assert model.state_bytes(length) == expected
    assert model.state_bytes(40) > model.state_bytes(5)
    assert model_params(model) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("arch", arch_names())
def test_vmap_equals_loop(arch):
    models: list[Model] = [build_model(config(arch), seed=seed) for seed in range(3)]
    stacked, buffers = stack_module_state(models)
    x = tokens(3, 2, 7)

    def one(parameters, buffer, x_bt):
        return functional_call(models[0], (parameters, buffer), (x_bt,))[0]

    together = vmap(one)(stacked, buffers, x)
    for model, x_bt, logits in zip(models, x, together, strict=True):
        torch.testing.assert_close(logits, model(x_bt)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n_layers", [2, 6])
def test_official_layers_start_as_in_a_stack_of_this_depth(n_layers):
    """mLSTM's map out has std 2 / (layers sqrt(D)); RWKV-7's norms have ((layer + 1) / layers)^0.7."""
    model = build_model(config("xlstm[1:0]", n_layers=n_layers, outer="official", d_model=64), seed=0)
    for block in model.blocks:
        assert float(block.down.weight.detach().std()) == pytest.approx(2 / n_layers / 8, rel=0.05)
    model = build_model(config("rwkv7", n_layers=n_layers, outer="official"), seed=0)
    sizes = [block.norm_weight[0, 0].item() for block in model.blocks]
    assert sizes == pytest.approx([((layer + 1) / n_layers) ** 0.7 for layer in range(n_layers)])
    given = config("rwkv7", n_layers=n_layers, outer="official", options={"n_blocks": 4})
    blocks = build_model(given, seed=0).blocks
    assert blocks[-1].norm_weight[0, 0].item() == 1.0
    assert blocks[0].norm_weight[0, 0].item() == pytest.approx(0.25**0.7)
    build_model(config("rwkv7", n_layers=n_layers), seed=0)  # the common layer has no such option
