"""What happens before the first trial: everything is checked, matched, measured and said."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from arena.grid.experiment import Experiment
from arena.grid.plan import Setting, plan_settings
from arena.grid.store import write_whole
from arena.grid.tuning_section import TuningSection
from arena.tuning.cost import Probes, cost_lines, crew_size, family_lines
from arena.tuning.exploit import check_sampler
from arena.tuning.ledger import ledger_lines, ledger_table
from arena.tuning.match import Quantity, Solution, model_quantity, plan_solved, solve_all
from arena.tuning.select import metric_lengths
from arena.tuning.space import Space, make_space, own_override

PANEL_RATES = 9
"""Learning rates of a panel, over the whole range of the space."""
PANEL_SEEDS = (2000, 2001, 2002)


def check(experiment: Experiment, section: TuningSection, device: str) -> Space:
    """Everything that can be refused, before anything is written.

    Raises:
        ExperimentError: one line.
    """
    check_sampler(section.exploit)
    space = make_space(experiment, section)
    for setting in plan_settings(experiment, device=device):
        metric_lengths(setting, section)
    for arm in space.own:
        for point in space.search_points():
            plan_solved(experiment, [], device, arm=arm, own=own_override(point.own[arm]))
    return space


def prepare(
    experiment: Experiment,
    section: TuningSection,
    folder: Path,
    *,
    device: str,
    workers: int | None,
    gpus: int,
    say: Callable[[str], None],
) -> tuple[list[Setting], list[Solution]]:
    """Match the architectures, write the ledger, say what it all will cost.

    Args:
        experiment: with its ``[tuning]`` section.
        section: that section.
        folder: ``DIR/tuning``.
        device: ``cpu`` or ``cuda``.
        workers: processes; None: one a core, or one a GPU.
        gpus: number of GPUs to use.
        say: called with each line.

    Returns:
        Every architecture on every task as it is to be trained, and what was solved for it.
    """
    written = plan_settings(experiment, device=device)
    count, threads = crew_size(workers, gpus, len(written))
    probes = Probes(folder / "probes.json", device=device, threads=threads)
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
    seconds = {index: probes.seconds(setting) for index, setting in enumerate(settings)}
    ledger = ledger_table(settings, section, seconds)
    write_parquet(folder / "ledger.parquet", ledger)
    lines = [
        *ledger_lines(ledger),
        *family_lines(section, len(experiment.tasks)),
        *cost_lines(settings, section, seconds, workers=count, panel_runs=PANEL_RATES * len(PANEL_SEEDS)),
    ]
    for line in lines:
        say(line)
    return settings, solved


def write_parquet(path: Path, frame: pl.DataFrame) -> None:
    """Write a table whole."""
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    write_whole(path, buffer.getvalue())
