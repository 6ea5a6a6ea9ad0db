"""The arena: one block interface for linear-time sequence mixers, and everything that runs an experiment.

Names are resolved on first use, so that importing a light room (``arena.blocks``, ``arena.model``,
``arena.training``) needs torch and numpy only.
"""

from __future__ import annotations

import importlib
from typing import Any

_LAZY = {
    "build_block": "arena.blocks",
    "build_model": "arena.model",
    "ModelConfig": "arena.model",
    "load_results": "arena.grid",
}

__all__ = ["ModelConfig", "build_block", "build_model", "load_results"]


def __getattr__(name: str) -> Any:
    if name == "dynamics":
        return importlib.import_module("arena.dynamics")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'arena' has no attribute {name!r}")
