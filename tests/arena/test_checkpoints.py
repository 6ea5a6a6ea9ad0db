"""Public checkpoints: held to what the public library computed with them (tests/fixtures/checkpoints, from
tools/public_checkpoints.py), written back bit for bit, and refused where something is missing or unknown.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

from arena.checkpoints import (
    CheckpointError,
    export_checkpoint,
    import_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from arena.cli import main

FIXTURES = Path(__file__).parents[1] / "fixtures" / "checkpoints"
NAMES = sorted(path.name for path in FIXTURES.iterdir())
ARCHS = {
    "gdn": "gdn",
    "gdn-grouped": "gdn-neg",
    "gdn-bare": "gdn",
    "kda": "kda",
    "kda-grouped": "kda-neg",
    "gla": "gla",
    "gla-grouped": "gla",
    "gla-bare": "gla",
    "deltanet": "deltanet",
    "deltanet-gate": "deltanet-neg",
    "deltaproduct": "deltaproduct[2]",
    "gdnproduct": "gdnproduct[3]-neg",
    "mamba2": "mamba2",
    "mamba2-bare": "mamba2",
    "mamba2-state-spaces": "mamba2",
}


def public_tensors(folder):
    found = {}
    for file in folder.glob("model*.safetensors"):
        found |= load_file(file)
    return found


def copy_of(name, tmp_path, **fields):
    """A copy of a fixture with fields of its config changed; ... takes one out."""
    folder = tmp_path / name
    shutil.copytree(FIXTURES / name, folder)
    config = json.loads((folder / "config.json").read_text())
    for key, value in fields.items():
        config.pop(key, None)
        if value is not ...:
            config[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_every_fixture_is_named():
    assert sorted(ARCHS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_layer_by_layer_as_the_public_library(name):
    expected = load_file(FIXTURES / name / "expected.safetensors")
    model = import_checkpoint(FIXTURES / name).model
    assert model.config.arch == ARCHS[name]
    leaving = [model.embedding(expected["tokens"])]
    state = None
    with torch.no_grad():
        for layer in model.layers:
            leaving.append(layer(leaving[-1], None)[0])
        logits, _ = model(expected["tokens"])
        pieces = []
        for piece in expected["tokens"].split(4, 1):
            y, state = model(piece, state)
            pieces.append(y)
    for index, x in enumerate(leaving):
        truth = expected[f"hidden.{index}"]
        assert truth.abs().max() > 0.5
        torch.testing.assert_close(x, truth, atol=5e-5, rtol=5e-5, msg=f"after layer {index}")
    torch.testing.assert_close(logits, expected["logits"], atol=5e-5, rtol=5e-5)
    torch.testing.assert_close(torch.cat(pieces, 1), expected["logits"], atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("name", NAMES)
def test_written_back_bit_for_bit(name, tmp_path):
    save_checkpoint(import_checkpoint(FIXTURES / name), tmp_path / "ours")
    loaded = load_checkpoint(tmp_path / "ours")
    export_checkpoint(loaded, tmp_path / "public")
    assert (tmp_path / "public" / "config.json").read_text() == (FIXTURES / name / "config.json").read_text()
    before, after = public_tensors(FIXTURES / name), public_tensors(tmp_path / "public")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype and tensor.shape == after[key].shape
        assert torch.equal(tensor, after[key]), key
    again = import_checkpoint(tmp_path / "public")
    for one, two in zip(again.model.parameters(), loaded.model.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", ["gdn", "gdn-grouped", "kda-grouped", "gla-grouped", "gdnproduct", "mamba2"])
def test_every_tensor_counts(name, tmp_path):
    """Each public tensor, changed, changes the logits: none is read and then left aside."""
    folder = copy_of(name, tmp_path)
    tokens = torch.arange(12)[None] % 20
    with torch.no_grad():
        before = import_checkpoint(folder).model(tokens)[0]
        tensors = load_file(folder / "model.safetensors")
        for key in tensors:
            save_file(
                tensors | {key: tensors[key] * 1.5 + 0.1},
                folder / "model.safetensors",
                metadata={"format": "pt"},
            )
            assert (import_checkpoint(folder).model(tokens)[0] - before).abs().max() > 1e-4, key


def test_shared_heads_that_were_trained_apart_are_not_written_back(tmp_path):
    checkpoint = import_checkpoint(FIXTURES / "gdn-grouped")
    with torch.no_grad():
        checkpoint.model.blocks[0].qkv.weight[0] += 1
    with pytest.raises(CheckpointError, match=r"layers\.0\.attn\.q_proj.* 2 heads share it"):
        export_checkpoint(checkpoint, tmp_path / "public")


def test_a_trained_model_is_written_back(tmp_path):
    checkpoint = import_checkpoint(FIXTURES / "gdn-bare")
    model = checkpoint.model
    assert model.head.weight is model.embedding.weight
    model(torch.arange(8)[None])[0].logsumexp(-1).mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad.abs().max() > 0
            parameter -= 0.1 * parameter.grad
        truth = model(torch.arange(8)[None])[0]
        export_checkpoint(checkpoint, tmp_path / "public")
        torch.testing.assert_close(
            import_checkpoint(tmp_path / "public").model(torch.arange(8)[None])[0], truth
        )


REFUSED = [
    ("gdn", {"model_type": "gated_deltanett"}, "model_type is 'gated_deltanett'"),
    ("gdn", {"model_type": ...}, "model_type is None"),
    ("gdn", {"head_dim": ...}, "field 'head_dim' is missing"),
    ("gdn", {"norm_eps": ...}, "field 'norm_eps' is missing"),
    ("gdn", {"use_gate": ...}, "field 'use_gate' is missing"),
    ("gdn", {"use_gates": True}, "unknown field 'use_gates'.*did you mean use_gate"),
    ("gdn", {"quantization_config": {"bits": 4}}, "unknown field 'quantization_config'"),
    ("gdn", {"auto_map": {"AutoModel": "x.y"}}, "auto_map"),
    ("gdn", {"attn": {"layers": [1], "num_heads": 2}}, "attn is"),
    ("gdn", {"attnres_block_size": 2}, "attnres_block_size is 2"),
    ("gdn", {"hidden_act": "powlu"}, "hidden_act is 'powlu'"),
    ("gdn", {"num_heads": 2.5}, "num_heads is 2.5"),
    ("gdn", {"num_heads": True}, "num_heads is True"),
    ("gdn", {"num_heads": 10**12}, "by the config it is"),
    ("gdn", {"num_hidden_layers": 10**12}, "at most 10000"),
    ("gdn", {"num_hidden_layers": 9999}, "the config has 9999 layers"),
    ("gdn", {"num_hidden_layers": 1}, "unknown tensor model.layers.1"),
    ("gdn", {"num_hidden_layers": 3}, "tensor model.layers.2.* is missing"),
    ("gdn", {"expand_v": 1.3}, "head_dim \\* expand_v = 5.2 is no whole number"),
    ("gdn", {"num_v_heads": 4}, "num_v_heads 4 is no multiple of num_heads 3"),
    ("gdn", {"conv_size": 5}, "q_conv1d.weight has shape .*12, 1, 4.*; by the config it is .*12, 1, 5"),
    ("gdn", {"use_short_conv": False}, "unknown tensor .*conv1d"),
    ("gdn", {"use_gate": False}, "unknown tensor .*g_proj"),
    ("gdn", {"norm_eps": float("nan")}, "norm_eps is nan"),
    ("gdn", {"tie_word_embeddings": True}, "ties lm_head.weight .* differ"),
    ("kda", {"safe_gate": True}, "field 'lower_bound'|lower_bound is None"),
    ("kda-grouped", {"lower_bound": -4.0}, "lower_bound is -4.0"),
    ("kda-grouped", {"safe_gate": False}, "lower_bound is -5.0"),
    ("gla", {"feature_map": "relu"}, "feature_map is 'relu'"),
    ("gla", {"clamp_min": -1.0}, "clamp_min is -1.0"),
    ("gla", {"use_gv": True}, "use_gv is True"),
    ("gla", {"elementwise_affine": False}, "elementwise_affine is False"),
    ("deltanet", {"qk_norm": "sum"}, "qk_norm is 'sum'"),
    ("deltanet", {"qk_activation": "relu"}, "qk_activation is 'relu'"),
    ("deltanet", {"use_beta": False}, "use_beta is False"),
    ("gdnproduct", {"num_householder": 65}, "num_householder is 65"),
    ("gdnproduct", {"allow_neg_eigval": ...}, "field 'allow_neg_eigval' is missing"),
    ("mamba2", {"n_groups": 2}, "n_groups is 2"),
    ("mamba2", {"rmsnorm": False}, "rmsnorm is False"),
    ("mamba2", {"use_bias": True}, "use_bias is True"),
    ("mamba2", {"norm_before_gate": True}, "norm_before_gate is True"),
    ("mamba2", {"D_has_hdim": True}, "D_has_hdim is True"),
    ("mamba2", {"dt_limit": [0.0, 0.1]}, "dt_limit is"),
    ("mamba2", {"head_dim": 5}, "no multiple of the width of a head"),
    ("mamba2", {"num_heads": 3}, "num_heads is 3"),
    ("mamba2-state-spaces", {"ssm_cfg": {}}, "ssm_cfg: field 'layer' is missing"),
    ("mamba2-state-spaces", {"ssm_cfg": {"layer": "Mamba1"}}, "layer is 'Mamba1'"),
    ("mamba2-state-spaces", {"ssm_cfg": {"layer": "Mamba2", "headdim": 8, "ngroups": 8}}, "ngroups is 8"),
    ("mamba2-state-spaces", {"attn_layer_idx": [1]}, "attn_layer_idx"),
    ("mamba2-state-spaces", {"d_intermediate": 64}, "d_intermediate is 64"),
    ("mamba2-state-spaces", {"pad_vocab_size_multiple": 1}, "embedding.weight has shape"),
]


@pytest.mark.parametrize(("name", "fields", "text"), REFUSED)
def test_what_cannot_be_imported_is_named(name, fields, text, tmp_path):
    with pytest.raises(CheckpointError, match=text) as caught:
        import_checkpoint(copy_of(name, tmp_path, **fields))
    assert "\n" not in str(caught.value)


def test_fields_of_later_versions_may_be_missing(tmp_path):
    folder = copy_of(
        "gdn", tmp_path, num_v_heads=..., output_gate_activation=..., attnres_block_size=..., attn=...
    )
    expected = load_file(FIXTURES / "gdn" / "expected.safetensors")
    with torch.no_grad():
        logits, _ = import_checkpoint(folder).model(expected["tokens"])
    torch.testing.assert_close(logits, expected["logits"], atol=5e-5, rtol=5e-5)


def test_tensors_that_are_wrong_are_named(tmp_path):
    folder = copy_of("gdn", tmp_path)
    rewrite(folder, lambda tensors: tensors.update(extra=torch.ones(2)))
    with pytest.raises(CheckpointError, match="unknown tensor extra"):
        import_checkpoint(folder)
    rewrite(folder, lambda tensors: tensors.pop("extra"))
    rewrite(
        folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(16, dtype=torch.float64)})
    )
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is of type F64"):
        import_checkpoint(folder)
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="no safetensors file that can be read"):
        import_checkpoint(folder)


def test_pickles_are_not_opened(tmp_path):
    folder = copy_of("mamba2-state-spaces", tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "expected.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin, a pickle.*save_file") as caught:
        import_checkpoint(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m.update({"lm_head.weight": "../x.safetensors"}), "no name of a safetensors file"),
        (lambda m: m.update({"lm_head.weight": "missing.safetensors"}), "has no missing.safetensors"),
        (lambda m: m.update({"extra": "model-00001-of-00003.safetensors"}), "extra is in the index, not in"),
        (lambda m: m.pop("lm_head.weight"), "lm_head.weight is in a shard, not in the index"),
        (lambda m: m.clear(), "has no weight_map"),
    ],
)
def test_an_index_that_is_wrong(change, text, tmp_path):
    folder = copy_of("deltanet", tmp_path)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=text):
        import_checkpoint(folder)


def test_config_that_is_no_json(tmp_path):
    folder = copy_of("gdn", tmp_path)
    for content, text in (
        (b"[1]", "no JSON object"), (b"{", "no JSON"), (b"\xff\xfe", "UTF-8"), (b'{"a":1,"a":2}', "twice"),
        (b"[" * 100_000, "no JSON"),
    ):  # fmt: skip
        (folder / "config.json").write_bytes(content)
        with pytest.raises(CheckpointError, match=text):
            import_checkpoint(folder)
    with pytest.raises(CheckpointError, match="is no folder"):
        import_checkpoint(tmp_path / "nowhere")


def test_a_damaged_import_is_refused(tmp_path):
    ours = tmp_path / "ours"
    save_checkpoint(import_checkpoint(FIXTURES / "gdn"), ours)
    config = json.loads((ours / "public_config.json").read_text())
    (ours / "public_config.json").write_text(json.dumps(config | {"vocab_size": 10**9}))
    with pytest.raises(CheckpointError, match=r"holds .* numbers"):
        load_checkpoint(ours)
    (ours / "public_config.json").write_text(json.dumps(config))
    load_checkpoint(ours)
    rewrite(ours, lambda tensors: tensors.update({"other": tensors.pop("norm.weight")}))
    with pytest.raises(CheckpointError, match=r"lacks norm\.weight|unknown other"):
        load_checkpoint(ours)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="is no imported checkpoint"):
        save_checkpoint(import_checkpoint(FIXTURES / "gdn"), tmp_path / "full")
    with pytest.raises(CheckpointError, match="is there already"):
        export_checkpoint(import_checkpoint(FIXTURES / "gdn"), tmp_path / "full")


def run(*words):
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    return caught.value.code


def test_command_line(tmp_path, capsys):
    ours = tmp_path / "ours"
    assert run("import", FIXTURES / "gdnproduct", "--out", ours) == 0
    assert "gdnproduct[3]-neg, 2 layers, width 16, 2 heads with memories of 4 x 4" in capsys.readouterr().out
    np.save(tmp_path / "t.npy", np.arange(200) % 20)
    words = ("dynamics", "--checkpoint", ours, "--tokens", tmp_path / "t.npy", "--length", 60)
    assert run(*words, "--sequences", 2) == 0
    page = (ours / "dynamics" / "page.md").read_text()
    assert "2 sequences of 60 tokens of t.npy" in page and (ours / "dynamics" / "page.html").exists()
    layers = pl.read_csv(ours / "dynamics" / "layers.csv")
    assert layers.select("layer", "head").rows() == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert layers.select("decay", "erase", "half_life", "least_eigenvalue").null_count().row(0) == (
        0,
        0,
        0,
        0,
    )
    tokens = torch.from_numpy(np.arange(120).reshape(2, 60) % 20)
    with torch.no_grad():
        logits = load_checkpoint(ours).model(tokens)[0][:, :-1]
    losses = [
        torch.nn.functional.cross_entropy(x, y).item() for x, y in zip(logits, tokens[:, 1:], strict=True)
    ]
    assert pl.read_csv(ours / "dynamics" / "loss.csv")["loss"].to_list() == pytest.approx(losses, rel=1e-5)
    assert run("export", ours, "--out", tmp_path / "public") == 0
    (tmp_path / "text").write_text("\x00\x01\x02" * 9)
    assert run("dynamics", "--checkpoint", ours, "--tokens", tmp_path / "text") == 2  # 20 tokens are no bytes
    assert run("export", ours, "--out", tmp_path / "public") == 2
    assert run("import", tmp_path) == 2
    assert run(*words, "--task", "mqar") == 2
    assert run("dynamics", "--checkpoint", ours) == 2
    assert run("dynamics") == 2
    assert run("dynamics", tmp_path, "--tokens", tmp_path / "t.npy") == 2
    for line in capsys.readouterr().err.strip().splitlines():
        assert line.startswith("arena: ") and "internal error" not in line
