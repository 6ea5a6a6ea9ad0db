"""The vocabulary of verdict rules: what a claim file may say has to hold, as data.

Scores are chance-scaled accuracies, (accuracy - chance) / (1 - chance), on split test. A rule names arms, or
pairs of arms; each of them is one *line* with a verdict of its own. What each kind asks, and how it is
decided, is in :mod:`arena.claims.judge`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat

from arena.grid.fields import Length, Strict

Names = Annotated[list[str], Field(min_length=1)]
Pairs = Annotated[list[Annotated[list[str], Field(min_length=2, max_length=2)]], Field(min_length=1)]
Score = Annotated[float, Field(gt=0, le=1)]


class _Rule(Strict):
    task: str | None = None
    """The task; absent: the only one of the experiment."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Those of its parameters that tell it from another task of the same name."""
    length: Length | dict[Literal["cpu", "full"], Length] | None = None
    """Test length, for each size where they differ; absent: the longest that is reported."""
    published: str | dict[str, str] = ""
    """The published number with its tag; for each arm, or ``"x > y"`` for each pair, where they differ."""
    ours: bool = False
    """A line beside the published claim, which does not enter its verdict."""

    def subjects(self) -> list[tuple[str, ...]]:
        """The arms, or pairs of arms, one for each line."""
        raise NotImplementedError

    def length_at(self, size: str) -> int | None:
        """The test length at a size; None: the longest."""
        return self.length.get(size) if isinstance(self.length, dict) else self.length  # type: ignore[call-overload]


class _OfArms(_Rule):
    arms: Names

    def subjects(self) -> list[tuple[str, ...]]:
        return [(arm,) for arm in self.arms]


class _OfPairs(_Rule):
    pairs: Pairs

    def subjects(self) -> list[tuple[str, ...]]:
        return [(x, y) for x, y in self.pairs]


class Solves(_OfArms):
    """Most runs of the arm score at least ``at_least``."""

    kind: Literal["solves"]
    at_least: Score = 0.95
    control: bool = False
    """A positive control: where it is not confirmed, training was too short to say anything on this task."""


class Fails(_OfArms):
    """Most runs of the arm score at most ``at_most``."""

    kind: Literal["fails"]
    at_most: Score


class Above(_OfPairs):
    """The first arm scores higher than the second; a mean difference below ``least`` counts as none."""

    kind: Literal["above"]
    least: PositiveFloat = 0.05


class Equal(_OfPairs):
    """The mean difference of the two arms is within ``margin``."""

    kind: Literal["equal"]
    margin: PositiveFloat


class Narrower(_OfPairs):
    """The window of good learning rates of the first arm is narrower; by less than ``least`` decades counts
    as not.
    """

    kind: Literal["narrower"]
    least: PositiveFloat = 0.25


Rule = Annotated[Solves | Fails | Above | Equal | Narrower, Field(discriminator="kind")]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One statement of a claim, about one arm or one pair on one task."""

    rule: Any
    subject: tuple[str, ...]

    @property
    def published(self) -> str:
        """The published number; empty where there is none."""
        if isinstance(self.rule.published, str):
            return self.rule.published
        return self.rule.published.get(self.key, "")

    @property
    def key(self) -> str:
        """What ``published`` files the line under."""
        return " > ".join(self.subject)

    @property
    def family(self) -> str:
        """Lines of one family are corrected together: ``claim``, ``ours`` or ``control``."""
        if getattr(self.rule, "control", False):
            return "control"
        return "ours" if self.rule.ours else "claim"

    def statement(self, place: str) -> str:
        """The line in words.

        Args:
            place: task and length.
        """
        rule, (x, *rest) = self.rule, self.subject
        if rule.kind == "solves":
            return f"{x} solves {place}: most runs score {rule.at_least:g} or more"
        if rule.kind == "fails":
            return f"{x} fails on {place}: most runs score {rule.at_most:g} or less"
        if rule.kind == "above":
            return f"{x} is above {rest[0]} on {place} (a difference under {rule.least:g} is none)"
        if rule.kind == "equal":
            return f"{x} and {rest[0]} are equal on {place} within {rule.margin:g}"
        return (
            f"{x} has a narrower window of learning rates than {rest[0]} on {place} (by less than "
            f"{rule.least:g} decades is not)"
        )


def lines_of(rules: list[Any]) -> Iterator[Line]:
    """Every line of the rules, in the order of the file."""
    for rule in rules:
        for subject in rule.subjects():
            yield Line(rule=rule, subject=subject)
