"""Sentences made from the numbers of a study, and what its numbers cannot say.

A sentence gives its numbers with what they vary over: runs as (lowest to highest), sequences as [95 %
interval]. Nothing is written by hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl

from arena.dynamics.effects import NEAR_MINUS_ONE
from arena.dynamics.findings import GATES, Task, by_run, frozen, listed, number, span
from arena.dynamics.probe import DIMENSIONS
from arena.report.palette import family_order
from arena.statistics import MIN_UNITS, bootstrap_interval

_TIED = 0.9999


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
                yield f"{text}, median (lowest to highest) over heads and runs: {listed(free)}" + (
                    f"; one gate in {listed(tied)}." if tied else "."
                )
            elif tied:
                yield f"{text}: {first} and {second} are one gate in {listed(tied)}."


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
            growth = by_run(task, arm, "state_growth")
            exponent = by_run(task, arm, "state_growth_exponent")
            if growth:
                power = f", power {number(float(np.mean(exponent)))} of the length" if exponent else ""
                parts.append(f"{arm} {span(growth)}{power}")
        if parts:
            yield (
                f"{task.label}: from length {task.trained} (the longest trained) to {task.length} the "
                f"memory's norm grows by a factor, median over heads, of {listed(parts)}."
            )


def retention_sentences(tasks: Sequence[Task]) -> Iterator[str]:
    """How far back reads reach."""
    for task in tasks:
        parts = [
            f"{arm} {span(values)}" for arm in task.arms if (values := by_run(task, arm, "memory_length"))
        ]
        if parts:
            yield (
                f"{task.label}: a scored read is made of so many tokens, effectively (median over heads): "
                f"{listed(parts)}."
            )


def edit_sentences(tasks: Sequence[Task]) -> Iterator[str]:
    """What a write leaves of the old value, and does to other keys."""
    for task in tasks:
        parts = []
        for arm in task.arms:
            left, other = by_run(task, arm, "old_value_left"), by_run(task, arm, "other_value_left")
            if left:
                rest = f", of other keys' values {span(other)}" if other else ""
                parts.append(f"{arm} {span(left)}{rest}")
        if parts:
            yield (
                f"{task.label}: share of the old value that its key still reads after it was written anew "
                f"(0 replaced, 1 untouched; median over heads of the mean over writes): {'; '.join(parts)}."
            )


def field_sentences(tasks: Sequence[Task]) -> Iterator[str]:
    """Whether a model puts the field into the key."""
    for task in tasks:
        for arm in task.arms:
            heads = task.fields.filter(arm=arm)
            if heads.is_empty():
                continue
            runs = heads.group_by("run_id").agg(
                pl.col("same_field").median(),
                pl.col("other_field").median(),
                pl.col("other_field").min().alias("least"),
            )
            yield (
                f"{task.label}, {arm}: key vectors of two fields of one key have |cosine| "
                f"{span(runs['other_field'].to_list())}, median over heads (least of a head "
                f"{span(runs['least'].to_list())}); of one field written twice "
                f"{span(runs['same_field'].to_list())}. "
                "The lower the first beside the second, the more of the field is in the key."
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
            for gate in GATES:
                rows = frozen(task, arm, gate)
                if rows.is_empty():
                    continue
                sure = _sure(rows)
                parts.append((float(rows["effect"].mean()), f"{gate} {span(rows['effect'].to_list())}{sure}"))  # type: ignore[arg-type]
            if parts:
                base = span(task.effects.filter(arm=arm).unique("run_id")["baseline"].to_list())
                in_order = listed([text for _, text in sorted(parts)])
                yield (
                    f"{task.label}, {arm}, accuracy {base} at length {task.length}: change with a gate "
                    f"frozen at its mean in all heads: {in_order}."
                )


def _sure(rows: pl.DataFrame) -> str:
    """Interval over runs where there are enough; of one run; or in how many runs it leaves out 0."""
    if len(rows) >= MIN_UNITS:
        over_runs = bootstrap_interval([rows["effect"].to_list()])
        if over_runs is not None:
            return f" [over runs, interquartile mean: {number(over_runs[0])}, {number(over_runs[1])}]"
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
            for change in runs.filter(role="identified")["change"].unique().sort():
                found, others, contrast = (
                    runs.filter(role=role, change=change) for role in ("identified", "control", "contrast")
                )
                text = (
                    f"{task.label}, {arm}: {len(found)} of {runs['run_id'].n_unique()} runs have heads that "
                    f"flip; with {change} there accuracy goes from {span(found['baseline'].to_list())} to "
                    f"{span(found['accuracy'].to_list())} (chance {number(found['chance'][0])})"
                )
                if len(others):
                    text += (
                        ", with it clamped in as many others (all, if fewer) to "
                        f"{span(others['accuracy'].to_list())}; the interval of the difference is below 0 in "
                        f"{int((contrast['high'] < 0).sum())} of {len(contrast)} runs"
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
                f"in {heads}, which flip{flips}{_changing(row)}, accuracy goes from "
                f"{number(row['baseline'])} to {_with(row, 'accuracy', 'accuracy_')}; "
                f"chance is {number(row['chance'])}"
            )
            elsewhere = task.effects.filter(role="elsewhere", **mine).to_dicts()
            if elsewhere:
                text += (
                    "; clamped there at tokens that leave the answer only, it is "
                    f"{_with(elsewhere[0], 'accuracy', 'accuracy_')}"
                )
            if alone:
                size = alone[0]["n_heads"]
                rest = f"{size} other head{'s' if size > 1 else ''}"
                sets = f" (mean of {alone[0]['heads']})" if alone[0]["heads"].endswith("sets") else ""
                text += (
                    f". In {rest}{sets}{_changing(alone[0])} it is {_with(alone[0], 'accuracy', 'accuracy_')}"
                )
                text += f"; the difference of the effects is {_with(against[0], 'effect', '')}"
            else:
                text += f". No other head has such a gate ({row['gate']}), so that there is no control"
            yield text + "."


def _changing(row: dict[str, float | None]) -> str:
    """How much of a gate was altered: a clamp that alters nothing is a weak control."""
    changed = row["changed"]
    return "" if changed is None else f" ({number(changed)} of the gate's values are altered)"


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
                f"{task.label}, length {task.length}: runs that do not solve it: {listed(failing)}. A gate "
                "that does nothing there may still matter to a model that solves it."
            )
        without = set(task.effects.filter(role="identified")["run_id"]) - set(
            task.effects.filter(role="control")["run_id"]
        )
        if without:
            yield (
                f"{task.label}: in {len(without)} runs every head with such a gate flips: there are none "
                "to compare with."
            )
        labelled = task.decodability.filter(pl.col("accuracy").is_not_null())
        if task.decodability.is_empty():
            yield f"{task.label}: no exact solver tells the state of a memory after every token, so no probe."
        elif set(task.arms) - set(labelled["arm"]):
            growing = listed(sorted(set(task.arms) - set(labelled["arm"]), key=family_order))
            yield f"{task.label}: the memory of {growing} grows with the length: no probe of equal size."
    yield (
        "A frozen, clamped or swapped gate is one that the model was not trained with: a fall of accuracy "
        "says that this model relies on the gate, not that no model could do without it."
    )
    yield (
        f"A probe is linear and sees {DIMENSIONS} dimensions: what it does not read may be there in another "
        "form."
    )
    yield (
        "An eigenvalue is that of one token's transition: whether a head counts, the intervention tells. A "
        "memory that turns instead of flipping (deltaproduct, mamba3) is not among the heads that flip: see "
        "eigenvalue_max_imaginary in the measurements."
    )
