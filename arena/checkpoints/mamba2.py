"""Mamba-2 models: the layout of flash-linear-attention, and that of Mamba-2's authors (state-spaces/mamba).

They have the same function and nearly the same tensors; the fields of their config.json have nothing in
common. (The authors' own files are pickles, to be converted first.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from arena.checkpoints.fields import ABOUT_THE_FILE, ABOUT_TRAINING, MOST_LAYERS, Fields
from arena.checkpoints.mapping import Entry, Translation, matrix, options
from arena.model import ModelConfig

FLA, AUTHORS = "mamba2", "mamba2 (state-spaces)"


class Sizes(NamedTuple):
    """What both layouts say."""

    width: int
    n_layers: int
    vocab: int
    d_state: int
    headdim: int
    expand: int
    taps: int
    conv_bias: bool
    eps: float
    tied: bool


def translate_fla(config: dict[str, Any], source: str) -> Translation:
    """What a config.json of ``model_type`` mamba2 means, as flash-linear-attention writes it.

    Raises:
        CheckpointError: a field is missing, unknown, or has a value that we have not.
    """
    fields = Fields(config, source)
    sizes = Sizes(
        width=fields.integer("hidden_size"),
        n_layers=fields.integer("num_hidden_layers", most=MOST_LAYERS),
        vocab=fields.integer("vocab_size"),
        d_state=fields.integer("state_size"),
        headdim=fields.integer("head_dim"),
        expand=fields.integer("expand"),
        taps=fields.integer("conv_kernel"),
        conv_bias=fields.flag("use_conv_bias"),
        eps=fields.number("norm_eps"),
        tied=fields.flag("tie_word_embeddings", False),
    )
    heads = _heads(fields, sizes)
    if "num_heads" in config:
        fields.only("num_heads", heads)
    fields.only("n_groups", 1)
    fields.only("use_bias", False)
    fields.only("rmsnorm", True, default=True)
    fields.only("norm_before_gate", False, default=False)
    fields.only("D_has_hdim", False, default=False)
    fields.only("hidden_act", "silu")
    _check_step_limit(fields, config.get("dt_limit"))
    fields.irrelevant("fuse_norm", "chunk_size", "residual_in_fp32", *ABOUT_THE_FILE, *ABOUT_TRAINING)
    fields.irrelevant("A_init_range", "conv_init", "dt_min", "dt_max", "dt_init_floor")
    fields.done()
    return _translation(FLA, sizes, "backbone.embeddings.weight")


def translate_authors(config: dict[str, Any], source: str) -> Translation:
    """What a config.json of state-spaces/mamba means.

    Raises:
        CheckpointError: a field is missing, unknown, or has a value that we have not.
    """
    fields = Fields(config, source)
    layer = config.get("ssm_cfg")
    if not isinstance(layer, Mapping):
        raise fields.refusal("ssm_cfg", layer, "an object with layer = 'Mamba2'")
    fields.irrelevant("ssm_cfg")
    inner = Fields(layer, f"{source}, ssm_cfg")
    inner.only("layer", "Mamba2")
    vocab = fields.integer("vocab_size")
    padding = fields.integer("pad_vocab_size_multiple")
    sizes = Sizes(
        width=fields.integer("d_model"),
        n_layers=fields.integer("n_layer", most=MOST_LAYERS),
        vocab=-(-vocab // padding) * padding,
        d_state=inner.integer("d_state", default=128),
        headdim=inner.integer("headdim", default=64),
        expand=inner.integer("expand", default=2),
        taps=inner.integer("d_conv", default=4),
        conv_bias=inner.flag("conv_bias", True),
        eps=1e-5,  # of all norms; the layout has no field for it
        tied=fields.flag("tie_embeddings"),
    )
    _heads(fields, sizes)
    inner.only("ngroups", 1, default=1)
    inner.only("bias", False, default=False)
    inner.only("rmsnorm", True, default=True)
    inner.only("norm_before_gate", False, default=False)
    inner.only("D_has_hdim", False, default=False)
    inner.only("d_ssm", None, sizes.expand * sizes.width, default=None)
    _check_step_limit(inner, layer.get("dt_limit"))
    inner.irrelevant("chunk_size", "use_mem_eff_path", "A_init_range", "conv_init", "dt_min", "dt_max")
    inner.irrelevant("dt_init_floor")
    inner.done()
    fields.only("d_intermediate", 0)
    fields.only("attn_layer_idx", [])
    fields.only("rms_norm", True)
    fields.irrelevant("attn_cfg", "residual_in_fp32", "fused_add_norm")  # attn_cfg: of no layer
    fields.done()
    return _translation(AUTHORS, sizes, "backbone.embedding.weight")


def _heads(fields: Fields, sizes: Sizes) -> int:
    inner = sizes.expand * sizes.width
    if inner % sizes.headdim:
        raise fields.wrong(f"expand * width = {inner} is no multiple of the width of a head, {sizes.headdim}")
    return inner // sizes.headdim


def _check_step_limit(fields: Fields, limit: Any) -> None:
    """Steps that are clipped we have not; infinity is written in several ways."""
    fields.irrelevant("dt_limit")
    if limit is None:
        return
    infinite = (math.inf, "Infinity", {"__float__": "Infinity"})
    if not (isinstance(limit, (list, tuple)) and len(limit) == 2 and limit[0] == 0 and limit[1] in infinite):
        raise fields.refusal("dt_limit", limit, "[0, infinity]")


def _translation(family: str, sizes: Sizes, embedding: str) -> Translation:
    D, inner = sizes.width, sizes.expand * sizes.width
    heads, mixed = inner // sizes.headdim, inner + 2 * sizes.d_state
    at = "backbone.layers.{layer}."
    layer = [
        matrix("norm.weight", f"{at}norm.weight", D),
        matrix("block.project.weight", f"{at}mixer.in_proj.weight", inner + mixed + heads, D),
        Entry(
            "block.conv.weight", matrix("", f"{at}mixer.conv1d.weight", mixed, 1, sizes.taps).parts, taps=True
        ),
        matrix("block.decay.A_log", f"{at}mixer.A_log", heads),
        matrix("block.decay.dt_bias", f"{at}mixer.dt_bias", heads),
        matrix("block.D", f"{at}mixer.D", heads),
        matrix("block.norm.weight", f"{at}mixer.norm.weight", inner),
        matrix("block.out.weight", f"{at}mixer.out_proj.weight", D, inner),
    ]
    if sizes.conv_bias:
        layer.append(matrix("block.conv.bias", f"{at}mixer.conv1d.bias", mixed))
    model = ModelConfig(
        arch="mamba2",
        vocab_size=sizes.vocab,
        n_classes=sizes.vocab,
        d_model=D,
        n_layers=sizes.n_layers,
        n_heads=1,  # the official layer counts its own, by headdim
        outer="official",
        options=options(
            headdim=sizes.headdim,
            d_state=sizes.d_state,
            expand=sizes.expand,
            conv_width=sizes.taps,
            conv_bias=sizes.conv_bias,
            norm_eps=sizes.eps,
        ),
    )
    head = embedding if sizes.tied else "lm_head.weight"
    return Translation(
        family,
        model,
        sizes.eps,
        sizes.tied,
        sizes.n_layers,
        (
            matrix("embedding.weight", embedding, sizes.vocab, D),
            matrix("norm.weight", "backbone.norm_f.weight", D),
            matrix("head.weight", head, sizes.vocab, D),
        ),
        tuple(layer),
    )
