"""Tables, Parquet and figures of ``arena bench``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console
from rich.table import Table

Rows = Sequence[Mapping[str, Any]]
WIDE = 160
"""Columns of a table where the output is no terminal."""
TYPES = {str: pl.String, int: pl.Int64, float: pl.Float64, bool: pl.Boolean}


def frame(rows: Rows, fields: Mapping[str, type]) -> pl.DataFrame:
    """The rows as a table, one column a field."""
    return pl.DataFrame(list(rows), schema={name: TYPES[kind] for name, kind in fields.items()})


def write(table: pl.DataFrame, about: Mapping[str, Any], folder: Path, name: str) -> list[Path]:
    """``NAME.parquet`` and ``NAME.json`` (what the numbers were taken on) in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.parquet", folder / f"{name}.json"]
    table.write_parquet(paths[0])
    paths[1].write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return paths


def wide(console: Console) -> Console:
    """The console, wide enough for the tables where it is no terminal."""
    return console if console.is_terminal else Console(width=WIDE, highlight=False)


def show_kernels(table: pl.DataFrame, console: Console) -> None:
    """A table for each operator; what could not run, and what a reader must know, below it."""
    console = wide(console)
    for (operator, dtype), part in table.group_by(["operator", "dtype"], maintain_order=True):
        out = Table(title=f"{operator}, {dtype}", title_justify="left")
        for heading in ("setting", "shape", "pass", "contender"):
            out.add_column(heading, no_wrap=heading == "pass")
        for heading in (
            "ms",
            "graph ms",
            "vs ours",
            "GB/s",
            "of copy",
            "of matmul",
            "MB",
            "error",
            "grad error",
        ):
            out.add_column(heading, justify="right")
        before: tuple[str, ...] = ()
        for row in part.filter(pl.col("ms").is_not_null()).iter_rows(named=True):
            where = (row["setting"], row["shape"], row["direction"])
            if before and where != before:
                out.add_section()
            out.add_row(
                *((*where[:2], where[2].replace("backward", "back")) if where != before else ("", "", "")),
                row["contender"],
                f"{row['ms']:.3g}",
                _number(row["graph_ms"], ".3g"),
                "" if row["ours"] else _number(row["ours_times_faster"], ".2f"),
                f"{row['bytes_s'] / 1e9:.3g}",
                f"{row['of_copy']:.0%}",
                f"{row['of_matmul']:.1%}",
                f"{row['memory_mb']:.3g}",
                _number(row["error"], ".0e"),
                _number(row["gradient_error"], ".0e"),
            )
            before = where
        console.print(out)
        noted = part.filter(pl.col("note") != "").unique(["contender", "note"], maintain_order=True)
        for row in noted.iter_rows(named=True):
            console.print(f"  {row['contender']}: {row['note']}", markup=False)
    console.print("vs ours: its time over that of ours (auto), so above 1 ours is faster")


def show_training(table: pl.DataFrame, console: Console) -> None:
    """One table, a line for each architecture, size of fleet and path.

    "vs singles": against a fleet of one; "vs loop": against a plain PyTorch loop that never evaluates.
    """
    console = wide(console)
    phases = ("data", "forward", "backward", "optimiser", "evaluation")
    out = Table(title="training", title_justify="left")
    headings = (
        *(
            "architecture",
            "task",
            "fleet",
            "path",
            "step ms",
            "run steps/s",
            "runs/hour",
            "vs singles",
            "vs loop",
        ),
    )
    for heading in (*headings, *phases, "MB"):
        out.add_column(heading, justify="left" if heading in headings[:2] else "right")
    for row in table.iter_rows(named=True):
        if row["step_ms"] is None:
            out.add_row(row["arch"], row["task"], str(row["fleet"]), row["path"], row["note"])
            continue
        out.add_row(
            row["arch"],
            row["task"],
            str(row["fleet"]),
            row["path"],
            f"{row['step_ms']:.3g}",
            f"{row['run_steps_s']:.4g}",
            f"{row['runs_per_hour']:.0f}",
            _number(row["times_one_by_one"], ".1f"),
            _number(row["times_plain_loop"], ".1f"),
            *(f"{row[f'{name}_share']:.0%}" for name in phases),
            _number(row["memory_mb"], ".0f"),
        )
    console.print(out)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def draw_kernels(table: pl.DataFrame, about: Mapping[str, Any], path: Path) -> Path:
    """Milliseconds of every contender, a panel for each operator and setting, forward and backward."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import seaborn as sns

    data = table.filter(pl.col("ms").is_not_null()).with_columns(
        case=pl.format("{} {}\n{}", "operator", "setting", "shape"),
        time=pl.coalesce("graph_ms", "ms"),
    )
    if not len(data):
        raise ValueError("nothing was measured")
    grid = sns.catplot(
        data=data.select("time", "contender", "direction", "case").to_dict(as_series=False),
        kind="bar",
        x="time",
        y="contender",
        hue="direction",
        col="case",
        col_wrap=min(3, data["case"].n_unique()),
        sharex=False,
        sharey=False,
        height=2.6,
        aspect=1.6,
    )
    grid.set_titles("{col_name}", size=8)
    grid.set_axis_labels("ms", "")
    grid.figure.suptitle(str(about["machine"]["device"]), y=1.01)
    grid.savefig(path, dpi=120)
    plt.close(grid.figure)
    return path


def draw_training(table: pl.DataFrame, about: Mapping[str, Any], path: Path) -> Path:
    """Runs per hour over the size of the fleet, and the parts of the time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import seaborn as sns

    data = table.filter(pl.col("step_ms").is_not_null())
    if not len(data):
        raise ValueError("nothing was measured")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    data = data.with_columns(how=pl.format("{}, {}", "task", "path"))
    lines = data.select("fleet", "runs_per_hour", "arch", "how").to_dict(as_series=False)
    sns.lineplot(data=lines, x="fleet", y="runs_per_hour", hue="arch", style="how", marker="o", ax=left)
    left.set(xscale="log", yscale="log", xlabel="replicas in a fleet", ylabel="runs per hour")
    largest = data.group_by("arch", "task", maintain_order=True).last()
    bottom = [0.0] * len(largest)
    names = [
        f"{row['arch']}\n{row['task']} x{row['fleet']}\n{row['path']}"
        for row in largest.iter_rows(named=True)
    ]
    for name in ("data", "forward", "backward", "optimiser", "evaluation"):
        values = largest[f"{name}_share"].to_list()
        right.bar(names, values, bottom=bottom, label=name)
        bottom = [a + b for a, b in zip(bottom, values, strict=True)]
    right.set(ylabel="share of a run's time")
    right.legend(fontsize=8)
    right.tick_params(axis="x", labelsize=7)
    figure.suptitle(str(about["machine"]["device"]))
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
