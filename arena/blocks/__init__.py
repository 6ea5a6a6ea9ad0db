"""Sequence mixers behind one interface, one architecture a file."""

from __future__ import annotations

import importlib
import pkgutil

from arena.blocks.base import Block
from arena.blocks.registry import block_names, block_options, build_block, register

RESULT_VERSION = 1
"""Bumped by hand when results of this part change; part of every run's id."""

__all__ = ["RESULT_VERSION", "Block", "block_names", "block_options", "build_block", "register"]

# Importing a module of this package registers the blocks in it.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
