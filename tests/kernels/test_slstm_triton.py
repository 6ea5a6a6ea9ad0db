"""The sLSTM's Triton kernels in Triton's interpreter, on the CPU, against the float64 token loop."""

import sys
from dataclasses import replace

import pytest
import torch
from torch.func import vmap
from triton_interpreter import compiled, interpreted, poisoned, run_in_a_fresh_process  # noqa: F401

import kernels.slstm.triton  # noqa: F401
from kernels import slstm
from kernels.slstm.reference import slstm_reference

ours = sys.modules["kernels.slstm.triton"]  # the package's attribute of that path is hidden by the function


@compiled
def test_in_a_fresh_process():
    run_in_a_fresh_process(__file__)


def inputs_of(seed, B, T, H, K, *, initial, dtype=torch.float32, recurrent_dtype=None, forget=0.0):
    """Gates, recurrent and, where ``initial``, the four states: float64 of values that the types hold."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=rng, dtype=torch.float64)

    gates = 1.5 * normal(B, T, 4, H, K)
    gates[:, :, 1] += forget
    inputs = [gates.to(dtype).double(), (normal(4, H, K, K) * K**-0.5).to(recurrent_dtype or dtype).double()]
    if initial:
        state = [normal(B, H, K).float().double() for _ in range(4)]
        state[2] = state[2].abs() + 0.1
        state[2][0, 0, ::3] = 0  # has seen nothing yet
        inputs += state
    return inputs


def evaluate(run, inputs, types, wanted, seed=3):
    """Outputs, and gradients of a random functional of those outputs that are wanted."""
    leaves = [x.to(t).requires_grad_() for x, t in zip(inputs, types, strict=True)]
    out, state = run(leaves[0], leaves[1], tuple(leaves[2:]) or None)
    rng = torch.Generator().manual_seed(seed)
    weights = [torch.randn(o.shape, generator=rng, dtype=torch.float64) for o in (out, *state)]
    loss = sum(
        ((o.double() * w).sum() for o, w, on in zip((out, *state), weights, wanted, strict=True) if on),
        torch.zeros(()),
    )
    grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return [out.detach(), *(s.detach() for s in state), *grads]


def close(found, wanted, limit):
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        error = (a.double() - b).norm() / b.norm().clamp_min(1e-6)
        assert error < limit, f"output {i}: {error}"  # NaN fails too


def triton_slstm(gates, recurrent, state):
    return slstm(gates, recurrent, initial_state=state, backend="triton")


ALL = (True,) * 5


@interpreted
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize(
    "wanted", [ALL, (True, False, False, False, False), (False, False, True, True, False)]
)
@pytest.mark.parametrize("shape", [(2, 5, 2, 16), (17, 3, 1, 20), (1, 1, 3, 5)])
def test_outputs_and_all_gradients(shape, wanted, initial):
    inputs = inputs_of(sum(shape), *shape, initial=initial)
    want = evaluate(slstm_reference, inputs, [torch.float64] * len(inputs), wanted)
    found = evaluate(triton_slstm, inputs, [torch.float32] * len(inputs), wanted)
    close(found, want, 2e-6)


@interpreted
def test_wide_heads_and_r_that_does_not_fit_on_chip():
    inputs = inputs_of(1, 2, 3, 1, 128, initial=True)
    want = evaluate(slstm_reference, inputs, [torch.float64] * 6, ALL)
    assert ours.launch_of(inputs[0][None], False).resident is False
    close(evaluate(triton_slstm, inputs, [torch.float32] * 6, ALL), want, 2e-6)


@interpreted
def test_both_places_of_r_agree(monkeypatch):
    inputs = inputs_of(2, 3, 4, 2, 20, initial=True)
    first = evaluate(triton_slstm, inputs, [torch.float32] * 6, ALL)
    usual = ours.launch_of
    monkeypatch.setattr(ours, "launch_of", lambda *args: replace(usual(*args), resident=False))
    close(evaluate(triton_slstm, inputs, [torch.float32] * 6, ALL), [x.double() for x in first], 1e-6)


@interpreted
@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("recurrent_dtype", [None, torch.float32])
def test_half_precision(dtype, limit, recurrent_dtype):
    weight_type = recurrent_dtype or dtype
    inputs = inputs_of(4, 3, 6, 2, 16, initial=True, dtype=dtype, recurrent_dtype=recurrent_dtype)
    want = evaluate(slstm_reference, inputs, [torch.float64] * 6, ALL)
    found = evaluate(triton_slstm, inputs, [dtype, weight_type] + [torch.float32] * 4, ALL)
    assert found[0].dtype == dtype and found[6].dtype == weight_type
    assert all(x.dtype == torch.float32 for x in found[1:5])
    close(found, want, limit)


@interpreted
def test_open_forget_gates_keep_their_small_leak():
    """log sigmoid(f) = -3e-7 must not be rounded to multiples of 2^-23."""
    inputs = inputs_of(5, 1, 40, 1, 16, initial=True, forget=15.0)
    want = evaluate(slstm_reference, inputs, [torch.float64] * 6, ALL)
    close(evaluate(triton_slstm, inputs, [torch.float32] * 6, ALL), want, 3e-6)


@interpreted
def test_large_gates_stay_finite():
    gates = torch.tensor([-1e4, -90.0, 0.0, 90.0, 1e4]).repeat(1, 3, 4, 1, 4)[..., :16].requires_grad_()
    recurrent = torch.zeros(4, 1, 16, 16)
    out, state = slstm(gates, recurrent, backend="triton")
    want, _ = slstm_reference(gates.detach().double(), recurrent.double(), None)
    torch.testing.assert_close(out.double(), want, atol=1e-6, rtol=1e-5)
    (grad,) = torch.autograd.grad(out.sum(), gates)
    assert torch.isfinite(grad).all() and all(torch.isfinite(s).all() for s in state)


@interpreted
def test_two_halves_are_the_whole():
    inputs = [x.float() for x in inputs_of(6, 2, 7, 2, 16, initial=False)]
    whole, end = slstm(*inputs, backend="triton")
    first, state = slstm(inputs[0][:, :3], inputs[1], backend="triton")
    second, last = slstm(inputs[0][:, 3:], inputs[1], initial_state=state, backend="triton")
    torch.testing.assert_close(torch.cat([first, second], 1), whole, atol=2e-6, rtol=2e-6)
    for a, b in zip(last, end, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-6)
    out, state = slstm(inputs[0][:, :0], inputs[1], initial_state=end, backend="triton")
    assert out.shape == (2, 0, 2, 16) and all(torch.equal(a, b) for a, b in zip(state, end, strict=True))


@interpreted
def test_replicas_fold_under_vmap():
    parts = [inputs_of(seed, 2, 4, 2, 16, initial=True) for seed in (7, 8, 9)]
    stacked = [torch.stack(x).float().requires_grad_() for x in zip(*parts, strict=True)]

    def run(gates, recurrent, *state):
        out, end = slstm(gates, recurrent, initial_state=state, backend="triton")
        return out, *end

    found = vmap(run)(*stacked)
    weights = [torch.randn(o.shape, generator=torch.Generator().manual_seed(1)) for o in found]
    grads = torch.autograd.grad(sum((o * w).sum() for o, w in zip(found, weights, strict=True)), stacked)
    for r, part in enumerate(parts):
        leaves = [x.requires_grad_() for x in part]
        out, end = slstm_reference(leaves[0], leaves[1], tuple(leaves[2:]))
        loss = sum((o * w[r].double()).sum() for o, w in zip((out, *end), weights, strict=True))
        close([o[r] for o in found], [out.detach(), *(s.detach() for s in end)], 2e-6)
        close([g[r] for g in grads], torch.autograd.grad(loss, leaves), 2e-6)


@interpreted
def test_no_second_derivative_and_no_float64():
    inputs = [x.float().requires_grad_() for x in inputs_of(10, 1, 2, 1, 16, initial=False)]
    out, _ = slstm(*inputs, backend="triton")
    (grad,) = torch.autograd.grad(out.sum(), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError):
        torch.autograd.grad(grad.sum(), inputs[0])
    with pytest.raises(ValueError, match="float64"):
        slstm(*(x.double() for x in inputs), backend="triton")
    with pytest.raises(ValueError, match="128"):
        slstm(torch.zeros(1, 1, 4, 1, 130), torch.zeros(4, 1, 130, 130), backend="triton")


def test_without_a_gpu_the_fallback_is_announced(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("ARENA_BACKEND", "triton")
    sys.modules["kernels.backends"]._warn_once.cache_clear()
    gates, recurrent = torch.zeros(1, 2, 4, 1, 16), torch.zeros(4, 1, 16, 16)
    with pytest.warns(RuntimeWarning, match="slstm: backend 'triton' needs tensors on a GPU"):
        slstm(gates, recurrent)
    with pytest.raises(ValueError, match="needs tensors on a GPU"):
        slstm(gates, recurrent, backend="triton")
