"""Runs, ids and fleets."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys

import grid_fakes
import pytest

from arena.grid import ExperimentError, Run, parse_experiment, plan_fleets, plan_runs
from arena.grid.fleets import split_fleet
from arena.grid.plan import canonical

SMALL = {
    "name": "small",
    "archs": ["gdn", "gdn2"],
    "tasks": [
        {"name": "parity", "train_lengths": [3, 8], "eval_lengths": [16]},
        {
            "name": "mqar",
            "params": {"n_pairs": 2, "vocab_size": 8},
            "train_lengths": 16,
            "eval_lengths": [32],
        },
    ],
    "seeds": 2,
    "lr": [1e-3, 1e-2],
    "model": {"d_model": 16, "n_layers": 1, "n_heads": 1},
    "train": {"steps": 10, "batch_size": 4},
}


def runs_of(**changes) -> list[Run]:
    return plan_runs(parse_experiment({**copy.deepcopy(SMALL), **changes}))


RUNS = runs_of()


def test_the_product_is_planned_once_each():
    assert len(RUNS) == 2 * 2 * 2 * 2 == len({run.id for run in RUNS})
    assert {run.trial for run in RUNS} == {0, 1}
    assert runs_of() == RUNS
    first = RUNS[0].config
    assert json.loads(canonical(first)) == first
    assert first["model"]["arch"] == "gdn" and first["task"] == {
        "name": "parity",
        "params": {"supervision": "final"},
    }
    assert first["train"]["eval_examples"] > 0 and first["replica"]["beta2"] > 0, "defaults are filled in"
    assert first["backend"] == "gated_memory=chunked short_conv=fused" and first["device"] == "cpu"


def test_ids_are_the_same_in_another_process():
    code = (
        "import json,sys\nfrom arena.grid import parse_experiment, plan_runs\n"
        "print(json.dumps([r.id for r in plan_runs(parse_experiment(json.load(sys.stdin)))]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(SMALL),
        capture_output=True,
        text=True,
        env={"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"},
        check=True,
    )
    assert json.loads(done.stdout) == [run.id for run in RUNS]


def leaves(value, path=()):
    if isinstance(value, dict):
        if not value:
            yield path
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    else:
        yield path


@pytest.mark.parametrize("path", list(leaves(RUNS[0].config)), ids=".".join)
def test_every_field_of_the_configuration_is_in_the_id(path):
    config = copy.deepcopy(dict(RUNS[0].config))
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    old = inner[path[-1]]
    inner[path[-1]] = (
        {"x": 1} if isinstance(old, dict) else (old + 1 if isinstance(old, int | float) else "other")
    )
    other = Run(experiment="small", trial=0, arm="gdn", config=config)
    assert other.id != RUNS[0].id
    assert (other.group != RUNS[0].group) == (path[0] != "replica")


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {**SMALL["model"], "d_model": 32}},
        {"model": {**SMALL["model"], "outer": "official"}},
        {"model": {**SMALL["model"], "conv": "static"}},
        {"train": {"steps": 11, "batch_size": 4}},
        {"train": {"steps": 10, "batch_size": 5}},
        {"train": {"steps": 10, "batch_size": 4, "data_seed": 1}},
        {"train": {"steps": 10, "batch_size": 4, "eval_examples": 9}},
        {"train": {"steps": 10, "batch_size": 4, "clip": 0.5}},
        {"train": {"steps": 10, "batch_size": 4, "warmup": 0.5}},
        {"weight_decay": 0.5},
        {"seeds": [7, 8]},
        {"lr": 0.5},
        {"overrides": {"gdn": {"n_heads": 2}, "gdn2": {"n_heads": 2}}},
    ],
)
def test_what_a_file_can_change_changes_every_run(changes):
    assert not {run.id for run in RUNS} & {run.id for run in runs_of(**changes)}


@pytest.mark.parametrize("changes", [{"name": "other"}, {"title": "x"}, {"fleet_size": 2}, {"claim": "y"}])
def test_what_cannot_change_a_result_changes_no_id(changes):
    assert [run.id for run in runs_of(**changes)] == [run.id for run in RUNS]


def test_the_backend_of_the_environment_is_in_the_id(monkeypatch):
    monkeypatch.setenv("ARENA_BACKEND", "reference")
    runs = runs_of()
    assert runs[0].config["backend"] == "gated_memory=reference short_conv=reference" and not {
        r.id for r in runs
    } & {r.id for r in RUNS}


def test_a_bumped_version_changes_the_ids(monkeypatch):
    import arena.blocks

    monkeypatch.setattr(arena.blocks, "RESULT_VERSION", 99, raising=False)
    assert not {run.id for run in runs_of()} & {run.id for run in RUNS}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"archs": ["gdnn"]}, "unknown architecture 'gdnn'; did you mean gdn"),
        ({"tasks": [{"name": "partiy", "train_lengths": 8, "eval_lengths": [8]}]}, "did you mean parity"),
        (
            {"tasks": [{"name": "mqar", "params": {"pairs": 1}, "train_lengths": 8, "eval_lengths": [8]}]},
            "did you mean n_pairs",
        ),
        ({"tasks": [{"name": "mqar", "train_lengths": 8, "eval_lengths": [64]}]}, "accepts no length"),
        ({"tasks": [{"name": "mqar", "train_lengths": 64, "eval_lengths": [3]}]}, "eval_lengths"),
        ({"model": {"options": {"nonsense": 1}}}, "no option 'nonsense'"),
        ({"model": {"options": {"x": float("nan")}}}, "no option 'x'"),
        ({"model": {"d_model": 15, "n_heads": 2}}, "multiple"),
        ({"model": {"conv": "statik"}}, "statik"),
        ({"tasks": [SMALL["tasks"][0], {**SMALL["tasks"][0], "steps": 7}]}, "could not tell them apart"),
        ({"archs": ["xlstm[99999999999:1]"]}, "needs at least 100000000000 layers"),
        ({"archs": ["swa"], "model": {"options": {"window": "8"}}}, "is an integer, not '8'"),
        ({"model": {"options": {"gates": 0}}}, "is a table, not 0"),
        ({"model": {"options": {"output_gate": ""}}}, "output_gate"),
        ({"archs": ["mamba2"], "model": {"outer": "official", "options": {"headdim": 0}}}, "headdim"),
        ({"archs": ["mlstm"], "model": {"outer": "official", "options": {"n_blocks": 0}}}, "n_blocks"),
    ],
)
def test_what_does_not_exist_is_refused_in_one_line(changes, message):
    with pytest.raises(ExperimentError, match=message) as error:
        runs_of(**changes)
    assert "\n" not in str(error.value)


def test_fleets_hold_one_group_each_and_every_run_once():
    fleets = plan_fleets(RUNS, 3)
    assert sorted(run.id for fleet in fleets for run in fleet.runs) == sorted(run.id for run in RUNS)
    assert sorted(len(fleet.runs) for fleet in fleets) == [1] * 4 + [3] * 4
    for fleet in fleets:
        assert len({run.group for run in fleet.runs}) == 1 and len(fleet.runs) <= 3


def test_membership_does_not_depend_on_what_is_finished():
    runs = grid_fakes.make_runs(groups=3, seeds=10)
    whole = {fleet.id for fleet in plan_fleets(runs, 4)}
    rng = random.Random(0)
    for _ in range(50):
        recorded = [[r.id for r in f.runs] for f in plan_fleets(runs, 4) if rng.random() < 0.5]
        assert {fleet.id for fleet in plan_fleets(runs, 4, recorded)} == whole


def test_a_recorded_split_is_used_again():
    runs = grid_fakes.make_runs(groups=1, seeds=10)
    fleets = plan_fleets(runs, 8)
    halves, passed = split_fleet(fleets[0])
    assert [len(half.runs) for half in halves] == [4, 4] and not passed
    recorded = [[r.id for r in f.runs] for f in (fleets[0], *halves)]
    assert {f.id for f in plan_fleets(runs, 8, recorded)} == {halves[0].id, halves[1].id, fleets[1].id}


@pytest.mark.parametrize("fits", [None, 0, 1, 2, 3, 5])
def test_a_split_that_was_killed_while_it_was_recorded_is_completed(fits):
    runs = grid_fakes.make_runs(groups=1, seeds=23)
    fleets = plan_fleets(runs, 11)
    pieces, passed = split_fleet(fleets[0], fits)
    assert [run for piece in pieces for run in piece.runs] == list(fleets[0].runs)
    assert all(len(piece.runs) <= max(1, fits if fits is not None else 6) for piece in pieces)
    nodes = {piece.id for piece in (*pieces, *passed, *fleets)}
    order = [[run.id for run in piece.runs] for piece in (fleets[0], *passed, *pieces)]
    for count in range(len(order) + 1):
        found = plan_fleets(runs, 11, order[:count])
        assert {fleet.id for fleet in found} <= nodes, "mates that the experiment does not give"
        assert {fleet.id for fleet in fleets[1:]} <= {fleet.id for fleet in found}
    assert {fleet.id for fleet in found} == {fleet.id for fleet in (*pieces, *fleets[1:])}


def test_fleets_are_full_but_the_last():
    runs = grid_fakes.make_runs(groups=20, seeds=100)
    assert len(plan_fleets(runs, 16)) == 20 * 7


def test_the_depth_of_the_stack_is_in_the_configuration_where_it_sets_initial_values():
    def options(arch, n_layers, **more):
        sizes = {"d_model": 16, "n_layers": n_layers, "n_heads": 1, "outer": "official", **more}
        return runs_of(archs=[arch], model=sizes)[0].config["model"]["options"]

    assert options("rwkv7", 4) == options("mlstm", 4) == {"n_blocks": 4}
    assert options("mlstm", 2) == {}, "ids from before the model knew it"
    assert options("gdn", 4) == options("rwkv7", 4, outer="common") == {}
    assert options("rwkv7", 4, options={"n_blocks": 3}) == {"n_blocks": 3}
