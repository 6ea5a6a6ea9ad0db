"""Counting: majorities and counted languages."""

from __future__ import annotations

import dataclasses

import numpy as np

from synthetic_tasks.base import IGNORE, Draw, Task, register, unscored
from synthetic_tasks.rng import Rows
from synthetic_tasks.state_tracking import SUPERVISION


def counts_of(tokens: np.ndarray, n_symbols: int) -> np.ndarray:
    """How often each of 0..n_symbols-1 occurs in each row, int64 [N,n_symbols]."""
    rows = np.arange(len(tokens))[:, None] * n_symbols
    return np.bincount((tokens + rows).reshape(-1), minlength=len(tokens) * n_symbols).reshape(-1, n_symbols)


def winner(tokens: np.ndarray, n_symbols: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each row's most frequent symbol (among equals the earliest), its count, and whether it is alone."""
    counts = counts_of(tokens, n_symbols)
    best = counts.max(axis=1)
    tied = counts == best[:, None]
    first = np.take_along_axis(tied, tokens, axis=1).argmax(axis=1)
    return tokens[np.arange(len(tokens)), first], best, tied.sum(axis=1) == 1


@register("majority", "counting and stacks")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Majority(Task):
    """Which symbol is the most frequent?

    Definition: T independent uniform symbols; the answer is the one that occurs most often.
    Tokens: the symbols 0 .. n_symbols-1. Classes: the same.
    Example: 2 0 2 1 -> 2.
    Scored: the last position; with supervision="running" every position at which one symbol is alone in
    front.
    Ties: ties="avoid" (default) draws a sequence again when two symbols share the highest count (46 % of
    sequences at length 128 with 63 symbols). ties="first" keeps them, the earlier symbol wins, and running
    answers follow that rule at every position.
    Source: the xLSTM paper (2405.04517, App. B.1.1): 63 symbols, there numbered from 1, 0 is padding. That
    paper does not state its rule for ties; ties="first" is the rule of
    Benjamin-Walker/structured-linear-cdes.
    Metric: accuracy at scored positions. Dials: n_symbols (fewer symbols: wider margins), length.
    Chance: 1/n_symbols, by symmetry. Answering with the last symbol, or the first, does better at short
    lengths (the winner occurs more often than the others): see the shortcut table.
    """

    n_symbols: int = 63
    """Size of the alphabet."""
    ties: str = "avoid"
    """"avoid": no sequence whose winner is tied; "first": the earlier symbol wins."""
    supervision: str = "final"
    """Which positions are scored: "final" or "running"."""

    def __post_init__(self) -> None:
        self._require("n_symbols", 2, 2**16)
        self._require_choice("ties", ("avoid", "first"))
        self._require_choice("supervision", SUPERVISION)

    @property
    def vocab_size(self) -> int:
        """The symbols."""
        return self.n_symbols

    @property
    def n_classes(self) -> int:
        """The symbols."""
        return self.n_symbols

    def chance(self, length: int) -> float:
        """One symbol guessed always."""
        return 1 / self.n_symbols

    def space(self, length: int) -> int:
        """All strings; where ties are avoided, at least every string of T - 1 with its winner appended."""
        return self.n_symbols ** (length if self.ties == "first" or length == 1 else length - 1)

    def _generate(self, rows: Rows, length: int) -> Draw:
        tokens = rows.below(self.n_symbols, 0, length)
        if self.ties == "first":
            return Draw(tokens)
        return Draw(tokens, valid=winner(tokens, self.n_symbols)[2])

    def _solve(self, tokens: np.ndarray) -> np.ndarray:
        targets = unscored(tokens)
        if self.supervision == "final":
            targets[:, -1] = winner(tokens, self.n_symbols)[0]
            return targets
        rows = np.arange(len(tokens))
        counts = np.zeros((len(tokens), self.n_symbols), np.int64)
        first_seen = np.full((len(tokens), self.n_symbols), tokens.shape[1])
        for t in range(tokens.shape[1]):
            now = tokens[:, t]
            counts[rows, now] += 1
            first_seen[rows, now] = np.minimum(first_seen[rows, now], t)
            tied = counts == counts.max(axis=1, keepdims=True)
            front = np.where(tied, first_seen, tokens.shape[1]).argmin(axis=1)
            alone = tied.sum(axis=1) == 1
            targets[:, t] = front if self.ties == "first" else np.where(alone, front, IGNORE)
        return targets
