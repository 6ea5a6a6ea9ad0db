"""The public alternatives, loaded where they are installed; what is not there is None and left out."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from kernels.external.common import can_import
from kernels.external.fla import KERNELS
from kernels.external.fla import _fault as fla_fault


def attribute(module: str, name: str) -> Callable[..., Any] | None:
    """An attribute of a module that may not be there."""
    if importlib.util.find_spec(module.partition(".")[0]) is None or can_import(module) is not None:
        return None
    return getattr(importlib.import_module(module), name, None)


def fla_kernel(name: str) -> Callable[..., Any] | None:
    """flash-linear-attention's chunk kernel below ``fla.ops``; on a GPU only."""
    return attribute(f"fla.ops.{name}", KERNELS[name])


def fla_naive(name: str) -> Callable[..., Any] | None:
    """A naive recurrence of flash-linear-attention; its file alone, because the package needs a GPU."""
    spec = importlib.util.find_spec("fla")
    for folder in [] if spec is None else spec.submodule_search_locations or []:
        path = Path(folder) / "ops" / name / "naive.py"
        if path.exists() and importlib.util.find_spec("einops") is not None:
            return getattr(module_at(path), f"naive_recurrent_{name}", None)
    return None


def module_at(path: Path) -> ModuleType:
    """Load one file as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def untrusted(kernel: str, *, has_decay: bool) -> str:
    """A note where flash-linear-attention's backward is known to be wrong; lifts its guard, to time it."""
    reason = fla_fault(kernel, has_decay=has_decay)
    if reason is None or not torch.cuda.is_available():
        return ""
    importlib.import_module("fla.ops.common.chunk_o").IS_NVIDIA_HOPPER = False  # type: ignore[attr-defined]
    return "gradients not trusted: " + reason
