"""What changed from one result folder to another: printed, and written as a page, Markdown and a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console

from arena.grid.results import load_environments, load_results
from arena.grid.store import StoreError
from arena.report.differences import (
    ALPHA,
    METRICS,
    Change,
    difference_table,
    environment_changes,
    only_in_one,
    request_changes,
    run_changes,
    tested_rows,
)
from arena.report.document import Document, Section, print_document, to_markdown
from arena.report.page import write_html
from arena.report.request import in_file_order, read_request
from arena.report.tables import task_labels
from arena.statistics import MIN_UNITS, seeds_needed

SHOWN = 200
"""Differences in the document; the table that is written has all."""

_HOW = (
    f"Differences are B less A. From {MIN_UNITS} runs on: of the interquartile means [its 95 % bootstrap "
    "interval]; below that, and where the interval has no width: of the means (lowest..highest pair). Pairs: "
    "runs of the same task, parameters, architecture, length and seed; unpaired, every run of A against "
    "every run of B, where fewer than half of the seeds are in both. Beyond noise: at least "
    f"{MIN_UNITS} pairs, an interval without 0 and p <= {ALPHA} by the sign-flip test (unpaired: the "
    "permutation test), Holm-corrected over the {family} rows. Not beyond noise is not equal: see the "
    "interval."
)


def compare(
    a: str | Path,
    b: str | Path,
    *,
    metric: str = "accuracy",
    out: str | Path | None = None,
    console: Console | None = None,
) -> list[Path]:
    """Say what changed from result folder ``a`` to ``b``.

    Args:
        a: a result folder, of a grid or of tuning.
        b: another one.
        metric: one of :data:`METRICS`, which the document shows; the written table has all.
        out: a folder for compare.html, compare.md, compare.png and differences as .parquet and .csv; None:
            nothing is written.
        console: where to print; None: nowhere.

    Returns:
        The files written.

    Raises:
        StoreError: not a result folder, or nothing that both have measured.
        ValueError: an unknown metric.
    """
    if metric not in METRICS:
        raise ValueError(f"metric is one of {', '.join(METRICS)}, not {metric!r}")
    folders = Path(a), Path(b)
    rows = []
    for folder in folders:
        table = load_results(folder)
        if table.is_empty():
            raise StoreError(f"{folder} holds no results yet: arena grid trains them")
        rows.append(tested_rows(table))
    requests = [read_request(folder) for folder in folders]
    labels = in_file_order(
        task_labels(pl.concat([side.select("task", "task_params") for side in rows])), requests[1]
    )
    table = difference_table(*rows)
    if table.is_empty():
        raise StoreError(_unrelated(folders, rows, labels))
    places = {key: place for place, key in enumerate(labels)}
    table = (
        table.with_columns(
            place=pl.struct("task", "task_params").map_elements(
                lambda key: places[key["task"], key["task_params"]], return_dtype=pl.Int64
            )
        )
        .sort("metric", "place", "arm", "eval_length")
        .drop("place")
    )
    shown = table.filter(metric=metric)
    if shown.is_empty():
        raise StoreError(
            f"no run of both folders has {metric}: --metric {', '.join(sorted(set(table['metric'])))}"
        )
    changes = [
        *request_changes(*requests),
        *run_changes(rows[0], rows[1], labels),
        *environment_changes(*(load_environments(folder) for folder in folders)),
    ]
    figures = []
    if out is not None:
        from arena.report.compare_figure import compare_figure

        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        figures = [out / "compare.png"]
        compare_figure(shown, labels, figures[0], metric=metric)
    document = _document(folders, requests, rows, shown, changes, labels, metric, figures)
    if console is not None:
        print_document(document, console)
    if out is None:
        return []
    written = [
        Path(out) / name for name in ("compare.html", "compare.md", "differences.parquet", "differences.csv")
    ]
    write_html(document, written[0])
    written[1].write_text(to_markdown(document), encoding="utf-8")
    table.write_parquet(written[2])
    table.drop("values").write_csv(written[3])
    return written + figures


def _unrelated(
    folders: tuple[Path, Path], rows: list[pl.DataFrame], labels: Mapping[tuple[str, str], str]
) -> str:
    """Why two folders cannot be compared."""
    texts = []
    for folder, side in zip(folders, rows, strict=True):
        tasks = sorted({labels[key] for key in side.select("task", "task_params").iter_rows()})
        arms = sorted(set(side["arm"]))
        names = [", ".join(found[:4]) + (", ..." if len(found) > 4 else "") for found in (arms, tasks)]
        texts.append(f"{folder} has {names[0]} on {names[1]}")
    return (
        "nothing to compare: no task (with the same parameters), architecture and length is in both: "
        + "; ".join(texts)
    )


def _document(
    folders: tuple[Path, Path],
    requests: list[dict[str, Any]],
    rows: list[pl.DataFrame],
    table: pl.DataFrame,
    changes: list[Change],
    labels: Mapping[tuple[str, str], str],
    metric: str,
    figures: list[Path],
) -> Document:
    notes = []
    for letter, folder, request, side in zip("AB", folders, requests, rows, strict=True):
        status = dict(side.unique("run_id")["status"].value_counts(sort=True).iter_rows())
        counts = ", ".join(f"{count} {name}" for name, count in status.items())
        title = request.get("title") or request.get("name")
        notes.append(f"{letter}: {folder}{f' ({title})' if title else ''}: {counts}.")
    alone = only_in_one(rows[0], rows[1], labels)
    order = table.sort(
        pl.col("beyond"), pl.col("mean_difference").abs().fill_null(0.0), descending=True, maintain_order=True
    )
    sections = [
        Section(heading="What changed", figures=figures, lines=_sentences(table, labels, metric)),
        Section(
            heading=f"Differences in {metric.replace('_', ' ')}, the largest first",
            columns=[
                "architecture",
                "task",
                "length",
                "A",
                "B",
                "B - A",
                "runs",
                "identical",
                "p (Holm)",
                "beyond noise",
            ],
            rows=[_row(row, labels) for row in order.head(SHOWN).iter_rows(named=True)],
            wide=3,
            lines=[f"{table.height - SHOWN} smaller differences are left out here."]
            if table.height > SHOWN
            else [],
            caption=_HOW.format(family=table.height),
        ),
        Section(
            heading="Settings, versions and backends that differ",
            columns=["what", "A", "B", "where"],
            rows=[list(change) for change in changes],
            lines=[] if changes else ["None."],
            text=True,
        ),
    ]
    for letter, lines in zip("AB", alone, strict=True):
        if lines:
            sections.append(Section(heading=f"Runs only in {letter}", lines=lines))
    return Document(
        title=f"{folders[0].name} and {folders[1].name}: what changed",
        claim="",
        notes=notes,
        sections=sections,
    )


def _sentences(table: pl.DataFrame, labels: Mapping[tuple[str, str], str], metric: str) -> list[str]:
    pairs, identical = table["pairs"].sum(), table["identical"].sum()
    lines = []
    if pairs:
        lines.append(f"{identical:,} of {pairs:,} paired measurements are identical.")
    beyond = table.filter("beyond").sort(pl.col("mean_difference").abs(), descending=True)
    lines += [
        f"{row['arm']} on {labels[row['task'], row['task_params']]}, length {row['eval_length']}: {metric} "
        f"{row['mean_a']:.3f} to {row['mean_b']:.3f}, {_difference(row)}."
        for row in beyond.iter_rows(named=True)
    ]
    if beyond.is_empty():
        lines.append(
            "No difference is beyond noise." if identical < pairs or not pairs else "Nothing changed."
        )
    needed = max(MIN_UNITS, seeds_needed(table.height, ALPHA))
    runs = pl.when("paired").then("pairs").otherwise(pl.min_horizontal("runs_a", "runs_b"))
    differ = ~pl.col("paired") | (pl.col("identical") < pl.col("pairs"))
    few = table.filter(runs < pl.when("paired").then(needed).otherwise(MIN_UNITS), differ).height
    if few:
        lines.append(
            f"TOO FEW SEEDS for {few} of {table.height} rows: with so many rows a difference needs {needed} "
            f"pairs of runs (unpaired: {MIN_UNITS} runs of each) to be beyond noise."
        )
    return lines


def _row(row: Mapping[str, Any], labels: Mapping[tuple[str, str], str]) -> list[str]:
    seen = "*" if row["split"] == "train" else ""  # so few sequences that training may have met them all
    runs = f"{row['pairs']} pairs" if row["paired"] else f"{row['runs_a']} and {row['runs_b']}, unpaired"
    return [
        row["arm"],
        labels[row["task"], row["task_params"]],
        f"{row['eval_length']}{seen}",
        f"{row['mean_a']:.3f}",
        f"{row['mean_b']:.3f}",
        _difference(row),
        runs,
        str(row["identical"]) if row["pairs"] else "-",
        f"{row['p_holm']:.2g}",
        "YES" if row["beyond"] else f"no: {row['reason']}",
    ]


def _difference(row: Mapping[str, Any]) -> str:
    if row["mean_difference"] is None:
        return "-"
    if row["low"] is not None:
        return f"{row['iqm_difference']:+z.3f} [{row['low']:+z.3f}, {row['high']:+z.3f}]"
    if row["least"] == row["most"]:
        return f"{row['mean_difference']:+z.3f}"
    return f"{row['mean_difference']:+z.3f} ({row['least']:+z.3f}..{row['most']:+z.3f})"
