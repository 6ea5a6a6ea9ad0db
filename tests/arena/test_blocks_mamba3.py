"""Mamba-3 against a float64 loop of the recurrence as it is published, in complex numbers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from test_training_fleet import TASK, model_config, same, train_config

from arena.blocks import build_block
from arena.training import Replica, train_fleet

D, H = 8, 2
KINDS = {
    "siso": {},
    "mimo": dict(rank=3),
    "heavy tail": dict(a_activation="heavy-tail"),
    "all channels turn": dict(rope_fraction=1.0),
    "fixed angles": dict(rotary="fixed"),
    "no rotation": dict(rotary="none"),
    "euler": dict(trapezoid=1.0),
    "trapezoid": dict(trapezoid=0.5, rank=2),
    "no bias": dict(bias=False),
}


def make(outer="official", *, seed=0, spread=0.5, dtype=torch.float64, d_model=D, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        block = build_block("mamba3", d_model=d_model, n_heads=H, outer=outer, **options)
        for parameter in block.parameters():
            parameter.data.add_(spread * torch.randn_like(parameter))
    return block.to(dtype)


def tokens(length, *, batch=2, seed=0, d_model=D):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, d_model, generator=g, dtype=torch.float64)


def rms(x):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5)


def gates(f, block, options, heads, pairs):
    """Delta, A, lambda and theta [B,T,H] and [B,T,H,P] of pre-activations, as the paper has them."""
    trapezoid, rotary = options.get("trapezoid"), options.get("rotary", "data")
    dt, a, f = f[..., :heads], f[..., heads : 2 * heads], f[..., 2 * heads :]
    step = F.softplus(dt + block.token_gates.dt_bias)
    if options.get("a_activation") == "heavy-tail":
        a = torch.stack([1 + x if x >= 0 else 1 / (1 - x) for x in a.flatten()]).reshape(a.shape)
    else:
        a = F.softplus(a)
    if trapezoid is None:
        lam, f = f[..., :heads].sigmoid(), f[..., heads:]
    else:
        lam = torch.full_like(step, trapezoid)
    theta = {
        "data": lambda: math.pi * torch.tanh(f)[..., None, :] * step[..., None],
        "fixed": lambda: torch.tensor(
            [10000.0 ** (-i / pairs) for i in range(pairs)], dtype=torch.float64
        ).expand(*step.shape, pairs),
        "none": lambda: step.new_zeros(*step.shape, 0),
    }[rotary]()
    return step, -a.clamp_min(1e-4), lam, theta


def memory_loop(q, k, v, step, a, lam, theta, block):
    """Reads [B,T,H,R,V]: h_t = e^(Delta A + i theta) (h_{t-1} + (1 - lambda) Delta k_{t-1} v_{t-1}) + ..."""
    pairs = theta.shape[-1]
    B, T, heads, R, K = k.shape

    def to_complex(x):  # pairs that turn, then channels that do not
        turning = torch.view_as_complex(x[..., : 2 * pairs].unflatten(-1, (-1, 2)).contiguous())
        return torch.cat([turning, x[..., 2 * pairs :].to(turning.dtype)], -1)

    q, k = to_complex(q), to_complex(k)
    angle = F.pad(theta, (0, K - 2 * pairs))
    factor = torch.polar((step * a).exp()[..., None].expand_as(angle), angle)
    values = v[..., None, :] if R == 1 else v[..., None, :] * block.mimo_x
    h = torch.zeros(B, heads, K - pairs, v.shape[-1], dtype=k.dtype)
    reads = []
    for t in range(T):
        if t:
            write = torch.einsum("bhrk,bhrv->bhkv", k[:, t - 1], values[:, t - 1].to(k.dtype))
            h = h + ((1 - lam[:, t]) * step[:, t])[..., None, None] * write
        h = factor[:, t, ..., None] * h
        write = torch.einsum("bhrk,bhrv->bhkv", k[:, t], values[:, t].to(k.dtype))
        h = h + (lam[:, t] * step[:, t])[..., None, None] * write
        reads.append(torch.einsum("bhrk,bhkv->bhrv", q[:, t].conj(), h).real)
    return torch.stack(reads, 1), h


def official_loop(block, x, options):
    heads, R, K, V = block.n_heads, options.get("rank", 1), block.key_dim, block.value_dim
    pairs = block.pairs
    z, v, b, c, f = block.project(x).split(
        [heads * V, heads * V, R * K, R * K, sum(block.token_gates.widths)], -1
    )
    step, a, lam, theta = gates(f, block, options, heads, pairs)
    k = (rms(b.unflatten(-1, (R, K))) * block.k_norm.weight)[:, :, None].expand(-1, -1, heads, -1, -1)
    q = (rms(c.unflatten(-1, (R, K))) * block.q_norm.weight)[:, :, None].expand(-1, -1, heads, -1, -1)
    if options.get("bias", True):
        k, q = k + block.k_bias, q + block.q_bias
    v, z = v.unflatten(-1, (heads, V)), z.unflatten(-1, (heads, V))
    reads, _ = memory_loop(q, k, v, step, a, lam, theta, block)
    y = torch.zeros_like(v)
    for r in range(R):
        x_r = v if R == 1 else v * block.mimo_x[:, r]
        y_r = reads[:, :, :, r] + block.D[:, 0] * x_r
        if block.norm is not None:
            y_r = rms(y_r) * block.norm.weight[:, 0]
        y_r = y_r * F.silu(z if R == 1 else z * block.mimo_z[:, r])
        y = y + (y_r if R == 1 else y_r * block.mimo_o[:, r])
    return block.out(y.flatten(-2))


def common_loop(block, x, options):
    """With conv='none': q, k and v straight from x, then SiLU."""
    heads, R, K, V = block.n_heads, options.get("rank", 1), block.key_dim, block.value_dim
    q, k, v = F.silu(block.qkv(x)).split([heads * R * K, heads * R * K, heads * V], -1)
    q, k = (y.unflatten(-1, (heads, R, K)) for y in (q, k))
    q, k = (y / torch.sqrt(y.square().sum(-1, keepdim=True) + 1e-6) for y in (q, k))
    if options.get("bias", True):
        k, q = k + block.k_bias, q + block.q_bias
    v = v.unflatten(-1, (heads, V))
    step, a, lam, theta = gates(block.gate_in(x), block, options, heads, block.pairs)
    reads, _ = memory_loop(q * K**-0.5, k, v, step, a, lam, theta, block)
    y = reads[:, :, :, 0] if R == 1 else (reads * block.mimo_o).sum(-2)
    y = rms(y) * block.norm.weight * F.silu(block.gate_out.linear(x)).unflatten(-1, (heads, V))
    return block.out(y.flatten(-2))


LOOPS = {"official": official_loop, "common": common_loop}


def compare(block, loop, x, tolerance=1e-9):
    """Outputs and every gradient of a block and a loop."""
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(9), dtype=x.dtype)
    found = []
    for run in (lambda x: block(x)[0], loop):
        block.zero_grad()
        x = x.detach().requires_grad_()
        y = run(x)
        (y * weight).sum().backward()
        grads = {name: p.grad.clone() for name, p in block.named_parameters()}
        found.append((y.detach(), grads | {"x": x.grad}))
    (y, grads), (expected, expected_grads) = found
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    for name, grad in grads.items():
        scale = max(1.0, expected_grads[name].abs().max().item())
        torch.testing.assert_close(grad / scale, expected_grads[name] / scale, rtol=tolerance, atol=tolerance)
        if x.shape[1] > 2:
            assert grad.abs().sum() > 0, name


@pytest.mark.parametrize("outer", ["official", "common"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_published_recurrence(kind, outer):
    options = KINDS[kind]
    block = make(outer, conv="none", **options)
    compare(block, lambda x: LOOPS[outer](block, x, options), tokens(7))


@pytest.mark.parametrize("length", [1, 2, 33, 131])
@pytest.mark.parametrize("rank", [1, 4])
def test_every_length(length, rank):
    block = make(rank=rank, seed=length, out_norm=True)
    compare(block, lambda x: official_loop(block, x, dict(rank=rank)), tokens(length, seed=length))


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize(
    ("step", "rate", "share"),
    [(6.0, 6.0, 0.0), (40.0, 0.0, -9.0), (-9.0, -9.0, 9.0), (0.0, 30.0, 0.0), (0.0, -30.0, 40.0)],
    ids=["long steps", "huge steps, all to the token before", "no steps", "forgets at once", "keeps all"],
)
def test_extreme_gates(step, rate, share, rank):
    block = make(rank=rank, spread=0.2)
    heads = block.n_heads
    with torch.no_grad():  # x has a constant channel, through which the gates are moved
        for start, value in zip((0, heads, 2 * heads), (step, rate, share), strict=True):
            at = block.widths[0] + block.widths[1] + start
            block.project.weight[at : at + heads, 0] += value
    x = tokens(20)
    x[..., 0] = 1.0
    compare(block, lambda x: official_loop(block, x, dict(rank=rank)), x)


@pytest.mark.parametrize("rank", [1, 3])
def test_no_token_sees_the_gates_of_the_next_one(rank):
    """Not even in rounding: equal to the last bit, whatever comes after."""
    block = make(rank=rank, dtype=torch.float32)
    x = tokens(9).float()
    y, _ = block(x)
    changed = x.clone()
    changed[:, 5:] *= 1e4
    assert torch.equal(block(changed)[0][:, :5], y[:, :5])


def test_a_long_next_step_costs_no_precision():
    """In float32 every read is as exact as its own terms are, also before a step of 1e4."""
    block = make(spread=0.2)
    with torch.no_grad():
        block.project.weight[block.widths[0] + block.widths[1] :, 0] = 0.0
        block.project.weight[block.widths[0] + block.widths[1] :][: block.n_heads, 0] = 1.0
    x = tokens(12)
    x[..., 0] = torch.tensor([-4.0, 1e4] * 6)
    y = official_loop(block, x, {})
    rounded = block.float()(x.float())[0].double()
    short = y[:, ::2], rounded[:, ::2]
    torch.testing.assert_close(short[1], short[0], rtol=2e-4, atol=1e-4 * short[0].abs().max().item())


@pytest.mark.parametrize("options", [{}, dict(rank=2)], ids=["siso", "mimo"])
def test_state_continues_exactly_also_in_its_gradients(options):
    x = tokens(23)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    found = []
    for cuts in ([23], [1, 1, 9, 2, 10]):
        block, state, outputs = make(**options), None, []
        for piece in x.split(cuts, 1):
            y, state = block(piece, state)
            outputs.append(y)
        y = torch.cat(outputs, 1)
        (y * weight).sum().backward()
        found.append([y.detach(), *state.values(), *(p.grad for p in block.parameters())])
    for whole, pieces in zip(*found, strict=True):
        torch.testing.assert_close(pieces, whole, rtol=1e-11, atol=1e-11)


def test_nothing_read_changes_nothing():
    block = make(rank=2)
    _, state = block(tokens(5))
    y, same = block(tokens(5)[:, :0], state)
    assert y.shape == (2, 0, D)
    for name, value in state.items():
        torch.testing.assert_close(same[name], value, rtol=1e-14, atol=1e-14)


def test_the_angle_stays_exact_over_long_sequences():
    """float32, 32,768 tokens, in one piece and in uneven ones: the angle is right to 1e-7 rad."""
    block = make(dtype=torch.float32, spread=0.3)
    x = tokens(32768, batch=1, seed=4).float()
    with torch.no_grad():
        theta = block.inputs(x, None).gates.angle[0]  # [T,H,P]
        _, whole = block(x)
        state = None
        for piece in x.split([1, 4000, 28767], 1):
            _, state = block(piece, state)
    exact = [[math.fsum(theta[:, h, p].tolist()) for p in range(block.pairs)] for h in range(block.n_heads)]
    assert max(abs(a) for row in exact for a in row) > 100  # many turns
    for found in (whole["angle"][0], state["angle"][0]):
        off = (
            torch.remainder(found - torch.tensor(exact, dtype=torch.float64) + math.pi, 2 * math.pi) - math.pi
        )
        assert off.abs().max() < 1e-7
        assert found.abs().max() <= math.pi + 1e-12
    torch.testing.assert_close(state["key"], whole["key"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [dict(outer="official"), dict(options=dict(rank=2))], ids=str)
def test_a_fleet_is_its_runs_bit_for_bit(options):
    model = model_config("mamba3", n_layers=1, **options)
    replicas = [Replica(seed=seed, lr=lr) for seed, lr in ((0, 1e-2), (1, 3e-3), (2, 1e-2))]
    for replica, result in zip(
        replicas, train_fleet(model, TASK, train_config(steps=3), replicas), strict=True
    ):
        [alone] = train_fleet(model, TASK, train_config(steps=3), [replica])
        assert same(alone, result)


def parity_block():
    """Hand-set: a 1 turns the memory by pi and adds a unit, so that it holds 0 or the unit."""
    block = build_block("mamba3", d_model=8, n_heads=1, outer="official")
    heads, inner = block.n_heads, 16
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
        one = 0  # channel of x that is 1 for the token 1; channel 1 is always 1
        rows = block.project.weight
        rows[:inner, 1] = 10.0  # z: the gate is open
        rows[inner, one] = 1.0  # the value, in the first head
        gate = inner + block.widths[1]
        block.token_gates.dt_bias.fill_(-20.0)
        rows[gate, one] = 20.0 + math.log(math.e - 1)  # Delta = 1 for a 1, else 2e-9
        rows[gate + heads : gate + 2 * heads, 1] = -20.0  # A at its floor
        rows[gate + 2 * heads : gate + 3 * heads, 1] = 30.0  # lambda = 1
        rows[gate + 3 * heads, one] = 20.0  # tanh = 1: an angle of pi
        block.k_bias[..., 0] = 1.0
        block.q_bias[..., 0] = 1.0
        block.out.weight[0, 0] = 0.1 * (1 + math.exp(-10.0))
    return block


def test_hand_set_weights_solve_parity():
    """A turn by pi is the reflection that parity needs; without it the same weights count."""
    block = parity_block()
    bits = torch.randint(2, (16, 1000), generator=torch.Generator().manual_seed(0))
    x = torch.zeros(16, 1000, 8)
    x[..., 0], x[..., 1] = bits, 1.0
    with torch.no_grad():
        y, _ = block(x)
        parity = bits.cumsum(1) % 2
        assert torch.equal((y[..., 0] > 0.5).long(), parity)
        assert (y[..., 0] - 0.5).abs().min() > 0.4  # e^-0.05 of a half is left after 500 turns
        stepped, state = [], block.initial_state(16)
        for x_t in x[:, :60].unbind(1):
            y_t, state = block.step(x_t, state)
            stepped.append(y_t)
        torch.testing.assert_close(torch.stack(stepped, 1), y[:, :60], rtol=1e-5, atol=1e-5)
        block.project.weight[-1] = 0.0
        counted, _ = block(x[:, :20])
    torch.testing.assert_close(counted[..., 0], bits[:, :20].cumsum(1).float(), rtol=1e-2, atol=1e-2)


def test_hand_set_parity_holds_for_32768_tokens():
    """In float32: A at its floor keeps e^-1.6 of the difference over 16,000 turns by pi."""
    bits = torch.randint(2, (1, 32768), generator=torch.Generator().manual_seed(2))
    x = torch.zeros(1, 32768, 8)
    x[..., 0], x[..., 1] = bits, 1.0
    with torch.no_grad():
        y, _ = parity_block()(x)
    assert torch.equal((y[..., 0] > 0.5).long(), bits.cumsum(1) % 2)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("outer", ["official", "common"])
def test_bfloat16_keeps_its_memory_in_float32(outer, rank):
    block, x = make(outer, rank=rank, spread=0.1, dtype=torch.bfloat16), tokens(40).bfloat16()
    y, state = block(x)
    assert y.dtype == torch.bfloat16
    assert {state[name].dtype for name in ("memory", "key", "value")} == {torch.float32}
    assert state["angle"].dtype == torch.float64
    exact, _ = block.double()(x.double())
    assert (y.double() - exact).norm() < 0.02 * exact.norm()


def test_sizes_and_initial_values():
    block = build_block("mamba3", d_model=64, n_heads=4, outer="official", headdim=16, d_state=32, rank=4)
    assert (block.n_heads, block.value_dim, block.key_dim, block.pairs, block.mlp) == (8, 16, 32, 8, "swiglu")
    assert block.conv.kind == "none" and block.norm is None
    normed = build_block("mamba3", d_model=64, n_heads=4, outer="official", out_norm=True)
    assert normed.norm.weight.numel() == 2 * 64
    assert block.project.weight.shape[0] == 2 * 128 + 2 * 32 * 4 + 3 * 8 + 8
    assert (block.q_bias == 1).all() and (block.mimo_x == 0.25).all() and (block.mimo_o == 0.25).all()
    step = F.softplus(block.token_gates.dt_bias)
    assert step.min() > 0.9e-3 and step.max() < 0.11
    common = build_block("mamba3", d_model=64, n_heads=4)
    assert (common.n_heads, common.key_dim, common.pairs, common.conv.kind) == (4, 16, 4, "static")
    assert (common.k_bias == 0.25).all()
    decayed = {n for n, p in block.named_parameters() if not getattr(p, "no_weight_decay", False)}
    assert decayed == {"project.weight", "out.weight"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rank=0), "rank must be at least 1"),
        (dict(a_activation="softmax"), "unknown a_activation 'softmax'; did you mean softplus"),
        (dict(rotary="learned"), "unknown rotary 'learned'; known: data, fixed, none"),
        (dict(rope_fraction=0.3), "rope_fraction must be 0.5 or 1"),
        (dict(trapezoid=1.5), r"lambda at a number in \[0, 1\]"),
        (dict(d_state=16), "official Mamba-3 layer"),
        (dict(out_norm=True), "official Mamba-3 layer"),
        (dict(output_gate="none", outer="official"), "own output gate"),
        (dict(headdim=5, outer="official"), "headdim must divide 2 d_model"),
        (dict(d_state=1, outer="official"), "a rotation needs heads of at least 2 key channels"),
        (dict(gates={}), "no option 'gates'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_block("mamba3", **{"d_model": D, "n_heads": H, **options})
