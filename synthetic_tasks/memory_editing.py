"""Memory editing: what was written is overwritten, deleted or corrected, and then asked for."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np
import torch

from synthetic_tasks.base import IGNORE, Draw, most_frequent_answer, register, unscored
from synthetic_tasks.keyvalue import ASK, BLANK, MemoryTask, ScatteredTask, changing_values, latest_write
from synthetic_tasks.rng import Rows


def read_log(tokens: np.ndarray, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Present and previous value of every query's key in slots of two tokens, [N,T] each; -100 elsewhere."""
    targets, stale = unscored(tokens), unscored(tokens)
    row = np.arange(len(tokens))
    present = np.full((len(tokens), vocab_size), IGNORE, np.int64)
    previous = present.copy()
    for t in range(0, tokens.shape[1], 2):
        left, right = tokens[:, t], tokens[:, t + 1]
        asked, written = left == ASK, left > ASK
        key = left[written]
        previous[row[written], key] = present[row[written], key]
        present[row[written], key] = right[written]
        targets[asked, t + 1] = present[row[asked], right[asked]]
        stale[asked, t + 1] = previous[row[asked], right[asked]]
    return targets, stale


@register("rebind", "memory editing")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rebind(ScatteredTask):
    """Keys are bound, bound again to new values, and asked for: the latest value wins.

    Definition: time is cut into slots of two tokens. First n_keys different keys are bound (key value).
    Then come n_rebinds slots that bind a random one of them to a new value, always different from the one
    it replaces, and n_queries slots ("?" key) that ask for a random one; all other slots are blank. Queries
    are at random places, one of them in the last slot. A query only asks for keys last bound at least `lag`
    slots before it; where there is no such key the slot stays blank. No rebind is within `lag` slots of the
    last query.
    Tokens: 0 blank, 1 "?", then n_key_tokens keys, then n_value_tokens values. Classes: the same tokens.
    Example: k3 v5  k1 v2  k3 v7  ? k3  . .  ? k1 -> v7 at the k3 after "?", v2 at the last token.
    Scored: the key of every query. `stale(tokens)` gives the value that each asked key had before.
    Source: ours. Zoology's forgetting MQAR is the nearest: there all updates come in one block
    (scattered=false) and may write the old value again.
    Metric: accuracy at queries; share of answers that are stale. Dials: n_keys (load), n_rebinds
    (overwrites), lag, scattered, length.
    Chance: 1/n_keys + (1 - 1/n_keys)/n_value_tokens, the present value of a key picked blindly; one
    value guessed always where there is only one key.
    """

    n_rebinds: int = 4
    """How many times some key is bound again."""
    scattered: bool = True
    """Rebinds at random places among the queries; otherwise in one block right after the first bindings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("n_rebinds", 0)
        self._require_flag("scattered")

    @property
    def _edits(self) -> int:
        return self.n_rebinds

    def stale(self, tokens: torch.Tensor) -> torch.Tensor:
        """The value that the asked key had before its present one, -100 where there was none: int64 [B,T]."""
        return torch.from_numpy(read_log(tokens.numpy(), self.vocab_size)[1])

    def _generate(self, rows: Rows, length: int) -> Draw:
        n, slots = len(rows), length // 2
        row = np.arange(n)[:, None]
        log = self._log(rows, slots, self.scattered)
        value = self._values(rows, log.write_key, log.write_slot)
        latest = latest_write(log.write_key, log.write_slot, log.query_key, log.query_slot, slots)
        grid = np.zeros((n, slots, 2), np.int64)
        grid[row, log.write_slot, 0] = np.take_along_axis(log.key_token, log.write_key, axis=1)
        grid[row, log.write_slot, 1] = value
        grid[row, log.query_slot, 0] = np.where(log.asked, ASK, BLANK)
        query = np.take_along_axis(log.key_token, log.query_key, axis=1)
        grid[row, log.query_slot, 1] = np.where(log.asked, query, BLANK)
        tokens = grid.reshape(n, length)
        targets = unscored(tokens)
        answer = np.take_along_axis(value, latest, axis=1)
        targets[row, 2 * log.query_slot + 1] = np.where(log.asked, answer, IGNORE)
        return Draw(tokens, targets)

    def _values(self, rows: Rows, write_key: np.ndarray, write_slot: np.ndarray) -> np.ndarray:
        """The token that stands after the key in every write, [N,W]. Uses streams from 10 on."""
        return self._first_value + changing_values(rows, 10, write_key, write_slot, self.n_value_tokens)

    def _solve(self, tokens: np.ndarray) -> np.ndarray:
        return read_log(tokens, self.vocab_size)[0]


@register("erase", "memory editing")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Erase(Rebind):
    """Keys are bound, rebound and unbound; an unbound key's query answers "none".

    Definition: as `rebind`, with n_erases more edits, at random places among the rebinds, that unbind a
    random key (key "unbind"; it may be unbound already). The query of a key whose last edit unbound it
    answers "none".
    Tokens: 0 blank, 1 "?", 2 "unbind", 3 "none" (an answer only), then keys, then values. Classes: the same
    tokens.
    Example: k3 v5  k1 v2  k3 unbind  ? k3  ? k1 -> none, v2.
    Scored: the key of every query.
    Source: ours; no public toolkit has deletion on command.
    Metric: accuracy at queries, apart for bound and unbound keys. Dials: n_erases, n_rebinds, n_keys, lag,
    length.
    Chance: the share of the most frequent answer ("none", with the default parameters), measured on fixed
    samples.
    """

    n_erases: int = 4
    """How many times some key is unbound."""

    special: ClassVar[tuple[str, ...]] = (".", "?", "unbind", "none")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("n_erases", 0)

    @property
    def _edits(self) -> int:
        return self.n_rebinds + self.n_erases

    def chance(self, length: int) -> float:
        """The share of the most frequent answer."""
        return most_frequent_answer(self, length)

    def space(self, length: int) -> int:
        """Choices of keys and of the bindings' values, and of the edited keys."""
        free = self.n_keys + self.n_rebinds
        return self.n_keys**self._edits * (self.n_value_tokens - 1) ** free

    def _values(self, rows: Rows, write_key: np.ndarray, write_slot: np.ndarray) -> np.ndarray:
        value = super()._values(rows, write_key, write_slot)
        unbinds = rows.order(11, self._edits) < self.n_erases
        value[:, self.n_keys :] = np.where(unbinds, 2, value[:, self.n_keys :])
        return value

    def _generate(self, rows: Rows, length: int) -> Draw:
        draw = super()._generate(rows, length)
        assert draw.targets is not None
        return Draw(draw.tokens, np.where(draw.targets == 2, 3, draw.targets))

    def _solve(self, tokens: np.ndarray) -> np.ndarray:
        targets = super()._solve(tokens)
        return np.where(targets == 2, 3, targets)


@register("correction", "memory editing")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Correction(MemoryTask):
    """Write, then correct, then query: how much of the old value is left?

    Definition: slots of two tokens. n_keys different keys are bound; `gap` blank slots; n_corrections of
    the keys, different ones in random order, are bound to another value; blank slots that fill the length;
    every key is asked once, in random order.
    Tokens: 0 blank, 1 "?", then keys, then values. Classes: the same tokens.
    Example: k3 v5  k1 v2  . .  k3 v7  . .  ? k1  ? k3 -> v2, v7; stale: v5 at the last.
    Scored: the key of every query. `stale(tokens)` gives the value before the correction, -100 where there
    was none: the share of answers that equal it, or its logit's distance, tells how much is left.
    Source: ours; the write-then-correct probe behind the "memory correction" claim of 2606.12364.
    Metric: accuracy, apart for corrected and other keys; share of stale answers. Dials: gap (age of the old
    value), length (age of the correction), n_corrections, n_keys.
    Chance: 1/n_keys + (1 - 1/n_keys)/n_value_tokens, the present value of a key picked blindly; one
    value guessed always where there is only one key.
    """

    n_keys: int = 4
    """Different keys in a sequence."""
    n_corrections: int = 2
    """Keys whose value is corrected."""
    gap: int = 2
    """Blank slots between the bindings and the corrections."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("n_keys", 1, self.n_key_tokens)
        self._require("n_corrections", 0, self.n_keys)
        self._require("gap", 0)

    @property
    def min_length(self) -> int:
        """Bindings, gap, corrections, queries."""
        return 2 * (2 * self.n_keys + self.gap + self.n_corrections)

    def chance(self, length: int) -> float:
        """The present value of a key picked blindly."""
        return self._blind(self.n_keys)

    def space(self, length: int) -> int:
        """Keys, values, corrections and the order of the queries."""
        keys = math.perm(self.n_key_tokens, self.n_keys) * math.factorial(self.n_keys)
        corrections = (
            math.perm(self.n_keys, self.n_corrections) * (self.n_value_tokens - 1) ** self.n_corrections
        )
        return keys * self.n_value_tokens**self.n_keys * corrections

    def stale(self, tokens: torch.Tensor) -> torch.Tensor:
        """The value that the asked key had before its correction, -100 where there was none: int64 [B,T]."""
        return torch.from_numpy(read_log(tokens.numpy(), self.vocab_size)[1])

    def _generate(self, rows: Rows, length: int) -> Draw:
        n, k, c = len(rows), self.n_keys, self.n_corrections
        key = self._first_key + rows.distinct(self.n_key_tokens, 0, k)
        value = rows.below(self.n_value_tokens, 1, k)
        corrected = rows.distinct(k, 2, c)
        shift = 1 + rows.below(self.n_value_tokens - 1, 3, c)
        changed = (np.take_along_axis(value, corrected, axis=1) + shift) % self.n_value_tokens
        asked = rows.order(4, k)
        grid = np.zeros((n, length // 2, 2), np.int64)
        grid[:, :k, 0], grid[:, :k, 1] = key, self._first_value + value
        edits = slice(k + self.gap, k + self.gap + c)
        grid[:, edits, 0] = np.take_along_axis(key, corrected, axis=1)
        grid[:, edits, 1] = self._first_value + changed
        grid[:, -k:, 0], grid[:, -k:, 1] = ASK, np.take_along_axis(key, asked, axis=1)
        np.put_along_axis(value, corrected, changed, axis=1)
        targets = np.full((n, length), IGNORE, np.int64)
        targets[:, -2 * k + 1 :: 2] = self._first_value + np.take_along_axis(value, asked, axis=1)
        return Draw(grid.reshape(n, length), targets)

    def _solve(self, tokens: np.ndarray) -> np.ndarray:
        return read_log(tokens, self.vocab_size)[0]
