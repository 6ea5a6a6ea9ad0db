"""Write docs/tasks/ from the docstrings of the tasks, so that a page says what the code does.

python tools/tasks.py
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from itertools import groupby
from pathlib import Path

import synthetic_tasks
from synthetic_tasks.base import Task, task_class

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "tasks"
SHORTCUTS = ROOT / "synthetic_tasks" / "SHORTCUTS.md"

_LABEL = re.compile(r"([A-Z][a-z]+): ")
_INDEX = """\
# Tasks

A page for each task: definition, tokens, what is scored, source, chance level, parameters, what shortcuts
score on it, and sequences with their answers. The pages are made from the docstrings by
`python tools/tasks.py`; `arena show TASK` prints the docstring and sequences at any length, with any
parameters. A test holds the pages to the code.

Chance is the accuracy of the best guess that does not do the task, at the shortest legal length from 64 on
and default parameters. Every sample is a pure function of task, parameters, split, seed and index; every
answer is recomputed by an exact solver from the tokens alone. What position, frequency and the like score:
[SHORTCUTS.md]({shortcuts}).
"""


def pages() -> dict[str, str]:
    """File name in docs/tasks -> content."""
    rows, head = _shortcuts()
    found = {f"{name}.md": _page(name, rows[name], head) for name in synthetic_tasks.names()}
    return {"README.md": _index(), **found}


def _index() -> str:
    """The table of all tasks, a section a family."""
    parts = [_INDEX.format(shortcuts="../../synthetic_tasks/SHORTCUTS.md")]
    tasks = sorted((synthetic_tasks.get(name) for name in synthetic_tasks.names()), key=_family)
    for family, members in groupby(tasks, key=_family):
        parts += [f"## {family.capitalize()}", "", "| task | what is asked | chance |", "|---|---|---:|"]
        for task in members:
            asked, chance = _prose(_summary(task.name)), task.chance(task.legal_length(64))
            parts.append(f"| [`{task.name}`]({task.name}.md) | {asked} | {chance:.3f} |")
        parts.append("")
    return "\n".join(parts)


def _page(name: str, row: list[str], head: list[str]) -> str:
    """One task."""
    task = synthetic_tasks.get(name)
    fields = dataclasses.fields(task)
    parts = [f"# `{name}`", f"{_prose(_summary(name))} Family: {task.family}.", *_docstring(name)]
    if fields:
        lines = [f"| `{field.name}` | `{getattr(task, field.name)!r}` |" for field in fields]
        parts.append("\n".join(["| parameter | default |", "|---|---|", *lines]))
    parts += [
        f"**Sizes** with the default parameters: {task.vocab_size} tokens, {task.n_classes} classes; "
        f"lengths {_lengths(task)}.",
        f"**What shortcuts score** at length {row[1]} ([what they are](../../synthetic_tasks/SHORTCUTS.md)):",
        "\n".join(
            ["| " + " | ".join(head[2:]) + " |", "|---:" * len(head[2:]) + "|", f"| {' | '.join(row[2:])} |"]
        ),
        "**Sequences**, token→answer where an answer is scored:",
        f"```text\n{synthetic_tasks.show(task, samples=2, color=False)}\n```",
        f"```sh\narena show {name}\n```",
        "[All tasks](README.md)",
    ]
    return "\n\n".join(parts) + "\n"


def _summary(name: str) -> str:
    """The first line of the docstring."""
    return (inspect.getdoc(task_class(name)) or "").splitlines()[0]


def _docstring(name: str) -> list[str]:
    """The rest of the docstring as paragraphs, a new one for each label; examples as they are."""
    lines = (inspect.getdoc(task_class(name)) or "").splitlines()[1:]
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        if not line.strip() or _LABEL.match(line):
            paragraphs.append([])
        if line.strip():
            paragraphs[-1].append(line.strip())
    parts = []
    for paragraph in paragraphs:
        text = " ".join(paragraph)
        label = _LABEL.match(text)
        if label and label[1] == "Example":
            content = [paragraph[0].removeprefix("Example: "), *paragraph[1:]]
            parts += ["**Example:**", "```text\n" + "\n".join(content) + "\n```"]
        elif label:
            parts.append(f"**{label[1]}:** {_prose(text[label.end() :])}")
        elif text:
            parts.append(_prose(text))
    return parts


def _prose(text: str) -> str:
    """Plain text as Markdown: what would be markup is escaped, except in backticks."""
    pieces = text.split("`")
    pieces[::2] = [re.sub(r"([\\*<\[\]|#]|(?<!\w)_|_(?!\w))", r"\\\1", piece) for piece in pieces[::2]]
    return "`".join(pieces)


def _lengths(task: Task) -> str:
    """The legal lengths in words."""
    low, step, high = task.min_length, task.length_step, task.max_length
    text = f"{low} or more" if step == 1 else f"{low}, {low + step}, {low + 2 * step} and so on"
    return text if high is None else f"{text}, up to {high}"


def _family(task: Task) -> str:
    return task.family


def _shortcuts() -> tuple[dict[str, list[str]], list[str]]:
    """The table of SHORTCUTS.md: task -> cells, and its header."""
    table = [line for line in SHORTCUTS.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return {row[0]: row for row in cells[1:]}, cells[0]


def main() -> None:
    """Write the pages; those of tasks that are gone are deleted."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    wanted = pages()
    for path in FOLDER.glob("*.md"):
        if path.name not in wanted:
            path.unlink()
    for name, text in wanted.items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
