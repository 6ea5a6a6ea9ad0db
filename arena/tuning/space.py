"""The frozen search space and its points, identical for every architecture and task.

A point is a row of one scrambled Sobol sequence in seven dimensions, always the same seven: five for the
shared parameters and two that an architecture may use for its own. So neither leaving a shared parameter
out nor giving an architecture one of its own moves any other column. (A sampler that draws in the dimension
of what is declared would move them all.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from arena.grid.experiment import Experiment
from arena.grid.fields import ExperimentError, near
from arena.grid.plan import digest
from arena.grid.tuning_section import OwnParameter, TuningSection

SHARED = ("lr", "weight_decay", "warmup", "beta2", "clip")
"""The shared parameters in the order of their Sobol dimensions; after them come those of an architecture."""
DIMENSIONS = len(SHARED) + 2
EDGE = 0.1
"""A best point in the outer tenth of a log range, at either end, is too close to the bound."""
ROOM = 0.5
"""An extension adds half of the (log) width of the range beyond the bound."""
_SCALES = {"lr": "log", "weight_decay": "linear", "warmup": "linear", "beta2": "gap", "clip": "log"}
_WIDTHS = ("d_model", "n_layers", "n_heads", "mlp_ratio", "mlp_hidden", "experts", "experts_per_token")
_FIELDS = ("conv", "conv_on", "load_balance", *_WIDTHS)

Side = Literal["low", "high"]
Edge = tuple[str, Side]
"""A bound of a shared parameter."""


@dataclass(frozen=True)
class Axis:
    """A shared parameter: its bounds and its scale, ``log``, ``linear`` or ``gap`` (log of 1 - x)."""

    name: str
    low: float
    high: float

    @property
    def scale(self) -> str:
        """The scale that is uniform in the points."""
        return _SCALES[self.name]

    def value(self, u: float) -> float:
        """The parameter at u in [0, 1), to six digits: so it does not depend on the mathematics library."""
        low, high = _inner(self.scale, self.low), _inner(self.scale, self.high)
        t = low + u * (high - low)
        if self.scale == "gap":
            value = round(1.0 - _digits(math.exp(-t)), 12)
        else:
            value = _digits(math.exp(t) if self.scale == "log" else t)
        return min(max(value, self.low), self.high)

    def place(self, value: float) -> float:
        """Where a value lies in the range: 0 at the lower bound, 1 at the upper."""
        low, high = _inner(self.scale, self.low), _inner(self.scale, self.high)
        return (_inner(self.scale, value) - low) / (high - low)

    def beyond(self, side: Side) -> Axis:
        """The part that an extension adds on a side."""
        low, high = _inner(self.scale, self.low), _inner(self.scale, self.high)
        room = ROOM * (high - low)
        if side == "high":
            return Axis(self.name, self.high, _outer(self.scale, high + room))
        return Axis(self.name, _outer(self.scale, low - room), self.low)

    def extended(self, edges: Sequence[Edge]) -> Axis:
        """The range with the parts beyond those of ``edges`` that are its own."""
        sides = [side for name, side in edges if name == self.name]
        low = self.beyond("low").low if "low" in sides else self.low
        high = self.beyond("high").high if "high" in sides else self.high
        return Axis(self.name, low, high)

    @property
    def can_extend(self) -> bool:
        """The boundary rule is about log ranges."""
        return self.scale != "linear" and not (self.scale == "gap" and self.low <= 0.0)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One point of the space."""

    number: int
    """Its place among all points: the column ``trial``."""
    stage: str
    """``search``, ``extension`` or ``exploit``."""
    shared: Mapping[str, float]
    """Parameter -> value, fields of a replica."""
    own: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Architecture -> its own parameters."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """The search space of an experiment, frozen."""

    axes: tuple[Axis, ...]
    own: Mapping[str, Mapping[str, OwnParameter]]
    section: TuningSection
    fixed: Mapping[str, float] = field(default_factory=dict)
    """Shared parameters that the experiment fixes, as the space has no bounds for them."""
    id: str = field(init=False)
    """Hash of all that decides which points are tried and which one wins: the column ``space``."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", digest(self.content(self.own)))

    def content(self, own: Mapping[str, Mapping[str, OwnParameter]]) -> dict[str, Any]:
        """What is hashed; ``own`` may be that of one architecture."""
        names = ("points", "point_seed", "search_seeds", "metric", "exploit", "trials")
        return {
            "space": {axis.name: [axis.low, axis.high] for axis in self.axes},
            "own": {
                arm: {key: value.model_dump() for key, value in mine.items()} for arm, mine in own.items()
            },
            "extension": self.section.extension_points,
            **({"fixed": dict(self.fixed)} if self.fixed else {}),
            "first": [round(u, 9) for u in sobol(1, self.section.point_seed)[0]],
            **{name: getattr(self.section, name) for name in names},
        }

    def search_points(self) -> list[Point]:
        """The first stage: the paired points."""
        rows = sobol(self.section.points, self.section.point_seed)
        return [self._point(number, "search", self.axes, row) for number, row in enumerate(rows)]

    def extension_points(self, edges: Sequence[Edge]) -> list[Point]:
        """The next points of the same sequence, beyond the bounds that best points came close to.

        Args:
            edges: those bounds; each gets its own points, in which the other parameters keep their range.
        """
        count, first = self.section.extension_points, self.section.points
        rows = sobol(first + count * len(edges), self.section.point_seed)[first:]
        points = []
        for index, row in enumerate(rows):
            name, side = edges[index // count]
            axes = [axis.beyond(side) if axis.name == name else axis for axis in self.axes]
            points.append(self._point(first + index, "extension", axes, row))
        return points

    def edges_near(self, values: Mapping[str, float]) -> list[Edge]:
        """The bounds that a best point is too close to."""
        found: list[Edge] = []
        for axis in self.axes:
            if axis.can_extend and axis.place(values[axis.name]) <= EDGE:
                found.append((axis.name, "low"))
            if axis.can_extend and axis.place(values[axis.name]) >= 1 - EDGE:
                found.append((axis.name, "high"))
        return found

    def _point(self, number: int, stage: str, axes: Sequence[Axis], row: Sequence[float]) -> Point:
        own = {
            arm: {
                name: own_value(parameter, u)
                for (name, parameter), u in zip(mine.items(), row[len(SHARED) :], strict=False)
            }
            for arm, mine in self.own.items()
        }
        shared = {axis.name: axis.value(row[SHARED.index(axis.name)]) for axis in axes}
        return Point(number=number, stage=stage, shared=shared, own=own)


def make_space(experiment: Experiment, section: TuningSection) -> Space:
    """The space of an experiment.

    Raises:
        ExperimentError: an architecture has no such parameter, or a fixed parameter has several values.
    """
    declared = section.space.model_dump(exclude_none=True)
    for name in ("lr", "weight_decay"):
        if name not in declared and len(getattr(experiment, name)) > 1:
            raise ExperimentError(f"{name} has several values: give one, or its bounds in [tuning.space]")
    for arm, own in section.own.items():
        known = own_names(experiment, arm)
        for name in own:
            if name not in known:
                raise ExperimentError(
                    f"[tuning.own.{arm}]: {arm!r} has no parameter {name!r}{near(name, known)}"
                )
            if section.match != "none" and name in _WIDTHS:
                raise ExperimentError(
                    f"[tuning.own.{arm}] varies {name}, which match = {section.match!r} keeps equal: drop one"
                )
    axes = tuple(Axis(name, *declared[name]) for name in SHARED if name in declared)
    given = experiment.train.model_dump(include=set(SHARED), exclude_none=True)
    given |= {"lr": experiment.lr[0], "weight_decay": experiment.weight_decay[0]}
    fixed = {name: given[name] for name in SHARED if name in given and name not in declared}
    return Space(axes=axes, own=section.own, section=section, fixed=fixed)


def own_names(experiment: Experiment, arm: str) -> list[str]:
    """What ``[tuning.own.ARM]`` may vary: block options, ``conv`` and the numeric fields of ``[model]``."""
    from arena.blocks import block_options
    from arena.model import parse_arch

    try:
        blocks = parse_arch(experiment.arch_of(arm), 10_000)
    except ValueError as error:
        raise ExperimentError(str(error)) from None
    return sorted({*_FIELDS, *(option for block in set(blocks) for option in block_options(block))})


def own_override(own: Mapping[str, Any]) -> dict[str, Any]:
    """Own parameters as fields of ``[overrides.ARM]``."""
    fields = {name: value for name, value in own.items() if name in _FIELDS}
    return {**fields, "options": {name: value for name, value in own.items() if name not in _FIELDS}}


def own_value(parameter: OwnParameter, u: float) -> Any:
    """The value of an own parameter at u in [0, 1)."""
    if parameter.choices is not None:
        return parameter.choices[int(u * len(parameter.choices))]
    assert parameter.low is not None and parameter.high is not None
    low, high = parameter.low, parameter.high
    if parameter.whole:
        low, high = low - 0.5, high + 0.5  # every whole number is equally wide
        if parameter.log:
            low = max(low, 0.5)
    t = math.exp(math.log(low) + u * math.log(high / low)) if parameter.log else low + u * (high - low)
    if parameter.whole:
        return int(min(max(math.floor(t + 0.5), parameter.low), parameter.high))
    return min(max(_digits(t), parameter.low), parameter.high)


def sobol(count: int, seed: int) -> list[list[float]]:
    """The first points of the scrambled Sobol sequence of a seed, in [0, 1)^7.

    A longer sequence starts with the shorter one.
    """
    engine = torch.quasirandom.SobolEngine(DIMENSIONS, scramble=True, seed=seed)
    return engine.draw(count, dtype=torch.float64).tolist()


def _inner(scale: str, value: float) -> float:
    """The coordinate in which points are uniform."""
    if scale == "log":
        return math.log(value)
    return -math.log1p(-value) if scale == "gap" else value


def _outer(scale: str, t: float) -> float:
    if scale == "log":
        return _digits(math.exp(t))
    return round(1.0 - _digits(math.exp(-t)), 12) if scale == "gap" else _digits(t)


def _digits(value: float) -> float:
    return float(f"{value:.6g}")
