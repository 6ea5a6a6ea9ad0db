"""RWKV-7 against the equations of its paper, in the paper's own orientation, with all gradients."""

from __future__ import annotations

import math

import pytest
import torch

from arena.blocks import build_block
from arena.blocks.rwkv7 import rank_of
from arena.dynamics import edited, measure, parse_edit
from arena.dynamics.hooks import gates_of
from arena.dynamics.state import writing_step
from arena.model import ModelConfig, build_model
from synthetic_tasks import Writes

D, H, B = 8, 2, 2
N = D // H


def make(outer, *, seed=0, spread=0.3, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        block = build_block("rwkv7", d_model=D, n_heads=H, outer=outer, depth=0.5, **options)
        for parameter in block.parameters():
            parameter.data.add_(spread * torch.randn_like(parameter))
    return block.double()


def tokens(length, seed=0):
    return torch.randn(B, length, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sigmoid(x):
    return torch.sigmoid(x)


def rows(x, h):
    return x[h * N : (h + 1) * N]


def wkv(state, w, removal, a, replacement, v):
    """wkv_t = wkv_{t-1} (diag(w) - c^T (a * c)) + v^T k, of row vectors; wkv is V x K (section 4)."""
    return state @ (torch.diag(w) - torch.outer(removal, a * removal)) + torch.outer(v, replacement)


def gates(p, x_w, x_a):
    """w and a [D] of a token, from x as each of them sees it."""
    d = torch.tanh(x_w @ p["rates.decay.down"]) @ p["rates.decay.up"] + p["rates.decay.bias"]
    z = x_a @ p["rates.rate.down"] @ p["rates.rate.up"] + p["rates.rate.bias"]
    return torch.exp(-math.exp(-0.5) * sigmoid(d)), sigmoid(z)


def unit(x, eps=1e-6):
    return x / torch.sqrt((x * x).sum() + eps)


def head_step(p, state, h, k, v, w, a, eps):
    removal = unit(k * p["rates.xi"][h], eps)
    replacement = k * (1 + (a - 1) * p["rates.alpha"][h])
    return wkv(state, w, removal, a, replacement, v), replacement


def official(block, x):
    p = dict(block.named_parameters())
    outputs = []
    for sequence in x:
        states = [torch.zeros(N, N, dtype=x.dtype) for _ in range(H)]
        before, ys = torch.zeros(D, dtype=x.dtype), []
        for u in sequence:
            x_r, x_w, x_k, x_v, x_a, x_g = (u + (before - u) * mu for mu in p["shift"])
            r, k, v = (
                p[f"{name}.weight"] @ z for name, z in (("receptance", x_r), ("key", x_k), ("value", x_v))
            )
            w, a = gates(p, x_w, x_a)
            g = sigmoid(x_g @ p["output_map.down"]) @ p["output_map.up"]
            out = []
            for h in range(H):
                states[h], k_new = head_step(p, states[h], h, *(rows(z, h) for z in (k, v, w, a)), eps=1e-12)
                read = states[h] @ rows(r, h)
                read = (read - read.mean()) / torch.sqrt(((read - read.mean()) ** 2).mean() + N * 1e-5)
                read = read * p["norm_weight"][h] + p["norm_bias"][h]
                out.append(read + (rows(r, h) * p["bonus"][h] * k_new).sum() * rows(v, h))
            ys.append(p["out.weight"] @ (g * torch.cat(out)))
            before = u
        outputs.append(torch.stack(ys))
    return torch.stack(outputs)


def common(block, x):
    p = dict(block.named_parameters())
    outputs = []
    for sequence in x:
        raw = sequence @ p["qkv.weight"].T
        states = [torch.zeros(N, N, dtype=x.dtype) for _ in range(H)]
        ys = []
        for t, u in enumerate(sequence):
            lags = sum(p["conv.weight"][j] * raw[t - j] for j in range(4) if t >= j)
            q, k, v = (lags * sigmoid(lags)).split(D)
            w, a = gates(p, u, u)
            out = []
            for h in range(H):
                key = unit(rows(k, h))
                states[h], _ = head_step(p, states[h], h, key, *(rows(z, h) for z in (v, w, a)), eps=1e-6)
                read = states[h] @ unit(rows(q, h)) / math.sqrt(N)
                read = read / torch.sqrt((read * read).mean() + 1e-5) * p["norm.weight"]
                g = rows(p["gate_out.linear.weight"] @ u, h)
                out.append(read * g * sigmoid(g))
            ys.append(p["out.weight"] @ torch.cat(out))
        outputs.append(torch.stack(ys))
    return torch.stack(outputs)


LOOPS = {"official": official, "common": common}


def compare(block, loop, x, rtol=1e-9, atol=1e-9):
    expected, (y, _) = loop(block, x), block(x)
    probe = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    leaves = [x, *block.parameters()]
    ours, theirs = (torch.autograd.grad((z * probe).sum(), leaves) for z in (y, expected))
    torch.testing.assert_close(y, expected, rtol=rtol, atol=atol)
    for name, a, b in zip(["x", *(name for name, _ in block.named_parameters())], ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("outer", LOOPS)
@pytest.mark.parametrize("length", [1, 5, 9])
def test_is_the_recurrence_of_the_paper_with_all_gradients(outer, length):
    compare(make(outer, seed=length), LOOPS[outer], tokens(length).requires_grad_())


@pytest.mark.parametrize("outer", LOOPS)
@pytest.mark.parametrize("case", ["a near 0", "a near 1", "a of one channel", "w at its ends", "no a at all"])
def test_gates_at_their_ends(outer, case):
    """1 / a is in the erase of the first micro-step: neither values nor gradients may feel it."""
    block = make(outer)
    with torch.no_grad():
        a, d = block.rates.rate.bias, block.rates.decay.bias
        if case == "a near 0":
            a.fill_(-20.0)
        elif case == "a near 1":
            a.fill_(20.0)
        elif case == "a of one channel":
            a.fill_(-20.0)
            a[1], a[N] = 20.0, 20.0
        elif case == "w at its ends":
            d[::2], d[1::2] = -60.0, 60.0
        else:
            a.fill_(-800.0)  # sigmoid is 0: clamped, so that nothing is deleted
    compare(block, LOOPS[outer], tokens(6).requires_grad_(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("outer", LOOPS)
def test_a_removal_key_of_zero_deletes_nothing(outer):
    block = make(outer)
    x = tokens(5)
    x[:, 2:4] = 0.0
    y, state = block(x)
    y.sum().backward()
    assert y.isfinite().all() and state["memory"].isfinite().all()
    assert all(p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.parametrize("outer", LOOPS)
@pytest.mark.parametrize("bias", [-12.0, 0.0, 12.0])
def test_float32_is_float64_to_its_digits(outer, bias):
    """Gradients too, where a runs from 1e-8 to 1 within a head."""
    block = make(outer)
    with torch.no_grad():
        block.rates.rate.bias.copy_(torch.linspace(-18.0, 4.0, D) if bias == 0.0 else torch.full((D,), bias))
    found = {}
    for dtype in (torch.float64, torch.float32):
        now = build_block("rwkv7", d_model=D, n_heads=H, outer=outer, depth=0.5)
        now.load_state_dict(block.state_dict())
        now = now.to(dtype)
        y, _ = now(tokens(40).to(dtype))
        y.square().sum().backward()
        found[dtype] = [y.detach().double(), *(p.grad.double() for p in now.parameters())]
    largest = max(float(wide.norm()) for wide in found[torch.float64])
    for wide, narrow in zip(*found.values(), strict=True):  # 1 - a has few digits where a is nearly 1
        assert float((wide - narrow).norm()) < 3e-5 * float(wide.norm()) + 1e-6 * largest


@pytest.mark.parametrize("outer", LOOPS)
@pytest.mark.parametrize("length", [31, 32, 33])
def test_chunked_is_the_reference(outer, length, monkeypatch):
    block, x = make(outer), tokens(length)
    found = {}
    for backend in ("reference", "chunked"):
        monkeypatch.setenv("ARENA_BACKEND", backend)
        y, state = block(x)
        loss = (y * torch.linspace(0.5, 1.5, length, dtype=y.dtype)[:, None]).sum() + state["memory"].sum()
        found[backend] = (y, state["memory"], *torch.autograd.grad(loss, list(block.parameters())))
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("outer", LOOPS)
@pytest.mark.parametrize("conv", ["none", "static", "dynamic-lowrank", "dynamic-headwise", "gate"])
def test_every_convolution_and_bfloat16(outer, conv):
    block = make(outer, conv=conv).bfloat16()
    x = tokens(6).bfloat16()
    y, state = block(x)
    assert y.dtype == torch.bfloat16 and y.isfinite().all() and state["memory"].dtype == torch.float32
    assert set(state) == set(block.initial_state(B))
    y_t, after = block.step(x[:, 0], block(x)[1])
    assert y_t.shape == (B, D) and set(after) == set(state)


def test_initial_values_are_those_of_the_authors():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, last = (
            build_block("rwkv7", d_model=64, n_heads=2, outer="official", depth=depth, n_blocks=4)
            for depth in (0.0, 1.0)
        )
    place = torch.arange(64) / 64
    torch.testing.assert_close(first.shift[1], 1 - place**0.9)
    torch.testing.assert_close(last.shift[0], 1 - place**0.05)
    first, last = first.requires_grad_(False), last.requires_grad_(False)
    assert float(last.norm_weight[0, 0]) == 1.0 and float(first.norm_weight[0, 0]) == pytest.approx(0.25**0.7)
    assert float(first.out.weight.abs().max()) == 0.0
    assert 0.04 / 8 < float(first.key.weight.abs().max()) <= 0.05 / 8
    w0 = first.rates.decay.bias  # -6 + 6 (n / 63) + 0.5 + 2.5 zigzag
    assert float(w0[0]) == pytest.approx(-8.0) and float(w0[63]) == pytest.approx(3.0)
    assert float(last.rates.decay.bias[31]) == pytest.approx(-5.5 + 6 * (31 / 63) ** 2 + 2.5)
    assert float(first.rates.rate.bias[63]) == pytest.approx(-0.19 + 0.3 + 0.2)
    assert float(first.rates.xi[0, 0]) == pytest.approx(0.76)
    assert float(first.rates.alpha[0, 0]) == pytest.approx(1.02)
    assert (rank_of(64, 2.5), rank_of(768, 2.5), rank_of(768, 5), rank_of(2048, 2.5)) == (32, 64, 128, 128)


def test_what_is_wrong_says_so():
    with pytest.raises(ValueError, match="n_blocks belongs to the official RWKV-7 layer"):
        make("common", n_blocks=2)
    with pytest.raises(ValueError, match="n_blocks must be at least 1, got 0"):
        make("official", n_blocks=0)
    with pytest.raises(ValueError, match="has no option 'gates'"):
        build_block("rwkv7", d_model=D, n_heads=H, gates={"erase": "none"})


@pytest.mark.parametrize("outer", LOOPS)
def test_dynamics_of_two_unlike_micro_steps(outer):
    """The transition is w - (a c) c^T; the second micro-step is the one that writes."""
    block, x = make(outer), tokens(12)
    trace = block.trace(x)
    assert writing_step(trace) == 1
    into_w, into_a = (x, x)
    if outer == "official":
        off = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1) - x
        into_w, into_a = x + off * block.shift[1], x + off * block.shift[4]
    p = dict(block.named_parameters())
    frame = measure(block, x, quantities=["transition", "gates", "retention", "edit"], points=None, chunk=5,
                    writes=Writes(*torch.tensor([[0, 2, 2, 0], [0, 9, 9, 0]]).unbind(1)))  # fmt: skip
    for t, h in ((0, 0), (7, 1)):
        w, a = (rows(z, h) for z in gates(p, into_w[0, t], into_a[0, t]))
        # c from the key that is deleted at: u is a * c over its length
        u = trace["k"][0, 2 * t, h]
        removal = u / a
        removal = removal / removal.norm()
        matrix = torch.diag(w) - torch.outer(a * removal, removal)
        matrix = matrix.detach()
        found = frame.filter(quantity="eigenvalue_min", head=h, sequence=0, token=t)["value"].to_list()
        assert found == pytest.approx([float(torch.linalg.eigvals(matrix).real.min())], abs=1e-5)
    decays = frame.filter(quantity="half_life", head=0)["value"].to_list()
    log_w = trace["log_decay"][:, ::2, 0].mean()
    assert decays == pytest.approx([math.log(2) / -float(log_w.detach())])
    writes = frame.filter(quantity="write", statistic="mean", role="all", head=0).sort("micro")
    assert writes["value"].to_list() == [0.0, 1.0]
    assert frame.filter(quantity="old_value_left")["value"].is_not_null().all()
    assert gates_of(block)[:2] == ["decay", "erase"] and "write" not in gates_of(block)
    with edited(block, [parse_edit("erase:freeze:0.5")], {}):
        changed = block.trace(x)["erase"].unflatten(1, (12, 2))
    assert bool((changed[:, :, 0] == 0.5).all()) and bool((changed[:, :, 1] == 0).all())


def test_a_model_of_it_learns_and_steps():
    config = ModelConfig(arch="rwkv7+swa", vocab_size=5, n_classes=5, d_model=16, outer="official")
    model = build_model(config, seed=0)
    tokens_in = torch.randint(0, 5, (2, 9), generator=torch.Generator().manual_seed(0))
    logits, _ = model(tokens_in)
    state, steps = model.initial_state(2), []
    for t in range(9):
        y, state = model.step(tokens_in[:, t], state)
        steps.append(y)
    torch.testing.assert_close(torch.stack(steps, 1), logits, rtol=1e-4, atol=1e-5)
