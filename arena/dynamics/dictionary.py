"""The data dictionary: what the columns and quantities of a measurement are, and choosing among them."""

from __future__ import annotations

from collections.abc import Iterable

import polars as pl

from arena.blocks.registry import near
from arena.dynamics.quantities import QUANTITIES, Quantity

FAMILIES = tuple(dict.fromkeys(entry.family for entry in QUANTITIES.values()))
"""gates, state, update, transition, retention, edit."""


def select(quantities: Iterable[str] | None) -> set[str]:
    """The quantities that names of quantities or of families stand for; None: all but the costly ones.

    Raises:
        ValueError: an unknown name; the near ones are listed.
    """
    if quantities is None:
        return {name for name, entry in QUANTITIES.items() if entry.default}
    if isinstance(quantities, str):
        quantities = [quantities]
    found: set[str] = set()
    for name in quantities:
        if name in QUANTITIES:
            found.add(name)
        elif name in FAMILIES:
            found |= {q for q, entry in QUANTITIES.items() if entry.family == name and entry.default}
        else:
            raise ValueError(f"unknown quantity {name!r}{near(name, [*FAMILIES, *QUANTITIES])}")
    if not found:
        raise ValueError(f"no quantity asked for; known: {', '.join([*FAMILIES, *QUANTITIES])}")
    return found


COLUMNS: dict[str, tuple[pl.DataType | type[pl.DataType], str]] = {
    "layer": (pl.Int32, "index of the block in the stack, from 0"),
    "block": (pl.String, "architecture of the block"),
    "head": (pl.Int32, "head, from 0; null where the block has no such quantity"),
    "sequence": (pl.Int32, "row of the batch; null for what is taken over all"),
    "token": (pl.Int32, "position, from 0; null for what is taken over all"),
    "role": (
        pl.String,
        "role of the position (synthetic_tasks.ROLES); of a summary: the roles taken, or all",
    ),
    "symbol": (pl.String, "name of the token there; null where there are no tokens"),
    "source": (pl.Int32, "position that is read, of a contribution"),
    "index": (pl.Int32, "channel or eigenvalue, where there is one row for each"),
    "micro": (
        pl.Int32,
        "micro-step of the token, from 0, where each has a row of its own; null for what belongs to the "
        "token, and for blocks with one",
    ),
    "quantity": (pl.String, "name in the data dictionary"),
    "statistic": (pl.String, "value; of a distribution mean, std, min, q05, q25, q50, q75, q95, max"),
    "value": (pl.Float64, "the number; null where the quantity is not defined for this block or place"),
    "n": (pl.Int64, "how many numbers it is taken over"),
}
"""Columns of a measurement: type and meaning."""


def data_dictionary() -> pl.DataFrame:
    """The dictionary as a table: name, family, unit, rows, meaning, equation."""
    return pl.DataFrame(
        [
            {
                "name": name,
                **{field: getattr(entry, field) for field in Quantity._fields if field != "default"},
            }
            for name, entry in QUANTITIES.items()
        ]
    )


def data_dictionary_markdown() -> str:
    """The columns and the quantities as two Markdown tables, and what micro-steps are in them."""
    lines = ["| column | meaning |", "|---|---|"]
    lines += [f"| `{name}` | {meaning} |" for name, (_, meaning) in COLUMNS.items()]
    lines += [
        "",
        "Of a token that updates its memory several times (DeltaProduct, RWKV-7, Mamba-3's MIMO), M_t and "
        "D_t are the products over its micro-steps. Where several of them write, no key is that of a "
        "binding, and the quantities of edits are null.",
        "",
        "| quantity | family | unit | a row for each | meaning | equation |",
        "|---|---|---|---|---|---|",
    ]
    for name, entry in QUANTITIES.items():
        cells = (entry.family, entry.unit, entry.rows, entry.meaning, f"`{entry.equation}`")
        lines.append(f"| `{name}` | " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
