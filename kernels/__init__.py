"""Operators: each folder holds the slow truth (``reference.py``) beside its fast paths."""

from __future__ import annotations

from kernels.gated_memory import gated_memory

__all__ = ["gated_memory"]
