"""The ledger: what every architecture costs on every task, measured, and whether that is the same for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from arena.grid.plan import Setting, canonical
from arena.grid.tuning_section import TuningSection
from arena.tuning.flops import relative
from arena.tuning.match import TOLERANCE, model_quantity, state_grows, target_value

SCHEMA: dict[str, Any] = {
    "task": pl.String,
    "task_params": pl.String,
    "arm": pl.String,
    "params": pl.Int64,
    "active_params": pl.Int64,
    "state_bytes": pl.Int64,
    "state_grows": pl.Boolean,
    "flops_per_token": pl.Float64,
    "ms_per_step": pl.Float64,
    "match": pl.String,
    "deviation": pl.Float64,
    "matched": pl.Boolean,
    "d_model": pl.Int64,
    "n_heads": pl.Int64,
    "mlp_hidden": pl.Int64,
}
"""``active_params``: without the experts that a token does not go through; ``state_bytes``: of one sequence
at the longest training length; ``state_grows``: it grows with the length, so it is exempt from ``match =
"state"``; ``flops_per_token``: of a forward pass there (``arena.tuning.flops``); ``ms_per_step``: of one run,
as its share of a small fleet; ``deviation``: relative, of the matched quantity from the reference (parameters
from the median, where nothing is matched); ``matched``: it is within the tolerance."""


def ledger_table(
    settings: Sequence[Setting], section: TuningSection, seconds: Mapping[int, float]
) -> pl.DataFrame:
    """One row a setting, columns as in :data:`SCHEMA`.

    Args:
        settings: every architecture on every task, as it will be trained.
        section: the rules.
        seconds: index of a setting -> seconds of a step of one run.
    """
    rows = []
    measured = ("params", "active_params", "state", "flops")
    for index, setting in enumerate(settings):
        model, length = setting.shared["model"], setting.train.train_lengths[1]
        values = {name: model_quantity(name, length).measure(model) for name in measured}
        rows.append(
            {
                "task": setting.shared["task"]["name"],
                "task_params": canonical(setting.shared["task"]["params"]),
                "arm": setting.arm,
                "params": int(values["params"]),
                "active_params": int(values["active_params"]),
                "state_bytes": int(values["state"]),
                "state_grows": state_grows(model, length),
                "flops_per_token": float(values["flops"]),
                "ms_per_step": 1000 * seconds[index],
                "match": section.match if section.match != "none" else None,
                "d_model": model["d_model"],
                "n_heads": model["n_heads"],
                "mlp_hidden": model.get("mlp_hidden"),
            }
        )
    column = {"state": "state_bytes", "flops": "flops_per_token", "time": "ms_per_step"}.get(
        section.match, "params"
    )
    for task in dict.fromkeys((row["task"], row["task_params"]) for row in rows):
        mine = [row for row in rows if (row["task"], row["task_params"]) == task]
        exempt = [row for row in mine if section.match == "state" and row["state_grows"]]
        fixed = {row["arm"]: float(row[column]) for row in mine if row not in exempt}
        for row in exempt:
            row |= {"deviation": None, "matched": True}
        for row in (row for row in mine if row not in exempt):
            row["deviation"] = relative(float(row[column]), target_value(fixed, section.reference))
            row["matched"] = abs(row["deviation"]) <= TOLERANCE.get(section.match, TOLERANCE["params"])
    return pl.DataFrame(rows, schema=SCHEMA)


def ledger_lines(ledger: pl.DataFrame) -> list[str]:
    """The ledger for people, a line a setting."""
    lines = []
    for row in ledger.iter_rows(named=True):
        by = row["match"] or "params"
        deviation = "" if row["deviation"] is None else f"; {by} {100 * row['deviation']:+.1f} %"
        flag = "" if row["matched"] else " UNMATCHED"
        if row["match"] == "state" and row["state_grows"]:
            flag = "; its state grows: exempt"
        active = f" ({row['active_params']:,} active)" if row["active_params"] != row["params"] else ""
        sizes = f"{row['params']:,} parameters{active}, {row['state_bytes']:,} state bytes"
        sizes += " (growing)" if row["state_grows"] else ""
        costs = f"{row['flops_per_token']:,.0f} FLOPs a token, {row['ms_per_step']:.2f} ms a step"
        lines.append(f"ledger: {row['arm']} on {row['task']}: {sizes}, {costs}{deviation}{flag}")
    return lines
