"""Memory editing: what was written is overwritten, deleted, corrected or added to, and then asked for."""

from __future__ import annotations

import dataclasses

import numpy as np

from synthetic_tasks.base import IGNORE, Draw, Task, register, unscored
from synthetic_tasks.keyvalue import changing_values, edit_and_query_slots, eligible_keys, latest_write
from synthetic_tasks.rng import Rows

BLANK, ASK = 0, 1


@register("rebind", "memory editing")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rebind(Task):
    """Keys are bound, bound again to new values, and asked for: the latest value wins.

    Definition: time is cut into slots of two tokens. First n_keys different keys are bound (key value).
    Then come n_rebinds slots that bind a random one of them to a new value, always different from the one
    it replaces, and n_queries slots ("?" key) that ask for a random one; all other slots are blank. Queries
    are at random places, one of them in the last slot. A query only asks for keys last bound at least `lag`
    slots before it; where there is no such key the slot stays blank.
    Tokens: 0 blank, 1 "?", then n_key_tokens keys, then n_value_tokens values. Classes: the same tokens.
    Example: k3 v5  k1 v2  k3 v7  ? k3  . .  ? k1 -> v7 at the k3 after "?", v2 at the last token.
    Scored: the key of every query.
    Source: ours. Zoology's forgetting MQAR is the nearest: there all updates come in one block
    (scattered=false) and may write the old value again.
    Metric: accuracy at queries. Dials: n_keys (load), n_rebinds (overwrites), lag, scattered, length.
    Chance: 1/n_keys + (1 - 1/n_keys)/n_value_tokens, the present value of a key picked blindly.
    """

    n_keys: int = 4
    """Different keys in a sequence."""
    n_rebinds: int = 4
    """How many times some key is bound again."""
    n_queries: int = 4
    """Queries in a sequence (fewer where `lag` leaves no key to ask for)."""
    lag: int = 1
    """Slots from the write that is asked for to its query, at least."""
    scattered: bool = True
    """Rebinds at random places among the queries; otherwise in one block right after the first bindings."""
    n_key_tokens: int = 32
    """Size of the keys' vocabulary."""
    n_value_tokens: int = 32
    """Size of the values' vocabulary."""

    def __post_init__(self) -> None:
        self._require("n_key_tokens", 1, 2**20)
        self._require("n_keys", 1, self.n_key_tokens)
        self._require("n_rebinds", 0)
        self._require("n_queries", 1)
        self._require("lag", 1)
        self._require("n_value_tokens", 2, 2**20)
        self._require_flag("scattered")

    @property
    def vocab_size(self) -> int:
        """Blank, "?", keys, values."""
        return 2 + self.n_key_tokens + self.n_value_tokens

    @property
    def n_classes(self) -> int:
        """Tokens."""
        return self.vocab_size

    @property
    def min_length(self) -> int:
        """All bindings, then the queries or the lag."""
        return 2 * (self.n_keys + self.n_rebinds + max(self.n_queries, self.lag))

    @property
    def length_step(self) -> int:
        """Whole slots."""
        return 2

    def chance(self, length: int) -> float:
        """The present value of a key picked blindly."""
        return 1 / self.n_keys + (1 - 1 / self.n_keys) / self.n_value_tokens

    def space(self, length: int) -> int:
        """Choices of keys, values and queried keys; the placement is not counted."""
        keys = 1
        for i in range(self.n_keys):
            keys *= self.n_key_tokens - i
        values = self.n_value_tokens**self.n_keys * (self.n_value_tokens - 1) ** self.n_rebinds
        return keys * values * self.n_keys**self.n_rebinds

    def _generate(self, rows: Rows, length: int) -> Draw:
        n, slots = len(rows), length // 2
        edit_slot, query_slot = edit_and_query_slots(
            rows, 0, self.n_keys, slots, self.n_rebinds, self.n_queries, self.lag, self.scattered
        )
        write_key = np.empty((n, self.n_keys + self.n_rebinds), np.int64)
        write_key[:, : self.n_keys] = np.arange(self.n_keys)
        write_key[:, self.n_keys :] = rows.below(self.n_keys, 2, self.n_rebinds)
        write_slot = np.concatenate([np.tile(np.arange(self.n_keys), (n, 1)), edit_slot], axis=1)
        values = changing_values(rows, 3, write_key, write_slot, self.n_value_tokens) + 2 + self.n_key_tokens
        query_key = eligible_keys(rows, 4, self.n_keys, write_key, write_slot, query_slot, self.lag, slots)
        asked = query_key >= 0
        query_key = np.maximum(query_key, 0)
        answer = np.take_along_axis(
            values, latest_write(write_key, write_slot, query_key, query_slot, slots), axis=1
        )
        key_token = rows.distinct(self.n_key_tokens, 5, self.n_keys) + 2

        grid = np.zeros((n, slots, 2), np.int64)
        row = np.arange(n)[:, None]
        grid[row, write_slot, 0] = np.take_along_axis(key_token, write_key, axis=1)
        grid[row, write_slot, 1] = values
        grid[row, query_slot, 0] = np.where(asked, ASK, BLANK)
        grid[row, query_slot, 1] = np.where(asked, np.take_along_axis(key_token, query_key, axis=1), BLANK)
        tokens = grid.reshape(n, -1)
        targets = unscored(tokens)
        targets[row, 2 * query_slot + 1] = np.where(asked, answer, IGNORE)
        return Draw(tokens, targets)

    def _solve(self, tokens: np.ndarray) -> np.ndarray:
        targets = unscored(tokens)
        row = np.arange(len(tokens))
        present = np.zeros((len(tokens), self.vocab_size), np.int64)
        for t in range(0, tokens.shape[1], 2):
            left, right = tokens[:, t], tokens[:, t + 1]
            asked, written = left == ASK, left > ASK
            present[row[written], left[written]] = right[written]
            targets[asked, t + 1] = present[row[asked], right[asked]]
        return targets

    def token_name(self, token: int) -> str:
        """`.`, `?`, `k3`, `v5`."""
        if token < 2:
            return ".?"[token]
        token -= 2
        return f"k{token}" if token < self.n_key_tokens else f"v{token - self.n_key_tokens}"
