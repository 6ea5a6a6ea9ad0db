"""How well a memory edits: what is left of an old value after its key is written again, and what the edit
does to the other keys.

Everything is read out linearly along the key k_hat = k / ||k|| that a binding was written with. Beside the
values, the memory carries one column for every live binding, u_t = M_t ... M_{s+1} k_s, so that k_hat_s^T u_t
is the weight with which the value bound at s is still found under its key, exactly and without a probe.
This takes a token that writes one value under one key: none of DeltaProduct's is the key of a binding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import synthetic_tasks

HELD = 0.05
"""Below this share of its first weight a value is not held any more: what is left of it would be noise."""


class Event(NamedTuple):
    """One write of a key, by its column among the keys of its sequence."""

    sequence: int
    position: int
    column: int


def last_two_writes(
    writes: synthetic_tasks.Writes, asks: synthetic_tasks.Asks
) -> dict[tuple[int, int], tuple[range, range]]:
    """(sequence, position of a question) -> positions of the last two writes of its key, the earlier first.

    Questions of keys that were written once only are left out.
    """
    written: dict[tuple[int, int], list[range]] = defaultdict(list)
    for b, first, last, key in zip(*(x.tolist() for x in writes), strict=True):
        written[b, key].append(range(first, last + 1))
    found = {}
    for b, t, key in zip(*(x.tolist() for x in asks), strict=True):
        earlier = [place for place in written[b, key] if place.stop <= t]
        if len(earlier) > 1:
            found[b, t] = earlier[-2], earlier[-1]
    return found


def previous_write_share(weights: Tensor, token: int, places: tuple[range, range]) -> Tensor:
    """W_1 / (W_1 + W_2), W_i the sum of |w(t,s)| over the positions s of write i, 2 the last one.

    Args:
        weights: [H,L], contributions to the read at ``token``, lag 0 first.
        token: t.
        places: Positions of the earlier and of the last write.

    Returns:
        [H]; NaN where one of the writes is further back than L tokens, or nothing is read of both.
    """
    if token - places[0].start >= weights.shape[-1]:
        return torch.full(weights.shape[:1], torch.nan, dtype=weights.dtype)
    old, new = (weights[:, [token - s for s in place]].abs().sum(-1) for place in places)
    return old / (old + new)


class Edits:
    """Follows the bindings of every sequence through the memory of one block.

    Args:
        events: Writes by sequence, first position, last position and key, int64 [N] each.
    """

    def __init__(self, sequence: Tensor, start: Tensor, position: Tensor, key: Tensor) -> None:
        self.starts: dict[int, list[int]] = defaultdict(list)
        self.events: dict[int, list[Event]] = defaultdict(list)
        columns: dict[tuple[int, int], int] = {}
        per_sequence: dict[int, int] = defaultdict(int)
        for b, first, last, name in zip(*(x.tolist() for x in (sequence, start, position, key)), strict=True):
            if (b, name) not in columns:
                columns[b, name] = per_sequence[b]
                per_sequence[b] += 1
            self.starts[first - 1].append(b)
            self.events[last].append(Event(b, last, columns[b, name]))
        self.width = max(per_sequence.values(), default=0)
        """Columns that the memory has beyond those of the values."""
        self._keys = self._before = torch.empty(0)

    def begin(self, state: Tensor) -> None:
        """Start a pass with the memory before the first token, [B,H,K,V+N]."""
        # The key of each live binding, 0 where there is none, and the memory before the write that goes on.
        self._keys = state.new_zeros(state.shape[0], self.width, *state.shape[1:3])
        self._before = state.clone()

    def stops(self, start: int, stop: int) -> list[int]:
        """The tokens in start .. stop-1 that :meth:`at` must be called after."""
        return [t for t in range(start, stop) if t in self.starts or t in self.events]

    def at(
        self,
        t: int,
        state: Tensor,
        k: Tensor,
        z: Tensor,
        emit: Callable[[str, Event, Tensor, int], None],
    ) -> None:
        """Look at the memory after token t; bindings made there enter its columns.

        Args:
            t: Token of the sequence.
            state: [B,H,K,V+N] after the token; its last N columns are changed.
            k: [B,H,K], the keys of token t.
            z: [B,H,V], the values that it wrote.
            emit: Called with a quantity, the write, its value [H] and the number of keys it is a mean over.
        """
        V = z.shape[-1]
        for event in self.events.get(t, ()):
            b, column = event.sequence, event.column
            for name, (value, count) in edit_quality(
                self._before[b], state[b], self._keys[b], column, k[b], z[b]
            ).items():
                emit(name, event, value, count)
            self._keys[b, column] = k[b]
            state[b, :, :, V + column] = k[b]
        for b in self.starts.get(t, ()):
            self._before[b] = state[b]


def edit_quality(
    before: Tensor, after: Tensor, keys: Tensor, column: int, k: Tensor, z: Tensor
) -> Mapping[str, tuple[Tensor, int]]:
    """Measure one write of one sequence.

    Args:
        before: [H,K,V+N], the memory and its columns of bindings before the write.
        after: The same after it.
        keys: [N,H,K], the keys of the live bindings; 0 where there is none.
        column: Which of them is written again.
        k: [H,K], the key of the write.
        z: [H,V], the value that it wrote.

    Returns:
        Quantity -> value [H] (NaN where it is not defined) and the number of keys it is a mean over.
    """
    V = z.shape[-1]
    unit = F.normalize(keys, dim=-1, eps=1e-30)
    size = keys.norm(dim=-1)
    # [N,H]: the weight of each binding under its own key, before and after
    held, left = (torch.einsum("nhk,hkn->nh", unit, x[..., V:]) for x in (before, after))
    there = held.abs() > HELD * size
    ratio = (left / held).masked_fill(~there, torch.nan)
    live = size.amax(-1) > 0
    others = live.clone()
    others[column] = False
    found: dict[str, tuple[Tensor, int]] = {}
    if live[column]:
        found["old_value_held"] = held[column] / size[column], 1
        found["old_value_left"] = ratio[column], 1
    key = F.normalize(k, dim=-1, eps=1e-30)
    wrote = k.norm(dim=-1)[:, None] * z
    error = (key[:, None] @ after[..., :V])[:, 0] - wrote
    found["overwrite_error"] = error.norm(dim=-1) / wrote.norm(dim=-1), 1
    count = int(others.sum())
    if count:
        found["other_value_left"] = ratio[others].nanmean(0), count
        change, old = (
            torch.einsum("nhk,hkv->nhv", unit[others], x[..., :V]).norm(dim=-1)
            for x in (after - before, before)
        )
        known = there[others] & (old > 0)
        found["interference"] = (change / old).masked_fill(~known, torch.nan).nanmean(0), count
        found["key_similarity"] = (unit[others] * key).sum(-1).abs().amax(0), count
    return found
