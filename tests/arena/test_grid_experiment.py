"""Experiment files: strict, with one helpful line for every mistake."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import experiments
from arena.grid import ExperimentError, load_experiment, parse_experiment, shipped
from arena.grid.experiment import Experiment
from arena.grid.request import request
from arena.grid.toml import to_toml

GOOD = {
    "name": "small",
    "archs": ["gdn", "lstm"],
    "tasks": [{"name": "parity", "train_lengths": [3, 8], "eval_lengths": [8, 16]}],
    "train": {"steps": 10},
}


def changed(**changes):
    return {**GOOD, **changes}


def with_task(**changes):
    return changed(tasks=[{**GOOD["tasks"][0], **changes}])


def test_short_forms_mean_the_long_ones():
    short = parse_experiment(changed(seeds=3, lr=1e-3, weight_decay=0))
    long = parse_experiment(changed(seeds=[0, 1, 2], lr=[1e-3], weight_decay=[0.0]))
    assert short == long
    assert parse_experiment(with_task(train_lengths=8, eval_lengths=16)).tasks[0].train_lengths == [8, 8]
    assert parse_experiment(changed(lr=[1e-3, 1e-2], weight_decay=[0.0, 0.1])).points == [
        (1e-3, 0.0),
        (1e-3, 0.1),
        (1e-2, 0.0),
        (1e-2, 0.1),
    ]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (changed(sed=3), ["unknown key 'sed' at the top level", "did you mean 'seeds'"]),
        (changed(model={"d_modell": 3}), ["unknown key 'd_modell' in [model]", "did you mean 'd_model'"]),
        (with_task(train_lenghts=3), ["'train_lenghts'", "[[tasks]] number 1 (parity)", "'train_lengths'"]),
        (changed(train={"steps": 1, "betta2": 0.9}), ["'betta2' in [train]", "'beta2'"]),
        (changed(overrides={"gdn": {"heads": 1}}), ["'heads' in [overrides.gdn]", "'n_heads'"]),
        (changed(overrides={"gdm": {}}), ["[overrides.gdm]", "did you mean 'gdn'"]),
        (
            with_task(model={"d_modell": 3}),
            ["'d_modell' in [tasks.model] of [[tasks]] number 1", "'d_model'"],
        ),
        (with_task(model=3), ["model = 3", "should be a table"]),
        (with_task(valid_lengths=[32, 32]), ["valid_lengths repeats 32"]),
        (with_task(train_length_choices=[4, 4]), ["train_length_choices repeats 4"]),
        (with_task(train_lengths=[3, 10**9]), ["train_lengths.1 = 1000000000", "1000000"]),
        (changed(model={"d_model": 10**8}), ["d_model = 100000000"]),
        (changed(seeds=[2**63]), ["seeds.0"]),
        ({key: value for key, value in GOOD.items() if key != "train"}, ["[train] is missing"]),
        ({key: value for key, value in GOOD.items() if key != "tasks"}, ["[[tasks]] is missing"]),
        (changed(archs=[]), ["archs = []", "at least 1"]),
        (changed(tasks=[]), ["tasks", "at least 1"]),
        (changed(seeds=[]), ["seeds = []", "at least 1"]),
        (changed(seeds=0), ["seeds = 0", "between 1 and 10000"]),
        (changed(seeds=[1, 1]), ["seeds repeats 1"]),
        (changed(seeds=[-1]), ["seeds.0 = -1"]),
        (changed(seeds=True), ["seeds"]),
        (changed(archs=["gdn", "gdn"]), ["archs repeats gdn"]),
        (changed(lr="fast"), ["lr.0 = 'fast'", "number"]),
        (changed(lr=0), ["lr.0 = 0", "greater than 0"]),
        (changed(lr=float("nan")), ["lr.0 = nan", "finite"]),
        (changed(lr=float("inf")), ["finite"]),
        (changed(train={"steps": "many"}), ["steps = 'many' in [train]", "integer"]),
        (changed(train={"steps": True}), ["steps = True in [train]"]),
        (changed(train={}), ["'steps' is missing in [train]"]),
        (changed(model={"outer": "comon"}), ["outer = 'comon' in [model]", "'common' or 'official'"]),
        (changed(name="../up"), ["name = '../up'"]),
        (changed(tasks="parity"), ["tasks"]),
        (changed(tasks=["parity"]), ["[[tasks]] number 1"]),
        (with_task(train_lengths=[8, 3]), ["[8, 3] should be [shortest, longest]", "(parity)"]),
        (with_task(eval_lengths=[8, 8]), ["eval_lengths repeats 8"]),
        (with_task(eval_lengths=[]), ["eval_lengths"]),
        ({}, ["'name' is missing at the top level", "more)"]),
    ],
)
def test_mistakes_are_named_with_their_place(data, words):
    with pytest.raises(ExperimentError) as error:
        parse_experiment(data, label="x.toml")
    message = str(error.value)
    assert message.startswith("x.toml: ") and "\n" not in message and len(message) < 600
    for word in words:
        assert word in message, message


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ExperimentError, match=r"no experiment 'quickstrat'; did you mean 'quickstart'\?"):
        load_experiment("quickstrat")
    with pytest.raises(ExperimentError, match=r"cannot read .*none.toml: No such file"):
        load_experiment(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(ExperimentError, match=r"bad.toml is not valid TOML: .*line 1"):
        load_experiment(tmp_path / "bad.toml")
    (tmp_path / "latin.toml").write_bytes(b'a = "\xe9"')
    with pytest.raises(ExperimentError, match="not UTF-8"):
        load_experiment(tmp_path / "latin.toml")
    with pytest.raises(ExperimentError, match="cannot read"):
        (tmp_path / "folder.toml").mkdir()
        load_experiment(tmp_path / "folder.toml")


@pytest.mark.parametrize("name", sorted(p.stem for p in Path(experiments.__path__[0]).glob("*.toml")))
def test_every_shipped_experiment_is_found_by_name_and_valid(name):
    assert name in shipped()
    assert load_experiment(name).name == name


KEYS = st.sampled_from([*Experiment.model_fields, "nonsense", "steps", "params"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(KEYS, VALUES, max_size=5), st.booleans())
def test_any_data_is_an_experiment_or_one_line(data, complete):
    try:
        parse_experiment({**GOOD, **data} if complete else data)
    except ExperimentError as error:
        assert "\n" not in str(error)


TOML_VALUES = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(max_size=5), TOML_VALUES, max_size=5))
def test_toml_is_read_back_as_it_was(data):
    assert tomllib.loads(to_toml(data)) == data


def test_the_copy_of_a_request_is_the_request():
    wanted = request("quickstart", seeds=2)
    assert parse_experiment(tomllib.loads(to_toml(wanted.model_dump(exclude_none=True)))) == wanted


def test_the_command_line_changes_a_file(tmp_path):
    file = tmp_path / "x.toml"
    data = changed(overrides={"lstm": {"d_model": 32}})
    data["tasks"] = [*data["tasks"], {**data["tasks"][0], "name": "s3", "steps": 99}]
    file.write_text(to_toml(data))
    plain = request(str(file))
    assert plain.seeds == [0, 1, 2] and [t.name for t in plain.tasks] == ["parity", "s3"]
    other = request(str(file), archs=["gdn", "mlstm"], tasks=["s3"], seeds=5, steps=7)
    assert (other.archs, other.seeds, other.train.steps) == (["gdn", "mlstm"], [0, 1, 2, 3, 4], 7)
    assert [t.name for t in other.tasks] == ["s3"] and other.tasks[0].steps is None and not other.overrides
    with pytest.raises(ExperimentError, match="experiment small has no task 'party'; did you mean 'parity'"):
        request(str(file), tasks=["party"])
    with pytest.raises(ExperimentError, match="nothing to train"):
        request(None)
    with pytest.raises(ExperimentError, match="seeds = 0"):
        request(str(file), seeds=0)


def test_without_a_file_the_quickstart_is_the_setting():
    base = load_experiment("quickstart")
    wanted = request(None, archs=["gdn"], tasks=["parity", "s5"])
    assert wanted.name == "grid" and wanted.model == base.model and wanted.train == base.train
    assert wanted.tasks[0] == next(t for t in base.tasks if t.name == "parity")
    assert wanted.tasks[1].eval_lengths[-1] >= 4 * wanted.tasks[1].train_lengths[1]
    with pytest.raises(ExperimentError, match="partiy"):
        request(None, tasks=["partiy"])
