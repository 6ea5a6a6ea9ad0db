"""Logs of writes and queries: the bookkeeping that the memory-editing tasks share.

Time is counted in slots. A write or a query is a (key, slot) pair; arrays are int64 [N,W] and [N,Q].
"""

from __future__ import annotations

import numpy as np

from synthetic_tasks.rng import Rows


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
