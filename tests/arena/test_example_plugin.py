"""The example package, installed as a user does, through the whole toolkit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from arena.conformance import CHECKS

EXAMPLE = Path(__file__).parents[2] / "examples" / "leaky-arena"
SETTING = """
name = "plugged"
archs = ["leaky", "gdn"]
seeds = 1
lr = 3e-3
[model]
d_model = 8
n_layers = 1
[train]
steps = 4
batch_size = 4
eval_every = 0
eval_examples = 8
[[tasks]]
name = "last_seen"
params = { n_symbols = 3 }
train_lengths = 12
eval_lengths = 16
[tuning]
points = 2
report_seeds = 1
exploit = "none"
"""


@pytest.fixture(scope="module")
def arena(tmp_path_factory):
    """The command line of an environment in which the example is installed: arguments -> what it did."""
    home = tmp_path_factory.mktemp("plugged")
    shutil.copytree(EXAMPLE, home / "source")
    (home / "plugged.toml").write_text(SETTING)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", home / "site", home / "source"], check=True, timeout=300)
    path = os.pathsep.join([str(home / "site"), str(EXAMPLE.parents[1])])
    around = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

    def run(*words, status=0):
        command = [sys.executable, "-c", "from arena.cli import main; main()", *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=home, env=around, timeout=600)
        assert done.returncode == status, (words, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        return done

    run.home = home
    return run


@pytest.fixture(scope="module")
def trained(arena):
    arena("grid", "plugged.toml", "--out", "grid", "--workers", "2")
    return arena.home / "grid"


def test_its_block_passes_every_check(arena):
    lines = arena("check-block", "leaky", "--outer", "common").stdout.splitlines()
    assert len(lines) == len(CHECKS) and all(" ok" in line for line in lines)


def test_its_names_are_listed_with_their_origin(arena):
    lines = arena("list").stdout.splitlines()
    for name in ("leaky", "last_seen"):
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert "(plug-in leaky-arena 0.1.0+source." in line


def test_its_task_is_a_task(arena):
    out = arena("show", "last_seen", "--length", "12", "--param", "n_symbols=3").stdout
    assert "which symbol was seen last?" in out and "length 12, 4 tokens, 3 classes" in out


def test_a_grid_trains_it_in_workers_and_records_its_version(trained):
    rows = pl.concat([pl.read_parquet(path) for path in trained.glob("runs/*/rows.parquet")])
    assert set(rows["arch"]) == {"leaky", "gdn"}
    assert rows["version"].str.contains("plugin:leaky-arena=0.1.0+source.", literal=True).all()  # the task's
    for folder in (trained / "runs").iterdir():
        assert json.loads((folder / "environment.json").read_text())["plugins"].keys() == {"leaky-arena"}


def test_reports_and_dynamics_read_it(arena, trained):
    assert "leaky" in arena("report", "grid").stdout
    arena("dynamics", "grid", "--length", "16", "--intervene", "none")
    table = pl.read_parquet(trained / "dynamics" / "added" / "weight_norm.parquet")
    assert {"run_id", "arm", "task", "length", "quantity", "value", "weight"} <= set(table.columns)
    leaky = table.filter(arm="leaky")
    assert {"into", "out", "embedding", "head"} <= set(leaky["quantity"])
    page = (trained / "dynamics" / "page.html").read_text()
    assert "weight_norm (plug-in leaky-arena 0.1.0)" in page and "Root mean square of every weight" in page
    assert "added/weight_norm" in (trained / "dynamics" / "dictionary.md").read_text()


def test_it_is_tuned(arena):
    arena("tune", "plugged.toml", "--arch", "leaky", "--out", "tuned", "--workers", "1")
    rows = pl.concat([pl.read_parquet(p) for p in (arena.home / "tuned").glob("runs/*/rows.parquet")])
    assert set(rows["stage"]) == {"search", "final"} and set(rows["arch"]) == {"leaky"}


def test_another_version_is_trained_anew_and_the_old_model_is_not_measured(arena, trained):
    module = arena.home / "site" / "leaky_arena" / "block.py"
    text = module.read_text()
    try:
        module.write_text(text + "\n# another version\n")
        refused = arena("dynamics", "grid", status=2).stderr
        assert refused.count("\n") == 1 and "the run has plug-in leaky-arena 0.1.0+source." in refused
        out = arena("grid", "plugged.toml", "--arch", "leaky", "--out", "grid", "--workers", "1").stdout
        assert "1 of 1 runs stored" in out and "2 runs of earlier requests" in out
    finally:
        module.write_text(text)
