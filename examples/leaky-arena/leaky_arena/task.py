"""Which of a few symbols came last, with noise in between."""

from dataclasses import dataclass

import numpy as np

from synthetic_tasks import Task
from synthetic_tasks.base import Draw
from synthetic_tasks.rng import Rows


@dataclass(frozen=True, kw_only=True)
class LastSeen(Task):
    """At every position: which symbol was seen last?

    A token is one of `n_symbols` symbols, or (half of them) noise. Positions before the first symbol are not
    scored. Chance: one in `n_symbols`.
    """

    n_symbols: int = 4

    family = "plug-in"

    def __post_init__(self) -> None:
        self._require("n_symbols", 2, 100)

    @property
    def vocab_size(self) -> int:
        return self.n_symbols + 1

    @property
    def n_classes(self) -> int:
        return self.n_symbols

    def chance(self, length: int) -> float:
        return 1 / self.n_symbols

    def space(self, length: int) -> int:
        return (self.n_symbols + 1) ** length

    def _generate(self, rows: Rows, length: int) -> Draw:
        noise = rows.below(2, 0, length) == 0
        symbols = rows.below(self.n_symbols, 1, length)
        return Draw(np.where(noise, self.n_symbols, symbols))

    def _solve(self, tokens: np.ndarray) -> np.ndarray:
        at = np.where(tokens < self.n_symbols, np.arange(tokens.shape[1]), -1)
        last = np.maximum.accumulate(at, axis=1)
        seen = np.take_along_axis(tokens, np.maximum(last, 0), axis=1)
        return np.where(last >= 0, seen, -100)
