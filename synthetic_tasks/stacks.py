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

    Definition: n tokens: a stack of s uniform symbols from its bottom (s uniform over 1 .. n), then n - s
    uniform actions, "pop" or a push of one of the symbols; popping an empty stack does nothing. Then n + 1
    placeholders, where the answers are the stack from the top, then "end"; what follows is not scored.
    Tokens: the symbols, then the pushes n_symbols + i, then "pop" 2 n_symbols, then the placeholder.
    Classes: the symbols, then "end".
    Example: 0 1 +1 pop pop _ _ _ _ _ _ -> 0 end.
    Scored: placeholders up to "end".
    Source: stack manipulation of Deletang et al. 2023 (n_symbols=2, the default); the xLSTM paper
    (2405.04517, App. B.1.1) has it with chance 1/4.
    Metric: accuracy. Dials: length, n_symbols.
    Chance: the share of the most frequent answer, measured on fixed samples.
    """

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
        filled = 1 + rows.below(n, 1, 1)
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

    Definition: n tokens: a uniform bits, "+", b uniform bits, with a uniform over 1 .. n - 2 and b = n - 1
    - a, lowest bit first; then n - 1 placeholders, where the answers are the sum's bits, lowest first,
    max(a, b) + 1 of them. What follows is not scored.
    Tokens: 0 and 1 the bits, 2 "+", 3 the placeholder. Classes: 0, 1.
    Example: 1 1 + 1 _ _ _ -> 0 0 1.
    Scored: the first max(a, b) + 1 placeholders.
    Source: Deletang et al. 2023 (little-endian).
    Metric: accuracy. Dials: length.
    Chance: the share of the most frequent answer, measured on fixed samples (0 is likelier: the carry bit
    is often 0).
    """

    @property
    def vocab_size(self) -> int:
        """Bits, plus, placeholder."""
        return 4

    @property
    def n_classes(self) -> int:
        """Bits."""
        return 2

    @property
    def min_length(self) -> int:
        """Two bits and their sum."""
        return 5

    @property
    def length_step(self) -> int:
        """A bit and its place in the sum."""
        return 2

    def chance(self, length: int) -> float:
        """The share of the most frequent answer."""
        return most_frequent_answer(self, length)

    def space(self, length: int) -> int:
        """Bits, and the place of the plus."""
        n = (length + 1) // 2
        return 2 ** (n - 1) * (n - 2)

    def _generate(self, rows: Rows, length: int) -> Draw:
        n = (length + 1) // 2
        tokens = np.full((len(rows), length), 3, np.int64)
        tokens[:, :n] = rows.below(2, 0, n)
        plus = 1 + rows.below(n - 2, 1, 1)
        np.put_along_axis(tokens, plus, 2, axis=1)
        return Draw(tokens)

    def _solve(self, tokens: np.ndarray) -> np.ndarray:
        rows, n = len(tokens), (tokens.shape[1] + 1) // 2
        plus = (tokens == 2).argmax(axis=1)
        place = np.arange(n - 1)
        right = plus[:, None] + 1 + place
        padded = np.where(tokens < 2, tokens, 0)
        a = np.where(place < plus[:, None], padded[:, : n - 1], 0)
        b = np.where(right < n, np.take_along_axis(padded, np.minimum(right, n - 1), axis=1), 0)
        targets = unscored(tokens)
        carry = np.zeros(rows, np.int64)
        for i in range(n - 1):
            total = a[:, i] + b[:, i] + carry
            targets[:, n + i] = total & 1
            carry = total >> 1
        scored = place <= np.maximum(plus, n - 1 - plus)[:, None]
        targets[:, n:] = np.where(scored, targets[:, n:], IGNORE)
        return targets

    def token_name(self, token: int) -> str:
        """`0`, `1`, `+`, `_`."""
        return "01+_"[token]
