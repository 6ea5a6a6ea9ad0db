"""How evenly mixtures of experts were used."""

from __future__ import annotations

import polars as pl

from arena.report.document import Section

_KEYS = ("task", "task_params", "arm", "trial", "split", "eval_length")
_CAPTION = (
    "What an expert gets of the choices of all tokens, over an even share (1: even; 0: never chosen), in the "
    "layer and run where it is least and most; balance loss: E sum f P, mean over layers and runs (1: even). "
    "No token is dropped. Every length, layer and expert: routing.csv and rows expert_load[layer,expert]."
)


def routing_table(rows: pl.DataFrame) -> pl.DataFrame:
    """One row a run, length and layer that has experts.

    Columns: task, task_params, arm, trial, split, eval_length, seed, run_id, ``layer``, ``experts`` (how
    many), ``least`` and ``most`` (the load of the least and the most loaded one, over an even share), and
    ``balance_loss`` (E sum_e f_e P_e, mean over the layers of the run).
    """
    kept = rows.filter(pl.col("reported"), pl.col("status") != "failed")
    run = [*_KEYS, "seed", "run_id"]
    name = pl.col("metric").str.extract_groups(r"^expert_load\[(?<layer>\d+),\d+\]$").struct.field("layer")
    loads = kept.with_columns(layer=name.cast(pl.Int64)).filter(pl.col("layer").is_not_null())
    table = loads.group_by(*run, "layer").agg(
        experts=pl.len(),
        least=pl.col("value").min() * pl.len(),
        most=pl.col("value").max() * pl.len(),
    )
    balance = kept.filter(metric="balance_loss").select(*run, balance_loss="value")
    return table.join(balance, on=run, how="left").sort(*run, "layer")


def routing_section(table: pl.DataFrame, labels: dict[tuple[str, str], str]) -> Section | None:
    """A line an architecture and task, at the longest length; None where nothing has experts."""
    if table.is_empty():
        return None
    keys = ["task", "task_params", "arm"]
    longest = table.filter(pl.col("eval_length") == pl.col("eval_length").max().over(keys))
    lines = longest.group_by(keys, maintain_order=True).agg(
        pl.col("experts").max(),
        pl.col("least").min(),
        pl.col("most").max(),
        pl.col("balance_loss").mean(),
    )
    return Section(
        heading="Experts",
        columns=["architecture", "task", "experts", "least loaded", "most loaded", "balance loss"],
        rows=[
            [
                row["arm"],
                labels.get((row["task"], row["task_params"]), row["task"]),
                str(row["experts"]),
                f"{row['least']:.2f}",
                f"{row['most']:.2f}",
                f"{row['balance_loss']:.3f}",
            ]
            for row in lines.iter_rows(named=True)
        ],
        caption=_CAPTION,
    )
