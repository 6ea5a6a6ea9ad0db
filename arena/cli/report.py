"""``arena report`` and ``arena compare``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from arena.cli.common import OK, complain, console


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
