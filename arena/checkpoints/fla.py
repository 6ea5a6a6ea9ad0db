"""The public flash-linear-attention models: what their config.json and their tensors mean.

Each function below reads the fields of one ``model_type`` (names and defaults of version 0.6.0) and says
which of our architectures with which options has the same function. A field that may be missing is one that
earlier versions of the library did not have; missing, it means what they did. Where several value heads share
a query and key head there, we give each its own copy.

Axes: D model width, F hidden width of the MLP, H heads of queries and keys, G heads of values, K and V key
and value channels of a head, W taps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from arena.checkpoints.fields import (
    ABOUT_THE_FILE,
    ABOUT_TRAINING,
    MOST_LAYERS,
    Fields,
    multiples,
    names_of,
    whole,
)
from arena.checkpoints.mapping import Entry, Part, Translation, matrix, options
from arena.memory import MOST_MICRO_STEPS
from arena.model import ModelConfig

_IRRELEVANT = names_of(ABOUT_THE_FILE, ABOUT_TRAINING, ("attn_mode", "max_position_embeddings"))
"""attn_mode: which kernel; there are no positions."""


class Mixer(NamedTuple):
    """What a family says of its block."""

    arch: str
    n_heads: int
    layer: dict[str, Any]
    """Fields of LayerSpec."""
    entries: list[Entry]
    gates: dict[str, Any] | None = None
    output_gate: str = "none"


def translate(config: dict[str, Any], source: str) -> Translation:
    """What a config.json of one of :data:`FAMILIES` means.

    Raises:
        CheckpointError: a field is missing, unknown, or has a value that we have not.
    """
    family = config["model_type"]
    fields = Fields(config, source)
    D, F = _widths(fields)
    vocab = fields.integer("vocab_size")
    n_layers = fields.integer("num_hidden_layers", most=MOST_LAYERS)
    eps = fields.number("norm_eps")
    tied = fields.flag("tie_word_embeddings", False)
    mixer = FAMILIES[family](fields, D)
    fields.only("attn", None, default=None)
    fields.only("attnres_block_size", None, default=None)
    fields.irrelevant("fuse_norm", *_IRRELEVANT)
    fields.done()
    at = "model.layers.{layer}."
    mlp = (
        Entry(
            "mlp.gate_up.weight", tuple(Part(f"{at}mlp.{one}_proj.weight", (F, D)) for one in ("gate", "up"))
        ),
        matrix("mlp.down.weight", f"{at}mlp.down_proj.weight", D, F),
        matrix("mlp_norm.weight", f"{at}mlp_norm.weight", D),
        matrix("norm.weight", f"{at}attn_norm.weight", D),
    )
    head = "model.embeddings.weight" if tied else "lm_head.weight"
    model = ModelConfig(
        arch=mixer.arch,
        vocab_size=vocab,
        n_classes=vocab,
        d_model=D,
        n_layers=n_layers,
        n_heads=mixer.n_heads,
        outer="official",
        mlp_hidden=F,
        options=options(
            layer={**mixer.layer, "norm_eps": eps}, gates=mixer.gates, output_gate=mixer.output_gate
        ),
    )
    return Translation(
        family,
        model,
        eps,
        tied,
        n_layers,
        (
            matrix("embedding.weight", "model.embeddings.weight", vocab, D),
            matrix("norm.weight", "model.norm.weight", D),
            matrix("head.weight", head, vocab, D),
        ),
        (*mixer.entries, *mlp),
    )


def _widths(fields: Fields) -> tuple[int, int]:
    """D and F; without a width of its own the MLP has 2/3 of a ratio, up to a multiple of 256."""
    width = fields.integer("hidden_size")
    ratio = fields.optional_integer("hidden_ratio", 4) or 4
    given = fields.optional_integer("intermediate_size")
    fields.only("hidden_act", "swish", default="swish")
    return width, given or -(-int(width * ratio * 2 / 3) // 256) * 256


def _attn(name: str) -> str:
    return "model.layers.{layer}.attn." + name


def _short_conv(fields: Fields, *, default: bool) -> tuple[dict[str, Any], int | None]:
    """Fields of the layer, and W; None: none."""
    width = fields.integer("conv_size", default=4)
    if fields.flag("use_short_conv", default):
        return {"conv": "static", "conv_width": width}, width
    return {"conv": "none"}, None


def _qkv(
    D: int,
    q: tuple[int, int, int],
    k: tuple[int, int, int],
    v: tuple[int, int, int],
    conv: int | None,
    *,
    read: tuple[int, int],
    gate: str | None,
    norm: str = "o_norm",
) -> list[Entry]:
    """Projections of q, k and v, their convolutions, the norm of a read, its gate, and the projection out.

    Args:
        D: model width.
        q: heads there, channels of one, and how many of ours share one; k and v alike.
        k: with several updates a token, the heads of all of them.
        v: likewise.
        conv: W.
        read: heads that read, and channels of one.
        gate: name of the public output gate's map, ``g_proj``; None: none.
        norm: name of the norm.
    """
    heads, width = read

    def parts(end: str, *tail: int) -> tuple[Part, ...]:
        return tuple(
            Part(_attn(f"{letter}_{end}.weight"), (n * w, *tail), copies, w)
            for letter, (n, w, copies) in zip("qkv", (q, k, v), strict=True)
        )

    found = [
        Entry("block.qkv.weight", parts("proj", D)),
        matrix("block.norm.weight", _attn(f"{norm}.weight"), width),
        matrix("block.out.weight", _attn("o_proj.weight"), D, heads * width),
    ]
    if conv is not None:
        found.append(Entry("block.conv.weight", parts("conv1d", 1, conv), taps=True))
    if gate is not None:
        found.append(matrix("block.gate_out.linear.weight", _attn(f"{gate}.weight"), heads * width, D))
    return found


def _step_decay(D: int, heads: int) -> list[Entry]:
    """Decay exp(-A softplus(a_proj(x) + dt_bias)), one a head."""
    return [
        matrix("block.gate.decay_in.weight", _attn("a_proj.weight"), heads, D),
        matrix("block.gate.decay.A_log", _attn("A_log"), heads),
        matrix("block.gate.decay.dt_bias", _attn("dt_bias"), heads),
    ]


def _heads(fields: Fields, *, grouped: bool) -> tuple[int, int, int, int, int]:
    """H, G, how many of G share one of H, K and V."""
    H = fields.integer("num_heads")
    G = (fields.optional_integer("num_v_heads") or H) if grouped else H
    K = fields.integer("head_dim")
    V = whole(fields, "head_dim * expand_v", K * fields.number("expand_v"))
    return H, G, multiples(fields, "num_v_heads", G, "num_heads", H), K, V


def _gated_deltanet(fields: Fields, D: int) -> Mixer:
    H, G, copies, K, V = _heads(fields, grouped=True)
    conv, W = _short_conv(fields, default=True)
    negative = fields.flag("allow_neg_eigval", False)
    gate = fields.flag("use_gate")
    kind = fields.only("output_gate_activation", "swish", "silu", "sigmoid", default="swish")
    entries = [
        *_qkv(D, (H, K, copies), (H, K, copies), (G, V, 1), W, read=(G, V), gate="g_proj" if gate else None),
        *_step_decay(D, G),
        matrix("block.gate.erase.weight", _attn("b_proj.weight"), G, D),
    ]
    output_gate = "none" if not gate else "sigmoid" if kind == "sigmoid" else "silu"
    layer = {"key_dim": K, "value_dim": V, **conv}
    return Mixer("gdn-neg" if negative else "gdn", G, layer, entries, output_gate=output_gate)


def _kda(fields: Fields, D: int) -> Mixer:
    H, G, copies, K, V = _heads(fields, grouped=True)
    conv, W = _short_conv(fields, default=True)
    negative = fields.flag("allow_neg_eigval", False)
    bounded = fields.flag("safe_gate", False)
    if bounded:
        fields.only("lower_bound", -5.0, -5)
    else:
        fields.only("lower_bound", None, default=None)
    entries = [
        *_qkv(D, (H, K, copies), (H, K, copies), (G, V, 1), W, read=(G, V), gate=None),
        matrix("block.gate.decay_in.0.weight", _attn("f_proj.0.weight"), V, D),
        matrix("block.gate.decay_in.1.weight", _attn("f_proj.1.weight"), G * K, V),
        matrix("block.gate.decay.A_log", _attn("A_log"), G),
        matrix("block.gate.decay.dt_bias", _attn("dt_bias"), G * K),
        matrix("block.gate.erase.weight", _attn("b_proj.weight"), G, D),
        matrix("block.gate_out.linear.0.weight", _attn("g_proj.0.weight"), V, D),
        matrix("block.gate_out.linear.1.weight", _attn("g_proj.1.weight"), G * V, V),
        matrix("block.gate_out.linear.1.bias", _attn("g_proj.1.bias"), G * V),
    ]
    layer = {"key_dim": K, "value_dim": V, **conv}
    gates = {"decay_form": "bounded"} if bounded else None
    return Mixer("kda-neg" if negative else "kda", G, layer, entries, gates, "sigmoid")


def _gla(fields: Fields, D: int) -> Mixer:
    H = fields.integer("num_heads")
    G = fields.optional_integer("num_kv_heads") or H
    copies = multiples(fields, "num_heads", H, "num_kv_heads", G)
    K = whole(fields, "hidden_size * expand_k / num_heads", D * fields.number("expand_k") / H)
    V = whole(fields, "hidden_size * expand_v / num_heads", D * fields.number("expand_v") / H)
    conv, W = _short_conv(fields, default=False)
    gate = fields.flag("use_output_gate")
    fused = fields.flag("fuse_norm", True)
    for name, value in (("feature_map", None), ("clamp_min", None), ("elementwise_affine", True)):
        fields.only(name, value, default=value)
    fields.only("use_gk", True, default=True)
    fields.only("use_gv", False, default=False)
    norm = "g_norm_swish_gate" if fused and gate else "g_norm"
    entries = [
        *_qkv(
            D, (H, K, 1), (G, K, copies), (G, V, copies), W,
            read=(H, V), gate="g_proj" if gate else None, norm=norm,
        ),
        matrix("block.gate.decay_in.0.weight", _attn("gk_proj.0.weight"), 16, D),
        Entry("block.gate.decay_in.1.weight", (Part(_attn("gk_proj.1.weight"), (G * K, 16), copies, K),)),
        Entry("block.gate.decay_in.1.bias", (Part(_attn("gk_proj.1.bias"), (G * K,), copies, K),)),
    ]  # fmt: skip
    return Mixer(
        "gla", H, {"key_dim": K, "value_dim": V, **conv}, entries, output_gate="silu" if gate else "none"
    )


def _delta_net(fields: Fields, D: int) -> Mixer:
    H = fields.integer("num_heads")
    K = whole(fields, "hidden_size * expand_k / num_heads", D * fields.number("expand_k") / H)
    V = whole(fields, "hidden_size * expand_v / num_heads", D * fields.number("expand_v") / H)
    conv, W = _short_conv(fields, default=True)
    negative = fields.flag("allow_neg_eigval", False)
    gate = fields.flag("use_gate")
    fields.only("use_beta", True, default=True)
    fields.only("qk_norm", "l2")
    fields.only("qk_activation", "silu")
    fields.irrelevant("use_output_norm")  # the public layer norms its output whatever this says
    entries = [
        *_qkv(D, (H, K, 1), (H, K, 1), (H, V, 1), W, read=(H, V), gate="g_proj" if gate else None),
        matrix("block.gate.erase.weight", _attn("b_proj.weight"), H, D),
    ]
    layer = {"key_dim": K, "value_dim": V, **conv}
    arch = "deltanet-neg" if negative else "deltanet"
    return Mixer(arch, H, layer, entries, output_gate="silu" if gate else "none")


def _gated_deltaproduct(fields: Fields, D: int) -> Mixer:
    H, _, _, K, V = _heads(fields, grouped=False)
    n = fields.integer("num_householder")
    if n > MOST_MICRO_STEPS:
        raise fields.refusal("num_householder", n, f"1 to {MOST_MICRO_STEPS}")
    conv, W = _short_conv(fields, default=True)
    negative, decay = fields.flag("allow_neg_eigval"), fields.flag("use_forget_gate")
    gate = fields.flag("use_output_gate")
    entries = [
        *_qkv(
            D, (H, K, 1), (n * H, K, 1), (n * H, V, 1), W,
            read=(H, V), gate="g_proj" if gate else None,
        ),
        matrix("block.gate.erase.weight", _attn("b_proj.weight"), n * H, D),
        *(_step_decay(D, H) if decay else []),
    ]  # fmt: skip
    arch = f"{'gdnproduct' if decay else 'deltaproduct'}[{n}]{'-neg' if negative else ''}"
    layer = {"key_dim": K, "value_dim": V, **conv}
    return Mixer(arch, H, layer, entries, output_gate="silu" if gate else "none")


FAMILIES: dict[str, Callable[[Fields, int], Mixer]] = {
    "gated_deltanet": _gated_deltanet,
    "kda": _kda,
    "gla": _gla,
    "delta_net": _delta_net,
    "gated_deltaproduct": _gated_deltaproduct,
}
"""By ``model_type``."""
