"""Counted languages: a^n b^n and a^n b^n c^n."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np

from synthetic_tasks.base import IGNORE, Draw, Task, register, unscored
from synthetic_tasks.rng import Rows


@register("anbn", "counting and stacks")
@dataclasses.dataclass(frozen=True, kw_only=True)
class AnBn(Task):
    """Count the a's, then as many b's: segments a^n b^n with a fresh n each.

    Definition: n_segments segments whose sizes n are a uniformly random composition of what the length
    allows, so that counts grow with the length. form="next": segments a^n b^n back to back; at every b the
    answer is the next token, which is forced: b, or (after the n-th b) a. form="membership": segments a^i
    b^j #, where i = j, or with probability 1/2 one more than i = j by a shift of 1 .. gap letters from one
    run to the other; at # the answer is whether i = j.
    Tokens: 0 a, 1 b, and 2 # in membership. Classes: next: 0 the run is over, 1 it goes on; membership: 0
    no, 1 yes.
    Example: next, a a b b a b -> at the b's: 1 0, 0. Membership, a a b b # a b b b # -> 1, 0.
    Scored: every b, or every #.
    Source: the language of 2606.12364 ("A^nB^n"), whose generator is unpublished; the forms are ours. One n
    a sequence (n_segments=1) leaves one sequence a length: such lengths are exhaustible.
    Metric: accuracy, and whole-sequence accuracy. Dials: length and n_segments (counts), gap.
    Chance: next: always "goes on", 1 - 2 n_segments / T, or always "over" where that is more; membership:
    1/2.
    Shortcuts: next: the bag of all tokens, by the difference of the two counts, tells when a run is over:
    that is the accumulation which the task is about. A window of 4 tokens settles short runs (0.81 at
    length 64).
    """

    form: str = "next"
    """"next" (say when the run is over) or "membership" (say whether the counts agree)."""
    n_segments: int = 8
    """Segments in a sequence."""
    gap: int = 1
    """Membership: the largest shift that makes a non-member."""

    letters: ClassVar[int] = 2

    def __post_init__(self) -> None:
        self._require_choice("form", ("next", "membership"))
        self._require("n_segments", 1)
        self._require("gap", 1)

    @property
    def vocab_size(self) -> int:
        """The letters, and # in membership."""
        return self.letters + (self.form == "membership")

    @property
    def n_classes(self) -> int:
        """Two answers."""
        return 2

    @property
    def min_length(self) -> int:
        """The smallest segments: n = 1, in membership n = 2."""
        return self.n_segments * (self.letters if self.form == "next" else 2 * self.letters + 1)

    @property
    def length_step(self) -> int:
        """One more n."""
        return self.letters

    def chance(self, length: int) -> float:
        """The more frequent answer."""
        if self.form == "membership":
            return 0.5
        decided = self.n_segments * (self.letters - 1)
        scored = length * (self.letters - 1) // self.letters
        return max(decided, scored - decided) / scored

    def _counts(self, length: int) -> tuple[int, int]:
        """The sum of all n, and the least n."""
        if self.form == "next":
            return length // self.letters, 1
        return (length - self.n_segments) // self.letters, 2

    def space(self, length: int) -> int:
        """Compositions of the counts, times the answers in membership."""
        total, least = self._counts(length)
        free = total - (least - 1) * self.n_segments
        return math.comb(free - 1, self.n_segments - 1) * (2**self.n_segments if least == 2 else 1)

    def _generate(self, rows: Rows, length: int) -> Draw:
        n, k, letters = len(rows), self.n_segments, self.letters
        total, least = self._counts(length)
        free = total - (least - 1) * k
        # k - 1 different cuts among free - 1 places: every composition of `free` is equally likely.
        cuts = np.sort(rows.distinct(free - 1, 0, k - 1), axis=1) + 1
        edges = np.concatenate([np.zeros((n, 1), np.int64), cuts, np.full((n, 1), free)], axis=1)
        size = np.diff(edges, axis=1) + least - 1
        runs = np.repeat(size[:, :, None], letters, axis=2)
        shift = np.zeros((n, k), np.int64)
        if self.form == "membership":
            shift = 1 + rows.below(np.minimum(self.gap, size - 1), 1, k)
            shift = np.where(rows.below(2, 2, k) == 1, shift, 0)
            first = rows.below(letters, 3, k)
            second = (first + 1 + rows.below(letters - 1, 4, k)) % letters
            np.put_along_axis(runs, first[:, :, None], (size - shift)[:, :, None], axis=2)
            np.put_along_axis(runs, second[:, :, None], (size + shift)[:, :, None], axis=2)
            runs = np.concatenate([runs, np.ones((n, k, 1), np.int64)], axis=2)
        width = runs.shape[2]
        tokens = np.repeat(np.tile(np.arange(width), n * k), runs.reshape(-1)).reshape(n, length)
        last = (np.cumsum(runs.reshape(n, -1), axis=1) - 1).reshape(n, k, width)  # where each run ends
        row = np.arange(n)[:, None]
        if self.form == "membership":
            targets = unscored(tokens)
            targets[row, last[:, :, -1]] = shift == 0
        else:
            targets = np.where(tokens > 0, 1, IGNORE)
            targets[row, last[:, :, 1:].reshape(n, -1)] = 0
        return Draw(tokens, targets)

    def _solve(self, tokens: np.ndarray) -> np.ndarray:
        targets = unscored(tokens)
        n, length = tokens.shape
        count = np.zeros((n, self.letters + 1), np.int64)
        row = np.arange(n)
        for t in range(length):
            now = tokens[:, t]
            if t:
                count[(now == 0) & (tokens[:, t - 1] != 0)] = 0
            count[row, now] += 1
            if self.form == "next":
                targets[:, t] = np.where(now > 0, count[row, now] < count[:, 0], IGNORE)
            else:
                same = (count[:, 1 : self.letters] == count[:, :1]).all(axis=1)
                targets[:, t] = np.where(now == self.letters, same, IGNORE)
        return targets

    def token_name(self, token: int) -> str:
        """`a`, `b`, `c`, `#`."""
        return "#" if token == self.letters else "abc"[token]

    def class_name(self, label: int) -> str:
        """What the answer says."""
        return ("over" if label == 0 else "on") if self.form == "next" else ("no" if label == 0 else "yes")


@register("anbncn", "counting and stacks")
@dataclasses.dataclass(frozen=True, kw_only=True)
class AnBnCn(AnBn):
    """Count the a's, then as many b's and as many c's: segments a^n b^n c^n with a fresh n each.

    Definition: as `anbn` with three letters. form="next": at every b and c the answer is whether the run
    goes on (next token b resp. c) or is over (c resp. a). form="membership": segments a^i b^j c^k #; in a
    non-member one of the three runs gives 1 .. gap letters to another.
    Tokens: 0 a, 1 b, 2 c, and 3 # in membership. Classes: next: 0 the run is over, 1 it goes on;
    membership: 0 no, 1 yes.
    Example: next, a a b b c c -> at b b c c: 1 0 1 0. Membership, a a b c c c # -> 0.
    Scored: every b and c, or every #.
    Source: the language of 2606.12364 ("A^nB^nC^n"), whose generator is unpublished; the forms are ours.
    Metric: accuracy, and whole-sequence accuracy. Dials: length and n_segments (counts), gap.
    Chance: next: always "goes on", 1 - 3 n_segments / T, or always "over" where that is more; membership:
    1/2.
    Shortcuts: next: the bag of all tokens (0.84 at length 66), a window of 4 tokens (0.76).
    """

    letters: ClassVar[int] = 3
