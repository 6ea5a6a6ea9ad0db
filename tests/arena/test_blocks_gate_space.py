"""Gate space: reductions between architectures, gates against their definitions, what a trace says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.func import functional_call, stack_module_state, vmap

from arena.blocks import build_block, registry
from arena.blocks.gates import signed_decay
from arena.blocks.outer import RMSNorm, l2_norm
from arena.memory import NAMED

D, H, B, T, K = 8, 2, 2, 9, 4


def make(name, *, seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        block = build_block(name, d_model=D, n_heads=H, **options)
        for parameter in block.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return block.double()


def tokens(seed=0, length=T):
    return torch.randn(B, length, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def equal_outputs_and_gradients(big, small, weight_map, tolerance=1e-9):
    """Copy small's weights into big by weight_map (name in big -> function of small's weights); compare.

    The gradient of a small weight must be the gradient of the big weights pulled back through the map.
    """
    weights = {key: value.detach().requires_grad_() for key, value in small.named_parameters()}
    mapped = {
        key: weight_map[key](weights) if key in weight_map else weights[key]
        for key in dict(big.named_parameters())
    }
    x = tokens(seed=4).requires_grad_()
    results = []
    for block, given in ((big, mapped), (small, weights)):
        y, state = functional_call(block, given, (x,))
        target = y.square().sum() + state["memory"].square().sum()
        results.append((y, torch.autograd.grad(target, [x, *weights.values()], allow_unused=True)))
    (y_big, g_big), (y_small, g_small) = results
    torch.testing.assert_close(y_big, y_small, rtol=tolerance, atol=tolerance)
    for key, a, b in zip(["x", *weights], g_big, g_small, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8, msg=lambda text, key=key: f"{key}: {text}")


def test_gdn2_with_gates_tied_is_kda():
    equal_outputs_and_gradients(
        make("gdn2"),
        make("kda", seed=1),
        {
            "gate.erase.weight": lambda w: w["gate.erase.weight"].repeat_interleave(K, 0),
            "gate.write.weight": lambda w: w["gate.erase.weight"].repeat_interleave(K, 0),
        },
    )


def test_kda_with_one_decay_a_head_is_gdn():
    one_hot = torch.eye(H, dtype=torch.float64)
    rows = torch.cat([torch.eye(H, dtype=torch.float64), torch.zeros(K - H, H, dtype=torch.float64)])
    equal_outputs_and_gradients(
        make("kda"),
        make("gdn", seed=1),
        {
            "gate.decay_in.0.weight": lambda w: rows @ w["gate.decay_in.weight"],
            "gate.decay_in.1.weight": lambda w: (one_hot @ rows.T).repeat_interleave(K, 0),
            "gate.decay.dt_bias": lambda w: w["gate.decay.dt_bias"].expand(H, K),
        },
    )


def test_gdn_without_decay_is_deltanet():
    equal_outputs_and_gradients(
        make("gdn"),
        make("deltanet", seed=1),
        {
            "gate.decay_in.weight": lambda w: torch.zeros(H, D, dtype=torch.float64),
            "gate.decay.A_log": lambda w: torch.full((H, 1), -torch.inf, dtype=torch.float64),
            "gate.decay.dt_bias": lambda w: torch.zeros(H, 1, dtype=torch.float64),
        },
    )


def test_mamba2_with_signed_decay_far_from_zero_has_the_plain_write():
    plain, signed = make("mamba2").trace(tokens()), make("mamba2-neg").trace(tokens())
    torch.testing.assert_close(signed["decay"], 2 * plain["decay"] - 1)
    torch.testing.assert_close(signed["write"], plain["step"])
    torch.testing.assert_close(plain["write"], plain["step"])


@pytest.mark.parametrize(
    ("start", "gates", "end"),
    [
        ("gdn2", dict(erase="scalar", write="scalar", coupling="tied"), "kda"),
        (
            "gdn2",
            dict(decay="scalar", a_range=(0.0, 16.0), erase="scalar", write="scalar", coupling="tied"),
            "gdn",
        ),
        ("gdn2", dict(decay="none", erase="scalar", write="scalar", coupling="tied"), "deltanet"),
        ("gdn2", dict(decay_form="sigmoid_root", erase="none", write="one"), "gla"),
        (
            "gdn",
            dict(decay="none", a_range=(1.0, 16.0), erase="none", write="one", coupling="free"),
            "linear_attention",
        ),
        ("gdn2", dict(erase_range=2), "gdn2-neg"),
        ("mamba2", dict(signed=True), "mamba2-neg"),
    ],
)
def test_walking_gate_space_reaches_the_named_architectures(start, gates, end):
    walked, named = make(start, gates=gates), make(end, seed=1)
    assert walked.spec == NAMED[end]
    walked.load_state_dict(named.state_dict())
    torch.testing.assert_close(walked(tokens())[0], named(tokens())[0], rtol=0, atol=0)


SPACE = [
    *NAMED.values(),
    NAMED["gla"].replace(qk_map="elu1", normaliser="sum"),
    NAMED["gdn2"].replace(decay="scalar", decay_form="sigmoid"),
    NAMED["gdn2"].replace(decay_form="sigmoid", erase="scalar"),
    NAMED["gdn2"].replace(decay_form="bounded", write="scalar"),
    NAMED["gdn"].replace(decay_form="bounded", signed=True),
    NAMED["gdn"].replace(decay_form="sigmoid_root", coupling="free", erase_range=2),
    NAMED["kda"].replace(signed=True, erase="channel", write="channel", erase_range=2),
    NAMED["mamba2"].replace(qk_map="none", erase="none", normaliser="max_abs"),
    NAMED["mamba2"].replace(erase="channel"),
    NAMED["mlstm"].replace(write="scalar"),
    NAMED["gdn2"].replace(decay="mean", erase="mean", write="mean"),
    NAMED["kda"].replace(decay="mean", signed=True, erase="mean", write="mean", erase_range=2),
    NAMED["gdn2"].replace(erase="scalar", erase_value=1.5),
    NAMED["gdn2"].replace(write="scalar", write_value=0.5),
    NAMED["gdn2"].replace(coupling="tied", erase_range=2),
    NAMED["gdn2"].replace(decay="scalar", write="scalar", coupling="complement"),
    NAMED["gdn2"].replace(decay="mean", write="mean", coupling="complement", signed=True),
    NAMED["gla"].replace(write="channel", coupling="complement"),
    NAMED["gla"].replace(write="channel", coupling="complement", signed=True, normaliser="max_abs"),
    NAMED["gdn2"].replace(coupling="dial", dial=0.3, erase_range=2),
    NAMED["gdn2"].replace(coupling="dial", dial=0.3, erase="scalar", write="mean"),
]


@pytest.mark.parametrize("spec", SPACE, ids=[str(i) for i in range(len(SPACE))])
def test_the_traced_gates_make_the_traced_states_and_reads(spec):
    changes = {field: getattr(spec, field) for field in spec.__dataclass_fields__}
    block = make("linear_attention", gates=changes)
    before = block(tokens(seed=2))[1]
    trace = block.trace(tokens(), before, states=True)
    memory, total = before["memory"], None
    if "normaliser" in before:
        memory = torch.cat([memory, before["normaliser"][..., None]], -1)
        memory = memory * before["stabiliser"].exp()[..., None, None]
    if spec.normaliser != "none":
        memory, total = memory[..., :K], memory[..., K]
    eye = torch.eye(K, dtype=torch.float64)
    for t in range(T):
        k, v, q = (trace[name][:, t] for name in "kvq")
        kept = eye - k[..., :, None] * (trace["erase"][:, t] * k)[..., None, :]
        transition = kept * trace["decay"][:, t].expand(B, H, K)[..., None, :]
        memory = transition @ memory + k[..., :, None] * (trace["write"][:, t] * v)[..., None, :]
        read = (memory.transpose(-1, -2) @ q[..., None])[..., 0]
        if total is not None:
            total = (transition @ total[..., None])[..., 0] + trace["write"][:, t] * k
            size = (total * q).sum(-1, keepdim=True)
            size = size.abs().clamp_min(1.0) if spec.normaliser == "max_abs" else size
            torch.testing.assert_close(trace["normaliser"][:, t], size, rtol=1e-5, atol=1e-5)
            read = read / trace["normaliser"][:, t]
        torch.testing.assert_close(trace["state"][:, t], memory, rtol=1e-9, atol=1e-9)
        # mLSTM adds 1e-6 to its stabilised divisor.
        tolerance = 1e-4 if spec.write == "exponential" else 1e-9
        torch.testing.assert_close(trace["read"][:, t], read, rtol=tolerance, atol=tolerance)
    assert trace["decay"].min() >= -1 and trace["decay"].max() <= 1
    assert trace["erase"].min() >= spec.erase_interval[0] and trace["erase"].max() <= spec.erase_interval[1]
    if not (spec.coupling == "complement" and spec.decay == "channel"):  # there it is in k
        low, high = spec.write_interval
        assert trace["write"].min() >= low and trace["write"].max() <= high
    torch.testing.assert_close(trace["log_decay"].exp(), trace["decay"].abs(), rtol=1e-9, atol=1e-12)


def test_doubling_tied_doubles_the_write_and_free_does_not():
    for name, factor in (("gdn", 2), ("kda", 2), ("deltanet", 2), ("gdn2", 1)):
        plain, negative = make(name).trace(tokens()), make(f"{name}-neg").trace(tokens())
        torch.testing.assert_close(negative["erase"], 2 * plain["erase"])
        torch.testing.assert_close(negative["write"], factor * plain["write"])


def test_signed_decay_values_and_gradients():
    s = torch.tensor([0.0, 1e-9, 0.2, 0.5, 0.7, 1.0], dtype=torch.float64, requires_grad=True)
    log_decay, sign = signed_decay(s.log())
    assert torch.equal(sign, torch.tensor([-1.0, -1, -1, 1, 1, 1], dtype=torch.float64))
    assert log_decay[3] == -torch.inf and (log_decay <= 0).all()
    decay = sign * log_decay.exp()
    torch.testing.assert_close(decay, 2 * s - 1, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(decay.sum(), s)
    torch.testing.assert_close(gradient[[1, 2, 4, 5]], torch.full((4,), 2.0, dtype=torch.float64))
    for dtype in (torch.float32, torch.float64):
        near = torch.linspace(0.45, 0.55, 1001, dtype=dtype).log().requires_grad_()
        assert torch.autograd.grad(signed_decay(near)[0].sum(), near)[0].isfinite().all()
        assert signed_decay(near)[0].max() <= 0


def test_a_decay_of_exactly_zero_trains():
    block = make("mamba2-neg").float()
    with torch.no_grad():  # softplus(f) = ln 2 at f = 0: decay 2 exp(-ln 2) - 1 = 0 for every token
        block.gate.decay_in.weight.zero_()
        block.gate.decay.dt_bias.zero_()
        block.gate.decay.A_log.zero_()
    y, _ = block(tokens().float())
    assert block.trace(tokens().float())["decay"].abs().max() < 1e-6
    y.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in block.parameters())


@pytest.mark.parametrize("name", sorted(NAMED))
def test_the_output_gate_is_an_axis_of_every_common_block(name):
    x = tokens()
    assert "output_gate" not in make(name, output_gate="none").trace(x)
    silu, sigmoid = make(name), make(name, output_gate="sigmoid")
    z = silu.gate_out.linear(x).unflatten(-1, (H, -1))
    torch.testing.assert_close(silu.trace(x)["output_gate"], z / (1 + torch.exp(-z)))
    torch.testing.assert_close(sigmoid.trace(x)["output_gate"], 1 / (1 + torch.exp(-z)))


@pytest.mark.parametrize("conv", ["none", "static", "dynamic-lowrank", "dynamic-headwise", "gate"])
@pytest.mark.parametrize("name", ["gdn2", "mamba2", "mlstm"])
@pytest.mark.parametrize("outer", ["common", "official"])
def test_every_convolution_carries_its_rows(name, outer, conv):
    block, x = make(name, outer=outer, conv=conv), tokens()
    y, _ = block(x)
    first, middle = block(x[:, :2])
    second, _ = block(x[:, 2:], middle)
    torch.testing.assert_close(torch.cat([first, second], 1), y, rtol=1e-9, atol=1e-9)
    assert ("conv" in middle) == (conv not in ("none", "gate"))
    parameters, _ = stack_module_state([block, make(name, outer=outer, conv=conv, seed=1)])
    together = vmap(lambda w: functional_call(block, w, (x,))[0])(parameters)
    torch.testing.assert_close(together[0], y, rtol=1e-9, atol=1e-9)


def test_dynamic_convolutions_start_static():
    x = tokens()
    for conv, width in (("dynamic-lowrank", 4), ("dynamic-headwise", 4), ("gate", 1)):
        block = build_block("linear_attention", d_model=D, n_heads=H, conv=conv).double()
        raw = block.qkv(x)
        padded = torch.nn.functional.pad(raw, (0, 0, 3, 0))
        taps = sum(block.conv.weight[j] * padded[:, 3 - j : 3 - j + T] for j in range(width))
        expected = torch.nn.functional.silu(raw + taps)
        torch.testing.assert_close(block.conv(raw, x, None)[0], expected)


def test_a_new_architecture_is_one_short_file():
    path = Path(__file__).with_name("retnet.py")
    assert len(path.read_text().splitlines()) < 60
    spec = importlib.util.spec_from_file_location("retnet_example", path)
    try:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        block, x = make("retnet"), tokens()
    finally:
        registry._BUILDERS.pop("retnet", None)
    trace = block.trace(x)
    gamma = 1 - 2.0 ** torch.tensor([-5.0, -6.0], dtype=torch.float64)
    for t in range(T):
        parts = [(trace["q"][:, t] * trace["k"][:, s]).sum(-1) * gamma ** (t - s) for s in range(t + 1)]
        expected = sum(w[..., None] * trace["v"][:, s] for s, w in enumerate(parts))
        torch.testing.assert_close(trace["read"][:, t], expected, rtol=1e-6, atol=1e-6)


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="'gdn' is taken"):
        registry.register("gdn")(lambda **_: None)


@pytest.mark.parametrize("function", [l2_norm, RMSNorm(5).double(), vmap(l2_norm)], ids=["l2", "rms", "vmap"])
def test_norms_have_exact_first_and_second_derivatives(function):
    x = torch.randn(
        2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True
    )
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)
    assert l2_norm(torch.zeros(1, 5)).eq(0).all()


@pytest.mark.parametrize("name", sorted(NAMED))
def test_bfloat16_runs_with_a_float32_memory(name):
    for outer in ("common", "official"):
        block, x = make(name, outer=outer), tokens()
        y, state = block.bfloat16()(x.bfloat16())
        assert y.dtype == torch.bfloat16 and y.isfinite().all()
        assert state["memory"].dtype == torch.float32
        assert block.initial_state(B)["memory"].dtype == torch.float32
        torch.testing.assert_close(y.double(), block.double()(x)[0], rtol=0.1, atol=0.1)


def test_decay_forms_are_their_formulas():
    x = tokens()

    def pre_activation(gate):
        return gate.decay_in(x).unflatten(-1, (H, -1))

    for decay in ("scalar", "channel"):
        gate = make("gdn2", gates=dict(decay=decay, decay_form="bounded")).gate
        f = gate.decay.A_log.exp() * (pre_activation(gate) + gate.decay.dt_bias)
        expected = torch.exp(-5 / (1 + torch.exp(-f)))
        torch.testing.assert_close(gate(x).log_decay.exp().reshape(f.shape), expected)
        gate = make("gdn2", gates=dict(decay=decay, decay_form="sigmoid")).gate
        expected = 1 / (1 + torch.exp(-pre_activation(gate) - gate.decay.bias))
        torch.testing.assert_close(gate(x).log_decay.exp().reshape(expected.shape), expected)
        gate = make("gdn2", gates=dict(decay=decay, decay_form="sigmoid_root")).gate
        expected = (1 / (1 + torch.exp(-pre_activation(gate)))) ** (1 / 16)
        torch.testing.assert_close(gate(x).log_decay.exp().reshape(expected.shape), expected)


def test_mlstm_starts_with_its_biases_alone():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = build_block("mlstm", d_model=16, n_heads=4)
    trace = block.trace(torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(trace["forget_gate"][0, 2, :, 0], torch.tensor([3.0, 4.0, 5.0, 6.0]))
    torch.testing.assert_close(trace["input_gate"][0, 2], trace["input_gate"][0, 0])
    assert 0 < trace["input_gate"].abs().max() < 0.5
