"""The gated memory's Triton kernels in Triton's interpreter, on the CPU, against the float64 token loop."""

import itertools

import pytest
import torch
from triton_interpreter import (  # noqa: F401
    bfloat16_products,
    compiled,
    interpreted,
    poisoned,
    run_in_a_fresh_process,
)

from kernels import mlstm
from kernels.gated_memory import triton as ours
from kernels.gated_memory.reference import gated_memory_reference

NAMES = ("o", "state", "dq", "dk", "dv", "d_log_decay", "d_erase", "d_write", "d_initial")
KINDS = list(itertools.product(range(3), repeat=3))
# T, K, V: one token, less than a chunk, several chunks and a rest; widths that are no power of two, K != V
SHAPES = ((1, 20, 16), (19, 8, 40), (35, 16, 12), (32, 5, 3))


@compiled
def test_in_a_fresh_process():
    run_in_a_fresh_process(__file__)


def inputs_of(seed, shape, kinds, *, initial=False, sign=False, dtype=torch.float32):
    """Random (q, k, v, log_decay, erase, write, initial state) and signs, of values that ``dtype`` holds."""
    B, T, H, K, V = shape
    rng = torch.Generator().manual_seed(seed)

    def gate(kind, width):
        size = (B, T, H) if kind == 1 else (B, T, H, width)
        return None if kind == 0 else torch.rand(size, generator=rng)

    q, k = torch.randn(2, B, T, H, K, generator=rng)
    v = torch.randn(B, T, H, V, generator=rng)
    k = k / k.norm(dim=-1, keepdim=True)
    log_decay, erase, write = gate(kinds[0], K), gate(kinds[1], K), gate(kinds[2], V)
    log_decay = None if log_decay is None else 2 * log_decay.clamp_min(1e-6).log()
    erase = None if erase is None else 2 * erase
    signs = None
    if sign and log_decay is not None:
        signs = torch.where(torch.rand(log_decay.shape, generator=rng) < 0.5, -1.0, 1.0)
    state = torch.randn(B, H, K, V, generator=rng) if initial else None
    wide = [log_decay, erase, write, state]
    return [x.to(dtype) for x in (q, k, v)] + wide, signs


def evaluate(operator, inputs, signs, dtype=None):
    """Outputs and all gradients of a random linear function of both outputs."""
    leaves = [
        None if x is None else (x if dtype is None else x.to(dtype)).clone().requires_grad_() for x in inputs
    ]
    q, k, v, log_decay, erase, write, state = leaves
    signs = None if signs is None or dtype is None else signs.to(dtype)
    o, final = operator(q, k, v, log_decay, erase, write, signs, k.shape[-1] ** -0.5, state)
    rng = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=rng, dtype=torch.float64) for x in (o, final)]
    loss = sum((x.double() * w).sum() for x, w in zip((o, final), weights, strict=True))
    grads = iter(torch.autograd.grad(loss, [x for x in leaves if x is not None]))
    return [o.detach(), final.detach()] + [None if x is None else next(grads) for x in leaves]


def operator_with(signs):
    """The Triton operator with given signs (they are not cast with the inputs)."""

    def run(q, k, v, log_decay, erase, write, _, scale, state):
        return ours.gated_memory_triton(q, k, v, log_decay, erase, write, signs, scale, state)

    return run


def compare(inputs, signs, limit=1e-5):
    found = evaluate(operator_with(signs), inputs, None)
    truth = evaluate(gated_memory_reference, inputs, signs, torch.float64)
    for name, a, b in zip(NAMES, found, truth, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            error = (a.double() - b).norm() / b.norm().clamp_min(1e-3)
            assert error < limit, f"{name}: {error:.1e}"
    return found


@interpreted
@pytest.mark.parametrize(
    "number", range(len(KINDS)), ids=[f"decay{d}-erase{e}-write{w}" for d, e, w in KINDS]
)
def test_every_gate_kind(number, monkeypatch):
    T, K, V = SHAPES[number % len(SHAPES)]
    launch = ours.Launch(
        chunk=(16, 32, 64)[number % 3],
        prepare_warps=1,
        value_block=16,
        state_warps=1,
        stages=1,
        key_block=16,
        chunk_warps=1,
        chunk_stages=1,
        pair_block=16,
        pair_warps=1,
    )
    monkeypatch.setattr(ours, "launch_of", lambda *_: launch)
    inputs, signs = inputs_of(
        number, (1, T, 1, K, V), KINDS[number], initial=number % 3 > 0, sign=number % 5 > 2
    )
    compare(inputs, signs)


@interpreted
@pytest.mark.parametrize("kinds", [(0, 1, 1), (2, 2, 2)])
def test_batch_and_heads(kinds):
    inputs, signs = inputs_of(3, (2, 5, 2, 16, 16), kinds, initial=True)
    compare(inputs, signs)


@interpreted
def test_wide_heads_take_their_own_settings():
    for width in (40, 100):
        inputs, signs = inputs_of(4, (1, 20, 1, width, width), (2, 2, 2))
        compare(inputs, signs)


@interpreted
@pytest.mark.parametrize("seed", [5, 9])
@pytest.mark.parametrize("keys", [1, 2])
def test_repeated_keys_with_erase_two(keys, seed):
    # the traps of parity: one or two keys, eigenvalue -1, no decay, long. The same rounding of k^T k, at most
    # K 2^-24 of it, repeats at every token: the eigenvalue 1 - 2 k^T k is off by twice that, its T-th power
    # by 2 T K 2^-24, which is what fp32 can promise (a Neumann series gives 1e9)
    T, K = 512, 16
    inputs, _ = inputs_of(seed, (1, T, 1, K, K), (0, 1, 0))
    which = torch.randint(keys, (T,), generator=torch.Generator().manual_seed(0))
    inputs[1] = inputs[1][:, which]
    inputs[4] = torch.full_like(inputs[4], 2.0)
    compare(inputs, None, limit=T * K * 2.0**-23)


@interpreted
@pytest.mark.parametrize("kind", [1, 2])
def test_log_decay_minus_infinity_erases_and_has_no_gradient(kind):
    inputs, _ = inputs_of(6, (1, 30, 1, 16, 16), (kind, 2, 2), initial=True)
    at = (0, 21)
    inputs[3][at] = -torch.inf
    found = evaluate(operator_with(None), inputs, None)
    assert all(x.isfinite().all() for x in found if x is not None)
    assert (found[5][at] == 0).all()
    changed = list(inputs)
    changed[2] = inputs[2].clone()
    changed[2][0, :21] += 1.0
    again = evaluate(operator_with(None), changed, None)
    assert torch.equal(found[0][:, 21:], again[0][:, 21:]), (
        "what was written before the erasure is read after it"
    )
    compare([x if i != 3 else x.clamp_min(-500.0) for i, x in enumerate(inputs)], None)


@interpreted
def test_strong_decay_in_every_channel():
    inputs, _ = inputs_of(7, (1, 33, 1, 16, 16), (2, 2, 2), initial=True)
    inputs[3] = inputs[3] * torch.linspace(0, 60, 16)
    compare(inputs, None)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs(dtype):
    inputs, _ = inputs_of(8, (1, 20, 1, 16, 16), (2, 1, 2), dtype=dtype)
    found = compare(inputs, None, limit=1e-2)
    assert [x.dtype for x in found if x is not None] == [dtype, torch.float32] + [dtype] * 3 + [
        torch.float32
    ] * 3


@interpreted
@pytest.mark.parametrize("kinds", [(1, 0, 1), (1, 1, 1), (2, 1, 1), (2, 2, 2)])
def test_bfloat16_products(kinds, monkeypatch, bfloat16_products):  # noqa: F811
    # as on a GPU, with operands stored in bfloat16: one rounding of each, some of them times a few
    monkeypatch.setattr(ours, "product_type", lambda k, v: torch.bfloat16)
    inputs, _ = inputs_of(13, (1, 35, 1, 20, 12), kinds, initial=True, dtype=torch.bfloat16)
    compare(inputs, None, limit=1e-2)


@interpreted
def test_state_continues_a_sequence():
    (q, k, v, *gates, state), signs = inputs_of(9, (1, 40, 1, 8, 8), (2, 2, 2), initial=True, sign=True)

    def run(part, start):
        args = [x[:, part] for x in (q, k, v, *gates, signs)]
        return ours.gated_memory_triton(*args, 8**-0.5, start)

    o, final = run(slice(None), state)
    o1, middle = run(slice(0, 21), state)
    o2, last = run(slice(21, None), middle)
    torch.testing.assert_close(torch.cat([o1, o2], 1), o, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, final, rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize("kinds", [(0, 0, 0), (1, 1, 1), (2, 2, 2)])
def test_step_equals_forward(kinds):
    inputs, signs = inputs_of(10, (2, 4, 2, 20, 12), kinds, initial=kinds[0] == 2, sign=True)
    q, k, v, log_decay, erase, write, state = inputs
    wide = [None if x is None else x.double() for x in (*inputs[:6], signs)]
    o, final = gated_memory_reference(*wide, 20**-0.5, None if state is None else state.double())
    steps = []
    with torch.no_grad():
        for t in range(4):
            args = [None if x is None else x[:, t : t + 1] for x in (q, k, v, log_decay, erase, write, signs)]
            o_t, state = ours.gated_memory_triton(*args, 20**-0.5, state)
            steps.append(o_t)
    torch.testing.assert_close(torch.cat(steps, 1).double(), o, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.double(), final, rtol=1e-5, atol=1e-5)


@interpreted
def test_vmap_folds_replicas_into_the_batch():
    replicas = [inputs_of(seed, (1, 5, 1, 8, 8), (2, 1, 2))[0][:6] for seed in range(2)]
    stacked = [torch.stack(x).requires_grad_() for x in zip(*replicas, strict=True)]
    shared = torch.randn(1, 1, 8, 8, requires_grad=True)

    def loss(q, k, v, log_decay, erase, write, state):
        o, final = ours.gated_memory_triton(q, k, v, log_decay, erase, write, None, 1.0, state)
        return o.square().sum() + final.sin().sum()

    together = torch.func.vmap(loss, in_dims=(0,) * 6 + (None,))(*stacked, shared)
    grads = torch.autograd.grad(together.sum(), [*stacked, shared])
    apart = torch.stack([loss(*(x[i] for x in stacked), shared) for i in range(2)])
    expected = torch.autograd.grad(apart.sum(), [*stacked, shared])
    torch.testing.assert_close(together, apart)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    inside = torch.func.vmap(torch.func.grad(loss, argnums=1), in_dims=(0,) * 6 + (None,))(*stacked, shared)
    torch.testing.assert_close(inside, expected[1], rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize("initial", [False, True])
def test_mlstm_with_its_normaliser_as_one_more_column(initial):
    B, T, H, K, V = 1, 19, 2, 8, 16
    rng = torch.Generator().manual_seed(12)
    sizes = [(B, T, H, K), (B, T, H, K), (B, T, H, V), (B, T, H), (B, T, H)]
    sizes += [(B, H, K, V), (B, H, K), (B, H)] if initial else []
    inputs = [torch.randn(size, generator=rng) for size in sizes]
    inputs[3], inputs[4] = 3 * inputs[3], 3 * inputs[4] + 1
    found = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "reference")):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        h, state = mlstm(*leaves[:5], initial_state=tuple(leaves[5:]) or None, backend=backend)
        loss = h.square().sum() + sum((x * x.detach()).sum() for x in state)
        found.append([h, *state, *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*found, strict=True):
        assert (a.double() - b).norm() < 1e-5 * b.norm().clamp_min(1e-3)


@interpreted
def test_gradient_of_one_output_alone():
    inputs, _ = inputs_of(11, (1, 17, 1, 8, 8), (1, 1, 1), initial=True)
    for which in (0, 1):
        both = []
        for operator, dtype in (
            (ours.gated_memory_triton, torch.float32),
            (gated_memory_reference, torch.float64),
        ):
            leaves = [x.to(dtype).requires_grad_() for x in inputs]
            out = operator(*leaves[:6], None, 1.0, leaves[6])[which]
            both.append(torch.autograd.grad(out.sum(), leaves, allow_unused=True))
        for a, b in zip(*both, strict=True):
            assert a is not None or b is None
            if a is not None:
                torch.testing.assert_close(
                    a.double(), torch.zeros_like(a).double() if b is None else b, rtol=1e-4, atol=1e-5
                )


@interpreted
def test_empty_sequences_and_batches():
    state = torch.randn(1, 2, 8, 4)
    q, v = torch.zeros(1, 0, 2, 8), torch.zeros(1, 0, 2, 4)
    o, final = ours.gated_memory_triton(q, q, v, None, None, None, None, 1.0, state)
    assert o.shape == (1, 0, 2, 4)
    assert torch.equal(final, state)
    q, v = torch.zeros(0, 5, 2, 8), torch.zeros(0, 5, 2, 4)
    o, final = ours.gated_memory_triton(q, q, v, None, None, None, None, 1.0, None)
    assert o.shape == (0, 5, 2, 4)
    assert final.shape == (0, 2, 8, 4)


@interpreted
def test_what_is_not_supported_is_refused():
    q = torch.zeros(1, 4, 1, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="float64"):
        ours.gated_memory_triton(q, q, q, None, None, None, None, 1.0, None)
    q = torch.zeros(1, 4, 1, 300)
    with pytest.raises(ValueError, match="256"):
        ours.gated_memory_triton(q, q, q, None, None, None, None, 1.0, None)
    q = torch.randn(1, 4, 1, 8, requires_grad=True)
    o, _ = ours.gated_memory_triton(q, q, q, None, None, None, None, 1.0, None)
    (grad,) = torch.autograd.grad(o.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()
