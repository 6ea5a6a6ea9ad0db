"""What a study says: a table that puts architectures side by side, and sentences made from its numbers.

A sentence gives its numbers with what they vary over: runs as (lowest to highest), sequences as [95 %
interval]. Nothing is written by hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import polars as pl

from arena.dynamics.effects import NEAR_MINUS_ONE
from arena.dynamics.probe import DIMENSIONS
from arena.dynamics.study import Tables
from arena.report.palette import family_order
from arena.statistics import MIN_UNITS

Key = tuple[str, str]
_GATES = ("decay", "erase", "write", "output")
_TIED = 0.9999


class Task(NamedTuple):
    """The part of a study that is about one task, at its longest length."""

    label: str
    arms: list[str]
    length: int
    trained: int
    runs: pl.DataFrame
    measured: pl.DataFrame
    """By arm, run, layer, head and quantity: the mean over tokens and sequences, and what is one number."""
    eigenvalues: pl.DataFrame
    effects: pl.DataFrame
    decodability: pl.DataFrame


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
                pl.col("statistic").is_in(["value", "q50"]), pl.col("role").is_null() | ~_summary_of_role()
            )
            .filter(pl.col("index").is_null(), pl.col("source").is_null())
            .group_by("arm", "run_id", "seed", "layer", "head", "quantity", "statistic")
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
            )
        )
    return found


def _summary_of_role() -> pl.Expr:
    """Rows that summarise one role only: of quantiles and correlations there is one for all roles too."""
    summary = pl.col("token").is_null() & pl.col("sequence").is_null()
    return summary & (pl.col("role").fill_null("all") != "all")


def _by_run(
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


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def side_by_side(task: Task) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table of a task: an architecture a row, a number over its runs a column.

    Columns that no architecture has a number for are left out.
    """
    moving = "moves" in set(task.eigenvalues["tokens"])
    where = "where the answer moves" if moving else "all tokens"
    columns: dict[str, list[str]] = {"architecture": task.arms, "runs": [], "accuracy": []}
    for arm in task.arms:
        runs = task.runs.filter(arm=arm)
        columns["runs"].append(str(len(runs)))
        columns["accuracy"].append(span(runs["accuracy"].drop_nulls().to_list()))
    for gate in ("decay", "erase", "write"):
        columns[f"{gate}, median"] = [span(_by_run(task, arm, gate, "q50")) for arm in task.arms]
    lowest = [
        task.eigenvalues.filter(arm=arm, tokens="moves" if moving else "all")
        .group_by("run_id")
        .agg(pl.col("least_eigenvalue").min())["least_eigenvalue"]
        .to_list()
        for arm in task.arms
    ]
    columns[f"least eigenvalue of any head, {where}"] = [span(values) for values in lowest]
    for name, quantity in (
        ("half-life, tokens", "half_life"),
        ("effective memory length, tokens", "memory_length"),
        (f"growth of the memory from {task.trained} to {task.length}", "state_growth"),
        ("old value left after a write", "old_value_left"),
        ("change of other keys by a write", "interference"),
    ):
        columns[name] = [span(_by_run(task, arm, quantity)) for arm in task.arms]
    probes = task.decodability.filter(pl.col("length") == pl.col("fitted_length"))
    columns["true state decoded"] = [
        span(probes.filter(arm=arm)["accuracy"].drop_nulls().to_list()) for arm in task.arms
    ]
    for gate in _GATES:
        columns[f"effect of freezing {gate}"] = [
            span(_frozen(task, arm, gate)["effect"].to_list()) for arm in task.arms
        ]
    kept = {name: cells for name, cells in columns.items() if any(cell != "-" for cell in cells)}
    return list(kept), [list(row) for row in zip(*kept.values(), strict=True)]


def _frozen(task: Task, arm: str, gate: str) -> pl.DataFrame:
    return task.effects.filter(
        pl.col("arm") == arm,
        pl.col("role") == "all",
        pl.col("change") == f"{gate} frozen at its mean",
    ).sort("seed")


def gate_sentences(tasks: Sequence[Task]) -> Iterator[str]:
    """How gates go together."""
    for task in tasks:
        for pair in ("erase_write", "decay_write"):
            first, second = pair.split("_")
            tied, free = [], []
            for arm in task.arms:
                values = task.measured.filter(arm=arm, quantity=f"corr_{pair}")["value"].to_list()
                if values and min(values) > _TIED:
                    tied.append(arm)
                elif values:
                    free.append(f"{arm} {number(float(np.median(values)))} ({number(min(values))} to "
                                f"{number(max(values))})")  # fmt: skip
            text = f"{task.label}: correlation of {first} and {second} over tokens"
            if free:
                yield f"{text}, median (lowest to highest) over heads and runs: {_listed(free)}" + (
                    f"; one gate in {_listed(tied)}." if tied else "."
                )
            elif tied:
                yield f"{text}: {first} and {second} are one gate in {_listed(tied)}."


def eigenvalue_sentences(tasks: Sequence[Task]) -> Iterator[str]:
    """Which heads reflect their memory where the answer moves."""
    for task in tasks:
        moving = task.eigenvalues.filter(tokens="moves")
        for arm in task.arms:
            lowest = (moving.filter(arm=arm).group_by("run_id").agg(pl.col("least_eigenvalue").min()))[
                "least_eigenvalue"
            ].to_list()
            if not lowest:
                continue
            flips = sum(value <= NEAR_MINUS_ONE for value in lowest)
            yield (
                f"{task.label}, {arm}: {flips} of {len(lowest)} runs have a head whose least eigenvalue is "
                f"below {NEAR_MINUS_ONE} where the answer moves; lowest head of a run: {span(lowest)}."
            )


def state_sentences(tasks: Sequence[Task]) -> Iterator[str]:
    """Growth of the memory beyond the training length."""
    for task in tasks:
        parts = []
        for arm in task.arms:
            growth = _by_run(task, arm, "state_growth")
            exponent = _by_run(task, arm, "state_growth_exponent")
            if growth:
                power = f", power {number(float(np.mean(exponent)))} of the length" if exponent else ""
                parts.append(f"{arm} {span(growth)}{power}")
        if parts:
            yield (
                f"{task.label}: from length {task.trained} (the longest trained) to {task.length} the "
                f"memory's norm grows by a factor, median over heads, of {_listed(parts)}."
            )


def retention_sentences(tasks: Sequence[Task]) -> Iterator[str]:
    """How far back reads reach."""
    for task in tasks:
        parts = [
            f"{arm} {span(values)}" for arm in task.arms if (values := _by_run(task, arm, "memory_length"))
        ]
        if parts:
            yield (
                f"{task.label}: a scored read is made of so many tokens, effectively (median over heads): "
                f"{_listed(parts)}."
            )


def edit_sentences(tasks: Sequence[Task]) -> Iterator[str]:
    """What a write leaves of the old value, and does to other keys."""
    for task in tasks:
        parts = []
        for arm in task.arms:
            left, other = _by_run(task, arm, "old_value_left"), _by_run(task, arm, "other_value_left")
            if left:
                rest = f", of other keys' values {span(other)}" if other else ""
                parts.append(f"{arm} {span(left)}{rest}")
        if parts:
            yield (
                f"{task.label}: share of the old value that its key still reads after it was written anew "
                f"(0 replaced, 1 untouched; median over heads of the mean over writes): {'; '.join(parts)}."
            )


def probe_sentences(tasks: Sequence[Task]) -> Iterator[str]:
    """What a linear map reads."""
    for task in tasks:
        own = task.decodability.filter(pl.col("length") == pl.col("fitted_length"))
        for arm in task.arms:
            mine = own.filter(pl.col("arm") == arm, pl.col("accuracy").is_not_null())
            if mine.is_empty():
                continue
            clear = mine.filter(pl.col("low") > pl.max_horizontal("control", "most_frequent"))
            yield (
                f"{task.label}, {arm}, length {task.length}: a linear map reads the {mine['label'][0]} right "
                f"in {span(mine['accuracy'].to_list())} of sequences (shuffled labels "
                f"{span(mine['control'].to_list())}, most frequent answer "
                f"{number(mine['most_frequent'][0])}); its interval is above both in {len(clear)} of "
                f"{len(mine)} memories."
            )


def effect_sentences(tasks: Sequence[Task]) -> Iterator[str]:
    """Which gate matters where."""
    for task in tasks:
        for arm in task.arms:
            parts = []
            for gate in _GATES:
                rows = _frozen(task, arm, gate)
                if rows.is_empty():
                    continue
                sure = _sure(rows)
                parts.append((float(rows["effect"].mean()), f"{gate} {span(rows['effect'].to_list())}{sure}"))  # type: ignore[arg-type]
            if parts:
                base = span(task.effects.filter(arm=arm).unique("run_id")["baseline"].to_list())
                listed = _listed([text for _, text in sorted(parts)])
                yield (
                    f"{task.label}, {arm}, accuracy {base} at length {task.length}: change with a gate "
                    f"frozen at its mean in all heads: {listed}."
                )


def _sure(rows: pl.DataFrame) -> str:
    """Interval of one run, or in how many runs the interval leaves out 0."""
    if rows["low"].null_count():
        return " (no interval)"
    if len(rows) == 1:
        return f" [{number(rows['low'][0])}, {number(rows['high'][0])}]"
    below = int((rows["high"] < 0).sum())
    return f" [below 0 in {below} of {len(rows)} runs]"


def identified_sentences(tasks: Sequence[Task]) -> Iterator[str]:
    """Are the heads that flip the ones that the answer depends on? Each architecture, then each run."""
    for task in tasks:
        for arm in task.arms:
            runs = task.effects.filter(arm=arm)
            found, others = (runs.filter(role=role) for role in ("identified", "control"))
            if found.is_empty():
                continue
            contrast = runs.filter(role="contrast")
            text = (
                f"{task.label}, {arm}: {len(found)} of {runs['run_id'].n_unique()} runs have heads that "
                "flip; with "
                f"erase clamped to [0, 1] there accuracy goes from {span(found['baseline'].to_list())} to "
                f"{span(found['accuracy'].to_list())} (chance {number(found['chance'][0])})"
            )
            if len(others):
                text += (
                    f", with it clamped in as many others to {span(others['accuracy'].to_list())}; the "
                    "interval "
                    f"of the difference is below 0 in {int((contrast['high'] < 0).sum())} of "
                    f"{len(contrast)} runs"
                )
            yield text + "."
    for task in tasks:
        for row in task.effects.filter(role="identified").sort("arm", "seed").iter_rows(named=True):
            mine = {"run_id": row["run_id"], "change": row["change"]}
            alone = task.effects.filter(role="control", **mine).to_dicts()
            against = task.effects.filter(role="contrast", **mine).to_dicts()
            one = row["n_heads"] == 1
            heads = f"{'head' if one else 'heads'} {row['heads'].replace(' ', ', ')}"
            flips = "s" if one else ""
            text = (
                f"{task.label}, {row['arm']}, seed {row['seed']}, length {task.length}: with {row['change']} "
                f"in {heads}, which flip{flips}, accuracy goes from {number(row['baseline'])} to "
                f"{_with(row, 'accuracy', 'accuracy_')}; chance is {number(row['chance'])}"
            )
            if alone:
                size = alone[0]["n_heads"]
                rest = f"{size} other head{'s' if size > 1 else ''}"
                sets = f" (mean of {alone[0]['heads']})" if alone[0]["heads"].endswith("sets") else ""
                text += f". In {rest}{sets} it stays at {_with(alone[0], 'accuracy', 'accuracy_')}"
                text += f"; the difference of the effects is {_with(against[0], 'effect', '')}"
            else:
                text += ". Every head flips, so that there is no control"
            yield text + "."


def _with(row: dict[str, float | None], name: str, prefix: str) -> str:
    low, high = row[f"{prefix}low"], row[f"{prefix}high"]
    value = number(float(row[name] or 0.0))
    return value if low is None or high is None else f"{value} [{number(low)}, {number(high)}]"


def cannot_be_said(tasks: Sequence[Task]) -> Iterator[str]:
    """Limits of what was measured, from the numbers."""
    seeds = min(len(task.runs.filter(arm=arm)) for task in tasks for arm in task.arms)
    if seeds < MIN_UNITS:
        yield (
            f"Brackets [ ] are 95 % intervals over sequences, given the trained model. There are {seeds} or "
            f"more runs of each architecture and task, fewer than the {MIN_UNITS} that an interval over "
            "trainings needs: what another seed would learn is not known."
        )
    for task in tasks:
        failing = [
            f"{arm} ({int((~part['solved'].fill_null(False)).sum())} of {len(part)})"
            for arm in task.arms
            if not (part := task.runs.filter(arm=arm))["solved"].fill_null(False).all()
        ]
        if failing:
            yield (
                f"{task.label}, length {task.length}: runs that do not solve it: {_listed(failing)}. A gate "
                "that does nothing there may still matter to a model that solves it."
            )
        without = set(task.effects.filter(role="identified")["run_id"]) - set(
            task.effects.filter(role="control")["run_id"]
        )
        if without:
            yield f"{task.label}: in {len(without)} runs every head flips: there are none to compare with."
        labelled = task.decodability.filter(pl.col("accuracy").is_not_null())
        if task.decodability.is_empty():
            yield f"{task.label}: no exact solver tells the state of a memory after every token, so no probe."
        elif set(task.arms) - set(labelled["arm"]):
            growing = _listed(sorted(set(task.arms) - set(labelled["arm"]), key=family_order))
            yield f"{task.label}: the memory of {growing} grows with the length: no probe of equal size."
    yield (
        "A frozen, clamped or swapped gate is one that the model was not trained with: a fall of accuracy "
        "says that this model relies on the gate, not that no model could do without it."
    )
    yield (
        f"A probe is linear and sees {DIMENSIONS} dimensions: what it does not read may be there in another "
        "form."
    )
    yield "An eigenvalue is that of one token's transition: whether a head counts, the intervention tells."
