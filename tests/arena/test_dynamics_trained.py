"""A model that is really trained on parity: the heads that flip are found, and they carry the answer."""

import polars as pl
import pytest

import synthetic_tasks
from arena.dynamics.effects import measure_effects
from arena.dynamics.intervene import edited, parse_edit
from arena.dynamics.probe import measure_decodability
from arena.grid import run_experiment
from arena.grid.experiment import parse_experiment
from arena.grid.results import load_model, load_results

EXPERIMENT = {
    "name": "parity",
    "archs": ["gdn-neg"],
    "seeds": 1,
    "lr": 1e-2,
    "model": {"d_model": 32, "n_layers": 1, "n_heads": 4, "conv": "none"},
    "train": {"steps": 450, "batch_size": 32, "eval_examples": 64},
    "tasks": [
        {
            "name": "parity",
            "params": {"supervision": "running"},
            "train_lengths": [3, 40],
            "eval_lengths": [128],
        }
    ],
}
TASK = synthetic_tasks.get("parity", supervision="running")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run_experiment(parse_experiment(EXPERIMENT, label="parity"), folder, workers=1)
    return load_model(folder, load_results(folder)["run_id"][0])


def test_clamping_the_heads_that_flip_takes_the_answer_away(model):
    """Three times the training length; what is left is what a one so far tells of the first tokens."""
    table = measure_effects(model, TASK, 128, n_sequences=64)
    clamped = table.filter(pl.col("change") == "erase clamped to [0, 1]")
    (found,) = clamped.filter(role="identified").to_dicts()
    assert found["baseline"] > 0.99
    assert found["accuracy_high"] < 0.55
    (control,) = clamped.filter(role="control").to_dicts()
    assert control["n_heads"] == found["n_heads"] and control["accuracy"] > 0.9
    (elsewhere,) = clamped.filter(role="elsewhere").to_dicts()
    assert elsewhere["accuracy"] > 0.9
    (contrast,) = clamped.filter(role="contrast").to_dicts()
    assert contrast["high"] < -0.3


def test_only_a_memory_that_flips_holds_the_parity(model):
    def decoded():
        (row,) = measure_decodability(model, TASK, [128], n_fit=256, n_test=256).to_dicts()
        return row["low"], row["high"]

    low, _ = decoded()
    assert low > 0.95
    with edited(model, [parse_edit("erase:clamp:0:1")], {}):
        low, high = decoded()
    assert low < 0.5 < high < 0.65
