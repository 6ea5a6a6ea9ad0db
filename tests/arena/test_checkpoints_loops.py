"""Imported models against float64 loops over tokens, written from the equations with the public names.

Nothing of our blocks is used in them: they read config.json and the public tensors.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from arena.checkpoints import import_checkpoint, translate
from arena.checkpoints.mapping import to_public

FIXTURES = Path(__file__).parents[1] / "fixtures" / "checkpoints"
NAMES = sorted(path.name for path in FIXTURES.iterdir())


def rms(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def causal_conv(x, weight, bias=None):
    """x [T,C], weight [C,1,W], its last tap for the present token."""
    T, W = x.shape[0], weight.shape[-1]
    rows = []
    for t in range(T):
        y = torch.zeros_like(x[0]) if bias is None else bias
        for lag in range(min(W, t + 1)):
            y = y + weight[:, 0, W - 1 - lag] * x[t - lag]
        rows.append(y)
    return torch.stack(rows)


def memory(q, k, v, decay, beta, n=1):
    """One head: q, decay [T,K]; k [T,n,K], v [T,n,V]; beta [T,n], or None: nothing is erased."""
    S = torch.zeros(k.shape[-1], v.shape[-1], dtype=q.dtype)
    out = []
    for t in range(q.shape[0]):
        S = decay[t][:, None] * S
        for j in range(n):
            if beta is None:
                S = S + torch.outer(k[t, j], v[t, j])
            else:
                S = S + beta[t, j] * torch.outer(k[t, j], v[t, j] - S.T @ k[t, j])
        out.append(S.T @ q[t] * q.shape[-1] ** -0.5)
    return torch.stack(out)


def fla_mixer(config, w, x):
    """One layer of a flash-linear-attention model: x [T,D], w: tensors of ``attn.``."""
    kind = config["model_type"]
    H = config["num_heads"]
    n = config.get("num_householder", 1)
    erases = kind != "gla"
    conv = config["use_short_conv"]

    def project(letter):
        y = x @ w[f"{letter}_proj.weight"].T
        if conv:
            y = causal_conv(y, w[f"{letter}_conv1d.weight"])
        return F.silu(y) if conv or erases else y

    q, k, v = project("q"), project("k"), project("v")
    V = w["o_norm.weight" if erases else next(name for name in w if name.startswith("g_norm"))].shape[0]
    G = w["o_proj.weight"].shape[1] // V  # heads that read
    K = q.shape[-1] // H
    T = x.shape[0]
    q, k, v = q.view(T, H, K), k.view(T, n, -1, K), v.view(T, n, -1, V)
    if erases:
        q, k = unit(q), unit(k)
    beta = None
    if erases:
        beta = torch.sigmoid(x @ w["b_proj.weight"].T) * (2 if config["allow_neg_eigval"] else 1)
        beta = beta.view(T, n, G)
    if kind == "gla":
        f = (x @ w["gk_proj.0.weight"].T) @ w["gk_proj.1.weight"].T + w["gk_proj.1.bias"]
        log_decay = F.logsigmoid(f).view(T, -1, K) / 16
    elif kind == "kda":
        f = ((x @ w["f_proj.0.weight"].T) @ w["f_proj.1.weight"].T + w["dt_bias"]).view(T, G, K)
        a = w["A_log"].exp()[:, None]
        bound = config["lower_bound"]
        log_decay = -a * F.softplus(f) if bound is None else bound * torch.sigmoid(a * f)
    elif "A_log" in w:
        f = x @ w["a_proj.weight"].T + w["dt_bias"]
        log_decay = (-w["A_log"].exp() * F.softplus(f))[..., None].expand(T, G, K)
    else:
        log_decay = torch.zeros(T, G, K, dtype=x.dtype)
    reads = []
    for head in range(G):  # heads that share: neighbours
        qh, kh = head * q.shape[1] // G, head * k.shape[2] // G
        vh, dh = head * v.shape[2] // G, head * log_decay.shape[1] // G
        own = None if beta is None else beta[:, :, head]
        reads.append(memory(q[:, qh], k[:, :, kh], v[:, :, vh], log_decay[:, dh].exp(), own, n))
    read = torch.stack(reads, 1)
    norm = next(w[name] for name in w if name.startswith(("o_norm", "g_norm")))
    read = rms(read, norm, config["norm_eps"])
    if "g_proj.weight" in w:
        gate = (x @ w["g_proj.weight"].T).view(T, G, V)
        read = read * (gate.sigmoid() if config.get("output_gate_activation") == "sigmoid" else F.silu(gate))
    elif "g_proj.0.weight" in w:
        gate = (x @ w["g_proj.0.weight"].T) @ w["g_proj.1.weight"].T + w["g_proj.1.bias"]
        read = read * gate.view(T, G, V).sigmoid()
    return read.reshape(T, -1) @ w["o_proj.weight"].T


def mamba2_mixer(w, x, d_state, head_dim, eps):
    """One layer of Mamba-2: x [T,D], w: tensors of ``mixer.``."""
    T = x.shape[0]
    inner = w["out_proj.weight"].shape[1]
    H = inner // head_dim
    z, mixed, f = (x @ w["in_proj.weight"].T).split([inner, inner + 2 * d_state, H], -1)
    mixed = F.silu(causal_conv(mixed, w["conv1d.weight"], w.get("conv1d.bias")))
    values, B, C = mixed.split([inner, d_state, d_state], -1)
    step = F.softplus(f + w["dt_bias"])
    values = values.view(T, H, head_dim)
    S = torch.zeros(H, d_state, head_dim, dtype=x.dtype)
    out = []
    for t in range(T):
        decay = torch.exp(-w["A_log"].exp() * step[t])
        S = decay[:, None, None] * S + step[t][:, None, None] * B[t][None, :, None] * values[t][:, None]
        out.append(torch.einsum("hnp,n->hp", S, C[t]) + w["D"][:, None] * values[t])
    y = torch.stack(out).reshape(T, inner) * F.silu(z)
    return rms(y, w["norm.weight"], eps) @ w["out_proj.weight"].T


def under(weights, prefix):
    return {name[len(prefix) :]: x for name, x in weights.items() if name.startswith(prefix)}


def reference(config, weights, tokens):
    """Logits [T,vocab] and what leaves every layer, of one sequence."""
    if "ssm_cfg" in config or config["model_type"] == "mamba2":
        authors = config.get("ssm_cfg")
        sizes = (
            (authors["d_state"], authors["headdim"])
            if authors
            else (config["state_size"], config["head_dim"])
        )
        eps = config.get("norm_eps", 1e-5)
        embedding = weights.get("backbone.embeddings.weight", weights.get("backbone.embedding.weight"))
        leaving = [embedding[tokens]]
        for layer in range(config.get("num_hidden_layers", config.get("n_layer"))):
            w = under(weights, f"backbone.layers.{layer}.")
            x = leaving[-1]
            y = mamba2_mixer(under(w, "mixer."), rms(x, w["norm.weight"], eps), *sizes, eps)
            leaving.append(x + y)
        last = rms(leaving[-1], weights["backbone.norm_f.weight"], eps)
    else:
        eps = config["norm_eps"]
        embedding = weights["model.embeddings.weight"]
        leaving = [embedding[tokens]]
        for layer in range(config["num_hidden_layers"]):
            w = under(weights, f"model.layers.{layer}.")
            x = leaving[-1]
            x = x + fla_mixer(config, under(w, "attn."), rms(x, w["attn_norm.weight"], eps))
            h = rms(x, w["mlp_norm.weight"], eps)
            gate, up = h @ w["mlp.gate_proj.weight"].T, h @ w["mlp.up_proj.weight"].T
            leaving.append(x + (F.silu(gate) * up) @ w["mlp.down_proj.weight"].T)
        last = rms(leaving[-1], weights["model.norm.weight"], eps)
    return last @ weights.get("lm_head.weight", embedding).T, leaving


def read(name):
    weights = {}
    for file in (FIXTURES / name).glob("model*.safetensors"):
        weights |= load_file(file)
    config = json.loads((FIXTURES / name / "config.json").read_text())
    return config, {key: x.double().requires_grad_() for key, x in weights.items()}


@pytest.mark.parametrize("name", NAMES)
def test_layer_by_layer_as_the_equations(name):
    config, weights = read(name)
    tokens = torch.randint(0, 20, (17,), generator=torch.Generator().manual_seed(7))
    logits, leaving = reference(config, weights, tokens)
    checkpoint = import_checkpoint(FIXTURES / name)
    model = checkpoint.model.double()
    x = model.embedding(tokens[None])
    torch.testing.assert_close(x[0], leaving[0])
    for index, layer in enumerate(model.layers):
        x, _, _ = layer(x, None)
        torch.testing.assert_close(
            x[0], leaving[index + 1], atol=1e-10, rtol=1e-10, msg=f"after layer {index}"
        )
    found = model(tokens[None])[0][0]
    torch.testing.assert_close(found, logits, atol=1e-10, rtol=1e-10)

    pull = torch.randn(logits.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    truth = dict(
        zip(weights, torch.autograd.grad((logits * pull).sum(), list(weights.values())), strict=True)
    )
    (found * pull).sum().backward()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    seen = set()
    for entry in translate(config, name).all_entries():
        for key, gradient in gradients(entry, parameters[entry.name].grad).items():
            seen.add(key)
            size = truth[key].abs().max()
            assert size > 0, key
            assert (gradient - truth[key]).abs().max() < 1e-9 * (1 + size), key
    assert seen == truth.keys()


def gradients(entry, gradient):
    """The gradient by the public names: of a tensor that heads share, the sum over their copies."""
    alone = entry._replace(
        parts=tuple(part._replace(shape=(part.rows, *part.shape[1:]), copies=1) for part in entry.parts)
    )
    found = to_public(alone, gradient)
    for part in entry.parts:
        if part.copies > 1:
            copies = found[part.name].unflatten(0, (-1, part.copies, part.width))
            found[part.name] = copies.sum(1).flatten(0, 1)
    return found


def test_the_loops_are_what_the_library_computes():
    for name in NAMES:
        expected = load_file(FIXTURES / name / "expected.safetensors")
        config, weights = read(name)
        with torch.no_grad():
            for tokens, logits in zip(expected["tokens"], expected["logits"], strict=True):
                found = reference(config, weights, tokens)[0].float()
                torch.testing.assert_close(found, logits, atol=5e-5, rtol=5e-5, msg=name)
