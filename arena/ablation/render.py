"""The report of an ablation: printed, and written as Markdown, tables and a figure to ``DIR/ablation``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console

from arena.ablation.effects import declared_effects, effect_table, point_table
from arena.ablation.request import Ablation
from arena.ablation.sentences import LEGEND, axis_sentences, effect_text, longest, why_not
from arena.grid.results import load_results
from arena.grid.store import StoreError, read_record, write_whole
from arena.grid.toml import to_toml
from arena.report.document import Document, Section, print_document, to_markdown
from arena.report.tables import task_labels

FOLDER = "ablation"
_REQUEST = "request.json"


def is_ablation(directory: str | Path) -> bool:
    """Whether a result folder holds an ablation."""
    return (Path(directory) / FOLDER / _REQUEST).exists()


def record_ablation(directory: str | Path, ablation: Ablation) -> None:
    """Write down what was asked for: what the report is about."""
    folder = Path(directory) / FOLDER
    folder.mkdir(exist_ok=True)
    experiment = ablation.experiment
    tasks = list(dict.fromkeys(entry.name for entry in experiment.tasks))
    record = {
        "points": experiment.archs,
        "tasks": tasks,
        "left_out": ablation.left_out,
        "effects": declared_effects(ablation),
    }
    write_whole(folder / _REQUEST, json.dumps(record, indent=1).encode())
    write_whole(folder / "request.toml", to_toml(ablation.asked.model_dump(exclude_none=True)).encode())


def make_ablation(directory: str | Path, console: Console | None = None) -> list[Path]:
    """Print the report of an ablation and write it.

    Args:
        directory: a result folder of ``arena ablate``.
        console: where to print; None: nowhere.

    Returns:
        The files written, in ``DIR/ablation``: ablation.md, points and effects as .parquet, ablation.png.

    Raises:
        StoreError: no ablation, or nothing tested yet.
    """
    document, written = write_ablation(directory)
    if console is not None:
        print_document(document, console)
    return written


def ablation_sections(directory: str | Path) -> tuple[list[Section], list[Path]]:
    """An ablation as a section of its folder's report, and the files written; as :func:`make_ablation`."""
    document, written = write_ablation(directory)
    first, *rest = document.sections
    return [replace(first, heading=document.title), *(replace(part, part=True) for part in rest)], written


def write_ablation(directory: str | Path) -> tuple[Document, list[Path]]:
    """Write the files of :func:`make_ablation`; the report as data, and the files."""
    directory = Path(directory)
    folder = directory / FOLDER
    if not is_ablation(directory):
        raise StoreError(f"{directory} holds no ablation: arena ablate makes one")
    request = read_record(folder / _REQUEST)
    base, *_ = order = request["points"]
    places = {arm: place for place, arm in enumerate(order)}
    rows = load_results(directory).filter(pl.col("arm").is_in(order))
    rows = rows.sort(pl.col("arm").replace_strict(places, return_dtype=pl.Int64), maintain_order=True)
    path = directory / "tuning" / "ledger.parquet"
    ledger = pl.read_parquet(path) if path.exists() else None
    points = point_table(rows, base, ledger)
    if points.is_empty():
        raise StoreError(f"{directory} holds no tested runs yet: the same arena ablate command goes on")
    effects = effect_table(rows, base, ledger, request.get("effects"))
    labels = task_labels(rows.filter(pl.col("status") != "failed"))
    tasks = request["tasks"]
    labels = dict(sorted(labels.items(), key=lambda item: tasks.index(item[0][0])))
    sentences = axis_sentences(effects, labels)
    tables = [_point_grid(points, labels, base), *_effect_grids(effects, labels)]
    if request["left_out"]:
        left = [[name, reason] for name, reason in request["left_out"].items()]
        tables.append(Section(heading="left out", columns=["point", "why"], rows=left))

    from arena.ablation.figure import ablation_figure

    written = [folder / name for name in ("ablation.md", "points.parquet", "effects.parquet", "ablation.png")]
    title = f"Ablation of {base}"
    head = Section(heading="", figures=[written[3]], lines=list(sentences.values()))
    tables[-1] = replace(tables[-1], caption=LEGEND)
    document = Document(title=title, claim="", notes=[], sections=[head, *tables])
    written[0].write_text(to_markdown(document), encoding="utf-8")
    points.write_parquet(written[1])
    effects.write_parquet(written[2])
    ablation_figure(points, effects, labels, written[3], title=title)
    return document, written


def _point_grid(points: pl.DataFrame, labels: Mapping[tuple[str, str], str], base: str) -> Section:
    """One row a point: its gates' ranges, its score on every task at the longest length, its size."""
    here = longest(points)
    rows = []
    for arm in dict.fromkeys(points["arm"]):
        mine = {(row["task"], row["task_params"]): row for row in here.filter(arm=arm).iter_rows(named=True)}
        some = next(iter(mine.values()), None)
        if some is None:
            continue
        texts = []
        for key in labels:
            cell = mine.get(key)
            texts.append("-" if cell is None else _score_text(cell, is_base=arm == base))
        rows.append(
            [
                arm + (f" (= {some['named']})" if some["named"] not in (None, arm) else ""),
                _interval(some["erase_low"], some["erase_high"]),
                _interval(some["write_low"], some["write_high"]),
                *texts,
                ", ".join(f"{mine[key]['lr']:.2g}" for key in labels if key in mine),
                f"{some['params']:,}",
                f"{some['state_bytes']:,}",
            ]
        )
    tasks = [
        f"{label}, length {max(here.filter(task=key[0], task_params=key[1])['eval_length'])}"
        for key, label in labels.items()
    ]
    return Section(
        heading="points",
        columns=["point", "erase in", "write in", *tasks, "lr", "parameters", "state bytes"],
        rows=rows,
    )


def _score_text(cell: Mapping[str, Any], *, is_base: bool) -> str:
    spread = (
        f"{cell['iqm']:.2f} [{cell['low']:.2f}, {cell['high']:.2f}]"
        if cell["low"] is not None
        else f"{cell['mean']:.2f} ({cell['min']:.2f}..{cell['max']:.2f})"
    )
    if is_base or cell["difference"] is None:
        return f"{spread} n={cell['seeds']}"
    if cell["difference_low"] is None:
        return f"{spread} n={cell['seeds']} Δ{cell['difference']:+z.2f}"
    low, high = cell["difference_low"], cell["difference_high"]
    return f"{spread} n={cell['seeds']} Δ{cell['difference_iqm']:+z.2f} [{low:+z.2f}, {high:+z.2f}]"


def _interval(low: float, high: float) -> str:
    if low == high:
        return f"{low:g}"
    return f"[{low:g}, {'∞)' if high == math.inf else f'{high:g}]'}"


def _effect_grids(effects: pl.DataFrame, labels: Mapping[tuple[str, str], str]) -> list[Section]:
    if effects.is_empty():
        return []
    here = longest(effects)
    found = []
    names = ("axis", "of", "to", "second", "second_of", "second_to")
    for kind, heading in (("main", "main effects"), ("interaction", "interactions")):
        rows = []
        mine = here.filter(kind=kind)
        for key in dict.fromkeys(mine.select(names).iter_rows()):
            fields = dict(zip(names, key, strict=True))
            what = f"{fields['axis']}: {fields['of']} → {fields['to']}"
            if kind == "interaction":
                what += f" × {fields['second']}: {fields['second_of']} → {fields['second_to']}"
            same = mine.filter(pl.col(name).eq_missing(value) for name, value in fields.items())
            cells = {(row["task"], row["task_params"]): row for row in same.iter_rows(named=True)}
            texts = [_judged_text(cells[key]) if key in cells else "-" for key in labels]
            rows.append([what, f"{max(same['contexts'])}", *texts])
        if rows:
            found.append(
                Section(heading=heading, columns=["change", "contexts", *labels.values()], rows=rows)
            )
    return found


def _judged_text(effect: Mapping[str, Any]) -> str:
    reason = why_not(effect)
    judged = "claim" if effect["claim"] else f"no claim{': ' if reason else ''}{reason}"
    return f"{effect_text(effect)} {judged}"
