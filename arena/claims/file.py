"""Claim files: an experiment, and a ``[claim]`` table that says what would confirm the claim.

The file itself is the small size (``cpu``). ``[claim.full]`` says what differs at the published size: tables
are merged key by key, lists (``tasks``, ``archs``) and values replaced.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Annotated, Any

from pydantic import Field, ValidationError

from arena.claims.rules import Line, Narrower, Rule, lines_of
from arena.grid.experiment import Experiment, one_line, parse_experiment
from arena.grid.fields import ExperimentError, Strict, near
from arena.grid.plan import digest
from arena.statistics import claim_seeds

SIZES = ("cpu", "full")


class ClaimSection(Strict):
    """``[claim]``: what was claimed, by whom, how far it can be trusted, and what decides."""

    number: Annotated[int, Field(ge=1)]
    """Its place in the ledger."""
    sentence: str
    """The claim in one sentence."""
    source: str
    """Where it was published: arXiv number and section."""
    trust: str
    """How the published numbers are known, and what their source leaves open."""
    settings: str
    """Where the small size departs from the published settings."""
    exploratory: bool = False
    """Ours: nobody has claimed it."""
    rules: Annotated[list[Rule], Field(min_length=1)]
    """All lines must hold, those apart that are marked ``ours``, and controls."""
    full: dict[str, Any] = Field(default_factory=dict)
    """What differs from the file at full size."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim file, checked."""

    name: str
    section: ClaimSection
    experiments: Mapping[str, Experiment]
    """Size -> what is run."""

    @property
    def lines(self) -> list[Line]:
        """Every line of its rules."""
        return list(lines_of(self.section.rules))

    def seal(self, size: str) -> str:
        """A hash of all that was fixed before a run: settings of that size, and rules."""
        parts = [self.experiments[size], *self.section.rules]
        return digest([part.model_dump(mode="json", exclude_unset=True) for part in parts])


def claim_names() -> list[str]:
    """Names of all claims in the order of their numbers."""
    folder = resources.files("experiments") / "claims"
    names = [file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml")]
    return sorted(names, key=lambda name: (load_claim(name).section.number, name))


def load_claim(which: str) -> Claim:
    """A claim by its name or its number.

    Raises:
        ExperimentError: there is none such, or its file is wrong; one line.
    """
    folder = resources.files("experiments") / "claims"
    texts = {
        file.name.removesuffix(".toml"): file.read_text(encoding="utf-8")
        for file in folder.iterdir()
        if file.name.endswith(".toml")
    }
    if which.isdigit():
        for name, text in texts.items():
            if parse_claim(name, tomllib.loads(text)).section.number == int(which):
                return parse_claim(name, tomllib.loads(text))
        raise ExperimentError(f"no claim has the number {which}; arena reproduce --list shows them all")
    if which not in texts:
        raise ExperimentError(f"no claim {which!r}{near(which, texts)}")
    return parse_claim(which, tomllib.loads(texts[which]))


def parse_claim(name: str, data: Mapping[str, Any]) -> Claim:
    """Validate a claim file that is already a mapping.

    Raises:
        ExperimentError: one line about the first problem.
    """
    label = f"claims/{name}.toml"
    table = data.get("claim")
    if not isinstance(table, Mapping):
        raise ExperimentError(f"{label} has no [claim] table")
    try:
        section = ClaimSection.model_validate(dict(table))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ExperimentError(f"{label}: [claim] {place}: {one_line(first['msg'])}") from None
    base = {key: value for key, value in data.items() if key != "claim"}
    common = {"name": name, "claim": section.sentence}
    sizes = {"cpu": {**base, **common}, "full": {**_merged(base, section.full), **common}}
    experiments = {size: parse_experiment(sizes[size], label=f"{label} ({size})") for size in SIZES}
    claim = Claim(name=name, section=section, experiments=experiments)
    for size, experiment in experiments.items():
        _check(claim, size, experiment, f"{label} ({size})")
    return claim


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _merged(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _check(claim: Claim, size: str, experiment: Experiment, label: str) -> None:
    """ExperimentError where a rule speaks of what the experiment does not measure, or cannot decide."""
    tuning = experiment.tuning
    if tuning is None:
        raise ExperimentError(f"{label}: a claim is run by the tuner: give [tuning]")
    for line in claim.lines:
        for arm in line.subject:
            if arm not in experiment.archs:
                raise ExperimentError(f"{label}: a rule names {arm!r}{near(arm, experiment.archs)}")
        rule = line.rule
        found = [
            task
            for task in experiment.tasks
            if rule.task in (None, task.name) and rule.params.items() <= task.params.items()
        ]
        if len(found) != 1:
            what = f"{rule.task or 'a task'} {rule.params or ''}".strip()
            raise ExperimentError(f"{label}: a rule is about {what}, of which there are {len(found)}")
        length = rule.length_at(size)
        if length is not None and length not in found[0].eval_lengths:
            raise ExperimentError(f"{label}: a rule is about length {length}, which is not reported")
        if isinstance(rule, Narrower) and not {*line.subject} <= {*tuning.panel}:
            raise ExperimentError(f"{label}: {line.key} compares windows of arms that panel does not have")
        if isinstance(rule.published, dict):
            keys = [" > ".join(subject) for subject in rule.subjects()]
            for key in rule.published:
                if key not in keys:
                    raise ExperimentError(f"{label}: published has {key!r}{near(key, keys)}")
    for group in families(claim):
        needed = claim_seeds(len(group))
        windows = any(isinstance(line.rule, Narrower) for line in group)
        declared = min([len(tuning.report_seeds)] + [tuning.panel_seeds] * windows)
        if declared < needed:
            raise ExperimentError(
                f"{label}: {len(group)} lines are a family that needs {needed} seeds; {declared} are declared"
            )


def families(claim: Claim) -> list[list[Line]]:
    """The lines that are corrected together: controls, those of the claim, those that are ours beside it."""
    names = ("control", "claim", "ours")
    groups = [[line for line in claim.lines if line.family == name] for name in names]
    return [group for group in groups if group]
