"""The command line: exit status and one line for every mistake, from a fresh process as a user would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import TINY


def arena(*arguments, cwd=None, **environment):
    return subprocess.run(
        [sys.executable, "-c", "from arena.cli import main; main()", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        timeout=300,
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "tiny.toml").write_text(TINY)
    return folder


@pytest.fixture(scope="module")
def trained(tiny):
    done = arena("grid", "tiny.toml", "--workers", "2", cwd=tiny)
    assert done.returncode == 0, done.stderr
    assert "4 runs: 0 stored already, 4 to train in 2 fleets; 2 workers x 1 thread" in done.stdout
    assert "4 of 4 runs stored in results/tiny" in done.stdout
    return tiny / "results" / "tiny"


def test_a_grid_is_trained_once_and_reported(tiny, trained):
    import polars as pl

    import arena as package

    before = {path: path.stat().st_mtime_ns for path in (trained / "runs").rglob("*")}
    again = arena("grid", "tiny.toml", cwd=tiny)
    assert again.returncode == 0 and "4 stored already, 0 to train" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in (trained / "runs").rglob("*")} == before

    report = arena("report", trained)
    assert report.returncode == 0, report.stderr
    assert "gdn-neg" in report.stdout and "length 32" in report.stdout and "A tiny grid" in report.stdout
    for name in ("report.md", "accuracy.csv", "accuracy.parquet", "accuracy.png", "overview.png", "runs.csv"):
        assert (trained / "report" / name).stat().st_size > 0

    table = package.load_results(trained)
    assert table["run_id"].n_unique() == 4 and set(table["status"]) == {"done"}
    assert table.filter(pl.col("split") == "test")["eval_length"].unique().sort().to_list() == [24, 32]
    assert set(table["metric"]) >= {"accuracy", "loss", "sequence_accuracy", "chance_scaled_accuracy"}
    whole = table.select(pl.exclude("reason", "chance", "space", "verdict")).null_count().row(0)
    assert sum(whole) == 0


def test_a_stored_model_gives_its_stored_score(trained):
    import json

    import synthetic_tasks
    from arena.grid import load_model, load_results
    from arena.training import TrainConfig

    table = load_results(trained).filter(split="test", metric="accuracy", eval_length=32)
    row = table.row(0, named=True)
    config = json.loads((trained / "runs" / row["run_id"] / "config.json").read_text())
    model = load_model(trained, row["run_id"])
    task = synthetic_tasks.get(row["task"], **json.loads(row["task_params"]))
    seed = TrainConfig(**config["train"]).data_seed
    batch = task.sample(batch_size=row["n_examples"], length=32, seed=seed, index=0, split="test")
    with torch.no_grad():
        answers = model(batch.tokens)[0].argmax(-1)
    scored = batch.targets >= 0
    assert (answers == batch.targets)[scored].double().mean().item() == pytest.approx(row["value"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["grid", "quickstrat"], "no experiment 'quickstrat'; did you mean 'quickstart'?"),
        (["grid", "none.toml"], "cannot read none.toml"),
        (["grid", "tiny.toml", "--arch", "gdm"], "unknown architecture 'gdm'"),
        (["grid", "tiny.toml", "--task", "mqar"], "has no task 'mqar'"),
        (["grid", "--task", "partiy"], "did you mean parity"),
        (["grid"], "nothing to train"),
        (["grid", "tiny.toml", "--seeds", "none"], "Invalid value for '--seeds'"),
        (["grid", "tiny.toml", "--seeds", "0"], "seeds = 0"),
        (["grid", "tiny.toml", "--steps", "-1"], "steps = -1 in [train]"),
        (["grid", "tiny.toml", "--workers", "0"], "--workers"),
        (["grid", "tiny.toml", "--device", "tpu"], "--device is cpu or cuda"),
        (["grid", "tiny.toml", "--out", "tiny.toml"], "cannot write to tiny.toml"),
        (["grid", "tiny.toml", "--out", ""], "--out is a folder"),
        (["grid", "tiny.toml", "--out", "."], "holds other files and is no result folder"),
        (["grid", "tiny.toml", "--arch", ","], "--arch is names with commas between"),
        (["grid", "tiny.toml", "--task", ""], "--task is names with commas between"),
        (["grid", "tiny.toml", "extra"], "unexpected extra argument"),
        (["gird"], "No such command 'gird'"),
        (["report"], "Missing argument"),
        (["report", "nowhere"], "nowhere is not a result folder"),
        (["list", "cells"], "cannot list 'cells'; choose archs, tasks or experiments"),
        (["show", "partiy"], "did you mean parity"),
        (["show", "parity", "--param", "x=1"], "x"),
        (["show", "parity", "--length", "0"], "length"),
        (["show", "parity", "--length", "1000000000000"], "--length is at most"),
        (["--nonsense"], "No such option"),
    ],
)
def test_a_wrong_request_is_one_line_and_starts_nothing(here, arguments, message):
    before = sorted(Path.cwd().rglob("*"))
    status, output, errors = here(*arguments)
    assert (status, output) == (2, "") and errors.count("\n") == 1 and errors.startswith("arena: ")
    assert message in errors
    assert sorted(Path.cwd().rglob("*")) == before


def test_no_command_is_answered_by_the_help(here):
    status, output, errors = here()
    assert status == 2 and errors == "" and "grid" in output and output.count("\n") > 5


def test_a_damaged_run_is_told_in_one_line(here):
    status, output, _ = here("grid", "tiny.toml", "--out", "hurt", "--arch", "gdn", "--workers", "1")
    assert status == 0, output
    with open(next(Path("hurt/runs").glob("*/rows.parquet")), "ab") as file:
        file.write(b"x")
    status, output, errors = here("report", "hurt")
    assert status == 0 and "INCOMPLETE" in output
    assert errors.count("\n") == 1 and errors.startswith("arena: left out: hurt/runs/")


def test_no_gpu_is_said_in_one_line(here):

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    status, _, errors = here("grid", "tiny.toml", "--device", "cuda", "--out", "gpu")
    assert status == 2 and "torch sees no GPU" in errors and not Path("gpu").exists()


def test_an_unknown_backend_is_refused(here, monkeypatch):
    monkeypatch.setenv("ARENA_BACKEND", "chunky")
    status, _, errors = here("grid", "tiny.toml")
    assert status == 2 and "ARENA_BACKEND is 'chunky'; did you mean 'chunked'?" in errors


def test_failed_runs_give_status_1_and_are_listed(here, monkeypatch):
    import arena.grid

    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import grid_fakes

    real = arena.grid.run_experiment

    def failing(*arguments, **options):
        return real(*arguments, **options, work=grid_fakes.threads_seen)  # raises in the worker

    monkeypatch.setattr(arena.grid, "run_experiment", failing)
    status, output, _ = here("grid", "tiny.toml", "--out", "failing")
    assert status == 1
    assert "0 of 4 runs stored" in output and "failed: gdn parity seed 1" in output
    assert "RuntimeError: OMP 1" in output and "to try them again: arena" in output
    status, output, _ = here("report", "failing")
    assert status == 0 and "4 runs failed" in output and "INCOMPLETE: 4 runs" in output


def test_a_foreign_kernels_distribution_is_refused(tmp_path):
    info = tmp_path / "kernels-0.9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.9.9\n")
    done = arena("list", "experiments", PYTHONPATH=str(tmp_path), cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "'kernels' 0.9.9 is installed" in done.stderr
    other = tmp_path / "other" / "kernels"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("")
    done = arena("list", "experiments", PYTHONPATH=str(other.parent), cwd=other.parent)
    assert done.returncode == 2 and f"leads to {other}" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--version"], "memory-arena "),
        (["grid", "--help"], "--workers"),
        (["list", "experiments"], "quickstart"),
        (["list"], "gdn-neg"),
        (["show", "parity", "--examples", "1"], "→"),
        (["show", "mqar", "--param", "n_pairs=2", "--param", "vocab_size=8"], "k1→v0"),
    ],
)
def test_what_prints_and_ends_well(here, arguments, words):
    status, output, _ = here(*arguments)
    assert status == 0 and words in output


def test_a_traceback_appears_on_request_only(tiny):
    code = (
        "import arena.grid.request as r\n"
        "def boom(*a, **k): raise RuntimeError('secret place')\n"
        "r.request = boom\nfrom arena.cli import main\nmain()"
    )
    for extra, shown in ([], False), (["--debug"], True):
        done = subprocess.run(
            [sys.executable, "-c", code, "grid", "x.toml", *extra], capture_output=True, text=True, cwd=tiny
        )
        assert done.returncode == 1 and ("Traceback" in done.stderr) == shown
        assert "internal error: RuntimeError: secret place" in done.stderr


def test_help_needs_nothing_heavy():
    code = (
        "import sys\nfrom arena.cli import main\n"
        "try: main(['--help'])\nfinally: assert not {'torch', 'polars', 'seaborn'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "grid" in done.stdout
