"""Memory editing: updates of one field of a value, and values that must be summed."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch

from synthetic_tasks.base import IGNORE, Draw, most_frequent_answer, register, unscored
from synthetic_tasks.keyvalue import ASK, BLANK, ScatteredTask, changing_values, latest_write
from synthetic_tasks.rng import Rows


@register("partial_update", "memory editing")
@dataclasses.dataclass(frozen=True, kw_only=True)
class PartialUpdate(ScatteredTask):
    """A value has several fields; an update changes one of them and must leave the others alone.

    Definition: slots of F + 1 tokens for F = n_fields. n_keys different keys are bound, key and F field
    values; then n_updates updates (key, field name, new value) of random fields of random keys, the new
    value always different, and n_queries queries, both at random places; all else is blank. readout="all":
    the query is "?" key and F - 1 blanks, the answers are all fields, the first one at the key.
    readout="field": the query is "?" key, field name, the answer is that field, at its name.
    Tokens: 0 blank, 1 "?", then keys, values, and the F field names. Classes: the same tokens.
    Example: F=2: k3 v3 v5 | k3 f0 v7 | ? k3 . -> v7 at k3, v5 at the blank.
    Scored: the F positions from the key on, or the field name. `field_state(tokens)` tells updated from
    protected fields.
    Source: ours. Prediction: one memory slot a key cannot do it with channel-wise gates alone, since the
    erase clears every value channel of the key: [3, 5], field 0 to 7 with write [1, 0] reads [7, 0]. Models
    solve it by putting the field into the key; readout="field" makes that easy.
    Metric: accuracy, apart for updated and protected fields. Dials: n_fields, n_updates, n_keys, lag, length.
    Chance: 1/n_keys + (1 - 1/n_keys)/n_value_tokens, the present field of a key picked blindly; one
    value guessed always where there is only one key.
    """

    n_fields: int = 2
    """Fields of a value."""
    n_updates: int = 4
    """Updates of one field."""
    readout: str = "all"
    """"all" (the query reads every field) or "field" (it names one)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("n_fields", 2, 64)
        self._require("n_updates", 0)
        self._require_choice("readout", ("all", "field"))

    @property
    def _edits(self) -> int:
        return self.n_updates

    @property
    def _width(self) -> int:
        return self.n_fields + 1

    @property
    def _first_field(self) -> int:
        return self._first_value + self.n_value_tokens

    @property
    def vocab_size(self) -> int:
        """Special tokens, keys, values, field names."""
        return self._first_field + self.n_fields

    def space(self, length: int) -> int:
        """Choices of keys, fields and updates."""
        fields = self.n_value_tokens ** (self.n_keys * self.n_fields)
        updates = (self.n_keys * self.n_fields * (self.n_value_tokens - 1)) ** self.n_updates
        return math.perm(self.n_key_tokens, self.n_keys) * fields * updates

    def _generate(self, rows: Rows, length: int) -> Draw:
        n, f, k, width = len(rows), self.n_fields, self.n_keys, self._width
        slots = length // width
        row = np.arange(n)[:, None]
        log = self._log(rows, slots)
        # A field of a key is a memory of its own: number key * F + field; the bindings write all of them.
        part = rows.below(f, 10, self.n_updates)
        updated_key, update_slot = log.write_key[:, k:], log.write_slot[:, k:]
        cell = np.concatenate([np.tile(np.arange(k * f), (n, 1)), updated_key * f + part], axis=1)
        cell_slot = np.concatenate([np.tile(np.arange(k * f) // f, (n, 1)), update_slot], axis=1)
        value = self._first_value + changing_values(rows, 11, cell, cell_slot, self.n_value_tokens)
        asked_cell = (log.query_key[:, :, None] * f + np.arange(f)).reshape(n, -1)
        latest = latest_write(cell, cell_slot, asked_cell, np.repeat(log.query_slot, f, axis=1), slots)
        fields = np.take_along_axis(value, latest, axis=1).reshape(n, -1, f)

        grid = np.full((n, slots, width), BLANK, np.int64)
        grid[:, :k, 0] = log.key_token
        grid[:, :k, 1:] = value[:, : k * f].reshape(n, k, f)
        grid[row, update_slot, 0] = np.take_along_axis(log.key_token, updated_key, axis=1)
        grid[row, update_slot, 1] = self._first_field + part
        grid[row, update_slot, 2] = value[:, k * f :]
        asked = log.asked
        grid[row, log.query_slot, 0] = np.where(asked, ASK, BLANK)
        grid[row, log.query_slot, 1] = np.where(
            asked, np.take_along_axis(log.key_token, log.query_key, axis=1), BLANK
        )
        answers = np.full((n, slots, width), IGNORE, np.int64)
        if self.readout == "all":
            answers[row, log.query_slot, 1:] = np.where(asked[:, :, None], fields, IGNORE)
        else:
            named = rows.below(f, 12, self.n_queries)
            grid[row, log.query_slot, 2] = np.where(asked, self._first_field + named, BLANK)
            one = np.take_along_axis(fields, named[:, :, None], axis=2)[:, :, 0]
            answers[row, log.query_slot, 2] = np.where(asked, one, IGNORE)
        return Draw(grid.reshape(n, length), answers.reshape(n, length))

    def _read(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        targets, state = unscored(tokens), unscored(tokens)
        f, width = self.n_fields, self._width
        for r, sequence in enumerate(tokens.tolist()):
            fields: dict[int, list[int]] = {}
            touched: dict[int, set[int]] = {}
            for t in range(0, len(sequence), width):
                head, second, third = sequence[t : t + 3]
                if head == ASK:
                    wanted = range(f) if self.readout == "all" else [third - self._first_field]
                    for i, field in enumerate(wanted):
                        place = t + 1 + i if self.readout == "all" else t + 2
                        targets[r, place] = fields[second][field]
                        state[r, place] = 1 if field in touched[second] else 2 if touched[second] else 0
                elif head != BLANK and second >= self._first_field:
                    fields[head][second - self._first_field] = third
                    touched[head].add(second - self._first_field)
                elif head != BLANK:
                    fields[head], touched[head] = sequence[t + 1 : t + width], set()
        return targets, state

    def field_state(self, tokens: torch.Tensor) -> torch.Tensor:
        """What happened to each field that is read, int64 [B,T].

        0: its key was never updated. 1: this field was updated. 2: protected: only other fields of the key
        were. -100: not scored.
        """
        return torch.from_numpy(self._read(tokens.numpy())[1])

    def _solve(self, tokens: np.ndarray) -> np.ndarray:
        return self._read(tokens)[0]

    def token_name(self, token: int) -> str:
        """As for the other memory tasks; field names are `f0`, `f1`, ..."""
        return f"f{token - self._first_field}" if token >= self._first_field else super().token_name(token)


@register("accumulate", "memory editing")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Accumulate(ScatteredTask):
    """The values written under one key must be summed.

    Definition: slots of two tokens. n_keys different keys get a first amount (key amount); then n_adds more
    (key amount) for random keys and n_queries queries ("?" key), both at random places; all else is blank.
    Amounts are uniform over 1 .. n_value_tokens. The answer is the sum of all amounts of the key so far.
    Tokens: 0 blank, 1 "?", then keys, then the amounts. Classes: the sums, from 0.
    Example: k3 +2  k1 +1  k3 +4  ? k3  ? k1 -> 6, 1.
    Scored: the key of every query.
    Source: ours; the delta rule overwrites what it should add to, so it should lose here unless it spreads
    the writes over several keys; sums of the linear-attention kind should win.
    Metric: accuracy at queries. Dials: n_adds, n_keys, n_value_tokens, lag, length.
    Chance: the share of the most frequent sum, measured on fixed samples.
    """

    n_value_tokens: int = 4
    """Largest amount."""
    n_adds: int = 8
    """Amounts after the first one of each key."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("n_adds", 0)

    @property
    def _edits(self) -> int:
        return self.n_adds

    @property
    def n_classes(self) -> int:
        """All sums, should one key get every amount."""
        return (1 + self.n_adds) * self.n_value_tokens + 1

    def chance(self, length: int) -> float:
        """The share of the most frequent sum."""
        return most_frequent_answer(self, length)

    def space(self, length: int) -> int:
        """Choices of keys and amounts."""
        amounts = self.n_value_tokens ** (self.n_keys + self.n_adds) * self.n_keys**self.n_adds
        return math.perm(self.n_key_tokens, self.n_keys) * amounts

    def _generate(self, rows: Rows, length: int) -> Draw:
        n, slots = len(rows), length // 2
        row = np.arange(n)[:, None]
        log = self._log(rows, slots)
        amount = rows.below(self.n_value_tokens, 10, log.write_key.shape[1])
        grid = np.zeros((n, slots, 2), np.int64)
        grid[row, log.write_slot, 0] = np.take_along_axis(log.key_token, log.write_key, axis=1)
        grid[row, log.write_slot, 1] = self._first_value + amount
        grid[row, log.query_slot, 0] = np.where(log.asked, ASK, BLANK)
        query = np.take_along_axis(log.key_token, log.query_key, axis=1)
        grid[row, log.query_slot, 1] = np.where(log.asked, query, BLANK)
        counts = log.write_key[:, None] == log.query_key[:, :, None]
        counts &= log.write_slot[:, None] < log.query_slot[:, :, None]
        total = (counts * (amount + 1)[:, None]).sum(axis=2)
        tokens = grid.reshape(n, length)
        targets = unscored(tokens)
        targets[row, 2 * log.query_slot + 1] = np.where(log.asked, total, IGNORE)
        return Draw(tokens, targets)

    def _solve(self, tokens: np.ndarray) -> np.ndarray:
        targets = unscored(tokens)
        row = np.arange(len(tokens))
        total = np.zeros((len(tokens), self.vocab_size), np.int64)
        for t in range(0, tokens.shape[1], 2):
            left, right = tokens[:, t], tokens[:, t + 1]
            asked, written = left == ASK, left > ASK
            total[row[written], left[written]] += right[written] - self._first_value + 1
            targets[asked, t + 1] = total[row[asked], right[asked]]
        return targets

    def token_name(self, token: int) -> str:
        """As for the other memory tasks; amounts are `+1`, `+2`, ..."""
        return (
            f"+{token - self._first_value + 1}" if token >= self._first_value else super().token_name(token)
        )

    def class_name(self, label: int) -> str:
        """The sum."""
        return str(label)
