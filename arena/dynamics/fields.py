"""Is the field in the key? How a model solves ``partial_update``.

One memory slot a key cannot change one field of its value and leave the others: the erase clears all of them.
A model gets round it by writing the fields of one key under different key vectors. Then the vectors of two
fields of one key are no more alike than need be, while those of one field of it, written twice, are the same.
"""

from __future__ import annotations

from typing import Any

import polars as pl
import torch
from torch import Tensor, nn

from arena.dynamics.record import record
from arena.dynamics.state import by_token, micro_steps, writing_step
from synthetic_tasks.keyvalue import ASK, BLANK

FIELD_COLUMNS: dict[str, tuple[Any, str]] = {
    "layer": (pl.Int64, "block in the stack, from 0"),
    "head": (pl.Int64, "head, from 0"),
    "same_field": (
        pl.Float64,
        "mean |cosine| of the key vectors of two writes of the same field of the same key in one sequence",
    ),
    "other_field": (pl.Float64, "the same for two different fields of the same key"),
    "other_key": (pl.Float64, "the same for the same field of two different keys"),
    "n_pairs": (pl.Int64, "pairs of writes of different fields of the same key"),
}
"""Columns of the table of fields: type and meaning."""


def writes_of_fields(task: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every write of a field in ``partial_update``: its key and its field at the position of its value.

    Args:
        task: a ``partial_update``.
        tokens: [B,T].

    Returns:
        bool [B,T] (a value is written here), int64 [B,T] key token, int64 [B,T] field.
    """
    width = task.n_fields + 1
    first_field = task.vocab_size - task.n_fields
    slots = tokens.unflatten(1, (-1, width))
    head, second = slots[..., :1], slots[..., 1:2]
    writes = (head != ASK) & (head != BLANK)
    update = writes & (second >= first_field)
    place = torch.arange(width).expand_as(slots)
    here = torch.where(update, place == 2, writes & (place > 0))
    field = torch.where(update, second - first_field, place - 1)
    return here.flatten(1), head.expand_as(slots).flatten(1), field.flatten(1)


def measure_fields(
    model: nn.Module, task: Any, length: int, *, n_sequences: int = 32, seed: int = 0
) -> pl.DataFrame:
    """How alike the key vectors are under which fields are written, head by head.

    Args:
        model: a trained model of the task.
        task: from ``synthetic_tasks``; any but ``partial_update`` gives an empty table.
        length: of the sequences.
        n_sequences: from split valid.
        seed: of the sequences.

    Returns:
        Columns as in :data:`FIELD_COLUMNS`; blocks without keys, and those that write under several keys a
        token, are left out.
    """
    schema = {name: kind for name, (kind, _) in FIELD_COLUMNS.items()}
    if task.name != "partial_update":
        return pl.DataFrame(schema=schema)
    tokens = task.sample(n_sequences, length, seed=seed, split="valid").tokens
    here, key, field = writes_of_fields(task, tokens)
    both = here[:, :, None] & here[:, None, :] & ~torch.eye(length, dtype=torch.bool)
    same_key = key[:, :, None] == key[:, None, :]
    same_field = field[:, :, None] == field[:, None, :]
    pairs = {
        "same_field": both & same_key & same_field,
        "other_field": both & same_key & ~same_field,
        "other_key": both & ~same_key & same_field,
    }
    rows = []
    (chunk,) = record(model, tokens, chunk=length)
    for layer, trace in enumerate(chunk.traces):
        step = writing_step(trace) if {"k", "write"} <= trace.keys() else None
        if step is None:
            continue
        k = by_token(trace["k"].double(), micro_steps(trace))[:, :, step]
        k = torch.nn.functional.normalize(k, dim=-1)
        alike = torch.einsum("bshk,bthk->bsth", k, k).abs()
        for head in range(k.shape[2]):
            means = {name: float(alike[..., head][mask].mean()) for name, mask in pairs.items() if mask.any()}
            rows.append(
                {"layer": layer, "head": head, "n_pairs": int(pairs["other_field"].sum()) // 2, **means}
            )
    return pl.DataFrame(rows, schema=schema)
