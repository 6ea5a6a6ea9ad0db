"""Experiments and results are data: nothing of them is executed, and no pickle is ever loaded."""

from __future__ import annotations

import ast
import pickle
import warnings
from pathlib import Path

import pytest
import torch

from arena.grid.results import load_curves, load_environments, load_model, load_results

ROOT = Path(__file__).parents[2]
FORBIDDEN_MODULES = {
    "pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "runpy", "code",
}  # fmt: skip
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "torch.load", "torch.jit.load", "np.load", "numpy.load",
}  # fmt: skip
IMPORTERS = {
    "arena/__init__.py",  # its own names
    "arena/blocks/__init__.py",  # its own files
    "arena/plugins.py",  # what --plugin and entry points name
    "kernels/external/common.py",
    "kernels/external/fla.py",
    "kernels/bench/peers.py",
    "kernels/gpu_bench_conv.py",
    "kernels/gpu_check_conv.py",
}
"""Files that may import by name: names of the code or of the user, never of a file."""

TINY = """
name = "tiny"
archs = ["gdn"]
seeds = 1
[model]
d_model = 8
n_layers = 1
[train]
steps = 2
batch_size = 4
[[tasks]]
name = "parity"
train_lengths = 8
eval_lengths = 12
"""


def sources():
    for folder in ("arena", "kernels", "synthetic_tasks", "tools"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def test_no_source_can_load_a_pickle_or_run_text():
    wrong = []
    for path in sources():
        name = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found = {alias.name.split(".")[0] for alias in node.names} & FORBIDDEN_MODULES
            elif isinstance(node, ast.ImportFrom):
                found = {(node.module or "").split(".")[0]} & (set() if node.level else FORBIDDEN_MODULES)
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                found = {called} & FORBIDDEN_CALLS
                if called.endswith("import_module") and name not in IMPORTERS:
                    found.add(called)
                if any(k.arg == "allow_pickle" for k in node.keywords):
                    found.add("allow_pickle")
            else:
                continue
            wrong += [f"{name}:{node.lineno}: {what}" for what in sorted(found)]
    assert not wrong


@pytest.mark.parametrize(
    "text", ["import pickle", "from cloudpickle import loads", "torch.load(x)", "eval('1')"]
)
def test_the_look_at_sources_would_see_it(text, tmp_path, monkeypatch):
    (tmp_path / "arena").mkdir()
    (tmp_path / "arena" / "bad.py").write_text(text)
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    with pytest.raises(AssertionError):
        test_no_source_can_load_a_pickle_or_run_text()


def test_reading_results_never_touches_a_pickle(here, tmp_path, monkeypatch):
    assert here("grid", "tiny.toml", "--out", "out", "--workers", "1")[0] == 0

    def refuse(*_, **__):
        raise AssertionError("a pickle was loaded")

    class Refuse:
        __init__ = refuse

    for name in ("load", "loads"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(pickle, "Unpickler", Refuse)
    monkeypatch.setattr(torch, "load", refuse)
    (run_id,) = load_results("out")["run_id"].unique()
    load_curves("out")
    load_environments("out")
    load_model("out", run_id)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for words in (["report", "out"], ["dynamics", "out", "--intervene", "none"]):
            status, _, err = here(*words)
            assert status == 0, err


def test_a_pickle_in_the_place_of_the_weights_is_refused(here):
    import hashlib
    import json

    from arena.grid.store import StoreError

    assert here("grid", "tiny.toml", "--out", "out", "--workers", "1")[0] == 0
    (folder,) = Path("out/runs").iterdir()
    ran = Path("ran")

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (ran,))

    for data in (pickle.dumps(Bomb()), _saved(Bomb())):
        (folder / "model.safetensors").write_bytes(data)
        sums = json.loads((folder / "checksums.json").read_text())
        sums["model.safetensors"] = hashlib.sha256(data).hexdigest()
        (folder / "checksums.json").write_text(json.dumps(sums))
        with pytest.raises(StoreError, match="does not hold a model"):
            load_model("out", folder.name)
    assert not ran.exists()


def _saved(thing):
    import io

    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()
