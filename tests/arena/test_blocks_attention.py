"""The attention blocks against a loop over queries, with rotary positions as products of complex numbers."""

from __future__ import annotations

import math

import pytest
import torch

from arena.blocks import build_block

D, H, K = 8, 2, 4
F64 = torch.float64


def make(name="attention", outer="official", d_model=D, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = build_block(name, d_model=d_model, n_heads=H, outer=outer, **options)
        for parameter in block.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return block.to(F64)


def tokens(T, seed=0, batch=2, d_model=D):
    return torch.randn(batch, T, d_model, dtype=F64, generator=torch.Generator().manual_seed(seed))


def rotated(x, position, theta=10000.0):
    """One head's vector: channel j of the first half and of the second are a complex number that turns."""
    half = len(x) // 2
    angles = torch.tensor([position * theta ** (-j / half) for j in range(half)], dtype=F64)
    z = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag])


def loop(block, x, window):
    weight = dict(block.named_parameters())
    out = []
    for row in x:
        q, k, v = (row @ weight["qkv.weight"].T).split(D, -1)
        ys = []
        for t in range(len(row)):
            first = max(0, t - window + 1)
            heads = []
            for h in range(H):
                part = slice(h * K, (h + 1) * K)
                query = rotated(q[t, part], t)
                scores = torch.stack(
                    [query @ rotated(k[s, part], s) for s in range(first, t + 1)]
                ) / math.sqrt(K)
                heads.append(torch.softmax(scores, 0) @ v[first : t + 1, part])
            ys.append(weight["out.weight"] @ torch.cat(heads))
        out.append(torch.stack(ys))
    return torch.stack(out)


@pytest.mark.parametrize("window", [None, 1, 3, 50])
def test_official_is_llama_attention(window):
    block = make() if window is None else make("swa", window=window)
    x = tokens(9)
    torch.testing.assert_close(block(x)[0], loop(block, x, window or 100), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("outer", ["common", "official"])
@pytest.mark.parametrize("window", [1, 2, 4, 9])
def test_a_window_joins_halves_and_steps(outer, window):
    block, x = make("swa", outer, window=window), tokens(12)
    whole, end = block(x)
    for cut in (1, 5, 11):
        first, state = block(x[:, :cut])
        assert state["k"].shape[1] == state["v"].shape[1] == min(cut, window - 1)
        second, state = block(x[:, cut:], state)
        torch.testing.assert_close(torch.cat([first, second], 1), whole, atol=1e-10, rtol=1e-10)
        for key in end:
            torch.testing.assert_close(state[key], end[key])
    state = block.initial_state(2)
    for t in range(12):
        y, state = block.step(x[:, t], state)
        torch.testing.assert_close(y, whole[:, t], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("outer", ["common", "official"])
def test_a_window_forgets_what_is_outside(outer):
    block, x = make("swa", outer, conv="none", window=3), tokens(9)
    changed = x.clone()
    changed[:, 2] += 1
    same = (block(x)[0] == block(changed)[0]).all(-1).all(0)
    assert same.tolist() == [True, True, False, False, False, True, True, True, True]


def test_memory_grows_or_stays():
    full, window = make(), make("swa", window=4)
    token = 2 * D * 8
    assert [full.state_bytes(n) for n in (0, 1, 7)] == [0, token, 7 * token]
    assert [window.state_bytes(n) for n in (0, 1, 3, 7)] == [0, token, 3 * token, 3 * token]


@pytest.mark.parametrize("name", ["attention", "swa"])
@pytest.mark.parametrize("conv", ["none", "static", "dynamic-lowrank", "dynamic-headwise", "gate"])
def test_every_convolution_joins_halves(name, conv):
    for outer in ("common", "official"):
        block, x = make(name, outer, conv=conv), tokens(7)
        whole, _ = block(x)
        first, state = block(x[:, :3])
        second, _ = block(x[:, 3:], state)
        torch.testing.assert_close(torch.cat([first, second], 1), whole, atol=1e-10, rtol=1e-10)


def test_trace_explains_the_output():
    for block in (make(), make("swa", "common", window=3)):
        x = tokens(6)
        past, state = block(x[:, :2])
        trace = block.trace(x[:, 2:], state)
        assert trace["attention"].shape[-2:] == (4, 6 if block.window is None else 4 + 2)
        torch.testing.assert_close(trace["attention"].sum(-1), torch.ones(2, H, 4, dtype=F64))
        read = trace["read"]
        if block.norm is not None:
            read = block.norm(read) * trace["output_gate"]
        whole = torch.cat([past, block.out(read.flatten(-2))], 1)
        torch.testing.assert_close(whole, block(x)[0], atol=1e-10, rtol=1e-10)


def test_an_odd_head_width_works():
    block, x = make(d_model=6), tokens(5, d_model=6)
    whole, _ = block(x)
    first, state = block(x[:, :2])
    torch.testing.assert_close(
        torch.cat([first, block(x[:, 2:], state)[0]], 1), whole, atol=1e-10, rtol=1e-10
    )


def test_common_scores_are_wide_enough_to_choose():
    """Keys and queries of length 1 would bound the scores by K^-0.5 and the weights to near uniform."""
    block = make(outer="common")
    scores = block.trace(tokens(20))["q"].norm(dim=-1)
    torch.testing.assert_close(scores, torch.full_like(scores, math.sqrt(K)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name,options",
    [("swa", {"window": 0}), ("attention", {"rope_theta": 0.5}), ("attention", {"window": 3})],
)
def test_bad_options_are_refused(name, options):
    with pytest.raises(ValueError):
        build_block(name, d_model=8, n_heads=2, **options)
