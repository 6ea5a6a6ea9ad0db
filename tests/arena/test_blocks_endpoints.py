"""The named architectures as points that are reached from gdn2: outputs and every gradient, weights mapped.

Each case states how gdn2's weights come from those of the named architecture. The gradient of a named
weight must then be the gradient of gdn2's weights pulled back through that map. All are common blocks, in
float64.
"""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call

from arena.blocks import build_block
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


def every_channel(w):
    """One row a head [H,D] to the same row for each of its channels [H*K,D]."""
    return w["gate.erase.weight"].repeat_interleave(K, 0)


def one_row(w):
    return w["gate.erase.weight"]


def scattered(w):
    """Weights [H*K,D] that are not the named architecture's and must not matter."""
    return torch.randn(H * K, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


GATES_OF_CHANNELS = {"gate.erase.weight": every_channel, "gate.write.weight": every_channel}
# A decay a head through a projection of rank K: the first H of the K directions carry the heads' rows.
ROWS = torch.cat([torch.eye(H, dtype=torch.float64), torch.zeros(K - H, H, dtype=torch.float64)])
DECAY_OF_CHANNELS = {
    "gate.decay_in.0.weight": lambda w: ROWS @ w["gate.decay_in.weight"],
    "gate.decay_in.1.weight": lambda w: ROWS.T.repeat_interleave(K, 0),
    "gate.decay.dt_bias": lambda w: w["gate.decay.dt_bias"].expand(H, K),
}
NO_DECAY = {  # A = 0: the decay is 1, whatever the rest says
    "gate.decay_in.0.weight": lambda w: torch.zeros(K, D, dtype=torch.float64),
    "gate.decay_in.1.weight": lambda w: torch.zeros(H * K, K, dtype=torch.float64),
    "gate.decay.A_log": lambda w: torch.full((H, 1), -torch.inf, dtype=torch.float64),
    "gate.decay.dt_bias": lambda w: torch.zeros(H, K, dtype=torch.float64),
}
TIED = dict(erase="scalar", write="scalar", coupling="tied")
AVERAGED = dict(erase="mean", write="mean")
DIAL_0 = dict(coupling="dial", dial=0.0)
ON_DIAL_0 = {
    "gate.shared.weight": one_row,
    "gate.erase.weight": scattered,
    "gate.write.weight": scattered,
}
WHOLE_CORRECTION = dict(erase="scalar", erase_value=1.0, write="scalar", write_on="correction")
ON_CORRECTION = {"gate.write.weight": one_row}
GLA_DECAY = dict(decay_form="sigmoid_root")
NOTHING_ERASED = dict(erase="scalar", erase_value=0.0, write="scalar", write_value=1.0)

ENDPOINTS = [
    ("kda", TIED, {}),
    ("kda", {}, GATES_OF_CHANNELS),
    ("kda", dict(coupling="tied"), {"gate.erase.weight": every_channel}),
    ("kda", AVERAGED, GATES_OF_CHANNELS),
    ("kda", DIAL_0, ON_DIAL_0),
    ("kda", WHOLE_CORRECTION, ON_CORRECTION),
    ("kda-neg", dict(**TIED, erase_range=2), {}),
    ("kda-neg", dict(coupling="tied", erase_range=2), {"gate.erase.weight": every_channel}),
    ("kda-neg", dict(**DIAL_0, erase_range=2), ON_DIAL_0),
    ("gdn", dict(**TIED, decay="scalar"), {}),
    ("gdn", {}, GATES_OF_CHANNELS | DECAY_OF_CHANNELS),
    ("gdn", dict(**AVERAGED, decay="mean"), GATES_OF_CHANNELS | DECAY_OF_CHANNELS),
    ("gdn", dict(**DIAL_0, decay="scalar"), ON_DIAL_0),
    ("gdn", dict(**WHOLE_CORRECTION, decay="scalar"), ON_CORRECTION),
    ("gdn-neg", dict(**DIAL_0, decay="mean", erase_range=2), ON_DIAL_0 | DECAY_OF_CHANNELS),
    ("deltanet", dict(**TIED, decay="none"), {}),
    ("deltanet", {}, GATES_OF_CHANNELS | NO_DECAY),
    ("deltanet", dict(**AVERAGED, decay="none"), GATES_OF_CHANNELS),
    ("deltanet", dict(**DIAL_0, decay="none"), ON_DIAL_0),
    ("deltanet", dict(**WHOLE_CORRECTION, decay="none"), ON_CORRECTION),
    ("gla", dict(**GLA_DECAY, erase="none", write="one"), {}),
    ("gla", dict(**GLA_DECAY, **NOTHING_ERASED), {}),
    (
        "gdn2",
        dict(coupling="dial", dial=1.0),
        {"gate.shared.weight": lambda w: torch.ones(H, D, dtype=torch.float64)},
    ),
    (
        "gdn2-neg",
        dict(coupling="dial", dial=1.0, erase_range=2),
        {"gate.shared.weight": lambda w: torch.ones(H, D, dtype=torch.float64)},
    ),
    (
        "mamba2",
        dict(decay="scalar", erase="none", write="scalar", coupling="step"),
        {},
    ),
]


@pytest.mark.parametrize(("name", "gates", "weight_map"), ENDPOINTS, ids=range(len(ENDPOINTS)))
def test_gdn2_reaches_the_named_architectures(name, gates, weight_map):
    big, small = make("gdn2", gates=gates), make(name, seed=1)
    weights = {key: value.detach().requires_grad_() for key, value in small.named_parameters()}
    mapped = {
        key: weight_map.get(key, lambda w, key=key: w[key])(weights) for key, _ in big.named_parameters()
    }
    for key, parameter in big.named_parameters():
        assert mapped[key].shape == parameter.shape, key
    x = tokens(seed=4).requires_grad_()
    before = small(tokens(seed=5))[1]
    before = {key: value.detach().requires_grad_() for key, value in before.items()}
    results = []
    for block, given in ((big, mapped), (small, weights)):
        y, state = functional_call(block, given, (x, before))
        slopes = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)
        target = (y * slopes).sum() + y.square().sum() + state["memory"].square().sum()
        sources = [x, *before.values(), *weights.values()]
        results.append((y, state["memory"], torch.autograd.grad(target, sources, allow_unused=True)))
    (y_big, s_big, g_big), (y_small, s_small, g_small) = results
    torch.testing.assert_close(y_big, y_small, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(s_big, s_small, rtol=1e-10, atol=1e-10)
    for key, a, b in zip(["x", *before, *weights], g_big, g_small, strict=True):
        assert a is not None and b is not None, key
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")


def test_settings_that_are_named_are_the_named_spec():
    for name in ("kda", "kda-neg", "gdn", "deltanet", "gla"):
        gates = next(gates for case, gates, weight_map in ENDPOINTS if case == name and not weight_map)
        spec = make("gdn2", gates=gates).spec
        assert spec.replace(a_range=NAMED[name].a_range) == NAMED[name]  # how A starts is no matter of gates


def test_the_ends_of_the_dial_leave_the_other_gates_without_gradient():
    for dial, idle in ((0.0, ("erase", "write")), (1.0, ("shared",))):
        block = make("gdn2", gates=dict(coupling="dial", dial=dial))
        block(tokens())[0].square().sum().backward()
        for gate in ("erase", "write", "shared"):
            size = getattr(block.gate, gate).weight.grad.abs().sum()
            assert (size == 0) if gate in idle else (size > 0), (dial, gate)


@pytest.mark.parametrize("top", [1, 2])
def test_the_dial_mixes_its_ends(top):
    block = make("gdn2", gates=dict(coupling="dial", dial=0.25, erase_range=top))
    trace, x = block.trace(tokens()), tokens()
    s, b, w = (
        torch.sigmoid(getattr(block.gate, gate)(x).unflatten(-1, (H, -1)))
        for gate in ("shared", "erase", "write")
    )
    torch.testing.assert_close(trace["erase"], top * (0.75 * s + 0.25 * b))
    torch.testing.assert_close(trace["write"], 0.75 * top * s + 0.25 * w)


def test_averaged_gates_are_the_means_of_the_channel_gates():
    x, channels = tokens(), make("gdn2")
    full = channels.trace(x)
    averaged = make("gdn2", seed=1, gates=dict(decay="mean", erase="mean", write="mean"))
    averaged.load_state_dict(channels.state_dict())  # parameters unchanged, as in the paper's ablation
    trace = averaged.trace(x)
    for gate in ("decay", "erase", "write"):
        assert trace[gate].shape == (B, T, H, 1)
        torch.testing.assert_close(trace[gate], full[gate].mean(-1, keepdim=True))
    shapes = {key: value.shape for key, value in channels.named_parameters()}
    for gates in (dict(erase="mean"), dict(write="mean"), dict(decay="mean")):
        assert {key: p.shape for key, p in make("gdn2", gates=gates).named_parameters()} == shapes


def test_averaged_decays_may_be_signed_and_may_vanish():
    plain = make("gdn2", gates=dict(decay="mean"))
    signed = make("gdn2", gates=dict(decay="mean", signed=True))
    x = tokens()
    torch.testing.assert_close(signed.trace(x)["decay"], 2 * plain.trace(x)["decay"] - 1)
    with torch.no_grad():
        plain.gate.decay.A_log[0].fill_(60.0)  # every decay of this head is exp(-e^60 step) = 0
    x = x.requires_grad_()
    y, _ = plain(x)
    assert (plain.trace(x)["decay"][:, :, 0] == 0).all()
    y.square().sum().backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in plain.parameters())


def test_frozen_gates_stay_and_have_no_parameters():
    x = tokens()
    block = make("gdn2", gates=dict(erase="scalar", erase_value=1.5, write="scalar", write_value=0.25))
    trace = block.trace(x)
    assert (trace["erase"] == 1.5).all() and (trace["write"] == 0.25).all()
    names = {key for key, _ in block.named_parameters()}
    assert not any(key.startswith(("gate.erase", "gate.write")) for key in names)
    one = make("gdn2", gates=dict(write="one"))
    frozen = make("gdn2", seed=1, gates=dict(write="scalar", write_value=1))
    frozen.load_state_dict(one.state_dict())
    torch.testing.assert_close(frozen(x)[0], one(x)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("signed", [False, True])
def test_a_complement_writes_what_the_decay_forgets(signed):
    x = tokens()
    scalar = make("gdn2", gates=dict(decay="scalar", write="scalar", coupling="complement", signed=signed))
    trace = scalar.trace(x)
    torch.testing.assert_close(trace["write"], 1 - trace["decay"])
    assert not any(key.startswith("gate.write") for key, _ in scalar.named_parameters())
    channels = make("gdn2", gates=dict(erase="none", coupling="complement", signed=signed))
    free = make("gdn2", seed=1, gates=dict(erase="none", write="one", signed=signed))
    free.load_state_dict(channels.state_dict())
    scaled, whole = channels.trace(x), free.trace(x)
    torch.testing.assert_close(scaled["k"], (1 - scaled["decay"]) * whole["k"])
    assert (scaled["write"] == 1).all()


def test_the_correction_is_gated_as_a_whole():
    gates = dict(erase_range=2, signed=True, write_on="correction")
    block, plain = make("gdn2", gates=gates), make("gdn2", gates=dict(erase_range=2, signed=True))
    plain.load_state_dict(block.state_dict())
    x, before = tokens(), block(tokens(seed=2))[1]
    trace = block.trace(x, before, states=True)
    erase = plain.trace(x)["erase"]
    assert "erase" not in trace
    memory = before["memory"]
    for t in range(T):
        k, v, q, w = (trace[name][:, t] for name in ("k", "v", "q", "write"))
        memory = trace["decay"][:, t][..., None] * memory
        read = (memory * (erase[:, t] * k)[..., None]).sum(-2)
        memory = memory + k[..., None] * (w * (v - read))[..., None, :]
        torch.testing.assert_close(trace["state"][:, t], memory, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(
            trace["read"][:, t], (memory * q[..., None]).sum(-2), rtol=1e-10, atol=1e-10
        )
    torch.testing.assert_close(block(x, before)[1]["memory"], memory, rtol=1e-10, atol=1e-10)


def test_the_correction_runs_on_the_reference_backend():
    from kernels.backends import recording

    block = make("gdn2", gates=dict(write_on="correction"))
    with recording() as used:
        block(tokens())
    assert used["gated_memory"] == "reference"


def test_tied_channel_gates_need_square_heads():
    with pytest.raises(ValueError, match="need K = V"):
        build_block(
            "gdn",
            d_model=D,
            n_heads=H,
            outer="official",
            gates=dict(decay="channel", erase="channel", write="channel"),
        )
