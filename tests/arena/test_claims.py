"""The claims ledger: files, verdicts on made-up runs, records, the page, the command."""

from __future__ import annotations

import json
import tomllib
import warnings
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from arena.claims import claim_names, judge, load_record, make_record, score_table
from arena.claims import record as records
from arena.claims.file import parse_claim
from arena.claims.judge import MOST_SEEDS
from arena.claims.scores import SCORE_SCHEMA
from arena.grid.fields import ExperimentError

ROOT = Path(__file__).parents[2]

CLAIM = """
name = "small"
archs = ["gdn", "gdn-neg", "lstm"]
lr = 1e-2
weight_decay = 0.0
[model]
d_model = 8
n_layers = 1
n_heads = 1
[train]
steps = 2
batch_size = 4
eval_every = 0
eval_examples = 8
[[tasks]]
name = "parity"
train_lengths = [3, 8]
eval_lengths = [24, 32]
[tuning]
points = 2
space = { lr = [1e-3, 1e-1] }
extension = 0
report_seeds = 10
panel = ["gdn", "gdn-neg"]
panel_seeds = 10
[claim]
number = 99
sentence = "Small things are small."
source = "nowhere"
trust = "none"
settings = "tiny."
[claim.full]
train = { steps = 3 }
tuning = { points = 3 }
"""

SOLVES = '[[claim.rules]]\nkind = "solves"\narms = ["gdn-neg"]\n'
FAILS = '[[claim.rules]]\nkind = "fails"\narms = ["gdn"]\nat_most = 0.5\n'
ABOVE = '[[claim.rules]]\nkind = "above"\npairs = [["gdn-neg", "gdn"]]\n'
EQUAL = '[[claim.rules]]\nkind = "equal"\npairs = [["gdn-neg", "gdn"]]\nmargin = 0.1\n'
NARROWER = '[[claim.rules]]\nkind = "narrower"\npairs = [["gdn", "gdn-neg"]]\nleast = 0.2\n'
CONTROL = '[[claim.rules]]\nkind = "solves"\ncontrol = true\narms = ["lstm"]\n'


def claim(*rules, change=lambda data: None):
    data = tomllib.loads(CLAIM + "".join(rules))
    change(data)
    return parse_claim("small", data)


def runs(arm, scores, *, length=32, stage="final", lr=0.01):
    return [
        {
            **dict.fromkeys(SCORE_SCHEMA),
            "stage": stage,
            "task": "parity",
            "task_params": '{"supervision":"final"}',
            "arm": arm,
            "seed": 1000 + seed,
            "eval_length": length if stage == "final" else None,
            "status": "done",
            "score": float(score),
            "lr": lr,
        }
        for seed, score in enumerate(scores)
    ]


def verdicts(found, *rows):
    table = pl.DataFrame([row for part in rows for row in part], schema=SCORE_SCHEMA)
    return judge(found, "cpu", table)


def only(judged):
    (finding,) = judged.findings
    return finding


HIGH, LOW = [1.0] * 10, [0.0] * 10


def found_with(n, rate, alpha):
    """How often n runs show that most do."""
    from scipy.stats import binom, binomtest

    counts = [k for k in range(n // 2 + 1, n + 1) if binomtest(k, n).pvalue <= alpha]
    return sum(binom.pmf(k, n, rate) for k in counts)


def test_most_runs_solve_or_fail():
    found = claim(SOLVES)
    assert only(verdicts(found, runs("gdn-neg", HIGH))).verdict == "confirmed"
    assert only(verdicts(found, runs("gdn-neg", LOW))).verdict == "not confirmed"
    assert "10/10 runs >= 0.95 [0.69, 1.00]" in only(verdicts(found, runs("gdn-neg", HIGH))).ours
    mixed = only(verdicts(found, runs("gdn-neg", [1.0] * 7 + [0.0] * 3)))
    assert mixed.verdict == "undecided"
    # where seven of ten do in truth: the first n at which an exact two-sided test finds it four times in five
    needed = int(mixed.reason.split()[1])
    assert found_with(needed, 0.7, 0.05) >= 0.8
    assert all(found_with(n, 0.7, 0.05) < 0.8 for n in range(11, needed))
    few = only(verdicts(claim(FAILS), runs("gdn", [0.0] * 3 + [1.0] * 7)))
    assert few.reason == mixed.reason
    even = only(verdicts(found, runs("gdn-neg", [1.0] * 5 + [0.0] * 5)))
    assert even.reason == f"needs more than {MOST_SEEDS} seeds"
    assert only(verdicts(claim(FAILS), runs("gdn", LOW))).verdict == "confirmed"
    assert only(verdicts(claim(FAILS), runs("gdn", HIGH))).verdict == "not confirmed"


def test_a_verdict_never_rests_on_a_sign():
    """Noise of mean zero, of either sign, and a difference that is there."""
    rng = np.random.default_rng(0)
    found = claim(ABOVE)
    for _ in range(20):
        noise = 0.5 + 0.2 * rng.standard_normal(10)
        other = 0.5 + 0.2 * rng.standard_normal(10)
        finding = only(verdicts(found, runs("gdn-neg", noise), runs("gdn", other)))
        if abs(noise.mean() - other.mean()) < 0.1:
            assert finding.verdict == "undecided" and "needs" in finding.reason
    clear = only(verdicts(found, runs("gdn-neg", np.linspace(0.8, 0.9, 10)), runs("gdn", [0.3] * 10)))
    assert clear.verdict == "confirmed"
    against = only(verdicts(found, runs("gdn-neg", [0.3] * 10), runs("gdn", np.linspace(0.8, 0.9, 10))))
    assert against.verdict == "not confirmed"
    none = only(verdicts(found, runs("gdn-neg", np.linspace(0.5, 0.51, 10)), runs("gdn", [0.5] * 10)))
    assert none.verdict == "not confirmed"  # there, but below what counts


def test_a_difference_that_counts_as_none_is_not_confirmed():
    """Significantly above 0, and smaller than the least that counts, though not significantly so."""
    small = np.linspace(0.5, 0.58, 10)
    finding = only(verdicts(claim(ABOVE), runs("gdn-neg", small), runs("gdn", [0.5] * 10)))
    assert 0 < small.mean() - 0.5 < 0.05
    assert finding.verdict == "undecided"
    assert finding.reason.endswith("(a mean difference below 0.05 counts as none)")
    large = only(verdicts(claim(ABOVE), runs("gdn-neg", small + 0.02), runs("gdn", [0.5] * 10)))
    assert large.verdict == "confirmed"


def test_a_setting_that_cannot_tell_is_undecided():
    found = claim(ABOVE)
    floor = only(verdicts(found, runs("gdn-neg", LOW), runs("gdn", LOW)))
    assert floor.text == "undecided: neither is above chance at this size"
    ceiling = only(verdicts(found, runs("gdn-neg", HIGH), runs("gdn", HIGH)))
    assert ceiling.text == "undecided: both solve it in every run at this size"
    short = only(verdicts(found, runs("gdn-neg", HIGH[:7]), runs("gdn", LOW)))
    assert short.text == "undecided: 7 of 10 seeds have a result"
    assert only(verdicts(found)).text == "undecided: no result"


def test_equal_within_the_margin():
    found = claim(EQUAL)
    near = only(verdicts(found, runs("gdn-neg", np.linspace(0.7, 0.72, 10)), runs("gdn", [0.7] * 10)))
    far = only(verdicts(found, runs("gdn-neg", np.linspace(0.9, 0.95, 10)), runs("gdn", [0.5] * 10)))
    wide = only(verdicts(found, runs("gdn-neg", [0.2, 1.0] * 5), runs("gdn", [1.0, 0.3] * 5)))
    assert [finding.verdict for finding in (near, far, wide)] == [
        "confirmed",
        "not confirmed",
        "undecided",
    ]


def panel(arm, width):
    rates = np.logspace(-3, -1, 9)
    inside = np.abs(np.log10(rates) + 2) <= width / 2 + 1e-9
    return [
        row
        for rate, good in zip(rates, inside, strict=True)
        for row in runs(arm, [0.9 + 0.001 * s if good else 0.1 for s in range(10)], stage="panel", lr=rate)
    ]


def test_windows_of_learning_rates():
    found = claim(NARROWER)
    assert only(verdicts(found, panel("gdn", 0.5), panel("gdn-neg", 1.5))).verdict == "confirmed"
    assert only(verdicts(found, panel("gdn", 1.5), panel("gdn-neg", 0.5))).verdict == "not confirmed"
    # a panel that begins at the best rate: what it cuts off is unknown
    for first, second in ((0.5, 1.5), (1.5, 0.5)):
        rows = panel("gdn", first) + panel("gdn-neg", second)
        cut = only(verdicts(found, [row for row in rows if row["lr"] > 0.0099]))
        assert cut.verdict == "undecided" and "reaches the end of the panel" in cut.ours
    one = [row for row in panel("gdn", 0.5) if row["lr"] > 0.0099]
    assert "beyond the panel, where gdn may" in only(verdicts(found, one, panel("gdn-neg", 1.5))).reason
    assert only(verdicts(found, panel("gdn", 0.5), panel("gdn-neg", 2.0))).verdict == "confirmed"
    idle = panel("gdn", 0.5)
    for row in idle:
        row["score"] = 0.0
    finding = only(verdicts(found, idle, panel("gdn-neg", 1.5)))
    assert finding.text == "undecided: gdn learned nothing at this size"


def test_the_claim_needs_all_its_lines():
    rows = [runs("gdn-neg", HIGH), runs("gdn", LOW), runs("lstm", HIGH)]
    assert verdicts(claim(SOLVES, FAILS), *rows).verdict == "confirmed"
    wrong = verdicts(claim(SOLVES, FAILS), runs("gdn-neg", LOW), runs("gdn", LOW))
    assert wrong.verdict == "not confirmed: 1 of 2 lines are not"
    open_ = verdicts(claim(SOLVES, FAILS), runs("gdn-neg", [0.0, 1.0] * 5), runs("gdn", LOW))
    assert open_.verdict == "undecided: 1 of 2 lines are"
    ours = verdicts(claim(SOLVES, FAILS + "ours = true\n"), runs("gdn-neg", HIGH), runs("gdn", HIGH))
    assert ours.verdict == "confirmed" and ours.findings[1].verdict == "not confirmed"


def test_holm_over_the_lines():
    """9 of 10 has p 0.021: enough alone, not beside another such line and eight undecided ones."""
    nine = [1.0] * 9 + [0.0]
    assert only(verdicts(claim(SOLVES), runs("gdn-neg", nine))).verdict == "confirmed"
    again = SOLVES.replace('"gdn-neg"', '"gdn-neg", "gdn", "lstm"')
    judged = verdicts(claim(again), *(runs(arm, nine) for arm in ("gdn-neg", "gdn", "lstm")))
    assert [finding.verdict for finding in judged.findings] == ["undecided"] * 3


def test_without_its_control_nothing_is_decided():
    rows = [runs("gdn-neg", HIGH), runs("gdn", LOW)]
    judged = verdicts(claim(CONTROL, FAILS), *rows, runs("lstm", HIGH))
    assert judged.verdict == "confirmed"
    judged = verdicts(claim(CONTROL, FAILS), *rows, runs("lstm", LOW))
    assert judged.findings[1].text == "undecided: the control lstm does not solve the task at this size"


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (SOLVES.replace("gdn-neg", "gdn-negg"), "a rule names 'gdn-negg'; did you mean 'gdn-neg'?"),
        (SOLVES + "length = 99\n", "a rule is about length 99, which is not reported"),
        (SOLVES + 'task = "s3"\n', "a rule is about s3, of which there are 0"),
        (NARROWER.replace('"gdn", ', '"lstm", '), "compares windows of arms that panel does not have"),
        (SOLVES + 'published = { gdn = "1" }\n', "published has 'gdn'; did you mean 'gdn-neg'?"),
        (SOLVES + "at_leest = 1\n", "[claim] rules.0.solves.at_leest: Extra inputs are not permitted"),
        (SOLVES.replace("solves", "wins"), "[claim] rules.0: "),
        ("", "[claim] rules: "),
    ],
)
def test_wrong_files_are_refused_in_one_line(rules, message):
    with pytest.raises(ExperimentError) as caught:
        claim(rules)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_claim_with_too_few_seeds_is_refused():
    def fewer(data):
        data["tuning"]["report_seeds"] = 5

    with pytest.raises(ExperimentError, match="1 lines are a family that needs 10 seeds; 5 are declared"):
        claim(SOLVES, change=fewer)


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    """A tiny claim, through the real tuner."""
    from arena.tuning import tune

    found = claim(SOLVES, FAILS, ABOVE, NARROWER)
    directory = tmp_path_factory.mktemp("claim") / "small-cpu"
    report = tune(found.experiments["cpu"], directory, workers=1)
    assert not report.failed
    return found, directory


def test_from_runs_to_a_record_and_back(reproduced, tmp_path):
    from arena.grid import load_results

    found, directory = reproduced
    table = score_table(load_results(directory))
    finals = table.filter(stage="final")
    assert finals.height == 3 * 10 * 2 and finals["score"].null_count() == 0
    assert table.filter(stage="panel").height == 2 * 9 * 10
    record = make_record(found, "cpu", directory, "arena reproduce small")
    files = records.keep(record, "small", "cpu", tmp_path)
    assert sum(path.stat().st_size for path in files) < 50_000
    again = load_record("small", "cpu", tmp_path)
    assert again.table.equals(table)
    assert again.origin["seal"] == found.seal("cpu") and again.origin["runs"] == 3 * 12 + 180
    first, second = (judge(found, "cpu", part) for part in (table, again.table))
    assert [f.text for f in first.findings] == [f.text for f in second.findings]
    assert load_record("small", "full", tmp_path) is None
    made_report(directory)
    told_in_the_page(found, directory)
    text = json.dumps(again.origin)
    assert str(tmp_path) not in text and str(directory) not in text


def told_in_the_page(found, directory):
    """The report of a claim's folder begins with the verdict, as long as it is this claim that was run."""
    from arena.claims import report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "claim_names", lambda: ["small"])
        patch.setattr(report, "load_claim", lambda name: found)
        (section,) = report.claim_sections(directory)
        assert section.heading.startswith(f"Claim {found.section.number} at size cpu: ")
        assert len(section.rows) == len(found.lines) and section.commands == ["arena reproduce small"]
        assert "chance-scaled" in section.caption and "needs n seeds" in section.caption
        other = claim(SOLVES, FAILS, ABOVE, NARROWER, change=lambda data: data.update(title="another"))
        patch.setattr(report, "load_claim", lambda name: other)
        assert report.claim_sections(directory) == []


def made_report(directory):
    """A reproduced claim is a tuned result folder like any other."""
    from arena.grid import load_curves, load_results
    from arena.report import make_report

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a run whose files are left out
        written = {path.name for path in make_report(directory)}
    assert set(load_curves(directory)["run_id"]) == set(load_results(directory)["run_id"])
    assert {"report.md", "panel.parquet", "ledger.parquet"} <= written


def test_a_record_of_other_settings_is_refused(reproduced):
    found, directory = reproduced

    def longer(data):
        data["train"]["steps"] = 4

    with pytest.raises(ExperimentError, match=r"was made with other settings than claims/small\.toml has"):
        make_record(claim(SOLVES, change=longer), "cpu", directory, "")
    with pytest.raises(ExperimentError, match="was made with other settings"):
        make_record(found, "full", directory, "")


def test_the_command_lists_and_refuses(capsys, monkeypatch, tmp_path):
    from arena.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            main(list(arguments))
        output = capsys.readouterr()
        return end.value.code, output.out, output.err

    status, out, _ = run("reproduce", "--list")
    assert status == 0 and all(name in out for name in claim_names())
    for words, message in [
        (["reproduce", "parrity"], "no claim 'parrity'; did you mean 'parity'?"),
        (["reproduce", "77"], "no claim has the number 77"),
        (["reproduce"], "give one claim, or --all"),
        (["reproduce", "parity", "--all"], "give one claim, or --all"),
        (["reproduce", "parity", "--size", "huge"], "--size is cpu or full, not 'huge'"),
    ]:
        status, _, err = run(*words)
        assert status == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "results").exists()
