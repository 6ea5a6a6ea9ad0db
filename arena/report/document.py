"""A report as data (headings, lines, tables, figures), and two of its forms: Markdown and a terminal."""

from __future__ import annotations

import os
import re
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
    part: bool = False
    """A part of the section before it, under a smaller heading."""
    commands: list[str] = field(default_factory=list)
    """Lines for a shell."""
    listing: tuple[str, str] | None = None
    """A name and a long text as it stands, such as a file: shown when it is asked for."""
    link: tuple[str, str] | None = None
    """Text and relative address of a file beside the report."""
    text: bool = False
    """The table is of words, not of numbers."""
    quiet: bool = False
    """Not in a terminal: it is long, or said there in another way."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """A whole report."""

    title: str
    claim: str
    notes: list[str]
    """What a reader has to know before the numbers."""
    sections: list[Section]


def to_markdown(document: Document, folder: Path | None = None) -> str:
    """The report as Markdown, to be written to ``folder``; figures are referred to from there (None: they are
    in the same one).
    """
    lines = [f"# {document.title}", ""]
    if document.claim:
        lines += [document.claim, ""]
    lines += [f"- {note}" for note in document.notes]
    for section in document.sections:
        if section.heading:
            lines += ["", f"{'###' if section.part else '##'} {section.heading}"]
        for path in section.figures:
            lines += ["", f"![{path.stem}]({_address(path, folder)})"]
        if section.lines:
            lines += ["", *(f"- {line}" for line in section.lines)]
        if section.rows:
            lines += ["", "| " + " | ".join(section.columns) + " |"]
            lines.append("|---" + ("|---" if section.text else "|---:") * (len(section.columns) - 1) + "|")
            lines += [
                "| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in section.rows
            ]
        if section.commands:
            lines += ["", "```sh", *section.commands, "```"]
        if section.caption:
            lines += ["", section.caption]
        if section.link is not None:
            lines += ["", f"[{section.link[0]}]({section.link[1]})"]
        if section.listing is not None:
            name, text = section.listing
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
            lines += ["", f"{name}:", "", fence, text.strip("\n"), fence]
    return "\n".join(lines) + "\n"


def _address(path: Path, folder: Path | None) -> str:
    """A figure as a report in ``folder`` refers to it."""
    return path.name if folder is None else Path(os.path.relpath(path, folder)).as_posix()


def print_document(document: Document, console: Console) -> None:
    """The report in a terminal: no figures, and narrow tables where it is narrow."""
    if not console.is_terminal:  # a pipe or a file has no width: lines are not broken
        console = Console(file=console.file, width=200, highlight=False)
    console.print(f"[bold]{escape(document.title)}[/bold]")
    for line in [document.claim, *document.notes]:
        if line:
            console.print(escape(line))
    for section in document.sections:
        if section.quiet:
            continue
        if section.lines:
            console.print(f"[bold]{escape(section.heading)}[/bold]")
        for line in section.lines:
            console.print(escape(f"- {line}"), soft_wrap=True)
        if section.rows:
            _print_table(section, console)
        for line in section.commands:
            console.print(escape(line), soft_wrap=True)
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
