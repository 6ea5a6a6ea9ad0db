"""The page of a study: one HTML file with everything in it, and the same as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import polars as pl

from arena.dynamics import findings, sentences
from arena.dynamics.effects import LOOKED_AT, NEAR_MINUS_ONE
from arena.dynamics.figures import draw_figures
from arena.dynamics.probe import DIMENSIONS, SHUFFLES
from arena.dynamics.study import SEQUENCES, Tables, read_study
from arena.grid.store import StoreError
from arena.report.document import Document, Section, to_markdown
from arena.report.page import write_html
from arena.report.request import in_file_order, read_request
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
        "split test. Erase (a signed decay: decay; a turn: angle, to a quarter) is clamped, write is not, "
        "also where training ties them. "
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
        "replaces what it held, 1 keeps it; of several updates a token, of their product, where a turn by an "
        "angle has its cosine. One mark a head and run, mean over tokens.",
    ),
    (
        "Gates",
        "gates",
        sentences.gate_sentences,
        f"Over all tokens of {SEQUENCES} sequences; a gate that an architecture does not have has no mark, "
        "and where a token updates the memory several times, each time has its own.",
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
    request = read_request(Path(directory))
    labels = in_file_order(task_labels(tables.runs), request)
    figures = draw_figures(tables, labels, out)
    document = write_document(tables, labels, figures, str(request.get("title") or request.get("name") or ""))
    html, markdown = out / "page.html", out / "page.md"
    write_html(document, html)
    markdown.write_text(to_markdown(document), encoding="utf-8")
    return [html, markdown, *figures.values()]


def dynamics_sections(directory: str | Path) -> list[Section]:
    """What ``arena dynamics`` found in a result folder, for its report; empty without a study."""
    out = Path(directory) / "dynamics"
    try:
        tables = read_study(out)
    except StoreError as error:
        return [Section(heading="Memory dynamics", lines=[str(error)])]
    if tables is None or tables.runs.is_empty():
        return []
    labels = in_file_order(task_labels(tables.runs), read_request(Path(directory)))
    figures = {name: out / f"{name}.png" for _, name, _, _ in _SECTIONS if (out / f"{name}.png").exists()}
    document = write_document(tables, labels, figures, "")
    link = ("The page of the dynamics alone, with its tables beside it", "../dynamics/page.html")
    head = Section(heading=document.title, lines=document.notes, link=link, quiet=True)
    return [head, *(replace(section, part=True, quiet=True) for section in document.sections)]


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
    sections += findings.added_sections(tables.added, labels)
    sections.append(Section(heading="What cannot be said", lines=list(sentences.cannot_be_said(tasks))))
    files = [
        "measurements/*.parquet: gates, states, transitions, retention and edits, one row a number",
        "effects, eigenvalues, decodability, fields, runs (.parquet, .csv): the tables behind the figures",
        *(["added/: the tables of the measurements that plug-ins add"] if tables.added else []),
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
