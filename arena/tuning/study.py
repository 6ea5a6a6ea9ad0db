"""Optuna studies, one for each (architecture, task): where trials are enqueued, claimed and told.

A study is the public record of the search: identical points in every one, open to ``optuna-dashboard``.
Which runs a trial stands for, and their full results, are in the store.

A trial is known by its point (user attribute ``point``), not by its number. Should two processes enqueue the
same point at the same moment, the trial with the lower number counts and the other is marked failed.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, TrialState

from arena.grid.experiment import one_line
from arena.grid.fields import ExperimentError
from arena.grid.plan import Setting, canonical, digest
from arena.tuning.space import Axis, Point, Space

JOURNAL = "journal.log"
_ATTEMPTS = 5
_RACE = r"(?i)unique|already exists|duplicate|locked"
LIVE = (TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE)


def open_storage(url: str | None, folder: Path) -> BaseStorage:
    """The storage of the studies.

    Args:
        url: of a database, as SQLAlchemy writes it (``sqlite:///x.db``, ``postgresql://...``); None: the
            journal file in ``folder``.
        folder: ``DIR/tuning``.

    Raises:
        ExperimentError: there is no such database, or the package that speaks to it is missing.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if url is None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / JOURNAL
        if path.exists():
            _drop_torn_line(path)
        return JournalStorage(JournalFileBackend(str(path)))
    if "://" not in url:
        raise ExperimentError(f"--storage {url!r} is no database URL such as sqlite:///tuning.db")
    import sqlalchemy.exc

    patient: dict[str, Any] = {"pool_pre_ping": True}
    if url.startswith("sqlite"):
        patient = {"connect_args": {"timeout": 60}}
    for attempt in range(_ATTEMPTS):
        try:
            return RDBStorage(_with_driver(url), engine_kwargs=patient)
        except (sqlalchemy.exc.SQLAlchemyError, ImportError, ValueError, RuntimeError) as error:
            # of two processes that make the tables at the same moment, one fails
            race = isinstance(error, sqlalchemy.exc.DBAPIError) and re.search(_RACE, str(error.orig))
            if not race or attempt + 1 == _ATTEMPTS:
                text = one_line(getattr(error, "orig", None) or error)
                raise ExperimentError(f"--storage: {text}") from None
            time.sleep(1.0)
    raise AssertionError


def _with_driver(url: str) -> str:
    """PostgreSQL without a named driver means psycopg 3, unless only the older one is there."""
    from importlib.util import find_spec

    for prefix in ("postgresql://", "postgres://"):
        if url.startswith(prefix) and (find_spec("psycopg") or not find_spec("psycopg2")):
            return "postgresql+psycopg://" + url.removeprefix(prefix)
    return url


def _drop_torn_line(path: Path) -> None:
    """Cut off a last line without an end: what a machine that lost power was writing."""
    lock = JournalFileSymlinkLock(str(path))
    lock.acquire()
    try:
        with open(path, "rb+") as file:
            data = file.read()
            if data and not data.endswith(b"\n"):
                file.truncate(data.rfind(b"\n") + 1)
    finally:
        lock.release()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a finished trial came to, read from its study."""

    point: int
    score: float
    """The declared metric, over the search seeds."""
    loss: float
    """Valid loss, which decides between equal scores; infinite after a divergence."""
    values: Mapping[str, float]
    """Shared parameters."""
    own: Mapping[str, Any]
    """The architecture's own parameters."""
    status: str
    """``done`` or ``diverged``."""


class Desk:
    """The study of one setting."""

    def __init__(self, storage: BaseStorage, setting: Setting, space: Space, folder: str) -> None:
        """Open the study, or make it.

        Args:
            storage: where it is.
            setting: the architecture and task.
            space: the points are from it.
            folder: name of the result folder: that of the process which makes the study leads it.
        """
        self.storage = storage
        self.folder = folder
        self.setting = setting
        self.space = space
        own = {arm: mine for arm, mine in space.own.items() if arm == setting.arm}
        self.id = digest({"space": space.content(own), "setting": setting.shared})
        task = setting.shared["task"]["name"]
        self.name = f"{setting.experiment}/{task}/{setting.arm}-{self.id[:8]}"
        self.label = f"{setting.arm} on {task}"
        metric, _ = space.section.metric_parts()
        self.direction: Literal["minimize", "maximize"] = "minimize" if metric == "loss" else "maximize"
        how: dict[str, Any] = {
            "storage": storage,
            "study_name": self.name,
            "sampler": optuna.samplers.RandomSampler(seed=0),  # its points are all enqueued
            "pruner": optuna.pruners.NopPruner(),
        }
        try:
            self.study = optuna.load_study(**how)
        except KeyError:
            try:
                self.study = optuna.create_study(**how, direction=self.direction)
                self.study.set_user_attr("leader", folder)
            except optuna.exceptions.DuplicatedStudyError:  # another process was faster
                self.study = optuna.load_study(**how)
        known = self.study.user_attrs
        notes = {
            "experiment": setting.experiment,
            "arm": setting.arm,
            "arch": setting.shared["model"]["arch"],
            "task": task,
            "task_params": canonical(setting.shared["task"]["params"]),
            "space": space.id,
            "metric": space.section.metric,
        }
        for key, value in notes.items():
            if known.get(key) != value:
                self.study.set_user_attr(key, value)

    def trials(self) -> dict[int, FrozenTrial]:
        """Point -> its trial, as the storage has it now."""
        found: dict[int, FrozenTrial] = {}
        for trial in sorted(self.study.get_trials(deepcopy=False), key=lambda t: t.number):
            point = trial.user_attrs.get("point")
            if point is None or trial.state not in LIVE:
                continue
            if point not in found:
                found[point] = trial
            elif trial.state is TrialState.WAITING:  # enqueued twice at the same moment
                self.fail(trial, "its point has another trial")
        return found

    @property
    def leads(self) -> bool:
        """Whether the processes of this folder enqueue the points: those of one folder only, as the others
        would enqueue the same ones at the same moment.
        """
        return self.study.user_attrs.get("leader") == self.folder

    def lead(self) -> None:
        """Enqueue from now on: the processes that did so are gone."""
        self.study.set_user_attr("leader", self.folder)

    def enqueue(self, points: Sequence[Point]) -> None:
        """Enqueue those of ``points`` that have no trial."""
        held = self.trials()
        for point in points:
            if point.number not in held:
                params, distributions = self.parameters(point)
                self.study.add_trial(
                    optuna.trial.create_trial(
                        state=TrialState.WAITING,
                        params=params,
                        distributions=distributions,
                        user_attrs={
                            "point": point.number,
                            "stage": point.stage,
                            "space": self.space.id,
                            "values": dict(point.shared),
                            "own": dict(point.own.get(self.setting.arm, {})),
                        },
                        system_attrs={"fixed_params": params},
                    )
                )

    def parameters(self, point: Point) -> tuple[dict[str, Any], dict[str, BaseDistribution]]:
        """A point as Optuna's parameters and their distributions.

        The distributions have room for the one extension of the space, so that all trials of a study share
        them.
        """
        params: dict[str, Any] = {}
        distributions: dict[str, BaseDistribution] = {}
        for axis in self.space.axes:
            room = axis
            if axis.can_extend and self.space.section.extension_points:
                room = axis.extended([(axis.name, "low"), (axis.name, "high")])
            name, value, distribution = encode(room, point.shared[axis.name])
            params[name], distributions[name] = value, distribution
        for name, parameter in self.space.own.get(self.setting.arm, {}).items():
            value = point.own[self.setting.arm][name]
            if parameter.choices is not None:
                distributions[name] = CategoricalDistribution([_text(choice) for choice in parameter.choices])
                value = _text(value)
            elif parameter.whole:
                low, high = int(parameter.low or 0), int(parameter.high or 0)
                distributions[name] = IntDistribution(low, high, log=parameter.log)
            else:
                distributions[name] = FloatDistribution(
                    float(parameter.low or 0), float(parameter.high or 0), log=parameter.log
                )
            params[name] = value
        return params, distributions

    def own_values(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The architecture's own parameters behind Optuna's."""
        found = {}
        for name, parameter in self.space.own.get(self.setting.arm, {}).items():
            value = params[name]
            if parameter.choices is not None:
                value = next(choice for choice in parameter.choices if _text(choice) == value)
            found[name] = value
        return found

    def claim(self, trial: FrozenTrial, owner: Mapping[str, Any]) -> bool:
        """Take a waiting trial; False where another process was faster."""
        identity = self.storage.get_trial_id_from_study_id_trial_number(self._study_id, trial.number)
        if not self.storage.set_trial_state_values(identity, state=TrialState.RUNNING):
            return False
        self.note(trial, "owner", dict(owner))
        return True

    def note(self, trial: FrozenTrial, key: str, value: Any) -> None:
        """Set a user attribute of an unfinished trial; nothing happens where another process finished it."""
        identity = self.storage.get_trial_id_from_study_id_trial_number(self._study_id, trial.number)
        try:
            self.storage.set_trial_user_attr(identity, key, value)
        except (RuntimeError, optuna.exceptions.UpdateFinishedTrialError):
            return

    def tell(self, trial: FrozenTrial, score: float, notes: Mapping[str, Any]) -> None:
        """Finish a trial. Of two processes that trained the same one, the first is heard: they agree."""
        for key, value in notes.items():
            self.note(trial, key, value)
        try:
            self.study.tell(trial.number, score, skip_if_finished=True)
        except (ValueError, RuntimeError):
            if self.trials()[trial.user_attrs["point"]].state is not TrialState.COMPLETE:
                raise

    def points(self, stage: str) -> list[Point]:
        """The points of a stage as they are enqueued here."""
        attributes = [trial.user_attrs for trial in self.trials().values()]
        return [
            Point(number=a["point"], stage=stage, shared=a["values"], own={self.setting.arm: a["own"]})
            for a in sorted(attributes, key=lambda a: a["point"])
            if a["stage"] == stage
        ]

    def outcomes(self) -> dict[int, Outcome]:
        """Point -> outcome of the finished trials."""
        found = {}
        for number, trial in self.trials().items():
            if trial.state is TrialState.COMPLETE:
                attributes = trial.user_attrs
                found[number] = Outcome(
                    point=number,
                    score=trial.value if trial.value is not None else float("nan"),
                    loss=math.inf if attributes["loss"] is None else float(attributes["loss"]),
                    values=attributes["values"],
                    own=attributes["own"],
                    status=attributes["status"],
                )
        return found

    @property
    def _study_id(self) -> int:
        return self.storage.get_study_id_from_name(self.name)

    def fail(self, trial: FrozenTrial, reason: str) -> None:
        """Mark a trial failed; its point may be enqueued again."""
        identity = self.storage.get_trial_id_from_study_id_trial_number(self._study_id, trial.number)
        try:
            self.storage.set_trial_user_attr(identity, "reason", reason)
            self.storage.set_trial_state_values(identity, state=TrialState.FAIL)
        except (RuntimeError, optuna.exceptions.UpdateFinishedTrialError):
            return  # another process did the same


def encode(axis: Axis, value: float) -> tuple[str, float, FloatDistribution]:
    """A shared parameter as Optuna sees it: its name, value and distribution."""
    if axis.scale == "gap":  # a log scale needs 1 - beta2 itself as the parameter
        low, high = round(1.0 - axis.high, 12), round(1.0 - axis.low, 12)
        value = min(max(round(1.0 - value, 12), low), high)
        return f"one_minus_{axis.name}", value, FloatDistribution(low, high, log=True)
    return axis.name, value, FloatDistribution(axis.low, axis.high, log=axis.scale == "log")


def decode(axis: Axis, value: float) -> float:
    """The shared parameter behind Optuna's value, to the digits of a point."""
    if axis.scale == "gap":
        value = round(1.0 - float(f"{value:.6g}"), 12)
    else:
        value = float(f"{value:.6g}")
    return min(max(value, axis.low), axis.high)


def _text(choice: Any) -> Any:
    """Optuna's categories are plain values."""
    return choice if isinstance(choice, (bool, int, float, str)) or choice is None else canonical(choice)
