"""``arena check-block``."""

from __future__ import annotations

import traceback
from typing import Annotated

import typer

from arena.cli import common
from arena.cli.common import FAILED, OK, parameter, wrong


def check_block(
    name: Annotated[str, typer.Argument(help="Name of a block, also of a plug-in's.")],
    outer: Annotated[str, typer.Option(help="common, official, or both.")] = "both",
    d_model: Annotated[int, typer.Option(help="Width of the block.")] = 8,
    n_heads: Annotated[int, typer.Option(help="Heads of the block.")] = 2,
    param: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, an option of the block; may be given again.")
    ] = None,
) -> int:
    """Check that a block does what every block must: a line a check.

    Exit status 0: it does; 1: a check failed; 2: there is no such block, or it cannot be built so.
    """
    from arena.blocks import build_block
    from arena.conformance import Subject, examine

    if outer not in ("both", "common", "official"):
        wrong(f"--outer is common, official or both, not {outer!r}")
    if not 1 <= d_model <= 1024:
        wrong(f"--d-model is a number from 1 to 1024, not {d_model}")
    options = dict(parameter(text) for text in param or [])
    failed = 0
    for layer in ("common", "official") if outer == "both" else (outer,):

        def build(layer: str = layer):  # type: ignore[no-untyped-def]
            return build_block(name, d_model=d_model, n_heads=n_heads, outer=layer, depth=0.5, **options)

        try:
            build()
        except (ValueError, TypeError) as error:
            wrong(str(error))
        for found in examine(Subject(build=build)):
            failed += not found.passed
            print(f"{layer:9} {found.check:22} {'ok   ' if found.passed else 'FAILS'} {found.note}".rstrip())
            if found.error is not None and common.debug:
                traceback.print_exception(found.error)
    if failed:
        print(f"{failed} checks failed" + ("" if common.debug else "; --debug shows where"))
    return FAILED if failed else OK
