"""Arms: variants of architectures under names of their own, and what a run is trained for."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json

import grid_fakes
import polars as pl
import pytest

from arena.grid import ExperimentError, load_results, parse_experiment, plan_runs
from arena.grid.driver import train_runs
from arena.grid.request import request
from arena.grid.results import ROW_SCHEMA, load_curves
from arena.grid.toml import to_toml

SMALL = {
    "name": "arms",
    "archs": ["gdn", "wide", "gdn.bare"],
    "arms": {
        "wide": {"arch": "gdn", "d_model": 32, "options": {"output_gate": "none"}},
        "gdn.bare": {"arch": "gdn", "conv": "none"},
    },
    "tasks": [{"name": "parity", "train_lengths": [3, 8], "eval_lengths": [16], "model": {"n_heads": 2}}],
    "seeds": 2,
    "model": {"d_model": 16, "n_layers": 1, "n_heads": 1},
    "train": {"steps": 10, "batch_size": 4},
}


def planned(**changes):
    return plan_runs(parse_experiment({**copy.deepcopy(SMALL), **changes}))


def test_an_arm_is_its_architecture_with_its_own_fields():
    runs = planned()
    assert [run.arm for run in runs[::2]] == SMALL["archs"]
    plain, wide, bare = (run.config["model"] for run in runs[::2])
    assert {model["arch"] for model in (plain, wide, bare)} == {"gdn"}
    assert {model["n_heads"] for model in (plain, wide, bare)} == {2}, "[tasks.model] holds for arms too"
    assert (plain["d_model"], wide["d_model"], wide["options"]) == (16, 32, {"output_gate": "none"})
    assert (plain["conv"], bare["conv"]) == (None, "none")
    assert len({run.id for run in runs}) == len(runs) == 6
    assert all(run.stage == "grid" and run.space is None for run in runs)


def test_the_order_is_model_task_arm_override():
    changes = {
        "archs": ["wide"],
        "arms": {"wide": {"arch": "gdn", "n_heads": 4, "d_model": 32}},
        "overrides": {"wide": {"d_model": 64}},
    }
    model = planned(**changes)[0].config["model"]
    assert (model["n_heads"], model["d_model"]) == (4, 64)


def test_an_arm_without_changes_has_the_ids_of_its_architecture():
    plain = planned(archs=["gdn"], arms={})
    named = planned(archs=["mine"], arms={"mine": {"arch": "gdn"}})
    assert [run.id for run in plain] == [run.id for run in named]
    assert {run.arm for run in named} == {"mine"}


def test_a_field_that_came_later_leaves_the_ids_alone_at_its_default():
    plain = planned(archs=["gdn"], arms={})
    defaults = {"conv_on": "qkv", "experts": 1, "experts_per_token": 1, "load_balance": 0.01}
    said = planned(archs=["gdn"], arms={}, model={**SMALL["model"], **defaults})
    assert [run.id for run in plain] == [run.id for run in said]
    changed = planned(archs=["gdn"], arms={}, model={**SMALL["model"], "experts": 2})
    assert not {run.id for run in plain} & {run.id for run in changed}
    assert changed[0].config["model"]["experts"] == 2


def test_experts_and_convolutions_of_an_arm():
    arms = {
        "moe": {"arch": "gdn", "experts": 4, "experts_per_token": 2, "load_balance": 0.1},
        "all": {"arch": "gdn", "conv": "dynamic-lowrank", "conv_on": "all"},
    }
    found = {
        run.arm: run.config["model"]
        for run in planned(archs=["moe", "all"], arms=arms, overrides={"moe": {"experts": 8}})
    }
    assert [found["moe"][name] for name in ("experts", "experts_per_token", "load_balance")] == [8, 2, 0.1]
    assert (found["all"]["conv"], found["all"]["conv_on"]) == ("dynamic-lowrank", "all")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"wide": {"arch": "gdn", "experts": 0}}}, r"experts = 0 in \[arms.wide\]"),
        ({"arms": {"wide": {"arch": "gdn", "expert": 2}}}, "unknown key 'expert'.*did you mean 'experts'"),
        (
            {"archs": ["wide"], "arms": {"wide": {"arch": "gdn", "experts_per_token": 2}}},
            "'wide': experts_per_token must be within 1..experts",
        ),
        (
            {"archs": ["wide"], "arms": {"wide": {"arch": "gdn", "conv_on": "all"}}},
            "'wide': conv_on = 'all' needs a convolution",
        ),
        ({"arms": {"wide": {"arch": "gdn", "conv_on": "out"}}}, r"conv_on = 'out' in \[arms.wide\]"),
        (
            {"archs": ["a"], "arms": {"a": {"arch": "mamba2", "outer": "official", "experts": 2}}},
            "'mamba2' has no MLP",
        ),
        (
            {"archs": ["gdn+swa", "gdn+swa[1:1]"], "arms": {}, "model": {"d_model": 16, "n_layers": 2}},
            "'gdn\\+swa' and 'gdn\\+swa\\[1:1\\]' are the same model",
        ),
        (
            {"archs": ["gdn+swa[3:1]"], "arms": {}, "model": {"d_model": 16, "n_layers": 2}},
            "needs at least 4 layers",
        ),
        (
            {"arms": {"wiede": {"arch": "gdn"}}},
            r"\[arms.wiede\] is about no architecture.*did you mean 'wide'",
        ),
        ({"arms": {"wide": {"arch": "gdnn"}, "gdn.bare": {"arch": "gdn"}}}, "did you mean gdn"),
        ({"arms": {"wide": {"arhc": "gdn"}}}, r"unknown key 'arhc' in \[arms.wide\]; did you mean 'arch'"),
        (
            {"archs": ["gdn", "wide"], "arms": {"wide": {"arch": "gdn"}}},
            "'gdn' and 'wide' are the same model",
        ),
        ({"archs": ["wide"], "arms": {"wide": {"d_model": 32}}}, "unknown architecture 'wide'"),
        ({"archs": ["a,b"], "arms": {"a,b": {"arch": "gdn"}}}, "a,b"),
        ({"archs": ["wide"], "arms": {"wide": {"arch": "gdn", "conv": "statik"}}}, "wide.*statik"),
    ],
)
def test_wrong_arms_are_refused_in_one_line(changes, message):
    with pytest.raises(ExperimentError, match=message) as error:
        planned(**changes)
    assert "\n" not in str(error.value)


def test_the_command_line_keeps_the_arms_that_it_names(tmp_path):
    path = tmp_path / "arms.toml"
    path.write_text(to_toml(SMALL))
    kept = request(str(path), archs=["wide"])
    assert kept.archs == ["wide"] and list(kept.arms) == ["wide"]


def test_arm_stage_and_space_are_kept_beside_the_run_and_laid_over_it(tmp_path):
    runs = grid_fakes.make_runs(groups=2, seeds=2)
    search = [
        dataclasses.replace(run, arm=f"arm of {run.arm}", stage="search", space="abc", trial=7)
        for run in runs
    ]
    for wanted in (search, runs):  # the second request finds every run of the first
        train_runs(wanted, tmp_path, name="fake", request="", fleet_size=2, workers=1, work=grid_fakes.work)
        rows = load_results(tmp_path)
        found = dict(rows.select("run_id", pl.struct("arm", "stage", "space", "trial")).iter_rows())
        assert found == {run.id: run.notes for run in wanted}
        assert set(load_curves(tmp_path).columns) >= {"arm", "stage", "space"}


def test_folders_from_before_arms_are_read(tmp_path):
    grid_fakes.drive(tmp_path, groups=1, seeds=1)
    plan = json.loads((tmp_path / "plan.json").read_text())
    plan["runs"] = {key: {"trial": 0} for key in plan["runs"]}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    (folder,) = (tmp_path / "runs").iterdir()
    old = pl.read_parquet(folder / "rows.parquet").drop("arm", "stage", "space", "verdict")
    old.write_parquet(folder / "rows.parquet")
    sums = json.loads((folder / "checksums.json").read_text())
    sums["rows.parquet"] = hashlib.sha256((folder / "rows.parquet").read_bytes()).hexdigest()
    (folder / "checksums.json").write_text(json.dumps(sums))
    rows = load_results(tmp_path)
    assert rows.schema == pl.Schema(ROW_SCHEMA)
    assert (
        set(rows["arm"]) == {"arch0"} and set(rows["stage"]) == {"grid"} and rows["space"].null_count() == 2
    )
