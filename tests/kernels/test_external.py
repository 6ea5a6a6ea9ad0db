"""Other people's packages as backends: what they are called with, what they refuse, and their torch code
where it is installed. Their GPU kernels are held to the reference by ``arena doctor`` on a GPU.
"""

import importlib.util
import sys
import types
from functools import partial

import pytest
import torch
from torch.func import vmap

from kernels import gated_memory, mlstm, short_conv
from kernels.check import errors, gated_memory_inputs, outputs_and_gradients
from kernels.external import common, fla, mamba, nxai
from kernels.gated_memory.reference import gated_memory_reference
from kernels.short_conv.reference import short_conv_reference

SHAPE = (2, 5, 2, 3, 4)
needs_nxai = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mlstm_kernels", "einops")),
    reason="mlstm_kernels (and einops) are not installed",
)
needs_fla = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("fla", "einops")),
    reason="flash-linear-attention is not installed",
)


def inputs_of(log_decay, erase, write):
    given = gated_memory_inputs(shape=SHAPE, log_decay=log_decay, erase=erase, write=write)
    return {name: None if x is None else x.float() for name, x in given.items()}


@pytest.fixture
def anywhere(monkeypatch):
    """Let what is for GPUs run on the CPU."""
    monkeypatch.setattr(common, "version_of", lambda *names: (9, 0, 0))
    for module in (fla, mamba, nxai):
        monkeypatch.setattr(module, "version_of", lambda *names: (9, 0, 0))
        monkeypatch.setattr(module, "can_import", lambda name: None)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(fla, "_is_hopper", lambda: False)


# flash-linear-attention's conventions, each written from its own documentation, over our reference


def reference(q, k, v, g, b, w, scale, initial_state, output_final_state):
    assert output_final_state
    return gated_memory_reference(q, k, v, g, b, w, None, scale, initial_state)


def chunk_gdn2(q, k, v, g, b, w, scale=None, initial_state=None, output_final_state=False):
    assert q.shape == k.shape == g.shape == b.shape and w.shape == v.shape and g.dtype == torch.float32
    return reference(q, k, v, g, b, w, scale, initial_state, output_final_state)


def chunk_kda(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False):
    assert g.shape == q.shape and beta.shape == q.shape[:3]
    return reference(q, k, v, g, beta, beta, scale, initial_state, output_final_state)


def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False):
    assert g.shape == beta.shape == q.shape[:3]
    return reference(q, k, v, g, beta, beta, scale, initial_state, output_final_state)


def chunk_delta_rule(q, k, v, beta, scale=None, initial_state=None, output_final_state=False):
    assert beta.shape == q.shape[:3] and q.dtype != torch.float32
    return reference(q, k, v, None, beta, beta, scale, initial_state, output_final_state)


def chunk_gla(q, k, v, g, scale=None, initial_state=None, output_final_state=False):
    assert g.shape == q.shape
    return reference(q, k, v, g, None, None, scale, initial_state, output_final_state)


def chunk_simple_gla(q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False):
    assert g_gamma is None and (g is None or g.shape == q.shape[:3])
    return reference(q, k, v, g, None, None, scale, initial_state, output_final_state)


FAKES = {f.__name__: f for f in (chunk_gdn2, chunk_kda, chunk_gated_delta_rule, chunk_delta_rule, chunk_gla)}
FAKES["chunk_simple_gla"] = chunk_simple_gla


@pytest.mark.parametrize(
    ("log_decay", "erase", "write", "kernel"),
    [
        (None, None, None, "simple_gla"),
        ("scalar", None, "channel", "simple_gla"),
        ("channel", None, "scalar", "gla"),
        (None, "scalar", "tied", "kda"),
        ("scalar", "scalar", "tied", "gated_delta_rule"),
        ("channel", "scalar", "tied", "kda"),
        ("scalar", "scalar", "scalar", "gdn2"),
        ("channel", "channel", "channel", "gdn2"),
        (None, "channel", None, "gdn2"),
    ],
)
def test_every_gate_setting_goes_to_a_kernel_of_its_own(
    anywhere, monkeypatch, log_decay, erase, write, kernel
):
    called = []

    def load(name):
        called.append(name)
        return FAKES[fla.KERNELS[name]]

    monkeypatch.setattr(fla, "_load", load)
    tied = write == "tied"
    inputs = inputs_of(log_decay, erase, None if tied else write)
    if tied:
        inputs.pop("write")

    def run(backend, **x):
        gates = {"write": x["erase"]} if tied else {}
        return gated_memory(**x, **gates, backend=backend)

    truth = outputs_and_gradients(partial(run, "reference"), inputs)
    found = outputs_and_gradients(partial(run, "fla"), inputs)
    assert called == [kernel]
    assert max(errors(found, truth).values()) < 1e-5


def test_delta_rule_in_16_bits_has_its_own_kernel(anywhere, monkeypatch):
    monkeypatch.setattr(fla, "_load", lambda name: FAKES[fla.KERNELS[name]])
    q, k, v = (torch.randn(1, 4, 1, 8, dtype=torch.bfloat16) for _ in range(3))
    beta = torch.rand(1, 4, 1, dtype=torch.bfloat16)
    assert fla.kernel_of(q.dtype, None, beta, beta) == "delta_rule"
    o, state = gated_memory(q, k, v, None, beta, beta, backend="fla")
    truth, _ = gated_memory(q, k, v, None, beta, beta, backend="reference")
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
    torch.testing.assert_close(o, truth)


def test_replicas_are_folded_and_gradients_flow(anywhere, monkeypatch):
    monkeypatch.setattr(fla, "_load", lambda name: FAKES[fla.KERNELS[name]])
    one = inputs_of("channel", "channel", "channel")
    names = list(one)
    stacked = [torch.stack([x, 0.5 * x]).requires_grad_() for x in one.values()]
    o = vmap(lambda *x: gated_memory(**dict(zip(names, x, strict=True)), backend="fla")[0])(*stacked)
    grads = torch.autograd.grad(o.square().sum(), stacked)
    for r in range(2):
        leaves = [x[r].detach().requires_grad_() for x in stacked]
        each = gated_memory(**dict(zip(names, leaves, strict=True)), backend="reference")[0]
        torch.testing.assert_close(o[r], each)
        for grad, alone in zip(grads, torch.autograd.grad(each.square().sum(), leaves), strict=True):
            torch.testing.assert_close(grad[r], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("initial", "residual"), [(False, False), (True, True)])
def test_short_conv_gets_its_weights_the_other_way_round(anywhere, monkeypatch, initial, residual):
    W, D = 4, 6

    def causal_conv1d(x, weight, bias, residual=None, initial_state=None, activation=None):
        assert weight.shape == (D, W) and (initial_state is None or initial_state.shape == (2, D, W))
        start = None if initial_state is None else initial_state.transpose(1, 2)[:, 1:]
        y = short_conv_reference(x, weight.t().flip(0), bias, activation, False, start)
        return (y if residual is None else y + residual), None

    module = types.ModuleType("fla.modules.causal_conv1d")
    module.causal_conv1d = causal_conv1d
    for name in ("fla", "fla.modules"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.modules.causal_conv1d", module)
    x, weight, bias = torch.randn(2, 7, D), torch.randn(W, D), torch.randn(D)
    options = {
        "bias": bias,
        "activation": "silu",
        "residual": residual,
        "initial_state": torch.randn(2, W - 1, D) if initial else None,
    }
    for found, truth in zip(
        short_conv(x, weight, **options, backend="fla"),
        short_conv(x, weight, **options, backend="reference"),
        strict=True,
    ):
        torch.testing.assert_close(found, truth)


def test_mamba_gets_the_step_that_the_decay_says(anywhere, monkeypatch):
    def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, initial_states=None, return_final_states=False):
        assert return_final_states and chunk_size == 16 and A.shape == (x.shape[2],)
        start = None if initial_states is None else initial_states.transpose(2, 3)
        o, state = gated_memory_reference(C, B, x, A * dt, None, dt, None, 1.0, start)
        return o, state.transpose(2, 3)

    module = types.ModuleType(mamba.MODULE)
    module.mamba_chunk_scan_combined = mamba_chunk_scan_combined
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, mamba.MODULE, module)
    inputs = inputs_of("scalar", None, "scalar")
    truth = outputs_and_gradients(partial(gated_memory, backend="reference"), inputs)
    found = outputs_and_gradients(partial(gated_memory, backend="mamba_ssm"), inputs)
    assert max(errors(found, truth).values()) < 1e-4
    inputs["log_decay"][:, 1] = 0.0  # no step at all: nothing is forgotten, and v is written all the same
    o = gated_memory(**inputs, backend="mamba_ssm")[0]
    torch.testing.assert_close(o, gated_memory(**inputs, backend="reference")[0], atol=1e-5, rtol=1e-5)


def test_what_is_not_covered_is_refused_with_a_reason(anywhere, monkeypatch):
    q = torch.zeros(1, 4, 1, 16)
    gate, wide = torch.zeros(1, 4, 1), torch.zeros(1, 4, 1, 16)
    for backend, arguments, reason in [
        ("fla", (gate, gate, gate, gate + 1), "signed decays"),
        ("mamba_ssm", (gate, gate, gate), "covers one positive decay a head"),
        ("mamba_ssm", (wide,), "covers one positive decay a head"),
        ("mlstm_kernels", (gate,), "no backend 'mlstm_kernels'"),
    ]:
        sign = {"decay_sign": arguments[3]} if len(arguments) == 4 else {}
        with pytest.raises(ValueError, match=reason):
            gated_memory(q, q, q, *arguments[:3], **sign, backend=backend)
    with pytest.raises(ValueError, match="up to 256, not 257"):
        gated_memory(*(torch.zeros(1, 1, 1, 257) for _ in range(3)), backend="fla")
    with pytest.raises(ValueError, match="float64"):
        gated_memory(q.double(), q.double(), q.double(), backend="fla")
    with pytest.raises(ValueError, match="multiples of 16"):
        mlstm(*(torch.zeros(1, 4, 1, 8) for _ in range(3)), gate, gate, backend="mlstm_kernels")
    monkeypatch.setattr(fla, "version_of", lambda *names: (0, 5, 2))
    with pytest.raises(ValueError, match=r"0\.6 or newer, not 0\.5\.2"):
        gated_memory(q, q, q, backend="fla")
    monkeypatch.setattr(fla, "version_of", lambda *names: None)
    with pytest.raises(ValueError, match="not installed"):
        gated_memory(q, q, q, backend="fla")


@pytest.mark.parametrize(
    ("triton", "kernel", "has_decay", "reason"),
    [
        ((3, 3, 1), "gated_delta_rule", True, None),
        ((3, 4, 0), "gated_delta_rule", True, "issue 640"),
        ((3, 7, 0), "simple_gla", True, "issue 640"),
        ((3, 7, 0), "simple_gla", False, None),
        ((3, 6, 0), "kda", True, None),
        ((3, 6, 0), "gdn2", True, None),
        ((3, 7, 1), "gated_delta_rule", True, None),
    ],
)
def test_the_wrong_gradient_on_hopper_is_refused(monkeypatch, triton, kernel, has_decay, reason):
    monkeypatch.setattr(fla, "_is_hopper", lambda: True)
    monkeypatch.setattr(fla, "version_of", lambda name: triton if name == "triton" else None)
    found = fla._fault(kernel, has_decay=has_decay)
    assert found is None if reason is None else reason in found
    monkeypatch.setattr(fla, "_is_hopper", lambda: False)
    assert fla._fault(kernel, has_decay=has_decay) is None


def test_a_missing_package_is_announced_where_the_environment_names_it(monkeypatch):
    monkeypatch.setattr(nxai, "version_of", lambda *names: None)
    monkeypatch.setenv("ARENA_BACKEND", "mlstm_kernels")
    sys.modules["kernels.backends"]._warn_once.cache_clear()
    x, gate = torch.zeros(1, 4, 1, 16), torch.zeros(1, 4, 1)
    with pytest.warns(RuntimeWarning, match="mlstm: backend 'mlstm_kernels' needs the package"):
        mlstm(x, x, x, gate, gate)


@needs_nxai
@pytest.mark.parametrize("T", [1, 16, 70, 130])
@pytest.mark.parametrize("initial", [False, True])
def test_nxai_on_a_cpu_is_the_mlstm(T, initial):
    B, H, K, V = 2, 2, 16, 32
    rng = torch.Generator().manual_seed(T)
    size = {"q": (T, H, K), "k": (T, H, K), "v": (T, H, V), "input_gate": (T, H), "forget_gate": (T, H)}
    inputs = {name: torch.randn(B, *shape, generator=rng) for name, shape in size.items()}
    state = None
    if initial:
        before = {name: torch.randn(B, *shape, generator=rng) for name, shape in size.items()}
        state = mlstm(**before, backend="reference")[1]

    def run(backend, **x):
        return mlstm(**x, initial_state=state, backend=backend)

    truth = outputs_and_gradients(partial(run, "reference"), inputs)
    found = outputs_and_gradients(partial(run, "mlstm_kernels"), inputs)
    assert max(errors(found, truth).values()) < 1e-4


@needs_nxai
def test_nxai_leaves_the_normaliser_out_of_its_own_backward():
    """Why its GPU kernels, with the same backward, run forward only here. If this fails they may train."""
    from mlstm_kernels.torch.chunkwise.native import mlstm_chunkwise__native_custbw as peer

    rng = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 64, 2, 16, generator=rng) for _ in range(3)]
    inputs += [torch.randn(2, 64, 2, generator=rng) for _ in range(2)]
    weight = torch.randn(2, 64, 2, 16, generator=rng)
    leaves = [x.clone().requires_grad_() for x in inputs]
    h = mlstm(*leaves)[0]
    for orthogonal in (False, True):
        if orthogonal:
            h_bthv = h.detach()
            weight = weight - (weight * h_bthv).sum(-1, keepdim=True) / h_bthv.square().sum(-1, True) * h_bthv
        truth = torch.autograd.grad(h, leaves, weight, retain_graph=True)
        theirs = [x.transpose(1, 2).contiguous().requires_grad_() for x in inputs]
        found = torch.autograd.grad(peer(*theirs), theirs, weight.transpose(1, 2))
        gaps = [
            float((a.transpose(1, 2) - b).abs().max() / b.abs().max())
            for a, b in zip(found, truth, strict=True)
        ]
        assert max(gaps) < 1e-4 if orthogonal else min(gaps[0], gaps[1], gaps[3], gaps[4]) > 0.1, gaps


def test_a_gradient_that_is_not_there_is_an_error():
    x = torch.ones(2, requires_grad=True)
    (y,) = common.NotDifferentiable.apply("no gradient, for a reason", x)
    torch.testing.assert_close(y, x)
    with pytest.raises(NotImplementedError, match="for a reason"):
        y.sum().backward()


@needs_fla
def test_flash_linear_attention_means_the_same_gates():
    """Its own naive recurrence of GDN-2, which needs no GPU."""
    naive = importlib.import_module("fla.ops.gdn2.naive").naive_recurrent_gdn2
    inputs = inputs_of("channel", "channel", "channel")
    q, k, v, g, b, w, start = inputs.values()
    o, state = naive(q, k, v, g, b, w, scale=0.5, initial_state=start, output_final_state=True)
    truth = gated_memory(**inputs, scale=0.5, backend="reference")
    torch.testing.assert_close(o, truth[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state, truth[1], atol=1e-5, rtol=1e-5)
