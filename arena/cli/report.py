"""``arena report`` and ``arena compare``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from arena.cli.common import OK, complain, console, wrong


def report(
    directory: Annotated[
        Path, typer.Argument(help="A result folder of arena grid, tune, ablate or reproduce.")
    ],
) -> int:
    """One page of a result folder, and its tables and figures: printed, and written to DIR/report."""
    from arena.ablation import ablation_sections, is_ablation
    from arena.claims.report import claim_sections
    from arena.dynamics.page import dynamics_sections
    from arena.report import make_report

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        before, files = ablation_sections(directory) if is_ablation(directory) else ([], [])
        before = claim_sections(directory) + before
        after = dynamics_sections(directory)
        written = make_report(directory, console, before=before, after=after) + files
    for line in dict.fromkeys(str(entry.message) for entry in caught if entry.category is UserWarning):
        complain(line)
    print("written: " + ", ".join(str(path) for path in written))
    return OK


def compare(
    a: Annotated[Path, typer.Argument(metavar="DIR_A", help="A result folder.")],
    b: Annotated[Path, typer.Argument(metavar="DIR_B", help="Another one; differences are B less A.")],
    metric: Annotated[
        str, typer.Option(help="accuracy, chance_scaled_accuracy, sequence_accuracy or loss.")
    ] = "accuracy",
    out: Annotated[
        str | None, typer.Option(help="Folder for a page, Markdown, figure and table; default: none.")
    ] = None,
) -> int:
    """What changed between two result folders, with intervals: numbers, settings, versions."""
    from arena.report import compare as compared
    from arena.report.differences import METRICS

    if metric not in METRICS:
        wrong(f"--metric is {', '.join(METRICS[:-1])} or {METRICS[-1]}, not {metric!r}")
    if out is not None and (not out.strip() or Path(out).is_file()):
        wrong(f"--out is a folder, not {out!r}")
    if a.exists() and b.exists() and a.samefile(b):
        wrong(f"{a} and {b} are one folder: compare needs two")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        written = compared(a, b, metric=metric, out=out, console=console)
    for line in dict.fromkeys(str(entry.message) for entry in caught if entry.category is UserWarning):
        complain(line)
    if written:
        print("written: " + ", ".join(str(path) for path in written))
    return OK
