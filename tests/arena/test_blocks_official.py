"""Official layers against loops in float64 written from the equations of the papers, with the block's
weights."""

from __future__ import annotations

import math

import pytest
import torch

from arena.blocks import build_block

D, H, B, T = 8, 2, 2, 7


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return torch.log(1 + torch.exp(x))


def conv(x, weight, bias=0.0):
    """Causal depthwise convolution of one sequence [T,C]; weight[j] is lag j."""
    rows = []
    for t in range(len(x)):
        lags = [weight[j] * x[t - j] for j in range(len(weight)) if t >= j]
        rows.append(sum(lags) + bias)
    return torch.stack(rows)


def unit(x):
    return x / torch.sqrt((x * x).sum() + 1e-6)


def rms(x, weight):
    return x / torch.sqrt((x * x).mean() + 1e-5) * weight


def heads(x, h, n=H):
    """Part of head h of a vector that holds n heads."""
    width = len(x) // n
    return x[h * width : (h + 1) * width]


def delta_layer(p, x, key, value, gates, norm=True, output_gate=None, conv_silu=True, feature=unit):
    """One sequence through a layer of the delta family; gates(x_t, h) -> (decay, erase, write)."""
    mixed = x @ p["qkv.weight"].T
    if conv_silu:
        mixed = silu(conv(mixed, p["conv.weight"]))
    states = [torch.zeros(key, value, dtype=x.dtype) for _ in range(H)]
    outputs = []
    for t in range(len(x)):
        q, k, v = mixed[t].split([H * key, H * key, H * value])
        reads = []
        for h in range(H):
            qh, kh, vh = feature(heads(q, h)), feature(heads(k, h)), heads(v, h)
            decay, erase, write = gates(x[t], h)
            kept = decay * torch.eye(key, dtype=x.dtype) @ states[h]
            states[h] = kept - torch.outer(kh, (erase * kh) @ kept) + torch.outer(kh, write * vh)
            read = states[h].T @ qh / math.sqrt(key)
            if norm:
                read = rms(read, p["norm.weight"])
            if output_gate is not None:
                read = read * heads(output_gate(x[t]), h)
            reads.append(read)
        outputs.append(p["out.weight"] @ torch.cat(reads))
    return torch.stack(outputs)


def deltanet(p, x, factor):
    def gates(u, h):
        beta = factor * sigmoid(p["gate.erase.weight"] @ u)[h]
        return 1.0, beta, beta

    return delta_layer(p, x, D // H, D // H, gates)


def gdn(p, x, factor):
    def gates(u, h):
        f = (p["gate.decay_in.weight"] @ u)[h] + p["gate.decay.dt_bias"][h, 0]
        beta = factor * sigmoid(p["gate.erase.weight"] @ u)[h]
        return torch.exp(-torch.exp(p["gate.decay.A_log"][h, 0]) * softplus(f)), beta, beta

    return delta_layer(p, x, 3, 6, gates, output_gate=lambda u: silu(p["gate_out.linear.weight"] @ u))


def channel_decay(p, u, h):
    f = heads(p["gate.decay_in.1.weight"] @ (p["gate.decay_in.0.weight"] @ u), h) + p["gate.decay.dt_bias"][h]
    return torch.exp(-torch.exp(p["gate.decay.A_log"][h, 0]) * softplus(f))[:, None]


def low_rank_gate(p, u):
    return p["gate_out.linear.1.weight"] @ (p["gate_out.linear.0.weight"] @ u) + p["gate_out.linear.1.bias"]


def kda(p, x, factor):
    def gates(u, h):
        beta = factor * sigmoid(p["gate.erase.weight"] @ u)[h]
        return channel_decay(p, u, h), beta, beta

    return delta_layer(p, x, D // H, D // H, gates, output_gate=lambda u: sigmoid(low_rank_gate(p, u)))


def gdn2(p, x, factor):
    def gates(u, h):
        erase = factor * heads(sigmoid(p["gate.erase.weight"] @ u), h)
        write = heads(sigmoid(p["gate.write.weight"] @ u), h)
        return channel_decay(p, u, h), erase, write

    return delta_layer(p, x, D // H, D // H, gates, output_gate=lambda u: silu(low_rank_gate(p, u)))


def gla(p, x, factor):
    def gates(u, h):
        f = p["gate.decay_in.1.weight"] @ (p["gate.decay_in.0.weight"] @ u) + p["gate.decay_in.1.bias"]
        return heads(sigmoid(f) ** (1 / 16), h)[:, None], 0.0, 1.0

    def output_gate(u):
        return silu(p["gate_out.linear.weight"] @ u)

    return delta_layer(p, x, 2, 4, gates, output_gate=output_gate, conv_silu=False, feature=lambda u: u)


def linear_attention(p, x, factor):
    """Equation 8 of 2006.16236: a weighted mean over the past, without a recurrence."""
    q, k, v = (x @ p["qkv.weight"].T).split([D, D, D], -1)
    outputs = []
    for t in range(len(x)):
        reads = []
        for h in range(H):
            phi_q = torch.nn.functional.elu(heads(q[t], h)) + 1
            weights = [phi_q @ (torch.nn.functional.elu(heads(k[s], h)) + 1) for s in range(t + 1)]
            total = sum(w * heads(v[s], h) for s, w in enumerate(weights))
            reads.append(total / (sum(weights) + 1e-6 * math.sqrt(D // H)))
        outputs.append(p["out.weight"] @ torch.cat(reads))
    return torch.stack(outputs)


def mamba2(p, x, signed):
    inner, state, n = 2 * D, 2, 8
    z, mixed, dt = (x @ p["project.weight"].T).split([inner, inner + 2 * state, n], -1)
    values, keys, queries = silu(conv(mixed, p["conv.weight"], p["conv.bias"])).split(
        [inner, state, state], -1
    )
    memory = [torch.zeros(state, 2, dtype=x.dtype) for _ in range(n)]
    outputs = []
    for t in range(len(x)):
        reads = []
        for h in range(n):
            delta = softplus(dt[t, h] + p["decay.dt_bias"][h, 0])
            decay = torch.exp(-delta * torch.exp(p["decay.A_log"][h, 0]))
            if signed:
                decay = 2 * decay - 1
            value = heads(values[t], h, n)
            memory[h] = decay * memory[h] + delta * torch.outer(keys[t], value)
            reads.append(queries[t] @ memory[h] + p["D"][h, 0] * value)
        y = torch.cat(reads) * silu(z[t])
        outputs.append(p["out.weight"] @ rms(y, p["norm.weight"]))
    return torch.stack(outputs)


def mlstm(p, x, factor):
    inner = 2 * D
    raw, z = (x @ p["up.weight"].T).split([inner, inner], -1)
    mixed = silu(conv(raw, p["conv.weight"], p["conv.bias"]))

    def blocks(u, maps):
        return torch.cat([u[4 * i : 4 * i + 4] @ maps[i] for i in range(inner // 4)])

    width = inner // H
    memory = [(torch.zeros(width, width, dtype=x.dtype), torch.zeros(width, dtype=x.dtype), None)] * H
    outputs = []
    for t in range(len(x)):
        q, k, v = (blocks(u, p["qkv"][i]) for i, u in enumerate((mixed[t], mixed[t], raw[t])))
        pre = p["gate.weight"] @ torch.cat([q, k, v]) + p["gate.bias"]
        reads = []
        for h in range(H):
            c, n, m_old = memory[h]
            i_pre, log_f = pre[h], torch.log(sigmoid(pre[H + h]))
            m = i_pre if m_old is None else torch.maximum(log_f + m_old, i_pre)
            f_now = 0.0 if m_old is None else torch.exp(log_f + m_old - m)
            k_now = torch.exp(i_pre - m) * heads(k, h) / math.sqrt(width)
            c, n = f_now * c + torch.outer(k_now, heads(v, h)), f_now * n + k_now
            memory[h] = (c, n, m)
            read = c.T @ heads(q, h) / (torch.maximum((n @ heads(q, h)).abs(), torch.exp(-m)) + 1e-6)
            centred = read - read.mean()
            normed = centred / torch.sqrt((centred * centred).mean() + 1e-5) * p["norm_weight"][h]
            reads.append(normed + heads(p["skip"] * mixed[t], h))
        outputs.append(p["down.weight"] @ (torch.cat(reads) * silu(z[t])))
    return torch.stack(outputs)


CASES = [
    ("linear_attention", linear_attention, 1),
    ("gla", gla, 1),
    ("deltanet", deltanet, 1),
    ("deltanet-neg", deltanet, 2),
    ("gdn", gdn, 1),
    ("gdn-neg", gdn, 2),
    ("kda", kda, 1),
    ("kda-neg", kda, 2),
    ("gdn2", gdn2, 1),
    ("gdn2-neg", gdn2, 2),
    ("mamba2", mamba2, False),
    ("mamba2-neg", mamba2, True),
    ("mlstm", mlstm, 1),
]


@pytest.mark.parametrize(("name", "oracle", "factor"), CASES, ids=[case[0] for case in CASES])
def test_official_layer_is_its_equations(name, oracle, factor):
    with torch.random.fork_rng():
        torch.manual_seed(len(name))
        block = build_block(name, d_model=D, n_heads=H, outer="official").double()
        for parameter in block.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
        x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
        pull = torch.randn(B, T, D, dtype=torch.float64)
    parameters = dict(block.named_parameters())
    y, _ = block(x)
    expected = torch.stack([oracle(parameters, row, factor) for row in x])
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    inputs = [x, *parameters.values()]
    ours = torch.autograd.grad((y * pull).sum(), inputs)
    theirs = torch.autograd.grad((expected * pull).sum(), inputs)
    for key, a, b in zip(["x", *parameters], ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8, msg=lambda text, key=key: f"{key}: {text}")


def test_signed_decay_oracle_sees_both_signs():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = build_block("mamba2-neg", d_model=D, n_heads=H, outer="official").double()
        block.decay.dt_bias.data.uniform_(-5.0, 1.0)
        decay = block.trace(torch.randn(B, 50, D, dtype=torch.float64))["decay"]
    assert (decay < -0.2).any() and (decay > 0.2).any()


def test_gdn2_port_gates_with_a_sigmoid():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        paper = build_block("gdn2", d_model=D, n_heads=H, outer="official")
        port = build_block("gdn2", d_model=D, n_heads=H, outer="official", output_gate="sigmoid")
        x = torch.randn(B, T, D)
    port.load_state_dict(paper.state_dict())
    gate = low_rank_gate(dict(paper.named_parameters()), x[0, 0])
    torch.testing.assert_close(paper.trace(x)["output_gate"][0, 0].flatten(), silu(gate))
    torch.testing.assert_close(port.trace(x)["output_gate"][0, 0].flatten(), sigmoid(gate))


def test_published_initialisations():
    with torch.random.fork_rng():
        torch.manual_seed(2)
        wide = {
            name: build_block(name, d_model=512, n_heads=64, outer="official")
            for name in ("gdn", "kda", "gdn2")
        }
        mamba2_block = build_block("mamba2", d_model=512, n_heads=64, outer="official")
        mlstm_block = build_block("mlstm", d_model=64, n_heads=4, outer="official")
    decays = {name: block.gate.decay for name, block in wide.items()} | {"mamba2": mamba2_block.decay}
    for name, decay in decays.items():
        a = decay.A_log.exp()
        low = 0.0 if name == "gdn" else 1.0
        assert low <= a.min() and a.max() <= 16 and abs(a.mean() - (low + 16) / 2) < 2.5, name
        step = softplus(decay.dt_bias.double())
        assert step.min() > 0.99e-3 and step.max() < 0.101, name
        assert abs(step.log().mean() - math.log(1e-2)) < 0.6, name
    for name in ("gdn2",):
        for linear in (wide[name].out, wide[name].gate.write, wide[name].gate.erase):
            bound = 2**-2.5 * math.sqrt(6 / sum(linear.weight.shape))
            assert 0.99 * bound < linear.weight.abs().max() <= bound
        bound = 2**-2.5 * math.sqrt(6 / (512 + 512))
        assert 0.99 * bound < wide[name].qkv.weight.abs().max() <= bound
        assert not wide[name].gate_out.linear[1].bias.any()
    assert torch.equal(mamba2_block.D, torch.ones_like(mamba2_block.D))
    assert not mlstm_block.gate.weight.any()
    torch.testing.assert_close(mlstm_block.gate.bias[4:], torch.tensor([3.0, 4.0, 5.0, 6.0]))


def test_what_the_optimiser_must_not_decay():
    for name in ("gdn", "mamba2", "mlstm", "gla"):
        block = build_block(name, d_model=D, n_heads=H, outer="official")
        for key, parameter in block.named_parameters():
            exempt = any(word in key for word in ("A_log", "dt_bias", "bias", "norm")) or key == "D"
            assert getattr(parameter, "no_weight_decay", False) == exempt, (name, key)


def test_layers_without_an_mlp():
    mlps = {n: build_block(n, d_model=D, n_heads=H, outer="official").mlp for n in ("gdn", "mamba2", "mlstm")}
    assert mlps == {"gdn": "swiglu", "mamba2": "none", "mlstm": "none"}
    assert build_block("mlstm", d_model=D, n_heads=H).mlp == "swiglu"


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("mamba2", dict(outer="official", headdim=5), "headdim must divide"),
        ("mamba2", dict(d_state=4), "official Mamba-2"),
        ("mamba2", dict(outer="official", gates={"signed": True}), "fixed gates"),
        ("mlstm", dict(n_blocks=4), "official mLSTM"),
        ("mlstm", dict(outer="official", gates={"write": "scalar"}), "fixed gates"),
        ("gdn", dict(output_gate="tanh"), "output_gate must be"),
        ("gdn", dict(gates={"erse": "none"}), "no axis 'erse'"),
        ("gdn", dict(outputgate="none"), "did you mean output_gate"),
        ("gdn", dict(outer="offical"), "did you mean official"),
        ("gdn", dict(conv="statik"), "did you mean static"),
        ("gnd", dict(), "did you mean gdn"),
        ("gdn", dict(n_heads=3), "multiple of n_heads"),
    ],
)
def test_wrong_requests_say_what_is_wrong(name, options, reason):
    with pytest.raises(ValueError, match=reason):
        build_block(name, **{"d_model": D, "n_heads": H, **options})
