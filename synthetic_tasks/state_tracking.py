"""State tracking: automata over bits, moves and digits."""

from __future__ import annotations

import dataclasses

import numpy as np

from synthetic_tasks.base import Draw, Task, register, unscored
from synthetic_tasks.rng import Rows

SUPERVISION = ("final", "running")


def supervise(answers: np.ndarray, supervision: str) -> np.ndarray:
    """Targets from the answers at every position [N,T]: all of them, or the last one only."""
    if supervision == "running":
        return answers
    targets = unscored(answers)
    targets[:, -1] = answers[:, -1]
    return targets


@register("parity", "state tracking")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Parity(Task):
    """Is the number of ones odd?

    Definition: T independent fair bits; the answer is their sum modulo 2.
    Tokens: 0 and 1. Classes: 0 even, 1 odd.
    Example: tokens 1 0 1 1 -> running answers 1 1 0 1, final answer 1.
    Scored: the last position (the published form), or with supervision="running" every position.
    Source: the regular task "parity" of Deletang et al. 2023 and of the xLSTM paper (2405.04517, App.
    B.1.1), in the language-model form of NX-AI/xlstm and with the same distribution: their bits are 1 and
    2, 0 is padding, and their sequence size counts the answer too, so their size n is our length n - 1.
    Zoology's cumulative parity is supervision="running".
    Metric: accuracy at scored positions, and whole-sequence accuracy.
    Chance: 1/2; no proper subset of the bits says anything about the answer.
    """

    supervision: str = "final"
    """Which positions are scored: "final" or "running"."""

    def __post_init__(self) -> None:
        self._require_choice("supervision", SUPERVISION)

    @property
    def vocab_size(self) -> int:
        """The two bits."""
        return 2

    @property
    def n_classes(self) -> int:
        """Even, odd."""
        return 2

    def chance(self, length: int) -> float:
        """One half."""
        return 0.5

    def space(self, length: int) -> int:
        """All bit strings."""
        return 2**length

    def _generate(self, rows: Rows, length: int) -> Draw:
        return Draw(rows.below(2, 0, length))

    def _solve(self, tokens: np.ndarray) -> np.ndarray:
        return supervise(np.cumsum(tokens, axis=1) & 1, self.supervision)
