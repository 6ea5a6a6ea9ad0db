"""A report as data (headings, lines, tables, figures), and its two forms: Markdown and a terminal."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

WIDE = 130  # a terminal with fewer columns leaves out the trailing columns that a section calls wide


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading with what stands under it: figures, lines, a table, a caption."""

    heading: str
    """Empty: no heading; what is here belongs to the title."""
    lines: list[str] = field(default_factory=list)
    """Sentences, each an item of a list."""
    columns: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    wide: int = 0
    """So many trailing columns need a wide terminal; Markdown always has them."""
    figures: list[Path] = field(default_factory=list)
    caption: str = ""
    """How to read the table or the figures."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """A whole report."""

    title: str
    claim: str
    notes: list[str]
    """What a reader has to know before the numbers."""
    sections: list[Section]


def to_markdown(document: Document) -> str:
    """The report as Markdown; figures are referred to by their file names."""
    lines = [f"# {document.title}", ""]
    if document.claim:
        lines += [document.claim, ""]
    lines += [f"- {note}" for note in document.notes]
    for section in document.sections:
        if section.heading:
            lines += ["", f"## {section.heading}"]
        for path in section.figures:
            lines += ["", f"![{path.stem}]({path.name})"]
        if section.lines:
            lines += ["", *(f"- {line}" for line in section.lines)]
        if section.rows:
            lines += ["", "| " + " | ".join(section.columns) + " |"]
            lines.append("|---" + "|---:" * (len(section.columns) - 1) + "|")
            lines += [
                "| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in section.rows
            ]
        if section.caption:
            lines += ["", section.caption]
    return "\n".join(lines) + "\n"


def print_document(document: Document, console: Console) -> None:
    """The report in a terminal: no figures, and narrow tables where it is narrow."""
    if not console.is_terminal:  # a pipe or a file has no width: lines are not broken
        console = Console(file=console.file, width=200, highlight=False)
    console.print(f"[bold]{escape(document.title)}[/bold]")
    for line in [document.claim, *document.notes]:
        if line:
            console.print(escape(line))
    for section in document.sections:
        if section.lines:
            console.print(f"[bold]{escape(section.heading)}[/bold]")
        for line in section.lines:
            console.print(escape(f"- {line}"))
        if section.rows:
            _print_table(section, console)
        if section.caption and (section.lines or section.rows):
            console.print(f"[dim]{escape(section.caption)}[/dim]")


def _print_table(section: Section, console: Console) -> None:
    count = len(section.columns) - (section.wide if console.width < WIDE else 0)
    title = "" if section.lines else escape(section.heading)
    table = Table(title=title or None, title_justify="left", title_style="bold")
    for number, column in enumerate(section.columns[:count]):
        table.add_column(escape(column), justify="left" if number == 0 else "right", overflow="fold")
    for row in section.rows:
        table.add_row(*(escape(text) for text in row[:count]))
    console.print(table)
