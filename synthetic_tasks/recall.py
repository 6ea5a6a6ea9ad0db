"""Recall: keys of several tokens, induction, phone books."""

from __future__ import annotations

import dataclasses

import numpy as np

from synthetic_tasks.base import Draw, Task, register, unscored
from synthetic_tasks.rng import Rows, pack_bits


def keep_distinct(codes: np.ndarray) -> np.ndarray:
    """For codes [N,K]: bool [N,K], false where an earlier entry of the row has the same code."""
    bits = pack_bits(codes.shape[1])
    packed = np.sort((codes << bits) | np.arange(codes.shape[1]), axis=1)
    again = np.zeros(codes.shape, bool)
    row, column = np.nonzero((packed[:, 1:] >> bits) == (packed[:, :-1] >> bits))
    again[row, packed[row, column + 1] & ((1 << bits) - 1)] = True
    return ~again


def scatter_starts(
    rows: Rows, stream: int, sizes: np.ndarray, first: int | np.ndarray, end: int
) -> np.ndarray:
    """Starts [N,K] of items of these sizes, in order, with random gaps between `first` ([N,1]) and `end`."""
    free = end - first - sizes.sum(axis=1, keepdims=True)
    gaps = np.sort(rows.below(free + 1, stream, sizes.shape[1]), axis=1)
    return first + gaps + np.cumsum(sizes, axis=1) - sizes


@register("variable_key_mqar", "recall")
@dataclasses.dataclass(frozen=True, kw_only=True)
class VariableKeyMQAR(Task):
    """Associative recall with keys of one to several tokens and no mark where a key ends.

    Definition: n_pairs different keys, each with a random value, written as key value key value ...; then
    every key is asked once, in random order, at random places among blanks, spelled out in full. A key's
    first token decides its length: token number i (counted from 0) starts keys of 1 + i mod max_key_tokens
    tokens; the other tokens are arbitrary. So no key is the beginning of another, and whether a token joins
    its neighbour depends on content. Lengths are uniform over 1 .. max_key_tokens; a key that is there
    already is drawn again, length included.
    Tokens: 0 blank, then n_key_tokens key tokens, then n_value_tokens values. Classes: the same tokens.
    Example: k1 k5 v2  k2 v7  . k2 . k1 k5 -> v7 at k2, v2 at k5 (max_key_tokens=2).
    Scored: the last token of every query.
    Source: our reconstruction of the variable-key MQAR of the dynamic-convolution study (2606.03825), whose
    generator is unpublished. max_key_tokens=1 is MQAR without its power law.
    Metric: accuracy. Dials: max_key_tokens (composition), n_pairs (load), n_key_tokens (fewer: more shared
    tokens), length.
    Chance: 1/n_pairs + (1 - 1/n_pairs)/n_value_tokens, a value of the context picked blindly. Looking up
    the last token of the key alone does better: 0.60
    at length 64 ("match" among the shortcuts), more with more key tokens.
    """

    n_pairs: int = 8
    """Key-value pairs."""
    max_key_tokens: int = 3
    """Longest key."""
    n_key_tokens: int = 6
    """Alphabet of the keys, at least max_key_tokens."""
    n_value_tokens: int = 64
    """Size of the values' vocabulary."""

    def __post_init__(self) -> None:
        self._require("n_pairs", 1, 8192)
        self._require("max_key_tokens", 1, 4)
        self._require("n_key_tokens", self.max_key_tokens, 4096)
        self._require("n_value_tokens", 2, 2**20)
        if 2 * self.n_pairs > self._keys:
            raise ValueError(
                f"{self.name}: n_pairs={self.n_pairs} needs {2 * self.n_pairs} keys, there are {self._keys}; "
                "use more n_key_tokens or max_key_tokens"
            )

    @property
    def _keys(self) -> int:
        a, most = self.n_key_tokens, self.max_key_tokens
        return sum(len(range(size - 1, a, most)) * a ** (size - 1) for size in range(1, most + 1))

    @property
    def vocab_size(self) -> int:
        """Blank, key tokens, values."""
        return 1 + self.n_key_tokens + self.n_value_tokens

    @property
    def n_classes(self) -> int:
        """Tokens."""
        return self.vocab_size

    @property
    def min_length(self) -> int:
        """Longest keys, written and asked for."""
        return self.n_pairs * (2 * self.max_key_tokens + 1)

    def chance(self, length: int) -> float:
        """A value of the context picked blindly; with one pair, one value guessed always."""
        if self.n_pairs == 1:
            return 1 / self.n_value_tokens
        return 1 / self.n_pairs + (1 - 1 / self.n_pairs) / self.n_value_tokens

    def space(self, length: int) -> int:
        """Choices of values, and of keys less those taken."""
        return max(self._keys - self.n_pairs, 1) ** self.n_pairs * self.n_value_tokens**self.n_pairs

    def _draw_keys(self, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """Different keys: tokens [N,K,L] (from 0, beyond the length arbitrary) and lengths [N,K]."""
        a, most, k = self.n_key_tokens, self.max_key_tokens, self.n_pairs
        n = len(rows)
        key, size = np.zeros((n, k, most), np.int64), np.zeros((n, k), np.int64)
        fresh = np.ones((n, k), bool)
        attempt = 0
        while fresh.any():
            length = 1 + rows.below(most, 1 + (attempt << 12), k)
            # First tokens of that length are length - 1, length - 1 + most, ...
            starts = -(-(a - length + 1) // most)
            token = rows.below(a, 2 + (attempt << 12), k * most).reshape(n, k, most)
            token[:, :, 0] = length - 1 + most * rows.below(starts, 3 + (attempt << 12), k)
            key[fresh], size[fresh] = token[fresh], length[fresh]
            used = np.arange(most) < size[:, :, None]
            code = (np.where(used, key + 1, 0) * (a + 1) ** np.arange(most)).sum(axis=2)
            fresh = ~keep_distinct(code)
            attempt += 1
        return key, size

    def _generate(self, rows: Rows, length: int) -> Draw:
        n, k, most = len(rows), self.n_pairs, self.max_key_tokens
        row = np.arange(n)[:, None]
        key, size = self._draw_keys(rows)
        value = 1 + self.n_key_tokens + rows.below(self.n_value_tokens, 0, k)
        asked = rows.order(4, k)
        query_size = np.take_along_axis(size, asked, axis=1)
        start = np.cumsum(size + 1, axis=1) - size - 1
        end = start[:, -1:] + size[:, -1:] + 1
        query = scatter_starts(rows, 5, query_size, end, length)
        tokens = np.zeros((n, length), np.int64)
        for j in range(most):
            r, c = np.nonzero(size > j)
            tokens[r, start[r, c] + j] = 1 + key[r, c, j]
            r, c = np.nonzero(query_size > j)
            tokens[r, query[r, c] + j] = 1 + key[r, asked[r, c], j]
        tokens[row, start + size] = value
        targets = unscored(tokens)
        targets[row, query + query_size - 1] = np.take_along_axis(value, asked, axis=1)
        return Draw(tokens, targets)

    def _solve(self, tokens: np.ndarray) -> np.ndarray:
        targets = unscored(tokens)
        most, a = self.max_key_tokens, self.n_key_tokens
        for r, sequence in enumerate(tokens.tolist()):
            value_of: dict[tuple[int, ...], int] = {}
            t = 0
            while t < len(sequence):
                if sequence[t] == 0:
                    t += 1
                    continue
                size = 1 + (sequence[t] - 1) % most
                key = tuple(sequence[t : t + size])
                t += size
                if len(value_of) < self.n_pairs:
                    value_of[key] = sequence[t]
                    assert sequence[t] > a
                    t += 1
                else:
                    targets[r, t - 1] = value_of[key]
        return targets

    def token_name(self, token: int) -> str:
        """`.`, `k3`, `v5`."""
        if token == 0:
            return "."
        token -= 1
        return f"k{token}" if token < self.n_key_tokens else f"v{token - self.n_key_tokens}"


@register("induction", "recall")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Induction(Task):
    """What came after the trigger the first time?

    Definition: uniform symbols; a trigger token stands at one random place and again at the end; the answer
    is the symbol that followed it.
    Tokens: the symbols, then the trigger n_symbols. Classes: the symbols.
    Example: 4 2 ! 7 1 5 ! -> 7.
    Scored: the last position.
    Source: the induction-head task of H3 (Fu et al. 2023).
    Metric: accuracy. Dials: length (lag), n_symbols, max_lag.
    Chance: 1/n_symbols.
    Shortcuts: the most frequent symbol of a short sequence (0.14 at length 64).
    """

    n_symbols: int = 16
    """Size of the alphabet."""
    max_lag: int = 0
    """The first trigger is at most this many positions before the last; 0: anywhere."""

    def __post_init__(self) -> None:
        self._require("n_symbols", 2, 2**20)
        self._require("max_lag", 0)
        if self.max_lag == 1:
            raise ValueError(f"{self.name}: max_lag must be 0 or at least 2, got 1")

    @property
    def vocab_size(self) -> int:
        """The symbols and the trigger."""
        return self.n_symbols + 1

    @property
    def n_classes(self) -> int:
        """The symbols."""
        return self.n_symbols

    @property
    def min_length(self) -> int:
        """Trigger, symbol, trigger."""
        return 3

    def chance(self, length: int) -> float:
        """One symbol guessed always."""
        return 1 / self.n_symbols

    def space(self, length: int) -> int:
        """All strings."""
        return self.n_symbols ** (length - 2)

    def _generate(self, rows: Rows, length: int) -> Draw:
        tokens = rows.below(self.n_symbols, 0, length)
        span = min(self.max_lag or length - 1, length - 1) - 1
        place = length - 3 - rows.below(span, 1, 1)
        np.put_along_axis(tokens, place, self.n_symbols, axis=1)
        tokens[:, -1] = self.n_symbols
        targets = unscored(tokens)
        targets[:, -1:] = np.take_along_axis(tokens, place + 1, axis=1)
        return Draw(tokens, targets)

    def _solve(self, tokens: np.ndarray) -> np.ndarray:
        targets = unscored(tokens)
        first = (tokens == self.n_symbols).argmax(axis=1)
        targets[:, -1] = tokens[np.arange(len(tokens)), first + 1]
        return targets

    def token_name(self, token: int) -> str:
        """The symbol's number, `!` for the trigger."""
        return "!" if token == self.n_symbols else str(token)

    def class_name(self, label: int) -> str:
        """The symbol's number."""
        return str(label)


@register("phonebook", "recall")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Phonebook(Task):
    """Look numbers up in a phone book that fills the context.

    Definition: as many entries as the length holds, each a name (all different) and n_digits uniform
    digits; then n_queries times a name of the book, different ones, and n_digits - 1 placeholders; the
    answers are the digits, the first one at the name.
    Tokens: 0-9 the digits, 10 the placeholder, then the names. Classes: the digits.
    Example: A 4 1 B 7 7 A _ -> 4 at A, 1 at the placeholder (n_digits=2).
    Scored: the name and the placeholders of every query.
    Source: the phone-book task of Jelassi et al. 2024 ("Repeat After Me"), with one token a name.
    Metric: accuracy, and whole-sequence accuracy. Dials: length (load: entries grow with it), n_digits.
    Chance: 1/10.
    Shortcuts: "match" (what follows the name) gives the first digit, nothing the others.
    """

    n_digits: int = 4
    """Digits of a number."""
    n_queries: int = 2
    """Names asked for."""
    n_names: int = 1024
    """Size of the names' vocabulary; it bounds the length."""

    def __post_init__(self) -> None:
        self._require("n_digits", 1, 64)
        self._require("n_queries", 1)
        self._require("n_names", self.n_queries, 2**20)

    @property
    def vocab_size(self) -> int:
        """Digits, placeholder, names."""
        return 11 + self.n_names

    @property
    def n_classes(self) -> int:
        """Digits."""
        return 10

    @property
    def length_step(self) -> int:
        """One entry."""
        return 1 + self.n_digits

    @property
    def _query_tokens(self) -> int:
        return self.n_queries * self.n_digits

    @property
    def min_length(self) -> int:
        """An entry for each query."""
        return self._query_tokens + self.n_queries * self.length_step

    @property
    def max_length(self) -> int:
        """All names in use."""
        return self._query_tokens + self.n_names * self.length_step

    def chance(self, length: int) -> float:
        """One digit guessed always."""
        return 0.1

    def space(self, length: int) -> int:
        """The numbers."""
        return 10 ** (self.n_digits * ((length - self._query_tokens) // self.length_step))

    def _generate(self, rows: Rows, length: int) -> Draw:
        n, d, q = len(rows), self.n_digits, self.n_queries
        entries = (length - self._query_tokens) // self.length_step
        book = np.empty((n, entries, 1 + d), np.int64)
        book[:, :, 0] = 11 + rows.distinct(self.n_names, 0, entries)
        book[:, :, 1:] = rows.below(10, 1, entries * d).reshape(n, entries, d)
        asked = rows.distinct(entries, 2, q)
        found = np.take_along_axis(book, asked[:, :, None], axis=1)
        query = np.full((n, q, d), 10)
        query[:, :, 0] = found[:, :, 0]
        tokens = np.concatenate([book.reshape(n, -1), query.reshape(n, -1)], axis=1)
        targets = unscored(tokens)
        targets[:, -q * d :] = found[:, :, 1:].reshape(n, -1)
        return Draw(tokens, targets)

    def _solve(self, tokens: np.ndarray) -> np.ndarray:
        targets = unscored(tokens)
        d, q = self.n_digits, self.n_queries
        book = tokens[:, : -q * d]
        for i in range(tokens.shape[1] - q * d, tokens.shape[1], d):
            place = (book == tokens[:, i : i + 1]).argmax(axis=1)
            targets[:, i : i + d] = np.take_along_axis(book, place[:, None] + 1 + np.arange(d), axis=1)
        return targets

    def token_name(self, token: int) -> str:
        """Digits, `_`, names `n17`."""
        return str(token) if token < 10 else "_" if token == 10 else f"n{token - 11}"

    def class_name(self, label: int) -> str:
        """The digit."""
        return str(label)
