"""A report: printed in the terminal, and written as Markdown, tables and figures to ``DIR/report``."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console

from arena.grid.plan import TESTED_STAGES
from arena.grid.results import load_environments, load_results
from arena.grid.store import StoreError, read_plan
from arena.report.document import Document, Section, print_document, to_markdown
from arena.report.palette import Look, family_order, looks
from arena.report.tables import (
    SOLVED,
    accuracy_table,
    budget_table,
    chosen_points,
    mixtures,
    overall_table,
    runs_table,
    task_labels,
)
from arena.statistics import MIN_UNITS

_BUDGET = ("parameters", "state bytes", "tokens", "unmatched")


def make_report(directory: str | Path, console: Console | None = None) -> list[Path]:
    """Print the report of a result folder and write it.

    Args:
        directory: a result folder, of a plain grid or of tuning.
        console: where to print; None: nowhere.

    Returns:
        The files written to ``DIR/report``: report.md, tables as .csv and .parquet (runs, accuracy, overall,
        budget; of tuning also points, best_of_n, panel, window, importance, spent, ledger, verdicts),
        figures as .png.

    Raises:
        StoreError: no result folder, or nothing in it.
    """
    directory = Path(directory)
    rows = load_results(directory)
    if rows.is_empty():
        raise StoreError(f"{directory} holds no results yet: arena grid trains them")
    plan = read_plan(directory)
    request = _request(directory)
    title = str(request.get("title") or request.get("name") or "Results")
    notes = _notes(rows, len(plan["runs"]) if plan is not None else None)
    notes += [f"MIXED {line}" for line in mixtures(rows, load_environments(directory))]

    folder = directory / "report"
    folder.mkdir(exist_ok=True)
    frames = {"runs": runs_table(rows)}
    sections: list[Section] = []
    labels = _in_file_order(task_labels(rows), request)
    names = sorted(set(rows["arm"]), key=family_order)
    found = looks(names)
    styles = {name: found[name] for name in names}
    stages = set(rows["stage"])
    # Tuning reports the winners on fresh seeds; a plain grid reports all it has.
    tested = rows.filter(pl.col("stage") == ("grid" if stages <= {"grid"} else "final"))
    if tested["status"].is_in(["done", "diverged"]).any():
        sections, tables, several = _accuracy(tested, labels, styles, folder, title)
        frames |= tables
        if several:
            notes.append(
                "Of several learning rates or weight decays, the one that is best on split valid is shown, "
                "for each architecture and task; all are in accuracy.csv."
            )
    if not stages <= {"grid"}:
        from arena.report.evidence import evidence

        before, after, tables = evidence(rows, directory, request, labels, styles)
        sections = before + sections + after
        frames |= tables
    document = Document(title=title, claim=str(request.get("claim", "")), notes=notes, sections=sections)
    written = [folder / "report.md"]
    written[0].write_text(to_markdown(document), encoding="utf-8")
    for name, frame in frames.items():
        nested = [column for column, kind in frame.schema.items() if isinstance(kind, pl.List)]
        frame.write_parquet(folder / f"{name}.parquet")
        frame.drop(nested).write_csv(folder / f"{name}.csv")
        written += [folder / f"{name}.csv", folder / f"{name}.parquet"]
    if console is not None:
        print_document(document, console)
    return written + [path for section in sections for path in section.figures]


def _accuracy(
    tested: pl.DataFrame,
    labels: dict[tuple[str, str], str],
    styles: dict[str, Look],
    folder: Path,
    title: str,
) -> tuple[list[Section], dict[str, pl.DataFrame], bool]:
    """Sections and tables of what was measured on test, and whether points had to be chosen."""
    from arena.report.figure import accuracy_figure, overview_figure

    points = chosen_points(tested)
    keys = ["task", "task_params", "arm", "trial"]
    best = tested.join(points.select(keys), on=keys, how="semi")
    frames = {
        "accuracy": accuracy_table(tested),
        "overall": overall_table(best),
        "budget": budget_table(best),
    }
    chosen = frames["accuracy"].join(points.select(keys), on=keys, how="semi")
    there = set(chosen.select("task", "task_params").iter_rows())
    labels = {key: label for key, label in labels.items() if key in there}
    figures = [folder / "accuracy.png", folder / "overview.png"]
    accuracy_figure(best, labels, figures[0], title=title, styles=styles)
    overview_figure(chosen, labels, figures[1], title=title)
    sections = [_task_section(chosen, frames["budget"], key, label) for key, label in labels.items()]
    if len(labels) > 1:
        sections.append(_overall_section(frames["overall"]))
    sections[-1] = replace(sections[-1], caption=_LEGEND)
    sections.insert(0, Section(heading="", figures=figures))
    return sections, frames, bool((points["points"] > 1).any())


def _request(directory: Path) -> dict[str, Any]:
    try:
        return tomllib.loads((directory / "experiment.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _in_file_order(labels: dict[tuple[str, str], str], request: dict[str, Any]) -> dict[tuple[str, str], str]:
    order = [entry.get("name") for entry in request.get("tasks", [])]
    return dict(
        sorted(labels.items(), key=lambda item: order.index(item[0][0]) if item[0][0] in order else 999)
    )


def _notes(rows: pl.DataFrame, planned: int | None) -> list[str]:
    """What a reader has to know before the numbers: how many runs, what is missing, what went wrong."""
    runs = rows.unique("run_id")
    several = runs["lr"].n_unique() > 1 or runs["weight_decay"].n_unique() > 1
    counts = dict(runs["status"].value_counts().iter_rows())
    stored = counts.get("done", 0) + counts.get("diverged", 0)
    notes = [f"{stored} of {planned if planned is not None else stored} runs have a result."]
    if planned is not None and stored < planned:
        notes.append(f"INCOMPLETE: {planned - stored} runs have none; the same command goes on.")
    tested = pl.col("stage").is_in(TESTED_STAGES)
    for status in ("failed", "diverged"):
        # A search reaches for rates that diverge: those are in its own tables.
        named = runs.filter(pl.col("status") == status, tested | (status == "failed"))
        if named.height:
            names = sorted(
                f"{arm} on {task}, seed {seed}"
                + (f", lr {lr:g}, weight decay {decay:g}" if several else "")
                + (f" ({reason})" if reason else "")
                for arm, task, seed, lr, decay, reason in named.select(
                    "arm", "task", "seed", "lr", "weight_decay", "reason"
                ).iter_rows()
            )
            more = f" and {len(names) - 12} more" if len(names) > 12 else ""
            meaning = " (counted with the worst score)" if status == "diverged" else ""
            notes.append(f"{named.height} runs {status}{meaning}: {'; '.join(names[:12])}{more}.")
    searched = runs.filter(~tested, status="diverged").height
    if searched:
        notes.append(f"{searched} runs of the search or the panel diverged (counted with the worst score).")
    trained = runs.filter(pl.col("status") != "failed")
    unknown = trained["verdict"].null_count()
    if unknown:
        notes.append(f"Kernels not examined in {unknown} of {trained.height} runs: arena doctor does that.")
    wrong = trained.filter(pl.col("verdict").str.starts_with("wrong")).height
    if wrong:
        notes.append(f"WRONG kernels where {wrong} runs were trained: arena doctor says which.")
    if rows.filter(pl.col("reported"), pl.col("split") == "train").height:
        notes.append(
            "Lengths marked * have so few sequences that training may have met them all: they are no test."
        )
    return notes


_LEGEND = (
    f"A cell: mean accuracy over the runs (lowest..highest run) solved/runs; from {MIN_UNITS} runs on, "
    "interquartile mean [its 95 % bootstrap interval] instead of mean and range. "
    "A run solves a length when its chance-scaled accuracy, (accuracy - chance) / (1 - chance), is at least "
    f"{SOLVED}. "
    "Exact solve-rate intervals, chance-scaled and whole-sequence accuracy: accuracy.csv. "
    "State bytes: what one sequence carries at the longest length. "
    "Unmatched: differs from the median architecture (parameters, tokens: by over 2 %)."
)


def _task_section(table: pl.DataFrame, budget: pl.DataFrame, key: tuple[str, str], label: str) -> Section:
    """Architectures by length, the best at the longest length first."""
    cells = table.filter(task=key[0], task_params=key[1])
    costs = {row["arm"]: row for row in budget.filter(task=key[0], task_params=key[1]).iter_rows(named=True)}
    lengths = sorted(cells["eval_length"].unique())
    longest = dict(cells.filter(eval_length=lengths[-1]).select("arm", "mean").iter_rows())
    rows = []
    for arm in sorted(
        cells["arm"].unique(), key=lambda name: (-round(longest.get(name, 0.0), 2), family_order(name))
    ):
        texts = []
        for length in lengths:
            found = cells.filter(arm=arm, eval_length=length).to_dicts()
            texts.append(" ".join(_accuracy_text(cell) for cell in found) or "-")
        cost = costs[arm]
        rows.append(
            [
                arm,
                *texts,
                f"{cost['params']:,}",
                f"{cost['state_bytes']:,}",
                f"{cost['train_tokens']:,}",
                cost["unmatched"] or "",
            ]
        )
    chance = (
        cells.group_by("eval_length").agg(pl.col("chance").first()).sort("eval_length")["chance"].to_list()
    )
    rows.append(
        ["chance", *(f"{value:.2f}" if value is not None else "-" for value in chance), "", "", "", ""]
    )
    seen = set(cells.filter(split="train")["eval_length"])
    heads = [f"length {length}{'*' if length in seen else ''}" for length in lengths]
    columns = ["architecture", *heads, *_BUDGET]
    return Section(heading=label, columns=columns, rows=rows, wide=len(_BUDGET))


def _accuracy_text(cell: dict[str, Any]) -> str:
    if cell["runs"] == 1:
        return f"{cell['mean']:.2f}"
    solved = f"{cell['solved']}/{cell['runs']}"
    if cell["iqm_low"] is not None:
        return f"{cell['iqm']:.2f} [{cell['iqm_low']:.2f}, {cell['iqm_high']:.2f}] {solved}"
    return f"{cell['mean']:.2f} ({cell['min']:.2f}..{cell['max']:.2f}) {solved}"


def _overall_section(overall: pl.DataFrame) -> Section:
    rows = []
    for row in overall.iter_rows(named=True):
        if row["low"] is not None:
            spread = f"{row['iqm']:z.2f} [{row['low']:z.2f}, {row['high']:z.2f}]"
        else:
            spread = f"{row['min']:z.2f}..{row['max']:z.2f}"
        solved = f"{row['solved']}/{row['units']} [{row['solve_low']:.2f}, {row['solve_high']:.2f}]"
        rows.append([row["arm"], f"{row['mean']:z.2f}", spread, solved])
    return Section(
        heading="all tasks, each at its longest length",
        columns=[
            "architecture",
            "chance-scaled accuracy",
            "range, or IQM [interval]",
            "solved [95 % interval]",
        ],
        rows=rows,
    )
