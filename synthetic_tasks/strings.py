"""String manipulation: read a string, then write another one at placeholder tokens."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from synthetic_tasks.base import IGNORE, Draw, Task, register, unscored
from synthetic_tasks.rng import Rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class StringTask(Task):
    """Read x, n uniform symbols, then answer at the placeholders that follow it.

    Token n_symbols is the placeholder. A subclass says how many placeholders follow n symbols (`outputs`, a
    rule a n + b) and what is answered there.
    """

    n_symbols: int = 10
    """Size of the alphabet."""

    outputs: ClassVar[tuple[int, int]] = (1, 0)
    least: ClassVar[int] = 1

    def __post_init__(self) -> None:
        self._require("n_symbols", 2, 2**16)

    @property
    def vocab_size(self) -> int:
        """The symbols and the placeholder."""
        return self.n_symbols + 1

    @property
    def n_classes(self) -> int:
        """The symbols."""
        return self.n_symbols

    @property
    def min_length(self) -> int:
        """The shortest string and its answer."""
        return self.least * (1 + self.outputs[0]) + self.outputs[1]

    @property
    def length_step(self) -> int:
        """One more symbol and its answers."""
        return 1 + self.outputs[0]

    def chance(self, length: int) -> float:
        """One symbol guessed always."""
        return 1 / self.n_symbols

    def _inputs(self, length: int) -> int:
        return (length - self.outputs[1]) // self.length_step

    def space(self, length: int) -> int:
        """All strings."""
        return self.n_symbols ** self._inputs(length)

    def _read(self, rows: Rows, n: int) -> np.ndarray:
        return rows.below(self.n_symbols, 0, n)

    def _answer(self, x: np.ndarray) -> np.ndarray:
        """The answers [N,outputs] to strings [N,n], -100 where nothing is scored."""
        raise NotImplementedError

    def _generate(self, rows: Rows, length: int) -> Draw:
        n = self._inputs(length)
        tokens = np.full((len(rows), length), self.vocab_size - 1, np.int64)
        tokens[:, :n] = self._read(rows, n)
        return Draw(tokens)

    def _solve(self, tokens: np.ndarray) -> np.ndarray:
        n = self._inputs(tokens.shape[1])
        targets = unscored(tokens)
        targets[:, n:] = self._answer(tokens[:, :n])
        return targets

    def token_name(self, token: int) -> str:
        """The symbol's number, `_` for the placeholder."""
        return "_" if token == self.vocab_size - 1 else str(token)

    def class_name(self, label: int) -> str:
        """The symbol's number."""
        return str(label)


@register("reverse", "counting and stacks")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Reverse(StringTask):
    """Write the string backwards.

    Definition: n uniform symbols, then n placeholders; the answers are the string from its end.
    Tokens: the symbols, then the placeholder n_symbols. Classes: the symbols.
    Example: 3 1 4 _ _ _ -> 4 1 3.
    Scored: all placeholders.
    Source: "reverse string" of Deletang et al. 2023 (n_symbols=2) and of the xLSTM paper (2405.04517, App.
    B.1.1; n_symbols=10); same distribution.
    Metric: accuracy. Dials: length, n_symbols.
    Chance: 1/n_symbols.
    """

    def _answer(self, x: np.ndarray) -> np.ndarray:
        return x[:, ::-1]


@register("repetition", "counting and stacks")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Repetition(StringTask):
    """Write the string again.

    Definition: n uniform symbols, then n placeholders; the answers are the string.
    Tokens: the symbols, then the placeholder n_symbols. Classes: the symbols.
    Example: 3 1 4 _ _ _ -> 3 1 4.
    Scored: all placeholders.
    Source: the xLSTM paper (2405.04517, App. B.1.1), n_symbols=10.
    Metric: accuracy. Dials: length, n_symbols.
    Chance: 1/n_symbols.
    """

    def _answer(self, x: np.ndarray) -> np.ndarray:
        return x


@register("duplicate", "counting and stacks")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Duplicate(StringTask):
    """Write the string twice.

    Definition: n uniform symbols, then 2 n placeholders; the answers are the string twice.
    Tokens: the symbols, then the placeholder n_symbols. Classes: the symbols.
    Example: 3 1 _ _ _ _ -> 3 1 3 1.
    Scored: all placeholders.
    Source: "duplicate string" of Deletang et al. 2023 (n_symbols=2, the default); same distribution.
    Metric: accuracy. Dials: length, n_symbols.
    Chance: 1/n_symbols.
    """

    n_symbols: int = 2
    """Size of the alphabet."""

    outputs: ClassVar[tuple[int, int]] = (2, 0)

    def _answer(self, x: np.ndarray) -> np.ndarray:
        return np.tile(x, (1, 2))


@register("odds_first", "counting and stacks")
@dataclasses.dataclass(frozen=True, kw_only=True)
class OddsFirst(StringTask):
    """Write the symbols at odd places, then those at even places.

    Definition: n uniform symbols, then n placeholders; the answers are x_1 x_3 x_5 ... x_2 x_4 x_6 ...
    Tokens: the symbols, then the placeholder n_symbols. Classes: the symbols.
    Example: 3 1 4 1 5 _ _ _ _ _ -> 3 4 5 1 1.
    Scored: all placeholders.
    Source: Deletang et al. 2023 (n_symbols=2) and the xLSTM paper (2405.04517, App. B.1.1; n_symbols=10).
    Metric: accuracy. Dials: length, n_symbols.
    Chance: 1/n_symbols.
    """

    def _answer(self, x: np.ndarray) -> np.ndarray:
        return np.concatenate([x[:, 0::2], x[:, 1::2]], axis=1)


@register("bucket_sort", "counting and stacks")
@dataclasses.dataclass(frozen=True, kw_only=True)
class BucketSort(StringTask):
    """Write the symbols in ascending order.

    Definition: n uniform symbols, then n placeholders; the answers are the sorted string.
    Tokens: the symbols, then the placeholder n_symbols. Classes: the symbols.
    Example: 3 1 4 1 _ _ _ _ -> 1 1 3 4.
    Scored: all placeholders.
    Source: Deletang et al. 2023 (n_symbols=5) and the xLSTM paper (2405.04517, App. B.1.1; n_symbols=10).
    Metric: accuracy. Dials: length, n_symbols.
    Chance: 1/n_symbols for one symbol guessed always, the published baseline. Guessing from the place in
    the answer does much better, as the i-th smallest of n is nearly known.
    Shortcuts: position 0.53, bag of tokens 0.73 at length 64.
    """

    def _answer(self, x: np.ndarray) -> np.ndarray:
        return np.sort(x, axis=1)


@register("set", "counting and stacks")
@dataclasses.dataclass(frozen=True, kw_only=True)
class OrderedSet(StringTask):
    """Write the different symbols in order of first appearance.

    Definition: n uniform symbols, then n placeholders; the answers are the symbols that occur, each once,
    in the order of their first appearance. What follows is not scored.
    Tokens: the symbols, then the placeholder n_symbols. Classes: the symbols.
    Example: 3 1 3 4 _ _ _ _ -> 3 1 4.
    Scored: as many placeholders as there are different symbols.
    Source: the "set" task of the xLSTM paper (2405.04517, App. B.1.1: n_symbols=126, chance 1/126, so there
    is no end mark); order and scoring as in Benjamin-Walker/structured-linear-cdes.
    Metric: accuracy. Dials: length, n_symbols.
    Chance: 1/n_symbols.
    """

    version: ClassVar[int] = 2

    n_symbols: int = 126
    """Size of the alphabet."""

    def _answer(self, x: np.ndarray) -> np.ndarray:
        rows, n = x.shape
        order = np.argsort(x * n + np.arange(n), axis=1)
        ranked = np.take_along_axis(x, order, axis=1)
        first = np.ones_like(ranked, bool)
        first[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
        fresh = np.zeros_like(first)
        np.put_along_axis(fresh, order, first, axis=1)
        count = np.cumsum(fresh, axis=1)
        out = np.full((rows, n), IGNORE, np.int64)
        row, column = np.nonzero(fresh)
        out[row, count[row, column] - 1] = x[row, column]
        return out


@register("missing_duplicate", "counting and stacks")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MissingDuplicate(StringTask):
    """A string twice, with one hole: which symbol is missing?

    Definition: n uniform symbols written twice; one of the 2 n places, uniform, shows "hole" instead; then
    one placeholder, where the answer is the hidden symbol.
    Tokens: the symbols, then "hole" n_symbols, then the placeholder n_symbols + 1. Classes: the symbols.
    Example: 3 1 4 3 ? 4 _ -> 1.
    Scored: the placeholder.
    Source: Deletang et al. 2023 (n_symbols=2) and the xLSTM paper (2405.04517, App. B.1.1; chance 1/9,
    n_symbols=9).
    Metric: accuracy. Dials: length, n_symbols.
    Chance: 1/n_symbols.
    """

    n_symbols: int = 9
    """Size of the alphabet."""

    @property
    def vocab_size(self) -> int:
        """The symbols, the hole, the placeholder."""
        return self.n_symbols + 2

    @property
    def min_length(self) -> int:
        """One symbol twice, and the placeholder."""
        return 3

    def space(self, length: int) -> int:
        """Strings and holes."""
        return self.n_symbols ** (length // 2) * (length - 1)

    def _generate(self, rows: Rows, length: int) -> Draw:
        n, row = length // 2, np.arange(len(rows))
        tokens = np.full((len(rows), length), self.n_symbols + 1, np.int64)
        tokens[:, :n] = tokens[:, n : 2 * n] = rows.below(self.n_symbols, 0, n)
        hole = rows.below(2 * n, 1, 1)[:, 0]
        targets = unscored(tokens)
        targets[:, -1] = tokens[row, hole]
        tokens[row, hole] = self.n_symbols
        return Draw(tokens, targets)

    def _solve(self, tokens: np.ndarray) -> np.ndarray:
        n = tokens.shape[1] // 2
        hole = (tokens == self.n_symbols).argmax(axis=1)
        targets = unscored(tokens)
        targets[:, -1] = tokens[np.arange(len(tokens)), (hole + n) % (2 * n)]
        return targets

    def token_name(self, token: int) -> str:
        """The symbol's number, `?` for the hole, `_`."""
        return "?" if token == self.n_symbols else super().token_name(token)
