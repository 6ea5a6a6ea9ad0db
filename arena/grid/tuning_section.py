"""``[tuning]``: what ``arena tune`` may vary, how it chooses, and what it is to prove."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, model_validator

from arena.grid.fields import Seed, Seeds, Strict, distinct, near

REPORT_SEED = 1000
"""The first seed of the reported runs where a file gives their number only."""
MOST_OWN = 2
"""Parameters that an architecture may have for itself."""
METRICS = ("accuracy", "chance_scaled_accuracy", "sequence_accuracy", "loss")
_METRIC = re.compile(r"(?:(?P<split>\w+)/)?(?P<name>\w+)(?:@(?P<lengths>\d+(?:,\d+)*))?")

Range = Annotated[list[float], Field(min_length=2, max_length=2)]


def _fresh(value: Any) -> Any:
    """Let a file write ``report_seeds = 10`` for ten seeds from ``REPORT_SEED`` on."""
    if isinstance(value, int) and not isinstance(value, bool):
        if not 1 <= value <= 10_000:
            raise ValueError("a number of seeds is between 1 and 10000")
        return list(range(REPORT_SEED, REPORT_SEED + value))
    return value


class SpaceSection(Strict):
    """``[tuning.space]``: ``[low, high]`` of the shared parameters, the same for every architecture.

    A parameter that is not given stays where ``[train]`` and ``lr``, ``weight_decay`` put it.
    """

    lr: Range | None = None
    """Peak learning rate, on a log scale."""
    weight_decay: Range | None = None
    """Decoupled weight decay."""
    warmup: Range | None = None
    """Fraction of the steps."""
    beta2: Range | None = None
    """AdamW's second-moment decay, on a log scale of 1 - beta2."""
    clip: Range | None = None
    """Largest norm of the gradient, on a log scale."""

    @model_validator(mode="after")
    def _bounded(self) -> SpaceSection:
        limits = {
            "lr": (0.0, None, False),
            "weight_decay": (0.0, None, True),
            "warmup": (0.0, 1.0, True),
            "beta2": (0.0, 1.0, True),
            "clip": (0.0, None, False),
        }
        declared = self.model_dump(exclude_none=True)
        if not declared:
            raise ValueError(f"a search space needs at least one of {', '.join(limits)}")
        for name, (low, high) in declared.items():
            least, most, included = limits[name]
            if not low < high:
                raise ValueError(f"{name} = [{low:g}, {high:g}] should be [low, high]")
            if low < least or (low == least and not included):
                raise ValueError(
                    f"{name} starts at {low:g}; it must be {'at least' if included else 'above'} 0"
                )
            if most is not None and (high > most or (name == "beta2" and high == most)):
                raise ValueError(
                    f"{name} ends at {high:g}; it must be {'below' if name == 'beta2' else 'at most'} 1"
                )
        return self


class OwnParameter(Strict):
    """A parameter of one architecture: ``{ low, high, log }`` or ``{ choices }``."""

    low: float | None = None
    high: float | None = None
    """Bounds; where both are whole numbers, so are the values."""
    log: bool = False
    """On a log scale."""
    choices: list[Any] | None = None
    """Instead of bounds: the values, equally likely."""

    @model_validator(mode="after")
    def _one_kind(self) -> OwnParameter:
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log:
                raise ValueError("give either low and high, or choices")
            if len(self.choices) < 2:
                raise ValueError("choices needs at least two values")
            distinct("choices", self.choices)
        elif self.low is None or self.high is None:
            raise ValueError("give low and high, or choices")
        elif not self.low < self.high:
            raise ValueError(f"low = {self.low:g} should be below high = {self.high:g}")
        elif self.log and self.low <= 0:
            raise ValueError("a log scale starts above 0")
        return self

    @property
    def whole(self) -> bool:
        """Whether the values are whole numbers."""
        return self.low is not None and self.low == int(self.low) and self.high == int(self.high or 0.5)


class Equivalence(Strict):
    """``[[tuning.equivalence]]``: a claim that two architectures are equal within a margin."""

    pair: Annotated[list[str], Field(min_length=2, max_length=2)]
    """Two names of ``archs``."""
    margin: PositiveFloat
    """Largest difference of the accuracy that still counts as equal."""


class TuningSection(Strict):
    """``[tuning]``: the frozen search space and the rules of choosing.

    Every architecture gets the same points on every task, with the same data and the same seeds.
    """

    space: SpaceSection = SpaceSection(lr=[1e-4, 3e-2], weight_decay=[0.0, 0.3])
    """Bounds of the shared parameters."""
    own: dict[str, dict[str, OwnParameter]] = Field(default_factory=dict)
    """``[tuning.own.ARCH]``: at most two parameters of one architecture: block options, ``conv`` or numeric
    fields of ``[model]``."""
    points: Annotated[int, Field(ge=2, le=4096)] = 16
    """Scrambled-Sobol points; best balanced as a power of two."""
    point_seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of the scrambling."""
    search_seeds: Seeds = Field(default=[0])
    """Seeds that every point is trained with: a number, or the seeds."""
    report_seeds: Annotated[list[Seed], BeforeValidator(_fresh)] = Field(
        default=list(range(REPORT_SEED, REPORT_SEED + 10)), min_length=1
    )
    """Fresh seeds of the winner's runs, which alone are tested: a number (from 1000 on), or the seeds."""
    metric: str = "accuracy"
    """What the winner is best in, on split valid: a metric (the mean over the valid lengths), or
    ``METRIC@LENGTH,LENGTH``."""
    extension: Annotated[int, Field(ge=0, le=4096)] | None = None
    """Points beyond a bound that a best point comes close to, for every architecture and task alike; absent:
    half of ``points``; 0: never."""
    exploit: Literal["none", "tpe", "gp"] = "none"
    """A second stage of adaptive trials, as many for each architecture."""
    trials: Annotated[int, Field(ge=0, le=4096)] = 0
    """Trials of the second stage."""
    match: Literal["none", "params", "state", "flops", "time"] = "none"
    """What the architectures are made to agree in, by solving widths or MLP sizes."""
    reference: str | None = None
    """The architecture that the others are matched to; absent: the median one."""
    panel: list[str] = Field(default_factory=list)
    """Architectures whose sensitivity to the learning rate is measured: 9 rates over the whole range."""
    panel_seeds: Annotated[int, Field(ge=1, le=1000)] = 3
    """Seeds of each rate of a panel."""
    pairs: list[Annotated[list[str], Field(min_length=2, max_length=2)]] = Field(default_factory=list)
    """The comparisons that a claim is to be made of, declared beforehand: the family of the tests."""
    equivalence: list[Equivalence] = Field(default_factory=list)
    """Claims of equality."""

    @model_validator(mode="after")
    def _consistent(self) -> TuningSection:
        for field in ("search_seeds", "report_seeds", "panel"):
            distinct(field, getattr(self, field))
        both = sorted({*self.search_seeds} & {*self.report_seeds})
        if both:
            raise ValueError(
                f"search_seeds and report_seeds share {both}: the reported runs need fresh seeds"
            )
        if (self.exploit == "none") != (self.trials == 0):
            raise ValueError(f"exploit = {self.exploit!r} with trials = {self.trials}: give both, or neither")
        if self.panel and self.space.lr is None:
            raise ValueError("panel varies the learning rate: give lr in [tuning.space]")
        if self.reference is not None and self.match == "none":
            raise ValueError("reference is what match refers to: give match too")
        for arch, own in self.own.items():
            if len(own) > MOST_OWN:
                raise ValueError(
                    f"[tuning.own.{arch}] has {len(own)} parameters; at most {MOST_OWN} are fair"
                )
            if not own:
                raise ValueError(f"[tuning.own.{arch}] is empty")
        seen = set()
        for pair in [*self.pairs, *(claim.pair for claim in self.equivalence)]:
            if pair[0] == pair[1]:
                raise ValueError(f"the pair {pair} compares {pair[0]!r} with itself")
        for pair in self.pairs:
            if frozenset(pair) in seen:
                raise ValueError(f"pairs has {pair} twice: it would count twice in the family of tests")
            seen.add(frozenset(pair))
        self.metric_parts()
        return self

    def metric_parts(self) -> tuple[str, list[int]]:
        """The metric's name, and the lengths it is taken at (none: all valid lengths).

        Raises:
            ValueError: it is none, or not of split valid.
        """
        found = _METRIC.fullmatch(self.metric)
        if found is None:
            raise ValueError(f"metric = {self.metric!r} is not METRIC or METRIC@LENGTH,LENGTH")
        if found["split"] not in (None, "valid"):
            raise ValueError(
                f"metric = {self.metric!r} would choose on split {found['split']!r}: winners are chosen "
                "on valid only, test is reported once"
            )
        if found["name"] not in METRICS:
            raise ValueError(
                f"metric = {self.metric!r}: no metric {found['name']!r}{near(found['name'], METRICS)}"
            )
        lengths = [int(word) for word in found["lengths"].split(",")] if found["lengths"] else []
        distinct("metric", lengths)
        return found["name"], lengths

    @property
    def extension_points(self) -> int:
        """Points of one extension."""
        return self.points // 2 if self.extension is None else self.extension

    def check_names(self, archs: Collection[str]) -> None:
        """ValueError where something is about an architecture that the experiment does not have."""
        named = {
            "own": list(self.own),
            "panel": self.panel,
            "pairs": [name for pair in self.pairs for name in pair],
            "equivalence": [name for claim in self.equivalence for name in claim.pair],
            "reference": [] if self.reference is None else [self.reference],
        }
        for section, names in named.items():
            for name in names:
                if name not in archs:
                    raise ValueError(
                        f"[tuning] {section} names {name!r}, which archs does not have{near(name, archs)}"
                    )

    def restricted(self, archs: Collection[str]) -> dict[str, Any]:
        """The section as a mapping, without what is about other architectures than ``archs``."""
        data = self.model_dump(exclude_none=True)
        data["own"] = {name: own for name, own in data["own"].items() if name in archs}
        data["panel"] = [name for name in self.panel if name in archs]
        data["pairs"] = [pair for pair in self.pairs if {*pair} <= {*archs}]
        data["equivalence"] = [claim for claim in data["equivalence"] if {*claim["pair"]} <= {*archs}]
        if self.reference not in archs:
            data.pop("reference", None)
        return data
