"""What a check is given, and how it says that a block fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from arena.blocks.base import Block

BATCH, SHORT, LONG = 2, 9, 70
"""B; T of most checks; and one that is longer than a chunk of any path (64)."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A block to be checked."""

    build: Callable[[], Block]
    """Makes it anew, with weights from torch's global generator."""

    def make(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> Block:
        """A block whose weights are all away from zero."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            block = self.build()
            for parameter in block.parameters():
                parameter.data.add_(0.3 * torch.randn_like(parameter))
        return block.to(dtype)


class Failed(AssertionError):
    """A block does not do what it must; the message says what."""


def must(holds: bool | Tensor, what: str) -> None:
    """Say what is wrong unless it holds."""
    if not holds:
        raise Failed(what)


def close(found: Tensor, wanted: Tensor, tolerance: float, what: str) -> float:
    """The largest difference, relative where ``wanted`` is above 1; :class:`Failed` above ``tolerance``."""
    must(found.shape == wanted.shape, f"{what}: shape {list(found.shape)}, not {list(wanted.shape)}")
    if not wanted.numel():
        return 0.0
    apart = ((found - wanted).abs() / wanted.abs().clamp(min=1)).max().item()
    must(apart <= tolerance, f"{what}: {apart:.2g} apart, more than {tolerance:.0e}")  # NaN fails
    return apart


def tokens(block: Block, seed: int = 0, *, batch: int = BATCH, length: int = SHORT) -> Tensor:
    """X [B,T,D] of the block's type, N(0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, block.d_model, generator=generator, dtype=torch.float64)
    return x.to(next(block.parameters()).dtype)
