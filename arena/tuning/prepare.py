"""What happens before the first trial: everything is checked, matched, measured and said."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from arena.grid.executors import Executor
from arena.grid.experiment import Experiment
from arena.grid.fields import ExperimentError
from arena.grid.plan import Setting, canonical, plan_settings
from arena.grid.store import write_whole
from arena.grid.tuning_section import TuningSection
from arena.tuning.cost import Probes, cost_lines, family_lines, total_cost
from arena.tuning.exploit import check_sampler
from arena.tuning.flops import relative
from arena.tuning.ledger import ledger_lines, ledger_table
from arena.tuning.match import TOLERANCE, Quantity, Solution, model_quantity, plan_solved, solve_all
from arena.tuning.select import metric_lengths
from arena.tuning.space import Point, Space, make_space, own_override

PANEL_RATES = 9
"""Learning rates of a panel, over the whole range of the space."""
PANEL_SEED = 2000
"""The first seed of the panels."""


def panel_seeds(section: TuningSection) -> range:
    """Seeds of each rate of a panel."""
    return range(PANEL_SEED, PANEL_SEED + section.panel_seeds)


def check(experiment: Experiment, section: TuningSection, device: str) -> Space:
    """Everything that can be refused, before anything is written.

    Raises:
        ExperimentError: one line.
    """
    check_sampler(section.exploit)
    space = make_space(experiment, section)
    both = sorted({*section.search_seeds} & {*panel_seeds(section)}) if section.panel else []
    if both:  # a point at a bound would be a run of the panel too
        raise ExperimentError(f"search_seeds has {both}, which are seeds of the panel: give others")
    plain = plan_settings(experiment, device=device)
    for setting in plain:
        metric_lengths(setting, section)
    if space.own:
        for point in space.search_points():
            own = [s for arm in space.own for s in _plan_own(experiment, [], device, arm, point)]
            _refuse_twins([s for s in plain if s.arm not in space.own] + own, point)
    return space


def _refuse_twins(settings: Sequence[Setting], point: Point) -> None:
    """ExperimentError where own parameters turn an architecture into another one: one run, two trials."""
    seen: dict[str, str] = {}
    for setting in settings:
        task = setting.shared["task"]
        twin = seen.setdefault(canonical([setting.shared["model"], task]), setting.arm)
        if twin != setting.arm:
            raise ExperimentError(
                f"[tuning.own] makes {twin!r} and {setting.arm!r} the same model on task {task['name']!r} at "
                f"point {point.number}: drop that value, or one of the two"
            )


def prepare(
    experiment: Experiment,
    space: Space,
    folder: Path,
    *,
    device: str,
    executor: Executor,
    say: Callable[[str], None],
) -> tuple[list[Setting], list[Solution]]:
    """Match the architectures, write the ledger, say what it all will cost.

    Args:
        experiment: with its ``[tuning]`` section.
        space: of that section.
        folder: ``DIR/tuning``.
        device: ``cpu`` or ``cuda``.
        executor: where fleets will train.
        say: called with each line.

    Returns:
        Every architecture on every task as it is to be trained, and what was solved for it.

    Raises:
        ExperimentError: what an architecture varies for itself undoes the match.
    """
    section = space.section
    written = plan_settings(experiment, device=device)
    slots = executor.slots(max(1, len(written)))
    probes = Probes(folder / "probes.json", device=device, threads=slots.threads)
    solved: list[Solution] = []
    if section.match != "none":

        def quantity(setting: Setting) -> Quantity:
            if section.match != "time":
                return model_quantity(section.match, setting.train.train_lengths[1])

            def measure(model: Mapping[str, Any]) -> float:
                changed = dataclasses.replace(setting, shared={**setting.shared, "model": dict(model)})
                return probes.seconds(changed)

            return Quantity("time", measure)

        solved = solve_all(experiment, written, quantity, folder / "matched.json")
    settings = plan_solved(experiment, solved, device)
    _refuse_unmatching(experiment, space, settings, solved, device)
    seconds = {index: probes.seconds(setting) for index, setting in enumerate(settings)}
    ledger = ledger_table(settings, section, seconds)
    write_parquet(folder / "ledger.parquet", ledger)
    lines = [
        *ledger_lines(ledger),
        *family_lines(section, len(experiment.tasks)),
        *cost_lines(
            settings, section, seconds, workers=slots.workers, panel_runs=PANEL_RATES * section.panel_seeds
        ),
    ]
    for line in lines:
        say(line)
    return settings, solved


def planned_seconds(
    experiment: Experiment, folder: Path, *, device: str, executor: Executor
) -> tuple[float, int]:
    """Seconds of computing that a tuning will take, by a short measurement, and its processes.

    Args:
        experiment: with its ``[tuning]`` section.
        folder: ``DIR/tuning``; what is measured there is not measured again.
        device: ``cpu`` or ``cuda``.
        executor: where fleets will train.

    Raises:
        ExperimentError: the experiment can't be run.
    """
    section = experiment.tuning or TuningSection()
    space = check(experiment, section, device)
    folder.mkdir(parents=True, exist_ok=True)
    settings, _ = prepare(experiment, space, folder, device=device, executor=executor, say=lambda line: None)
    slots = executor.slots(max(1, len(settings)))
    probes = Probes(folder / "probes.json", device=device, threads=slots.threads)
    seconds = {index: probes.seconds(setting) for index, setting in enumerate(settings)}
    panel_runs = PANEL_RATES * section.panel_seeds
    return total_cost(settings, section, seconds, panel_runs=panel_runs)[0], slots.workers


def _plan_own(
    experiment: Experiment, solved: Sequence[Solution], device: str, arm: str, point: Point
) -> list[Setting]:
    """An arm on every task as it is at a point, with its own parameters."""
    return plan_solved(experiment, solved, device, arm=arm, own=own_override(point.own[arm]))


def _refuse_unmatching(
    experiment: Experiment,
    space: Space,
    settings: Sequence[Setting],
    solved: Sequence[Solution],
    device: str,
) -> None:
    """ExperimentError where an architecture's own parameters undo what was matched without them.

    Times are left out: measuring them at every point would take longer than the search.
    """
    section = space.section
    if section.match in ("none", "time"):
        return
    for arm in space.own:
        base = [setting for setting in settings if setting.arm == arm]
        for point in space.search_points():
            for plain, setting in zip(base, _plan_own(experiment, solved, device, arm, point), strict=True):
                quantity = model_quantity(section.match, setting.train.train_lengths[1])
                before, after = (quantity.measure(s.shared["model"]) for s in (plain, setting))
                if abs(relative(after, before)) > TOLERANCE[section.match]:
                    raise ExperimentError(
                        f"[tuning.own.{arm}]: {canonical(dict(point.own[arm]))} changes the {section.match} "
                        f"by {100 * relative(after, before):+.1f} %, which match = {section.match!r} keeps "
                        "equal: drop one"
                    )


def write_parquet(path: Path, frame: pl.DataFrame) -> None:
    """Write a table whole."""
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    write_whole(path, buffer.getvalue())
