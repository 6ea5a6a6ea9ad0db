"""The LSTM against torch's."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.func import grad, vmap

from kernels.lstm import lstm

F64 = torch.float64
BACKENDS = pytest.mark.parametrize("backend", ["fused", "reference", "auto"])


def rand(*shape, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed + 7919 * sum((i + 1) * n for i, n in enumerate(shape)))
    return (scale * torch.randn(*shape, dtype=F64, generator=g)).requires_grad_()


def torch_lstm(gates, recurrent, state):
    """nn.LSTM whose input weights are the identity: its input is the four gates' pre-activations."""
    D = gates.shape[-1]
    module = nn.LSTM(4 * D, D, bias=False, batch_first=True, dtype=F64)
    weights = {
        "weight_ih_l0": torch.eye(4 * D, dtype=F64),
        "weight_hh_l0": recurrent.transpose(1, 2).flatten(0, 1),
    }
    h, (h_end, c_end) = torch.func.functional_call(
        module, weights, (gates.flatten(2), tuple(s[None] for s in state))
    )
    return h, (h_end[0], c_end[0])


def compare(got, want, inputs, seed=5):
    """All outputs, and the gradient of a random functional of all of them with respect to every input."""
    g = torch.Generator().manual_seed(seed)
    got, want = [got[0], *got[1]], [want[0], *want[1]]
    probes = [torch.randn(w.shape, dtype=F64, generator=g) for w in want]
    grads = []
    for outs in (got, want):
        loss = sum((o * p).sum() for o, p in zip(outs, probes, strict=True))
        grads.append(torch.autograd.grad(loss, inputs, retain_graph=True))
    for a, b in zip([*got, *grads[0]], [*want, *grads[1]], strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


@BACKENDS
@pytest.mark.parametrize("B,T,D,scale", [(1, 1, 1, 1), (2, 9, 3, 1), (3, 30, 2, 10), (2, 12, 3, 60)])
def test_outputs_and_gradients_match_torch(backend, B, T, D, scale):
    gates, recurrent, h, c = rand(B, T, 4, D, scale=scale), rand(4, D, D), rand(B, D), rand(B, D, seed=1)
    got = lstm(gates, recurrent, initial_state=(h, c), backend=backend)
    compare(got, torch_lstm(gates, recurrent, (h, c)), [gates, recurrent, h, c])
    zeros = (torch.zeros(B, D, dtype=F64),) * 2
    compare(lstm(gates, recurrent, backend=backend), torch_lstm(gates, recurrent, zeros), [gates, recurrent])


@BACKENDS
def test_two_halves_and_steps_equal_the_whole(backend):
    gates, recurrent = rand(2, 7, 4, 3), rand(4, 3, 3)
    whole = lstm(gates, recurrent, backend=backend)
    for cuts in ([0, 3, 7], [0, 7, 7], list(range(8))):
        parts, state = [], None
        for first, last in pairwise(cuts):
            h, state = lstm(gates[:, first:last], recurrent, initial_state=state, backend=backend)
            parts.append(h)
        compare((torch.cat(parts, 1), state), whole, [gates, recurrent])


@BACKENDS
@pytest.mark.parametrize("shared", [False, True])
def test_vmap_equals_a_loop_over_replicas(backend, shared):
    gates = rand(2, 5, 4, 3) if shared else rand(2, 3, 5, 4, 3)
    recurrent, h, c = rand(3, 4, 3, 3), rand(3, 2, 3), rand(3, 2, 3, seed=1)

    def run(gates, recurrent, h, c):
        return lstm(gates, recurrent, initial_state=(h, c), backend=backend)

    dims = (None if shared else 1, 0, 0, 0)
    parts = [run(gates if shared else gates[:, r], recurrent[r], h[r], c[r]) for r in range(3)]
    want = (
        torch.stack([p[0] for p in parts]),
        [torch.stack(s) for s in zip(*(p[1] for p in parts), strict=True)],
    )
    compare(vmap(run, in_dims=dims)(gates, recurrent, h, c), want, [gates, recurrent, h, c])

    def loss(recurrent, gates, h, c):
        return run(gates, recurrent, h, c)[0].square().sum()

    inside = vmap(grad(loss), in_dims=(0, dims[0], 0, 0))(recurrent, gates, h, c)
    for r in range(3):
        one = recurrent[r].detach().requires_grad_()
        want = torch.autograd.grad(loss(one, gates if shared else gates[:, r], h[r], c[r]), one)[0]
        torch.testing.assert_close(inside[r], want, atol=1e-11, rtol=1e-11)


def test_half_precision_and_errors():
    h, state = lstm(rand(2, 5, 4, 3).bfloat16(), rand(4, 3, 3).bfloat16())
    assert h.dtype == torch.bfloat16
    assert all(s.dtype == torch.float32 for s in state)
    for arguments in (
        (torch.zeros(1, 2, 3, 3), torch.zeros(4, 3, 3)),
        (torch.zeros(1, 2, 4, 3), torch.zeros(4, 3, 2)),
    ):
        with pytest.raises(ValueError):
            lstm(*arguments)
    with pytest.raises(ValueError):
        lstm(torch.zeros(1, 2, 4, 3), torch.zeros(4, 3, 3), initial_state=(torch.zeros(2, 3),) * 2)
    assert lstm(torch.zeros(1, 0, 4, 3), torch.zeros(4, 3, 3))[0].shape == (1, 0, 3)
