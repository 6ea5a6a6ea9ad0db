"""An experiment as the command line asks for it: a file and what differs, or no file at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from arena.grid.experiment import Experiment, load_experiment, one_line, parse_experiment
from arena.grid.fields import ExperimentError, near

BASE = "quickstart"
"""The shipped experiment whose model, training and lengths hold where nothing else is said."""


def request(
    source: str | None,
    *,
    archs: Sequence[str] = (),
    tasks: Sequence[str] = (),
    seeds: int | None = None,
    steps: int | None = None,
    points: int | None = None,
    report_seeds: int | None = None,
) -> Experiment:
    """The experiment of a file with what the command line changes.

    Args:
        source: file or bare name; None: the given architectures and tasks in the setting of ``quickstart``.
        archs: instead of the file's.
        tasks: those of the file to keep; without a file, any.
        seeds: number of seeds instead of the file's.
        steps: training steps of every task instead of the file's.
        points: of ``[tuning]``, instead of the file's.
        report_seeds: number of seeds of the tuned winners, instead of the file's.

    Raises:
        ExperimentError: one line.
    """
    if source is None and not archs and not tasks:
        raise ExperimentError(
            "nothing to train: give an experiment (arena list experiments) or --arch and --task names"
        )
    base = load_experiment(source if source is not None else BASE)
    data: dict[str, Any] = base.model_dump(exclude_none=True)
    if source is None:
        data |= {"name": "grid", "title": "", "claim": ""}
    if archs:
        data["archs"] = list(archs)
        for section in ("arms", "overrides"):
            data[section] = {name: value for name, value in data[section].items() if name in archs}
        if base.tuning is not None:
            data["tuning"] = base.tuning.restricted(archs)
    if tasks:
        entries = {name: [entry for entry in data["tasks"] if entry["name"] == name] for name in tasks}
        for name, found in entries.items():
            if not found and source is not None:
                known = [entry.name for entry in base.tasks]
                raise ExperimentError(f"experiment {base.name} has no task {name!r}{near(name, known)}")
            if not found:
                found.append(_default_task(name))
        data["tasks"] = [entry for found in entries.values() for entry in found]
    if seeds is not None:
        data["seeds"] = seeds
    if steps is not None:
        data["train"]["steps"] = steps
        for entry in data["tasks"]:
            entry.pop("steps", None)
    tuning = {"points": points, "report_seeds": report_seeds}
    changed = {name: value for name, value in tuning.items() if value is not None}
    if changed:
        data["tuning"] = {**data.get("tuning", {}), **changed}
    return parse_experiment(data, label=base.name if source is not None else "the request")


def _default_task(name: str) -> dict[str, Any]:
    """A task that no file describes: trained up to some 32 positions, reported at 1, 2 and 4 times that."""
    import synthetic_tasks
    from arena.training.data import check_measurable

    try:
        task = synthetic_tasks.get(name)
    except ValueError as error:
        raise ExperimentError(one_line(error)) from None

    def legal_from(target: int) -> int:
        for length in range(target, 16 * target):
            try:
                check_measurable(task, length)
                return length
            except ValueError:
                continue
        raise ExperimentError(f"task {name!r} accepts no length near {target}: write an experiment file")

    longest = legal_from(32)
    evaluated = [legal_from(factor * longest) for factor in (1, 2, 4)]
    return {"name": name, "train_lengths": [max(1, longest // 4), longest], "eval_lengths": evaluated}
