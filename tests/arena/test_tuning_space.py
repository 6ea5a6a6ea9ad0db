"""The search space: its points, its bounds, its hash, and what is refused."""

from __future__ import annotations

import pytest
import torch
import tuning_fakes

from arena.grid import ExperimentError
from arena.grid.tuning_section import OwnParameter, TuningSection
from arena.tuning.prepare import check
from arena.tuning.space import Axis, make_space, own_value, sobol


def space_of(**tuning):
    experiment = tuning_fakes.experiment(tuning)
    return make_space(experiment, experiment.tuning)


def test_the_sequence_is_the_one_that_results_were_made_with():
    """Another version of torch that scrambles otherwise would quietly be another search."""
    assert sobol(2, 0) == [
        [0.47510719299316406, 0.592523992061615, 0.4944792091846466, 0.3138517439365387,
         0.9560918211936951, 0.08330223709344864, 0.09876348823308945],
        sobol(2, 0)[1],
    ]  # fmt: skip
    assert sobol(3, 0) == sobol(16, 0)[:3] and sobol(3, 0) != sobol(3, 1)


@pytest.mark.parametrize("count", [8, 32])
def test_every_column_is_balanced(count):
    """A scrambled net of a power of two has one point in each of as many equal parts of every axis."""
    columns = torch.tensor(sobol(count, 3)).T
    for column in columns:
        assert sorted((column * count).long().tolist()) == list(range(count))


def test_leaving_a_parameter_out_or_adding_own_ones_moves_no_other_column():
    bounds = {"lr": [1e-3, 1e-1], "weight_decay": [0.0, 0.3], "clip": [0.5, 2.0], "beta2": [0.9, 0.999]}
    full = space_of(space=bounds).search_points()
    for names in (["lr"], ["lr", "clip"], ["beta2", "weight_decay"]):
        for own in ({}, {"swa": {"window": {"low": 2, "high": 8}}}):
            part = space_of(space={name: bounds[name] for name in names}, own=own).search_points()
            for a, b in zip(full, part, strict=True):
                assert dict(b.shared) == {name: a.shared[name] for name in names}


def test_values_lie_within_bounds_on_their_scales():
    log = Axis("lr", 1e-4, 1e-2)
    assert (
        log.value(0.0) == 1e-4
        and log.value(0.5) == pytest.approx(1e-3)
        and log.place(1e-3) == pytest.approx(0.5)
    )
    gap = Axis("beta2", 0.9, 0.999)
    assert gap.value(0.5) == pytest.approx(0.99) and gap.value(0.0) == 0.9
    assert gap.beyond("high").high == pytest.approx(0.9999, abs=2e-5 * 5)
    assert log.beyond("high").high == pytest.approx(1e-1) and log.beyond("low").low == pytest.approx(1e-5)
    linear = Axis("weight_decay", 0.0, 0.3)
    assert linear.value(0.25) == pytest.approx(0.075) and not linear.can_extend
    for u in (0.0, 0.3, 1 - 1e-9):
        assert [own_value(OwnParameter(choices=["a", "b"]), u)] == [
            ["a", "a", "b"][[0.0, 0.3, 1 - 1e-9].index(u)]
        ]
    whole = [own_value(OwnParameter(low=1, high=4), u / 400) for u in range(400)]
    assert [whole.count(n) for n in (1, 2, 3, 4)] == [100] * 4


def test_the_boundary_rule_is_about_the_outer_tenth_of_log_ranges():
    space = space_of()
    low, high = [("lr", "low")], [("lr", "high")]
    edges = {1e-3: low, 1.5e-3: low, 1.7e-3: [], 1e-2: [], 6e-2: [], 6.5e-2: high}
    for lr, expected in edges.items():
        assert space.edges_near({"lr": lr, "weight_decay": 0.0}) == expected, lr
    points = space.extension_points([("lr", "high"), ("lr", "low")])
    assert [point.number for point in points] == [4, 5, 6, 7]
    assert all(1e-1 <= point.shared["lr"] <= 1 for point in points[:2])
    assert all(1e-4 <= point.shared["lr"] <= 1e-3 for point in points[2:])


@pytest.mark.parametrize(
    "tuning",
    [
        {"points": 8},
        {"point_seed": 1},
        {"space": {"lr": [1e-3, 2e-1]}},
        {"metric": "sequence_accuracy"},
        {"search_seeds": 2},
        {"extension": 3},
        {"exploit": "tpe", "trials": 4},
        {"own": {"swa": {"window": {"choices": [2, 4]}}}},
    ],
)
def test_all_that_decides_the_search_is_hashed(tuning):
    assert space_of(**tuning).id != space_of().id


@pytest.mark.parametrize("tuning", [{"report_seeds": 5}, {"panel": ["gdn"]}, {"pairs": [["gdn", "swa"]]}])
def test_what_is_done_with_the_winner_is_not(tuning):
    assert space_of(**tuning).id == space_of().id


@pytest.mark.parametrize(
    ("tuning", "message"),
    [
        ({"point": 3}, r"unknown key 'point' in \[tuning\]; did you mean 'points'"),
        ({"space": {"lrr": [1, 2]}}, r"unknown key 'lrr' in \[tuning.space\]; did you mean 'lr'"),
        ({"space": {"lr": [1.0, 0.1]}}, r"lr = \[1, 0.1\] should be \[low, high\]"),
        ({"space": {"lr": [0.0, 0.1]}}, "lr starts at 0; it must be above 0"),
        ({"space": {"beta2": [0.9, 1.0]}}, "beta2 ends at 1; it must be below 1"),
        ({"space": {}}, "at least one of"),
        ({"metric": "test/accuracy"}, "would choose on split 'test'.*test is reported once"),
        ({"metric": "acuracy"}, "did you mean 'accuracy'"),
        ({"metric": "accuracy@24"}, "length 24, which is reported for task 'mqar'"),
        ({"metric": "accuracy@17"}, "measured at 16, 32, not at 17"),
        ({"report_seeds": [0]}, r"share \[0\]: the reported runs need fresh seeds"),
        ({"own": {"gdn": {"windw": {"choices": [1, 2]}}}}, "no parameter 'windw'"),
        ({"own": {"swa": {"window": {"choices": [2, -4]}}}}, "window must be at least 1"),
        ({"own": {"swa": {"n_heads": {"low": 1, "high": 2}}}, "match": "params"}, "which match"),
        ({"own": {"swa": {"experts": {"choices": [2, 4]}}}, "match": "params"}, "which match"),
        ({"own": {"swa": {"experts_per_token": {"choices": [1, 2]}}}}, "must be within 1..experts"),
        ({"own": {"swa": {n: {"choices": [1, 2]} for n in "abc"}}}, "has 3 parameters; at most 2"),
        ({"own": {"sva": {"window": {"choices": [2, 4]}}}}, "did you mean 'swa'"),
        ({"own": {"swa": {"window": {"choises": [2, 4]}}}}, "did you mean 'choices'"),
        ({"panel": ["gdm"]}, "panel names 'gdm'.*did you mean 'gdn'"),
        ({"pairs": [["gdn", "gdn"]]}, "compares 'gdn' with itself"),
        ({"pairs": [["gdn", "swa"], ["swa", "gdn"]]}, "twice"),
        ({"equivalence": [{"pair": ["gdn", "swa"], "margin": 0.0}]}, "margin"),
        ({"exploit": "tpe"}, "give both, or neither"),
        ({"reference": "gdn"}, "give match too"),
        ({"match": "parms"}, "should be 'none', 'params'"),
        ({"points": 1}, "greater than or equal to 2"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_in_one_line(tuning, message):
    with pytest.raises(ExperimentError, match=message) as error:
        experiment = tuning_fakes.experiment(tuning)
        check(experiment, experiment.tuning, "cpu")
    assert "\n" not in str(error.value)


def test_a_parameter_that_is_not_searched_has_one_value():
    with pytest.raises(ExperimentError, match="lr has several values"):
        experiment = tuning_fakes.experiment({"space": {"clip": [0.5, 2.0]}}, lr=[1e-3, 1e-2])
        check(experiment, experiment.tuning, "cpu")


def test_a_family_that_needs_more_seeds_is_told_before_the_start():
    from arena.tuning.cost import family_lines

    section = TuningSection(pairs=[["a", "b"], ["a", "c"]], report_seeds=[5, 6, 7])
    (line,) = family_lines(section, 2)
    assert "4 comparisons, which needs 10 seeds; 3" in line and "NO CLAIM" in line
    for seeds, enough in ((9, False), (10, True)):  # 8 would do for the test, the interval needs 10
        section = TuningSection(pairs=[["a", "b"], ["a", "c"]], report_seeds=list(range(10, 10 + seeds)))
        assert ("NO CLAIM" not in family_lines(section, 2)[0]) == enough


def test_the_seeds_told_before_the_start_are_those_that_the_verdicts_ask_for():
    from evidence_fakes import tuned_rows

    from arena.report.verdicts import verdict_table
    from arena.tuning.cost import family_lines

    rows = tuned_rows(("gdn", "gdn2"), ("mqar",), points=2, seeds=4).filter(stage="final")
    pairs, equal = [["gdn2", "gdn"]], [{"pair": ["gdn2", "gdn"], "margin": 0.02}]
    table = verdict_table(rows, [("mqar", "{}")], pairs, equal)
    section = TuningSection(pairs=pairs, equivalence=equal, report_seeds=4)
    for line, kind in zip(family_lines(section, 1), ("better", "equal"), strict=True):
        (needed,) = table.filter(kind=kind)["needed"]
        assert f"needs {needed} seeds; 4" in line
