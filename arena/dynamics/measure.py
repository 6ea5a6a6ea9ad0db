"""Measure what happens inside a model or a block, over sequences of any length."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

import synthetic_tasks
from arena.dynamics.dictionary import select
from arena.dynamics.edit import last_two_writes
from arena.dynamics.layer import LayerMeasurement
from arena.dynamics.record import blocks_of, record
from arena.dynamics.table import Rows
from arena.model import Model, parse_arch
from synthetic_tasks import ROLES


def measure(
    module: nn.Module,
    batch: Tensor | tuple[Tensor, Tensor],
    *,
    task: synthetic_tasks.Task | None = None,
    quantities: Iterable[str] | None = None,
    chunk: int = 256,
    points: int | None = 128,
    reads: int = 8,
    maps: int = 4,
    horizon: int = 4096,
    window: int = 8,
    train_length: int | None = None,
    writes: synthetic_tasks.Writes | None = None,
) -> pl.DataFrame:
    """Gates, memory, transitions, retention and edits of every block, layer by layer and head by head.

    The sequences are read in chunks, and all arithmetic of the measurements is float64. At any time this
    holds, for each layer: the trace of one chunk (its gates, never its states); the matrix memory once
    (twice, with one more column for every key, where edits are measured); q, k and gates of the last
    ``horizon`` tokens where contributions are; at most 32,768 values of each gate, head and role for its
    quantiles; and the rows so far. None of these grows with the length of the sequence beyond ``horizon``,
    ``points`` and the number of writes. (Softmax attention is the exception: its own state is the past.)

    Args:
        module: A ``Model``, or any module with the block interface (``arena.blocks.base.Block``).
        batch: (tokens, targets) as a task samples them, tokens [B,T] or [B,T,C] alone, or x [B,T,D] for a
            block.
        task: What made the batch: tells the roles of positions, and which of them write a key.
        quantities: Names of quantities or of families (``gates``, ``state``, ``transition``, ``retention``,
            ``edit``), see :func:`~arena.dynamics.dictionary.data_dictionary`; None: all but the costly ones.
        chunk: Tokens that are read at once.
        points: Number of tokens of a sequence, evenly spaced, first and last included, that have rows of
            their own; None: all. Distributions, correlations, half-lives and edits take in every token.
        reads: Reads of a sequence that contributions are measured for: its scored tokens, or any, evenly
            spaced, the last one included.
        maps: Sequences whose contributions are in the table, one row for each earlier token.
        horizon: How far back from a read contributions are followed.
        window: Tokens of a window of transitions.
        train_length: The longest training length; tells ``state_growth`` where it begins.
        writes: Which positions write which key, where no task tells.

    Returns:
        Tidy table with the columns of :data:`~arena.dynamics.dictionary.COLUMNS`, one row a number. A
        quantity that a block does not have gives one row without head and value.

    Raises:
        ValueError: an unknown quantity, sizes below 1, inputs that do not fit the module.
    """
    wanted = select(quantities)
    sizes = {"chunk": chunk, "reads": reads, "horizon": horizon, "window": window}
    for name, size in (sizes | {"points": 1 if points is None else points, "maps": maps + 1}).items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, not {size}")
    inputs, targets = (batch, None) if isinstance(batch, Tensor) else (batch[0], batch[1])
    if inputs.dim() < 2 or inputs.shape[0] < 1 or inputs.shape[1] < 1:
        raise ValueError(f"a batch needs a sequence and a token, not {list(inputs.shape)}")
    inputs, targets = inputs.cpu(), None if targets is None else targets.cpu()  # record moves what it reads
    B, T = inputs.shape[:2]
    roles = None
    if targets is not None:
        scored = (targets != synthetic_tasks.IGNORE).long() * ROLES.index("scored")
        roles = scored if task is None else synthetic_tasks.roles(task, inputs, targets)
    if writes is None and task is not None:
        writes = synthetic_tasks.writes(task, inputs)
    pairs = None
    if writes is not None and task is not None and targets is not None:
        asks = synthetic_tasks.asks(task, inputs, targets)
        pairs = None if asks is None else last_two_writes(writes, asks)
    grid = _spaced(T, points)
    if train_length is not None and train_length < T:
        grid = torch.cat([grid, torch.tensor([train_length - 1])]).unique()
    read_at = torch.stack([_spaced_of(T, roles, b, reads) for b in range(B)])

    rows = Rows(_names(module), roles, _symbols(inputs, task))
    layers = [
        LayerMeasurement(index, rows, wanted, grid, read_at, writes, pairs, roles, horizon, window, maps)
        for index in range(len(blocks_of(module)))
    ]
    for piece in record(module, inputs, chunk=chunk):
        for layer, trace in zip(layers, piece.traces, strict=True):
            layer.take(trace, piece.start, piece.stop)
    for layer in layers:
        layer.finish(train_length, T)
    rows.missing(wanted)
    return rows.frame()


def _names(module: nn.Module) -> list[str]:
    if isinstance(module, Model):
        return parse_arch(module.config.arch, module.config.n_layers)
    return [type(block).__name__ for block in blocks_of(module)]


def _symbols(inputs: Tensor, task: synthetic_tasks.Task | None) -> np.ndarray | None:
    """Name of every token [B,T], those of one position joined by a stroke; None for x."""
    if inputs.is_floating_point():
        return None
    name = str if task is None else task.token_name
    found, where = np.unique(inputs.flatten(0, 1).cpu().numpy(), axis=0, return_inverse=True)
    names = ["/".join(map(name, np.atleast_1d(position).tolist())) for position in found]
    return np.array(names)[where.reshape(inputs.shape[:2])]


def _spaced(length: int, count: int | None) -> Tensor:
    """At most ``count`` positions below ``length``, evenly spaced, the last one included."""
    if count is None or count >= length:
        return torch.arange(length)
    if count == 1:
        return torch.tensor([length - 1])
    return torch.linspace(0, length - 1, count, dtype=torch.float64).round().long().unique()


def _spaced_of(length: int, roles: Tensor | None, sequence: int, count: int) -> Tensor:
    """``count`` reads of a sequence, evenly spaced over its scored positions (repeated if they are few)."""
    places = torch.arange(length)
    if roles is not None:
        scored = (roles[sequence] == ROLES.index("scored")).nonzero()[:, 0]
        places = scored if len(scored) else places
    picked = places[_spaced(len(places), count)]
    return torch.cat([picked, picked[-1:].expand(count - len(picked))])
