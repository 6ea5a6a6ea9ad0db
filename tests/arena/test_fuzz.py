"""A little of what ``tools/fuzz.py`` does for long: hostile files, command lines and result folders."""

from __future__ import annotations

import shutil

import pytest
from hypothesis import HealthCheck, given, settings

from tests.arena import fuzzing

TINY = fuzzing.to_toml({**fuzzing.BASE, "archs": ["gdn"], "arms": {}, "tasks": fuzzing.BASE["tasks"][:1]})


def few(count):
    return settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), database=None)


def test_the_base_of_the_fuzzers_is_right(tmp_path):
    assert fuzzing.read_data(fuzzing.BASE, tmp_path) == "planned"


@few(150)
@given(text=fuzzing.texts())
def test_any_file_is_read_or_refused(tmp_path_factory, text):
    fuzzing.read_file(text, tmp_path_factory.getbasetemp())


@few(80)
@given(data=fuzzing.experiments())
def test_any_experiment_is_planned_or_refused(tmp_path_factory, data):
    fuzzing.read_data(data, tmp_path_factory.getbasetemp())


@few(80)
@given(words=fuzzing.LINES)
def test_any_command_line_is_done_or_refused(tmp_path_factory, words):
    with fuzzing.nothing_runs(tmp_path_factory.getbasetemp()):
        fuzzing.command(words)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return fuzzing.train(tmp_path_factory.mktemp("fuzzed"))


@few(60)
@given(attacks=fuzzing.ATTACKS)
def test_any_result_folder_is_read_or_refused(tmp_path_factory, trained, attacks):
    folder = tmp_path_factory.getbasetemp() / "attacked"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(trained, folder, symlinks=True)
    fuzzing.attack(folder, attacks)
    fuzzing.read_folder(folder)


def test_what_the_fuzzers_have_found(tmp_path):
    """A name as long as the file: the message names it in part."""
    long = {**fuzzing.BASE, "archs": ["gdn", "9" * 5000]}
    assert fuzzing.read_data(long, tmp_path) == "refused"
    assert fuzzing.read_file(b"x = " + b"9" * 5000, tmp_path) == "refused"
    assert fuzzing.read_file(b"x = " + b"[" * 5000, tmp_path) == "refused"
    assert fuzzing.read_file(b"# " + b"x" * 1_000_001, tmp_path) == "refused"
