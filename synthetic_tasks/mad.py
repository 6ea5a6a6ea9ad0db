"""In-context recall of MAD (Poli et al. 2024, mad/data/instances.py): plain and with noise."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from synthetic_tasks.base import IGNORE, Draw, Task, register, unscored
from synthetic_tasks.rng import Rows


def first_of_kind(codes: np.ndarray) -> np.ndarray:
    """For codes [N,P]: the place of the first equal entry of the row, int64 [N,P]."""
    rows, n = codes.shape
    order = np.argsort(codes * n + np.arange(n), axis=1)
    ranked = np.take_along_axis(codes, order, axis=1)
    fresh = np.ones((rows, n), bool)
    fresh[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    leader = np.maximum.accumulate(np.where(fresh, np.arange(n), 0), axis=1)
    first = np.empty_like(order)
    np.put_along_axis(first, order, np.take_along_axis(order, leader, axis=1), axis=1)
    return first


@register("in_context_recall", "recall")
@dataclasses.dataclass(frozen=True, kw_only=True)
class InContextRecall(Task):
    """Recall, at every repetition of a key, the value that it came with.

    Definition: a fresh random map from keys to values in every sequence (values may coincide); (T - 1)/2
    pairs key value with uniformly drawn keys, then one of the keys that occurred once more (the probe).
    Tokens: keys 0 .. V/2-1, values V/2 .. V-1 for V = vocab_size. Classes: the same tokens.
    Example: 3 9 5 12 3 9 5 -> at the second 3: 9, at the last 5: 12.
    Scored: every key that occurred before.
    Source: MAD's in-context recall, multi-query form; its baseline V 16 and sequence length 128 is length
    127 here (it drops the last token), with about 56 scored positions. The published training also scores
    every other token, predictable or not; we score the same positions in all splits. MAD reports the mean
    over classes of the accuracy in each class (macro); compare with care.
    Metric: accuracy at scored positions. Dials: vocab_size (load), length.
    Chance: 2/V, one value guessed always.
    Shortcuts: the most frequent value of the sequence (0.32 at length 65).
    """

    vocab_size: int = 16
    """Number of tokens, even: half keys, half values."""

    def __post_init__(self) -> None:
        self._require("vocab_size", 4, 2**20)
        if self.vocab_size % 2:
            raise ValueError(f"{self.name}: vocab_size must be even, got {self.vocab_size}")

    @property
    def _pair_tokens(self) -> int:
        return self.vocab_size

    @property
    def n_classes(self) -> int:
        """Tokens."""
        return self.vocab_size

    @property
    def min_length(self) -> int:
        """A pair and the probe."""
        return 3

    @property
    def length_step(self) -> int:
        """A pair."""
        return 2

    def chance(self, length: int) -> float:
        """One value guessed always."""
        return 2 / self._pair_tokens

    def space(self, length: int) -> int:
        """Sequences of keys."""
        return (self._pair_tokens // 2) ** (length // 2)

    def _recall(
        self, rows: Rows, length: int, noise: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, targets, and whether the probe exists; pairs marked in `noise` [N,P] do not count."""
        half, pairs = self._pair_tokens // 2, (length - 1) // 2
        key = rows.below(half, 0, pairs)
        value_of = half + rows.below(half, 1, half)
        counts = np.ones_like(key, bool) if noise is None else ~noise
        # A noise slot gets a code of its own, so that it is nobody's first.
        code = np.where(counts, key, half + np.arange(pairs))
        first = first_of_kind(code) == np.arange(pairs)
        known = first & counts
        rank = rows.below(np.maximum(known.sum(axis=1, keepdims=True), 1), 2, 1)
        probe = np.take_along_axis(key, (np.cumsum(known, axis=1) > rank).argmax(axis=1)[:, None], axis=1)
        tokens = np.empty((len(rows), length), np.int64)
        tokens[:, 0:-1:2] = key
        tokens[:, 1::2] = np.take_along_axis(value_of, key, axis=1)
        tokens[:, -1:] = probe
        targets = unscored(tokens)
        targets[:, 0:-1:2] = np.where(first | ~counts, IGNORE, tokens[:, 1::2])
        targets[:, -1:] = np.take_along_axis(value_of, probe, axis=1)
        return tokens, targets, known.any(axis=1)

    def _generate(self, rows: Rows, length: int) -> Draw:
        tokens, targets, _ = self._recall(rows, length, None)
        return Draw(tokens, targets)

    def _solve(self, tokens: np.ndarray) -> np.ndarray:
        targets = unscored(tokens)
        row = np.arange(len(tokens))
        value_of = np.full((len(tokens), self.vocab_size), IGNORE, np.int64)
        for t in range(0, tokens.shape[1], 2):
            key = tokens[:, t]
            is_key = key < self._pair_tokens // 2
            targets[:, t] = np.where(is_key, value_of[row, key], IGNORE)
            if t + 1 < tokens.shape[1]:
                value_of[row, key] = tokens[:, t + 1]
        return targets

    def token_name(self, token: int) -> str:
        """`k3`, `v5`."""
        half = self._pair_tokens // 2
        if token >= 2 * half:
            return f"n{token - 2 * half}"
        return f"k{token}" if token < half else f"v{token - half}"


@register("noisy_recall", "recall")
@dataclasses.dataclass(frozen=True, kw_only=True)
class NoisyRecall(InContextRecall):
    """In-context recall with noise between the pairs.

    Definition: as `in_context_recall`, but each slot of two tokens shows, with probability noise_fraction,
    two uniform noise tokens instead of a pair; one slot, uniform over all with the probe's, never does.
    Tokens: with P = vocab_size - n_noise_tokens: keys 0 .. P/2-1, values P/2 .. P-1, then the noise.
    Classes: all tokens.
    Example: 3 9 n1 n0 3 9 3 -> at both later 3: 9.
    Scored: every key that occurred before.
    Source: MAD's noisy recall: baseline 32 tokens of which 16 noise (vocab_size=32, n_noise_tokens=16),
    noise fraction 0.2, sequence length 128 (127 here), about 43 scored positions.
    Metric: accuracy at scored positions. Dials: noise_fraction, vocab_size, length.
    Chance: 2/P, one value guessed always.
    Shortcuts: the most frequent value of the sequence (0.33 at length 65).
    """

    version: ClassVar[int] = 2

    vocab_size: int = 32
    """Number of tokens, even, noise included."""
    n_noise_tokens: int = 16
    """Size of the noise vocabulary."""
    noise_fraction: float = 0.2
    """Probability that a slot is noise, below 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("n_noise_tokens", 1, self.vocab_size - 4)
        if self.n_noise_tokens % 2:
            raise ValueError(f"{self.name}: n_noise_tokens must be even, got {self.n_noise_tokens}")
        self._require_fraction("noise_fraction")
        if self.noise_fraction > 0.99:
            raise ValueError(f"{self.name}: noise_fraction must be at most 0.99, got {self.noise_fraction}")

    @property
    def _pair_tokens(self) -> int:
        return self.vocab_size - self.n_noise_tokens

    def _generate(self, rows: Rows, length: int) -> Draw:
        pairs = (length - 1) // 2
        noise = rows.chance(self.noise_fraction, 3, pairs)
        noise &= np.arange(pairs) != rows.below(pairs + 1, 5, 1)
        tokens, targets, found = self._recall(rows, length, noise)
        where = np.repeat(noise, 2, axis=1)
        random = self._pair_tokens + rows.below(self.n_noise_tokens, 4, length - 1)
        tokens[:, :-1] = np.where(where, random, tokens[:, :-1])
        return Draw(tokens, targets, valid=found)
