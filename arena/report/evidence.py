"""The evidence of tuning as sections of a report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from arena.grid.results import load_curves, load_results
from arena.report.document import Section
from arena.report.evidence_search import (
    Context,
    best_of_n_section,
    importance_section,
    panel_section,
    response_section,
)
from arena.report.evidence_tables import INDEX, TUNED, spent_table, tuning_trials
from arena.report.palette import Look
from arena.report.pruning import halving_table
from arena.report.tables import SOLVED, point_scores
from arena.report.verdicts import LEARNED, rule_text, verdict_line, verdict_table

_SPENT = (
    "search, extension, exploit: trials, from which the winner was chosen. Pilot runs: of earlier "
    "requests in the same folder. Tokens and seconds: of everything, pilots included; a run's seconds are "
    "its share of its fleet's."
)
_CHOSEN = (
    "The point of the best score on valid, which was retrained on fresh seeds. Its score here is the best "
    "of n and so too high: the accuracies are those of the retrained runs."
)
_PRUNING = (
    "Had each study kept the better half of its paired points at a quarter and again at half of the "
    "steps, by the learning curves on valid. A solver: a point whose final chance-scaled accuracy on "
    f"valid is at least {SOLVED}."
)
_LEDGER = (
    "{by} State bytes: measured, of what one sequence carries at the longest training length; (grows): with "
    "the length, so exempt from matching by state. FLOPs: of a forward pass. ms a step: of one run, as its "
    "share of a small fleet."
)

Cell = tuple[str, str, str]


def evidence(
    rows: pl.DataFrame,
    directory: Path,
    request: Mapping[str, Any],
    labels: Mapping[tuple[str, str], str],
    styles: Mapping[str, Look],
) -> tuple[list[Section], list[Section], dict[str, pl.DataFrame]]:
    """What a reviewer of a tuned comparison asks for; figures are written to ``DIR/report``.

    Args:
        rows: of the last request, all stages.
        directory: the result folder.
        request: the experiment file.
        labels: short names of the tasks.
        styles: looks of the arms, in the order of the tables.

    Returns:
        The sections that stand before the accuracies (verdicts), those that stand after them, and the tables.
    """
    section = request.get("tuning", {})
    metric, lengths = _metric(section)
    points = _finite(point_scores(rows, metric, lengths))
    spent = spent_table(rows, load_results(directory, all_requests=True))
    ledger, winners = (_read(directory / "tuning" / f"{name}.parquet") for name in ("ledger", "winners"))
    if not winners.is_empty():  # of an earlier request they may be other points
        winners = winners.join(points, on=[*INDEX, "trial", "lr"], how="semi")
    context = Context(directory=directory, labels=labels, styles=styles)
    context.frames.update({"points": points, "spent": spent, "ledger": ledger})
    trials = tuning_trials(spent)
    verdicts = _verdicts(rows.filter(stage="final"), request, trials, ledger, context)
    found = [
        _spent(spent, trials, context),
        _chosen(winners, point_scores(rows, "chance_scaled_accuracy"), context),
        best_of_n_section(points, context),
        response_section(points, winners, context),
        panel_section(rows, metric, lengths, context),
        importance_section(_studies(directory, points), context),
        _pruning(rows, load_curves(directory), metric, lengths, context),
        _ledger(ledger, context),
    ]
    frames = {name: frame for name, frame in context.frames.items() if not frame.is_empty()}
    return [verdicts], [part for part in found if part is not None], frames


def _metric(section: Mapping[str, Any]) -> tuple[str, list[int]]:
    """The declared metric and the valid lengths it is taken at (none: all)."""
    name, _, lengths = str(section.get("metric", "accuracy")).rpartition("/")[2].partition("@")
    return name, [int(word) for word in lengths.split(",") if word]


def _finite(points: pl.DataFrame) -> pl.DataFrame:
    """Where the score is a loss, a diverged trial counts as the worst of its task that did not."""
    score = pl.when(pl.col("score").is_finite()).then(pl.col("score"))
    worst = score.min().over("task", "task_params")
    return points.with_columns(score=score.fill_null(worst)).drop_nulls("score")


def _studies(directory: Path, points: pl.DataFrame) -> dict[Cell, Any]:
    """The Optuna studies behind the points, from the folder's journal; none where they are in a database.

    A folder may hold studies of several requests: the one whose trials have the points' scores is meant.
    """
    journal = directory / "tuning" / "journal.log"
    if not journal.exists():
        return {}
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(journal)))
    tuned = points.filter(pl.col("stage").is_in(TUNED))
    scores = {tuple(row[:4]): row[4] for row in tuned.select(*INDEX, "trial", "score").iter_rows()}
    found: dict[Cell, Any] = {}
    agreed: dict[Cell, int] = {}
    for name in optuna.get_all_study_names(storage):
        study = optuna.load_study(study_name=name, storage=storage)
        task, params, arm = (str(study.user_attrs.get(key)) for key in INDEX)
        cell = task, params, arm
        same = sum(
            trial.value is not None
            # the study of a loss is minimised, a score is the better the higher
            and abs(abs(trial.value) - abs(scores.get((*cell, trial.user_attrs.get("point")), math.inf)))
            < 1e-9
            for trial in study.get_trials(deepcopy=False)
        )
        if same > agreed.get(cell, 0):
            found[cell], agreed[cell] = study, same
    return found


def _read(path: Path) -> pl.DataFrame:
    return pl.read_parquet(path) if path.exists() else pl.DataFrame()


def _verdicts(
    final: pl.DataFrame,
    request: Mapping[str, Any],
    trials: Mapping[Cell, int],
    ledger: pl.DataFrame,
    context: Context,
) -> Section:
    section = request.get("tuning", {})
    pairs, equal = section.get("pairs", []), section.get("equivalence", [])
    if not pairs and not equal:
        hint = 'No comparison was declared, so none is made: [tuning] pairs = [["a", "b"]] declares them.'
        return Section(heading="Verdicts", lines=[hint])
    unmatched: set[Cell] = set()
    if not ledger.is_empty():
        table = ledger.filter(~pl.col("matched")).select(INDEX)
        unmatched = {(task, params, arm) for task, params, arm in table.iter_rows()}
    verdicts = verdict_table(
        final,
        list(context.labels),
        pairs,
        equal,
        trials=trials,
        unmatched=unmatched,
        declared_tasks=len(request.get("tasks", [])),
        declared_seeds=len(section.get("report_seeds", [])),
    )
    context.frames["verdicts"] = verdicts
    lines = [
        verdict_line(row, context.labels.get((row["task"], row["task_params"]), ""))
        for row in verdicts.iter_rows(named=True)
    ]
    return Section(heading="Verdicts", lines=lines, caption=rule_text(verdicts))


def _spent(spent: pl.DataFrame, trials: Mapping[Cell, int], context: Context) -> Section:
    """Budget by task and arm; a line for each task whose arms were not given the same."""
    lines = []
    for (task, params), label in context.labels.items():
        given = {arm: trials.get((task, params, arm), 0) for arm in context.styles}
        if len(set(given.values())) > 1:
            counts = ", ".join(f"{arm} {count}" for arm, count in given.items())
            lines.append(f"UNEQUAL BUDGETS on {label}: trials with a result: {counts}.")
    if not lines:
        lines.append("Equal budgets: on every task each architecture has the same number of trials.")
    wide = spent.group_by(INDEX).agg(
        *(
            pl.col("runs").filter(pl.col("stage") == stage).sum().alias(stage)
            for stage in ("panel", "final", "pilot")
        ),
        *(
            pl.col("trials").filter(pl.col("stage") == stage).sum().alias(f"{stage}_trials")
            for stage in TUNED
        ),
        pl.col("failed", "diverged", "tokens", "wall_s").sum(),
    )
    rows = []
    for row in context.ordered(wide):
        names = [*(f"{stage}_trials" for stage in TUNED), "panel", "final", "pilot", "diverged", "failed"]
        rows.append(
            [
                *context.heads(row),
                *(str(row[name] or "-") for name in names),
                f"{row['tokens']:,}",
                f"{row['wall_s']:,.0f}",
            ]
        )
    return Section(
        heading="Budget spent",
        lines=lines,
        columns=[
            "architecture", "task", "search", "extension", "exploit", "panel runs", "final runs",
            "pilot runs", "diverged", "failed", "tokens", "wall s",
        ],
        rows=rows,
        caption=_SPENT,
    )  # fmt: skip


def _chosen(winners: pl.DataFrame, scaled: pl.DataFrame, context: Context) -> Section | None:
    if winners.is_empty():
        return None
    names = [name for name in ("lr", "weight_decay", "warmup", "beta2", "clip") if name in winners.columns]
    rows = []
    for row in context.ordered(winners):
        values = [f"{row[name]:.3g}" if row[name] is not None else "-" for name in names]
        options = row.get("options")
        own = "" if options in (None, "{}", "") else str(options)
        score = f"{row['score']:.3f}"
        rows.append([*context.heads(row), *values, own, score, str(row["n_points"])])
    heads = [name.replace("_", " ") for name in names]
    tops = scaled.filter(pl.col("stage").is_in(TUNED)).group_by(INDEX).agg(pl.col("score").max())
    idle = [" on ".join(context.heads(row)) for row in context.ordered(tops) if row["score"] < LEARNED]
    lines = [f"NOT LEARNED, no point above chance on valid: {', '.join(idle)}."] if idle else []
    return Section(
        heading="Chosen points",
        lines=lines + _at_the_end(winners, scaled, context),
        columns=["architecture", "task", *heads, "own", "score on valid", "of n"],
        rows=rows,
        caption=_CHOSEN,
    )


def _at_the_end(winners: pl.DataFrame, tried: pl.DataFrame, context: Context) -> list[str]:
    """A line about the winners whose learning rate is the lowest or highest that was tried, if any is."""
    ends = (
        tried.filter(pl.col("stage").is_in(TUNED))
        .group_by(INDEX)
        .agg(pl.col("lr").min().alias("lowest"), pl.col("lr").max().alias("highest"))
    )
    found = [
        f"{' on '.join(context.heads(row))} ({end})"
        for row in context.ordered(winners.join(ends, on=INDEX))
        for end in ("lowest", "highest")
        if row["lr"] == row[end] and row["lowest"] < row["highest"]
    ]
    if not found:
        return []
    return [
        f"AT THE END of the learning rates tried, so that a better one may lie beyond: {', '.join(found)}."
    ]


def _pruning(
    rows: pl.DataFrame, curves: pl.DataFrame, metric: str, lengths: list[int], context: Context
) -> Section | None:
    table = halving_table(rows, curves, metric, lengths)
    if table.is_empty():
        return None
    context.frames["pruning"] = table
    solvers, lost = table["solvers"].sum(), table["lost"].sum()
    best = f"the best point of {table['best_lost'].sum()} of {table.height} studies"
    return Section(
        heading="What pruning would have cost",
        lines=[f"Successive halving would have lost {lost} of {solvers} solvers, and {best}."],
        columns=["architecture", "task", "trials", "kept", "solvers", "solvers lost", "best point lost"],
        rows=[
            [
                *context.heads(row),
                *(str(row[name]) for name in ("trials", "kept", "solvers", "lost")),
                "YES" if row["best_lost"] else "no",
            ]
            for row in context.ordered(table)
        ],
        caption=_PRUNING,
    )


def _ledger(ledger: pl.DataFrame, context: Context) -> Section | None:
    if ledger.is_empty():
        return None
    rows = []
    for row in context.ordered(ledger):
        ms = row["ms_per_step"]
        deviation = row["deviation"]
        active = row.get("active_params", row["params"])  # absent from older ledgers
        rows.append(
            [
                *context.heads(row),
                f"{row['params']:,}" + (f" ({active:,} active)" if active != row["params"] else ""),
                f"{row['state_bytes']:,}" + (" (grows)" if row["state_grows"] else ""),
                f"{row['flops_per_token']:,.0f}",
                f"{ms:.2f}" if ms is not None else "-",
                f"{100 * deviation:+.1f} %" if deviation is not None else "-",
                "yes" if row["matched"] else "NO",
            ]
        )
    match = ledger["match"][0]
    by = "Nothing was matched; deviation and flag are about the parameters, from the median."
    if match is not None:
        by = f"Matched by {match}; deviation: of that, from the reference."
    return Section(
        heading="Ledger",
        columns=[
            "architecture", "task", "parameters", "state bytes", "FLOPs a token", "ms a step", "deviation",
            "matched",
        ],
        rows=rows,
        caption=_LEDGER.format(by=by),
    )  # fmt: skip
