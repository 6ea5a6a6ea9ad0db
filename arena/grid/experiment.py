"""Experiment files: what to train, as strictly validated TOML.

An experiment is data. Nothing in it is executed, an unknown key is an error that names the near one, and
every problem is one line: :class:`ExperimentError` carries that line.
"""

from __future__ import annotations

import itertools
import math
import re
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    ValidationError,
    model_validator,
)

from arena.grid.fields import (
    ARM_NAME,
    Count,
    Decays,
    ExperimentError,
    Experts,
    Layers,
    Length,
    LengthRange,
    Lengths,
    Rates,
    Ratio,
    Seed,
    Seeds,
    Strict,
    Width,
    distinct,
    listed,
    near,
)
from arena.grid.tuning_section import OwnParameter, SpaceSection, TuningSection

LARGEST_FILE = 1_000_000
"""Bytes of an experiment file."""
MOST_RUNS = 1_000_000
"""Of an experiment."""


class ModelSection(Strict):
    """``[model]``: the model, for every architecture alike."""

    d_model: Width = 64
    """Width of the residual stream."""
    n_layers: Layers = 2
    """Number of blocks."""
    n_heads: Width = 2
    """Heads of each block."""
    outer: Literal["common", "official"] = "common"
    """The shared outer layer, or each paper's whole layer."""
    conv: str | None = None
    """The short convolution of every block; absent: the block's own default."""
    conv_on: Literal["qkv", "all"] | None = None
    """``all``: ``conv`` also after the block's map out and after every linear map of the MLP."""
    mlp_ratio: Ratio | None = None
    """Hidden width of the MLP over ``d_model``; absent: the model's default."""
    mlp_hidden: Width | None = None
    """Hidden width of the MLP itself, in place of ``mlp_ratio``; of one expert, where there are several."""
    experts: Experts | None = None
    """Above 1: every MLP is a mixture of so many."""
    experts_per_token: Experts | None = None
    """Experts that a token goes through; absent: 1."""
    load_balance: NonNegativeFloat | None = None
    """Coefficient of the load-balance loss; absent: 0.01."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Passed to every block."""


class ModelOverride(Strict):
    """What differs from ``[model]`` on one task (``[tasks.model]``) or for one architecture
    (``[overrides.NAME]``, which wins); ``options`` are merged.
    """

    d_model: Width | None = None
    n_layers: Layers | None = None
    n_heads: Width | None = None
    outer: Literal["common", "official"] | None = None
    conv: str | None = None
    conv_on: Literal["qkv", "all"] | None = None
    mlp_ratio: Ratio | None = None
    mlp_hidden: Width | None = None
    experts: Experts | None = None
    experts_per_token: Experts | None = None
    load_balance: NonNegativeFloat | None = None
    options: dict[str, Any] = Field(default_factory=dict)


class Arm(ModelOverride):
    """``[arms.NAME]``: a variant of an architecture under a name of its own, listed in ``archs`` beside plain
    architectures. Its fields win over ``[model]`` and ``[tasks.model]``; ``[overrides.NAME]`` wins over it.
    """

    arch: str | None = None
    """The architecture; absent: the arm's own name."""


class TaskSection(Strict):
    """``[[tasks]]``: one task with its parameters and lengths."""

    name: str
    """A name of ``arena list tasks``."""
    params: dict[str, Any] = Field(default_factory=dict)
    """The task's own parameters."""
    train_lengths: LengthRange
    """Shortest and longest training sequence; a single number for one length."""
    eval_lengths: Lengths
    """Sequence lengths that are reported (split test)."""
    train_length_choices: list[Length] = Field(default_factory=list)
    """Train on these lengths of the range only; absent: on all that the task accepts."""
    valid_lengths: list[Length] = Field(default_factory=list)
    """Lengths of the learning curve and of tuning (split valid); absent: the longest training length and
    twice that."""
    steps: Count | None = None
    """Instead of ``[train] steps``."""
    batch_size: Count | None = None
    """Instead of ``[train] batch_size``."""
    model: ModelOverride | None = None
    """What differs from ``[model]`` on this task, for every architecture alike."""

    @model_validator(mode="after")
    def _ordered(self) -> TaskSection:
        if self.train_lengths[0] > self.train_lengths[1]:
            raise ValueError(f"train_lengths {self.train_lengths} should be [shortest, longest]")
        for field in ("eval_lengths", "valid_lengths", "train_length_choices"):
            distinct(field, getattr(self, field))
        return self


class TrainSection(Strict):
    """``[train]``: optimisation and evaluation, for every run alike; the trainer's default where absent."""

    steps: Count
    """Optimiser steps."""
    batch_size: Count = 64
    """Sequences a step."""
    eval_every: NonNegativeInt | None = None
    """Steps between two points of the learning curve; 0: none."""
    eval_examples: Count | None = None
    """Sequences for each split and length of an evaluation."""
    final_lr_fraction: Annotated[float, Field(ge=0, le=1)] | None = None
    """Where the cosine ends, as a fraction of the peak rate."""
    stop_at: Annotated[float, Field(gt=0, le=1)] | None = None
    """Freeze a run whose accuracy reaches this on every valid length; absent: never, as comparisons need."""
    data_seed: Seed | None = None
    """Seed of the lengths of the steps and of the evaluation sets."""
    warmup: Annotated[float, Field(ge=0, le=1)] | None = None
    """Fraction of the steps over which the rate rises to its peak."""
    beta1: Annotated[float, Field(ge=0, lt=1)] | None = None
    """AdamW's first-moment decay."""
    beta2: Annotated[float, Field(ge=0, lt=1)] | None = None
    """AdamW's second-moment decay."""
    clip: PositiveFloat | None = None
    """Largest norm of the gradient."""


AxisLevels = Annotated[list[str | float], BeforeValidator(listed)]


class AblationSection(Strict):
    """``[ablation]``: points of gate space around the one architecture of ``archs``, for ``arena ablate``.

    The levels of all axes named are crossed; ``arena.ablation.AXES`` says what they are. A number freezes
    erase or write at that value; for the coupling it is the dial from tied (0) to free (1).
    """

    preset: Annotated[list[str], BeforeValidator(listed)] = Field(default_factory=list)
    """Points known by name: ``paper``, ``left-out``."""
    decay: AxisLevels = Field(default_factory=list)
    decay_sign: AxisLevels = Field(default_factory=list)
    decay_form: AxisLevels = Field(default_factory=list)
    erase: AxisLevels = Field(default_factory=list)
    erase_range: AxisLevels = Field(default_factory=list)
    write: AxisLevels = Field(default_factory=list)
    write_on: AxisLevels = Field(default_factory=list)
    coupling: AxisLevels = Field(default_factory=list)
    normaliser: AxisLevels = Field(default_factory=list)
    qk_map: AxisLevels = Field(default_factory=list)
    micro_steps: AxisLevels = Field(default_factory=list)
    conv: AxisLevels = Field(default_factory=list)
    output_gate: AxisLevels = Field(default_factory=list)

    @property
    def axes(self) -> dict[str, list[str | float]]:
        """The axes that are named, with their levels."""
        return {name: levels for name, levels in self if name != "preset" and levels}


def _sentence(value: Any) -> Any:
    """Let ``arena tune`` run a claim file, whose ``claim`` is a table."""
    return value.get("sentence", "") if isinstance(value, Mapping) else value


class Experiment(Strict):
    """A whole experiment file.

    Runs are the product ``tasks x archs x (lr x weight_decay) x seeds``.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")]
    """Names the default result folder."""
    title: str = ""
    """A heading for the report."""
    claim: Annotated[str, BeforeValidator(_sentence)] = ""
    """What the experiment is meant to show or test, in a sentence or two; in a claim file, a table with that
    sentence (:mod:`arena.claims.file`)."""
    archs: Annotated[list[str], Field(min_length=1)]
    """Names of ``arena list archs``, stacks (``gdn2+swa[3:1]``, ``xlstm[1:1]``) and names of ``[arms]``."""
    tasks: Annotated[list[TaskSection], Field(min_length=1)]
    seeds: Seeds = Field(default=[0, 1, 2])
    """A number of seeds, or the seeds."""
    lr: Rates = Field(default=[1e-3])
    """Peak learning rate, or several: every pair with ``weight_decay`` is one point (``trial``)."""
    weight_decay: Decays = Field(default=[0.1])
    """Decoupled weight decay, or several."""
    fleet_size: Annotated[int, Field(ge=1, le=4096)] = 16
    """Largest number of runs that train together; it changes speed, not results."""
    model: ModelSection = ModelSection()
    arms: dict[Annotated[str, Field(pattern=ARM_NAME)], Arm] = Field(default_factory=dict)
    overrides: dict[str, ModelOverride] = Field(default_factory=dict)
    ablation: AblationSection | None = None
    train: TrainSection
    tuning: TuningSection | None = None
    """What ``arena tune`` does; ``arena grid`` leaves it alone."""

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        for field in ("archs", "seeds", "lr", "weight_decay"):
            distinct(field, getattr(self, field))
        factors = (self.tasks, self.archs, self.lr, self.weight_decay, self.seeds)
        runs = math.prod(len(factor) for factor in factors)
        if runs > MOST_RUNS:
            raise ValueError(f"tasks x archs x lr x weight_decay x seeds are {runs} runs, over {MOST_RUNS}")
        for section in ("arms", "overrides"):
            for name in getattr(self, section):
                if name not in self.archs:
                    raise ValueError(
                        f"[{section}.{name}] is about no architecture of this experiment: archs has no "
                        f"{name!r}{near(name, self.archs)}"
                    )
        if self.tuning is not None:
            self.tuning.check_names(self.archs)
        return self

    @property
    def points(self) -> list[tuple[float, float]]:
        """The (lr, weight_decay) pairs; the index of a pair is the column ``trial``."""
        return list(itertools.product(self.lr, self.weight_decay))

    def arch_of(self, arm: str) -> str:
        """The architecture behind a name of ``archs``."""
        found = self.arms.get(arm)
        return found.arch if found is not None and found.arch is not None else arm


def shipped() -> list[str]:
    """Names of the experiments that come with the package."""
    folder = resources.files("experiments")
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))


def load_experiment(source: str | Path) -> Experiment:
    """Read and validate an experiment file.

    Args:
        source: a path that ends in ``.toml``, or the bare name of a shipped experiment.

    Raises:
        ExperimentError: one line about the first problem, with its place.
    """
    path = Path(source)
    if "\0" in str(source):
        raise ExperimentError(f"cannot read {str(source)!r}: no file has such a name")
    try:
        if path.suffix == ".toml":
            with open(path, "rb") as file:
                text, label = file.read(LARGEST_FILE + 1), str(source)
        elif str(source) in shipped():
            text, label = (resources.files("experiments") / f"{source}.toml").read_bytes(), f"{source}.toml"
        else:
            hint = near(str(source), shipped())
            raise ExperimentError(f"no experiment {str(source)!r}{hint} (or give a path that ends in .toml)")
    except OSError as error:
        raise ExperimentError(f"cannot read {source}: {error.strerror or error}") from None
    return parse_text(text, label=label)


def parse_text(text: bytes, *, label: str = "experiment") -> Experiment:
    """Validate the content of an experiment file.

    Raises:
        ExperimentError: one line about the first problem, with its place.
    """
    if len(text) > LARGEST_FILE:
        raise ExperimentError(f"{label} is larger than {LARGEST_FILE} bytes: it is no experiment")
    try:
        data = tomllib.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ExperimentError(f"{label} is not UTF-8 text") from None
    except (ValueError, RecursionError) as error:  # ValueError: also numbers of thousands of digits
        raise ExperimentError(f"{label} is not valid TOML: {one_line(error)}") from None
    return parse_experiment(data, label=label)


def parse_experiment(data: Mapping[str, Any], *, label: str = "experiment") -> Experiment:
    """Validate an experiment that is already a mapping.

    Raises:
        ExperimentError: one line about the first problem, with its place.
    """
    try:
        return Experiment.model_validate(dict(data))
    except ValidationError as error:
        problems = error.errors(include_url=False)
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ExperimentError(f"{label}: {_problem(problems[0], data)}{more}") from None


def one_line(error: object) -> str:
    """The text of an error on one line, shortened where it is very long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else text[:397] + "..."


_TABLE = re.compile(r"should be a valid dictionary( or instance of \w+)?")
_SECTIONS: dict[str, type[BaseModel]] = {
    "model": ModelSection,
    "train": TrainSection,
    "tasks": TaskSection,
    "arms": Arm,
    "overrides": ModelOverride,
    "ablation": AblationSection,
    "tuning": TuningSection,
}


def _problem(problem: Any, data: Mapping[str, Any]) -> str:
    """One validation problem of pydantic as a sentence: what, where, and the near key."""
    loc = list(problem["loc"])
    section: type[BaseModel] = Experiment
    rest, place = loc, "at the top level"
    if loc and loc[0] in _SECTIONS:
        section, rest, place = _SECTIONS[str(loc[0])], loc[1:], f"in [{loc[0]}]"
        if loc[0] == "tasks" and rest:
            number, rest = rest[0], rest[1:]
            entry = data["tasks"][number] if isinstance(number, int) else {}
            name = entry.get("name") if isinstance(entry, Mapping) else None
            place = f"in [[tasks]] number {int(number) + 1}" + (f" ({name})" if isinstance(name, str) else "")
        elif loc[0] in ("arms", "overrides") and rest:
            place, rest = f"in [{loc[0]}.{rest[0]}]", rest[1:]
        elif loc[0] == "tuning" and rest and rest[0] in ("space", "own"):
            section = SpaceSection if rest[0] == "space" else OwnParameter
            depth = 1 if rest[0] == "space" else 3
            place, rest = f"in [{'.'.join(str(part) for part in loc[: depth + 1])}]", rest[depth:]
    if section is TaskSection and len(rest) > 1 and rest[0] == "model":
        section, rest = ModelOverride, rest[1:]
        place = place.replace("[[tasks]]", "[tasks.model] of [[tasks]]")
    key = ".".join(str(part) for part in rest)
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r} {place}{near(str(rest[-1]), section.model_fields)}"
    if problem["type"] == "missing":
        header = "[[tasks]]" if loc[0] == "tasks" else f"[{loc[0]}]"
        return f"{key!r} is missing {place}" if rest else f"{header} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    message = _TABLE.sub("should be a table", message)
    message = message[:1].lower() + message[1:]
    if not rest:
        return message if not loc else f"{message} {place}"
    return f"{key} = {one_line(repr(problem['input']))} {place}: {message}"
