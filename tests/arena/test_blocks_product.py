"""DeltaProduct, plain and gated: against loops, against n = 1, at chunk edges; their names; S3 by hand."""

from __future__ import annotations

import math

import pytest
import torch

import synthetic_tasks
from arena.blocks import block_names, block_options, build_block
from arena.blocks.matrix import MatrixMemoryBlock
from arena.constructions import s3_model
from arena.memory import GateSpec
from arena.model import ModelConfig, arch_names, build_model, model_params, parse_arch

D, H, B = 8, 2, 2


def make(name, outer="common", *, seed=0, conv=None, spread=0.3, gates=None):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        block = build_block(name, d_model=D, n_heads=H, outer=outer, conv=conv, gates=gates)
        for parameter in block.parameters():
            parameter.data.add_(spread * torch.randn_like(parameter))
    return block.double()


def tokens(length, seed=0, batch=B):
    return torch.randn(batch, length, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(x):
    return x / torch.sqrt((x * x).sum() + 1e-6)


def loop(block, x, n, *, factor, gated, official):
    """The layer of the paper, token by token and head by head, from the block's weights; y [B,T,D]."""
    p = dict(block.named_parameters())
    K, V = block.key_dim, block.value_dim
    outputs = []
    for row in x:
        raw = row @ p["qkv.weight"].T
        mixed = []
        for t in range(len(row)):
            lags = [p["conv.weight"][j] * raw[t - j] for j in range(4) if t >= j]
            mixed.append(sum(lags) * torch.sigmoid(sum(lags)))
        states = [torch.zeros(K, V, dtype=x.dtype) for _ in range(H)]
        ys = []
        for t, u in enumerate(row):
            q, k, v = mixed[t].split([H * K, n * H * K, n * H * V])
            beta = factor * torch.sigmoid(p["gate.erase.weight"] @ u)
            reads = []
            for h in range(H):
                S = states[h]
                if gated:
                    f = (p["gate.decay_in.weight"] @ u)[h] + p["gate.decay.dt_bias"][h, 0]
                    S = torch.exp(-torch.exp(p["gate.decay.A_log"][h, 0]) * torch.log1p(torch.exp(f))) * S
                for j in range(n):
                    k_tj = unit(k[(j * H + h) * K : (j * H + h + 1) * K])
                    v_tj = v[(j * H + h) * V : (j * H + h + 1) * V]
                    b = beta[j * H + h]
                    S = (torch.eye(K, dtype=x.dtype) - b * torch.outer(k_tj, k_tj)) @ S
                    S = S + b * torch.outer(k_tj, v_tj)
                states[h] = S
                read = S.T @ unit(q[h * K : (h + 1) * K]) / math.sqrt(K)
                read = read / torch.sqrt((read * read).mean() + 1e-5) * p["norm.weight"]
                if gated or not official:
                    g = (p["gate_out.linear.weight"] @ u)[h * V : (h + 1) * V]
                    read = read * g * torch.sigmoid(g)
                reads.append(read)
            ys.append(p["out.weight"] @ torch.cat(reads))
        outputs.append(torch.stack(ys))
    return torch.stack(outputs)


CASES = [
    (family, n, neg, outer)
    for family in ("deltaproduct", "gdnproduct")
    for n in (1, 2, 3, 4)
    for neg in ("", "-neg")
    for outer in ("common", "official")
]


@pytest.mark.parametrize(("family", "n", "neg", "outer"), CASES)
def test_is_the_recurrence_of_the_paper_with_all_gradients(family, n, neg, outer):
    block = make(f"{family}[{n}]{neg}", outer, seed=n)
    assert block.micro_steps == n
    x = tokens(5, seed=n).requires_grad_()
    weights = dict(block.named_parameters())
    about = dict(factor=2 if neg else 1, gated=family == "gdnproduct", official=outer == "official")
    expected = loop(block, x, n, **about)
    probe = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    leaves = [x, *weights.values()]
    theirs = torch.autograd.grad((expected * probe).sum(), leaves)
    y, _ = block(x)
    ours = torch.autograd.grad((y * probe).sum(), leaves)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    for name, a, b in zip(["x", *weights], ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("family", ["deltaproduct", "gdnproduct"])
@pytest.mark.parametrize("n", [2, 3])
def test_two_tokens_only_and_gates_at_their_ends(family, n):
    """What state tracking feeds it, and what is worst for a chunk's triangular system: two keys, beta 2."""
    block = make(f"{family}[{n}]-neg", seed=n)
    with torch.no_grad():
        block.gate.erase.weight.mul_(400.0)
    x = tokens(2, seed=5)[:, torch.randint(0, 2, (30,), generator=torch.Generator().manual_seed(n))]
    x = x.requires_grad_()
    beta = block.trace(x)["erase"]
    assert float(((beta < 0.01) | (beta > 1.99)).double().mean()) > 0.8
    expected = loop(block, x, n, factor=2, gated=family == "gdnproduct", official=False)
    y, _ = block(x)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    leaves = [x, *block.parameters()]
    ours, theirs = (torch.autograd.grad(z.square().sum(), leaves) for z in (y, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("conv", ["none", "static", "dynamic-lowrank", "dynamic-headwise", "gate"])
def test_every_convolution_and_bfloat16(conv):
    block = make("gdnproduct[3]-neg", conv=conv)
    x = tokens(9)
    y, state = block(x)
    steps, now = [], block.initial_state(B)
    assert {key: value.shape for key, value in now.items()} == {k: v.shape for k, v in state.items()}
    for t in range(9):
        y_t, now = block.step(x[:, t], now)
        steps.append(y_t)
    torch.testing.assert_close(torch.stack(steps, 1), y, rtol=1e-9, atol=1e-9)
    narrow, state = block.bfloat16()(x.bfloat16())
    assert narrow.dtype == torch.bfloat16 and state["memory"].dtype == torch.float32
    off = (narrow.double() - y).norm(dim=-1) / y.norm(dim=-1)
    assert float(off.median().detach()) < 0.03  # a key that is nearly 0 before its norm has no digits left


@pytest.mark.parametrize("neg", ["", "-neg"])
@pytest.mark.parametrize("outer", ["common", "official"])
@pytest.mark.parametrize(("product", "base"), [("deltaproduct[1]", "deltanet"), ("gdnproduct[1]", "gdn")])
def test_one_step_is_the_delta_rule_bit_for_bit(product, base, outer, neg):
    one, plain = make(product + neg, outer), make(base + neg, outer, seed=1)
    plain.load_state_dict(one.state_dict())
    x = tokens(70)
    (y, state), (same, same_state) = one(x), plain(x)
    assert torch.equal(y, same)
    assert all(torch.equal(state[key], same_state[key]) for key in same_state)


@pytest.mark.parametrize(
    "name", ["deltaproduct[2]-neg", "deltaproduct[3]", "gdnproduct[3]-neg", "gdnproduct[4]"]
)
@pytest.mark.parametrize("length", [16, 21, 22, 32, 33])
def test_chunks_cut_between_micro_steps(name, length, monkeypatch):
    """M = T n around multiples of the chunk of 64 (16 with a decay by channel): as the reference, gradients
    included, with gates at their ends."""
    block = make(name, spread=3.0)  # gates saturate: beta 0 or 2, decay 0 or 1
    x = tokens(length).requires_grad_()
    found = {}
    for backend in ("reference", "chunked"):
        monkeypatch.setenv("ARENA_BACKEND", backend)
        y, state = block(x)
        loss = (y * torch.linspace(0.5, 1.5, length, dtype=y.dtype)[:, None]).sum() + state["memory"].sum()
        found[backend] = (y, state["memory"], *torch.autograd.grad(loss, [x, *block.parameters()]))
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    "gates",
    [
        dict(decay="channel", erase="channel", write="channel", coupling="free", erase_range=2),
        dict(decay="scalar", signed=True, erase="scalar", erase_value=2.0, write="one", coupling="free"),
        dict(coupling="dial", dial=0.5),
        dict(decay="mean", erase="mean", write="scalar", write_value=0.5, coupling="free"),
        dict(erase="none", write="scalar", coupling="free", normaliser="max_abs"),
        dict(erase="scalar", write="channel", coupling="free", write_on="correction"),
    ],
)
def test_micro_steps_at_other_points_of_gate_space(gates):
    """Any point takes micro-steps: its trace, run through the recurrence, gives what is read."""
    block = make("deltaproduct[3]", gates=gates)
    x = tokens(6)
    trace = block.trace(x, states=True)
    K, V = block.key_dim, block.value_dim
    S = torch.zeros(B, H, K, V, dtype=torch.float64)
    total = torch.zeros(B, H, K, 1, dtype=torch.float64)
    correction = gates.get("write_on") == "correction"
    erase = block.gate(x).erase[..., None] if correction else trace["erase"]
    for m in range(18):
        k, v, write, decay, e = (
            y[:, m] for y in (trace["k"], trace["v"], trace["write"], trace["decay"], erase)
        )
        S, total = decay[..., None] * S, decay[..., None] * total
        old = torch.einsum("bhk,bhkv->bhv", e * k, S)
        new = write * (v - old) if correction else write * v - old
        S = S + k[..., None] * new[..., None, :]
        total = total + (k * write)[..., None]
        if m % 3 == 2:
            q = trace["q"][:, m // 3]
            read = torch.einsum("bhk,bhkv->bhv", q, S)
            if "normaliser" in trace:
                read = read / torch.einsum("bhk,bhkv->bhv", q, total).abs().clamp_min(1.0)
            torch.testing.assert_close(trace["read"][:, m // 3], read, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(trace["state"][:, m // 3], S, rtol=1e-9, atol=1e-9)
    assert bool((trace["decay"].unflatten(1, (6, 3))[:, :, 1:] == 1).all())


def test_a_token_with_one_live_step_is_a_delta_rule_token():
    """beta = 0 at all micro-steps but one leaves DeltaNet with that step's key and value."""
    block = make("deltaproduct[3]", conv="none")
    with torch.no_grad():
        block.gate.erase.weight.zero_()
        block.gate.erase.weight.view(3, H, D)[::2, :, 0] = -200.0
    x = tokens(9)
    x[..., 0] = 1.0
    plain, K = make("deltanet", conv="none", seed=1), block.key_dim
    q, k, v = (
        part.view(n, H * K, D)
        for part, n in zip(block.qkv.weight.split(block.widths), (1, 3, 3), strict=True)
    )
    state = block.state_dict() | {
        "qkv.weight": torch.cat([q[0], k[1], v[1]]),
        "gate.erase.weight": torch.zeros(H, D, dtype=torch.float64),
    }
    plain.load_state_dict(state)
    torch.testing.assert_close(block(x)[0], plain(x)[0], rtol=1e-12, atol=1e-12)


def test_state_and_parameters_count():
    plain, product = make("deltanet"), make("deltaproduct[3]")
    assert product.state_bytes() - plain.state_bytes() == 3 * 4 * D * 8  # 2 more k and v, 3 rows, float64
    assert product(tokens(3))[1]["memory"].shape == plain(tokens(3))[1]["memory"].shape
    config = dict(vocab_size=5, n_classes=5, d_model=16)
    small, large = (
        build_model(ModelConfig(arch=a, **config), seed=0) for a in ("deltanet", "deltaproduct[2]")
    )
    per_layer = 2 * 16 * 16 + 2 * 16 * 4 + 2 * 16  # k and v, their taps, beta of two heads
    assert model_params(large) - model_params(small) == 2 * per_layer


NAMES = {
    "deltaproduct": "write deltaproduct[n] or deltaproduct[n]-neg with its number, such as deltaproduct[2]",
    "deltaproduct-neg": "or deltaproduct[n]-neg with its number, such as deltaproduct[2]-neg",
    "gdnproduct-neg[2]": "or gdnproduct[n]-neg with its number, such as gdnproduct[2]-neg",
    "deltaproduct[0]": "n of deltaproduct[n] is in 1..64",
    "deltaproduct[65]-neg": "n of deltaproduct[n]-neg is in 1..64",
    "deltaproduct[02]": "write deltaproduct[n] or deltaproduct[n]-neg with its number",
    "deltaproduct[two]": "write deltaproduct[n] or deltaproduct[n]-neg with its number",
    "deltaproduct[2": "write deltaproduct[n] or deltaproduct[n]-neg with its number",
    "deltaproduct[-1]": "write deltaproduct[n] or deltaproduct[n]-neg with its number",
    "deltaproduct[2]-pos": "write deltaproduct[n] or deltaproduct[n]-neg with its number",
    "deltapoduct[2]": "did you mean deltaproduct[2]",
    "deltanet[2]": "did you mean deltanet",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_are_none_say_what_is_right(name):
    for call in (
        lambda: build_block(name, d_model=D, n_heads=H),
        lambda: block_options(name),
        lambda: parse_arch(name, 2),
        lambda: parse_arch(f"{name}+swa", 2),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert NAMES[name] in str(error.value)
        assert "\n" not in str(error.value)


def test_names():
    shown = {"deltaproduct[2]", "deltaproduct[2]-neg", "gdnproduct[2]", "gdnproduct[2]-neg"}
    assert shown <= set(block_names()) and shown <= set(arch_names())
    assert parse_arch("deltaproduct[7]-neg+swa", 3) == ["deltaproduct[7]-neg", "swa", "deltaproduct[7]-neg"]
    assert block_options("gdnproduct[9]") == block_options("gdn")
    block = make("gdnproduct[64]-neg")
    assert isinstance(block, MatrixMemoryBlock) and block.micro_steps == 64


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (dict(micro_steps=0), "micro_steps must be an integer in 1..64"),
        (dict(micro_steps=65), "micro_steps must be an integer in 1..64"),
        (dict(micro_steps=2.0), "micro_steps must be an integer in 1..64"),
        (dict(micro_steps=True), "micro_steps must be an integer in 1..64"),
        (dict(micro_steps=2, decay="scalar", write="scalar", coupling="step"), "one micro-step"),
        (dict(micro_steps=2, decay="scalar", write="scalar", coupling="complement"), "one micro-step"),
        (
            dict(
                micro_steps=2,
                decay="scalar",
                decay_form="sigmoid",
                write="exponential",
                normaliser="max_abs",
            ),
            "exponential write has one micro-step",
        ),
    ],
)
def test_points_without_micro_steps_say_why(fields, reason):
    with pytest.raises(ValueError, match=reason):
        GateSpec(**fields)


@pytest.mark.parametrize("arch", ["deltaproduct[2]-neg", "gdnproduct[2]-neg"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_layer_solves_s3_by_hand(arch, dtype):
    model = s3_model(arch).to(dtype)
    task = synthetic_tasks.get("s3")
    batch = task.sample(8, 1024, split="test")
    logits, _ = model(batch.tokens)
    assert bool((logits.argmax(-1) == batch.targets).all())
    best = logits.topk(2, -1).values
    assert float((best[..., 0] - best[..., 1]).min().detach()) > 0.1


@pytest.mark.parametrize(
    ("name", "change"),
    [("one factor", "first"), ("range 1", "range")],
)
def test_s3_by_hand_needs_both_factors_and_the_range(name, change):
    """Without the second reflection, or with beta up to 1, the same weights fail: the test can fail."""
    model = s3_model()
    with torch.no_grad():
        if change == "first":
            model.blocks[0].gate.erase.weight.view(2, -1)[1] = -40.0
        else:
            model.blocks[0].gate.spec = model.blocks[0].spec.replace(erase_range=1)
    batch = synthetic_tasks.get("s3").sample(8, 128, split="test")
    right = model(batch.tokens)[0].argmax(-1) == batch.targets
    assert float(right.double().mean()) < 0.6
