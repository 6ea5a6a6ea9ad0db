"""Sections about the whole: the question, the runs that went wrong, versions, how to repeat it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from arena.report.document import Section
from arena.report.tables import environment_facts

LISTED_RUNS = 1000
"""Failed and diverged runs in the report, failed ones first."""
_MOST_VALUES = 6  # of one fact, in a cell


def asked_section(request: Mapping[str, Any], *, tuned: bool) -> Section | None:
    """The experiment file in words: tasks, architectures, training, tuning; None without a file.

    Args:
        request: the experiment file.
        tuned: whether rates were searched for; else those of the file hold.
    """
    if not request:
        return None
    rows = [[f"claim: {key}", _value(value)] for key, value in _table(request, "claim").items()]
    rows.append(["architectures", ", ".join(map(str, request.get("archs", [])))])
    for entry in request.get("tasks", []):
        facts = {
            "trained at": _span(entry.get("train_lengths")),
            "tested at": _value(entry.get("eval_lengths")),
            **_table(entry, "params"),
            **{key: entry.get(key) for key in ("steps", "batch_size")},
            **flat(_table(entry, "model"), "model"),
        }
        rows.append([f"task {entry.get('name')}", _facts(facts)])
    rows.append(["model", _facts(flat(_table(request, "model")))])
    for section in ("arms", "overrides"):
        rows += [
            [f"{section[:-1]} {name}", _facts(flat(fields))]
            for name, fields in _table(request, section).items()
        ]
    rows.append(["training", _facts(flat(_table(request, "train")))])
    if tuned:
        rows.append(["tuning", _facts(flat(_table(request, "tuning")))])
    else:
        points = {key.replace("_", " "): request.get(key) for key in ("lr", "weight_decay", "seeds")}
        rows.append(["points and seeds", _facts(points)])
    rows = [row for row in rows if row[1]]
    return Section(heading="What was asked", columns=["what", "value"], rows=rows, text=True, quiet=True)


def unfinished_section(runs: pl.DataFrame, planned: int | None) -> Section:
    """The failed and the diverged runs, each with its reason; says so where there is none.

    Args:
        runs: of ``runs_table``.
        planned: how many runs were asked for; None: not known.
    """
    wrong = runs.filter(pl.col("status").is_in(["failed", "diverged"]))
    heading = "Failures and diverged runs"
    missing = max(0, (planned or 0) - runs.height)
    lines = [f"{missing} planned runs have neither result nor failure: not trained yet."] if missing else []
    if wrong.is_empty():
        lines.append("No run that has ended failed or diverged.")
        return Section(heading=heading, lines=lines, quiet=True)
    if wrong.height > LISTED_RUNS:
        lines.append(f"LEFT OUT: {LISTED_RUNS} of {wrong.height:,} such runs are listed; runs.csv has all.")
    rows = [
        [arm, task, stage, str(seed), f"{lr:.3g}", f"{decay:.3g}", status, reason or "", run_id]
        for arm, task, stage, seed, lr, decay, status, reason, run_id in wrong.sort(
            "status", "task", "arm", "stage", "lr", "seed", descending=[True, *[False] * 5]
        )
        .head(LISTED_RUNS)
        .select("arm", "task", "stage", "seed", "lr", "weight_decay", "status", "reason", "run_id")
        .iter_rows()
    ]
    return Section(
        heading=heading,
        lines=lines,
        columns=["architecture", "task", "stage", "seed", "lr", "weight decay", "status", "reason", "run"],
        rows=rows,
        text=True,
        caption="A diverged run counts with the worst score; a failed one has no score. All runs: runs.csv.",
        quiet=True,
    )


def versions_section(rows: pl.DataFrame, environments: Mapping[str, Mapping[str, Any]]) -> Section:
    """What the runs were made with: result versions, device, backends, packages, machine, commit."""
    done = rows.filter(pl.col("status") != "failed")
    facts: dict[str, list[str]] = {"device": _distinct(done, "device"), "dtype": _distinct(done, "dtype")}
    for column, prefix in (("backend", "backend of "), ("version", "result version of ")):
        for word in sorted({word for text in _distinct(done, column) for word in text.split()}):
            name, _, value = word.partition("=")
            facts.setdefault(f"{prefix}{name}", []).append(value)
    facts["kernels examined"] = [
        f"{verdict or 'no'} ({count:,} runs)"
        for verdict, count in done.unique("run_id").group_by("verdict").len().sort("verdict").iter_rows()
    ]
    facts |= {name: sorted(values) for name, values in environment_facts(environments).items()}
    rows_of = [[name, _several(values)] for name, values in facts.items() if values]
    return Section(
        heading="Versions and machine",
        columns=["what", "value"],
        rows=rows_of,
        text=True,
        caption="Several values: the runs are a mixture (or, of tasks and operators, each has its own).",
        quiet=True,
    )


def repeat_section(directory: Path, request: Mapping[str, Any], rows: pl.DataFrame) -> Section | None:
    """The command that does it again, and the file that it takes; None where no file was kept."""
    ablation = directory / "ablation" / "request.toml"
    path = ablation if ablation.exists() else directory / "experiment.toml"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    stages = set(rows["stage"])
    command = "ablate" if path == ablation else "grid" if stages <= {"grid"} else "tune"
    file = f"{request.get('name') or 'experiment'}.toml"
    words = ["arena", command, file, "--out", f"results/{request.get('name') or 'again'}"]
    devices = [device for device in _distinct(rows, "device") if device != "cpu"]
    words += ["--device", devices[0]] if devices else []
    again = [shlex.join(words), shlex.join(["arena", "report", words[4]])]
    return Section(
        heading="How to repeat it",
        commands=again,
        caption=f"With the file below as {file}. Device and backends as they ran: under versions.",
        listing=(file, text),
        quiet=True,
    )


def _distinct(rows: pl.DataFrame, column: str) -> list[str]:
    return sorted(rows[column].drop_nulls().unique())


def _several(values: list[str]) -> str:
    more = f" and {len(values) - _MOST_VALUES} more" if len(values) > _MOST_VALUES else ""
    return " / ".join(values[:_MOST_VALUES]) + more


def _table(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = data.get(name)
    return value if isinstance(value, Mapping) else {}


def flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted names."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            found |= flat(value, name)
        else:
            found[name] = value
    return found


def _facts(facts: Mapping[str, Any]) -> str:
    given = {key: value for key, value in facts.items() if value not in (None, "", [], {})}
    return "; ".join(f"{key} {_value(value)}" for key, value in given.items())


def _span(value: Any) -> str:
    if isinstance(value, list) and len(value) == 2:
        return str(value[0]) if value[0] == value[1] else f"{value[0]} to {value[1]}"
    return _value(value)


def _value(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(entry, (int, float, str)) for entry in value):
        return ", ".join(map(str, value))
    return json.dumps(value, default=str)
