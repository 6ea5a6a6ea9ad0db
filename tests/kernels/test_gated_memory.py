"""gated_memory's fast path against its token loop: shapes, extreme gates, repeated keys, vmap, arguments."""

from __future__ import annotations

import random

import pytest
import torch
from torch.func import grad, jacrev, vmap

from kernels import gated_memory
from kernels.check import errors, gated_memory_inputs, outputs_and_gradients

BACKENDS = ("reference", "chunked")
FAST = "chunked"
KINDS = (None, "scalar", "channel")


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs_of(**options):
    return gated_memory_inputs(**options)


def run(inputs, backend, dtype=torch.float64, **more):
    return outputs_and_gradients(
        lambda **x: gated_memory(**x, backend=backend, **more), inputs, dtype=dtype, seed=1
    )


def fuzz_case(number):
    draw = random.Random(number)
    shape = (
        draw.randint(1, 3),
        draw.randint(1, 130),
        draw.randint(1, 3),
        draw.randint(1, 20),
        draw.randint(1, 20),
    )
    return {
        "shape": shape,
        "log_decay": draw.choice(KINDS),
        "erase": draw.choice(KINDS),
        "write": draw.choice(KINDS),
        "n_keys": draw.choice((None, 1, 2)),
        "extreme": draw.random() < 0.5,
        "seed": number,
    }


@pytest.mark.parametrize("number", range(24))
def test_fuzz_float64(number):
    case = fuzz_case(number)
    inputs = inputs_of(**case)
    worst = errors(run(inputs, FAST), run(inputs, "reference"))
    assert max(worst.values()) < 1e-9, (case, worst)


@pytest.mark.parametrize("number", range(100, 112))
def test_fuzz_float32(number):
    case = fuzz_case(number)
    inputs = inputs_of(**case)
    truth = run(inputs, "reference")
    loop_error = errors(run(inputs, "reference", torch.float32), truth)
    ours = errors(run(inputs, FAST, torch.float32), truth)
    for name, error in ours.items():
        assert error <= max(1e-5, 20 * loop_error[name]), (case, name, error, loop_error[name])


@pytest.mark.parametrize(
    ("n_keys", "erase_at", "kinds"),
    [
        (1, "two", (None, "scalar", "scalar")),
        (2, "two", (None, "channel", None)),
        (1, "two", ("channel", "scalar", None)),
        (2, "anywhere", ("channel", "channel", "channel")),
    ],
)
def test_repeated_keys_float32(n_keys, erase_at, kinds):
    """Parity: one or two keys, erase up to 2, T 1024. Where an inverse by doubling is wrong by 1e9."""
    inputs = inputs_of(
        shape=(1, 1024, 1, 16, 8), log_decay=kinds[0], erase=kinds[1], write=kinds[2], n_keys=n_keys, seed=5
    )
    if inputs["log_decay"] is not None:
        inputs["log_decay"] = (inputs["log_decay"] * 1e-3).float().double()
    z = rand(*inputs["erase"].shape, seed=6)
    erase = {
        "two": torch.full_like(z, 2.0),
        "saturating": 2 * (10 * z).sigmoid(),
        "anywhere": 2 * z.sigmoid(),
    }
    inputs["erase"] = erase[erase_at].float().double()
    truth = run(inputs, "reference")
    loop_error = errors(run(inputs, "reference", torch.float32), truth)
    ours = errors(run(inputs, FAST, torch.float32), truth)
    for name, error in ours.items():
        assert error <= max(1e-5, 20 * loop_error[name]), (name, error, loop_error[name])
    assert max(errors(run(inputs, FAST), truth).values()) < 1e-9


@pytest.mark.parametrize("kind", ("scalar", "channel"))
@pytest.mark.parametrize("log_decay", (-torch.inf, -1e30, -1e5, -200.0, -80.0, -30.0, 0.0))
def test_constant_extreme_decay(kind, log_decay):
    inputs = inputs_of(shape=(1, 70, 1, 4, 3), log_decay=kind, seed=3)
    inputs["log_decay"] = torch.full_like(inputs["log_decay"], log_decay)
    for dtype, limit in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        worst = errors(run(inputs, FAST, dtype), run(inputs, "reference"))
        assert max(worst.values()) < limit, worst


def test_decay_zero_has_gradient_zero_and_forgets():
    inputs = inputs_of(shape=(2, 40, 2, 6, 5), extreme=True)
    gone = inputs["log_decay"] == -torch.inf
    assert gone.any()
    assert (run(inputs, FAST)["gradient of log_decay"][gone] == 0).all()
    inputs["log_decay"][:, 20] = -torch.inf
    before = dict(inputs)
    before["v"] = inputs["v"].clone()
    before["v"][:, :20] = 1e3 * rand(2, 20, 2, 5, seed=9)
    a, b = gated_memory(**inputs)[0], gated_memory(**before)[0]
    torch.testing.assert_close(a[:, 20:], b[:, 20:], rtol=0, atol=1e-12)


def test_later_tokens_do_not_reach_back():
    """Not even by rounding: outputs before t are the same bits whatever comes at t and after."""
    for kind in ("scalar", "channel"):
        x = {n: y.float() for n, y in inputs_of(shape=(2, 48, 2, 8, 8), log_decay=kind, seed=4).items()}
        other = {n: y.clone() for n, y in x.items()}
        for name in ("k", "v", "log_decay", "erase", "write"):
            other[name][:, 21:] *= 3.0
        a, b = gated_memory(**x)[0], gated_memory(**other)[0]
        assert torch.equal(a[:, :21], b[:, :21])
        assert not torch.equal(a[:, 21:], b[:, 21:])


@pytest.mark.parametrize("cut", (1, 16, 19, 49))
@pytest.mark.parametrize("signed", (False, True))
def test_two_halves_are_the_whole(cut, signed):
    inputs = inputs_of(shape=(2, 50, 2, 6, 5), extreme=True, seed=cut)
    sign = torch.where(rand(2, 50, 2, 6) < 0, -1.0, 1.0).double() if signed else None

    def halves(initial_state, **x):
        outputs, state = [], initial_state
        for part in (slice(0, cut), slice(cut, None)):
            signs = None if sign is None else sign[:, part]
            tokens = {name: y[:, part] for name, y in x.items()}
            o, state = gated_memory(**tokens, decay_sign=signs, initial_state=state)
            outputs.append(o)
        return torch.cat(outputs, 1), state

    whole = run(inputs, FAST, decay_sign=sign)
    assert max(errors(outputs_and_gradients(halves, inputs, seed=1), whole).values()) < 1e-12


def test_gradcheck():
    x = inputs_of(shape=(1, 19, 1, 3, 2), seed=11)
    leaves = [y.requires_grad_() for y in x.values()]
    assert torch.autograd.gradcheck(lambda *a: gated_memory(*a[:6], initial_state=a[6]), leaves)


@pytest.mark.parametrize("T", (1, 40))
@pytest.mark.parametrize("kinds", (("channel",) * 3, ("scalar", None, "scalar"), (None, "scalar", None)))
def test_vmap_folds_replicas(T, kinds):
    """Replicas under vmap equal the replicas alone: outer backward, vmap of grad, an unbatched input."""
    names = ("log_decay", "erase", "write")
    single = [
        inputs_of(shape=(2, T, 2, 5, 4), seed=s, **dict(zip(names, kinds, strict=True))) for s in range(3)
    ]
    present = [name for name, x in single[0].items() if x is not None]
    stacked = {name: torch.stack([x[name] for x in single]).requires_grad_() for name in present}
    weights = rand(2, T, 2, 4, seed=7)

    def loss(x):
        o, state = gated_memory(**x)
        return (o * weights).sum() + state.square().sum()

    losses = vmap(loss)(stacked)
    outer = torch.autograd.grad(losses.sum(), list(stacked.values()))
    inner = vmap(grad(loss))({name: x.detach() for name, x in stacked.items()})
    for i, x in enumerate(single):
        leaves = {name: x[name].clone().requires_grad_() for name in present}
        value = loss(leaves)
        alone = torch.autograd.grad(value, list(leaves.values()))
        torch.testing.assert_close(losses[i], value, rtol=1e-12, atol=0)
        for name, a, b in zip(present, outer, alone, strict=True):
            torch.testing.assert_close(a[i], b, rtol=0, atol=1e-11)
            torch.testing.assert_close(inner[name][i], b, rtol=0, atol=1e-11)

    shared_q = {name: 1 if name == "v" else 0 for name in present} | {"q": None}
    mixed = {name: x.detach() for name, x in stacked.items()} | {"q": single[0]["q"]}
    mixed["v"] = mixed["v"].movedim(0, 1)
    together = vmap(loss, in_dims=(shared_q,))(mixed)
    for i, x in enumerate(single):
        alone = {name: x[name] for name in present} | {"q": single[0]["q"]}
        torch.testing.assert_close(together[i], loss(alone), rtol=1e-12, atol=0)


def test_jacobian_by_vmap_over_backward():
    x = inputs_of(shape=(1, 18, 1, 3, 2))
    rest = {name: y for name, y in x.items() if name != "v"}
    fast, slow = (
        jacrev(lambda v, b=backend: gated_memory(v=v, **rest, backend=b)[0])(x["v"])
        for backend in (FAST, "reference")
    )
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)


def test_a_sequence_does_not_depend_on_its_batch():
    """Bit for bit: fleets rely on it; also, NaN in one sequence stays there."""
    x = {name: y.float() for name, y in inputs_of(shape=(7, 50, 2, 16, 16), seed=2).items()}
    whole = run(x, FAST, torch.float32)["output 0"]
    part = run({name: y[2:5] for name, y in x.items()}, FAST, torch.float32)["output 0"]
    assert torch.equal(whole[2:5], part)
    x["v"][0] = torch.nan
    poisoned = gated_memory(**x)[0]
    assert torch.equal(poisoned[1:], whole[1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes(backend):
    x = inputs_of(shape=(2, 20, 2, 8, 8))
    truth = gated_memory(**x)
    for dtype, state_dtype, limit in (
        (torch.bfloat16, torch.float32, 0.05),
        (torch.float32, torch.float32, 1e-5),
        (torch.float64, torch.float64, 1e-12),
    ):
        cast = {n: y.to(dtype) if n in ("q", "k", "v") else y.float() for n, y in x.items()}
        o, state = gated_memory(**cast, backend=backend)
        assert (o.dtype, state.dtype) == (dtype, state_dtype)
        assert (o.double() - truth[0]).abs().max() < limit * 3
        assert (state.double() - truth[1]).abs().max() < limit * 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_and_no_sequences(backend):
    x = inputs_of(shape=(2, 5, 2, 4, 3))
    none = {name: y if name == "initial_state" else y[:, :0] for name, y in x.items()}
    o, state = gated_memory(**none, backend=backend)
    assert o.shape == (2, 0, 2, 3)
    assert torch.equal(state, x["initial_state"])
    o, state = gated_memory(**{name: y[:0] for name, y in x.items()}, backend=backend)
    assert o.shape == (0, 5, 2, 3)
    assert state.shape == (0, 2, 4, 3)


def test_scale_and_default_state():
    x = inputs_of(shape=(2, 20, 2, 4, 3))
    del x["initial_state"]
    o, _ = gated_memory(**x)
    zeros = torch.zeros(2, 2, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(gated_memory(**x, scale=2.0, initial_state=zeros)[0], 4.0 * o)


def test_backend_by_environment(monkeypatch):
    x = inputs_of(shape=(1, 5, 1, 4, 3))
    q = x.pop("q").requires_grad_()
    monkeypatch.setenv("ARENA_BACKEND", "reference")
    assert "_Forward" not in type(gated_memory(q, **x)[0].grad_fn).__name__
    monkeypatch.delenv("ARENA_BACKEND")
    assert "_Forward" in type(gated_memory(q, **x)[0].grad_fn).__name__


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": rand(2, 5, 2)}, "k must be"),
        ({"q": rand(2, 5, 2, 3)}, "q must have the shape of k"),
        ({"v": rand(2, 4, 2, 3)}, "v must be"),
        ({"q": rand(2, 5, 2, 4).float()}, "one float dtype"),
        ({"log_decay": rand(2, 5)}, "log_decay must be"),
        ({"erase": rand(2, 5, 2, 3)}, "erase must be"),
        ({"write": rand(2, 5, 2, 4)}, "write must be"),
        ({"write": torch.ones(2, 5, 2, dtype=torch.long)}, "write must be a float"),
        ({"decay_sign": torch.ones(2, 5, 2)}, "decay_sign must be"),
        ({"decay_sign": torch.ones(2, 5, 2, 4), "log_decay": None}, "decay_sign needs log_decay"),
        ({"initial_state": rand(2, 2, 3, 4)}, "initial_state must be"),
        ({"backend": "fla"}, "fla.*chunked"),
        ({"q": rand(2, 5, 2, 4).to("meta")}, "one device"),
    ],
)
def test_bad_arguments(change, message):
    x = inputs_of(shape=(2, 5, 2, 4, 3))
    with pytest.raises(ValueError, match=message):
        gated_memory(**(x | change))


def test_second_derivatives_are_refused():
    x = inputs_of(shape=(1, 20, 1, 4, 3))
    q = x.pop("q").requires_grad_()
    (first,) = torch.autograd.grad(gated_memory(q, **x)[0].sum().square(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="reference"):
        first.sum().backward()
