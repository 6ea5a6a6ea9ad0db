"""Write tests/fixtures/checkpoints: small models of the public library, and what it computes with them.

Their weights are random. Nothing of this repository is imported, and nothing of it may be importable: the
library imports a module named ``kernels`` where there is one, and takes it for another package. Hence

    pip install --target SITE --no-deps flash-linear-attention==0.6.0 fla-core==0.6.0 transformers einops ...
    TRITON_INTERPRET=1 PYTHONPATH=SITE:SITE_PACKAGES_OF_TORCH python -S tools/public_checkpoints.py OUT

(``-S``: an editable installation of this repository is not seen.) Each folder has config.json and
*.safetensors as ``save_pretrained`` writes them, and expected.safetensors: tokens, logits and what leaves
every layer (``hidden.0`` is the embedding), by the library's own kernels in Triton's interpreter, on the CPU.
"""

import json
import sys
from pathlib import Path

import torch
import triton.runtime.autotuner
from safetensors.torch import load_file, save_file


def first_configuration() -> None:
    """Let autotuned kernels take their first configuration: there is no driver to time them with."""
    run = triton.runtime.autotuner.Autotuner.run

    def one(self, *args, **kwargs):
        self.configs = self.configs[:1]
        return run(self, *args, **kwargs)

    triton.runtime.autotuner.Autotuner.run = one


first_configuration()

from fla.models import (  # noqa: E402
    DeltaNetConfig,
    DeltaNetForCausalLM,
    GatedDeltaNetConfig,
    GatedDeltaNetForCausalLM,
    GatedDeltaProductConfig,
    GatedDeltaProductForCausalLM,
    GLAConfig,
    GLAForCausalLM,
    KDAConfig,
    KDAForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
)

LIBRARY = {
    "gated_deltanet": (GatedDeltaNetConfig, GatedDeltaNetForCausalLM),
    "kda": (KDAConfig, KDAForCausalLM),
    "gla": (GLAConfig, GLAForCausalLM),
    "delta_net": (DeltaNetConfig, DeltaNetForCausalLM),
    "gated_deltaproduct": (GatedDeltaProductConfig, GatedDeltaProductForCausalLM),
    "mamba2": (Mamba2Config, Mamba2ForCausalLM),
}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 20, "fuse_cross_entropy": False}
MLP = {"intermediate_size": 24}
MODELS = {
    "gdn": ("gated_deltanet", MLP | {"head_dim": 4, "num_heads": 3, "norm_eps": 1e-5}),
    "gdn-grouped": (
        "gated_deltanet",
        MLP
        | {"head_dim": 4, "num_heads": 2, "num_v_heads": 4, "expand_v": 1.5, "allow_neg_eigval": True}
        | {"output_gate_activation": "sigmoid", "conv_size": 3},
    ),
    "gdn-bare": (
        "gated_deltanet",
        MLP
        | {"head_dim": 4, "num_heads": 2, "use_gate": False, "use_short_conv": False}
        | {"tie_word_embeddings": True, "fuse_norm": False, "norm_eps": 1e-2},
    ),
    "kda": ("kda", MLP | {"head_dim": 4, "num_heads": 2, "expand_v": 1.5}),
    "kda-grouped": (
        "kda",
        MLP
        | {"head_dim": 4, "num_heads": 1, "num_v_heads": 2, "safe_gate": True, "lower_bound": -5.0}
        | {"allow_neg_eigval": True},
    ),
    "gla": ("gla", MLP | {"num_heads": 2}),
    "gla-grouped": (
        "gla",
        MLP
        | {"num_heads": 2, "num_kv_heads": 1, "use_short_conv": True, "expand_k": 1.0, "fuse_norm": False},
    ),
    "gla-bare": ("gla", MLP | {"num_heads": 2, "use_output_gate": False}),
    "deltanet": ("delta_net", MLP | {"num_heads": 2}),
    "deltanet-gate": (
        "delta_net",
        MLP | {"num_heads": 2, "use_gate": True, "allow_neg_eigval": True, "expand_v": 1.5, "expand_k": 0.5},
    ),
    "deltaproduct": (
        "gated_deltaproduct",
        MLP
        | {"head_dim": 4, "num_heads": 2, "num_householder": 2, "use_output_gate": False, "expand_v": 1.0},
    ),
    "gdnproduct": (
        "gated_deltaproduct",
        MLP
        | {"head_dim": 4, "num_heads": 2, "num_householder": 3, "use_forget_gate": True, "expand_v": 1.0}
        | {"allow_neg_eigval": True},
    ),
    "mamba2": ("mamba2", {"head_dim": 8, "state_size": 6}),
    "mamba2-bare": (
        "mamba2",
        {"head_dim": 4, "state_size": 3, "use_conv_bias": False, "tie_word_embeddings": True}
        | {"residual_in_fp32": False, "conv_kernel": 3, "expand": 1, "norm_eps": 1e-3},
    ),
}
SHARDED, HALF = "deltanet", "gla"
STATE_SPACES = {
    "d_model": 16, "d_intermediate": 0, "n_layer": 2, "vocab_size": 20,
    "ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 8},
    "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
    "pad_vocab_size_multiple": 16, "tie_embeddings": True,
}  # fmt: skip


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Give every parameter values at which it counts: norms off 1, biases off 0, gates off their ends."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name or name.endswith(".D"):
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith(("A_log", "dt_bias")):
                parameter.copy_(0.7 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.5 * noise)
            else:
                fan = parameter[0].numel() if "embeddings" not in name else 1
                parameter.copy_(noise / fan**0.5)


def expected(model: torch.nn.Module, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """What the library computes."""
    tokens = torch.randint(0, model.config.vocab_size, (2, 11), generator=generator)
    leaving: list[torch.Tensor] = []
    base = model.model if hasattr(model, "model") else model.backbone
    hooks = [base.embeddings.register_forward_hook(lambda _m, _i, y: leaving.append(y))]
    hooks += [layer.register_forward_hook(lambda _m, _i, y: leaving.append(y[0])) for layer in base.layers]
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    hidden = {f"hidden.{index}": x.float().clone() for index, x in enumerate(leaving)}
    return {"tokens": tokens, "logits": logits.float().clone(), **hidden}


def write(out: Path, name: str, seed: int) -> None:
    """One folder."""
    kind, fields = MODELS[name]
    make_config, make_model = LIBRARY[kind]
    model = make_model(make_config(**(SMALL | fields))).eval()
    generator = torch.Generator().manual_seed(seed)
    randomise(model, generator)
    if name == HALF:
        model = model.bfloat16().float()  # so that the stored numbers are those that were computed with
    computed = expected(model, generator)
    if name == HALF:
        model = model.bfloat16()
    folder = out / name
    model.save_pretrained(folder, max_shard_size="8KB" if name == SHARDED else "1GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    save_file(computed, folder / "expected.safetensors")


def as_state_spaces(out: Path) -> None:
    """Mamba-2 in its authors' layout, of which the library has the function: other names, other config."""
    sizes = {"head_dim": 8, "state_size": 8, "tie_word_embeddings": True, "vocab_size": 32}
    config = Mamba2Config(**SMALL | sizes)  # the vocabulary is padded to a multiple of 16
    model = Mamba2ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(99)
    randomise(model, generator)
    folder = out / "mamba2-state-spaces"
    computed = expected(model, generator)
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights = {name.replace("embeddings", "embedding"): x for name, x in weights.items()}
    for path in folder.iterdir():
        path.unlink()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(computed, folder / "expected.safetensors")
    (folder / "config.json").write_text(json.dumps(STATE_SPACES, indent=2) + "\n")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    for number, each in enumerate(MODELS):
        write(target, each, number)
    as_state_spaces(target)
