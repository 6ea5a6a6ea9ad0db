"""Nested languages: brackets and palindromes."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from synthetic_tasks.base import IGNORE, Draw, Task, register, unscored
from synthetic_tasks.keyvalue import latest_write
from synthetic_tasks.rng import Rows


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
    Shortcuts: next: the bag of all tokens tells which kinds are open, not their order (0.82 at length 64
    with 2 kinds); a window of 4 tokens scores 0.54.
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
    Chance: 1/2. Comparing the first with the last symbol does better at short lengths (a change may touch
    the end), by 2/T at even lengths.
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
