"""Trained models of a result folder: which ones are looked at, where, and what is written of them."""

import tomllib

import polars as pl
import pytest

from arena.dynamics import QUANTITIES, choose_runs, measure_directory, measure_runs, summarise
from arena.grid import load_results, parse_experiment, run_experiment

TINY = """
name = "tiny"
title = "A tiny grid"
archs = ["gdn-neg", "slstm"]
seeds = 2
[model]
d_model = 8
n_layers = 1
n_heads = 2
[train]
steps = 3
batch_size = 4
eval_examples = 8
[[tasks]]
name = "parity"
train_lengths = [3, 20]
eval_lengths = [24, 100]
[[tasks]]
name = "rebind"
params = { n_keys = 2, n_rebinds = 2 }
train_lengths = [16, 24]
eval_lengths = [32]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    run_experiment(parse_experiment(tomllib.loads(TINY)), folder)
    return folder


def test_the_best_run_of_each_arm_and_task_by_valid(folder):
    chosen = choose_runs(folder)
    assert chosen.select("task", "arm").rows() == [
        (task, arm) for task in ("parity", "rebind") for arm in ("gdn-neg", "slstm")
    ]
    rows = load_results(folder)
    valid = rows.filter(~pl.col("reported") & (pl.col("metric") == "chance_scaled_accuracy"))
    means = dict(valid.group_by("run_id").agg(pl.col("value").mean()).iter_rows())
    for row in chosen.iter_rows(named=True):
        rivals = rows.filter((pl.col("task") == row["task"]) & (pl.col("arm") == row["arm"]))[
            "run_id"
        ].unique()
        assert row["score"] == pytest.approx(max(means[run] for run in rivals))
        assert row["test_lengths"] == ([24, 100] if row["task"] == "parity" else [32])
    assert len(choose_runs(folder, per_arm=None)) == 8
    one = rows["run_id"][0]
    assert choose_runs(folder, runs=[one])["run_id"].to_list() == [one]


def test_training_length_and_far_beyond(folder, tmp_path):
    found = measure_directory(folder, examples=2, points=8, tasks=["parity", "rebind"])
    table = found["measurements"]
    lengths = table.select("task", "length").unique().sort("task", "length").rows()
    assert lengths == [("parity", 20), ("parity", 100), ("rebind", 24), ("rebind", 96)]
    assert set(table["quantity"]) <= set(QUANTITIES) == set(found["dictionary"]["name"])
    assert set(table["run_id"]) == set(found["runs"]["run_id"])
    grown = table.filter((pl.col("quantity") == "state_growth") & (pl.col("arm") == "gdn-neg"))
    assert grown.filter(pl.col("length") == 100)["value"].is_not_null().all()
    assert grown.filter(pl.col("length") == 20)["value"].is_null().all()
    edits = table.filter((pl.col("quantity") == "old_value_left") & (pl.col("arm") == "gdn-neg"))
    assert edits.filter(pl.col("task") == "rebind")["value"].is_not_null().any()
    assert edits.filter(pl.col("task") == "parity")["value"].is_null().all()
    table.write_parquet(tmp_path / "measurements.parquet")
    assert pl.read_parquet(tmp_path / "measurements.parquet").equals(table)


def test_summary_is_the_mean_over_the_role(folder):
    chosen = choose_runs(folder, arms=["gdn-neg"], tasks=["rebind"])
    (table,) = measure_runs(
        folder, chosen, lengths=[24], examples=3, quantities=["spectral_radius", "cell_norm"]
    )
    summary = summarise(table)
    for row in summary.iter_rows(named=True):
        rows = table.filter(
            (pl.col("quantity") == row["quantity"])
            & pl.col("role").eq_missing(row["role"])
            & pl.col("head").eq_missing(row["head"])
        )
        assert row["n"] == rows["value"].count()
        assert row["mean"] == (pytest.approx(rows["value"].mean()) if row["n"] else None)
    assert summary.filter(pl.col("quantity") == "cell_norm").select("head", "mean").rows() == [(None, None)]


def test_bad_requests_are_named(folder):
    with pytest.raises(ValueError, match="holds no finished arm 'gdnneg'; did you mean gdn-neg"):
        choose_runs(folder, arms=["gdnneg"])
    with pytest.raises(ValueError, match="holds no finished task 'rebnd'; did you mean rebind"):
        choose_runs(folder, tasks=["rebnd"])
    with pytest.raises(ValueError, match="holds no finished run_id 'x'"):
        choose_runs(folder, runs=["x"])
    with pytest.raises(ValueError, match="per_arm must be at least 1"):
        choose_runs(folder, per_arm=0)
    with pytest.raises(ValueError, match="split 'exam' is unknown"):
        measure_directory(folder, split="exam")
