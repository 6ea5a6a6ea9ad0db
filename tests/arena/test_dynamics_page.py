"""`arena dynamics` on a small grid that is really trained: tables, figures, page, refusals."""

import shutil
import warnings

import polars as pl
import pytest
from page_checks import Page, check_alone

from arena.dynamics import findings
from arena.dynamics.effects import EFFECT_COLUMNS
from arena.dynamics.page import dynamics_sections, make_page
from arena.dynamics.probe import PROBE_COLUMNS
from arena.dynamics.quantities import QUANTITIES
from arena.dynamics.sentences import identified_sentences
from arena.dynamics.study import Choice, study
from arena.grid import run_experiment
from arena.grid.experiment import ExperimentError, parse_experiment
from arena.report import make_report
from arena.report.document import Document, Section
from arena.report.page import to_html

TINY = {
    "name": "tiny",
    "title": "Tiny <memories> & more",
    "archs": ["attention", "gdn-neg", "slstm"],
    "seeds": 2,
    "model": {"d_model": 8, "n_layers": 1, "n_heads": 2},
    "train": {"steps": 2, "batch_size": 4, "eval_examples": 8},
    "tasks": [
        {"name": "rebind", "params": {"n_keys": 2, "n_key_tokens": 4, "n_value_tokens": 4},
         "train_lengths": [24, 24], "eval_lengths": [32]},
        {"name": "parity", "train_lengths": [3, 12], "eval_lengths": [24]},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dynamics") / "results"
    report = run_experiment(parse_experiment(TINY, label="tiny"), folder, workers=1)
    assert not report.failed
    return folder


@pytest.fixture(scope="module")
def measured(results):
    out = results.parent / "out"
    lines = []
    tables = study(results, out, Choice(), n_sequences=16, on_line=lines.append)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return out, tables, lines, make_page(tables, results, out)


def test_the_page_stands_alone_and_has_every_section(measured):
    out, _, _, written = measured
    assert written[0] == out / "page.html" and all(path.exists() for path in written)
    text = written[0].read_text()
    page = check_alone(text)
    assert "<svg" in text and "http" not in text
    words = " ".join(page.words)
    assert "Memory dynamics: Tiny <memories> & more" in words and "Tiny &lt;memories&gt; &amp; more" in text
    for heading in (
        "rebind: side by side, length 32", "parity: side by side, length 24", "Do the heads that flip",
        "Which gate matters where", "Eigenvalues", "Gates", "Retention", "State beyond the training length",
        "Edit quality", "Decodability", "What cannot be said", "Data",
    ):  # fmt: skip
        assert heading in words
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    assert words.index("rebind: side") < words.index("parity: side")  # the order of the experiment file


def test_a_report_takes_the_dynamics_in(measured, results):
    out, tables, _, _ = measured
    assert dynamics_sections(results) == []
    try:
        shutil.copytree(out, results / "dynamics")
        first, *parts = dynamics_sections(results)
        assert first.heading == "Memory dynamics" and first.link[1] == "../dynamics/page.html"
        assert all(section.part for section in parts)
        headings = [section.heading for section in parts]
        assert "rebind: side by side, length 32" in headings and "What cannot be said" in headings
        assert sum(len(section.figures) for section in parts) >= 6
        make_report(results, after=[first, *parts])
        check_alone((results / "report" / "page.html").read_text())
        tables.runs.write_parquet(results / "dynamics" / "effects.parquet")
        (only,) = dynamics_sections(results)
        assert "is of another version: arena dynamics makes it anew" in only.lines[0]
    finally:
        shutil.rmtree(results / "dynamics", ignore_errors=True)


def test_markdown_says_the_same(measured):
    out, _, _, written = measured
    markdown = (out / "page.md").read_text()
    assert "## Which gate matters where" in markdown and "| runs | 2 | 2 | 2 |" in markdown
    for path in written[2:]:
        assert f"]({path.name})" in markdown


def test_tables_are_tidy_and_described(measured):
    out, tables, lines, _ = measured
    assert len(tables.runs) == len(lines) == 2 * 3 * 2 * 2  # tasks, architectures, seeds, lengths
    assert set(tables.effects["arm"]) == {"attention", "gdn-neg", "slstm"}
    assert set(tables.decodability["arm"]) == {"attention", "gdn-neg", "slstm"}
    dictionary = (out / "dictionary.md").read_text()
    names = {*tables.runs.columns, *tables.effects.columns, *tables.eigenvalues.columns}
    for name in names | {*tables.decodability.columns, *QUANTITIES}:
        assert f"`{name}`" in dictionary
    assert set(EFFECT_COLUMNS) < set(tables.effects.columns)
    assert set(PROBE_COLUMNS) < set(tables.decodability.columns)
    stored = pl.read_parquet(out / "effects.parquet")
    assert stored.equals(tables.effects) and (out / "effects.csv").exists()
    quantities = set(tables.measurements.select("quantity").unique().collect()["quantity"])
    assert {"erase", "half_life", "old_value_left", "eigenvalue_min", "memory_length"} <= quantities
    slstm = tables.measurements.filter(pl.col("arm") == "slstm", pl.col("quantity") == "erase").collect()
    assert len(slstm) and slstm["value"].null_count() == len(slstm)


def test_sentences_are_made_of_the_tables_numbers(measured):
    out, tables, _, _ = measured
    parity = {"task": "parity", "arm": "gdn-neg", "change": "write frozen at its mean", "role": "all"}
    effects = tables.effects.filter(length=24, **parity)["effect"].to_list()
    assert f"write {findings.span(effects)}" in (out / "page.md").read_text()


def test_numbers():
    assert [findings.number(x) for x in (0.9712, -0.004, 0.006, 12.34, 210.2, 3e6, -0.0)] == [
        "0.97", "0.00", "0.006", "12", "210", "3.0e+06", "0.00",
    ]  # fmt: skip
    assert findings.span([0.5, 0.7]) == "0.60 (0.50 to 0.70)" and findings.span([0.5, 0.5]) == "0.50"
    assert findings.span([]) == "-"


def test_a_choice_narrows_the_study(results, tmp_path):
    choice = Choice(
        arms=["gdn-neg"], tasks=["rebind"], lengths=[24], interventions=["erase:zero@class=query"]
    )
    tables = study(results, tmp_path, choice, n_sequences=16)
    assert tables.runs.select("task", "arm", "length").unique().rows() == [("rebind", "gdn-neg", 24)]
    assert tables.effects.select("change", "tokens", "role").unique().rows() == [
        ("erase = 0", "query", "chosen")
    ]
    none = study(
        results, tmp_path, Choice(arms=["slstm"], lengths=[24], interventions=["none"]), n_sequences=16
    )
    assert none.effects.is_empty() and len(list((tmp_path / "measurements").glob("*"))) == 4
    assert make_page(none, results, tmp_path)[0].exists()


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice(arms=["gdn-nag"]), "gdn-nag.*did you mean gdn-neg"),
        (Choice(tasks=["parities"]), "parities.*did you mean parity"),
        (Choice(lengths=[25]), "rebind: length 25 is not legal"),
        (Choice(interventions=["erase:zero"]), "attention on .*: erase = 0: layer 0 .* has no erase gate"),
        (
            Choice(arms=["gdn-neg"], interventions=["erase:zero@class=querry"]),
            "no class of tokens 'querry'.*query",
        ),
        (Choice(interventions=["standard", "none"]), "standard, none, or a list"),
        (Choice(interventions=["erase:drop"]), "cannot 'drop' a gate"),
    ],
)
def test_wrong_choices_are_refused_before_anything_is_written(results, tmp_path, choice, message):
    with pytest.raises(ExperimentError, match=message):
        study(results, tmp_path / "new", choice)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "is not a result folder"),
        (["RESULTS", "--arch", "gdn-nag"], "did you mean gdn-neg"),
        (["RESULTS", "--length", "24,x"], "--length is numbers with commas between"),
        (["RESULTS", "--out", ""], "--out is a folder"),
        (["RESULTS", "--length", "0"], "--length is numbers with commas between"),
        (["RESULTS", "--intervene", "erase"], "cannot read the intervention 'erase'"),
        (["RESULTS", "--intervene", "eraze:zero"], "there is no gate 'eraze'"),
    ],
)
def test_the_command_refuses_with_one_line(results, capsys, arguments, message):
    from arena.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(["dynamics", *(str(results) if word == "RESULTS" else word for word in arguments)])
    assert stopped.value.code == 2
    told = capsys.readouterr()
    assert message in told.err and told.err.count("\n") == 1 and not told.out


def test_the_command(results, capsys):
    from arena.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(["dynamics", str(results), "--arm", "gdn-neg", "--task", "parity", "--length", "24"])
    assert stopped.value.code == 0
    told = capsys.readouterr().out
    assert "1/2 parity, gdn-neg, seed 0, length 24" in told
    assert str(results / "dynamics" / "page.html") in told


def test_html_of_any_document():
    section = Section(heading="A", lines=[f"<{i}>" for i in range(12)], columns=["x"], rows=[["a|b"]])
    page = Page(to_html(Document(title="T", claim="", notes=["n"], sections=[section])))
    assert "<11>" in page.words and "4 more" in page.words


def test_the_share_of_the_previous_write_stands_side_by_side(measured):
    _, tables, _, _ = measured
    (task,) = [task for task in findings.by_task(tables, {key: key[0] for key in keys(tables)})
               if task.label == "rebind"]  # fmt: skip
    columns, rows = findings.side_by_side(task)
    (row,) = [row for row in rows if row[0].startswith("share of the write before the last")]
    shares = tables.measurements.filter(
        pl.col("quantity") == "previous_write_share", length=32, arm="gdn-neg", task="rebind"
    ).collect()
    assert len(shares) and shares["value"].is_between(0, 1).all()
    heads = shares.group_by("run_id", "head").agg(pl.col("value").mean()).group_by("run_id").median()
    assert row[columns.index("gdn-neg")] == findings.span(heads["value"].to_list())
    assert row[columns.index("attention")] != "-"


def keys(tables):
    return tables.runs.select("task", "task_params").unique().sort("task").iter_rows()


def test_where_nothing_is_left_to_compare_with_the_page_says_why():
    row = {name: None for name in EFFECT_COLUMNS} | {
        "task": "parity", "arm": "gdn-neg", "run_id": "r", "seed": 0, "role": "identified", "gate": "erase",
        "change": "erase clamped to [0, 1]", "heads": "0.0", "n_heads": 1, "tokens": "all", "accuracy": 0.5,
        "baseline": 1.0, "chance": 0.5, "effect": -0.5, "n_sequences": 64,
    }  # fmt: skip
    control = row | {"role": "control", "heads": "0.1", "accuracy": 0.6, "effect": -0.4, "changed": 0.0}
    contrast = row | {"role": "contrast", "effect": -0.1}
    said = []
    for rows in ([row], [row, control, contrast]):
        effects = pl.DataFrame(rows, infer_schema_length=None).with_columns(
            pl.col("accuracy_low", "accuracy_high", "low", "high").cast(pl.Float64)
        )
        task = findings.Task(
            "parity", ["gdn-neg"], 24, 12, *[pl.DataFrame()] * 3, effects, *[pl.DataFrame()] * 2
        )
        said.append(list(identified_sentences([task]))[-1])
    assert said[0].endswith("No other head has such a gate (erase), so that there is no control.")
    assert (
        "In 1 other head (0.00 of the gate's values are altered) it is 0.60" in said[1]
    )  # a control that falls does not "stay"


def test_the_median_of_a_gate_is_over_the_heads_that_have_it():
    """A layer (or micro-step) without erase is traced with erase 0, which is no measurement of the gate."""
    rows = [
        {"arm": "a", "run_id": "r", "seed": 0, "layer": layer, "head": 0, "micro": micro}
        | {"quantity": "erase", "statistic": statistic, "value": value}
        for layer, micro, middle, spread in (
            (0, -1, 0.0, 0.0),
            (1, -1, 0.0, 0.0),
            (2, 0, 0.8, 0.1),
            (2, 1, 0, 0),
        )
        for statistic, value in (("q50", middle), ("std", spread))
    ]
    empty = pl.DataFrame(schema={"arm": pl.String})
    runs = pl.DataFrame({"arm": ["a"], "run_id": ["r"], "accuracy": [1.0]})
    lowest = pl.DataFrame(
        schema=dict.fromkeys(("arm", "run_id", "tokens"), pl.String) | {"least_eigenvalue": float}
    )
    effects = pl.DataFrame(schema=dict.fromkeys(("arm", "role", "change"), pl.String) | {"seed": int})
    probes = empty.with_columns(pl.lit(0).alias(n) for n in ("length", "fitted_length", "accuracy"))
    task = findings.Task("t", ["a"], 8, 4, runs, pl.DataFrame(rows), lowest, effects.with_columns(
        pl.lit(0.0).alias("effect")), probes, empty)  # fmt: skip
    assert ["median erase", "0.80"] in findings.side_by_side(task)[1]
