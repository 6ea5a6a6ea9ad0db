"""The gated matrix memory: one operator for the whole gate space, and the mLSTM on top of it."""

from __future__ import annotations

from kernels.gated_memory.mlstm import mlstm
from kernels.gated_memory.operator import gated_memory

__all__ = ["gated_memory", "mlstm"]
