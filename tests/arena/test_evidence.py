"""Evidence of tuning: tables with known answers, reports of whole, half and odd result folders."""

from __future__ import annotations

import io
import math
import sys

import numpy as np
import polars as pl
import pytest
from evidence_fakes import CHANCE, tuned_rows
from rich.console import Console

from arena.grid.results import CURVE_SCHEMA
from arena.report import evidence, render
from arena.report.evidence_tables import (
    best_of_n_table,
    importance_table,
    panel_table,
    spent_table,
    tuning_trials,
    window_table,
)
from arena.report.palette import look, looks
from arena.report.pruning import halving_table
from arena.report.tables import point_scores
from arena.statistics import expected_best, expected_best_band

CELL = {"task": "mqar", "task_params": "{}", "arm": "gdn"}


def test_best_of_n_is_of_the_paired_points_alone():
    points = point_scores(tuned_rows(points=8, extension=5))
    table = best_of_n_table(points)
    assert table.height == 2 * 2 * 8 and set(table["points"]) == {8}
    for (task, arm), part in table.group_by("task", "arm"):
        values = points.filter(task=task, arm=arm, stage="search")["score"].to_numpy()
        assert (
            part["n"].to_list() == list(range(1, 9)) and part["trusted"].to_list() == [True] * 4 + [False] * 4
        )
        for name, unbiased in (("unbiased", True), ("replaced", False)):
            assert part[name].to_list() == pytest.approx(
                list(expected_best(values, range(1, 9), unbiased=unbiased))
            )
            low, _ = expected_best_band(values, range(1, 9), unbiased=unbiased)
            assert part[f"{name}_low"].to_list() == pytest.approx(list(low))
    assert best_of_n_table(points.filter(stage="extension")).is_empty()


def panel(scores, seeds=(0,)):
    rates = np.geomspace(1e-4, 1e-2, len(scores))
    rows = [
        {**CELL, "lr": lr, "seed": seed, "score": score, "diverged": False}
        for lr, score in zip(rates, scores, strict=True)
        for seed in seeds
    ]
    return pl.DataFrame(rows)


def test_the_window_of_good_rates():
    (row,) = window_table(panel([0.0, 0.0, 1.0, 0.0, 0.0])).to_dicts()
    # half a decade between rates; the curve falls by 1 over each, so by 5 % within 0.025 decades
    assert row["best"] == 1.0 and row["best_lr"] == pytest.approx(1e-3) and row["rates"] == 5
    assert row["decades"] == pytest.approx(2 * 0.05 * 0.5)
    assert row["low_lr"] == pytest.approx(10**-3.025) and row["high_lr"] == pytest.approx(10**-2.975)
    assert row["window_mean"] == pytest.approx(0.975) and row["panel_mean"] == pytest.approx(0.2)
    assert not row["open_low"] and not row["open_high"]
    (row,) = window_table(panel([0.9, 0.9, 0.89, 0.5, 0.9])).to_dicts()
    assert row["open_low"] and not row["open_high"], "a second peak is not the same window"
    assert row["low_lr"] == pytest.approx(1e-4) and 1e-3 < row["high_lr"] < 10**-2.5
    (row,) = window_table(panel([0.3] * 5)).to_dicts()
    assert row["decades"] == pytest.approx(2.0) and row["open_low"] and row["open_high"]
    (row,) = window_table(panel([0.7])).to_dicts()
    assert row["decades"] == 0.0 and row["window_mean"] == 0.7
    (row,) = window_table(panel([0.0] * 5)).to_dicts()  # all diverged
    assert row["best"] == 0.0 and row["decades"] == pytest.approx(2.0)
    (row,) = window_table(panel([-0.2, -0.1, -0.2])).to_dicts()  # a loss
    assert row["best"] == -0.1 and row["decades"] == pytest.approx(2 * 0.05)


def test_the_panel_has_every_seed():
    table = panel_table(tuned_rows(panel=("gdn",)))
    assert table.height == 2 * 9 * 3 and set(table["arm"]) == {"gdn"} and set(table["seed"]) == {0, 1, 2}
    windows = window_table(table)
    assert set(windows["rates"]) == {9} and set(windows["seeds"]) == {3}
    assert panel_table(tuned_rows()).is_empty()


def test_the_budget_counts_pilots_and_failures():
    rows = tuned_rows(points=8, extension=4, seeds=2)
    old = rows.filter(stage="search", trial=0).with_columns(run_id="old-" + pl.col("run_id"))
    broken = (pl.col("run_id") == "mqar-gdn-search-7-0").alias("broken")
    rows = rows.with_columns(status=pl.when(broken).then(pl.lit("failed")).otherwise(pl.col("status")))
    table = spent_table(rows, pl.concat([rows, old]))
    mine = {row["stage"]: row for row in table.filter(**CELL).to_dicts()}
    assert list(mine) == ["search", "extension", "final", "pilot"]
    assert (mine["search"]["trials"], mine["search"]["runs"], mine["search"]["failed"]) == (7, 8, 1)
    assert mine["extension"]["trials"] == 4 and mine["final"]["runs"] == 2 and mine["pilot"]["runs"] == 1
    assert mine["search"]["tokens"] == 7 * 5000 and mine["pilot"]["wall_s"] == 1.5
    trials = tuning_trials(table)
    assert trials["mqar", "{}", "gdn"] == 11 and trials["mqar", "{}", "gdn2"] == 12


def curves(values, every=10):
    """Learning curves from {trial: accuracies at steps 10, 20, ...}."""
    rows = [
        {
            **dict.fromkeys(CURVE_SCHEMA), **CELL, "run_id": f"mqar-gdn-search-{trial}-0", "arch": "gdn",
            "trial": trial, "stage": "search", "seed": 0, "lr": 1e-3, "weight_decay": 0.1,
            "step": every * (place + 1), "split": "valid", "eval_length": length, "metric": metric,
            "value": score if metric == "accuracy" else 1 - score,
        }
        for trial, scores in values.items()
        for place, score in enumerate(scores)
        for length in (64, 128)
        for metric in ("accuracy", "loss")
    ]  # fmt: skip
    return pl.DataFrame(rows, schema=CURVE_SCHEMA)


def test_solvers_that_pruning_would_have_lost():
    seen = {
        0: [0.2, 0.3, 1.0, 1.0],
        1: [0.3, 0.4, 0.5, 0.5],
        2: [0.4, 1.0, 1.0, 1.0],
        3: [0.1, 0.1, 0.9, 0.99],
    }
    rows = tuned_rows(arms=("gdn",), tasks=("mqar",), points=4, seeds=0)
    ends = pl.col("trial").replace_strict({trial: scores[-1] for trial, scores in seen.items()})
    scaled = (ends - CHANCE) / (1 - CHANCE)
    metric = pl.col("metric")
    value = pl.when(metric == "accuracy").then(ends).when(metric == "chance_scaled_accuracy").then(scaled)
    value = value.otherwise(1 - ends)
    rows = rows.with_columns(value=value, status=pl.lit("done"), steps=pl.lit(40, dtype=pl.Int64))
    (row,) = halving_table(rows, curves(seen)).to_dicts()
    # at step 10 trials 1 and 2 go on, at step 20 trial 2; 0, 2 and 3 solve it in the end
    assert (row["trials"], row["kept"], row["solvers"], row["lost"]) == (4, 1, 3, 2)
    rates = dict(rows.select("trial", "lr").iter_rows())
    assert row["best_lost"] == (rates[0] < rates[2]), (
        "of the two perfect ones, that of the smaller rate is best"
    )
    late = curves({trial: scores[1:] for trial, scores in seen.items()}, every=20)
    assert halving_table(rows, late).is_empty(), "no curve reaches back to the first rung"
    silent = curves({1: [0.3, 0.4], 2: [0.4, 1.0]})  # 0 and 3 diverged before the first point
    assert halving_table(rows, silent).row(0, named=True)["kept"] == 1


def study(scores, distributions=None):
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    made = optuna.create_study(direction="maximize")
    rng = np.random.default_rng(0)
    lr, decay = (
        optuna.distributions.FloatDistribution(1e-4, 1e-1, log=True),
        optuna.distributions.FloatDistribution(0, 1),
    )
    for _ in range(scores[0]):
        params = {"lr": float(10 ** rng.uniform(-4, -1)), "weight_decay": float(rng.uniform())}
        made.add_trial(
            optuna.trial.create_trial(
                params=params, distributions={"lr": lr, "weight_decay": decay}, value=scores[1](params)
            )
        )
    return made


def test_importances():
    import optuna

    peak = study((64, lambda p: -abs(math.log10(p["lr"]) + 2.5)))
    flat = study((64, lambda p: 0.5))
    table = importance_table(
        {
            ("mqar", "{}", "gdn"): peak,
            ("mqar", "{}", "kda"): flat,
            ("s3", "{}", "gdn"): study((1, lambda p: 1.0)),
        }
    )
    assert set(table["arm"]) == {"gdn"} and set(table["task"]) == {"mqar"} and set(table["trials"]) == {64}
    shares = dict(table.select("parameter", "importance").iter_rows())
    assert shares == optuna.importance.get_param_importances(peak)
    assert sum(shares.values()) == pytest.approx(1) and shares["lr"] > 0.8
    assert importance_table({}).is_empty()


def test_the_study_of_the_points_is_read_from_the_journal(tmp_path):
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    points = point_scores(tuned_rows(points=8))
    assert evidence._studies(tmp_path, points) == {}
    (tmp_path / "tuning").mkdir()
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "tuning" / "journal.log")))
    decay = {"weight_decay": optuna.distributions.FloatDistribution(0, 1)}
    mine = points.filter(**CELL).sort("trial")
    for name, offset in (("earlier", 0.1), ("mine", 0.0), ("later", -0.2)):
        made = optuna.create_study(storage=storage, study_name=name, direction="maximize")
        for key, value in CELL.items():
            made.set_user_attr(key, value)
        for trial, score, wd in mine.select("trial", "score", "weight_decay").iter_rows():
            made.add_trial(
                optuna.trial.create_trial(
                    value=score + offset,
                    params={"weight_decay": wd},
                    distributions=decay,
                    user_attrs={"point": trial},
                )
            )
    optuna.create_study(storage=storage, study_name="of something else")
    (found,) = evidence._studies(tmp_path, points).items()
    assert found[0] == tuple(CELL.values()) and found[1].study_name == "mine"


def test_winners_of_an_earlier_request_are_not_shown(report, tmp_path):
    rows = tuned_rows(points=4)
    stale = (
        rows.filter(stage="final").unique(["task", "arm"]).select("task", "task_params", "arm", "trial", "lr")
    )
    (tmp_path / "tuning").mkdir()
    stale.with_columns(pl.col("lr") * 2, score=0.5, loss=1.0, options=pl.lit("{}"), n_points=4).write_parquet(
        tmp_path / "tuning" / "winners.parquet"
    )
    assert "Chosen points" not in report(rows)[0]


def test_arms_of_a_report_look_different():
    names = [f"arm{i}" for i in range(12)] + ["gdn", "gdn-neg", "xlstm[1:1]", "xlstm[7:1]", "gdn2+swa"]
    found = looks(names)
    assert len(set(found.values())) == len(names)
    assert found["gdn"] == look("gdn") and found["gdn-neg"].colour == look("gdn").colour
    assert found["xlstm[7:1]"].colour == found["xlstm[1:1]"].colour
    assert looks(reversed(names)) == found, "the order does not matter"


REQUEST = """
name = "tuned"
title = "A tuned comparison"
[[tasks]]
name = "rebind"
[[tasks]]
name = "mqar"
[tuning]
metric = "{metric}"
pairs = [["gdn2", "gdn"]]
[[tuning.equivalence]]
pair = ["gdn", "gdn2"]
margin = 0.05
"""


@pytest.fixture
def report(tmp_path, monkeypatch):
    """f(rows, pilots) -> (the report's Markdown, what it printed, the files) of a made-up result folder."""

    def make(rows, pilots=None, metric="accuracy", seen=None, ledger=None):
        everything = rows if pilots is None else pl.concat([rows, pilots])
        monkeypatch.setattr(render, "load_results", lambda directory: rows)
        monkeypatch.setattr(render, "load_environments", lambda directory, _: {})
        monkeypatch.setattr(evidence, "load_results", lambda directory, all_requests: everything)
        empty = pl.DataFrame(schema=CURVE_SCHEMA)
        monkeypatch.setattr(evidence, "load_curves", lambda directory: empty if seen is None else seen)
        (tmp_path / "experiment.toml").write_text(REQUEST.format(metric=metric))
        if ledger is not None:
            (tmp_path / "tuning").mkdir(exist_ok=True)
            ledger.write_parquet(tmp_path / "tuning" / "ledger.parquet")
        console = Console(file=io.StringIO())
        written = render.make_report(tmp_path, console)
        assert all(path.stat().st_size > 0 for path in written)
        return (
            (tmp_path / "report" / "report.md").read_text(),
            console.file.getvalue(),
            {p.name for p in written},
        )

    return make


def test_a_report_of_a_whole_tuning(report):
    rows = tuned_rows(points=16, extension=8, panel=("gdn", "gdn2"), best={"gdn2": 0.99, "gdn": 0.6})
    text, printed, written = report(
        rows, pilots=rows.filter(stage="search", trial=0).with_columns(run_id="p-" + pl.col("run_id"))
    )
    assert {
        "best_of_n.png",
        "response.png",
        "panel.png",
        "accuracy.png",
        "verdicts.csv",
        "window.parquet",
    } <= written
    order = [
        "## Verdicts", "## rebind", "## mqar", "## Budget spent", "## Was the budget enough",
        "## Score against learning rate", "## Sensitivity to the learning rate",
    ]  # fmt: skip
    assert [text.index(heading) for heading in order] == sorted(text.index(heading) for heading in order)
    for words in (
        "gdn2 is BETTER than gdn",
        "NO CLAIM that gdn and gdn2 are equal",
        "Equal budgets: on every task",
    ):
        assert words in text and words in printed, words
    accuracy = text[text.index("## rebind") : text.index("## Budget")]
    assert " 9/10" in accuracy or " 10/10" in accuracy, "the accuracies are of the ten retrained winners"


def test_the_accuracies_are_of_the_winners_only(report, tmp_path):
    report(tuned_rows(points=8))
    table = pl.read_csv(tmp_path / "report" / "accuracy.csv")
    assert set(table["runs"]) == {10} and set(table["trial"]) == {7} and set(table["split"]) == {"test"}
    runs = pl.read_csv(tmp_path / "report" / "runs.csv")
    assert runs.height == 2 * 2 * (8 + 10), "every trial is in the table of runs, diverged ones too"


def test_unequal_budgets_are_said_and_stop_claims(report):
    rows = tuned_rows(points=8, best={"gdn2": 0.99, "gdn": 0.6})
    text, _, _ = report(rows.filter(pl.col("run_id") != "mqar-gdn-search-0-0"))
    assert "UNEQUAL BUDGETS on mqar: trials with a result: gdn 7, gdn2 8." in text
    assert "mqar, length 256: NO CLAIM on gdn2 and gdn: unequal tuning: 8 and 7 trials" in text
    assert "rebind, length 256: gdn2 is BETTER than gdn" in text


def test_the_ledger_is_shown_and_flags(report):
    rows = tuned_rows(points=4)
    ledger = pl.DataFrame(
        [
            {
                **{"task": task, "task_params": "{}", "arm": arm, "params": 12345, "state_bytes": 2048},
                **{
                    "state_grows": arm == "gdn",
                    "flops_per_token": 1e6,
                    "ms_per_step": 2.25,
                    "match": "params",
                },
                **{"deviation": 0.034 if arm == "gdn" else 0.0, "matched": arm != "gdn"},
            }
            for task in ("mqar", "rebind")
            for arm in ("gdn", "gdn2")
        ]
    )
    text, _, written = report(rows, ledger=ledger)
    assert "| gdn | mqar | 12,345 | 2,048 (grows) | 1,000,000 | 2.25 | +3.4 % | NO |" in text
    assert "Matched by params; deviation" in text and "(NOT MATCHED: gdn)" in text and "ledger.csv" in written


@pytest.mark.parametrize("metric", ["accuracy", "loss", "valid/accuracy@64"])
def test_reports_of_little(report, metric):
    searching = tuned_rows(points=4, seeds=0)
    text, _, written = report(searching, metric=metric)  # nothing is retrained yet
    assert "needs 10 paired seeds, has 0" in text and "accuracy.png" not in written
    one, _, _ = report(tuned_rows(arms=("gdn",), tasks=("mqar",), points=1, seeds=1), metric=metric)
    assert "NO CLAIM on gdn2 and gdn" in one
    lost = tuned_rows(points=3, seeds=1).with_columns(status=pl.lit("diverged"))
    value = pl.when(pl.col("metric") == "loss").then(math.inf).otherwise(0.0)
    all_lost, _, _ = report(lost.with_columns(value=value), metric=metric)
    assert "Budget spent" in all_lost
    failed = searching.with_columns(status=pl.lit("failed"), value=pl.lit(None, dtype=pl.Float64))
    nothing, _, _ = report(failed, metric=metric)
    assert "needs 10 paired seeds, has 0" in nothing


def test_without_declared_pairs_nothing_is_compared(report, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "REQUEST", 'name = "x"\n[tuning]\nmetric = "{metric}"\n')
    text, _, written = report(tuned_rows(points=4))
    assert "No comparison was declared, so none is made" in text and "verdicts.csv" not in written


def test_what_has_not_been_learned_is_said(report, tmp_path):
    rows = tuned_rows(points=4, best={"gdn": CHANCE}, spread=0.01, panel=("gdn", "gdn2"))
    winners = (
        rows.filter(stage="final").unique(["task", "arm"]).select("task", "task_params", "arm", "trial", "lr")
    )
    (tmp_path / "tuning").mkdir()
    winners.with_columns(score=0.5, loss=1.0, options=pl.lit('{"n":2}'), n_points=4).write_parquet(
        tmp_path / "tuning" / "winners.parquet"
    )
    text, _, _ = report(rows)
    assert "NOT LEARNED, no point above chance on valid: gdn on rebind, gdn on mqar." in text
    assert text.count("| not learned | - |") == 2, "a flat line at chance is no wide window"
    assert '| {"n":2} | 0.500 | 4 |' in text


def test_winners_at_the_end_of_the_rates_are_named(report, tmp_path):
    rows = tuned_rows(tasks=("mqar",), points=5)
    tried = rows.filter(stage="search").unique(["arm", "trial"]).sort("lr")
    chosen = [tried.filter(arm="gdn").tail(1), tried.filter(arm="gdn2").slice(2, 1)]
    winners = pl.concat(chosen).select("task", "task_params", "arm", "trial", "lr")
    (tmp_path / "tuning").mkdir()
    winners.with_columns(score=0.5, loss=1.0, options=pl.lit("{}"), n_points=5).write_parquet(
        tmp_path / "tuning" / "winners.parquet"
    )
    text, _, _ = report(rows)
    assert "tried, so that a better one may lie beyond: gdn on mqar (highest)." in text
