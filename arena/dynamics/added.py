"""Measurements that plug-ins add (``arena.plugins.measurement``): run, checked, kept, put on the page."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import nn

from arena.plugins import measurements, owner


def measure_added(
    model: nn.Module, task: Any, length: int, about: Mapping[str, pl.Expr], where: str
) -> dict[str, pl.DataFrame]:
    """What the plug-ins' measurements say of a model; one that fails is left out with a warning.

    Each gets a copy of the model, and the random numbers that it draws are its own. No gradient is recorded
    unless it asks for that (``torch.enable_grad``).

    Args:
        model: trained, in evaluation mode.
        task: what it was trained on.
        length: of the sequences.
        about: columns in front of every frame.
        where: the run, for warnings.

    Returns:
        Name -> frame with the columns of ``about``, those of the measurement, and ``quantity`` and ``value``.
    """
    found = {}
    for name, function in measurements().items():
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.default_generator.manual_seed(0)
                frame = _checked(function(copy.deepcopy(model), task, length), list(about))
        except Exception as error:  # it is not ours
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            warnings.warn(f"measurement {title(name)} failed on {where}: {text}", stacklevel=2)
            continue
        found[name] = frame.select(*(value.alias(column) for column, value in about.items()), pl.all())
    return found


def _checked(frame: Any, taken: list[str]) -> pl.DataFrame:
    if not isinstance(frame, pl.DataFrame):
        raise TypeError(f"a measurement returns a polars.DataFrame, not a {type(frame).__name__}")
    for column in ("quantity", "value"):
        if column not in frame.columns:
            raise ValueError(f"the frame has no column {column!r}")
    for column in taken:
        if column in frame.columns:
            raise ValueError(f"column {column!r} is the run's own: call it something else")
    kinds = {"quantity": pl.String, "value": pl.Float64}
    return frame.cast(kinds).with_columns(pl.col("value").fill_nan(None))  # type: ignore[arg-type]


def keep_added(frames: Mapping[str, list[pl.DataFrame]], folder: Path) -> dict[str, pl.DataFrame]:
    """One table a measurement, written to ``folder`` as NAME.parquet and NAME.csv; earlier ones go."""
    for old in [*folder.glob("*.parquet"), *folder.glob("*.csv")]:
        old.unlink()
    tables = {name: pl.concat(parts, how="diagonal_relaxed") for name, parts in frames.items()}
    for name, table in tables.items():
        folder.mkdir(exist_ok=True)
        table.write_parquet(folder / f"{name}.parquet")
        nested = [column for column, kind in table.schema.items() if kind.is_nested()]
        table.drop(nested).write_csv(folder / f"{name}.csv")
    return tables


def added_dictionary(names: list[str]) -> list[str]:
    """Lines of the data dictionary: what each measurement says of itself."""
    lines = []
    for name in names:
        told = inspect.getdoc(measurements()[name]) or "It says nothing of itself."
        lines += [f"## added/{name}", "", f"{title(name)}: {told}", ""]
    return lines


def title(name: str) -> str:
    """Name and origin of a measurement."""
    plugin = owner("arena.measurements", name)
    return f"{name} (plug-in {plugin.name} {plugin.version.partition('+')[0]})" if plugin else name


def meaning(name: str) -> str:
    """The first paragraph of its docstring; nothing where the plug-in is not loaded any more."""
    function = measurements().get(name)
    told = inspect.getdoc(function) if function is not None else None
    return " ".join((told or "").partition("\n\n")[0].split())
