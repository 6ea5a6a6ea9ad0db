"""Memory editing: keys that resemble each other, and more pairs than the state can hold."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from synthetic_tasks.base import IGNORE, Draw, register, unscored
from synthetic_tasks.keyvalue import ASK, BLANK, MemoryTask, ScatteredTask
from synthetic_tasks.rng import Rows


@register("interference", "memory editing")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Interference(ScatteredTask):
    """Recall with keys of several tokens that share a chosen number of them.

    Definition: slots of K + 1 tokens for K = key_tokens. n_keys keys with random values are bound (key
    tokens, value); then n_queries queries ("?", key tokens) of random keys at random places, one in the
    last slot. In every sequence `similarity` of the K places, drawn anew, hold the same token in all keys;
    in every other place all keys differ.
    Tokens: 0 blank, 1 "?", then key tokens, then values. Classes: the same tokens.
    Example: K=3, similarity=2: k1 k7 k4 v3 | k1 k2 k4 v8 | ? k1 k2 k4 -> v8.
    Scored: the last token of every query.
    Source: ours.
    Metric: accuracy at queries. Dials: similarity (0 .. key_tokens - 1 shared tokens), n_keys, lag, length.
    Chance: 1/n_keys + (1 - 1/n_keys)/n_value_tokens, the value of a key picked blindly. With similarity below
    key_tokens - 1 some single token tells the key, though which place does changes from sequence to sequence.
    """

    key_tokens: int = 3
    """Tokens of a key."""
    similarity: int = 0
    """Tokens that all keys of a sequence share."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("key_tokens", 1, 64)
        self._require("similarity", 0, self.key_tokens - 1)

    @property
    def _width(self) -> int:
        return self.key_tokens + 1

    def space(self, length: int) -> int:
        """Choices of keys and values."""
        free = math.perm(self.n_key_tokens, self.n_keys) ** (self.key_tokens - self.similarity)
        return free * self.n_key_tokens**self.similarity * self.n_value_tokens**self.n_keys

    def _generate(self, rows: Rows, length: int) -> Draw:
        n, k, size = len(rows), self.n_keys, self.key_tokens
        row, slots = np.arange(n)[:, None], length // self._width
        log = self._log(rows, slots)
        shared = rows.order(10, size) < self.similarity
        key = np.stack([rows.distinct(self.n_key_tokens, 12 + i, k) for i in range(size)], axis=2)
        key = self._first_key + np.where(shared[:, None], key[:, :1], key)
        value = self._first_value + rows.below(self.n_value_tokens, 11, k)
        grid = np.full((n, slots, self._width), BLANK, np.int64)
        grid[:, :k, :-1], grid[:, :k, -1] = key, value
        grid[row, log.query_slot, 0] = np.where(log.asked, ASK, BLANK)
        query = np.take_along_axis(key, log.query_key[:, :, None], axis=1)
        grid[row, log.query_slot, 1:] = np.where(log.asked[:, :, None], query, BLANK)
        tokens = grid.reshape(n, length)
        targets = unscored(tokens)
        answer = np.take_along_axis(value, log.query_key, axis=1)
        targets[row, self._width * log.query_slot + size] = np.where(log.asked, answer, IGNORE)
        return Draw(tokens, targets)

    def _solve(self, tokens: np.ndarray) -> np.ndarray:
        n, k, width = len(tokens), self.n_keys, self._width
        grid = tokens.reshape(n, -1, width)
        same = (grid[:, k:, None, 1:] == grid[:, None, :k, :-1]).all(axis=3)
        answer = np.take_along_axis(grid[:, :k, -1], same.argmax(axis=2), axis=1)
        targets = unscored(tokens).reshape(n, -1, width)
        targets[:, k:, -1] = np.where(grid[:, k:, 0] == ASK, answer, IGNORE)
        return targets.reshape(n, -1)


@register("capacity", "memory editing")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Capacity(MemoryTask):
    """As many pairs as the length holds, from few to far beyond the state's size; some are asked for.

    Definition: slots of two tokens; T/2 - n_queries different keys with random values (key value), then
    n_queries queries ("?" key) of different keys. A model trained at several lengths gives accuracy against
    load.
    Tokens: 0 blank (not used), 1 "?", then keys, then values. Classes: the same tokens.
    Example: k3 v5  k1 v2  k8 v5  ? k1 -> v2.
    Scored: the key of every query.
    Source: ours; MQAR with a load that the length sets, and without blanks.
    Metric: accuracy at queries. Dials: length (load), n_queries, n_key_tokens and n_value_tokens.
    Chance: for n pairs 1/n + (1 - 1/n)/n_value_tokens, a value of the context picked blindly.
    """

    n_queries: int = 8
    """Keys asked for."""
    n_key_tokens: int = 4096
    """Size of the keys' vocabulary; it bounds the length."""
    n_value_tokens: int = 64
    """Size of the values' vocabulary."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("n_queries", 1, self.n_key_tokens)

    @property
    def min_length(self) -> int:
        """A pair for each query."""
        return 4 * self.n_queries

    @property
    def max_length(self) -> int:
        """All keys in use."""
        return 2 * (self.n_key_tokens + self.n_queries)

    def chance(self, length: int) -> float:
        """A value of the context, picked blindly."""
        return self._blind(length // 2 - self.n_queries)

    def space(self, length: int) -> int:
        """Choices of values, and of the first key."""
        return self.n_value_tokens ** (length // 2 - self.n_queries) * self.n_key_tokens

    def _generate(self, rows: Rows, length: int) -> Draw:
        n, q, pairs = len(rows), self.n_queries, length // 2 - self.n_queries
        grid = np.empty((n, length // 2, 2), np.int64)
        grid[:, :pairs, 0] = self._first_key + rows.distinct(self.n_key_tokens, 0, pairs)
        grid[:, :pairs, 1] = self._first_value + rows.below(self.n_value_tokens, 1, pairs)
        asked = rows.distinct(pairs, 2, q)
        grid[:, pairs:, 0], grid[:, pairs:, 1] = ASK, np.take_along_axis(grid[:, :pairs, 0], asked, axis=1)
        targets = np.full((n, length), IGNORE, np.int64)
        targets[:, 2 * pairs + 1 :: 2] = np.take_along_axis(grid[:, :pairs, 1], asked, axis=1)
        return Draw(grid.reshape(n, length), targets)

    def _solve(self, tokens: np.ndarray) -> np.ndarray:
        targets = unscored(tokens)
        context = tokens.shape[1] - 2 * self.n_queries
        row = np.arange(len(tokens))
        value_of = np.zeros((len(tokens), self.vocab_size), np.int64)
        for t in range(0, context, 2):
            value_of[row, tokens[:, t]] = tokens[:, t + 1]
        targets[:, context + 1 :: 2] = np.take_along_axis(value_of, tokens[:, context + 1 :: 2], axis=1)
        return targets
