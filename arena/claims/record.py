"""What the repository keeps of a claim's runs: a small Parquet of scores, and a JSON that says where they
are from.

``experiments/claims/results/NAME.SIZE.parquet`` and ``.json``, written by ``arena reproduce --record`` alone.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from arena.claims.file import Claim
from arena.claims.scores import score_table
from arena.grid.environment import ROOT
from arena.grid.experiment import parse_experiment
from arena.grid.fields import ExperimentError
from arena.grid.results import load_environments, load_results
from arena.grid.store import write_whole
from arena.tuning.prepare import write_parquet

FOLDER = ROOT / "experiments" / "claims" / "results"


@dataclass(frozen=True, kw_only=True)
class Record:
    """A claim's recorded runs."""

    table: pl.DataFrame
    """As ``score_table`` gives it."""
    origin: Mapping[str, Any]
    """``command``, ``date``, ``seal`` (``Claim.seal`` at the time), ``runs`` (trained in all), ``seconds``
    (of computing), ``version`` (result versions), ``device``, ``backend``, and ``environments``: each with
    its number of runs, packages, machine and commit."""


def make_record(claim: Claim, size: str, directory: str | Path, command: str) -> Record:
    """The record of a result folder.

    Args:
        claim: as it is now.
        size: of the runs.
        directory: as ``arena reproduce`` made it.
        command: that makes it, for people.

    Raises:
        ExperimentError: the folder was made with other settings than the claim file has, or is not complete.
        StoreError: there is no such folder.
    """
    directory = Path(directory)
    rows = load_results(directory)
    if made_with(directory) != claim.experiments[size].model_dump():
        raise ExperimentError(f"{directory} was made with other settings than claims/{claim.name}.toml has")
    table = score_table(rows)
    missing = _missing(claim, size, table)
    if missing:
        raise ExperimentError(f"{directory} is not complete: {missing}; run it again to go on")
    runs = rows.unique("run_id")
    environments: dict[str, dict[str, Any]] = {}
    for around in load_environments(directory).values():
        text = json.dumps(around, sort_keys=True)
        entry = environments.setdefault(text, {"runs": 0, **around})
        entry["runs"] += 1
    origin = {
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "seal": claim.seal(size),
        "runs": runs.height,
        "seconds": round(float(runs["wall_s"].sum())),
        **{name: sorted(runs[name].unique()) for name in ("version", "device", "backend")},
        "environments": [environments[text] for text in sorted(environments)],
    }
    return Record(table=table, origin=origin)


def made_with(directory: Path) -> dict[str, Any]:
    """The experiment that a result folder holds, with every field; empty where it holds none."""
    try:
        data = tomllib.loads((directory / "experiment.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return parse_experiment(data, label=str(directory / "experiment.toml")).model_dump()


def _missing(claim: Claim, size: str, table: pl.DataFrame) -> str:
    """What of the declared runs has no score; empty where all have."""
    experiment = claim.experiments[size]
    assert experiment.tuning is not None
    for task in experiment.tasks:
        for arm in experiment.archs:
            seeds = table.filter(stage="final", task=task.name, arm=arm)["seed"].n_unique()
            if seeds < len(experiment.tuning.report_seeds):
                return f"{arm} on {task.name} has {seeds} of {len(experiment.tuning.report_seeds)} seeds"
        for arm in experiment.tuning.panel:
            seeds = table.filter(stage="panel", task=task.name, arm=arm)["seed"].n_unique()
            if seeds < experiment.tuning.panel_seeds:
                return f"the panel of {arm} on {task.name} has {seeds} seeds"
    return ""


def keep(record: Record, name: str, size: str, folder: Path = FOLDER) -> list[Path]:
    """Write a record; the files."""
    folder.mkdir(parents=True, exist_ok=True)
    table, origin = (folder / f"{name}.{size}.{end}" for end in ("parquet", "json"))
    write_parquet(table, record.table)
    write_whole(origin, (json.dumps(record.origin, indent=1) + "\n").encode())
    return [table, origin]


def load_record(name: str, size: str, folder: Path = FOLDER) -> Record | None:
    """A record, or None where that size was never recorded."""
    table, origin = (folder / f"{name}.{size}.{end}" for end in ("parquet", "json"))
    if not origin.exists():
        return None
    return Record(table=pl.read_parquet(table), origin=json.loads(origin.read_text(encoding="utf-8")))
