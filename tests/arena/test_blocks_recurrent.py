"""sLSTM and LSTM blocks against loops from the equations, and against torch's LSTM."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from arena.blocks import build_block

D, H, K, T = 6, 2, 3, 8
F64 = torch.float64


def make(name, outer, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = build_block(name, d_model=D, n_heads=H, outer=outer, **options)
        for parameter in block.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return block.to(F64)


def tokens(seed=0):
    return torch.randn(2, T, D, dtype=F64, generator=torch.Generator().manual_seed(seed))


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def convolved(x, weight, bias):
    rows = [sum(weight[j] * x[t - j] for j in range(len(weight)) if t >= j) + bias for t in range(len(x))]
    rows = torch.stack(rows)
    return rows * sigmoid(rows)


@pytest.mark.parametrize("conv", [None, "none"])
def test_official_slstm(conv):
    block, x = make("slstm", "official", conv=conv), tokens()
    p = dict(block.named_parameters())
    want = []
    for row in x:
        mixed = row if conv == "none" else convolved(row, p["conv.weight"], p["conv.bias"])
        heads = []
        for h in range(H):
            part = slice(h * K, (h + 1) * K)
            out, c, n = (torch.zeros(K, dtype=F64) for _ in range(3))
            ys = []
            for t in range(T):
                sources = [mixed[t, part], mixed[t, part], row[t, part], row[t, part]]
                i, f, z, o = (
                    sources[g] @ p["weight"][g, h] + out @ p["recurrent"][g, h] + p["bias"][g, h]
                    for g in range(4)
                )
                c = sigmoid(f) * c + torch.exp(i) * torch.tanh(z)
                n = sigmoid(f) * n + torch.exp(i)
                out = sigmoid(o) * c / n
                centred = out - out.mean()
                ys.append(centred / torch.sqrt(centred.square().mean() + 1e-5) * p["norm_weight"][h])
            heads.append(torch.stack(ys))
        want.append(torch.cat(heads, -1))
    torch.testing.assert_close(block(x)[0], torch.stack(want), atol=1e-10, rtol=1e-10)
    assert block.mlp == "gelu"


def test_slstm_starts_as_published():
    for depth, exponent in ((0.0, 0.3), (0.5, 0.95), (1.0, 1.6)):
        for outer in ("common", "official"):
            block = build_block("slstm", d_model=16, n_heads=2, outer=outer, depth=depth)
            want = torch.tensor([5 - 12 * (j / 7) ** exponent for j in range(8)])
            torch.testing.assert_close(block.bias[1], want.expand(2, 8))
            assert block.bias[[0, 2, 3]].abs().sum() == block.recurrent.abs().sum() == 0
    assert (block.bias[1, :, 0] == 5).all() and (block.bias[1, :, -1] == -7).all()


def test_official_lstm_is_torchs():
    ours = build_block("lstm", d_model=D, n_heads=H, outer="official").to(F64)
    theirs = nn.LSTM(D, D, batch_first=True, dtype=F64)
    with torch.no_grad():
        ours.weight.weight.copy_(theirs.weight_ih_l0)
        ours.recurrent.copy_(theirs.weight_hh_l0.unflatten(0, (4, D)).transpose(1, 2)[:, None])
        ours.bias.copy_((theirs.bias_ih_l0 + theirs.bias_hh_l0).view(4, 1, D))
    x = tokens()
    y, state = ours(x[:, :5])
    want, end = theirs(x[:, :5])
    torch.testing.assert_close(y, want, atol=1e-12, rtol=1e-12)
    for a, b in zip((state["h"], state["c"]), end, strict=True):
        torch.testing.assert_close(a[:, 0], b[0], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(ours(x[:, 5:], state)[0], theirs(x)[0][:, 5:], atol=1e-12, rtol=1e-12)
    loss, other = ours(x)[0].square().sum(), theirs(x)[0].square().sum()
    loss.backward()
    other.backward()
    torch.testing.assert_close(ours.weight.weight.grad, theirs.weight_ih_l0.grad)
    torch.testing.assert_close(ours.bias.grad.flatten(), theirs.bias_ih_l0.grad)
    torch.testing.assert_close(
        ours.recurrent.grad[:, 0], theirs.weight_hh_l0.grad.unflatten(0, (4, D)).transpose(1, 2)
    )


def test_lstm_starts_like_torchs():
    ours, theirs = (build_block("lstm", d_model=400, n_heads=1, outer="official"), nn.LSTM(400, 400))
    assert ours.recurrent.abs().max() <= 400**-0.5
    pairs = [
        (ours.recurrent, theirs.weight_hh_l0),
        (ours.weight.weight, theirs.weight_ih_l0),
        (ours.bias, theirs.bias_ih_l0 + theirs.bias_hh_l0),
    ]
    for a, b in pairs:
        assert abs(a.std() / b.std() - 1) < 0.1
    assert ours.mlp == "none"


@pytest.mark.parametrize("name", ["slstm", "lstm"])
@pytest.mark.parametrize("conv", ["none", "static", "dynamic-lowrank", "dynamic-headwise", "gate"])
def test_every_convolution_joins_halves(name, conv):
    for outer in ("common", "official"):
        block, x = make(name, outer, conv=conv), tokens()
        whole, _ = block(x)
        first, state = block(x[:, :3])
        second, end = block(x[:, 3:], state)
        torch.testing.assert_close(torch.cat([first, second], 1), whole, atol=1e-10, rtol=1e-10)
        assert ("conv" in end) == (conv not in ("none", "gate"))


@pytest.mark.parametrize("name", ["slstm", "lstm"])
@pytest.mark.parametrize("outer", ["common", "official"])
def test_trace_explains_the_output(name, outer):
    block, x = make(name, outer), tokens()
    first, state = block(x[:, :3])
    trace = block.trace(x[:, 3:], state)
    y = block.output(x[:, 3:], trace["read"] * trace["output_gate"])
    torch.testing.assert_close(torch.cat([first, y], 1), block(x)[0], atol=1e-10, rtol=1e-10)
    cell = trace["cell"]
    if name == "lstm":
        want = trace["decay"][:, 1:] * cell[:, :-1] + (trace["write"] * trace["v"])[:, 1:]
        torch.testing.assert_close(cell[:, 1:], want, atol=1e-10, rtol=1e-10)
    else:  # the mean moves to v by the share that the new weight has in the normaliser
        read = trace["read"]
        moved = (read[:, 1:] - read[:, :-1]) / (trace["v"][:, 1:] - read[:, :-1])
        assert ((moved > 0) & (moved < 1)).all()


def test_heads_of_an_lstm_are_ignored():
    sizes = {
        sum(p.numel() for p in build_block("lstm", d_model=8, n_heads=h).parameters()) for h in (1, 2, 4)
    }
    assert build_block("lstm", d_model=8, n_heads=4).recurrent.shape == (4, 1, 8, 8)
    assert len(sizes) == 1
