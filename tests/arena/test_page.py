"""The page of a report: whole, self-contained, escaped, small; figures that follow the page's colours."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
from page_checks import Page, check_alone
from test_report import make_rows

from arena.report import render
from arena.report.accuracy import accuracy_sections
from arena.report.document import Document, Section, to_markdown
from arena.report.figure import drawn_runs, some_runs
from arena.report.page import SHOWN_LINES, SHOWN_ROWS, to_html
from arena.report.palette import _BASE, _SPARE, COLOURS, look, looks
from arena.report.surfaces import LENGTH, dials, surface_table
from arena.report.svg import contrast, dark_twin, save_figure
from arena.report.tables import accuracy_table, scores, task_labels

LIGHT, DARK = "#ffffff", "#16181b"
HOSTILE = [
    '<script>alert("x")</script>',
    "\"><img src=x onerror='x'>",
    "a & b $x$ _%",
    'style="#08306b;',
    "-->",
]


@pytest.fixture
def reported(tmp_path, monkeypatch):
    """(rows, experiment file) -> the page that `make_report` writes."""

    def make(rows: pl.DataFrame, file: str = "", environments=None, **sections) -> tuple[str, str]:
        monkeypatch.setattr(render, "load_results", lambda directory: rows)
        monkeypatch.setattr(render, "load_environments", lambda directory, _: environments or {})
        (tmp_path / "experiment.toml").write_text(file, encoding="utf-8")
        written = render.make_report(tmp_path, **sections)
        assert written[0] == tmp_path / "report" / "page.html" and all(path.exists() for path in written)
        return written[0].read_text(encoding="utf-8"), written[1].read_text(encoding="utf-8")

    return make


FILE = """
name = "sizes"
title = "How much does it hold?"
claim = "More pairs are harder."
archs = ["gdn", "lstm"]
seeds = [0, 1, 2]
lr = [0.01]
weight_decay = [0.1]
[train]
steps = 10
[[tasks]]
name = "mqar"
train_lengths = [8, 16]
eval_lengths = [16, 32]
params = { n_pairs = 4 }
"""


def test_the_page_has_everything_and_stands_alone(reported):
    rows = pl.concat(
        make_rows(tasks=("mqar",)).with_columns(
            task_params=pl.lit(json.dumps({"n_pairs": pairs, "vocab": 8})),
            run_id=pl.col("run_id") + f"-{pairs}",
        )
        for pairs in (16, 4, 8)
    )
    lost = pl.col("run_id") == "mqar-gdn-0-1-4"
    rows = rows.with_columns(
        status=pl.when(lost).then(pl.lit("diverged")).otherwise("status"),
        value=pl.when(lost & (pl.col("metric") != "loss")).then(0.0).otherwise("value"),
    )
    around = {"a": {"packages": {"torch": "2.13.0+cpu"}, "commit": "c" * 40, "cpu": "a machine"}}
    text, markdown = reported(rows, FILE, around)
    page = check_alone(text)
    words = " ".join(" ".join(page.words).split())
    for heading in (
        "What was asked", "Accuracy over sequence length", "mqar (n_pairs=4)", "Run by run",
        "Response surfaces over the difficulty dials", "Failures and diverged runs", "Versions and machine",
        "How to repeat it",
    ):  # fmt: skip
        assert heading in words and f"# {heading}" in markdown, heading
    for fact in (
        "More pairs are harder.", "trained at 8 to 16; tested at 16, 32; n_pairs 4", "packages torch",
        "2.13.0+cpu", "cccccccccc", "backend of gated_memory", "result version of blocks",
        "arena grid sizes.toml --out results/sizes", "mqar-gdn-0-1-4", "diverged", "state bytes",
    ):  # fmt: skip
        assert fact in words and fact in markdown, fact
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text and "@media print" in text
    assert text.count("<svg ") == 4 and "<img" not in text


def test_names_from_outside_are_escaped_everywhere(reported):
    arms = HOSTILE
    rows = make_rows(archs=arms, seeds=2).with_columns(
        reason=pl.when(pl.col("seed") == 1).then(pl.lit(HOSTILE[0])),
        status=pl.when(pl.col("seed") == 1).then(pl.lit("diverged")).otherwise("status"),
        task_params=pl.lit(json.dumps({HOSTILE[1]: HOSTILE[2]})),
        backend=pl.lit(f"x={HOSTILE[1]}"),
    )
    file = f"title = {json.dumps(HOSTILE[0])}\nclaim = {json.dumps(HOSTILE[1])}\narchs = {json.dumps(arms)}\n"
    text, _ = reported(rows, file, {"a": {"cpu": HOSTILE[0]}})
    page = check_alone(text)
    words = "".join(page.words)
    for name in HOSTILE:
        assert name in words
    assert "<script" not in text and "<img" not in text


def test_a_claims_table_is_shown(reported):
    file = '[claim]\nsentence = "It is so."\nsource = "arXiv 1"\n[claim.rule]\nmargin = 0.1\n'
    text, _ = reported(make_rows(), file)
    words = " ".join(Page(text).words)
    assert "claim: sentence" in words and "It is so." in words and '{"margin": 0.1}' in words


def test_what_stands_before_and_after(reported):
    text, _ = reported(
        make_rows(),
        before=[Section(heading="The ablation"), Section(heading="a part", part=True)],
        after=[Section(heading="Memory dynamics", link=("all of it", "../dynamics/page.html"))],
    )
    check_alone(text)
    places = [
        text.index(f"<h2>{name}") for name in ("The ablation", "Accuracy over", "Memory dynamics", "Versions")
    ]
    assert places == sorted(places) and "<h3>a part</h3>" in text
    assert ">a part</a>" not in text, "parts are not in the list of sections"


def test_long_tables_and_lists_are_cut_with_a_word():
    rows = [[f"row {number}", "1"] for number in range(SHOWN_ROWS + 7)]
    lines = [f"line {number}" for number in range(SHOWN_LINES + 3)]
    section = Section(heading="H", columns=["a", "b"], rows=rows, lines=lines)
    document = Document(title="T", claim="", notes=["LEFT OUT: x", "quiet"], sections=[section, section])
    text = to_html(document)
    check_alone(text)
    assert "Left out of this page: 7 more rows." in text and f"row {SHOWN_ROWS}<" not in text
    assert "<summary>3 more</summary>" in text
    assert '<li class="loud">LEFT OUT: x</li>' in text and "<li>quiet</li>" in text
    assert f"row {SHOWN_ROWS + 6}" in to_markdown(document)


def test_a_listing_in_markdown_cannot_end_its_own_fence():
    section = Section(heading="H", listing=("f", "a\n```\nb"))
    text = to_markdown(Document(title="T", claim="", notes=[], sections=[section]))
    assert "\n````\na\n```\nb\n````\n" in text


def test_big_grids_make_small_pages(tmp_path, monkeypatch):
    """More settings and runs than are shown: figures and tables are cut, means are not, and it is said."""
    from arena.report import accuracy, figure

    monkeypatch.setattr(accuracy, "DRAWN_TASKS", 2)
    monkeypatch.setattr(accuracy, "LISTED_TASKS", 3)
    monkeypatch.setattr(figure, "RUNS_A_FIGURE", 60)
    one = make_rows(archs=("gdn", "lstm"), seeds=30).filter(pl.col("metric") != "loss")
    rows = pl.concat(
        one.with_columns(
            task_params=pl.lit(json.dumps({"n": number})), run_id=pl.col("run_id") + f"-{number}"
        )
        for number in range(5)
    )
    sections, frames, notes = accuracy_sections(rows, task_labels(rows), looks(["gdn", "lstm"]), tmp_path, "")
    assert [section.heading for section in sections if section.heading.startswith("parity (n=")] == [
        f"parity (n={number})" for number in range(3)
    ]
    assert frames["accuracy"].height == 5 * 2 * 2 and set(frames["accuracy"]["runs"]) == {30}
    assert any("LEFT OUT: 5 tasks and settings" in note for note in notes)
    assert any("curves of 60 of 300 single runs" in note for note in notes), notes
    text = to_html(Document(title="T", claim="", notes=notes, sections=sections))
    check_alone(text)


def test_the_runs_that_are_drawn_span_from_the_worst_to_the_best():
    table = scores(make_rows(archs=("gdn",), seeds=50))
    few = some_runs(table, 5)
    means = table.group_by("run_id").agg(pl.col("accuracy").mean()).sort("accuracy")
    chosen = set(few["run_id"])
    assert len(chosen) == 5 and {means["run_id"][0], means["run_id"][-1]} <= chosen
    assert few.height == 5 * 2 and some_runs(table, 50).height == table.height
    rows = make_rows(archs=("gdn", "lstm"), seeds=50)
    assert drawn_runs(rows, task_labels(rows)) == (80, 100)


def test_surfaces_against_plain_python():
    parts = []
    for n, vocab in ((4, 8), (16, 8), (4, 32), (16, 32), (8, 8)):
        params = json.dumps({"n": n, "vocab": vocab, "same": 1})
        parts.append(
            make_rows(tasks=("mqar",), accuracy=lambda arch, trial, seed, split, length, n=n, v=vocab: (
                1 / n + seed / 100 + v / 1000 + length / 10_000
            )).with_columns(task_params=pl.lit(params), run_id=pl.col("run_id") + params)
        )  # fmt: skip
    cells = accuracy_table(pl.concat(parts))
    table = surface_table(cells)
    assert set(table.select("dial_x", "dial_y").iter_rows()) == {("n", "vocab")}
    assert table.height == 2 * 5
    row = table.filter(arm="gdn", x="16", y="32").row(0, named=True)
    assert row["accuracy"] == pytest.approx(1 / 16 + 0.01 + 0.032 + 0.0032) and row["runs"] == 3
    one = surface_table(accuracy_table(pl.concat(parts[:2])))
    assert set(one.select("dial_x", "dial_y").iter_rows()) == {(LENGTH, "n")} and one.height == 2 * 2 * 2
    assert surface_table(accuracy_table(parts[0])).is_empty()
    assert dials([{"a": 10, "b": "x"}, {"a": 9, "b": "x"}, {"a": 9.5}]) == {
        "a": [9, 9.5, 10],
        "b": ["x", None],
    }


def test_an_architecture_has_one_colour_whoever_is_beside_it():
    names = [
        "mamba3",
        "rwkv7",
        "deltaproduct[2]",
        "deltaproduct[3]",
        "gdnproduct[2]-neg",
        "ttt_e2e",
        "gdn2+swa",
    ]
    names += [
        "gdn2+swa[3:1]",
        "xlstm[1:1]",
        "xlstm[7:1]",
        "gdn wide",
        "gdn wide-neg",
        *(f"arm {i}" for i in range(60)),
    ]
    found = looks(names)
    assert len(set(found.values())) == len(names), "all are told apart"
    for name in names:
        assert looks([name])[name].colour == found[name].colour == look(name).colour
        assert found[name].colour in COLOURS
    assert found["deltaproduct[2]"].colour == look("deltaproduct").colour != look("gdn").colour
    assert found["gdn wide"].colour == found["gdn wide-neg"].colour


def test_colours_are_apart_and_seen_on_both_grounds():
    assert (
        len(COLOURS) == len(_BASE) + len(_SPARE) == len({*_SPARE, *(colour for colour, _ in _BASE.values())})
    )
    for colour in COLOURS:
        assert contrast(dark_twin(colour), DARK) >= 3, colour
        assert contrast(colour, LIGHT) >= 1.7, colour
    for colour in _SPARE:
        assert contrast(colour, LIGHT) >= 2.3, colour
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast(dark_twin("#ffffff"), DARK) < 1.1, "white becomes the ground"
    assert contrast(dark_twin("#333333"), DARK) > 4.5


def test_a_figure_in_a_page_takes_its_colours_from_the_page(tmp_path):
    from matplotlib.figure import Figure

    from arena.report.svg import LARGEST, colour_rules, inline, plain

    figure = Figure()
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="#08306b")
    axis.set_title(plain('$a$ <b> style="#08306b'))
    save_figure(figure, tmp_path / "a.png")
    text = str(inline(tmp_path / "a.png", 'an "alt"'))
    assert "var(--c08306b)" in text and 'aria-label="an &#34;alt&#34;"' in text and "xmlns" not in text
    assert '$a$ &lt;b&gt; style="#08306b' in text, "the label is as it was"
    light, dark = colour_rules(text)
    assert "--c08306b: #08306b;" in light and f"--c08306b: {dark_twin('#08306b')};" in dark
    drawn = tmp_path / "a.svg"
    drawn.write_text(drawn.read_text() + " " * LARGEST)
    assert str(inline(tmp_path / "a.png", "")).startswith('<img src="data:image/png;base64,iVBOR')


def test_figures_can_be_read_without_colour():
    """Names that are alike in grey differ in marker or in line."""
    names = [
        *_BASE,
        *(f"{name}-neg" for name in ("gdn", "gdn2", "mamba2", "deltanet", "kda")),
        "gdn2+swa",
        "arm",
    ]
    found = looks(names)
    for one in names:
        for other in names:
            if one < other and contrast(found[one].colour, found[other].colour) < 1.15:
                assert found[one][1:] != found[other][1:], (one, other)


def test_every_figure_is_written_with_its_svg(reported, tmp_path):
    reported(make_rows())
    for path in Path(tmp_path / "report").glob("*.png"):
        assert path.with_suffix(".svg").read_text().count("<svg") == 1


def test_tables_of_words_are_not_set_to_the_right_in_markdown():
    section = Section(heading="S", columns=["a", "b"], rows=[["x", "y"]], text=True)
    assert "\n|---|---|\n" in to_markdown(Document(title="T", claim="", notes=[], sections=[section]))
