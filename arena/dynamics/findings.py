"""A study cut into tasks, and the table that puts architectures side by side."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import polars as pl

from arena.dynamics.added import meaning, title
from arena.dynamics.study import Tables
from arena.report.document import Section
from arena.report.palette import family_order

Key = tuple[str, str]
GATES = ("decay", "erase", "write", "angle", "output")
_PLACE = ("arm", "run_id", "seed", "layer", "head", "micro")


class Task(NamedTuple):
    """The part of a study that is about one task, at its longest length."""

    label: str
    arms: list[str]
    length: int
    trained: int
    runs: pl.DataFrame
    measured: pl.DataFrame
    """By arm, run, layer, head, micro-step (-1: of the token) and quantity: the mean over tokens and
    sequences, and what is one number."""
    eigenvalues: pl.DataFrame
    effects: pl.DataFrame
    decodability: pl.DataFrame
    fields: pl.DataFrame


def by_task(tables: Tables, labels: dict[Key, str]) -> list[Task]:
    """Cut a study into tasks, in the order of ``labels``."""
    found = []
    for (task, params), label in labels.items():
        here = {"task": task, "task_params": params}
        runs = tables.runs.filter(**here)
        length = int(runs["length"].max())  # type: ignore[arg-type]
        at = {**here, "length": length}
        measured = (
            tables.measurements.filter(**at)
            .filter(pl.col("value").is_not_null(), pl.col("value").is_finite())
            .filter(
                pl.col("statistic").is_in(["value", "q50", "std"]),
                pl.col("role").is_null() | ~_summary_of_role(),
            )
            .filter(pl.col("index").is_null(), pl.col("source").is_null())
            .with_columns(pl.col("micro").fill_null(-1))  # joins do not match nulls
            .group_by(*_PLACE, "quantity", "statistic")
            .agg(value=pl.col("value").mean())
            .collect()
        )
        found.append(
            Task(
                label,
                sorted(set(runs["arm"]), key=family_order),
                length,
                int(runs["train_length_max"].max()),  # type: ignore[arg-type]
                runs.filter(length=length),
                measured,
                tables.eigenvalues.filter(**at),
                tables.effects.filter(**at),
                tables.decodability.filter(**at),
                tables.fields.filter(**at),
            )
        )
    return found


def _summary_of_role() -> pl.Expr:
    """Rows that summarise one role only: of quantiles and correlations there is one for all roles too."""
    summary = pl.col("token").is_null() & pl.col("sequence").is_null()
    return summary & (pl.col("role").fill_null("all") != "all")


def by_run(
    task: Task, arm: str, quantity: str, statistic: str = "value", over: str = "median"
) -> list[float]:
    """A number for each run of an arm: the median (or mean, or extreme) over its heads."""
    mine = task.measured.filter(arm=arm, quantity=quantity, statistic=statistic)
    reduce = getattr(pl.col("value"), over)()
    return mine.group_by("run_id", maintain_order=True).agg(reduce)["value"].to_list()


def number(value: float) -> str:
    """Three figures at most: 0.97, 12.3, 210, 1.2e+06."""
    if not np.isfinite(value):
        return str(value)
    if value == 0 or 0.01 <= abs(value) < 10:
        return f"{value:z.2f}"
    if abs(value) < 0.01:
        return f"{value:z.2f}" if abs(value) < 0.005 else f"{value:.3f}"
    return f"{value:.0f}" if abs(value) < 1e5 else f"{value:.1e}"


def span(values: Sequence[float]) -> str:
    """Mean over runs and the lowest and highest of them."""
    if not values:
        return "-"
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{number(float(np.mean(values)))} ({low} to {high})"


def listed(parts: Sequence[str]) -> str:
    """Join words: a, b and c."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def side_by_side(task: Task) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table of a task: an architecture a column, what was measured a row.

    A cell is a number over the runs of the architecture, as :func:`span` writes it; "-" where it has no such
    thing, as an absent gate. Rows that no architecture has a number for are left out.
    """
    moving = "moves" in set(task.eigenvalues["tokens"])
    where = "where the answer moves" if moving else "over all tokens"
    lowest = (
        task.eigenvalues.filter(tokens="moves" if moving else "all")
        .group_by("arm", "run_id", maintain_order=True)
        .agg(pl.col("least_eigenvalue").min())
    )
    probes = task.decodability.filter(pl.col("length") == pl.col("fitted_length"))

    def runs(name: str) -> Callable[[str], list[float]]:
        return lambda arm: by_run(task, arm, name)

    measured: dict[str, Callable[[str], list[float]]] = {
        "accuracy": lambda arm: task.runs.filter(arm=arm)["accuracy"].drop_nulls().to_list(),
        **{f"median {gate}": functools.partial(_gate, task, gate) for gate in GATES[:3]},
        f"least eigenvalue of a head, {where}": lambda arm: lowest.filter(arm=arm)[
            "least_eigenvalue"
        ].to_list(),
        "half-life by the decay, tokens": runs("half_life"),
        "effective memory length, tokens": runs("memory_length"),
        f"growth of the memory from {task.trained} to {task.length}": runs("state_growth"),
        "effective rank of the memory": runs("state_effective_rank"),
        "old value left after a write": runs("old_value_left"),
        "values of other keys left": runs("other_value_left"),
        "share of the write before the last in what a question reads, 0: the last alone": runs(
            "previous_write_share"
        ),
        "true state decoded": lambda arm: probes.filter(arm=arm)["accuracy"].drop_nulls().to_list(),
        **{
            f"effect of freezing {gate}": functools.partial(_effect_of_freezing, task, gate) for gate in GATES
        },
    }
    rows = [["runs", *(str(len(task.runs.filter(arm=arm))) for arm in task.arms)]]
    rows += [[name, *(span(values(arm)) for arm in task.arms)] for name, values in measured.items()]
    return ["measured", *task.arms], [row for row in rows if any(cell != "-" for cell in row[1:])]


def _gate(task: Task, gate: str, arm: str) -> list[float]:
    """Its median by run, over the heads where it varies: elsewhere the architecture does not have it."""
    mine = task.measured.filter(arm=arm, quantity=gate)
    varying = mine.filter(pl.col("value") > 0, statistic="std")
    middle = mine.filter(statistic="q50").join(varying, on=list(_PLACE), how="semi")
    return middle.group_by("run_id", maintain_order=True).agg(pl.col("value").median())["value"].to_list()


def _effect_of_freezing(task: Task, gate: str, arm: str) -> list[float]:
    return frozen(task, arm, gate)["effect"].to_list()


def frozen(task: Task, arm: str, gate: str) -> pl.DataFrame:
    """The effects of a gate frozen at its mean in all heads, a row a run."""
    return task.effects.filter(
        pl.col("arm") == arm,
        pl.col("role") == "all",
        pl.col("change") == f"{gate} frozen at its mean",
    ).sort("seed")


def added_sections(
    tables: Mapping[str, pl.DataFrame], labels: Mapping[tuple[str, str], str]
) -> list[Section]:
    """A section for each measurement and task, at the task's longest length: quantities by architecture."""
    sections = []
    for name, table in tables.items():
        for (task, params), label in labels.items():
            here = table.filter(task=task, task_params=params).drop_nulls("value")
            if here.is_empty():
                continue
            length = int(here["length"].max())  # type: ignore[arg-type]
            here = here.filter(length=length)
            arms = sorted(set(here["arm"]))
            rows = [
                [quantity, *(span(_medians(here.filter(quantity=quantity, arm=arm))) for arm in arms)]
                for quantity in here["quantity"].unique(maintain_order=True)
            ]
            sections.append(
                Section(
                    heading=f"{title(name)}: {label}, length {length}",
                    columns=["measured", *arms],
                    rows=rows,
                    caption=f"{meaning(name)} Median over the rows of a run, then mean (lowest to "
                    f"highest run); all rows: added/{name}.csv.",
                )
            )
    return sections


def _medians(rows: pl.DataFrame) -> list[float]:
    return rows.group_by("run_id", maintain_order=True).agg(pl.col("value").median())["value"].to_list()
