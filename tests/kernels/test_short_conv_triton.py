"""The short convolutions' Triton kernels in Triton's interpreter, on the CPU, against loops of their own."""

import itertools
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from torch.func import vmap
from triton_interpreter import compiled, interpreted, poisoned, run_in_a_fresh_process  # noqa: F401

from kernels import dynamic_short_conv, short_conv
from kernels.short_conv import triton_dynamic

FLAGS = list(itertools.product((False, True), repeat=4))  # silu, residual, bias, state


@compiled
def test_in_a_fresh_process():
    run_in_a_fresh_process(__file__)


def naive(x, *, activation=None, residual=False, initial_state=None, lengths=None, **form):
    """Token by token, from the equations; sequences of ``lengths`` one after another where given."""
    W = form["filters"].shape[2] if "filters" in form else form.get("weight", form.get("u")).shape[-2]
    D = x.shape[2]
    if lengths is None:
        rows = [(b, 0, x.shape[1], b) for b in range(x.shape[0])]
    else:
        ends = list(itertools.accumulate(lengths))
        rows = [(0, end - length, end, s) for s, (length, end) in enumerate(zip(lengths, ends, strict=True))]
    outputs, states = [], []
    for b, start, end, s in rows:
        zeros = torch.zeros(W - 1, D, dtype=x.dtype)
        past = [*(zeros if initial_state is None else initial_state[s]), *x[b, start:end]]
        for t in range(start, end):
            taps = form["weight"] if "weight" in form else torch.zeros(W, D, dtype=x.dtype)
            if "u" in form:
                taps = taps + sum(form["z"][b, t, r] * form["u"][r] for r in range(form["u"].shape[0]))
            if "filters" in form:
                taps = taps + form["filters"][b, t].repeat_interleave(D // form["filters"].shape[3], 1)
            if "bias" in form and "weight" not in form:
                taps = taps + form["bias"]
            y = sum(taps[j] * past[t - start + W - 1 - j] for j in range(W))
            if "bias" in form and "weight" in form:
                y = y + form["bias"]
            if activation == "silu":
                y = y * torch.sigmoid(y)
            outputs.append(x[b, t] + y if residual else y)
        states.append(torch.stack(past[len(past) - (W - 1) :]) if W > 1 else zeros)
    y = torch.stack(outputs) if outputs else x.new_zeros(0, D)
    return y.reshape(x.shape), torch.stack(states)


def inputs_of(form, B, T, D, W, *, bias=False, state=False, R=3, Q=2, dtype=torch.float32, sequences=None):
    """Named float64 tensors of values that ``dtype`` holds."""
    rng = torch.Generator().manual_seed(B + 10 * T + 100 * D + W)

    def normal(*size):
        return torch.randn(*size, generator=rng).to(dtype).double()

    tensors = {"x": normal(B, T, D)}
    if form == "static":
        tensors["weight"] = normal(W, D)
    elif form == "low-rank":
        tensors |= {"z": normal(B, T, R), "u": normal(R, W, D)}
    else:
        tensors["filters"] = normal(B, T, W, Q)
    if bias:
        tensors["bias"] = normal(D) if form == "static" else normal(W, D)
    if state:
        tensors["initial_state"] = normal(sequences or B, W - 1, D)
    return tensors


def operate(tensors, **options):
    """The Triton operator; ``lengths`` become cu_seqlens."""
    lengths = options.pop("lengths", None)
    if lengths is not None:
        options["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(lengths)])
    options.setdefault("backend", "triton")
    if "weight" in tensors:
        return short_conv(**tensors, **options)
    return dynamic_short_conv(**tensors, **options)


def compare(tensors, dtype, limit, *, backend="triton", **options):
    """Outputs, and the gradient of a random functional of both outputs with respect to every input."""
    results = []
    for run, kind in ((naive, torch.float64), (operate, dtype)):
        leaves = {name: x.to(kind).requires_grad_() for name, x in tensors.items()}
        y, state = naive(**leaves, **options) if run is naive else operate(leaves, backend=backend, **options)
        rng = torch.Generator().manual_seed(5)
        loss = sum(
            (o.double() * torch.randn(o.shape, generator=rng, dtype=torch.float64)).sum() for o in (y, state)
        )
        grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        results.append([y.detach(), state.detach(), *grads])
    for name, a, b in zip(("y", "state", *tensors), results[1], results[0], strict=True):
        assert a.shape == b.shape and a.dtype == dtype
        error = (a.double() - b).norm() / b.norm().clamp_min(1e-6)
        assert error < limit, f"{name}: {error}"  # NaN fails too


@interpreted
@pytest.mark.parametrize("form", ["static", "low-rank", "head-wise"])
@pytest.mark.parametrize("silu,residual,bias,state", FLAGS)
def test_all_flags(form, silu, residual, bias, state):
    tensors = inputs_of(form, 2, 5, 6, 4, bias=bias, state=state)
    compare(tensors, torch.float32, 1e-6, activation="silu" if silu else None, residual=residual)


@interpreted
@pytest.mark.parametrize(
    "form,B,T,D,W,R,Q",
    [
        ("static", 1, 1, 1, 1, 0, 0),
        ("static", 2, 3, 40, 8, 0, 0),  # shorter than the width
        ("static", 1, 131, 3, 5, 0, 0),  # two runs of tokens
        ("static", 1, 4, 270, 2, 0, 0),  # two tiles of channels
        ("low-rank", 1, 40, 70, 3, 1, 0),
        ("low-rank", 2, 2, 5, 8, 9, 0),
        ("low-rank", 1, 3, 34, 4, 17, 0),
        ("low-rank", 1, 17, 130, 1, 16, 0),
        ("head-wise", 1, 17, 30, 3, 0, 10),  # groups of 3 channels
        ("head-wise", 1, 6, 150, 2, 0, 1),  # a group wider than a tile
        ("head-wise", 1, 5, 48, 8, 0, 48),
    ],
)
def test_shapes(form, B, T, D, W, R, Q):
    tensors = inputs_of(form, B, T, D, W, bias=True, state=True, R=R, Q=Q)
    compare(tensors, torch.float32, 1e-6, activation="silu", residual=True)


@interpreted
def test_several_runs_of_the_dynamic_kernels(monkeypatch):
    usual, few = triton_dynamic.launch_of, {"time_block": 16, "channels": 64, "run": 32, "warps": 1}
    monkeypatch.setattr(
        triton_dynamic,
        "launch_of",
        lambda *args: replace(usual(*args), **few),
    )
    compare(inputs_of("low-rank", 2, 70, 20, 4, bias=True), torch.float32, 1e-6, residual=True)


@interpreted
@pytest.mark.parametrize("form", ["static", "low-rank", "head-wise"])
@pytest.mark.parametrize("lengths,state", [((1, 2, 0, 7, 3), True), ((18, 1, 1), True), ((0, 0, 4), False)])
def test_packed_sequences(form, lengths, state):
    tensors = inputs_of(form, 1, sum(lengths), 6, 4, bias=True, state=state, sequences=len(lengths))
    compare(tensors, torch.float32, 1e-6, activation="silu", residual=True, lengths=lengths)


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("form", ["static", "low-rank", "head-wise"])
@pytest.mark.parametrize("lengths", [(1, 2, 0, 7, 3), (20, 1, 1, 15), (5,), (0, 0, 4)])
@pytest.mark.parametrize("width,state", [(4, True), (4, False), (1, True)])
def test_packed_sequences_in_torch(backend, form, lengths, width, state):
    tensors = inputs_of(form, 1, sum(lengths), 6, width, bias=True, state=state, sequences=len(lengths))
    options = {"activation": "silu", "residual": True, "lengths": lengths}
    compare(tensors, torch.float64, 1e-12, backend=backend, **options)


@interpreted
@pytest.mark.parametrize("form", ["static", "low-rank", "head-wise"])
@pytest.mark.parametrize("dtype,limit", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_half_precision(form, dtype, limit):
    tensors = inputs_of(form, 1, 9, 10, 3, bias=True, state=True, dtype=dtype)
    compare(tensors, dtype, limit, activation="silu", residual=True)


@interpreted
@pytest.mark.parametrize("form", ["static", "low-rank", "head-wise"])
def test_replicas_fold_under_vmap(form):
    parts = []
    for replica in range(2):
        tensors = inputs_of(form, 2, 5, 8, 3, bias=True, state=True)
        parts.append({name: x.roll(replica, 0) * (1 + replica) for name, x in tensors.items()})
    stacked = {name: torch.stack([p[name] for p in parts]).float().requires_grad_() for name in parts[0]}
    found = vmap(lambda t: operate(t, activation="silu", residual=True)[0])(stacked)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((found * weight).sum(), list(stacked.values()))
    for r, part in enumerate(parts):
        leaves = {name: x.requires_grad_() for name, x in part.items()}
        y, _ = naive(**leaves, activation="silu", residual=True)
        want = torch.autograd.grad((y * weight[r].double()).sum(), list(leaves.values()))
        torch.testing.assert_close(found[r].double(), y, atol=1e-5, rtol=1e-5)
        for a, b in zip(grads, want, strict=True):
            torch.testing.assert_close(a[r].double(), b, atol=1e-4, rtol=1e-5)


@interpreted
def test_empty_sequences_and_batches():
    for B, T in ((2, 0), (0, 5)):
        x = torch.zeros(B, T, 6, requires_grad=True)
        weight, z, u = torch.ones(3, 6, requires_grad=True), torch.ones(B, T, 2), torch.ones(2, 3, 6)
        u.requires_grad_()
        y, state = short_conv(x, weight, backend="triton")
        dynamic, _ = dynamic_short_conv(x, z=z, u=u, backend="triton")
        assert y.shape == dynamic.shape == (B, T, 6) and state.shape == (B, 2, 6)
        grads = torch.autograd.grad((y + dynamic).sum(), [x, weight, u])
        assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


@interpreted
def test_strided_inputs():
    tensors = inputs_of("static", 2, 9, 12, 4)
    wide = torch.cat([tensors["x"], tensors["x"]], 2).float()[:, :, 6:18]
    y, _ = short_conv(wide, tensors["weight"].float(), backend="triton")
    want, _ = naive(wide.double(), weight=tensors["weight"])
    torch.testing.assert_close(y.double(), want, atol=1e-5, rtol=1e-5)


@interpreted
def test_what_the_kernels_do_not_take_is_refused():
    x, weight = torch.zeros(1, 5, 4), torch.zeros(9, 4)
    with pytest.raises(ValueError, match="widths up to 8"):
        short_conv(x, weight, backend="triton")
    with pytest.raises(ValueError, match="float64"):
        short_conv(x.double(), weight[:4].double(), backend="triton")
    with pytest.raises(ValueError, match="ranks up to 64"):
        dynamic_short_conv(x, z=torch.zeros(1, 5, 65), u=torch.zeros(65, 4, 4), backend="triton")
    with pytest.raises(ValueError, match=r"ranks up to 30 at width 3 in torch\.float32, not 31"):
        dynamic_short_conv(x, z=torch.zeros(1, 5, 31), u=torch.zeros(31, 3, 4), backend="triton")
    with pytest.raises(ValueError, match=r"ranks up to 62 at width 8 in torch\.bfloat16, not 63"):
        dynamic_short_conv(
            x.bfloat16(),
            z=torch.zeros(1, 5, 63).bfloat16(),
            u=torch.zeros(63, 8, 4).bfloat16(),
            backend="triton",
        )


@pytest.mark.parametrize("limits", [[0, 3], [1, 5], [0, 4, 3, 5], [5]])
def test_limits_that_do_not_fit_are_refused(limits):
    with pytest.raises(ValueError, match="cu_seqlens"):
        short_conv(torch.zeros(1, 5, 4), torch.zeros(3, 4), cu_seqlens=torch.tensor(limits))
    with pytest.raises(ValueError, match=r"\[1,T,D\]"):
        short_conv(torch.zeros(2, 5, 4), torch.zeros(3, 4), cu_seqlens=torch.tensor([0, 5]))


def test_without_a_gpu_the_fallback_is_announced_once(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("ARENA_BACKEND", "triton")
    sys.modules["kernels.backends"]._warn_once.cache_clear()
    x, weight = torch.randn(1, 4, 2), torch.randn(2, 2)
    with pytest.warns(RuntimeWarning, match="short_conv: backend 'triton' needs tensors on a GPU"):
        y, _ = short_conv(x, weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(short_conv(x, weight)[0], y)
