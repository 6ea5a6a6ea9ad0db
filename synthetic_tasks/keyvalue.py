"""Logs of writes and queries: what the memory-editing tasks share.

Time is counted in slots. A write or a query is a (key, slot) pair; arrays are int64 [N,W] and [N,Q].
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, NamedTuple

import numpy as np

from synthetic_tasks.base import Task
from synthetic_tasks.rng import Rows

BLANK, ASK = 0, 1


def latest_write(
    write_key: np.ndarray, write_slot: np.ndarray, query_key: np.ndarray, query_slot: np.ndarray, n_slots: int
) -> np.ndarray:
    """The number of the last write of each query's key before its slot, or -1: int64 [N,Q]."""
    rows, writes = write_key.shape
    code = write_key * n_slots + write_slot
    order = np.argsort(code, axis=1)
    span = (max(int(write_key.max()), int(query_key.max())) + 1) * n_slots
    base = (np.arange(rows) * span)[:, None]
    flat = (np.take_along_axis(code, order, axis=1) + base).reshape(-1)
    wanted = query_key * n_slots + query_slot + base
    place = np.searchsorted(flat, wanted.reshape(-1)).reshape(wanted.shape) - 1
    found = (place >= 0) & (flat[np.maximum(place, 0)] // n_slots == wanted // n_slots)
    column = np.where(found, place - np.arange(rows)[:, None] * writes, 0)
    return np.where(found, np.take_along_axis(order, column, axis=1), -1)


def changing_values(
    rows: Rows, stream: int, write_key: np.ndarray, write_slot: np.ndarray, n_values: int
) -> np.ndarray:
    """Uniform values below n_values, each different from the value that it replaces: int64 [N,W]."""
    n, writes = write_key.shape
    order = np.argsort(write_key * (int(write_slot.max()) + 1) + write_slot, axis=1)
    sorted_key = np.take_along_axis(write_key, order, axis=1)
    first = np.ones((n, writes), bool)
    first[:, 1:] = sorted_key[:, 1:] != sorted_key[:, :-1]
    # A value is its predecessor plus a non-zero step modulo n_values; a key's first value is uniform.
    step = rows.below(np.where(first, n_values, n_values - 1), stream, writes) + ~first
    total = np.cumsum(step, axis=1)
    before = np.maximum.accumulate(np.where(first, total - step, 0), axis=1)
    values = np.empty_like(step)
    np.put_along_axis(values, order, (total - before) % n_values, axis=1)
    return values


def eligible_keys(
    rows: Rows,
    stream: int,
    n_keys: int,
    write_key: np.ndarray,
    write_slot: np.ndarray,
    query_slot: np.ndarray,
    lag: int,
    n_slots: int,
) -> np.ndarray:
    """A uniform key for every query among those last written >= lag slots before it, or -1: int64 [N,Q]."""
    n, queries = query_slot.shape
    if lag <= 1:
        return rows.below(n_keys, stream, queries)
    key = np.tile(np.arange(n_keys), (n, queries))
    slot = np.repeat(query_slot, n_keys, axis=1)
    last = np.take_along_axis(write_slot, latest_write(write_key, write_slot, key, slot, n_slots), axis=1)
    old = (slot - last >= lag).reshape(n, queries, n_keys)
    count = old.sum(axis=2)
    rank = rows.below(np.maximum(count, 1), stream, queries)
    pick = (np.cumsum(old, axis=2) > rank[:, :, None]).argmax(axis=2)
    return np.where(count > 0, pick, -1)


def edit_and_query_slots(
    rows: Rows, stream: int, first: int, n_slots: int, n_edits: int, n_queries: int, lag: int, scattered: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Different slots for edits and queries, each sorted in time: int64 [N,edits], [N,queries].

    The slots are in first..n_slots-1. One query is in the last slot and no edit is within `lag` slots of
    it, so at least one query can always be old enough. Edits are at uniformly random places before that,
    or, if not scattered, in one block at `first`. Needs n_slots - first >= n_edits + max(n_queries, lag).
    """
    n, region = len(rows), n_slots - first
    if scattered:
        edits = np.sort(rows.distinct(region - max(lag, 1), stream, n_edits), axis=1)
    else:
        edits = np.tile(np.arange(n_edits), (n, 1))
    taken = np.zeros((n, region - 1), bool)
    np.put_along_axis(taken, edits, True, axis=1)
    if not scattered:
        taken[:, :n_edits] = True
    queries = np.empty((n, n_queries), np.int64)
    queries[:, :-1] = np.sort(rows.order(stream + 1, region - 1, last=taken)[:, : n_queries - 1], axis=1)
    queries[:, -1] = region - 1
    return edits + first, queries + first


class Log(NamedTuple):
    """A sequence's writes (first the n_keys bindings, then the edits) and queries, in slots."""

    write_key: np.ndarray
    write_slot: np.ndarray
    query_key: np.ndarray
    query_slot: np.ndarray
    asked: np.ndarray
    """bool [N,Q]; false where `lag` left no key to ask for."""
    key_token: np.ndarray
    """int64 [N,n_keys]: the token of each key."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryTask(Task):
    """Special tokens, then keys, then values; a query begins with "?"."""

    n_key_tokens: int = 32
    """Size of the keys' vocabulary."""
    n_value_tokens: int = 32
    """Size of the values' vocabulary."""

    special: ClassVar[tuple[str, ...]] = (".", "?")

    def __post_init__(self) -> None:
        self._require("n_key_tokens", 1, 2**20)
        self._require("n_value_tokens", 2, 2**20)

    @property
    def _first_key(self) -> int:
        return len(self.special)

    @property
    def _first_value(self) -> int:
        return self._first_key + self.n_key_tokens

    @property
    def vocab_size(self) -> int:
        """Special tokens, keys, values."""
        return self._first_value + self.n_value_tokens

    @property
    def n_classes(self) -> int:
        """Tokens."""
        return self.vocab_size

    @property
    def _width(self) -> int:
        """Tokens of a slot."""
        return 2

    @property
    def length_step(self) -> int:
        """Whole slots."""
        return self._width

    def _blind(self, n_keys: int) -> float:
        """How often the present value of a key picked blindly is right; of one key, a constant guess."""
        if n_keys == 1:
            return 1 / self.n_value_tokens
        return 1 / n_keys + (1 - 1 / n_keys) / self.n_value_tokens

    def token_name(self, token: int) -> str:
        """Special tokens, keys `k3`, values `v5`."""
        if token < len(self.special):
            return self.special[token]
        if token < self._first_value:
            return f"k{token - self._first_key}"
        return f"v{token - self._first_value}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScatteredTask(MemoryTask):
    """Keys are bound in the first n_keys slots; edits and queries follow at random places."""

    n_keys: int = 4
    """Different keys in a sequence."""
    n_queries: int = 4
    """Queries in a sequence (fewer where `lag` leaves no key to ask for)."""
    lag: int = 1
    """Slots from the last write of the key that is asked for to its query, at least."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("n_keys", 1, self.n_key_tokens)
        self._require("n_queries", 1)
        self._require("lag", 1)

    @property
    def _edits(self) -> int:
        return 0

    @property
    def min_length(self) -> int:
        """All writes, then the queries or the lag."""
        return self._width * (self.n_keys + self._edits + max(self.n_queries, self.lag))

    def chance(self, length: int) -> float:
        """The present value of a key picked blindly."""
        return self._blind(self.n_keys)

    def space(self, length: int) -> int:
        """Choices of keys, values and edited keys; places and queries are not counted."""
        values = self.n_value_tokens**self.n_keys * (self.n_keys * (self.n_value_tokens - 1)) ** self._edits
        return math.perm(self.n_key_tokens, self.n_keys) * values

    def _log(self, rows: Rows, slots: int, scattered: bool = True) -> Log:
        """Draw everything but the values. Uses streams 0 to 9."""
        n, k, edits = len(rows), self.n_keys, self._edits
        edit_slot, query_slot = edit_and_query_slots(
            rows, 0, k, slots, edits, self.n_queries, self.lag, scattered
        )
        bound = np.tile(np.arange(k), (n, 1))
        write_key = np.concatenate([bound, rows.below(k, 2, edits)], axis=1)
        write_slot = np.concatenate([bound, edit_slot], axis=1)
        query_key = eligible_keys(rows, 3, k, write_key, write_slot, query_slot, self.lag, slots)
        key_token = self._first_key + rows.distinct(self.n_key_tokens, 4, k)
        return Log(write_key, write_slot, np.maximum(query_key, 0), query_slot, query_key >= 0, key_token)
