"""Attention against a naive double loop."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, vmap

from kernels.attention import attention, attention_mask

F64 = torch.float64


def rand(*shape, seed=0):
    g = torch.Generator().manual_seed(seed + 7919 * sum((i + 1) * n for i, n in enumerate(shape)))
    return torch.randn(*shape, dtype=F64, generator=g).requires_grad_()


def naive(q, k, v, window, scale):
    before = k.shape[1] - q.shape[1]
    rows = []
    for t in range(q.shape[1]):
        first = 0 if window is None else max(before + t - window + 1, 0)
        keys, values = k[:, first : before + t + 1], v[:, first : before + t + 1]
        score = (q[:, t, None] * keys).sum(-1) * scale
        weight = score.exp() / score.exp().sum(1, keepdim=True)
        rows.append((weight[..., None] * values).sum(1))
    return torch.stack(rows, 1)


SHAPES = [
    (1, 1, 4, 4, None), (5, 5, 4, 4, None), (5, 9, 3, 6, None), (1, 7, 4, 4, None), (1, 7, 4, 4, 3),
    (7, 7, 4, 2, 1), (7, 7, 4, 4, 20), (80, 80, 4, 4, 5), (80, 82, 4, 3, 5), (80, 110, 4, 4, 5),
    (130, 169, 2, 2, 40), (65, 66, 2, 2, 2), (129, 129, 2, 2, 64), (64, 64, 2, 2, 9),
]  # fmt: skip


@pytest.mark.parametrize("Tq,Tk,K,V,window", SHAPES)
def test_outputs_and_gradients_match_a_naive_loop(Tq, Tk, K, V, window):
    q, k, v, probe = (
        rand(2, Tq, 3, K, seed=1),
        rand(2, Tk, 3, K, seed=2),
        rand(2, Tk, 3, V),
        rand(2, Tq, 3, V),
    )
    for scale in (None, 0.3):
        got = attention(q, k, v, window=window, scale=scale)
        want = naive(q, k, v, window, K**-0.5 if scale is None else scale)
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)
        grads = [torch.autograd.grad((o * probe).sum(), (q, k, v)) for o in (got, want)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("Tq,Tk,window", [(6, 6, None), (6, 9, None), (6, 9, 4), (70, 71, 3)])
def test_vmap_equals_a_loop_over_replicas(Tq, Tk, window):
    q, k, v = rand(3, 2, Tq, 2, 4, seed=1), rand(2, Tk, 2, 4, seed=2), rand(2, 3, Tk, 2, 4, seed=3)

    def run(q, k, v):
        return attention(q, k, v, window=window)

    got = vmap(run, in_dims=(0, None, 1))(q, k, v)
    want = torch.stack([run(q[r], k, v[:, r]) for r in range(3)])
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    probe = rand(*got.shape).detach()
    grads = [torch.autograd.grad((o * probe).sum(), (q, k, v)) for o in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)

    def loss(q, k, v):
        return run(q, k, v).square().sum()

    inside = vmap(grad(loss, (0, 1, 2)), in_dims=(0, None, 1))(q, k, v)
    for r in range(3):
        one = [x.detach().requires_grad_() for x in (q[r], k, v[:, r])]
        for a, b in zip(inside, torch.autograd.grad(loss(*one), one), strict=True):
            torch.testing.assert_close(a[r], b, atol=1e-11, rtol=1e-11)


def test_vmap_folds_and_does_not_loop(recwarn):
    x = rand(3, 2, 8, 2, 4)
    vmap(attention)(x, x, x)
    assert not [w for w in recwarn if "performance drop" in str(w.message)]


@pytest.mark.parametrize("window", [None, 3])
def test_huge_scores_stay_finite(window):
    q, k, v = rand(1, 40, 1, 4), rand(1, 40, 1, 4, seed=5), rand(1, 40, 1, 4, seed=6)
    o = attention(q * 1e4, k, v, window=window)
    assert torch.isfinite(o).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(o.sum(), (q, k, v)))


def test_mask_rows():
    assert attention_mask(2, 4).tolist() == [[True, True, True, False], [True] * 4]
    assert attention_mask(2, 4, 2).tolist() == [[False, True, True, False], [False, False, True, True]]


@pytest.mark.parametrize(
    "shapes,window",
    [
        (((1, 5, 2, 4), (1, 4, 2, 4), (1, 4, 2, 4)), None),
        (((1, 4, 2, 4), (1, 4, 2, 3), (1, 4, 2, 4)), None),
        (((1, 4, 2, 4),) * 3, 0),
    ],
)
def test_what_does_not_fit_is_refused(shapes, window):
    with pytest.raises(ValueError):
        attention(*(torch.zeros(s) for s in shapes), window=window)
