"""A report: printed in the terminal, and written as page, Markdown, tables, figures to ``DIR/report``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl
from rich.console import Console

from arena.grid.plan import TESTED_STAGES
from arena.grid.results import load_environments, load_results
from arena.grid.store import StoreError, read_plan
from arena.report.about import asked_section, repeat_section, unfinished_section, versions_section
from arena.report.accuracy import accuracy_sections
from arena.report.document import Document, Section, print_document, to_markdown
from arena.report.page import write_html
from arena.report.palette import family_order, looks
from arena.report.request import in_file_order, read_request
from arena.report.tables import mixtures, runs_table, task_labels


def make_report(
    directory: str | Path,
    console: Console | None = None,
    *,
    before: Sequence[Section] = (),
    after: Sequence[Section] = (),
) -> list[Path]:
    """Print the report of a result folder and write it.

    Args:
        directory: a result folder, of a plain grid or of tuning.
        console: where to print; None: nowhere.
        before: sections of another room with the answer to what was asked (an ablation); they stand first.
        after: sections of another room that explain it (the dynamics); they stand after the accuracies.

    Returns:
        The files written to ``DIR/report``: page.html (one file, with everything in it), report.md, tables as
        .csv and .parquet (runs, accuracy, overall, budget, surfaces; routing where there are experts; of
        tuning also points, best_of_n, panel, window, importance, spent, ledger, verdicts), figures as .png,
        each with its .svg beside it.

    Raises:
        StoreError: no result folder, or nothing in it.
    """
    directory = Path(directory)
    rows = load_results(directory)
    if rows.is_empty():
        raise StoreError(f"{directory} holds no results yet: arena grid trains them")
    plan = read_plan(directory)
    planned = len(plan["runs"]) if plan is not None else None
    request = read_request(directory)
    environments = load_environments(directory, rows)
    title = str(request.get("title") or request.get("name") or "Results")
    notes = _notes(rows, planned)
    notes += [f"MIXED {line}" for line in mixtures(rows, environments)]

    folder = directory / "report"
    folder.mkdir(exist_ok=True)
    frames = {"runs": runs_table(rows)}
    sections: list[Section] = []
    labels = in_file_order(task_labels(rows), request)
    names = sorted(set(rows["arm"]), key=family_order)
    found = looks(names)
    styles = {name: found[name] for name in names}
    stages = set(rows["stage"])
    tuned = not stages <= {"grid"}
    # Tuning reports the winners on fresh seeds; a plain grid reports all it has.
    tested = rows.filter(pl.col("stage") == ("final" if tuned else "grid"))
    if tested["status"].is_in(["done", "diverged"]).any():
        sections, tables, told = accuracy_sections(tested, labels, styles, folder, title)
        frames |= tables
        notes += told
    searched: list[Section] = []
    if tuned:
        from arena.report.evidence import evidence

        verdicts, searched, tables = evidence(rows, directory, request, labels, styles)
        if "verdicts" in tables or not before:  # none declared is no news where something else was asked
            sections = verdicts + sections
        frames |= tables
    asked, repeat = asked_section(request, tuned=tuned), repeat_section(directory, request, rows)
    document = Document(
        title=title,
        claim=str(request["claim"]) if isinstance(request.get("claim"), str) else "",
        notes=notes,
        sections=[
            *([asked] if asked is not None else []),
            *before,
            *sections,
            *after,
            *searched,
            unfinished_section(frames["runs"], planned),
            versions_section(rows, environments),
            *([repeat] if repeat is not None else []),
        ],
    )
    written = [folder / "page.html", folder / "report.md"]
    write_html(document, written[0])
    written[1].write_text(to_markdown(document, folder), encoding="utf-8")
    for name, frame in frames.items():
        nested = [column for column, kind in frame.schema.items() if isinstance(kind, pl.List)]
        frame.write_parquet(folder / f"{name}.parquet")
        frame.drop(nested).write_csv(folder / f"{name}.csv")
        written += [folder / f"{name}.csv", folder / f"{name}.parquet"]
    if console is not None:
        print_document(document, console)
    return written + [path for section in document.sections for path in section.figures]


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
