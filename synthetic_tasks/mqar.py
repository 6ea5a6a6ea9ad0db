"""Multi-query associative recall."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar

import numpy as np

from synthetic_tasks.base import EXHAUSTIBLE_BELOW, Draw, Task, register, unscored
from synthetic_tasks.rng import Rows, fingerprint, power_slowness, set_fingerprint


def at_least(count: int, limit: int = EXHAUSTIBLE_BELOW) -> bool:
    """Whether a space is large enough to be partitioned."""
    return count >= limit


@register("mqar", "recall")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MQAR(Task):
    """Which value came with this key? Several keys are asked for.

    Definition: n_pairs different keys with n_pairs different values, written as key value key value ... in
    the first 2 n_pairs tokens. The rest is cut into slots of two tokens; every key is asked once, in a slot
    drawn with probability proportional to slot^(power-1) without replacement (small powers: near the start
    of that region). A query is the key in its slot's first token; the value is not written after it.
    Tokens: 0 blank, keys 1 .. V/2-1, values V/2 .. V-1 for V = vocab_size. Classes: the same tokens.
    Example: k3 v1 k5 v4 . . k5 . k3 . -> at the second k5 the answer is v4, at the second k3 it is v1.
    Scored: the queries, n_pairs positions a sequence.
    Source: Zoology (Arora et al. 2023), zoology/data/multiquery_ar.py. Its defects are off: fillers come
    from the sample's own stream and never equal a key of the context (theirs do in a third of the examples
    at 256/16), and the order of the queries says nothing about the order of the pairs (theirs: rank
    correlation 0.5 at n_pairs = length/4). compat="zoology" brings the last two back: fillers (with
    filler="noise", the default of the published generator; its Figure 2 has none) from the whole
    vocabulary, the i-th pair into the i-th slot drawn; then `solve` may also answer fillers that happen to
    equal a key. Zoology wants length below V.
    Metric: accuracy at queries. Dials: n_pairs (load), power (lag), length, vocab_size.
    Chance: 1/n_pairs, a value of the context picked blindly.
    Splits: a set of pairs belongs to one split, in whatever order and place it comes (where there are fewer
    than a million such sets, the whole sequence decides instead).
    """

    n_pairs: int = 8
    """Key-value pairs in the context."""
    vocab_size: int = 8192
    """Number of tokens, even: half for keys, half for values."""
    power: float = 0.01
    """Exponent of the distribution of the queries' slots: 0.01 as published, 1 is uniform."""
    filler: str = "blank"
    """What stands between: "blank" (token 0) or "noise" (random tokens)."""
    compat: str = "none"
    """"zoology" brings back the published generator's order leak and colliding fillers."""

    def __post_init__(self) -> None:
        self._require("n_pairs", 1)
        self._require("vocab_size", 4, 2**24)
        self._require_choice("filler", ("blank", "noise"))
        self._require_choice("compat", ("none", "zoology"))
        if self.vocab_size % 2 or self.n_pairs >= self.vocab_size // 2:
            raise ValueError(
                f"{self.name}: vocab_size must be even and above 2 * n_pairs = {2 * self.n_pairs}, "
                f"got {self.vocab_size}"
            )
        if (
            isinstance(self.power, bool)
            or not isinstance(self.power, int | float)
            or not 0 <= self.power <= 1
        ):
            raise ValueError(f"{self.name}: power must be a number from 0 to 1, got {self.power!r}")

    @property
    def n_classes(self) -> int:
        """Tokens."""
        return self.vocab_size

    @property
    def min_length(self) -> int:
        """The pairs and one slot for each query."""
        return 4 * self.n_pairs

    @property
    def length_step(self) -> int:
        """Whole slots."""
        return 2

    def chance(self, length: int) -> float:
        """A value of the context, picked blindly; with one pair, one value guessed always."""
        return 1 / self.n_pairs if self.n_pairs > 1 else 2 / self.vocab_size

    @functools.cached_property
    def _bindings(self) -> int:
        half = self.vocab_size // 2
        return math.comb(half - 1, self.n_pairs) * math.perm(half, self.n_pairs)

    def space(self, length: int) -> int:
        """Sets of pairs, times their orders, times the placements of the queries."""
        slots = length // 2 - self.n_pairs
        return self._bindings * math.factorial(self.n_pairs) * math.perm(slots, self.n_pairs)

    def _generate(self, rows: Rows, length: int) -> Draw:
        n, k, half = len(rows), self.n_pairs, self.vocab_size // 2
        keys = rows.distinct(half - 1, 0, k)
        keys += 1
        values = rows.distinct(half, 1, k)
        values += half
        slots = self._slots(rows, length // 2 - k)
        asked = 2 * (k + slots) + (np.arange(n) * length)[:, None]

        tokens = self._filler(rows, length, keys)
        tokens[:, 0 : 2 * k : 2] = keys
        tokens[:, 1 : 2 * k : 2] = values
        tokens.reshape(-1)[asked] = keys
        targets = unscored(tokens)
        targets.reshape(-1)[asked] = values
        if at_least(self._bindings):
            content = set_fingerprint(keys * self.vocab_size + values)
        else:
            content = fingerprint(tokens)
        return Draw(tokens, targets, content)

    def _slots(self, rows: Rows, n_slots: int) -> np.ndarray:
        k = self.n_pairs
        if self.compat == "zoology":
            return rows.race(power_slowness(n_slots, repr(1 - self.power)), 2, k)
        order = rows.order(3, k)
        if n_slots == k:  # every slot is filled: only the order is left to chance
            return order
        return np.take_along_axis(
            rows.race(power_slowness(n_slots, repr(1 - self.power)), 2, k), order, axis=1
        )

    def _filler(self, rows: Rows, length: int, keys: np.ndarray) -> np.ndarray:
        if self.filler == "blank":
            return np.zeros((len(rows), length), np.int64)
        tokens = rows.below(self.vocab_size, 4, length)
        if self.compat == "none":
            taken = np.zeros((len(rows), self.vocab_size), bool)
            np.put_along_axis(taken, keys, True, axis=1)
            attempt = 0
            row, column = np.nonzero(np.take_along_axis(taken, tokens, axis=1))
            while row.size:
                attempt += 1
                fresh = Rows(rows.keys[row]).at(self.vocab_size, 4 + (attempt << 12), column)
                tokens[row, column] = fresh
                again = taken[row, fresh]
                row, column = row[again], column[again]
        return tokens

    def _solve(self, tokens: np.ndarray) -> np.ndarray:
        targets = unscored(tokens)
        context = 2 * self.n_pairs
        value_of = np.full((len(tokens), self.vocab_size), -1, np.int64)
        for position in range(0, context, 2):
            value_of[np.arange(len(tokens)), tokens[:, position]] = tokens[:, position + 1]
        answers = np.take_along_axis(value_of, tokens[:, context::2], axis=1)
        targets[:, context::2] = np.where(answers >= 0, answers, targets[:, context::2])
        return targets

    def token_name(self, token: int) -> str:
        """`.` for the blank, `k3`, `v5`."""
        half = self.vocab_size // 2
        if token == 0:
            return "."
        return f"k{token}" if token < half else f"v{token - half}"


@register("mqar_stacked", "recall")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MQARStacked(MQAR):
    """Associative recall with key and value in one position: no token has to be joined to its neighbour.

    Definition: as `mqar`, but a position holds two tokens whose embeddings are concatenated: tokens are
    [B,T,2]. The first n_pairs positions are (key, value); every key is asked once, as (key, 0), at a later
    position drawn with probability proportional to place^(power-1) without replacement; the rest is (0, 0).
    Tokens: 0 blank, keys 1 .. V/2-1, values V/2 .. V-1 for V = vocab_size. Classes: the same tokens.
    Example: k3/v1 k5/v4 ./. k5/. k3/. -> at the second k5 the answer is v4, at the second k3 it is v1.
    Scored: the queries, n_pairs positions a sequence.
    Source: Zoology's continuous MQAR ("key and value embeddings concatenated in one position"), here with
    tokens. compat="zoology" gives its order leak: the i-th pair goes into the i-th place drawn.
    filler="noise" puts random tokens into both halves of the other positions; they never equal a key of the
    context (compat: they may).
    Metric: accuracy at queries. Dials: n_pairs (load), power (lag), length, vocab_size.
    Chance: 1/n_pairs, a value of the context picked blindly.
    Splits: as `mqar`.
    """

    tokens_per_position: ClassVar[int] = 2

    @property
    def min_length(self) -> int:
        """The pairs and one position for each query."""
        return 2 * self.n_pairs

    @property
    def length_step(self) -> int:
        """Any length."""
        return 1

    def space(self, length: int) -> int:
        """Sets of pairs, times their orders, times the placements of the queries."""
        return super().space(2 * length)

    def _generate(self, rows: Rows, length: int) -> Draw:
        flat, targets, content, _ = super()._generate(rows, 2 * length)
        assert targets is not None
        tokens, answers = flat.reshape(len(rows), length, 2), np.ascontiguousarray(targets[:, 0::2])
        tokens[:, :, 1][answers >= 0] = 0
        return Draw(tokens, answers, content)

    def _solve(self, tokens: np.ndarray) -> np.ndarray:
        flat = super()._solve(tokens.reshape(len(tokens), -1))
        return np.ascontiguousarray(flat[:, 0::2])
