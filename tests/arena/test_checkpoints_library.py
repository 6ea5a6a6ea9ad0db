"""The public library itself, where it is installed: it reads what we write and computes what is stored.

It runs in a process of its own, from which this repository can't be imported: transformers takes any module
named ``kernels`` for another package. ARENA_PUBLIC_LIBRARY names a folder of ``pip install --target`` for a
library that is not in this environment.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from arena.checkpoints import export_checkpoint, import_checkpoint

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "checkpoints"
SITE = os.environ.get("ARENA_PUBLIC_LIBRARY")
needs_library = pytest.mark.skipif(
    SITE is None
    and any(importlib.util.find_spec(name) is None for name in ("fla", "transformers", "triton")),
    reason="flash-linear-attention, transformers and triton are not installed (see ARENA_PUBLIC_LIBRARY)",
)
READ = """
import importlib.util, sys
assert importlib.util.find_spec("arena") is None
spec = importlib.util.spec_from_file_location("public_checkpoints", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import torch
from safetensors.torch import load_file, save_file
found = {}
for folder, expected in zip(sys.argv[3::2], sys.argv[4::2]):
    import json, pathlib
    kind = json.loads((pathlib.Path(folder) / "config.json").read_text())["model_type"]
    model = module.LIBRARY[kind][1].from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found[folder] = model(load_file(expected)["tokens"], use_cache=False).logits.clone()
save_file(found, sys.argv[2])
"""


def library(*words, cwd):
    """Run Python where the library is and this repository is not (-S: no editable installations)."""
    places = [SITE] if SITE else []
    places += [path for path in sys.path if path.endswith("site-packages")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(places),
        "TRITON_INTERPRET": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-S", *map(str, words)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@needs_library
def test_the_library_reads_what_is_written(tmp_path):
    names = ["gdn-grouped", "kda", "gla", "deltanet", "gdnproduct", "mamba2"]
    words = []
    for name in names:
        export_checkpoint(import_checkpoint(FIXTURES / name), tmp_path / name)
        words += [tmp_path / name, FIXTURES / name / "expected.safetensors"]
    library(
        "-c",
        READ,
        ROOT / "tools" / "public_checkpoints.py",
        tmp_path / "logits.safetensors",
        *words,
        cwd=tmp_path,
    )
    found = load_file(tmp_path / "logits.safetensors")
    for name in names:
        logits = load_file(FIXTURES / name / "expected.safetensors")["logits"]
        torch.testing.assert_close(found[str(tmp_path / name)], logits, atol=1e-5, rtol=1e-5, msg=name)


@needs_library
def test_the_fixtures_are_what_the_library_writes(tmp_path):
    library(ROOT / "tools" / "public_checkpoints.py", tmp_path / "made", cwd=tmp_path)
    assert sorted(p.name for p in (tmp_path / "made").iterdir()) == sorted(p.name for p in FIXTURES.iterdir())
    for folder in (tmp_path / "made").iterdir():
        for file in folder.glob("*.safetensors"):
            made, kept = load_file(file), load_file(FIXTURES / folder.name / file.name)
            assert made.keys() == kept.keys()
            for name, tensor in made.items():
                torch.testing.assert_close(
                    tensor, kept[name], atol=1e-5, rtol=1e-5, msg=f"{folder.name} {name}"
                )
