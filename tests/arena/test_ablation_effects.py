"""Effects of an ablation against effects that were put in, and what may be claimed of them."""

from __future__ import annotations

import ablation_fakes
import numpy as np
import polars as pl
import pytest

from arena.ablation.axes import AXES, named
from arena.ablation.effects import declared_effects, effect_table, levels_of_params, point_table
from arena.ablation.sentences import axis_sentences, longest, why_not
from arena.memory import NAMED
from arena.statistics import seeds_needed

FACTORIAL = dict(decay=["channel", "scalar"], erase=["channel", "mean", "none"], write=["channel", "mean"])
LABELS = {("rebind", "{}"): "rebind", ("mqar", "{}"): "mqar"}


def planted(task, length, gates, seed):
    """Known effects on rebind at length 128; nothing but a seed's own level elsewhere."""
    value = 0.5 + 0.01 * (seed - 1000)
    if task == "rebind" and length == 128:
        value -= 0.2 * (gates.get("erase") == "mean") + 0.1 * (gates.get("decay") == "scalar")
        value -= 0.08 * (gates.get("erase") == "mean" and gates.get("write") == "mean")
        value += 0.001 * (seed % 3) * (gates.get("erase") == "mean")  # so that intervals have a width
        value += 0.002 * (seed % 2) * (gates.get("decay") == "scalar")
    return value


def one(frame, **fields):
    found = frame.filter(*(pl.col(name).eq_missing(pl.lit(value)) for name, value in fields.items()))
    assert found.height == 1, found
    return found.row(0, named=True)


@pytest.fixture(scope="module")
def factorial():
    ablation = ablation_fakes.planned(**FACTORIAL)
    rows = ablation_fakes.rows(ablation, planted)
    return rows, effect_table(rows, "gdn2")


def test_main_effects_are_the_planted_ones(factorial):
    _, effects = factorial
    at = dict(task="rebind", eval_length=128, kind="main")
    erase = one(effects, **at, axis="erase", to="mean")
    # At write=channel -0.2, at write=mean -0.28, and the seeds' share 0.001 (seed % 3).
    share = float(np.mean([0.001 * (seed % 3) for seed in range(1000, 1010)]))
    assert erase["of"] == "channel" and erase["contexts"] == 4 and erase["seeds"] == 10
    assert erase["mean"] == pytest.approx(-0.24 + share)
    decay = one(effects, **at, axis="decay", to="scalar")
    assert decay["contexts"] == 6 and decay["mean"] == pytest.approx(-0.1 + 0.001)
    assert one(effects, **at, axis="write", to="mean")["mean"] == pytest.approx(-0.08 / 3)
    assert one(effects, **at, axis="erase", to="none")["mean"] == pytest.approx(0)
    assert effects.filter(task="mqar")["mean"].abs().max() < 1e-12


def test_interactions_are_the_planted_ones(factorial):
    _, effects = factorial
    at = dict(task="rebind", eval_length=128, kind="interaction")
    both = one(effects, **at, axis="erase", to="mean", second="write", second_to="mean")
    assert both["mean"] == pytest.approx(-0.08) and both["contexts"] == 2
    assert one(effects, **at, axis="decay", second="erase", second_to="mean")["mean"] == pytest.approx(0)
    none = one(effects, **at, axis="erase", to="none", second="write")
    assert none["mean"] == pytest.approx(0) and none["second_of"] == "channel"


def test_claims_need_seeds_an_interval_and_the_correction(factorial):
    _, effects = factorial
    at = dict(eval_length=128, kind="main")
    erase = one(effects, task="rebind", **at, axis="erase", to="mean")
    # 4 effects on 2 tasks; all ten seeds have the same sign: p = 2^-9.
    assert erase["p"] == pytest.approx(2**-9) and erase["p_holm"] == pytest.approx(8 * 2**-9)
    assert erase["claim"] and erase["high"] < 0 and erase["needed"] == 10
    # No width, no interval, no claim: every seed says the same to the last digit.
    assert not one(effects, task="mqar", **at, axis="erase", to="mean")["claim"]
    assert effects.filter(eval_length=64)["p_holm"].null_count() == effects.filter(eval_length=64).height


def test_few_seeds_allow_no_claim():
    ablation = ablation_fakes.planned(**FACTORIAL)
    rows = ablation_fakes.rows(ablation, planted, seeds=3)
    effects = effect_table(rows, "gdn2")
    assert not effects["claim"].any() and effects["low"].null_count() == effects.height
    said = axis_sentences(effects, LABELS)
    assert list(said) == ["decay", "erase", "write"]
    assert "mean instead of channel allows no claim on" in said["erase"] and "3 of 10 seeds" in said["erase"]


def test_a_large_family_needs_more_seeds():
    """30 effects: 10 seeds give p = 2^-9 each, which Holm's correction makes 30 / 512 > 0.05."""
    numbers = [round(0.1 * i, 1) for i in range(1, 16)]
    ablation = ablation_fakes.planned(erase=["channel", *numbers])

    def score(task, length, gates, seed):
        return 0.9 - (0.3 + 0.001 * (seed % 5)) * ("erase" in gates)

    ten = effect_table(ablation_fakes.rows(ablation, score, lengths=(64,)), "gdn2")
    assert ten.height == 30 and not ten["claim"].any()
    assert set(ten["needed"]) == {seeds_needed(30)} == {11}
    eleven = effect_table(ablation_fakes.rows(ablation, score, lengths=(64,), seeds=11), "gdn2")
    assert eleven["claim"].all()


def test_effects_that_are_missing_count_in_the_family():
    """A point without results must not make the other effects look surer than they were declared to be."""
    ablation = ablation_fakes.planned(**FACTORIAL)
    rows = ablation_fakes.rows(ablation, planted)
    declared = declared_effects(ablation)
    whole = longest(effect_table(rows, "gdn2", None, declared))
    assert {kind: whole.filter(kind=kind).height for kind in ("main", "interaction")} == {
        kind: declared[kind] for kind in ("main", "interaction")
    }
    assert whole.equals(longest(effect_table(rows, "gdn2")))
    part = rows.filter((pl.col("task") == "rebind") & ~pl.col("model_params").str.contains("none"))
    seen = longest(effect_table(part, "gdn2", None, declared))
    assert 0 < seen.filter(kind="main").height < declared["main"] == 8
    at = dict(task="rebind", kind="main", axis="erase", to="mean")
    assert one(seen, **at)["p_holm"] == one(whole, **at)["p_holm"] == pytest.approx(8 * 2**-9)


def test_an_effect_of_a_few_seeds_is_not_said_to_be_of_all():
    ablation = ablation_fakes.planned(tasks=["rebind"], erase=["channel", "mean"])

    def score(task, length, gates, seed):
        return 0.9 - 0.3 * ("erase" in gates and seed == 1000)

    effects = effect_table(ablation_fakes.rows(ablation, score, seeds=20), "gdn2")
    assert effects["low"].null_count() == effects.height and not effects["claim"].any()
    (said,) = axis_sentences(effects, LABELS).values()
    assert "no interval, for want of spread" in said and "agree" not in said


def test_a_claim_is_a_sentence_with_its_task_and_cost(factorial):
    said = axis_sentences(factorial[1], LABELS)
    assert list(said) == ["decay", "erase", "write"]
    assert said["erase"].startswith("erase: mean instead of channel changes the score by -0.24 [")
    assert "on rebind, allows no claim on mqar" in said["erase"]
    # One change costs 100 made-up parameters and half as much time again.
    assert "at +100 parameters, the same state bytes, 1.50 x the time" in said["erase"]
    assert said["erase"].count(".\n") == 0 and said["erase"].endswith(".")


def test_the_gated_correction_is_timed_with_a_warning():
    ablation = ablation_fakes.planned(tasks=["rebind"], write_on=["correction"])
    said = axis_sentences(effect_table(ablation_fakes.rows(ablation, planted), "gdn2"), LABELS)
    assert "x the time (on the reference backend, which says little)." in said["write_on"]


def test_effects_come_from_pairs_that_differ_on_one_axis_alone():
    ablation = ablation_fakes.planned(presets=["left-out"])
    effects = longest(effect_table(ablation_fakes.rows(ablation, planted), "gdn2")).filter(task="rebind")
    found = {(row["axis"], row["to"]): row["contexts"] for row in effects.iter_rows(named=True)}
    # erase=mean write=mean has no neighbour; the complement is compared with the memory without erase.
    assert found == {
        ("erase", "1"): 1,
        ("erase", "none"): 1,
        ("write", "one"): 1,
        ("coupling", "tied"): 1,
        ("coupling", "complement"): 1,
    }
    complete = ablation_fakes.planned(presets=["paper", "left-out"])
    effects = longest(effect_table(ablation_fakes.rows(complete, planted), "gdn2")).filter(task="rebind")
    both = one(effects, kind="interaction")
    assert (both["axis"], both["to"], both["second"], both["second_to"]) == ("erase", "mean", "write", "mean")
    assert both["mean"] == pytest.approx(-0.08)


def test_a_range_that_is_gone_with_its_gate_does_not_count():
    ablation = ablation_fakes.planned("gdn2-neg", erase=["channel", "none"], erase_range=[1, 2])
    effects = effect_table(ablation_fakes.rows(ablation, planted), "gdn2-neg").filter(kind="main")
    here = longest(effects).filter(task="rebind")
    assert {(row["axis"], row["of"], row["to"]) for row in here.iter_rows(named=True)} == {
        ("erase", "channel", "none"),  # from [0, 2], the base's range
        ("erase_range", "2", "1"),
    }
    assert set(here["contexts"]) == {1}


def test_points_say_what_they_are():
    ablation = ablation_fakes.planned(
        erase=["channel", "scalar"],
        coupling=["free", "tied"],
        erase_range=[1, 2],
        write=["channel", "scalar"],
    )
    points = point_table(ablation_fakes.rows(ablation, planted), "gdn2").filter(
        task="rebind", eval_length=128
    )
    names = dict(points.select("arm", "named").iter_rows())
    assert names["gdn2"] == "gdn2" and names["gdn2 erase_range=2"] == "gdn2-neg"
    assert names["gdn2 erase=scalar write=scalar coupling=tied"] == "kda"
    assert names["gdn2 erase=scalar erase_range=2 write=scalar coupling=tied"] == "kda-neg"
    assert names["gdn2 erase=scalar write=scalar"] is None
    assert (
        named(NAMED["gdn"]) == "gdn"
        and named(NAMED["gdn"].replace(a_range=(1.0, 16.0))) == "gdn, A from 1..16"
    )
    tops = {
        arm: (erase, write)
        for arm, erase, write in points.select("arm", "erase_high", "write_high").iter_rows()
    }
    assert tops["gdn2 erase_range=2"] == (2.0, 1.0)  # free: erase alone is doubled
    assert tops["gdn2 erase_range=2 coupling=tied"] == (2.0, 2.0)  # tied: write as well
    assert one(points, arm="gdn2")["difference"] is None
    assert set(AXES) <= set(points.columns)


def test_differences_are_paired_by_seed_and_failed_runs_are_left_out():
    ablation = ablation_fakes.planned(tasks=["rebind"], write=["mean"])

    def score(task, length, gates, seed):
        if gates and seed == 1000:
            return None
        return 0.1 * (seed - 1000) - (0.02 if gates else 0.0)

    point = one(
        point_table(ablation_fakes.rows(ablation, score, seeds=5), "gdn2"),
        arm="gdn2 write=mean",
        eval_length=64,
    )
    assert point["seeds"] == 4 and point["difference"] == pytest.approx(-0.02)
    effect = effect_table(ablation_fakes.rows(ablation, score, seeds=5), "gdn2").row(0, named=True)
    assert effect["seeds"] == 4 and effect["mean"] == pytest.approx(-0.02)


def test_no_claim_while_seeds_that_were_asked_for_have_no_result():
    ablation = ablation_fakes.planned(tasks=["rebind"], erase=["channel", "mean"])

    def score(task, length, gates, seed):
        return None if gates and seed == 1011 else 0.9 - (0.3 + 0.001 * (seed % 5)) * ("erase" in gates)

    rows = ablation_fakes.rows(ablation, score, seeds=12, lengths=(64,))
    declared = declared_effects(ablation) | {"seeds": 12}
    assert effect_table(rows, "gdn2")["claim"].all()
    effect = effect_table(rows, "gdn2", None, declared).row(0, named=True)
    assert not effect["claim"] and why_not(effect) == "11 of 12 seeds"
    fewer = effect_table(rows.filter(pl.col("seed") != 1011), "gdn2", None, declared | {"seeds": 11})
    assert fewer["claim"].all()


def test_sequences_that_training_may_have_met_are_no_test():
    ablation = ablation_fakes.planned(tasks=["rebind"], write=["mean"])
    rows = ablation_fakes.rows(ablation, planted)
    seen = rows.filter(eval_length=128).with_columns(split=pl.lit("train"))
    table = point_table(pl.concat([rows.filter(eval_length=64), seen]), "gdn2")
    assert set(table["eval_length"]) == {64}


def test_runs_of_the_search_are_no_results():
    ablation = ablation_fakes.planned(tasks=["rebind"], write=["mean"])
    rows = ablation_fakes.rows(ablation, planted)
    searched = rows.with_columns(stage=pl.lit("search"), value=pl.lit(0.0))
    assert point_table(pl.concat([rows, searched]), "gdn2").equals(point_table(rows, "gdn2"))
    assert point_table(searched, "gdn2").is_empty() and effect_table(searched, "gdn2").is_empty()


def test_the_ledger_gives_the_costs():
    ablation = ablation_fakes.planned(tasks=["rebind"], write=["mean"])
    rows = ablation_fakes.rows(ablation, planted, lengths=(64,))
    ledger = pl.DataFrame(
        {
            "task": ["rebind"] * 2,
            "task_params": ["{}"] * 2,
            "arm": ["gdn2", "gdn2 write=mean"],
            "ms_per_step": [10.0, 15.0],
            "flops_per_token": [1e6, 9e5],
        }
    )
    known = effect_table(rows, "gdn2", ledger).row(0, named=True)
    assert (known["time"], known["flops"]) == (pytest.approx(1.5), pytest.approx(0.9))
    timed = effect_table(rows, "gdn2").row(0, named=True)
    assert (timed["time"], timed["flops"]) == (pytest.approx(1.0), None)
    assert (
        "0.90 x the FLOPs, 1.50 x the time"
        in axis_sentences(effect_table(rows, "gdn2", ledger), LABELS)["write"]
    )


def test_levels_are_read_from_the_models_that_were_trained():
    ablation = ablation_fakes.planned("kda", tasks=["rebind"], conv=["gate"], output_gate=["none"])
    rows = ablation_fakes.rows(ablation, planted, seeds=1)
    params = rows.filter(arm="kda conv=gate output_gate=none")["model_params"][0]
    spec, levels = levels_of_params(params)
    assert spec == NAMED["kda"]
    assert (levels["conv"], levels["output_gate"], levels["coupling"]) == ("gate", "none", "tied")
