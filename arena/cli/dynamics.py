"""``arena dynamics``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from arena.cli.checkpoints import look_inside
from arena.cli.common import OK, complain, names, wrong


def dynamics(
    directory: Annotated[Path | None, typer.Argument(help="A result folder of arena grid.")] = None,
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
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="In place of DIRECTORY: a folder of arena import, or a public model itself."),
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(help="What the checkpoint reads: .npy, .safetensors or .parquet of token ids, or text."),
    ] = None,
    sequences: Annotated[
        int | None,
        typer.Option(help="How many stretches of --length tokens the checkpoint reads; default 4."),
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
    if (checkpoint is None) == (directory is None):
        wrong("give a result folder, or --checkpoint and --tokens")
    if checkpoint is not None:
        if tokens is None:
            wrong("--checkpoint needs --tokens, a file for it to read")
        if arm or task or intervene:
            wrong("--arch, --task and --intervene are about trained tasks, not about --checkpoint")
        if len(lengths) > 1 or (sequences is not None and sequences < 1):
            wrong("with --checkpoint, --length and --sequences are one number each, from 1 on")
        length_of_one = int(lengths[0]) if lengths else None
        return look_inside(checkpoint, tokens, out=out, length=length_of_one, sequences=sequences)
    if tokens is not None or sequences is not None:
        wrong("--tokens and --sequences go with --checkpoint")
    assert directory is not None
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
