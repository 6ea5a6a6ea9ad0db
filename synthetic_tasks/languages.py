"""Counted and nested languages: a^n b^n, a^n b^n c^n, brackets, palindromes."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar

import numpy as np

from synthetic_tasks.base import IGNORE, Draw, Task, register, unscored
from synthetic_tasks.keyvalue import latest_write
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
    Chance: next: always "goes on", 1 - 2 n_segments / T; membership: 1/2.
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
        # k - 1 different cuts among free - 1 places: every composition of `free` into k parts is equally likely.
        cuts = np.sort(rows.distinct(free - 1, 0, k - 1), axis=1) + 1 if k > 1 else np.empty((n, 0), np.int64)
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
    Chance: next: always "goes on", 1 - 3 n_segments / T; membership: 1/2.
    """

    letters: ClassVar[int] = 3


@functools.lru_cache(maxsize=64)
def _dyck_shapes(length: int, max_depth: int) -> int:
    """The number of balanced strings of one kind of bracket."""
    ways = [1] + [0] * (max_depth + 1)
    for _ in range(length):
        ways = [
            (ways[d - 1] if d else 0) + (ways[d + 1] if d < max_depth else 0) for d in range(max_depth + 1)
        ] + [0]
    return ways[0]


@functools.lru_cache(maxsize=64)
def _dyck_chance(length: int, kinds: int, max_depth: int) -> float:
    """Best guess from the position alone of the answer after a closing bracket, over all scored positions."""
    depth = np.zeros(max_depth + 1)
    depth[0] = 1
    best = scored = 0.0
    for t in range(length):
        left = length - t
        opens = np.where(np.arange(max_depth + 1) == 0, 1.0, 0.5)
        opens[max_depth] = 0
        opens[np.arange(max_depth + 1) >= left] = 0
        up, down = depth * opens, depth * (1 - opens)
        empty, nested = down[1], down[2:].sum()
        best, scored = best + max(empty, nested / kinds), scored + empty + nested
        depth = np.concatenate([[0], up[:-1]]) + np.concatenate([down[1:], [0]])
    return float(best / scored)


@register("dyck", "counting and stacks")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Dyck(Task):
    """Balanced brackets of several kinds with bounded depth.

    Definition: a random walk over depths 0 .. max_depth that opens or closes with probability 1/2 where
    both are possible and ends at depth 0; a new bracket's kind is uniform. form="next": after every closing
    bracket the answer is the kind of the innermost open bracket, the only one that may be closed next, or
    "none" at depth 0. form="membership": with probability 1/2 two closing brackets of different kinds
    (n_kinds = 1: an opening and a later closing bracket) have changed places, so that the string is not
    balanced; the answer, at the end, is whether it is. Both classes hold the same brackets, so counting
    them says nothing.
    Tokens: kind i opens with token i and closes with token n_kinds + i. Classes: next: the kinds, then
    "none"; membership: 0 no, 1 yes.
    Example: ( [ ] { } ) -> after ]: (, after }: (, after ): none.
    Scored: next: every closing bracket (after an opening one the answer is in plain sight); membership: the
    last position.
    Source: Dyck-(k, m) languages, Hewitt et al. 2020 (2010.07515).
    Metric: accuracy. Dials: n_kinds, max_depth, length.
    Chance: next: the best guess from the position alone, computed exactly; membership: 1/2.
    """

    n_kinds: int = 2
    """Kinds of brackets."""
    max_depth: int = 8
    """Deepest nesting."""
    form: str = "next"
    """"next" (innermost open kind) or "membership" (balanced or not)."""

    def __post_init__(self) -> None:
        self._require("n_kinds", 1, 1000)
        self._require("max_depth", 1, 10_000)
        self._require_choice("form", ("next", "membership"))

    @property
    def vocab_size(self) -> int:
        """Opening and closing brackets."""
        return 2 * self.n_kinds

    @property
    def n_classes(self) -> int:
        """The kinds and "none", or no and yes."""
        return 2 if self.form == "membership" else self.n_kinds + 1

    @property
    def min_length(self) -> int:
        """One pair; in membership two, so that a corruption exists."""
        return 4 if self.form == "membership" else 2

    @property
    def length_step(self) -> int:
        """Pairs."""
        return 2

    def chance(self, length: int) -> float:
        """The best guess from the position alone."""
        return 0.5 if self.form == "membership" else _dyck_chance(length, self.n_kinds, self.max_depth)

    def space(self, length: int) -> int:
        """Balanced strings (at least those that are as short as 64 in shape)."""
        return self.n_kinds ** (length // 2) * _dyck_shapes(min(length, 64), self.max_depth)

    def _levels(self, rows: Rows, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The depth after each token, int64 [N,T], and the depth on its inner side."""
        top = self.max_depth
        coin = np.ascontiguousarray(rows.below(2, 0, length).T)
        depth = np.zeros((length + 1, len(rows)), np.int64)
        here = np.arange(top + 1)
        for t in range(length):
            if t == 0 or length - t <= top:
                # step[2 * depth + coin] is the next depth: coin 1 closes, unless only one move is legal.
                must_close = (here == top) | (here >= length - t)
                closing = np.stack([must_close, (here > 0) | must_close], axis=1)
                step = np.where(closing, here[:, None] - 1, here[:, None] + 1).reshape(-1)
            depth[t + 1] = step[2 * depth[t] + coin[t]]
        depth = np.ascontiguousarray(depth.T)
        return depth[:, 1:], np.maximum(depth[:, 1:], depth[:, :-1])

    def _generate(self, rows: Rows, length: int) -> Draw:
        n, k, row = len(rows), self.n_kinds, np.arange(len(rows))[:, None]
        depth, level = self._levels(rows, length)
        # Sorted by level and then by place, opening and closing brackets of the same pair are neighbours.
        order = np.argsort(level * length + np.arange(length), axis=1)
        opening, closing = order[:, 0::2], order[:, 1::2]
        kind = rows.below(k, 1, length // 2)
        tokens = np.empty((n, length), np.int64)
        tokens[row, opening], tokens[row, closing] = kind, kind + k
        if self.form == "membership":
            return self._swap(rows, tokens)
        after = depth[row, closing]
        parent = latest_write(level[row, opening], opening, after, closing, length)
        targets = unscored(tokens)
        targets[row, closing] = np.where(after > 0, np.take_along_axis(kind, parent, axis=1), k)
        return Draw(tokens, targets)

    def _swap(self, rows: Rows, tokens: np.ndarray) -> Draw:
        """With probability 1/2 exchange two brackets so that the string is not balanced any more."""
        k, row, length = self.n_kinds, np.arange(len(rows)), tokens.shape[1]
        order = rows.order(3, length)
        ranked = np.take_along_axis(tokens, order, axis=1)
        left = (ranked >= k).argmax(axis=1)
        other = (ranked >= k) & (ranked != ranked[row, left][:, None]) if k > 1 else ranked < k
        right = other.argmax(axis=1)
        broken = tokens.copy()
        place, swap = order[row, left], order[row, right]
        broken[row, place], broken[row, swap] = tokens[row, swap], tokens[row, place]
        unbalanced = other[row, right]
        if k == 1:
            unbalanced = (np.cumsum(1 - 2 * broken, axis=1) < 0).any(axis=1)
        member = rows.below(2, 2, 1)[:, 0] == 1
        targets = unscored(tokens)
        targets[:, -1] = member
        # A string that cannot be broken is drawn again, in both classes.
        return Draw(np.where(member[:, None], tokens, broken), targets, valid=unbalanced)

    def _solve(self, tokens: np.ndarray) -> np.ndarray:
        n, length = tokens.shape
        row, k = np.arange(n), self.n_kinds
        stack = np.full((n, length + 2), k, np.int64)
        depth, sound = np.zeros(n, np.int64), np.ones(n, bool)
        targets = unscored(tokens)
        for t in range(length):
            closes = tokens[:, t] >= k
            sound &= ~closes | ((depth > 0) & (stack[row, depth] == tokens[:, t] - k))
            depth = np.maximum(depth + np.where(closes, -1, 1), 0)
            opens = ~closes
            stack[row[opens], depth[opens]] = tokens[opens, t]
            if self.form == "next":
                targets[:, t] = np.where(closes, np.where(depth > 0, stack[row, depth], k), IGNORE)
        if self.form == "membership":
            targets[:, -1] = sound & (depth == 0)
        return targets

    def token_name(self, token: int) -> str:
        """Brackets, numbered beyond the fourth kind."""
        kind = token % self.n_kinds
        sign = "([{<"[kind] if kind < 4 else f"<{kind}"
        return sign if token < self.n_kinds else (")]}>"[kind] if kind < 4 else f"{kind}>")

    def class_name(self, label: int) -> str:
        """The bracket that is open, none, or no / yes."""
        if self.form == "membership":
            return "yes" if label else "no"
        return "none" if label == self.n_kinds else self.token_name(label)


@register("palindrome", "counting and stacks")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Palindrome(Task):
    """Does the string read the same backwards?

    Definition: a random string mirrored at its middle; with probability 1/2 two different symbols of the
    second half have changed places. Halves of one symbol only are drawn again, in both classes. The answer
    is whether the string is a palindrome. The counts of the symbols are alike in both classes.
    Tokens: the symbols. Classes: 0 no, 1 yes.
    Example: 0 1 1 0 -> yes, 0 1 0 1 -> no.
    Scored: the last position.
    Source: the classical context-free language; this near-miss form is ours.
    Metric: accuracy. Dials: length, n_symbols.
    Chance: 1/2. Comparing the first with the last symbol does better at short lengths (a change that
    touches the ends), by about 1/T.
    """

    n_symbols: int = 2
    """Size of the alphabet."""

    def __post_init__(self) -> None:
        self._require("n_symbols", 2, 2**16)

    @property
    def vocab_size(self) -> int:
        """The symbols."""
        return self.n_symbols

    @property
    def n_classes(self) -> int:
        """No, yes."""
        return 2

    @property
    def min_length(self) -> int:
        """Two symbols a half."""
        return 4

    def chance(self, length: int) -> float:
        """One half."""
        return 0.5

    def space(self, length: int) -> int:
        """The halves that have two symbols, and the middle."""
        half = length // 2
        return (self.n_symbols**half - self.n_symbols) * self.n_symbols ** (length % 2)

    def _generate(self, rows: Rows, length: int) -> Draw:
        n, half, row = len(rows), length // 2, np.arange(len(rows))
        tokens = rows.below(self.n_symbols, 0, length)
        tokens[:, length - half :] = tokens[:, :half][:, ::-1]
        order = rows.order(1, half) + length - half
        ranked = np.take_along_axis(tokens, order, axis=1)
        differs = ranked != ranked[:, :1]
        right = differs.argmax(axis=1)
        left, swap = order[:, 0], order[row, right]
        member = rows.below(2, 2, 1)[:, 0] == 1
        left = np.where(member, swap, left)
        tokens[row, left], tokens[row, swap] = tokens[row, swap], tokens[row, left]
        targets = np.full((n, length), IGNORE)
        targets[:, -1] = member
        return Draw(tokens, targets, valid=differs[row, right])

    def _solve(self, tokens: np.ndarray) -> np.ndarray:
        targets = unscored(tokens)
        targets[:, -1] = (tokens == tokens[:, ::-1]).all(axis=1)
        return targets

    def class_name(self, label: int) -> str:
        """No, yes."""
        return "yes" if label else "no"
