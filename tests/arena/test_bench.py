"""``arena bench``: tables, files, the parts of a training step, and requests that are wrong."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from arena.bench import training
from arena.cli import main
from kernels.bench import contenders


@pytest.fixture
def here(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(contenders, "MEMORY_SHAPES", {"arena": ((2, 12, 1, 16),), "lm": ()})
    monkeypatch.setattr(contenders, "CONV_SHAPES", {"arena": ((2, 12, 16),), "lm": ()})

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            main(["bench", *arguments])
        output = capsys.readouterr()
        return end.value.code, output.out, output.err

    return run


def test_kernels_give_a_table_a_file_and_a_figure(here):
    status, output, errors = here("kernels", "--operator", "short_conv,mlstm", "--rounds", "1", "--out", "b")
    assert status == 0, errors
    assert "short_conv, float32" in output and "ours (auto)" in output and "ceilings: copy" in output
    table = pl.read_parquet("b/kernels.parquet")
    assert set(table["operator"]) == {"short_conv", "mlstm"} and (table["ms"] > 0).all()
    about = json.loads(Path("b/kernels.json").read_text())
    assert about["machine"]["torch"] and about["ceilings"]["copy_bytes_s"] > 0
    assert Path("b/kernels.png").stat().st_size > 5000


def test_training_says_where_the_time_goes(here):
    status, output, errors = here(
        *(
            "training",
            "--arch",
            "gdn",
            "--task",
            "parity",
            "--fleets",
            "4,1",
            "--seconds",
            "0.1",
            "--out",
            "b",
        )
    )
    assert status == 0, errors
    table = pl.read_parquet("b/training.parquet")
    assert table["fleet"].to_list() == [1, 4] and table["arch"].unique().to_list() == ["gdn"]
    shares = [f"{name}_share" for name in (*training.PHASES, "evaluation")]
    for row in table.iter_rows(named=True):
        assert sum(row[name] for name in shares) == pytest.approx(1)
        assert all(row[name] > 0 for name in shares)
        assert row["run_steps_s"] == pytest.approx(1e3 * row["fleet"] / row["step_ms"])
        assert "gated_memory=" in row["backend"]
    assert table["times_one_by_one"][0] == 1
    assert "runs/hour" in output and Path("b/training.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["kernels", "--device", "tpu"], "--device is cpu or cuda, not 'tpu'"),
        (["kernels", "--sizes", "huge"], "--sizes is arena or lm, not 'huge'"),
        (["kernels", "--dtype", "int8"], "--dtype is float32 or bfloat16 or float16, not 'int8'"),
        (["kernels", "--peer-configs", "0"], "--peer-configs is a number from 1, not 0"),
        (["kernels", "--rounds", "0"], "--rounds is a number from 1 to 1000, not 0"),
        (["kernels", "--operator", "mlstn"], "--operator 'mlstn'; did you mean 'mlstm' or 'slstm'?"),
        (["kernels", "--point", "GDN2"], "--point 'GDN2'"),
        (["kernels", "--out", " "], "--out is a folder, not an empty name"),
        (["training", "--fleets", "1,x"], "--fleets is numbers"),
        (["training", "--fleets", "0"], "--fleets is numbers"),
        (["training", "--seconds", "0"], "--seconds is a number"),
        (["training", "--arch", "nosuch", "--task", "parity"], "nosuch"),
        (["training", "nosuch.toml"], "nosuch.toml"),
        (["kernels", "--device"], "--device"),
        (["fly"], "fly"),
    ],
)
def test_wrong_requests_are_one_line_and_measure_nothing(here, arguments, words):
    status, output, errors = here(*arguments)
    assert status == 2 and words in errors and errors.count("\n") == 1 and output == ""
    assert not Path("results").exists()


def test_a_fleet_that_does_not_fit_is_a_row(monkeypatch):
    import synthetic_tasks
    from arena.model import ModelConfig
    from arena.training import TrainConfig

    def full(*arguments):
        raise MemoryError("too large")

    monkeypatch.setattr(training, "_one", full)
    task = synthetic_tasks.get("parity")
    model = ModelConfig(
        arch="gdn", vocab_size=task.vocab_size, n_classes=task.n_classes, d_model=8, n_heads=1
    )
    config = TrainConfig(steps=1, batch_size=2, train_lengths=(3, 8))
    (row,) = training.measure(model, task, config, [1], device="cpu", seconds=0.1)
    assert (
        row["step_ms"] is None
        and row["note"] == "does not fit: too large"
        and list(row) == list(training.FIELDS)
    )
