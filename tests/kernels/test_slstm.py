"""The sLSTM against a cell written from the paper's equations, in float64."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch.func import grad, vmap

from kernels import slstm

F64 = torch.float64
SHAPES = [(1, 1, 1, 1), (2, 1, 2, 3), (2, 9, 1, 4), (3, 17, 3, 2), (1, 40, 2, 5)]


def rand(*shape, seed=0, scale=1.0, dtype=F64):
    g = torch.Generator().manual_seed(seed + 7919 * sum((i + 1) * n for i, n in enumerate(shape)))
    return (scale * torch.randn(*shape, dtype=F64, generator=g)).to(dtype).requires_grad_()


def cell(gates, recurrent, state=None):
    """Channel by channel; without a stabiliser in the memory, so that m only scales what is returned."""
    B, T, _, H, K = gates.shape
    rows = []
    for b in range(B):
        for head in range(H):
            if state is None:
                h, c, n = (torch.zeros(K, dtype=F64) for _ in range(3))
                m = torch.full((K,), -float("inf"), dtype=F64)
            else:
                h, c, n, m = (s[b, head] for s in state)
                c, n = c * m.exp(), n * m.exp()
            outs = []
            for t in range(T):
                raw = [gates[b, t, g, head] + recurrent[g, head].T @ h for g in range(4)]
                forget, write = 1 / (1 + (-raw[1]).exp()), raw[0].exp()
                c, n = forget * c + write * raw[2].tanh(), forget * n + write
                m = torch.stack([raw[0], forget.log() + m]).amax(0)
                h = c / n / (1 + (-raw[3]).exp())
                outs.append(h)
            rows.append((torch.stack(outs), h, c * (-m).exp(), n * (-m).exp(), m))
    h, *ends = (torch.stack(x).unflatten(0, (B, H)) for x in zip(*rows, strict=True))
    return h.transpose(1, 2), tuple(ends)


def a_state(B, H, K):
    h, c, n, m = (rand(B, H, K, seed=seed) for seed in range(1, 5))
    return h, c, (n.abs() + 0.3).detach().requires_grad_(), m


def compare(got, want, inputs, tolerance=1e-10, seed=5):
    """All outputs, and the gradient of a random functional of all of them with respect to every input."""
    g = torch.Generator().manual_seed(seed)
    (h, state), (h_want, state_want) = got, want
    got, want = [h, *state], [h_want, *state_want]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
    probes = [torch.randn(w.shape, dtype=F64, generator=g) for w in want]
    grads = [
        torch.autograd.grad(
            sum((o * p).sum() for o, p in zip(outs, probes, strict=True)),
            inputs,
            allow_unused=True,
            materialize_grads=True,
            retain_graph=True,
        )
        for outs in (got, want)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("backend", ["fused", "reference", "auto"])
@pytest.mark.parametrize("B,T,H,K", SHAPES)
@pytest.mark.parametrize("with_state", [False, True])
def test_outputs_and_gradients_match_the_cell(backend, B, T, H, K, with_state):
    gates, recurrent = rand(B, T, 4, H, K), rand(4, H, K, K, scale=0.5)
    state = a_state(B, H, K) if with_state else None
    got = slstm(gates, recurrent, initial_state=state, backend=backend)
    compare(got, cell(gates, recurrent, state), [gates, recurrent, *(state or ())])


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_orientation_of_the_recurrent_weights(backend):
    gates, recurrent = torch.zeros(1, 2, 4, 1, 2, dtype=F64), torch.zeros(4, 1, 2, 2, dtype=F64)
    gates[0, 0, 2, 0] = torch.tensor([3.0, 0.0])  # only channel 0 outputs something at the first token
    recurrent[2, 0, 0, 1] = 5.0  # and speaks to channel 1 of z
    h, _ = slstm(gates, recurrent, backend=backend)
    assert h[0, 0, 0, 1] == 0
    assert h[0, 1, 0, 1] > 0.1


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("empty", [True, False])
def test_two_halves_and_steps_equal_the_whole(backend, empty):
    gates, recurrent = rand(2, 11, 4, 2, 3, scale=2), rand(4, 2, 3, 3)
    state = a_state(2, 2, 3)
    start = None if empty else state
    whole = slstm(gates, recurrent, initial_state=start, backend=backend)
    inputs = [gates, recurrent] + ([] if empty else list(state))
    for cut in (1, 4, 11):
        first, middle = slstm(gates[:, :cut], recurrent, initial_state=start, backend=backend)
        second, last = slstm(gates[:, cut:], recurrent, initial_state=middle, backend=backend)
        compare((torch.cat([first, second], 1), last), whole, inputs)
    steps, now = [], start
    for t in range(11):
        h, now = slstm(gates[:, t : t + 1], recurrent, initial_state=now, backend=backend)
        steps.append(h)
    compare((torch.cat(steps, 1), now), whole, inputs)


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_zeros_are_an_empty_state(backend):
    gates, recurrent = rand(2, 5, 4, 1, 3, scale=5), rand(4, 1, 3, 3)
    zeros = tuple(torch.zeros(2, 1, 3, dtype=F64, requires_grad=True) for _ in range(4))
    got = slstm(gates, recurrent, initial_state=zeros, backend=backend)
    compare(got, slstm(gates, recurrent, backend=backend), [gates, recurrent])
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(got[0].sum(), zeros))


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("scale", [30.0, 60.0, 300.0])
def test_extreme_gates_are_finite_and_right(backend, scale):
    """All combinations of saturated gates; the cell's bare exponentials need them below 700."""
    signs = torch.tensor([-1.0, 1.0], dtype=F64)
    patterns = torch.cartesian_prod(signs, signs, signs, signs)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0)) % 16
    gates = (scale * patterns[order].reshape(2, 40, 4, 1, 1)).expand(2, 40, 4, 1, 2).clone()
    gates = (gates + 0.1 * rand(2, 40, 4, 1, 2)).detach()
    gates[:, :10, 1] = -scale  # a run of forgetting
    gates[:, 10:20, 1] = scale
    gates.requires_grad_()
    recurrent = rand(4, 1, 2, 2)
    got = slstm(gates, recurrent, backend=backend)
    grads = torch.autograd.grad(got[0].square().sum(), (gates, recurrent), retain_graph=True)
    assert torch.isfinite(got[0]).all()
    assert all(torch.isfinite(g).all() for g in grads)
    if scale < 100:
        compare(got, cell(gates, recurrent), [gates, recurrent], tolerance=1e-9)
    single = slstm(gates.float(), recurrent.float(), backend=backend)
    assert all(torch.isfinite(x).all() for x in (single[0], *single[1]))
    if scale < 100:
        assert (single[0] - got[0]).abs().max() < 1e-4  # an exponent of size 60 is known to 60 * 2^-24


@pytest.mark.parametrize("backend", ["fused", "reference", "numba"])
def test_fp32_is_close_to_float64(backend):
    if backend == "numba" and find_spec("numba") is None:
        pytest.skip("numba, an optional extra, is not installed")
    gates, recurrent = rand(1, 200, 4, 1, 5), rand(4, 1, 5, 5, scale=0.3)
    h, state = cell(gates, recurrent)
    for reached in (1, 200):  # a loss on some tokens, or on all
        want = torch.autograd.grad(h[:, -reached:].square().sum(), (gates, recurrent), retain_graph=True)
        inputs = [x.detach().float().requires_grad_() for x in (gates, recurrent)]
        h32, state32 = slstm(*inputs, backend=backend)
        got = torch.autograd.grad(h32[:, -reached:].square().sum(), inputs)
        for a, b in zip((h32, *state32, *got), (h, *state, *want), strict=True):
            assert a.dtype == torch.float32
            assert (a - b).abs().max() < 1e-5 * max(1, b.abs().max())


@pytest.mark.skipif(find_spec("numba") is None, reason="numba, an optional extra, is not installed")
@pytest.mark.parametrize("scale", [1.0, 15.0, 60.0])
def test_numba_does_what_torch_does(scale):
    gates, recurrent = (
        rand(3, 50, 4, 2, 5, scale=scale, dtype=torch.float32),
        rand(4, 2, 5, 5, dtype=torch.float32),
    )
    state = tuple(s.detach().float().requires_grad_() for s in a_state(3, 2, 5))
    for start in (None, state):
        inputs = [gates, recurrent, *(start or ())]
        results = []
        for backend in ("numba", "fused"):
            h, end = slstm(gates, recurrent, initial_state=start, backend=backend)
            loss = h.square().sum() + sum(e.sum() for e in end)
            results.append([h, *end, *torch.autograd.grad(loss, inputs)])
        for a, b in zip(*results, strict=True):
            assert (a - b).abs().max() <= 2e-4 * max(1, b.abs().max())
    poisoned = gates.detach().clone()
    poisoned[1, 7] = float("nan")
    h, _ = slstm(poisoned, recurrent, backend="numba")
    assert h[1, 7:].isnan().all()
    assert not h[0].isnan().any() and not h[1, :7].isnan().any()


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("shared", ["nothing", "gates", "recurrent"])
def test_vmap_equals_a_loop_over_replicas(backend, shared):
    R, B, T, H, K = 3, 2, 6, 2, 3
    gates = rand(B, T, 4, H, K) if shared == "gates" else rand(R, B, T, 4, H, K)
    recurrent = rand(4, H, K, K) if shared == "recurrent" else rand(4, R, H, K, K)
    states = [tuple((1 + r) * s for s in a_state(B, H, K)) for r in range(R)]
    state = tuple(torch.stack(s).detach().requires_grad_() for s in zip(*states, strict=True))
    dims = (None if shared == "gates" else 0, None if shared == "recurrent" else 1, 0)

    def run(gates, recurrent, state):
        return slstm(gates, recurrent, initial_state=state, backend=backend)

    def of(r):
        return (
            gates if shared == "gates" else gates[r],
            recurrent if shared == "recurrent" else recurrent[:, r],
            tuple(s[r] for s in state),
        )

    pieces = [run(*of(r)) for r in range(R)]
    want = (
        torch.stack([p[0] for p in pieces]),
        [torch.stack(s) for s in zip(*(p[1] for p in pieces), strict=True)],
    )
    compare(vmap(run, in_dims=dims)(gates, recurrent, state), want, [gates, recurrent, *state])

    def loss(gates, recurrent, state):
        h, end = run(gates, recurrent, state)
        return h.square().sum() + end[1].sum()

    inside = vmap(grad(loss, (0, 1)), in_dims=dims)(gates, recurrent, state)
    for r in range(R):
        one = of(r)
        leaves = [one[0].detach().requires_grad_(), one[1].detach().requires_grad_()]
        for a, b in zip(inside, torch.autograd.grad(loss(*leaves, one[2]), leaves), strict=True):
            torch.testing.assert_close(a[r], b, atol=1e-10, rtol=1e-10)


def test_an_empty_sequence_keeps_the_state():
    state = a_state(2, 1, 3)
    for backend in ("fused", "reference"):
        h, end = slstm(rand(2, 0, 4, 1, 3), rand(4, 1, 3, 3), initial_state=state, backend=backend)
        assert h.shape == (2, 0, 1, 3)
        assert all(torch.equal(a, b) for a, b in zip(end, state, strict=True))


def test_half_precision_keeps_an_fp32_state():
    gates, recurrent = rand(2, 20, 4, 1, 4, dtype=torch.bfloat16), rand(4, 1, 4, 4, dtype=torch.bfloat16)
    h, state = slstm(gates, recurrent)
    assert h.dtype == torch.bfloat16
    assert all(s.dtype == torch.float32 for s in state)
    assert (h - cell(gates.double(), recurrent.double())[0]).abs().max() < 2**-8


@pytest.mark.parametrize(
    "gates,recurrent,state",
    [
        ((1, 2, 3, 1, 2), (4, 1, 2, 2), None),
        ((1, 2, 4, 1, 2), (4, 2, 2, 2), None),
        ((1, 2, 4, 1, 2), (4, 1, 2, 2), (1, 1, 3)),
    ],
)
def test_what_does_not_fit_is_refused(gates, recurrent, state):
    start = None if state is None else (torch.zeros(state),) * 4
    with pytest.raises(ValueError):
        slstm(torch.zeros(gates), torch.zeros(recurrent), initial_state=start)


def test_unknown_backends_are_refused():
    gates, recurrent = rand(1, 2, 4, 1, 2), rand(4, 1, 2, 2)
    for backend in ("cuda", "numba"):  # numba's loops are fp32
        with pytest.raises(ValueError, match=backend):
            slstm(gates, recurrent, backend=backend)
