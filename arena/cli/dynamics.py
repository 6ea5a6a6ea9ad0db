"""``arena dynamics``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from arena.cli.common import OK, complain, names, wrong


def dynamics(
    directory: Annotated[Path, typer.Argument(help="A result folder of arena grid.")],
    out: Annotated[str | None, typer.Option(help="Where to write; default DIR/dynamics.")] = None,
    arm: Annotated[
        str | None, typer.Option("--arch", "--arm", help="Arms or architectures, with commas between.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Tasks, with commas between.")] = None,
    length: Annotated[
        str | None,
        typer.Option(help="Sequence lengths; default: the longest of training and the longest reported."),
    ] = None,
    intervene: Annotated[
        list[str] | None,
        typer.Option(
            help="standard (default), none, or GATE:ACTION[:ARGUMENT...][@layer=N][@head=N,N][@class=NAME]"
            "[@micro=N], such as erase:clamp:0:1@head=0; may be given again."
        ),
    ] = None,
) -> int:
    """Look inside trained memories: gates, states, eigenvalues, retention, edits, probes, interventions."""
    from arena.dynamics.page import make_page
    from arena.dynamics.study import Choice, study

    if out is not None and (not out.strip() or Path(out).is_file()):
        wrong(f"--out is a folder, not {out!r}")
    lengths = names("--length", length)
    if not all(word.isdigit() and int(word) > 0 for word in lengths):
        wrong(f"--length is numbers with commas between, not {length!r}")
    choice = Choice(
        arms=names("--arch", arm),
        tasks=names("--task", task),
        lengths=[int(word) for word in lengths],
        interventions=intervene or ["standard"],
    )
    folder = Path(out) if out is not None else directory / "dynamics"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        tables = study(directory, folder, choice, on_line=print)
    for line in dict.fromkeys(str(entry.message) for entry in caught if entry.category is UserWarning):
        complain(line)
    written = make_page(tables, directory, folder)
    print("written: " + ", ".join(str(path) for path in written))
    return OK
