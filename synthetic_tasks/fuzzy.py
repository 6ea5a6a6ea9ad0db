"""Fuzzy recall of MAD (Poli et al. 2024, mad/data/instances.py)."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np

from synthetic_tasks.base import IGNORE, Draw, Task, register, unscored
from synthetic_tasks.mad import first_of_kind
from synthetic_tasks.rng import Rows


@register("fuzzy_recall", "recall")
@dataclasses.dataclass(frozen=True, kw_only=True)
class FuzzyRecall(Task):
    """In-context recall where keys and values are motifs of several tokens.

    Definition: a fresh random map from key motifs to value motifs in every sequence; motifs are ordered
    selections without repetition of the key tokens resp. the value tokens. Pairs, key motif then value
    motif, fill the length from the right; what is left on the left is padding. The last pair (the probe)
    repeats a key that occurred before. Value motifs have 1 .. max_motif tokens, key motifs max_motif. The
    keys are drawn from n_motifs motifs (equal ones among these are one key).
    Tokens: the keys, from 0, then the values, then the padding: of vocab_size - 1 tokens one half are keys,
    the other (and the odd one) values. Classes: the tokens.
    Example: 1 4 9 12  3 0 8  1 4 9 -> at the second 4: 9, at the second 9: 12 (max_motif=2).
    Scored: the value tokens of every key that occurred before, each at the token before it.
    Source: MAD's fuzzy recall (multi-query; baseline vocab_size=16, that is 7 keys, 8 values and the padding,
    length 128, motifs up to 3). compat="mad": keys are drawn from all motifs, so that repetitions are rare
    (about 4.4 scored tokens a sequence), pairs fill the length up to the room of a longest pair, and the
    probe's pair is put in at a uniform place. key_length="varied" has keys of 1 .. max_motif tokens, as in
    its training, which also scores every other token; its test always uses the longest. With varied keys a
    causal model cannot know whether a key is complete, so 100 % is out of its reach; hence "longest" is the
    default. Its defects are off: in some 2 % of its sequences the place of the probe comes after the end,
    so that the last answer cannot be known (such a draw is not used here), and it enumerates all motifs
    (3 s a sequence at V 128; here they are drawn directly).
    Metric: accuracy at scored positions. Dials: max_motif, n_motifs (load), vocab_size, length.
    Chance: one of the values, one value token guessed always.
    Shortcuts: looking up the last token of the key alone ("match") scores 0.82 at length 64 with the
    defaults, so the motif's other tokens matter for the rest only; fewer key tokens or more motifs make
    them matter more.
    """

    version: ClassVar[int] = 2

    vocab_size: int = 17
    """Number of tokens: keys, values, and the padding."""
    max_motif: int = 3
    """Longest motif."""
    n_motifs: int = 8
    """Key motifs that a sequence draws from (not used in compat="mad")."""
    key_length: str = "longest"
    """"longest" (max_motif tokens) or "varied" (1 .. max_motif)."""
    compat: str = "none"
    """"mad" draws every key from all motifs."""

    def __post_init__(self) -> None:
        self._require("vocab_size", 5, 2**15)
        self._require("max_motif", 1, min(4, self._n_keys))
        self._require("n_motifs", 1, 2**16)
        self._require_choice("key_length", ("longest", "varied"))
        self._require_choice("compat", ("none", "mad"))

    @property
    def _n_keys(self) -> int:
        return (self.vocab_size - 1) // 2

    @property
    def _n_values(self) -> int:
        return self.vocab_size - 1 - self._n_keys

    @property
    def n_classes(self) -> int:
        """Tokens."""
        return self.vocab_size

    @property
    def min_length(self) -> int:
        """Two longest pairs."""
        return 4 * self.max_motif + (self.compat == "mad")

    def chance(self, length: int) -> float:
        """One value token guessed always."""
        return 1 / self._n_values

    def space(self, length: int) -> int:
        """Longest pairs: first as many different keys as there can be, then any of these."""
        size = self.max_motif
        free = 4 * size if self.compat == "mad" else 2 * size - 1  # the probe and the padding
        pairs = max(length - free, 1) // (2 * size) or 1
        motifs, values = math.perm(self._n_keys, size), math.perm(self._n_values, size)
        different = min(pairs, motifs, pairs if self.compat == "mad" else self.n_motifs)
        return math.perm(motifs, different) * values**different * different ** (pairs - different)

    def _motifs(self, rows: Rows, stream: int, n: int, letters: int) -> np.ndarray:
        """Ordered selections without repetition of max_motif of the letters, int64 [N,n,max_motif]."""
        size = self.max_motif
        motif = rows.below(np.tile(letters - np.arange(size), n), stream, n * size)
        motif = motif.reshape(len(rows), n, size)
        # The j-th draw counts the tokens that are left: step over those that are taken, in ascending order.
        for j in range(1, size):
            taken = np.sort(motif[:, :, :j], axis=2)
            for i in range(j):
                motif[:, :, j] += motif[:, :, j] >= taken[:, :, i]
        return motif

    def _generate(self, rows: Rows, length: int) -> Draw:
        n, size, n_keys = len(rows), self.max_motif, self._n_keys
        row = np.arange(n)
        shortest = 1 if self.key_length == "varied" else size
        pairs = length // (shortest + 1) + 2
        motifs = pairs if self.compat == "mad" else self.n_motifs
        key = self._motifs(rows, 0, motifs, n_keys)
        value = n_keys + self._motifs(rows, 1, motifs, self._n_values)
        key_size = np.full((n, motifs), size) if shortest == size else 1 + rows.below(size, 2, motifs)
        value_size = 1 + rows.below(size, 3, motifs)
        # Equal keys are one key: it goes by the number of its first copy.
        code = np.where(np.arange(size) < key_size[:, :, None], key + 1, 0) @ (n_keys + 1) ** np.arange(size)
        same = first_of_kind(code)
        if self.compat == "mad":
            pick, last, valid = self._mad_pairs(rows, same, key_size + value_size, length)
        else:
            pick, valid = np.take_along_axis(same, rows.below(motifs, 4, pairs), axis=1), None
            width = np.take_along_axis(key_size + value_size, pick, axis=1)
            # Pairs that leave room for the longest probe; the probe, number `last`, repeats one of them.
            last = (np.cumsum(width, axis=1) <= length + 1 - 2 * size).sum(axis=1)
            pick[row, last] = pick[row, rows.below(last[:, None], 5, 1)[:, 0]]

        used = np.arange(pairs) <= last[:, None]
        width = np.take_along_axis(key_size + value_size, pick, axis=1)
        end = np.cumsum(width, axis=1)
        start = end - width + (length + 1 - end[row, last])[:, None]
        known = used & (first_of_kind(pick) < np.arange(pairs))
        tokens = np.full((n, length + 1), self.vocab_size - 1, np.int64)
        answers = np.full((n, length + 1), IGNORE, np.int64)  # answers[t]: what token t must be predicted as
        for j in range(size):
            r, p = np.nonzero(used & (np.take_along_axis(key_size, pick, axis=1) > j))
            tokens[r, start[r, p] + j] = key[r, pick[r, p], j]
            r, p = np.nonzero(used & (np.take_along_axis(value_size, pick, axis=1) > j))
            place = start[r, p] + key_size[r, pick[r, p]] + j
            tokens[r, place] = value[r, pick[r, p], j]
            answers[r, place] = np.where(known[r, p], tokens[r, place], IGNORE)
        return Draw(tokens[:, :-1], answers[:, 1:], valid=valid)

    def _mad_pairs(
        self, rows: Rows, same: np.ndarray, width: np.ndarray, length: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The motif of each pair [N,P], the number of the last one, and whether the probe came before it.

        Motif 0 is the probe. Its pair goes where the first pair from a uniform place on begins, unless one
        of the others before is the same by chance.
        """
        n, pairs = same.shape
        place = rows.below(length - 2 * width[:, :1], 4, 1)
        others = np.take_along_axis(width, same[:, 1:], axis=1)
        begin = np.cumsum(others, axis=1) - others
        at = (begin < place).sum(axis=1, keepdims=True)
        known = ((same[:, 1:] == 0) & (np.arange(pairs - 1) < at)).any(axis=1, keepdims=True)
        at = np.where(known, pairs, at)
        number = np.arange(pairs)
        pick = np.where(number < at, np.minimum(number + 1, pairs - 1), np.where(number == at, 0, number))
        pick = np.take_along_axis(same, pick, axis=1)
        taken = np.take_along_axis(width, pick, axis=1)
        begin = np.cumsum(taken, axis=1) - taken
        last = (begin < length - width[:, :1] - 2 * self.max_motif).sum(axis=1)
        valid = ((pick == 0) & (number < last[:, None])).any(axis=1)
        pick[np.arange(n), last] = 0
        return pick, last, valid

    def _solve(self, tokens: np.ndarray) -> np.ndarray:
        targets = unscored(tokens)
        n_keys, length = self._n_keys, tokens.shape[1]
        for r, sequence in enumerate(tokens.tolist()):
            value_of: dict[tuple[int, ...], list[int]] = {}
            t = 0
            while t < length:
                begin = t
                while t < length and sequence[t] < n_keys:
                    t += 1
                key, begin = tuple(sequence[begin:t]), t
                while t < length and sequence[t] >= n_keys:
                    t += 1
                if not key:
                    continue  # the padding
                for j, answer in enumerate(value_of.get(key, [])):
                    targets[r, begin - 1 + j] = answer
                value_of.setdefault(key, sequence[begin:t])
        return targets

    def token_name(self, token: int) -> str:
        """`k3`, `v5`, `.` for the padding."""
        n_keys = self._n_keys
        if token == self.vocab_size - 1:
            return "."
        return f"k{token}" if token < n_keys else f"v{token - n_keys}"
