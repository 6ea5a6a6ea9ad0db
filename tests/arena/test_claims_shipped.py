"""The claim files, records and page of this repository."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import pytest

from arena.claims import SIZES, claim_names, load_claim, load_record
from arena.claims.file import families
from arena.claims.page import _rates, page
from arena.claims.scores import SCORE_SCHEMA
from arena.grid.experiment import load_experiment
from arena.statistics import claim_seeds
from arena.tuning.prepare import check
from arena.tuning.space import make_space

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", claim_names())
def test_shipped_claims_can_be_run_and_decided(name):
    found = load_claim(name)
    assert load_claim(str(found.section.number)).name == name
    for size in SIZES:
        experiment = found.experiments[size]
        check(experiment, experiment.tuning, "cpu")
        for family in families(found):
            assert len(experiment.tuning.report_seeds) >= claim_seeds(len(family))
    for line in found.lines:
        assert line.published or line.rule.ours, f"{name}: {line.key} has no published number"
    small = found.experiments["cpu"]
    assert small.tuning.points == 6
    assert all(task.train_lengths[1] <= 44 for task in small.tasks)
    path = ROOT / "experiments" / "claims" / f"{name}.toml"
    assert load_experiment(path).claim == found.section.sentence


def test_the_ledger_has_the_claims():
    numbers = [load_claim(name).section.number for name in claim_names()]
    assert numbers == sorted(set(numbers)) and set(numbers) >= set(range(1, 11))


def test_records_belong_to_their_claims():
    """A record that settings or rules were changed after does not count: run it again."""
    for name in claim_names():
        for size in SIZES:
            found = load_record(name, size)
            if found is not None:
                assert found.origin["seal"] == load_claim(name).seal(size)
                assert list(found.table.columns) == list(SCORE_SCHEMA)
                commits = {around["commit"] for around in found.origin["environments"]}
                assert commits and not any("+changes" in str(commit) for commit in commits)


def test_the_page_says_where_a_tuned_rate_is_at_the_end_of_those_tried():
    experiments = load_claim("parity").experiments
    ends = {}
    for size, experiment in experiments.items():
        tried = sorted(
            point.shared["lr"] for point in make_space(experiment, experiment.tuning).search_points()
        )
        ends[size] = [_rates(experiment)(rate) for rate in (tried[0], tried[1], tried[-1])]
    assert ends["cpu"] == ["0.0027 (lowest tried)", "0.0035", "0.025 (highest tried)"]
    assert not any("tried" in text for text in ends["full"])  # its extension goes beyond them


def test_the_page_is_what_the_generator_writes():
    assert (ROOT / "docs" / "claims.md").read_text(encoding="utf-8") == page()


def test_tool_writes_the_page(tmp_path):
    tool = tmp_path / "tools" / "claims.py"
    tool.parent.mkdir()
    (tmp_path / "docs").mkdir()
    shutil.copyfile(ROOT / "tools" / "claims.py", tool)
    runpy.run_path(str(tool), run_name="__main__")
    assert (tmp_path / "docs" / "claims.md").read_text(encoding="utf-8") == page()
