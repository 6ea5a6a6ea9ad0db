"""The whole grid with real training: two workers and a kill give the table of one undisturbed worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
from tiny import TINY

from arena.grid import load_curves, load_results


def grid(folder: Path, out: str, workers: int) -> subprocess.Popen:
    return subprocess.Popen(
        [
            *(sys.executable, "-c", "from arena.cli import main; main()"),
            *("grid", "tiny.toml", "--out", out, "--workers", str(workers)),
        ],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_with_two_workers_equals_undisturbed_with_one(tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY.replace("steps = 3", "steps = 6\neval_every = 2"))
    calm = grid(tmp_path, "calm", 1)
    stormy = grid(tmp_path, "stormy", 2)
    end = time.monotonic() + 300
    while not list((tmp_path / "stormy").glob("runs/*")) and stormy.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    stormy.kill()
    stormy.communicate()
    output, errors = calm.communicate(timeout=300)
    assert calm.returncode == 0, errors
    again = grid(tmp_path, "stormy", 2)
    output, errors = again.communicate(timeout=300)
    assert again.returncode == 0 and "4 of 4 runs stored" in output, errors
    left, right = (load_results(tmp_path / name).drop("wall_s") for name in ("calm", "stormy"))
    assert left.equals(right) and left["run_id"].n_unique() == 4
    curves = load_curves(tmp_path / "calm")
    assert curves.equals(load_curves(tmp_path / "stormy"))
    assert set(curves["step"]) == {2, 4, 6}
    accuracies = left.filter(pl.col("metric") == "accuracy")["value"]
    assert accuracies.is_between(0, 1).all() and accuracies.n_unique() > 2


def test_ctrl_c_says_how_to_go_on(tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY.replace("steps = 3", "steps = 5000"))
    driver = grid(tmp_path, "out", 2)
    assert "4 runs: 0 stored already" in driver.stdout.readline()
    driver.send_signal(signal.SIGINT)
    output, errors = driver.communicate(timeout=300)
    assert driver.returncode == 130 and errors == ""
    assert "0 of 4 runs stored in out" in output
    assert "to go on: arena grid tiny.toml --out out --workers 2" in output


def test_a_model_that_cannot_learn_from_nan_is_recorded_as_diverged(tmp_path):
    text = TINY.replace("seeds = 2", "seeds = 1\nlr = [1e-3, 1e30]").replace('"gdn", "gdn-neg"', '"gdn"')
    (tmp_path / "tiny.toml").write_text(text.replace("steps = 3", "steps = 12"))
    driver = grid(tmp_path, "out", 1)
    output, errors = driver.communicate(timeout=300)
    assert driver.returncode == 0, errors + output
    table = load_results(tmp_path / "out").filter(metric="accuracy", split="test")
    statuses = dict(table.select("lr", "status").unique().iter_rows())
    assert statuses[1e-3] == "done"
    assert statuses[1e30] == "diverged"
    assert (table.filter(status="diverged")["value"] == 0).all(), "the worst score"
