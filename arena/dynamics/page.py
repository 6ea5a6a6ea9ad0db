"""The page of a study: one HTML file with everything in it, and the same as Markdown."""

from __future__ import annotations

import base64
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jinja2
import polars as pl

from arena.dynamics import findings, sentences
from arena.dynamics.effects import LOOKED_AT, NEAR_MINUS_ONE
from arena.dynamics.figures import draw_figures
from arena.dynamics.probe import DIMENSIONS, SHUFFLES
from arena.dynamics.study import SEQUENCES, Tables
from arena.report.document import Document, Section, to_markdown
from arena.report.tables import task_labels

_SECTIONS: list[tuple[str, str, Callable[[Sequence[findings.Task]], Iterator[str]], str]] = [
    (
        "Do the heads that flip carry the answer?",
        "identified",
        sentences.identified_sentences,
        "A head flips where the least eigenvalue of its transition, mean over the tokens that move the "
        "answer, "
        f"is at most {NEAR_MINUS_ONE}; heads are chosen on {LOOKED_AT} sequences of split valid, effects "
        "measured on "
        "split test. Erase (a signed decay: decay) is clamped, write is not, also where training ties them. "
        "Marks: one run each; "
        "bars: 95 % "
        "interval over sequences.",
    ),
    (
        "Which gate matters where",
        "effects",
        sentences.effect_sentences,
        "Every gate frozen at its mean, for each head and channel, over other sequences: what is lost is "
        "what the "
        "gate's dependence on the token was worth. Number and colour: accuracy lost, mean over runs; "
        "empty: no such "
        "gate. One gate at a time, also where training ties two. Single heads and other changes: "
        "effects.csv.",
    ),
    (
        "Eigenvalues",
        "eigenvalues",
        sentences.eigenvalue_sentences,
        "Least real part of an eigenvalue of (I - k e^T) D: -1 reflects the memory along the key, 0 "
        "replaces what "
        "it held, 1 keeps it. One mark a head and run, mean over tokens.",
    ),
    (
        "Gates",
        "gates",
        sentences.gate_sentences,
        f"Over all tokens of {SEQUENCES} sequences; a gate that an architecture does not have has no mark.",
    ),
    (
        "Retention",
        "retention",
        sentences.retention_sentences,
        "Half-life: from the decay alone, without what writes erase. Weight: of the source's value in "
        "the read, "
        "measured with the gates as they are; absolute value, mean over channels, heads and reads.",
    ),
    (
        "State beyond the training length",
        "state",
        sentences.state_sentences,
        "Mean over heads, sequences and runs.",
    ),
    (
        "Edit quality",
        "edit",
        sentences.edit_sentences,
        "Read linearly under the key, before and after a write of that key. Marks at the edge are beyond it.",
    ),
    (
        "Is the field in the key?",
        "fields",
        sentences.field_sentences,
        "For partial_update alone: how alike the key vectors are under which fields of one key are "
        "written, at the "
        "position of the value.",
    ),
    (
        "Decodability",
        "decodability",
        sentences.probe_sentences,
        f"Ridge regression from {DIMENSIONS} principal components of the memory at the end of a sequence, "
        "fitted on "
        f"split valid, scored on split test; crosses: the same with shuffled labels, mean of {SHUFFLES}.",
    ),
]
"""Heading, figure, sentences, how to read the figure."""
_HOW_TO_READ = (
    "Numbers of several runs are their mean (lowest to highest run); brackets [ ] are 95 % intervals over "
    "sequences."
)

_SIDE_BY_SIDE = (
    "What heads have is the median over the heads of a run, each with its mean over tokens and sequences; "
    "gates: over the heads where they vary; true state decoded: each memory of a run. -: the architecture "
    "has no such thing."
)


def make_page(tables: Tables, directory: str | Path, out: str | Path) -> list[Path]:
    """Write page.html, page.md and the figures of a study to ``out``.

    Args:
        tables: what was measured, with ``out`` beside them.
        directory: the result folder; its experiment gives the title.
        out: exists.

    Returns:
        The files written, the HTML page first.
    """
    out = Path(out)
    try:
        request = tomllib.loads((Path(directory) / "experiment.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        request = {}
    order = [str(entry.get("name")) for entry in request.get("tasks", [])]
    labels = dict(
        sorted(
            task_labels(tables.runs).items(),
            key=lambda item: order.index(item[0][0]) if item[0][0] in order else len(order),
        )
    )
    figures = draw_figures(tables, labels, out)
    document = write_document(tables, labels, figures, str(request.get("title") or request.get("name") or ""))
    html, markdown = out / "page.html", out / "page.md"
    html.write_text(to_html(document), encoding="utf-8")
    markdown.write_text(to_markdown(document), encoding="utf-8")
    return [html, markdown, *figures.values()]


def write_document(
    tables: Tables, labels: dict[tuple[str, str], str], figures: dict[str, Path], title: str
) -> Document:
    """The page as data: architectures side by side, a section a family, and what cannot be said."""
    tasks = findings.by_task(tables, labels)
    sections = [
        Section(
            heading=f"{task.label}: side by side, length {task.length}",
            columns=columns,
            rows=rows,
            caption=_SIDE_BY_SIDE,
        )
        for task in tasks
        for columns, rows in [findings.side_by_side(task)]
    ]
    for heading, name, say, caption in _SECTIONS:
        drawn = [figures[name]] if name in figures else []
        lines = list(say(tasks))
        if drawn or lines:
            sections.append(Section(heading=heading, figures=drawn, lines=lines, caption=caption))
        else:
            sections.append(Section(heading=heading, lines=["No run that was measured has it."]))
    sections.append(Section(heading="What cannot be said", lines=list(sentences.cannot_be_said(tasks))))
    files = [
        "measurements/*.parquet: gates, states, transitions, retention and edits, one row a number",
        "effects, eigenvalues, decodability, fields, runs (.parquet, .csv): the tables behind the figures",
        "dictionary.md: name, unit, meaning and equation of every quantity and column",
    ]
    sections.append(Section(heading="Data", lines=files))
    runs = tables.runs.unique("run_id")
    arms, lengths = runs["arm"].n_unique(), sorted(set(tables.runs["length"]))
    notes = [
        f"{len(runs)} trained models: {arms} architectures on {', '.join(labels.values())}; sequences of "
        "length "
        f"{', '.join(map(str, lengths))}. Tables and sentences are about the longest length of each task.",
        _HOW_TO_READ,
    ]
    unfinished = tables.runs.filter(pl.col("accuracy").is_null())
    if len(unfinished):
        notes.append(
            f"{len(unfinished)} of the measured runs and lengths have no accuracy in the grid's table."
        )
    return Document(
        title=f"Memory dynamics: {title}" if title else "Memory dynamics",
        claim="",
        notes=notes,
        sections=sections,
    )


def to_html(document: Document) -> str:
    """A document as one HTML file: styles and figures inside, nothing fetched from anywhere."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["inline"] = _inline
    environment.filters["anchor"] = _anchor
    return environment.from_string(_TEMPLATE).render(document=document)


def _inline(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _anchor(heading: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in heading.lower()).strip("-")


_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ document.title }}</title>
<style>
:root { --ink: #1c1c1c; --soft: #5d5d5d; --ground: #ffffff; --card: #f6f5f1; --line: #dcdad2;
  --mark: #08306b; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e6e1; --soft: #a9a69e; --ground: #16181b; --card: #1f2226; --line: #363a40;
    --mark: #9ecae1; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.2rem 1rem 3rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .4rem 0 .6rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; padding-top: .5rem; border-top: 1px solid var(--line); }
nav { font-size: .88rem; line-height: 1.9; }
nav a { color: var(--mark); margin-right: .9rem; text-decoration: none; white-space: nowrap; }
nav a:hover { text-decoration: underline; }
ul { padding-left: 1.1rem; margin: .5rem 0; }
li { margin: .25rem 0; }
.notes { color: var(--soft); }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .65rem; text-align: right; vertical-align: top; min-width: 5.4rem; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--ground);
  border-right: 1px solid var(--line); min-width: 8.5rem; }
thead th { border-bottom: 1px solid var(--line); font-weight: 600; color: var(--soft); }
tbody tr:nth-child(even) td { background: var(--card); }
figure { margin: .8rem 0; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 6px;
  padding: .4rem; }
@media (max-width: 40rem) { .scroll { overflow-x: auto; } figure img { max-width: none; width: 38rem; } }
.caption { color: var(--soft); font-size: .88rem; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: var(--mark); }
</style>
</head>
<body>
<main>
<h1>{{ document.title }}</h1>
{% if document.claim %}<p>{{ document.claim }}</p>{% endif %}
<ul class="notes">
{% for note in document.notes %}<li>{{ note }}</li>
{% endfor %}</ul>
<nav>{% for section in document.sections %}<a href="#{{ section.heading | anchor }}">{{ section.heading }}</a>
{% endfor %}</nav>
{% for section in document.sections %}
<section id="{{ section.heading | anchor }}">
<h2>{{ section.heading }}</h2>
{% if section.rows %}
<div class="wide"><table>
<thead><tr>{% for column in section.columns %}<th scope="col">{{ column }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in section.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody>
</table></div>
{% endif %}
{% for path in section.figures %}
<figure class="scroll"><img src="{{ path | inline }}" alt="{{ section.heading }}"></figure>
{% endfor %}
{% if section.caption %}<p class="caption">{{ section.caption }}</p>{% endif %}
{% set shown = section.lines[:8] %}{% set more = section.lines[8:] %}
{% if shown %}
<ul>
{% for line in shown %}<li>{{ line }}</li>
{% endfor %}</ul>
{% endif %}
{% if more %}
<details><summary>{{ more | length }} more</summary>
<ul>
{% for line in more %}<li>{{ line }}</li>
{% endfor %}</ul>
</details>
{% endif %}
</section>
{% endfor %}
</main>
</body>
</html>
"""
