"""Short convolutions against naive loops that share no code with them."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import grad, vmap

from kernels import dynamic_short_conv, short_conv

F64 = torch.float64


def rand(*shape, seed=0):
    g = torch.Generator().manual_seed(seed + 7919 * sum((i + 1) * n for i, n in enumerate(shape)))
    return torch.randn(*shape, dtype=F64, generator=g).requires_grad_()


def naive(x, taps, state, activation, residual, offset=None):
    """taps [B,T,W,D]; scalar loops over tokens and lags."""
    B, T, D = x.shape
    W = taps.shape[2]
    past = torch.zeros(B, W - 1, D, dtype=x.dtype) if state is None else state
    rows = torch.cat([past, x], 1)
    ys = []
    for t in range(T):
        y = torch.zeros(B, D, dtype=x.dtype) if offset is None else offset.expand(B, D)
        for lag in range(W):
            y = y + taps[:, t, lag] * rows[:, W - 1 + t - lag]
        if activation == "silu":
            y = y / (1 + torch.exp(-y))
        ys.append(y + x[:, t] if residual else y)
    return torch.stack(ys, 1), rows[:, T:]


def same(got, want, inputs, seed=11):
    """Outputs, and the gradient of a random functional of all outputs with respect to every input."""
    g = torch.Generator().manual_seed(seed)
    probes = [torch.randn(w.shape, dtype=F64, generator=g) for w in want]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)
    grads = [
        torch.autograd.grad(
            sum((o * p).sum() for o, p in zip(outs, probes, strict=True)),
            inputs,
            allow_unused=True,
            retain_graph=True,
            materialize_grads=True,
        )
        for outs in (got, want)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("backend", ["fused", "reference", "auto"])
@pytest.mark.parametrize(
    "W,T,D", [(1, 5, 3), (2, 1, 1), (3, 7, 5), (4, 9, 6), (4, 2, 3), (4, 3, 2), (8, 3, 4), (8, 20, 3)]
)
@pytest.mark.parametrize(
    "activation,residual,with_state,with_bias",
    [
        (None, False, False, False),
        ("silu", True, True, True),
        ("silu", False, False, True),
        (None, True, True, False),
    ],
)
def test_static_matches_a_naive_loop(backend, W, T, D, activation, residual, with_state, with_bias):
    x, weight = rand(2, T, D), rand(W, D)
    bias = rand(D) if with_bias else None
    state = rand(2, W - 1, D) if with_state else None
    got = short_conv(
        x, weight, bias=bias, activation=activation, residual=residual, initial_state=state, backend=backend
    )
    want = naive(x, weight.expand(2, T, W, D), state, activation, residual, bias)
    same(got, want, [a for a in (x, weight, bias, state) if a is not None])


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("W,T,D,G,R", [(1, 4, 4, 2, 1), (4, 9, 6, 3, 2), (4, 2, 6, 6, 5), (8, 5, 4, 1, 3)])
@pytest.mark.parametrize("form", ["low-rank", "head-wise"])
@pytest.mark.parametrize(
    "activation,residual,with_state,with_bias", [(None, True, False, True), ("silu", False, True, False)]
)
def test_dynamic_matches_a_naive_loop(
    backend, W, T, D, G, R, form, activation, residual, with_state, with_bias
):
    x, state = rand(2, T, D), rand(2, W - 1, D) if with_state else None
    bias = rand(W, D) if with_bias else None
    static = bias if with_bias else torch.zeros(W, D, dtype=F64)
    if form == "low-rank":
        z, u = rand(2, T, R), rand(R, W, D)
        taps = torch.einsum("btr,rwd->btwd", z, u) + static
        arguments, inputs = {"z": z, "u": u}, [z, u]
    else:
        filters = rand(2, T, W, G)
        taps = torch.stack([filters[..., d // (D // G)] for d in range(D)], -1) + static
        arguments, inputs = {"filters": filters}, [filters]
    got = dynamic_short_conv(
        x,
        **arguments,
        bias=bias,
        activation=activation,
        residual=residual,
        initial_state=state,
        backend=backend,
    )
    want = naive(x, taps, state, activation, residual)
    same(got, want, [x, *inputs, *(a for a in (bias, state) if a is not None)])


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("cuts", [(3, 6), (1, 2), (0, 9), (9, 0), (5, 4)])
def test_two_halves_joined_by_the_state_are_the_whole(backend, cuts):
    T = sum(cuts)
    x, weight, z, u = rand(2, T, 4), rand(4, 4), rand(2, T, 3), rand(3, 4, 4)
    for run in (
        lambda s, state: short_conv(x[:, s], weight, activation="silu", initial_state=state, backend=backend),
        lambda s, state: dynamic_short_conv(
            x[:, s], z=z[:, s], u=u, bias=weight, initial_state=state, backend=backend
        ),
    ):
        whole, end = run(slice(0, T), None)
        first, state = run(slice(0, cuts[0]), None)
        second, last = run(slice(cuts[0], T), state)
        same((torch.cat([first, second], 1), last), (whole, end), [x])
        state, steps = None, []
        for t in range(T):
            y, state = run(slice(t, t + 1), state)
            steps.append(y)
        same((torch.cat(steps, 1), state), (whole, end), [x])


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("shared", ["nothing", "x", "weight"])
def test_vmap_equals_a_loop_over_replicas(backend, shared):
    R = 3
    x = rand(2, 6, 4) if shared == "x" else rand(R, 2, 6, 4)
    weight = rand(3, 4) if shared == "weight" else rand(R, 3, 4)
    bias, state = rand(R, 4), rand(2, R, 2, 4)
    dims = (None if shared == "x" else 0, None if shared == "weight" else 0, 0, 1)

    def run(x, weight, bias, state):
        return short_conv(
            x, weight, bias=bias, activation="silu", residual=True, initial_state=state, backend=backend
        )

    got = vmap(run, in_dims=dims)(x, weight, bias, state)
    pieces = [
        run(x if shared == "x" else x[r], weight if shared == "weight" else weight[r], bias[r], state[:, r])
        for r in range(R)
    ]
    same(got, [torch.stack(p) for p in zip(*pieces, strict=True)], [x, weight, bias, state])

    def loss(weight, x, bias, state):
        return run(x, weight, bias, state)[0].square().sum()

    got = vmap(grad(loss), in_dims=(dims[1], dims[0], 0, 1))(weight, x, bias, state)
    for r in range(R):
        w = (weight if shared == "weight" else weight[r]).detach().requires_grad_()
        want = torch.autograd.grad(loss(w, x if shared == "x" else x[r], bias[r], state[:, r]), w)[0]
        torch.testing.assert_close(got[r], want, atol=1e-11, rtol=1e-11)


def test_dynamic_under_vmap_equals_a_loop():
    x, z, u, filters = rand(3, 2, 6, 4), rand(3, 2, 6, 2), rand(3, 2, 3, 4), rand(3, 2, 6, 3, 2)
    got = vmap(lambda x, z, u: dynamic_short_conv(x, z=z, u=u))(x, z, u)
    pieces = [dynamic_short_conv(x[r], z=z[r], u=u[r]) for r in range(3)]
    same(got, [torch.stack(p) for p in zip(*pieces, strict=True)], [x, z, u])
    got = vmap(lambda x, f: dynamic_short_conv(x, filters=f))(x, filters)
    pieces = [dynamic_short_conv(x[r], filters=filters[r]) for r in range(3)]
    same(got, [torch.stack(p) for p in zip(*pieces, strict=True)], [x, filters])


def test_an_empty_sequence_keeps_the_state():
    state = rand(2, 3, 4)
    y, after = short_conv(rand(2, 0, 4), rand(4, 4), initial_state=state)
    assert y.shape == (2, 0, 4)
    assert torch.equal(after, state)


def test_only_gradients_that_are_asked_for():
    x, weight = rand(2, 6, 4), rand(3, 4)
    y = short_conv(x.detach(), weight)[0].sum()
    (dweight,) = torch.autograd.grad(y, weight)
    assert torch.allclose(dweight[2], x[:, :4].sum((0, 1)))
    (dx,) = torch.autograd.grad(short_conv(x, weight.detach())[0].sum(), x)
    assert torch.allclose(dx[:, 0], weight.sum(0).expand(2, 4))


def test_half_precision_is_computed_in_fp32():
    x, weight = rand(2, 50, 8).detach().bfloat16(), rand(4, 8).detach().bfloat16()
    y, state = short_conv(x, weight, activation="silu")
    want, _ = naive(x.double(), weight.double().expand(2, 50, 4, 8), None, "silu", False)
    assert y.dtype == state.dtype == torch.bfloat16
    assert (y.double() - want).abs().max() < 2**-8 * want.abs().max()


def test_large_values_in_silu_stay_finite():
    x = torch.tensor([-1e4, -60.0, 60.0, 1e4], dtype=F64).reshape(1, 4, 1).requires_grad_()
    y, _ = short_conv(x, torch.ones(1, 1, dtype=F64), activation="silu")
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.isfinite(y).all()
    torch.testing.assert_close(dx.flatten()[2:], torch.ones(2, dtype=F64))
    assert math.isclose(y[0, 3, 0].item(), 1e4)


@pytest.mark.parametrize(
    "change",
    [
        {"bias": torch.zeros(3)},
        {"activation": "relu"},
        {"backend": "cuda"},
        {"initial_state": torch.zeros(1, 4, 2)},
        {"weight": torch.zeros(4, 3)},
    ],
)
def test_what_does_not_fit_is_refused(change):
    arguments = {"x": torch.zeros(1, 5, 2), "weight": torch.zeros(4, 2), **change}
    with pytest.raises(ValueError):
        short_conv(arguments.pop("x"), arguments.pop("weight"), **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"z": torch.zeros(1, 5, 2)},
        {"z": torch.zeros(1, 5, 2), "u": torch.zeros(3, 4, 2)},
        {"filters": torch.zeros(1, 5, 4, 3)},
        {"filters": torch.zeros(1, 5, 4, 2), "bias": torch.zeros(2)},
    ],
)
def test_dynamic_forms_that_do_not_fit_are_refused(arguments):
    with pytest.raises(ValueError):
        dynamic_short_conv(torch.zeros(1, 5, 2), **arguments)


def test_the_environment_chooses_the_default_backend(monkeypatch):
    monkeypatch.setenv("ARENA_BACKEND", "reference")
    x, weight = rand(1, 4, 2), rand(2, 2)
    assert "ShortConv" not in short_conv(x, weight)[0].grad_fn.name()
    monkeypatch.setenv("ARENA_BACKEND", "triton")
    with pytest.warns(RuntimeWarning, match="'fused' runs in its place"):
        y, _ = short_conv(x, weight)
    assert y.shape == x.shape
