"""Fuzzy recall of MAD (Poli et al. 2024, mad/data/instances.py)."""

from __future__ import annotations

import dataclasses

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
    keys are drawn from n_motifs different ones.
    Tokens: keys 0 .. V/2-1, values V/2 .. V-1 for V = vocab_size, then the padding V. Classes: the tokens.
    Example: 1 4 9 12  3 0 8  1 4 9 -> at the second 4: 9, at the second 9: 12 (max_motif=2).
    Scored: the value tokens of every key that occurred before, each at the token before it.
    Source: MAD's fuzzy recall (baseline V 16, length 128, motifs up to 3). compat="mad": keys are drawn
    from all motifs (repetitions are rare: about 3.6 scored tokens a sequence, the public generator's test
    has 4.4; how it pads and picks the probe is reconstructed from a description) and key_length="varied"
    has them 1 .. max_motif tokens long, as in its training; its test always uses the longest. With varied
    keys a causal model cannot know whether a key is complete, so 100 % is out of its reach; hence "longest"
    is the default. Its generator enumerates all motifs (3 s a sequence at V 128); this one draws them
    directly.
    Metric: accuracy at scored positions. Dials: max_motif, n_motifs (load), vocab_size, length.
    Chance: 2/V, one value token guessed always.
    Shortcuts: looking up the last token of the key alone ("match") scores 0.83 at length 64 with the
    defaults, so the motif's other tokens matter for the rest only; fewer key tokens or more motifs make
    them matter more.
    """

    vocab_size: int = 17
    """Number of tokens: an even number of key and value tokens, and the padding."""
    max_motif: int = 3
    """Longest motif."""
    n_motifs: int = 8
    """Different key motifs that a sequence draws from (not used in compat="mad")."""
    key_length: str = "longest"
    """"longest" (max_motif tokens) or "varied" (1 .. max_motif)."""
    compat: str = "none"
    """"mad" draws every key from all motifs."""

    def __post_init__(self) -> None:
        self._require("vocab_size", 5, 2**15)
        self._require("max_motif", 1, min(4, self.vocab_size // 2))
        self._require("n_motifs", 1, 2**16)
        self._require_choice("key_length", ("longest", "varied"))
        self._require_choice("compat", ("none", "mad"))
        if self.vocab_size % 2 == 0:
            raise ValueError(
                f"{self.name}: vocab_size must be odd (the padding is one token), got {self.vocab_size}"
            )

    @property
    def n_classes(self) -> int:
        """Tokens."""
        return self.vocab_size

    @property
    def min_length(self) -> int:
        """Two longest pairs."""
        return 4 * self.max_motif

    def chance(self, length: int) -> float:
        """One value token guessed always."""
        return 2 / (self.vocab_size - 1)

    def space(self, length: int) -> int:
        """First value tokens of the pairs."""
        return (self.vocab_size // 2) ** (length // (2 * self.max_motif))

    def _motifs(self, rows: Rows, stream: int, n: int) -> np.ndarray:
        """Ordered selections without repetition of max_motif of the V/2 tokens, int64 [N,n,max_motif]."""
        half, size = self.vocab_size // 2, self.max_motif
        motif = rows.below(np.tile(half - np.arange(size), n), stream, n * size).reshape(len(rows), n, size)
        # The j-th draw counts the tokens that are left: step over those that are taken, in ascending order.
        for j in range(1, size):
            taken = np.sort(motif[:, :, :j], axis=2)
            for i in range(j):
                motif[:, :, j] += motif[:, :, j] >= taken[:, :, i]
        return motif

    def _generate(self, rows: Rows, length: int) -> Draw:
        n, size, half = len(rows), self.max_motif, self.vocab_size // 2
        row = np.arange(n)
        shortest = 1 if self.key_length == "varied" else size
        pairs = length // (shortest + 1) + 1
        motifs = pairs if self.compat == "mad" else self.n_motifs
        key, value = self._motifs(rows, 0, motifs), half + self._motifs(rows, 1, motifs)
        key_size = np.full((n, motifs), size) if shortest == size else 1 + rows.below(size, 2, motifs)
        value_size = 1 + rows.below(size, 3, motifs)
        # Equal keys are one key: it goes by the number of its first copy.
        code = np.where(np.arange(size) < key_size[:, :, None], key + 1, 0) @ (half + 1) ** np.arange(size)
        same = first_of_kind(code)
        pick = np.tile(np.arange(pairs), (n, 1)) if self.compat == "mad" else rows.below(motifs, 4, pairs)
        pick = np.take_along_axis(same, pick, axis=1)
        width = np.take_along_axis(key_size + value_size, pick, axis=1)
        # Pairs that leave room for the longest probe; the probe, number `last`, repeats one of them.
        last = (np.cumsum(width, axis=1) <= length + 1 - 2 * size).sum(axis=1)
        probed = rows.below(last[:, None], 5, 1)
        pick[row, last] = pick[row, probed[:, 0]]
        width[row, last] = width[row, probed[:, 0]]

        used = np.arange(pairs) <= last[:, None]
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
        return Draw(tokens[:, :-1], answers[:, 1:])

    def _solve(self, tokens: np.ndarray) -> np.ndarray:
        targets = unscored(tokens)
        half, length = self.vocab_size // 2, tokens.shape[1]
        for r, sequence in enumerate(tokens.tolist()):
            value_of: dict[tuple[int, ...], list[int]] = {}
            t = 0
            while t < length:
                begin = t
                while t < length and sequence[t] < half:
                    t += 1
                key, begin = tuple(sequence[begin:t]), t
                while t < length and sequence[t] >= half:
                    t += 1
                if not key:
                    continue  # the padding
                for j, answer in enumerate(value_of.get(key, [])):
                    targets[r, begin - 1 + j] = answer
                value_of.setdefault(key, sequence[begin:t])
        return targets

    def token_name(self, token: int) -> str:
        """`k3`, `v5`, `.` for the padding."""
        half = self.vocab_size // 2
        if token == 2 * half:
            return "."
        return f"k{token}" if token < half else f"v{token - half}"
