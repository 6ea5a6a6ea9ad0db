"""The verdict on each declared pair of arms and task: what was measured, how sure it is, and what it allows.

A score is the accuracy of one retrained winner (stage ``final``) on split test, at the longest reported
length of the task; over several tasks, the chance-scaled accuracy. Seeds are paired: equal seeds saw equal
data in equal order. A claim that X is better than Y needs all of

- the 95 % interval of the difference of interquartile means excludes 0 (or has no width to be shown, and all
  pairs have the same sign),
- P(X > Y), the probability of improvement, is at least :data:`IMPROVEMENT`,
- the sign-flip test of the mean paired difference, Holm-corrected over every declared pair and task, gives
  p <= :data:`ALPHA`,

equal tuning budgets, and results of every declared seed. Of two arms with the same law of scores, a family of
one comparison claims a difference in 3 % of simulations with 10 seeds and in under 1 % with 20, be the scores
normal or solved/unsolved. An equality claim needs an equivalence test with the declared margin; no
significant difference is not equality, and two arms that have both learned nothing are not equal but
untested.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import polars as pl

from arena.report.tables import scores
from arena.statistics import (
    MIN_UNITS,
    claim_seeds,
    clopper_pearson,
    detectable_effect,
    equivalence_test,
    holm,
    interquartile_mean,
    paired_difference,
    paired_difference_interval,
    probability_of_improvement,
    seeds_needed,
    sign_flip_test,
)

ALPHA = 0.05
LEARNED = 0.05
"""Chance-scaled accuracy below which nothing has been learned."""
IMPROVEMENT = 0.75
"""Least probability of improvement of a claim (Bouthillier et al. 2021, arXiv 2103.03098)."""

Key = tuple[str, str]
Cell = tuple[str, str, str]

VERDICT_SCHEMA: dict[str, Any] = {
    **dict.fromkeys(("kind", "x", "y", "task", "task_params"), pl.String),
    **dict.fromkeys(("eval_length", "seeds", "needed", "family"), pl.Int64),
    **dict.fromkeys(
        ("iqm_x", "iqm_y", "scaled_x", "scaled_y", "difference", "low", "high", "mean_difference"), pl.Float64
    ),
    **dict.fromkeys(("solved_x", "solved_y"), pl.Int64),
    **dict.fromkeys(("improvement", "p", "p_holm", "margin"), pl.Float64),
    **dict.fromkeys(("claim", "reason", "unmatched"), pl.String),
}
"""Columns of the verdicts. ``kind``: ``better`` (a declared pair on a task), ``overall`` (a pair over all
tasks: no test and no claim) or ``equal`` (an equality claim). ``seeds``: paired runs, of all tasks together
where kind is ``overall``; ``needed``: the fewest that allow a claim in this family, of ``family``
comparisons. ``low``, ``high``: 95 % interval of ``difference``, that of the interquartile means. ``p``: of
the sign-flip test, or of the equivalence test with ``margin``. ``claim``: the name of the better arm,
``equal``, or null; then ``reason`` says why not. ``scaled_x``, ``scaled_y``: interquartile means of the
chance-scaled accuracy. ``unmatched``: arms that the ledger calls unmatched."""


def verdict_table(
    rows: pl.DataFrame,
    tasks: Sequence[Key],
    pairs: Sequence[Sequence[str]],
    equivalences: Sequence[Mapping[str, Any]] = (),
    *,
    trials: Mapping[Cell, int] | None = None,
    unmatched: Set[Cell] = frozenset(),
    declared_tasks: int = 0,
    declared_seeds: int = 0,
) -> pl.DataFrame:
    """A row for each declared pair and task, one over all tasks where there are several, and the equality
    claims.

    Args:
        rows: of the retrained winners, as ``load_results`` gives them.
        tasks: (task, task_params) of the experiment, those without results too.
        pairs: the declared pairs (x, y).
        equivalences: the declared equality claims, each with ``pair`` and ``margin``.
        trials: (task, task_params, arm) -> tuning trials that it got; None: not tuned here.
        unmatched: (task, task_params, arm) that are not matched.
        declared_tasks: how many tasks the experiment has; those of which nothing has been trained yet count
            in the family.
        declared_seeds: how many seeds each arm was to be retrained with: no claim is made while some have no
            result, as it would rest on those that happened to end first, or well.
    """
    units = final_scores(rows)
    claims = [(tuple(pair), None) for pair in pairs]
    equal = [(tuple(claim["pair"]), float(claim["margin"])) for claim in equivalences]
    found = []
    for kind, declared in (("better", claims), ("equal", equal)):
        family = [
            compared(units, kind, x, y, [task], margin) for (x, y), margin in declared for task in tasks
        ]
        unseen = len(declared) * max(0, declared_tasks - len(tasks))
        adjusted = holm([row["p"] for row in family] + [1.0] * unseen)
        for row, p_holm in zip(family, adjusted, strict=False):
            row["p_holm"] = float(p_holm)
            row["family"] = len(adjusted)
            cells = [(row["task"], row["task_params"], row[side]) for side in ("x", "y")]
            row["unmatched"] = ", ".join(cell[2] for cell in cells if cell in unmatched)
            given = [trials.get(cell, 0) for cell in cells] if trials is not None else []
            _judge(row, given, declared_seeds)
        found += family
        if kind == "better" and len(tasks) > 1:
            summaries = [compared(units, "overall", x, y, tasks, None) for (x, y), _ in declared]
            found += [row for row in summaries if row["seeds"]]
    return pl.DataFrame(
        [{name: row.get(name) for name in VERDICT_SCHEMA} for row in found], schema=VERDICT_SCHEMA
    )


def final_scores(rows: pl.DataFrame) -> pl.DataFrame:
    """Accuracy of every run at the longest length of its task that is reported on split test.

    Returns:
        task, task_params, arm, seed, eval_length, accuracy, chance_scaled_accuracy, ``solved``; diverged runs
        with the worst score.
    """
    table = scores(rows).filter(split="test")
    return table.filter(
        pl.col("eval_length") == pl.col("eval_length").max().over("task", "task_params")
    ).select(
        "task", "task_params", "arm", "seed", "eval_length", "accuracy", "chance_scaled_accuracy", "solved"
    )


def compared(
    units: pl.DataFrame, kind: str, x: str, y: str, tasks: Sequence[Key], margin: float | None
) -> dict[str, Any]:
    """Everything that the paired runs of x and y say, without a judgement; p is 1 where there are none.

    Args:
        units: as :func:`final_scores` gives them.
        kind: as in :data:`VERDICT_SCHEMA`.
        x: the arm whose score is the first of the difference.
        y: the other arm.
        tasks: (task, task_params) of the strata; one, unless kind is ``overall``.
        margin: of kind ``equal``.
    """
    metric = "chance_scaled_accuracy" if kind == "overall" else "accuracy"
    one = tasks[0] if kind != "overall" else (None, None)
    row: dict[str, Any] = {
        "kind": kind, "x": x, "y": y, "task": one[0], "task_params": one[1], "margin": margin,
        "seeds": 0, "p": None if kind == "overall" else 1.0,
    }  # fmt: skip
    strata = []
    for task, params in tasks:
        mine = units.filter(task=task, task_params=params)
        row["eval_length"] = mine["eval_length"].max() if kind != "overall" else None
        strata.append(mine.filter(arm=x).join(mine.filter(arm=y), on="seed", suffix="_y").sort("seed"))
    strata = [part for part in strata if part.height]
    if not strata:
        return row
    xs, ys = ([part[name].to_numpy() for part in strata] for name in (metric, f"{metric}_y"))
    pooled = pl.concat(strata)
    differences = pooled[metric] - pooled[f"{metric}_y"]
    interval = paired_difference_interval(xs, ys)
    if kind == "equal":
        p: float | None = equivalence_test(xs[0], ys[0], margin or 0.0)
    else:
        p = sign_flip_test(differences.to_numpy()) if kind == "better" else None
    row |= {
        "seeds": pooled.height,
        "iqm_x": float(interquartile_mean(pooled[metric].to_numpy())),
        "iqm_y": float(interquartile_mean(pooled[f"{metric}_y"].to_numpy())),
        **{
            f"scaled_{side}": float(interquartile_mean(pooled[f"chance_scaled_accuracy{end}"].to_numpy()))
            for side, end in (("x", ""), ("y", "_y"))
        },
        "difference": paired_difference(xs, ys),
        "low": interval[0] if interval else None,
        "high": interval[1] if interval else None,
        "mean_difference": differences.mean(),
        "solved_x": int(pooled["solved"].sum()),
        "solved_y": int(pooled["solved_y"].sum()),
        "improvement": probability_of_improvement(xs, ys),
        "p": p,
        # without any spread there is no interval; then all pairs agree or they say nothing
        "one_sided": bool((differences > 0).all() or (differences < 0).all()),
    }
    return row


def _judge(row: dict[str, Any], trials: Sequence[int], declared_seeds: int) -> None:
    """Enter ``needed``, and ``claim`` or the ``reason`` why there is none."""
    equal = row["kind"] == "equal"
    row["needed"] = claim_seeds(row["family"], ALPHA, equal=equal)
    if row["seeds"] < row["needed"]:
        row["reason"] = f"needs {row['needed']} paired seeds, has {row['seeds']}"
        return
    missing = []
    if row["seeds"] < declared_seeds:
        missing.append(f"only {row['seeds']} of {declared_seeds} declared seeds have results of both")
    if len(set(trials)) > 1:
        missing.append(f"unequal tuning: {trials[0]} and {trials[1]} trials")
    if max(row["scaled_x"], row["scaled_y"]) < LEARNED:
        missing.append("neither is above chance")
    if equal:
        if row["p_holm"] > ALPHA:
            missing.append(f"Holm p {p_text(row['p_holm'])} > {ALPHA}")
        row["claim"] = None if missing else "equal"
    else:
        missing += lacking(row)
        row["claim"] = None if missing else row["x"] if row["difference"] > 0 else row["y"]
    row["reason"] = "; ".join(missing) or None


def lacking(row: Mapping[str, Any]) -> list[str]:
    """What a claim that one is better lacks."""
    if row["difference"] == row["mean_difference"] == 0:
        return ["no difference"]
    missing = []
    up = (row["difference"] or row["mean_difference"]) > 0
    if row["low"] is None and not row["one_sided"]:
        missing.append("no interval, for want of spread")
    elif row["low"] is not None and row["low"] <= 0 <= row["high"]:
        missing.append("the interval holds 0")
    if row["difference"] == 0 or row["mean_difference"] == 0:
        missing.append(f"equal {'interquartile means' if row['difference'] == 0 else 'means'}")
    elif (row["difference"] > 0) != (row["mean_difference"] > 0):
        missing.append("means and interquartile means disagree")
    better, worse = (row["x"], row["y"]) if up else (row["y"], row["x"])
    chance = row["improvement"] if up else 1 - row["improvement"]
    if chance < IMPROVEMENT:
        missing.append(f"P({better} > {worse}) = {chance:.2f} < {IMPROVEMENT}")
    if row["p_holm"] > ALPHA:
        missing.append(f"Holm p {p_text(row['p_holm'])} > {ALPHA}")
    return missing


def verdict_line(row: Mapping[str, Any], label: str) -> str:
    """A verdict in words: the judgement first, then every number that it rests on.

    Args:
        row: of :func:`verdict_table`.
        label: of its task; empty over all tasks.
    """
    x, y, seeds = row["x"], row["y"], row["seeds"]
    place = f"{label}, length {row['eval_length']}" if row["eval_length"] is not None else label
    if row["kind"] == "overall":
        head = f"all tasks: {x} and {y} (a summary: outside the family, no claim)"
    elif row["kind"] == "equal" and row["claim"]:
        head = f"{place}: {x} and {y} are EQUAL within {row['margin']:g}"
    elif row["claim"]:
        head = f"{place}: {row['claim']} is BETTER than {y if row['claim'] == x else x}"
    else:
        about = (
            f"that {x} and {y} are equal within {row['margin']:g}"
            if row["kind"] == "equal"
            else f"on {x} and {y}"
        )
        head = f"{place}: NO CLAIM {about}: {row['reason']}"
    if seeds and row["kind"] != "overall" and row["solved_x"] == row["solved_y"] == seeds:
        head += " (both solve it in every run: too easy to tell them apart)"
    if row["unmatched"]:
        head += f" (NOT MATCHED: {row['unmatched']})"
    if not seeds:
        return head + "."
    what = f"{seeds} paired runs" if row["kind"] == "overall" else f"{seeds} paired seeds"
    family = f"Holm over {row['family']}: {p_text(row['p_holm'])}" if row["p_holm"] is not None else ""
    if row["kind"] == "equal":
        return (
            f"{head}. {what}: mean difference {row['mean_difference']:+.3f}; equivalence test p = "
            f"{p_text(row['p'])}, {family}."
        )
    interval = f" [{row['low']:+.3f}, {row['high']:+.3f}]" if row["low"] is not None else " (no interval)"
    text = (
        f"{head}. {what}: interquartile mean {row['iqm_x']:.3f} and {row['iqm_y']:.3f}, difference "
        f"{row['difference']:+.3f}{interval}; solved {_rate(row['solved_x'], seeds)} and "
        f"{_rate(row['solved_y'], seeds)}; P({x} > {y}) = {row['improvement']:.2f}"
    )
    return text + (f"; sign-flip p = {p_text(row['p'])}, {family}." if family else ".")


def rule_text(table: pl.DataFrame) -> str:
    """The rule behind the verdicts of a table, for its caption."""
    better = table.filter(kind="better")
    text = (
        "Scores: accuracy on test at the longest reported length (over all tasks: chance-scaled accuracy) "
        "of winners retrained on fresh seeds; equal seeds had equal training data, all runs the same test "
        "data. The seeds show how runs of the chosen points vary, not how the choice would. "
    )
    if better.height:
        m, n = better["family"][0], min(better["seeds"].to_list())
        text += (
            "Better: the 95 % bootstrap interval of the difference of interquartile means excludes 0 (where "
            "it has no width, none is shown and all pairs have to agree in sign), the "
            f"probability of improvement is at least {IMPROVEMENT}, and the two-sided sign-flip test of the "
            f"mean paired difference, Holm-corrected over the {m} declared comparisons, has p <= {ALPHA}. "
            f"The family needs {seeds_needed(m, ALPHA)} paired seeds, an interval {MIN_UNITS}. "
        )
        effect = detectable_effect(n, m, ALPHA)
        if effect is not None:
            text += (
                f"With {n} seeds a difference is found four times in five only if it is about {effect:.1f} "
                "standard deviations of the paired differences or more. "
            )
    if table.filter(kind="equal").height:
        k = table.filter(kind="equal")["family"][0]
        text += (
            "Equal: two one-sided sign-flip tests of the mean paired difference against the declared margin, "
            f"Holm-corrected over the {k} equality claims. It is about what so many seeds can show: an arm "
            "that fails in one seed of n fails in none of n seeds a third of the time. "
        )
    return text + "Solve rates with exact 95 % intervals (Clopper-Pearson)."


def p_text(p: float) -> str:
    """A p-value with two digits."""
    return f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


def _rate(solved: int, runs: int) -> str:
    low, high = clopper_pearson(solved, runs)
    return f"{solved}/{runs} [{low:.2f}, {high:.2f}]"
