"""Operators: each folder holds the slow truth (``reference.py``) beside its fast paths."""

from __future__ import annotations

from kernels.gated_memory import gated_memory, mlstm
from kernels.short_conv import dynamic_short_conv, short_conv
from kernels.slstm import slstm

RESULT_VERSION = 2
"""Bumped by hand when results of this part change; part of every run's id."""

__all__ = ["RESULT_VERSION", "dynamic_short_conv", "gated_memory", "mlstm", "short_conv", "slstm"]
