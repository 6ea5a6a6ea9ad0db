"""The command line: parse, call, print. Heavy modules are imported by the commands that need them."""

from arena.cli.app import main

__all__ = ["main"]
