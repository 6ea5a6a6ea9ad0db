"""The axes of an ablation, their levels, and the points that a request names.

A level is what a user types: ``channel``, or a number, which freezes erase or write at that value and sets
the dial of ``coupling``. A point is one level on every axis.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from arena.blocks.registry import CONVS
from arena.grid.experiment import ExperimentError, near
from arena.memory import (
    NAMED,
    Axis,
    Coupling,
    DecayForm,
    GateSpec,
    Normaliser,
    QKMap,
    Write,
    WriteOn,
)

Level = str | float
Levels = dict[str, Level]
"""Axis -> level."""

IDLE = "-"
"""The level of an axis that has no meaning at a point: the form of a decay that is not there."""
MOST_POINTS = 256


@dataclass(frozen=True, kw_only=True)
class AxisInfo:
    """One axis of an ablation."""

    levels: tuple[Level, ...]
    """What can be typed."""
    number: str = ""
    """What a number means, where one can be typed."""
    help: str


AXES: dict[str, AxisInfo] = {
    "decay": AxisInfo(levels=get_args(Axis), help="Decay of the memory: its axis."),
    "decay_sign": AxisInfo(levels=("positive", "signed"), help="Decay in [0, 1] or in [-1, 1]."),
    "decay_form": AxisInfo(levels=get_args(DecayForm), help="Parametrisation of the decay."),
    "erase": AxisInfo(
        levels=get_args(Axis), number="freezes it", help="Erase gate: its axis, or a number to freeze it at."
    ),
    "erase_range": AxisInfo(levels=(1.0, 2.0), help="Upper end of erase."),
    "write": AxisInfo(
        levels=get_args(Write),
        number="freezes it",
        help="Write gate: its axis, or a number to freeze it at.",
    ),
    "write_on": AxisInfo(
        levels=get_args(WriteOn), help="What write multiplies; correction is exploratory and slow."
    ),
    "coupling": AxisInfo(
        levels=tuple(level for level in get_args(Coupling) if level != "dial"),
        number="is the dial from tied scalar gates (0) to free ones (1)",
        help="How the gates depend on each other, or a number for the dial from tied (0) to free (1).",
    ),
    "normaliser": AxisInfo(levels=get_args(Normaliser), help="What a read is divided by."),
    "qk_map": AxisInfo(levels=get_args(QKMap), help="Normalisation of queries and keys."),
    "micro_steps": AxisInfo(
        levels=tuple(float(n) for n in range(1, 9)), help="Updates of the memory a token, DeltaProduct's n."
    ),
    "conv": AxisInfo(levels=CONVS, help="Short convolution on q, k and v."),
    "output_gate": AxisInfo(levels=("silu", "sigmoid", "none"), help="Factor on what a head reads."),
}

_FULL: Levels = {"erase": "channel", "write": "channel", "coupling": "free", "erase_range": 1.0}
PRESETS: dict[str, list[Levels]] = {
    "paper": [
        {**_FULL, "erase": "mean"},
        {**_FULL, "write": "mean"},
        {**_FULL},
        {**_FULL, "erase_range": 2.0},
    ],
    "left-out": [
        {**_FULL, "erase": "mean", "write": "mean"},
        {**_FULL, "coupling": "tied"},
        {**_FULL, "write": "one"},
        {**_FULL, "erase": 1.0},
        {**_FULL, "erase": "none"},
        {"erase": "none", "coupling": "complement", "erase_range": 1.0},
    ],
}
"""``paper``: the rows of GDN-2's own ablation (arXiv 2605.22791, table 5): write-only channel-wise,
erase-only channel-wise, both, both with erase in [0, 2]; the gate that is not channel-wise is the mean of its
channels, so that all four have the same parameters. ``left-out``: what that table leaves out: both gates one
a head but free; tied but channel-wise; erase with write frozen at 1; write with erase frozen at 1; the
complement, beside the memory without erase that it is to be compared with."""


def parse_level(axis: str, value: Any) -> Level:
    """A level as it was typed.

    Raises:
        ExperimentError: no such axis, or no such level on it.
    """
    if axis not in AXES:
        raise ExperimentError(f"an ablation has no axis {axis!r}{near(axis, AXES)}")
    info = AXES[axis]
    if isinstance(value, str):
        if value in info.levels:
            return value
        try:
            value = float(value)
        except ValueError:
            levels = [level_text(level) for level in info.levels]
            hint = near(value, levels)
            known = "" if hint.startswith("; known") else f"; known: {', '.join(levels)}"
            number = f"; a number {info.number}" if info.number else ""
            raise ExperimentError(f"axis {axis!r} has no level {value!r}{hint}{known}{number}") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ExperimentError(f"a level of axis {axis!r} is text or a number, not {value!r}")
    if not info.number and float(value) not in info.levels:
        known = ", ".join(map(level_text, info.levels))
        raise ExperimentError(f"axis {axis!r} has no level {value:g}; known: {known}")
    frozen = {("write", 1.0): "one", ("erase", 0.0): "none"}  # the same memory has one name
    return frozen.get((axis, float(value)), float(value))


def wanted_points(axes: Mapping[str, Sequence[Level]], presets: Iterable[str]) -> list[Levels]:
    """What is asked for: the product of the levels of ``axes``, then the presets; axes not named stay open.

    Raises:
        ExperimentError: an unknown preset, a repeated level, or more than :data:`MOST_POINTS` points.
    """
    points: list[Levels] = []
    parsed = {axis: [parse_level(axis, value) for value in values] for axis, values in axes.items()}
    for axis, levels in parsed.items():
        if len(set(levels)) < len(levels):
            raise ExperimentError(f"axis {axis!r} repeats a level: {', '.join(map(level_text, levels))}")
        if not levels:
            raise ExperimentError(f"axis {axis!r} has no levels: give some, or leave it out")
    count = 1
    for levels in parsed.values():
        count *= len(levels)
    if count > MOST_POINTS:
        raise ExperimentError(f"the axes span {count} points: at most {MOST_POINTS} make an ablation")
    if parsed:
        points += [dict(zip(parsed, levels, strict=True)) for levels in itertools.product(*parsed.values())]
    for preset in presets:
        if preset not in PRESETS:
            raise ExperimentError(f"no preset {preset!r}{near(preset, PRESETS)}")
        points += PRESETS[preset]
    return points


def levels_of(spec: GateSpec, conv: str, output_gate: str) -> Levels:
    """The level of every axis at a point, :data:`IDLE` where the axis has no meaning."""
    erase = spec.erase if spec.erase_value is None else float(spec.erase_value)
    decays = spec.decay != "none"
    return {
        "decay": spec.decay,
        "decay_sign": IDLE if not decays else "signed" if spec.signed else "positive",
        "decay_form": spec.decay_form if decays else IDLE,
        "erase": erase,
        "erase_range": float(spec.erase_range) if isinstance(erase, str) and erase != "none" else IDLE,
        "write": spec.write if spec.write_value is None else float(spec.write_value),
        "write_on": spec.write_on,
        "coupling": spec.coupling if spec.dial is None else float(spec.dial),
        "normaliser": spec.normaliser,
        "qk_map": spec.qk_map,
        "micro_steps": float(spec.micro_steps),
        "conv": conv,
        "output_gate": output_gate,
    }


def completed(wanted: Levels, base: Levels) -> Levels:
    """The level of every axis: where a point leaves one open, that of the base, or what the others ask for.

    A coupling that computes write gives it the axis of what it is computed from; without an erase gate there
    is no range, without a decay no sign.
    """
    point = {**base, **wanted}

    def follow(axis: str, level: Level) -> None:
        if axis not in wanted:
            point[axis] = level

    if point["coupling"] == "tied" and point["erase"] in ("scalar", "mean", "channel"):
        follow("write", point["erase"])
    elif point["coupling"] == "complement" and point["decay"] != "none":
        follow("write", point["decay"])
    elif point["coupling"] == "step":
        follow("write", "scalar")
    if point["erase"] == "none" or not isinstance(point["erase"], str):
        follow("erase_range", IDLE)
    elif point["erase_range"] == IDLE:
        follow("erase_range", 1.0)
    if point["decay"] == "none":
        follow("decay_sign", IDLE)
        follow("decay_form", IDLE)
    return point


def spec_of(levels: Levels, base: GateSpec) -> GateSpec:
    """The point of gate space with these levels; what is no axis (``a_range``) is the base's.

    Raises:
        ValueError: the levels contradict each other; one line says how.
    """
    erase, write, coupling = (levels[axis] for axis in ("erase", "write", "coupling"))
    fields: dict[str, Any] = {axis: levels[axis] for axis in ("decay", "write_on", "normaliser", "qk_map")}
    fields["signed"] = levels["decay_sign"] == "signed"
    fields["decay_form"] = base.decay_form if levels["decay_form"] == IDLE else levels["decay_form"]
    fields["erase_range"] = 1 if levels["erase_range"] == IDLE else int(float(levels["erase_range"]))
    fields["micro_steps"] = int(float(levels["micro_steps"]))
    fields["erase"], fields["erase_value"] = _frozen(erase)
    fields["write"], fields["write_value"] = _frozen(write)
    fields["coupling"], fields["dial"] = (coupling, None) if isinstance(coupling, str) else ("dial", coupling)
    return base.replace(**fields)


def _frozen(level: Level) -> tuple[str, float | None]:
    return (level, None) if isinstance(level, str) else ("scalar", level)


def label(arch: str, levels: Levels, base: Levels) -> str:
    """``gdn2 erase=mean write=mean``: the architecture and what differs from it, idle axes apart."""
    words = [
        f"{axis}={level_text(level)}"
        for axis, level in levels.items()
        if level != base[axis] and level != IDLE
    ]
    return " ".join([arch, *words])


def named(spec: GateSpec) -> str | None:
    """The architecture at a point of gate space, in the common layer.

    Where only the range that A starts in is another one (GDN's is (0, 16)), the name says so.
    """
    if spec.micro_steps > 1:
        found = re.fullmatch(r"(deltanet|gdn)((-neg)?(,.*)?)", named(spec.replace(micro_steps=1)) or "")
        family = {"deltanet": "deltaproduct", "gdn": "gdnproduct"}
        return found and f"{family[found[1]]}[{spec.micro_steps}]{found[2]}"
    for name, known in NAMED.items():
        if spec == known:
            return name
        if spec.decay_form == "softplus_a" and spec == known.replace(a_range=spec.a_range):
            if spec.decay == "none":
                return name
            return f"{name}, A from {spec.a_range[0]:g}..{spec.a_range[1]:g}"
    return None


def level_text(level: Level) -> str:
    """A level as it is typed."""
    return level if isinstance(level, str) else f"{level:g}"
