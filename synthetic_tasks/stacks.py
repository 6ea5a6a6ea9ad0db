"""A stack machine and binary addition, read first and answered at placeholders."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from synthetic_tasks.base import IGNORE, Draw, Task, most_frequent_answer, register, unscored
from synthetic_tasks.rng import Rows
from synthetic_tasks.strings import StringTask


@register("stack", "counting and stacks")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Stack(StringTask):
    """Apply pushes and pops to a stack, then write it from the top.

    Definition: n tokens: a stack of s uniform symbols from its bottom (s uniform over 1 .. n - 1,
    or 1 for n = 1), then n - s uniform actions, "pop" or a push of one of the symbols; popping an empty
    stack does nothing. Then n + 1 placeholders, where the answers are the stack from the top, then "end";
    what follows is not scored.
    Tokens: the symbols, then the pushes n_symbols + i, then "pop" 2 n_symbols, then the placeholder.
    Classes: the symbols, then "end".
    Example: 0 1 +1 pop pop _ _ _ _ _ _ -> 0 end.
    Scored: placeholders up to "end".
    Source: stack manipulation of Deletang et al. 2023 (n_symbols=2, the default), same distribution and
    answers; the xLSTM paper (2405.04517, App. B.1.1) has it with 11 tokens and chance 1/4, which fits
    n_symbols=4 without an end mark.
    Metric: accuracy. Dials: length, n_symbols.
    Chance: the share of the most frequent answer, measured on fixed samples.
    """

    version: ClassVar[int] = 2

    n_symbols: int = 2
    """Size of the alphabet."""

    outputs: ClassVar[tuple[int, int]] = (1, 1)

    @property
    def vocab_size(self) -> int:
        """Symbols, pushes, pop, placeholder."""
        return 2 * self.n_symbols + 2

    @property
    def n_classes(self) -> int:
        """The symbols and "end"."""
        return self.n_symbols + 1

    def chance(self, length: int) -> float:
        """The share of the most frequent answer."""
        return most_frequent_answer(self, length)

    def _read(self, rows: Rows, n: int) -> np.ndarray:
        filled = 1 + rows.below(max(n - 1, 1), 1, 1)
        symbols = rows.below(self.n_symbols, 0, n)
        actions = self.n_symbols + rows.below(self.n_symbols + 1, 2, n)
        return np.where(np.arange(n) < filled, symbols, actions)

    def _answer(self, x: np.ndarray) -> np.ndarray:
        rows, n = x.shape
        row, k = np.arange(rows), self.n_symbols
        stack = np.full((rows, n + 1), k, np.int64)
        height = np.zeros(rows, np.int64)
        for t in range(n):
            pushes = x[:, t] < 2 * k
            stack[row[pushes], height[pushes]] = x[pushes, t] % k
            height = np.maximum(height + np.where(pushes, 1, -1), 0)
        column = height[:, None] - 1 - np.arange(n + 1)
        top_down = np.take_along_axis(stack, np.maximum(column, 0), axis=1)
        return np.where(column >= 0, top_down, np.where(column == -1, k, IGNORE))

    def token_name(self, token: int) -> str:
        """`1`, `+1`, `pop`, `_`."""
        k = self.n_symbols
        if token >= 2 * k:
            return "pop" if token == 2 * k else "_"
        return str(token) if token < k else f"+{token - k}"

    def class_name(self, label: int) -> str:
        """The symbol or `end`."""
        return "end" if label == self.n_symbols else str(label)


@register("binary_addition", "counting and stacks")
@dataclasses.dataclass(frozen=True, kw_only=True)
class BinaryAddition(Task):
    """Add two binary numbers.

    Definition: n tokens: a bits, "+", b bits, with a uniform over 1 .. n - 2 and b = n - 1 - a, lowest bit
    first; each number is uniform over those that are not 0. Then n placeholders, where the answers are the
    sum's bits, lowest first, up to its highest 1, then "end". What follows is not scored.
    Tokens: 0 and 1 the bits, 2 "+", 3 the placeholder. Classes: 0, 1, "end".
    Example: 1 1 + 1 _ _ _ _ -> 0 0 1 end.
    Scored: the placeholders up to "end".
    Source: Deletang et al. 2023, same distribution and answers (theirs has one more output, never scored).
    Metric: accuracy. Dials: length.
    Chance: the share of the most frequent answer, measured on fixed samples.
    """

    version: ClassVar[int] = 2

    @property
    def vocab_size(self) -> int:
        """Bits, plus, placeholder."""
        return 4

    @property
    def n_classes(self) -> int:
        """Bits and "end"."""
        return 3

    @property
    def min_length(self) -> int:
        """Two bits, the plus, and their sum."""
        return 6

    @property
    def length_step(self) -> int:
        """A bit and its place in the sum."""
        return 2

    def chance(self, length: int) -> float:
        """The share of the most frequent answer."""
        return most_frequent_answer(self, length)

    def space(self, length: int) -> int:
        """Numbers that are not 0, for every place of the plus."""
        n = length // 2
        return sum((2**a - 1) * (2 ** (n - 1 - a) - 1) for a in range(1, n - 1))

    def _generate(self, rows: Rows, length: int) -> Draw:
        n = length // 2
        tokens = np.full((len(rows), length), 3, np.int64)
        tokens[:, :n] = rows.below(2, 0, n)
        plus = 1 + rows.below(n - 2, 1, 1)
        np.put_along_axis(tokens, plus, 2, axis=1)
        # Numbers that are 0 are drawn again, each with the place of the plus kept.
        for stream, side in ((2, np.arange(n) < plus), (3, np.arange(n) > plus)):
            zero = np.flatnonzero(~((tokens[:, :n] == 1) & side).any(axis=1))
            attempt = 0
            while zero.size:
                attempt += 1
                fresh = Rows(rows.keys[zero]).below(2, stream + (attempt << 12), n)
                tokens[zero, :n] = np.where(side[zero], fresh, tokens[zero, :n])
                zero = zero[~((fresh == 1) & side[zero]).any(axis=1)]
        return Draw(tokens)

    def _solve(self, tokens: np.ndarray) -> np.ndarray:
        rows, n = len(tokens), tokens.shape[1] // 2
        plus = (tokens == 2).argmax(axis=1)
        place = np.arange(n - 1)
        right = plus[:, None] + 1 + place
        padded = np.where(tokens < 2, tokens, 0)
        a = np.where(place < plus[:, None], padded[:, : n - 1], 0)
        b = np.where(right < n, np.take_along_axis(padded, np.minimum(right, n - 1), axis=1), 0)
        total = np.zeros((rows, n), np.int64)
        carry = np.zeros(rows, np.int64)
        for i in range(n - 1):
            both = a[:, i] + b[:, i] + carry
            total[:, i] = both & 1
            carry = both >> 1
        end = np.where(total == 1, np.arange(1, n + 1), 0).max(axis=1)
        total[np.arange(rows), end] = 2
        targets = unscored(tokens)
        targets[:, n:] = np.where(np.arange(n) <= end[:, None], total, IGNORE)
        return targets

    def token_name(self, token: int) -> str:
        """`0`, `1`, `+`, `_`."""
        return "01+_"[token]

    def class_name(self, label: int) -> str:
        """The bit or `end`."""
        return "end" if label == 2 else str(label)
