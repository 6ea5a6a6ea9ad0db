"""Counting: majorities and counted languages."""

from __future__ import annotations

import dataclasses

import numpy as np

from synthetic_tasks.base import IGNORE, Draw, Task, most_frequent_answer, register, unscored
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
    Shortcuts: the bag of tokens is the task itself.
    Chance: 1/n_symbols, by symmetry. Answering with the last symbol, or the first, does better at short
    lengths (the winner occurs more often than the others): 0.06 at length 64 with 63 symbols.
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


@register("majority_count", "counting and stacks")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MajorityCount(Task):
    """How often does the most frequent symbol occur?

    Definition: form="capped" (published): T independent uniform symbols, the answer is the highest count,
    capped at n_classes. form="share" (comparable at all lengths): one symbol has a strict majority and its
    margin, count of this symbol less count of all others, is uniform over the possible ones; the answer is
    the margin's share of T in n_classes equal bins (class c: above c / n_classes, up to (c + 1) / n_classes).
    Tokens: the symbols 0 .. n_symbols-1. Classes: capped: class c-1 is the count c; share: the bins.
    Example: capped, 2 0 2 1 -> count 2, class 1. Share with 4 bins, 2 0 2 2 -> margin 2 of 4, class 1.
    Scored: the last position.
    Source: capped is that of the xLSTM paper (2405.04517, App. B.1.1) with 63 symbols. Its classes cannot
    be compared across lengths: with 63 symbols the highest count averages 6.0 at length 128 and 46.6 at
    2048, so at a longer length nearly every answer is a class that training never showed, and a softmax
    head cannot name it. In the share form every class occurs at every length of at least 2 n_classes.
    Metric: accuracy. Dials: n_classes, n_symbols, length.
    Chance: the share of the most frequent class, measured on fixed samples for capped; for share the exact
    share of the margins that fall in the largest bin.
    """

    form: str = "share"
    """"capped" (published) or "share" (comparable across lengths)."""
    n_symbols: int = 63
    """Size of the alphabet."""
    n_classes: int = 16
    """Bins, or the cap of the count (63 as published)."""

    def __post_init__(self) -> None:
        self._require_choice("form", ("capped", "share"))
        self._require("n_symbols", 2, 2**16)
        self._require("n_classes", 2, 2**16)

    @property
    def vocab_size(self) -> int:
        """The symbols."""
        return self.n_symbols

    @property
    def min_length(self) -> int:
        """Every bin can occur."""
        return 2 * self.n_classes if self.form == "share" else 1

    def chance(self, length: int) -> float:
        """The share of the most frequent class."""
        if self.form == "capped":
            return most_frequent_answer(self, length)
        margins = np.arange(2 - length % 2, length + 1, 2)
        return float(np.bincount(self._bin(margins, length)).max() / len(margins))

    def space(self, length: int) -> int:
        """All strings; in the share form, at least those that open with the smallest possible majority."""
        free = length if self.form == "capped" else length - length // 2 - 1
        return self.n_symbols**free

    def _bin(self, margin: np.ndarray, length: int) -> np.ndarray:
        return (margin * self.n_classes - 1) // length

    def _generate(self, rows: Rows, length: int) -> Draw:
        if self.form == "capped":
            return Draw(rows.below(self.n_symbols, 0, length))
        least = length // 2 + 1
        count = least + rows.below(length - least + 1, 1, 1)
        symbol = rows.below(self.n_symbols, 2, 1)
        others = (symbol + 1 + rows.below(self.n_symbols - 1, 0, length)) % self.n_symbols
        return Draw(np.where(rows.order(3, length) < count, symbol, others))

    def _solve(self, tokens: np.ndarray) -> np.ndarray:
        count, length = winner(tokens, self.n_symbols)[1], tokens.shape[1]
        targets = unscored(tokens)
        if self.form == "capped":
            targets[:, -1] = np.minimum(count, self.n_classes) - 1
        else:
            targets[:, -1] = self._bin(2 * count - length, length)
        return targets

    def class_name(self, label: int) -> str:
        """The count, or the bin."""
        return str(label + 1) if self.form == "capped" else f"bin{label}"
