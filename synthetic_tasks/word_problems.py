"""Word problems: the running product of group elements."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import numpy as np

from synthetic_tasks import groups
from synthetic_tasks.base import Draw, Task, register, unscored
from synthetic_tasks.rng import Rows
from synthetic_tasks.state_tracking import SUPERVISION


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordProblem(Task):
    """The product of a sequence of group elements.

    Definition: elements x_1 x_2 ... drawn uniformly (from the allowed ones); the answer after t elements is
    the product x_1 x_2 ... x_t, each new element multiplied on the right; (a b)(i) = a(b(i)) for
    permutations.
    Tokens: the elements' numbers (permutations in lexicographic order, the even ones of them for A_n; a * 5
    + z in A4 x Z5; 0 is the identity); with tokens_per_element > 1 the group's order is one more token, a
    pause, and an element is followed by tokens_per_element - 1 pauses. Classes: the elements.
    Example: s3, elements 213 132 -> answers 213 231.
    Scored: every element (its last token), or with supervision="final" the last one only. There is no
    begin-of-sequence label, which word-problem and DeltaProduct count in loss and accuracy although it is
    trivial.
    Source: Merrill et al. 2024 (2404.08819, section 6), the variants of 2411.12537 (section 5.2):
    max_moved=2 is "identity and swaps only", max_moved=3 at most three points moved; the same element
    order, uniform elements and labels as jopetty/word-problem. Its pools of distinct sequences become fresh
    samples here.
    Metric: accuracy at scored positions; whole-sequence accuracy is the published one.
    Chance: the best guess from the position alone, computed exactly: 1/|G| when all elements are drawn.
    Shortcuts: running answers at the first places are easy (the first is its own token): about 1/T above
    chance; the bag of tokens scores 0.26 on s3 at length 64. supervision="final" has none of that.
    """

    supervision: str = "running"
    """Which products are scored: "running" or "final"."""
    max_moved: int = 0
    """Draw only permutations that move at most this many points (2: identity and swaps); 0 draws all."""
    tokens_per_element: int = 1
    """Tokens that stand for one element: the element and pauses after it."""

    _make: ClassVar[Callable[[], groups.Group]]

    def __post_init__(self) -> None:
        self._require_choice("supervision", SUPERVISION)
        self._require("max_moved", 0)
        self._require("tokens_per_element", 1, 64)
        if self.max_moved:
            if self.group.moved is None:
                raise ValueError(f"{self.name}: max_moved needs a group of permutations; use 0 here")
            if len(self.allowed) < 2:
                least = sorted(set(self.group.moved.tolist()))[1]
                raise ValueError(
                    f"{self.name}: max_moved must be 0 or at least {least}, got {self.max_moved}"
                )

    @property
    def group(self) -> groups.Group:
        """The multiplication table."""
        return type(self)._make()

    @functools.cached_property
    def allowed(self) -> np.ndarray:
        """The numbers of the elements that are drawn."""
        everything = np.arange(len(self.group.names))
        if not self.max_moved or self.group.moved is None:
            return everything
        return everything[self.group.moved <= self.max_moved]

    @property
    def vocab_size(self) -> int:
        """The elements, and the pause where there is one."""
        return self.n_classes + (self.tokens_per_element > 1)

    @property
    def n_classes(self) -> int:
        """The group's order."""
        return len(self.group.names)

    @property
    def min_length(self) -> int:
        """One element."""
        return self.tokens_per_element

    @property
    def length_step(self) -> int:
        """Whole elements."""
        return self.tokens_per_element

    def chance(self, length: int) -> float:
        """Mean over the scored positions of the most likely product's probability there."""
        steps = length // self.tokens_per_element
        order = self.n_classes
        if len(self.allowed) == order:
            return 1 / order
        forward = np.zeros((order, order))
        np.add.at(
            forward, (np.arange(order)[:, None], self.group.table[:, self.allowed]), 1 / len(self.allowed)
        )
        now, best = np.eye(order)[0], []
        for _ in range(steps):
            now = now @ forward
            best.append(now.max())
        return float(best[-1] if self.supervision == "final" else np.mean(best))

    def space(self, length: int) -> int:
        """All sequences of allowed elements."""
        return len(self.allowed) ** (length // self.tokens_per_element)

    def _generate(self, rows: Rows, length: int) -> Draw:
        elements = self.allowed[rows.below(len(self.allowed), 0, length // self.tokens_per_element)]
        if self.tokens_per_element == 1:
            return Draw(elements)
        tokens = np.full((len(rows), length), self.n_classes, np.int64)
        tokens[:, :: self.tokens_per_element] = elements
        return Draw(tokens)

    def _solve(self, tokens: np.ndarray) -> np.ndarray:
        k = self.tokens_per_element
        targets = unscored(tokens)
        products = groups.running_product(tokens[:, ::k], self.group.table)
        if self.supervision == "running":
            targets[:, k - 1 :: k] = products
        else:
            targets[:, -1] = products[:, -1]
        return targets

    def token_name(self, token: int) -> str:
        """The permutation's one-line notation, the sum's summands, or "." for a pause."""
        return "." if token == self.n_classes else self.group.names[token]

    def class_name(self, label: int) -> str:
        """As the token."""
        return self.group.names[label]


def _word_problem(title: str, make: Callable[[], groups.Group], what: str) -> type[WordProblem]:
    doc = f"The word problem of {what}.\n{(WordProblem.__doc__ or '').split(chr(10), 1)[1]}"
    cls = type(title, (WordProblem,), {"__doc__": doc, "__module__": __name__, "_make": staticmethod(make)})
    return register(title.lower(), "state tracking")(cls)


S3 = _word_problem("S3", lambda: groups.symmetric(3), "S3, the 6 permutations of 3 points (solvable)")
S4 = _word_problem("S4", lambda: groups.symmetric(4), "S4, the 24 permutations of 4 points (solvable)")
S5 = _word_problem("S5", lambda: groups.symmetric(5), "S5, the 120 permutations of 5 points (NC1-complete)")
A5 = _word_problem(
    "A5", lambda: groups.alternating(5), "A5, the 60 even permutations of 5 points (NC1-complete)"
)
Z60 = _word_problem("Z60", lambda: groups.cyclic(60), "Z60, addition modulo 60 (abelian)")
A4xZ5 = _word_problem(
    "A4xZ5",
    functools.cache(lambda: groups.direct_product(groups.alternating(4), groups.cyclic(5))),
    "A4 x Z5, order 60 (solvable, not abelian)",
)
