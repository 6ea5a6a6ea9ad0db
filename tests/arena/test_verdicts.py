"""Verdicts: each claim and each refusal of one, on scores whose answer is known; the words of the lines."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from evidence_fakes import CHANCE, tuned_rows

from arena.report.verdicts import final_scores, rule_text, verdict_line, verdict_table
from arena.statistics import (
    clopper_pearson,
    equivalence_test,
    holm,
    interquartile_mean,
    paired_difference_interval,
    probability_of_improvement,
    sign_flip_test,
)

MQAR, REBIND = ("mqar", "{}"), ("rebind", "{}")


def finals(luck, arms=("gdn", "gdn2"), tasks=("mqar",), seeds=10):
    return tuned_rows(arms, tasks, points=2, seeds=seeds, luck=luck).filter(stage="final")


def step(values):
    """luck from {arm: (low, high)}: seeds spread evenly between them."""
    return lambda arm, task, seed: values[arm][0] + (values[arm][1] - values[arm][0]) * (seed - 1000) / 9


def only(table, kind="better"):
    (row,) = table.filter(kind=kind).to_dicts()
    return row


def test_a_clear_difference_is_claimed_with_all_its_numbers():
    rows = finals(step({"gdn": (0.5, 0.7), "gdn2": (0.9, 1.0)}))
    row = only(verdict_table(rows, [MQAR], [["gdn2", "gdn"]]))
    x = [0.9 + 0.1 * i / 9 for i in range(10)]
    y = [0.5 + 0.2 * i / 9 for i in range(10)]
    assert (row["claim"], row["reason"]) == ("gdn2", None)
    assert row["eval_length"] == 256, "the longest reported length"
    assert row["iqm_x"] == pytest.approx(float(interquartile_mean(x)))
    assert row["difference"] == pytest.approx(float(interquartile_mean(x) - interquartile_mean(y)))
    assert (row["low"], row["high"]) == pytest.approx(paired_difference_interval([x], [y]))
    assert row["improvement"] == probability_of_improvement([x], [y]) == 1.0
    assert row["p"] == row["p_holm"] == 2.0**-9 and row["family"] == 1
    scaled = [(value - CHANCE) / (1 - CHANCE) >= 0.95 for value in x]
    assert (row["solved_x"], row["solved_y"]) == (sum(scaled), 0)
    low, high = clopper_pearson(sum(scaled), 10)
    assert verdict_line(row, "mqar") == (
        "mqar, length 256: gdn2 is BETTER than gdn. 10 paired seeds: interquartile mean 0.950 and 0.600, "
        f"difference +0.350 [{row['low']:+.3f}, {row['high']:+.3f}]; solved {sum(scaled)}/10 [{low:.2f}, "
        f"{high:.2f}] and 0/10 [0.00, 0.31]; P(gdn2 > gdn) = 1.00; sign-flip p = 0.002, Holm over 1: 0.002."
    )
    back = only(verdict_table(rows, [MQAR], [["gdn", "gdn2"]]))
    assert back["claim"] == "gdn2" and back["difference"] == pytest.approx(-row["difference"])
    assert verdict_line(back, "mqar").startswith("mqar, length 256: gdn2 is BETTER than gdn. ")


def test_missing_seeds_are_said_with_their_number():
    rows = finals(step({"gdn": (0.5, 0.7), "gdn2": (0.9, 1.0)}), seeds=9)
    row = only(verdict_table(rows, [MQAR], [["gdn2", "gdn"]]))
    assert row["claim"] is None and row["low"] is None and row["needed"] == 10
    assert verdict_line(row, "mqar").startswith(
        "mqar, length 256: NO CLAIM on gdn2 and gdn: needs 10 paired seeds, has 9. 9 paired seeds: "
    )
    assert "(no interval)" in verdict_line(row, "mqar")
    family = [["gdn2", "gdn"]] * 40  # 2^(1-n) <= 0.05/40
    assert set(verdict_table(rows, [MQAR], family)["needed"]) == {11}
    nothing = only(verdict_table(rows, [MQAR], [["gdn2", "lstm"]]))
    assert verdict_line(nothing, "mqar") == (
        "mqar, length 256: NO CLAIM on gdn2 and lstm: needs 10 paired seeds, has 0."
    )


def test_seeds_without_a_partner_are_no_pairs():
    rows = finals(step({"gdn": (0.5, 0.7), "gdn2": (0.9, 1.0)}))
    lost = (pl.col("arm") == "gdn") & (pl.col("seed") == 1003)
    failed = rows.with_columns(
        status=pl.when(lost).then(pl.lit("failed")).otherwise(pl.col("status")),
        value=pl.when(lost).then(None).otherwise(pl.col("value")),
    )
    row = only(verdict_table(failed, [MQAR], [["gdn2", "gdn"]]))
    assert row["seeds"] == 9 and row["reason"] == "needs 10 paired seeds, has 9"


def test_no_claim_while_declared_seeds_have_no_result():
    """A run that failed, or is still to come, might have been another one than those that are there."""
    rows = finals(step({"gdn": (0.5, 0.7), "gdn2": (0.9, 1.0)}), seeds=12)
    equal = [{"pair": ["gdn2", "gdn"], "margin": 0.9}]
    failed = pl.when((pl.col("arm") == "gdn") & (pl.col("seed") == 1003)).then(pl.lit("failed"))
    part = rows.with_columns(status=failed.otherwise(pl.col("status")))
    for kind, claim in (("better", "gdn2"), ("equal", "equal")):
        whole = only(verdict_table(rows, [MQAR], [["gdn2", "gdn"]], equal, declared_seeds=12), kind)
        assert whole["claim"] == claim
        row = only(verdict_table(part, [MQAR], [["gdn2", "gdn"]], equal, declared_seeds=12), kind)
        assert row["claim"] is None and row["seeds"] == 11
        assert row["reason"] == "only 11 of 12 declared seeds have results of both"


def test_a_diverged_run_counts_with_the_worst_score():
    rows = finals(lambda arm, task, seed: 0.0 if (arm, seed) == ("gdn2", 1000) else 0.9)
    table = final_scores(rows)
    assert table.filter(arm="gdn2", seed=1000)["accuracy"].to_list() == [0.0] and table.height == 20


def test_each_condition_alone_stops_a_claim():
    # One pair in a hundred comparisons: the interval and the probability are fine, the corrected p is not.
    rows = finals(step({"gdn": (0.5, 0.7), "gdn2": (0.9, 1.0)}), seeds=12)
    pairs = [["gdn2", "gdn"]] + [["gdn2", "kda"]] * 199
    row = verdict_table(rows, [MQAR], pairs).row(0, named=True)
    assert row["reason"] == "needs 13 paired seeds, has 12"
    rng = np.random.default_rng(0)
    close = finals(lambda arm, task, seed: float(rng.uniform(0.4, 0.9)))
    row = only(verdict_table(close, [MQAR], [["gdn2", "gdn"]]))
    assert row["claim"] is None and "the interval holds 0" in row["reason"] and "Holm p" in row["reason"]
    # A small shift of every seed: p is as small as it gets, the probability of improvement is not.
    shift = finals(step({"gdn": (0.3, 0.8), "gdn2": (0.31, 0.83)}))
    row = only(verdict_table(shift, [MQAR], [["gdn2", "gdn"]]))
    assert row["p_holm"] == 2.0**-9 and row["low"] > 0
    assert row["claim"] is None and row["reason"] == f"P(gdn2 > gdn) = {row['improvement']:.2f} < 0.75"
    unequal = verdict_table(
        finals(step({"gdn": (0.5, 0.7), "gdn2": (0.9, 1.0)})),
        [MQAR], [["gdn2", "gdn"]], trials={(*MQAR, "gdn"): 8, (*MQAR, "gdn2"): 16},
    )  # fmt: skip
    assert only(unequal)["reason"] == "unequal tuning: 16 and 8 trials"


def test_scores_without_spread():
    apart = finals(lambda arm, task, seed: {"gdn": 0.5, "gdn2": 1.0}[arm])
    row = only(verdict_table(apart, [MQAR], [["gdn2", "gdn"]]))
    assert row["low"] is None and row["claim"] == "gdn2", "all ten pairs agree; no interval is made up"
    assert "difference +0.500 (no interval)" in verdict_line(row, "mqar")
    same = only(verdict_table(finals(lambda *_: 1.0), [MQAR], [["gdn2", "gdn"]]))
    assert same["claim"] is None and same["p"] == 1.0 and same["improvement"] == 0.5
    assert same["reason"] == "no difference"
    assert "(both solve it in every run: too easy to tell them apart)" in verdict_line(same, "mqar")
    nearly = only(
        verdict_table(
            finals(lambda arm, task, seed: 0.9 + 0.01 * (arm == "gdn2" and seed == 1000)),
            [MQAR],
            [["gdn2", "gdn"]],
        )
    )
    assert nearly["claim"] is None and nearly["reason"].startswith(
        "the interval holds 0; equal interquartile means; P(gdn2 > gdn) = 0.55"
    )


def test_the_better_one_is_that_of_the_means_where_interquartile_means_are_equal():
    rows = finals(lambda arm, task, seed: 0.2 if (arm, seed) == ("gdn", 1003) else 0.95)
    row = only(verdict_table(rows, [MQAR], [["gdn2", "gdn"]]))
    assert row["difference"] == 0 < row["mean_difference"] and row["claim"] is None
    assert "P(gdn2 > gdn) = 0.55" in row["reason"] and "equal interquartile means" in row["reason"]
    assert "disagree" not in row["reason"]


def test_two_that_learned_nothing_are_neither_better_nor_equal():
    rows = finals(lambda arm, task, seed: CHANCE + 0.001 * (arm == "gdn2"))
    table = verdict_table(rows, [MQAR], [["gdn2", "gdn"]], [{"pair": ["gdn", "gdn2"], "margin": 0.05}])
    better, equal = only(table), only(table, "equal")
    assert (
        better["p_holm"] < 0.05 and better["claim"] is None and better["reason"] == "neither is above chance"
    )
    assert equal["p_holm"] < 0.05 and equal["claim"] is None and equal["reason"] == "neither is above chance"


def test_the_family_is_what_was_declared():
    def luck(arm, task, seed):
        return {"gdn": 0.6, "gdn2": 0.75, "kda": 0.62}[arm] + 0.01 * ((seed * 7 + len(task)) % 10)

    rows = finals(luck, arms=("gdn", "gdn2", "kda"), tasks=("mqar", "rebind"))
    pairs = [["gdn2", "gdn"], ["kda", "gdn"]]
    table = verdict_table(rows, [MQAR, REBIND], pairs)
    better = table.filter(kind="better")
    assert better.height == 4 and set(better["family"]) == {4}
    assert better["p_holm"].to_list() == pytest.approx(list(holm(better["p"].to_list())))
    waiting = verdict_table(rows, [MQAR, REBIND], pairs, declared_tasks=3).filter(kind="better")
    assert set(waiting["family"]) == {6}, "a task that has not begun counts"
    assert waiting["p_holm"].to_list() == pytest.approx(list(holm([*better["p"], 1, 1]))[:4])
    overall = table.filter(kind="overall")
    assert overall.height == 2 and overall["p"].is_null().all() and overall["claim"].is_null().all()
    row = overall.row(0, named=True)
    assert row["seeds"] == 20
    line = verdict_line(row, "")
    assert line.startswith(
        "all tasks: gdn2 and gdn (a summary: outside the family, no claim). 20 paired runs"
    )
    assert "sign-flip" not in line and "Holm" not in line


def test_equality_is_claimed_by_its_own_test_only():
    rng = np.random.default_rng(1)
    noise = {(arm, seed): rng.normal(0, 0.004) for arm in ("gdn", "kda") for seed in range(1000, 1010)}
    rows = finals(lambda arm, task, seed: 0.9 + noise[arm, seed], arms=("gdn", "kda"))
    claim = {"pair": ["gdn", "kda"], "margin": 0.02}
    table = verdict_table(rows, [MQAR], [["gdn", "kda"]], [claim])
    assert only(table)["claim"] is None
    row = only(table, "equal")
    scores = final_scores(rows).sort("seed")
    x, y = (scores.filter(arm=arm)["accuracy"].to_numpy() for arm in ("gdn", "kda"))
    assert row["p"] == equivalence_test(x, y, 0.02) and row["claim"] == "equal" and row["needed"] == 5
    assert verdict_line(row, "mqar").startswith(
        "mqar, length 256: gdn and kda are EQUAL within 0.02. 10 paired"
    )
    strict = only(verdict_table(rows, [MQAR], [], [{**claim, "margin": 0.0005}]), "equal")
    assert strict["claim"] is None and strict["reason"].startswith("Holm p")
    assert "NO CLAIM that gdn and kda are equal within 0.0005: Holm p" in verdict_line(strict, "mqar")
    few = only(verdict_table(rows.filter(pl.col("seed") < 1003), [MQAR], [], [claim]), "equal")
    assert few["reason"] == "needs 5 paired seeds, has 3"


def test_unmatched_arms_are_named_in_the_line():
    rows = finals(step({"gdn": (0.5, 0.7), "gdn2": (0.9, 1.0)}))
    table = verdict_table(rows, [MQAR], [["gdn2", "gdn"]], unmatched={(*MQAR, "gdn")})
    assert "gdn2 is BETTER than gdn (NOT MATCHED: gdn). " in verdict_line(only(table), "mqar")


def test_train_rows_are_never_compared():
    rows = finals(step({"gdn": (0.5, 0.7), "gdn2": (0.9, 1.0)}))
    seen = pl.when(pl.col("eval_length") == 256).then(pl.lit("train")).otherwise(pl.col("split"))
    row = only(verdict_table(rows.with_columns(split=seen), [MQAR], [["gdn2", "gdn"]]))
    assert row["eval_length"] == 128, "a length whose sequences may all have been trained on is no test"


def test_no_rows_at_all():
    rows = tuned_rows(points=2, seeds=0)
    row = only(verdict_table(rows.filter(stage="final"), [MQAR], [["gdn2", "gdn"]]))
    assert row["eval_length"] is None and row["reason"] == "needs 10 paired seeds, has 0"
    assert verdict_line(row, "mqar") == "mqar: NO CLAIM on gdn2 and gdn: needs 10 paired seeds, has 0."


def test_the_rule_is_stated():
    rows = finals(step({"gdn": (0.5, 0.7), "gdn2": (0.9, 1.0)}))
    text = rule_text(
        verdict_table(rows, [MQAR], [["gdn2", "gdn"]] * 6, [{"pair": ["gdn", "gdn2"], "margin": 0.1}])
    )
    for words in (
        "Holm-corrected over the 6 declared comparisons, has p <= 0.05",
        "The family needs 8 paired seeds, an interval 10.",
        "With 10 seeds a difference is found four times in five only if it is about 1.4 standard deviations",
        "Holm-corrected over the 1 equality claims",
    ):
        assert words in text
    assert sign_flip_test([1.0] * 8) * 6 <= 0.05
