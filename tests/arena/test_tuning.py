"""arena tune from end to end, with workers that pretend: budgets, selection, what is stored and said."""

from __future__ import annotations

import subprocess
import sys

import polars as pl
import pytest
import tuning_fakes
from tuning_fakes import STUDIES, complete, drive, studies

from arena.grid import load_results
from arena.grid.fields import ExperimentError
from arena.tuning.exploit import batches
from arena.tuning.select import best
from arena.tuning.study import Outcome


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    said: list[str] = []
    own = {"swa": {"window": {"choices": [2, 4, 8]}}}
    report = drive(folder, say=said.append, tuning={"panel": ["gdn"], "own": own, "search_seeds": 2})
    return folder, report, said


def test_every_study_has_the_same_points_and_the_same_number_of_trials(tuned):
    folder, report, _ = tuned
    found = studies(folder)
    assert len(found) == STUDIES and not report.failed
    shared = [
        [{name: t.params[name] for name in ("lr", "weight_decay")} for t in study.trials] for study in found
    ]
    assert all(points == shared[0] for points in shared) and len(shared[0]) == 4
    assert all(trial.state.name == "COMPLETE" for study in found for trial in study.trials)
    assert all(study.user_attrs["space"] == found[0].user_attrs["space"] for study in found)
    windows = [
        [t.params["window"] for t in study.trials] for study in found if study.user_attrs["arm"] == "swa"
    ]
    assert len(windows) == 2 and windows[0] == windows[1] and len(set(windows[0])) > 1


def test_seeds_are_paired_and_those_of_the_winners_are_fresh(tuned):
    folder, _, _ = tuned
    rows = load_results(folder)
    seeds = {stage: set(rows.filter(stage=stage)["seed"]) for stage in rows["stage"].unique()}
    assert seeds["search"] == {0, 1} and seeds["final"] == {1000, 1001} and len(seeds["panel"]) == 3
    points = (
        rows.filter(stage="search")
        .group_by("arm", "task")
        .agg(pl.struct("trial", "lr", "seed").unique().sort())
    )
    assert points["trial"].n_unique() == 1 and points.height == STUDIES
    assert len(points["trial"][0]) == 4 * 2


def test_every_trial_is_a_row_and_only_winners_are_tested(tuned):
    folder, report, _ = tuned
    rows = load_results(folder)
    runs = dict(rows.unique("run_id")["stage"].value_counts().iter_rows())
    assert runs == {"search": STUDIES * 4 * 2, "final": STUDIES * 2, "panel": 2 * 9 * 3}
    assert report.stored == report.planned == sum(runs.values())
    assert (
        set(rows.filter(split="test")["stage"]) == {"final"} == set(rows.filter(pl.col("reported"))["stage"])
    )
    assert rows["space"].n_unique() == 1 and rows["space"].null_count() == 0
    lengths = rows.filter(split="valid").group_by("task").agg(pl.col("eval_length").unique().sort())
    assert dict(lengths.iter_rows()) == {"mqar": [16, 32], "parity": [30, 60]}, (
        "as the reported runs have them"
    )


def test_the_winner_has_the_best_score_and_is_what_is_trained_again(tuned):
    folder, _, _ = tuned
    winners = pl.read_parquet(folder / "tuning" / "winners.parquet")
    assert winners.height == STUDIES and set(winners["n_points"]) == {4}
    rows = load_results(folder)
    for study in studies(folder):
        chosen = winners.filter(arm=study.user_attrs["arm"], task=study.user_attrs["task"]).row(0, named=True)
        assert chosen["score"] == study.best_value and chosen["trial"] == study.best_trial.user_attrs["point"]
        final = rows.filter(stage="final", arm=chosen["arm"], task=chosen["task"])
        assert set(final["lr"]) == {chosen["lr"]} and set(final["trial"]) == {chosen["trial"]}
        searched = rows.filter(stage="search", arm=chosen["arm"], task=chosen["task"], trial=chosen["trial"])
        assert set(searched["model_params"]) == set(final["model_params"]), "with its own parameters"
        mean = searched.filter(metric="accuracy")["value"].mean()
        assert mean == pytest.approx(chosen["score"], abs=1e-12)


def test_plan_cost_and_seeds_are_said_before_the_start(tuned):
    _, _, said = tuned
    text = "\n".join(said)
    assert "48 runs of the search, 12 of the winners, 54 of panels" in text
    assert "no verdict on any pair" in text and "ledger: swa on parity" in text


def test_starting_again_changes_nothing(tuned):
    folder, report, _ = tuned
    before = (folder / "tuning" / "journal.log").read_bytes()
    again = drive(
        folder,
        work=tuning_fakes.fail_mlstm,
        tuning={"panel": ["gdn"], "own": {"swa": {"window": {"choices": [2, 4, 8]}}}, "search_seeds": 2},
    )
    assert again.stored == report.stored and again.winners.equals(report.winners)
    assert (folder / "tuning" / "journal.log").read_bytes() == before


def test_a_poisoned_test_split_changes_no_choice(tmp_path, monkeypatch):
    chosen = []
    for number, poison in enumerate(("0.0", "1.0")):
        monkeypatch.setenv("FAKE_TEST", poison)
        report = drive(tmp_path / str(number))
        chosen.append(report.winners)
        tests = load_results(tmp_path / str(number)).filter(split="test")
        assert set(tests["value"]) == {float(poison)}
    assert chosen[0].equals(chosen[1])


def test_the_real_trainer_never_draws_a_test_sample_in_the_search(tmp_path, monkeypatch):
    import synthetic_tasks
    from arena.grid.worker import train

    drawn: list[tuple[str, str]] = []

    def spied(fleet, progress):
        kind = type(synthetic_tasks.get("mqar", n_pairs=2, vocab_size=8))
        plain = kind.sample

        def sample(self, *args, **options):
            split = options.get("split", args[-1] if args else None)
            drawn.append((fleet.runs[0].stage, split))
            return plain(self, *args, **options)

        monkeypatch.setattr(kind, "sample", sample)
        try:
            return train(fleet, progress)
        finally:
            monkeypatch.setattr(kind, "sample", plain)

    from arena.grid.plan import Fleet, plan_settings
    from arena.tuning.tune import _untested

    setting = plan_settings(tuning_fakes.experiment(archs=["gdn"]))[0]
    point = {"lr": 1e-2, "weight_decay": 0.0}
    search = setting.run(seed=0, trial=0, point=point, stage="search", train=_untested(setting))
    final = setting.run(seed=1000, trial=0, point=point, stage="final")
    for run in (search, final):
        spied(Fleet(runs=(run,)), lambda step: None)
    assert {split for stage, split in drawn if stage == "search"} == {"valid"}
    assert {split for stage, split in drawn if stage == "final"} == {"valid", "test"}


def test_a_best_point_at_a_bound_extends_the_range_for_all(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_BEST", "4")  # the smaller the rate the better
    said: list[str] = []
    drive(tmp_path, say=said.append)
    found = studies(tmp_path)
    added = [
        [t.params["lr"] for t in study.trials if t.user_attrs["stage"] == "extension"] for study in found
    ]
    assert all(rates == added[0] and len(rates) == 2 and max(rates) <= 1e-3 for rates in added)
    assert {len(complete(study)) for study in found} == {6}
    assert any("outer tenth of lr, low end" in line for line in said)


@pytest.mark.parametrize("kind", ["tpe", "gp"])
def test_adaptive_trials_are_as_many_for_all_and_the_same_when_asked_again(tmp_path, kind):
    if kind == "gp":
        pytest.importorskip("scipy", reason="the Gaussian process sampler of Optuna needs scipy")
    points = []
    for number in range(2):
        drive(tmp_path / str(number), archs=["gdn", "swa"], tuning={"exploit": kind, "trials": 5})
        found = studies(tmp_path / str(number))
        assert {len(complete(study)) for study in found} == {9}
        points.append([[trial.params for trial in study.trials] for study in found])
    assert points[0] == points[1]
    assert batches(5) == [2, 2, 1] and batches(0) == [] and batches(16) == [4] * 4


def test_a_diverged_trial_is_a_row_with_the_worst_score(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_DIVERGES", "0.02")
    drive(tmp_path)
    rows = load_results(tmp_path).filter(stage="search")
    lost = rows.filter(status="diverged")
    assert lost["run_id"].n_unique() > 0 and set(lost.filter(metric="accuracy")["value"]) == {0.0}
    for study in studies(tmp_path):
        assert study.best_trial.user_attrs["status"] == "done"
        gone = [t for t in study.trials if t.user_attrs["status"] == "diverged"]
        assert gone and all(t.value == 0.0 and t.user_attrs["loss"] is None for t in gone)


def test_ties_go_to_the_smaller_loss_then_to_the_smaller_rate():
    def outcome(point, score, loss, lr):
        return Outcome(point=point, score=score, loss=loss, values={"lr": lr}, own={}, status="done")

    tied = [outcome(0, 0.9, 0.3, 0.01), outcome(1, 0.9, 0.2, 0.1), outcome(2, 0.9, 0.2, 0.03)]
    assert best(dict(enumerate(tied)), "maximize", 1.0).point == 2
    assert best(dict(enumerate([*tied, outcome(3, 0.95, 9.0, 1.0)])), "maximize", 1.0).point == 3
    assert best(dict(enumerate(tied)), "minimize", 1.0).point == 2
    worst = [outcome(0, float("nan"), 0.0, 0.1), outcome(1, 0.0, float("inf"), 0.2)]
    assert best(dict(enumerate(worst)), "maximize", 1.0).point == 1


def test_a_failed_run_stops_the_choice_and_is_tried_again(tmp_path):
    report = drive(tmp_path, work=tuning_fakes.fail_mlstm)
    assert len(report.failed) == 8 and report.winners is None
    assert set(load_results(tmp_path).filter(status="failed")["arm"]) == {"mlstm"}
    assert not load_results(tmp_path).filter(stage="final").height
    again = drive(tmp_path)
    assert not again.failed and again.stored == again.planned == STUDIES * (4 + 2)
    for study in studies(tmp_path):
        states = [trial.state.name for trial in study.trials]
        assert states.count("COMPLETE") == 4
        assert states.count("FAIL") == (4 if study.user_attrs["arm"] == "mlstm" else 0)


def test_what_the_space_does_not_vary_is_part_of_the_study(tmp_path, monkeypatch):
    """Or a winner would be chosen by the scores of runs that had another weight decay, or another clip."""
    only_rates = {"space": {"lr": [1e-3, 1e-1]}, "extension": 0}
    first = drive(tmp_path, tuning=only_rates, weight_decay=[0.1])
    for number, changes in enumerate(
        ({"weight_decay": [0.0]}, {"train": tuning_fakes.SMALL["train"] | {"clip": 0.5}}), start=1
    ):
        monkeypatch.setenv("FAKE_BEST", "3")  # other runs with other scores
        report = drive(tmp_path, tuning=only_rates, **changes)
        assert set(first.winners["lr"]) != set(report.winners["lr"])
        rows = load_results(tmp_path).filter(stage="search", metric="accuracy", split="valid")
        scores = rows.group_by("arm", "task", "trial").agg(pl.col("value").mean())
        for row in report.winners.iter_rows(named=True):
            mine = scores.filter(arm=row["arm"], task=row["task"])
            assert row["score"] == pytest.approx(mine["value"].max(), abs=1e-12)
        assert len(studies(tmp_path)) == STUDIES * (1 + number)


@pytest.mark.parametrize("kind", ["tpe", "gp"])
def test_an_adaptive_sampler_that_comes_back_to_a_bound_gives_new_points(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("FAKE_BEST", "0.5")  # the best rate is above the range
    space = {"space": {"lr": [1e-3, 1e-1]}, "extension": 0, "exploit": kind, "trials": 12}
    report = drive(tmp_path, archs=["gdn"], tuning=space)
    assert set(report.winners["n_points"]) == {4 + 12}
    for study in studies(tmp_path):
        assert len({trial.params["lr"] for trial in complete(study)}) == 4 + 12


def test_a_point_whose_seeds_are_in_two_fleets_is_tried_once(tmp_path):
    drive(tmp_path, fleet_size=3, tuning={"search_seeds": 2})
    for study in studies(tmp_path):
        assert len(complete(study)) == 4
        assert not [trial for trial in study.trials if "attempts" in trial.user_attrs]


def test_own_parameters_that_make_two_architectures_one_are_refused(tmp_path):
    """The same run would be a trial of both, and be told to one."""
    with pytest.raises(ExperimentError, match="makes 'bare' and 'gdn' the same model on task 'mqar'"):
        drive(
            tmp_path / "out",
            archs=["gdn", "bare"],
            arms={"bare": {"arch": "gdn", "conv": "none"}},
            tuning={"own": {"gdn": {"conv": {"choices": ["none", "static"]}}}},
        )
    assert not (tmp_path / "out").exists()
    with pytest.raises(ExperimentError, match="seeds of the panel"):
        drive(tmp_path / "out", tuning={"search_seeds": [0, 2001], "panel": ["gdn"]})
    assert not (tmp_path / "out").exists()


def test_a_run_is_never_two_things(tmp_path, monkeypatch):
    monkeypatch.setattr("arena.tuning.prepare._refuse_twins", lambda settings, point: None)
    with pytest.raises(ExperimentError, match="would be the same run as trial 0 of stage 'search' of 'bare'"):
        drive(
            tmp_path,
            archs=["gdn", "bare"],
            arms={"bare": {"arch": "gdn", "conv": "none"}},
            tuning={"own": {"gdn": {"conv": {"choices": ["none", "static"]}}}},
        )
    assert not any((tmp_path / "runs").iterdir())


def arena(*words):
    code = "from arena.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)


def test_the_command_refuses_what_is_wrong_and_starts_nothing(tmp_path):
    from arena.grid.toml import to_toml

    path = tmp_path / "small.toml"
    path.write_text(to_toml(tuning_fakes.SMALL))
    out = tmp_path / "out"
    for words, message in (
        (["--storage", "postgresql://arena@127.0.0.1:1/x"], "--storage: "),
        (["--trials", "1"], "points = 1"),
        (["--device", "tpu"], "cpu or cuda"),
        (["--arch", "gdnn"], "did you mean gdn"),
    ):
        done = arena("tune", str(path), "--out", str(out), *words)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not out.exists()


def test_the_command_tunes_and_says_how_to_report(tmp_path):
    out = tmp_path / "out"
    words = ["--arch", "gdn,lstm", "--task", "parity", "--trials", "2", "--seeds", "1", "--steps", "2"]
    done = arena("tune", *words, "--out", str(out), "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert "plan: 2 architectures x 1 tasks, 2 paired points each" in done.stdout
    assert f"arena report {out}" in done.stdout
    rows = load_results(out)
    assert set(rows["stage"]) >= {"search", "final"} and set(rows["seed"]) == {0, 1000}
    ledger = pl.read_parquet(out / "tuning" / "ledger.parquet")
    assert ledger.height == 2 and (ledger["ms_per_step"] > 0).all() and (ledger["flops_per_token"] > 0).all()
    again = arena("tune", *words, "--out", str(out), "--workers", "1")
    assert again.returncode == 0 and "to train" not in again.stdout
    assert arena("report", str(out)).returncode == 0
