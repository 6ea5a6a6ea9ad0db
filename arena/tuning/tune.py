"""``arena tune``: the same budget for every architecture, selection on valid, one report on test.

Stages: the paired points; more of them beyond a bound that a best point came close to; adaptive trials, if
asked for; then, at once, the winners on fresh seeds and the panels. What is done follows from the experiment
and from what the studies say, so a process that starts again, or joins, goes on where things stand.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
from optuna.storages import BaseStorage

from arena.grid.driver import GridReport, Pending, as_executor
from arena.grid.environment import foreign_kernels
from arena.grid.executors import Event, Executor, Work, gpu_count
from arena.grid.experiment import Experiment
from arena.grid.fields import ExperimentError
from arena.grid.plan import Run, Setting, canonical
from arena.grid.store import Store, write_whole
from arena.grid.toml import to_toml
from arena.grid.tuning_section import TuningSection
from arena.tuning.crew import GRACE, POLL, Crew, Trials, identity
from arena.tuning.exploit import batches, suggest
from arena.tuning.match import Solution, plan_solved
from arena.tuning.prepare import PANEL_RATES, check, panel_seeds, prepare, write_parquet
from arena.tuning.select import best, metric_lengths, score_rows, winners_table
from arena.tuning.space import Edge, Point, Space, own_override
from arena.tuning.study import Desk, Outcome, open_storage


@dataclass(kw_only=True)
class TuneReport(GridReport):
    """How a tuning stands."""

    winners: pl.DataFrame | None = None
    """As in DIR/tuning/winners.parquet; None until all trials are there."""
    elsewhere: int = 0
    """Runs that other processes trained into folders of their own."""
    lines: list[str] = field(default_factory=list)
    """What was said."""


class _Stopped(Exception):
    """Some runs have no result: interrupted, or failed."""


def tune(
    experiment: Experiment,
    directory: str | Path,
    *,
    device: str = "cpu",
    workers: int | None = None,
    executor: Executor | str = "local",
    storage: str | None = None,
    work: Work | None = None,
    on_start: Callable[[Pending], None] | None = None,
    on_event: Callable[[Event], None] | None = None,
    on_line: Callable[[str], None] | None = None,
) -> TuneReport:
    """Tune every architecture of an experiment on every task with the same budget, and test the winners.

    Safe to kill at any instant and to start again, and to run several times at once: in one result folder,
    or, through one ``storage``, in several.

    Args:
        experiment: with its ``[tuning]`` section, or the defaults of one.
        directory: the result folder.
        device: ``cpu`` or ``cuda``.
        workers: processes; None: one a core, or one a GPU.
        executor: where fleets train: ``local``, ``ray``, ``slurm``, or what
            :func:`arena.grid.executors.make_executor` made.
        storage: URL of a database for the Optuna studies; None: a journal file in the folder.
        work: what a worker does with a fleet; None: train it.
        on_start: called before each stage, when it is known what is missing.
        on_event: called for everything that happens to a fleet.
        on_line: called with each line for people: the plan and its cost, bounds, winners.

    Raises:
        ExperimentError: the request is wrong; nothing was started.
        StoreError: the folder is in use, holds another experiment, or cannot be written.
    """
    problem = foreign_kernels()
    if problem is not None:
        raise ExperimentError(problem)
    gpu_count(device)  # what tuning measures before it starts is measured on this machine
    engine = as_executor(executor, directory, device=device, workers=workers)
    section = experiment.tuning or TuningSection()
    experiment = experiment.model_copy(update={"tuning": section})
    say = on_line or (lambda line: None)
    space = check(experiment, section, device)
    opened = open_storage(storage, Path()) if storage is not None else None  # refused before anything is made
    with Store(directory, shared=True) as store:
        folder = store.directory / "tuning"
        folder.mkdir(exist_ok=True)
        with store.turn():  # who joins finds it done
            name = identity(folder / "folder")
            settings, solved = prepare(experiment, space, folder, device=device, executor=engine, say=say)
        report = TuneReport(planned=0)
        tuner = _Tuner(
            experiment=experiment,
            section=section,
            space=space,
            settings=settings,
            device=device,
            store=store,
            folder=folder,
            name=name,
            storage=opened if opened is not None else open_storage(None, folder),
            report=report,
            say=say,
            solved=solved,
        )
        crew = Crew(
            store,
            folder,
            name,
            fleet_size=experiment.fleet_size,
            executor=engine,
            work=work,
            report=report,
            score=tuner.score,
            shows_life=storage is not None,
            say=say,
            on_start=on_start,
            on_event=on_event,
        )
        try:
            tuner.go(crew)
        except _Stopped:
            pass
        finally:
            crew.claims.close()
        report.elsewhere = len(crew.elsewhere)
        report.planned = len(tuner.runs)
        report.stored = sum(run_id in crew.finished for run_id in tuner.runs)
        report.others = store.record_request(experiment.name, tuner.request, list(tuner.runs.values()))
    return report


def _task_key(setting: Setting) -> str:
    return canonical(setting.shared["task"])


@dataclass(kw_only=True)
class _Tuner:
    """The state of one ``arena tune``."""

    experiment: Experiment
    section: TuningSection
    space: Space
    settings: list[Setting]
    device: str
    store: Store
    folder: Path
    name: str
    """Of the folder: no other has it."""
    storage: BaseStorage
    report: TuneReport
    say: Callable[[str], None]
    solved: list[Solution]
    runs: dict[str, Run] = field(default_factory=dict)
    """All runs that are known to be wanted so far."""

    def __post_init__(self) -> None:
        self.request = to_toml(self.experiment.model_dump(exclude_none=True))
        self.desks = [Desk(self.storage, setting, self.space, self.name) for setting in self.settings]
        self.metric, _ = self.section.metric_parts()
        self.lengths = {desk.name: metric_lengths(desk.setting, self.section) for desk in self.desks}
        self._own: dict[tuple[str, str], dict[str, Setting]] = {}

    def go(self, crew: Crew) -> None:
        """All stages, as far as they get."""
        points = self.space.search_points()
        self._stage(crew, "search", {desk.name: points for desk in self.desks})
        edges = self._edges(points)
        extension: list[Point] = []
        if edges and self.section.extension_points:
            extension = self.space.extension_points(edges)
            self._stage(crew, "extension", {desk.name: extension for desk in self.desks})
        self._warn_of_edges(edges)
        first = len(points) + len(extension)
        for count in batches(self.section.trials):
            batch = {
                desk.name: suggest(desk, kind=self.section.exploit, first=first, count=count, edges=edges)
                for desk in self.desks
            }
            self._stage(crew, "exploit", batch)
            first += count
        self._check_budget(first)
        winners = [self._best(desk) for desk in self.desks]
        table = winners_table(self.desks, winners, self._defaults())
        with self.store.turn():
            write_parquet(self.folder / "winners.parquet", table)
            self._write_space(points + extension, edges)
        runs = [
            run
            for desk, winner in zip(self.desks, winners, strict=True)
            for run in self._finals(desk, winner)
        ]
        runs += [run for desk in self.desks for run in self._panel(desk)]
        self._train(crew, runs, {})
        self.report.winners = table

    def score(self, desk: Desk, frames: Sequence[pl.DataFrame]) -> tuple[float, dict[str, Any]]:
        """As :func:`score_rows`, in the metric and at the lengths of a study."""
        return score_rows(frames, self.metric, self.lengths[desk.name])

    def _stage(self, crew: Crew, stage: str, points: Mapping[str, Sequence[Point]]) -> None:
        """Enqueue the points of every study and see that all of them are trained and told."""
        runs: list[Run] = []
        trials: dict[str, tuple[Desk, int]] = {}
        self._enqueue(points)
        for desk in self.desks:
            wanted = {point.number for point in points[desk.name]}
            for point in desk.points(stage):  # as enqueued: by this process, or by a faster one
                if point.number in wanted:
                    mine = self._search_runs(desk, point)
                    runs += mine
                    trials |= {run.id: (desk, point.number) for run in mine}
        self._train(crew, runs, trials)

    def _enqueue(self, points: Mapping[str, Sequence[Point]]) -> None:
        """See that every point has a trial: enqueue it, or wait for the process that does."""
        since = time.monotonic()
        missing = list(self.desks)
        while missing:
            late = time.monotonic() - since > GRACE
            for desk in missing:
                if late and not desk.leads:
                    desk.lead()
                if desk.leads:
                    with self.store.turn():
                        desk.enqueue(points[desk.name])
            missing = [
                desk for desk in missing if not {p.number for p in points[desk.name]} <= desk.trials().keys()
            ]
            if missing:
                time.sleep(POLL)

    def _train(self, crew: Crew, runs: Sequence[Run], trials: Trials) -> None:
        for run in runs:  # one run has one row: what it is to the tuning must be one thing too
            held = self.runs.setdefault(run.id, run)
            if held.notes != run.notes:
                raise ExperimentError(
                    f"{held.label}: trial {held.trial} of stage {held.stage!r} would be the same run as "
                    f"trial {run.trial} of stage {run.stage!r} of {run.arm!r}: give other parameters"
                )
        # a request that is complete keeps the plan that it had: this one may still lack later stages
        if not all((self.store.runs / run.id).is_dir() for run in runs):
            self.store.record_request(self.experiment.name, self.request, list(self.runs.values()))
        if not crew.train(runs, trials):
            raise _Stopped

    def _setting(self, desk: Desk, own: Mapping[str, Any]) -> Setting:
        if not own:
            return desk.setting
        key = desk.setting.arm, canonical(dict(own))
        if key not in self._own:
            found = plan_solved(
                self.experiment, self.solved, self.device, arm=desk.setting.arm, own=own_override(own)
            )
            self._own[key] = {_task_key(setting): setting for setting in found}
        return self._own[key][_task_key(desk.setting)]

    def _search_runs(self, desk: Desk, point: Point) -> list[Run]:
        """The runs of a point: never tested, and validated at the lengths that the reported runs have."""
        setting = self._setting(desk, point.own.get(desk.setting.arm, {}))
        return [
            setting.run(
                seed=seed,
                trial=point.number,
                point=self._defaults() | dict(point.shared),
                stage=point.stage,
                space=self.space.id,
                train=_untested(desk.setting),
            )
            for seed in self.section.search_seeds
        ]

    def _finals(self, desk: Desk, winner: Outcome) -> list[Run]:
        """The winner on fresh seeds, and so on fresh data: the only runs that are tested."""
        setting = self._setting(desk, winner.own)
        return [
            setting.run(
                seed=seed,
                trial=winner.point,
                point=self._defaults() | dict(winner.values),
                stage="final",
                space=self.space.id,
            )
            for seed in self.section.report_seeds
        ]

    def _panel(self, desk: Desk) -> list[Run]:
        """Learning rates over the whole range of the space, all else at its default."""
        if desk.setting.arm not in self.section.panel:
            return []
        (axis,) = (axis for axis in self.space.axes if axis.name == "lr")
        return [
            desk.setting.run(
                seed=seed,
                trial=index,
                point=self._defaults() | {"lr": axis.value(index / (PANEL_RATES - 1))},
                stage="panel",
                space=self.space.id,
                train=_untested(desk.setting),
            )
            for index in range(PANEL_RATES)
            for seed in panel_seeds(self.section)
        ]

    def _defaults(self) -> dict[str, float]:
        return {"lr": self.experiment.lr[0], "weight_decay": self.experiment.weight_decay[0]}

    def _best(self, desk: Desk, below: int | None = None) -> Outcome:
        outcomes = {
            number: outcome for number, outcome in desk.outcomes().items() if below is None or number < below
        }
        return best(outcomes, desk.direction, self.experiment.lr[0])

    def _edges(self, points: Sequence[Point]) -> list[Edge]:
        """The bounds that the best paired point of any study is too close to."""
        near = {
            edge: desk
            for desk in reversed(self.desks)
            for edge in self.space.edges_near(self._best(desk, len(points)).values)
        }
        for (name, side), desk in sorted(near.items()):
            more = self.section.extension_points
            what = (
                f"{more} more points beyond it for every architecture and task"
                if more
                else "extension is off"
            )
            self.say(f"{desk.label}: the best point is in the outer tenth of {name}, {side} end: {what}")
        return sorted(near)

    def _warn_of_edges(self, edges: Sequence[Edge]) -> None:
        """Say where the best point is at the end of an extended range: there is one extension only."""
        if not self.section.extension_points:
            return
        for desk in self.desks:
            values = self._best(desk).values
            for axis in self.space.axes:
                place = axis.extended(edges).place(values[axis.name])
                side = "low" if place <= 0.05 else "high" if place >= 0.95 else ""
                if (axis.name, side) in edges:
                    self.say(
                        f"{desk.label}: best at the {side} end of the extended range of {axis.name} too: "
                        "widen [tuning.space]"
                    )

    def _check_budget(self, expected: int) -> None:
        """Equal budgets are checked, not claimed."""
        counts = {desk.name: len(desk.outcomes()) for desk in self.desks}
        if set(counts.values()) != {expected}:
            raise RuntimeError(f"studies have unequal budgets, not {expected} trials each: {counts}")

    def _write_space(self, points: Sequence[Point], edges: Sequence[Edge]) -> None:
        content = {
            "space": self.space.id,
            "bounds": {axis.name: [axis.low, axis.high, axis.scale] for axis in self.space.axes},
            "extended": {
                axis.name: [axis.extended(edges).low, axis.extended(edges).high]
                for axis in self.space.axes
                if axis.extended(edges) != axis
            },
            "own": {
                arm: {k: v.model_dump(exclude_none=True) for k, v in own.items()}
                for arm, own in self.space.own.items()
            },
            "metric": self.section.metric,
            "points": [
                {"trial": point.number, "stage": point.stage, **point.shared, "own": point.own}
                for point in points
            ],
            "studies": {desk.name: desk.setting.arm for desk in self.desks},
        }
        write_whole(self.folder / "space.json", json.dumps(content, indent=1).encode())


def _untested(setting: Setting) -> dict[str, Any]:
    """Training without any length that is reported, validated where the reported runs are."""
    from arena.training.data import valid_lengths

    return {"eval_lengths": [], "valid_lengths": list(valid_lengths(setting.train, setting.task))}
