"""mlstm against the stabilised and the plain recurrence, gradients included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.func import vmap

from kernels import mlstm
from kernels.check import errors, outputs_and_gradients

NAMES = ("q", "k", "v", "input_gate", "forget_gate")


def make(B=2, T=37, H=2, K=6, V=5, *, seed=0, spread=3.0, state=False):
    rng = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=rng, dtype=torch.float64)

    x = {"q": normal(B, T, H, K), "k": normal(B, T, H, K), "v": normal(B, T, H, V)}
    x |= {"input_gate": spread * normal(B, T, H) - 2, "forget_gate": spread * normal(B, T, H) + 1}
    if state:
        x |= {"c": normal(B, H, K, V), "n": normal(B, H, K), "m": normal(B, H)}
    return x


def ours(q, k, v, input_gate, forget_gate, c=None, n=None, m=None, **options):
    state = None if c is None else (c, n, m)
    return mlstm(q, k, v, input_gate, forget_gate, initial_state=state, **options)


def stabilised(q, k, v, input_gate, forget_gate, c=None, n=None, m=None):
    """Token by token; autograd goes through the stabiliser."""
    B, T, H, K = k.shape
    C = torch.zeros(B, H, K, v.shape[-1], dtype=q.dtype) if c is None else c
    n = torch.zeros(B, H, K, dtype=q.dtype) if n is None else n
    k = k / K**0.5
    out = []
    for t in range(T):
        log_f = F.logsigmoid(forget_gate[:, t])
        new_m = input_gate[:, t] if m is None else torch.maximum(log_f + m, input_gate[:, t])
        f = torch.zeros_like(new_m) if m is None else (log_f + m - new_m).exp()
        i = (input_gate[:, t] - new_m).exp()
        C = f[..., None, None] * C + i[..., None, None] * torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        n = f[..., None] * n + i[..., None] * k[:, t]
        m = new_m
        size = torch.maximum((n * q[:, t]).sum(-1).abs(), (-m).exp()) + 1e-6
        out.append(torch.einsum("bhkv,bhk->bhv", C, q[:, t]) / size[..., None])
    return torch.stack(out, 1), (C, n, m)


def plain(q, k, v, input_gate, forget_gate):
    """The xLSTM paper's cell before stabilisation: gates exp and sigmoid, lower bound 1."""
    B, T, H, K = k.shape
    C, n = torch.zeros(B, H, K, v.shape[-1], dtype=q.dtype), torch.zeros(B, H, K, dtype=q.dtype)
    out = []
    for t in range(T):
        f, i = torch.sigmoid(forget_gate[:, t]), input_gate[:, t].exp()
        C = f[..., None, None] * C + i[..., None, None] * (k[:, t, :, :, None] * v[:, t, :, None, :]) / K**0.5
        n = f[..., None] * n + i[..., None] * k[:, t] / K**0.5
        size = (n * q[:, t]).sum(-1).abs().clamp(min=1.0)
        out.append((C * q[:, t, ..., None]).sum(-2) / size[..., None])
    return torch.stack(out, 1)


@pytest.mark.parametrize("backend", ("reference", "chunked"))
@pytest.mark.parametrize("T", (1, 2, 16, 33))
@pytest.mark.parametrize("state", (False, True))
def test_against_the_stabilised_loop(backend, T, state):
    x = make(T=T, seed=T, state=state)
    truth = outputs_and_gradients(stabilised, x)
    found = outputs_and_gradients(lambda **y: ours(**y, backend=backend), x)
    assert max(errors(found, truth).values()) < 1e-12


def test_against_the_plain_loop():
    """Only the 1e-6 tells them apart, and it is the larger beside exp(-m) the larger m is."""
    x = make(spread=1.0)
    truth = outputs_and_gradients(plain, x)
    found = outputs_and_gradients(lambda **y: ours(**y)[0], x)
    assert 1e-12 < max(errors(found, truth).values()) < 1e-4


@pytest.mark.parametrize("seed", range(3))
def test_float32(seed):
    x = {n: y.float().double() for n, y in make(T=130, K=16, V=16, seed=seed, state=True).items()}
    truth = outputs_and_gradients(stabilised, x)
    loop = errors(outputs_and_gradients(stabilised, x, dtype=torch.float32), truth)
    found = errors(outputs_and_gradients(ours, x, dtype=torch.float32), truth)
    for name, error in found.items():
        assert error <= max(1e-5, 20 * loop[name]), (name, error, loop[name])


@pytest.mark.parametrize("cut", (1, 16, 30))
def test_two_halves_are_the_whole(cut):
    x = make(T=40, seed=cut)

    def halves(**y):
        first, state = mlstm(*(y[name][:, :cut] for name in NAMES))
        second, state = mlstm(*(y[name][:, cut:] for name in NAMES), initial_state=state)
        return torch.cat([first, second], 1), state

    whole = outputs_and_gradients(ours, x)
    assert max(errors(outputs_and_gradients(halves, x), whole).values()) < 1e-12


def test_extreme_gates():
    """Large and infinite pre-activations: finite everywhere, and right where the loop is."""
    x = make(T=50, spread=1.0, seed=3)
    x["forget_gate"][:, ::5] = -200.0
    x["forget_gate"][:, 1::7] = 200.0
    x["input_gate"][:, 2::9] = 60.0
    x["input_gate"][:, 4::9] = -300.0
    truth = outputs_and_gradients(stabilised, x)
    assert max(errors(outputs_and_gradients(ours, x), truth).values()) < 1e-9
    x["input_gate"][:, :3] = -torch.inf
    x["forget_gate"][:, 10] = -torch.inf
    for dtype in (torch.float32, torch.float64):
        found = outputs_and_gradients(lambda **y: ours(**y)[0], x, dtype=dtype)
        assert all(torch.isfinite(y).all() for y in found.values())
        assert (found["output 0"][:, :3] == 0).all()


def test_vmap_folds_replicas():
    single = [make(T=20, seed=s, state=True) for s in range(3)]
    stacked = {name: torch.stack([x[name] for x in single]).requires_grad_() for name in single[0]}

    def loss(x):
        h, (c, n, m) = ours(**x)
        return h.square().sum() + c.square().sum() + n.sum() + m.square().sum()

    losses = vmap(loss)(stacked)
    grads = torch.autograd.grad(losses.sum(), list(stacked.values()))
    for i, x in enumerate(single):
        leaves = [y.clone().requires_grad_() for y in x.values()]
        value = loss(dict(zip(x, leaves, strict=True)))
        torch.testing.assert_close(losses[i], value, rtol=1e-12, atol=0)
        for a, b in zip(grads, torch.autograd.grad(value, leaves), strict=True):
            torch.testing.assert_close(a[i], b, rtol=0, atol=1e-10)


def test_no_tokens_keep_the_state():
    x = make(T=3, state=True)
    h, state = ours(**{name: y[:, :0] if name in NAMES else y for name, y in x.items()})
    assert h.shape == (2, 0, 2, 5)
    for a, b in zip(state, (x["c"], x["n"], x["m"]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_gate": torch.zeros(2, 37)}, "input_gate must be"),
        ({"forget_gate": torch.zeros(2, 37, 2, 6)}, "forget_gate must be"),
        ({"forget_gate": torch.zeros(2, 37, 2, dtype=torch.long)}, "float tensor"),
        ({"n": torch.zeros(2, 2, 5)}, "initial_state must be"),
        ({"backend": "nope"}, "nope.*chunked"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        ours(**(make(state=True) | change))
