"""Decodability: can a linear map read the true state of the task from the memory?

The memory after the last token of a sequence, of one block, is brought to the same number of dimensions for
every architecture (:data:`DIMENSIONS` principal components, from the fitting data), and a ridge regression is
fitted on sequences of the split valid and scored on those of the split test. Beside it stands the same probe
fitted to shuffled labels: what it scores is what the probe can do without the memory's help. A sequence gives
one point, so that points are independent and intervals exact.

Labels come from the task's exact solver (:func:`true_state`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from arena.blocks.trapezoid import rotated
from arena.dynamics.classes import running_answers
from arena.dynamics.record import blocks_of
from arena.statistics import clopper_pearson
from synthetic_tasks.keyvalue import ASK, BLANK

DIMENSIONS = 64
"""Of what a probe sees, for every architecture; a smaller memory is seen whole."""
SHUFFLES = 20
"""Of the labels, for the control: where a memory has few distinct states, one shuffle can be right about all
of them by luck."""
_PENALTIES = 10.0 ** np.arange(-6, 3)
"""Ridge penalties over the number of sequences; the one with the smallest leave-one-out error is taken."""
_PIECE = 32_768  # tokens a forward pass


class Label(NamedTuple):
    """What is to be decoded at the end of each sequence."""

    kind: Literal["class", "count"]
    what: str
    value: Tensor
    """int64 [B]; -1 where a sequence has none."""


def true_state(task: Any, tokens: Tensor) -> Label | None:
    """What a memory that does the task has to know after the last token; None where no solver tells.

    - tasks that can be asked at every position: the automaton's state (``class``);
    - ``accumulate``: the sum under the first key of the vocabulary (``count``);
    - ``rebind``, ``erase``, ``partial_update``: the value bound to that key, in
      ``partial_update`` its first field (``class``). Sequences that never bind the key have no label.

    The key is always the same token, so that one linear map can serve all sequences.
    """
    running = running_answers(task, tokens)
    if running is not None:
        return Label("class", "automaton state", torch.where(running[:, -1] < 0, -1, running[:, -1]))
    if task.name not in ("rebind", "erase", "partial_update", "accumulate"):
        return None
    key = task.special.index("?") + 1  # the first key follows the special tokens
    question = [ASK, key]
    if task.name == "partial_update":
        task = dataclasses.replace(task, readout="field")
        question += [task.vocab_size - task.n_fields, *[BLANK] * (task.n_fields - 2)]
    bound = (tokens == key).any(1)
    slots = tokens[bound].unflatten(1, (-1, len(question)))
    told = torch.where(slots[:, :, :1] == ASK, BLANK, slots).flatten(1)  # its own questions change nothing
    asked = torch.cat([told, torch.tensor(question).expand(len(told), -1)], 1)
    answers = torch.full((len(tokens),), -1)
    if len(asked):
        solved = task.solve(asked)[:, -len(question) :]
        answers[bound] = solved.amax(1).clamp_min(-1)
    if task.name == "accumulate":
        return Label("count", f"sum under {task.token_name(key)}", answers)
    return Label("class", f"value of {task.token_name(key)}", answers)


@torch.no_grad()
def memories(model: nn.Module, tokens: Tensor) -> list[Tensor | None]:
    """The memory of every block after the last token, [B,F] in float64; None where it grows with the length.

    What a block carries is laid side by side, without the rows of convolutions; memories with a stabiliser
    are those relative to it, and one that turns (Mamba-3) is in the frame of its queries, as in a trace.
    """
    blocks = blocks_of(model)
    pieces: list[list[Tensor | None]] = []
    for part in tokens.split(max(1, _PIECE // tokens.shape[1])):
        states = model(part)[1]
        states = [states] if isinstance(states, dict) else states[: len(blocks)]  # ttt_e2e: one more, pending
        pieces.append([_flat(state) for state in states])
    columns = list(zip(*pieces, strict=True))
    found: list[Tensor | None] = []
    for block, column in zip(blocks, columns, strict=True):
        grows = any(name in ("k", "v") for name in block.initial_state(1))
        parts = [part for part in column if part is not None]
        found.append(torch.cat(parts) if parts and not grows else None)
    return found


def _flat(state: dict[str, Tensor]) -> Tensor | None:
    beside = ("m", "stabiliser", "shift", "conv", "conv_out", "conv_up", "conv_down")
    if {"memory", "key", "angle"} <= set(state):  # Mamba-3
        angle = state["angle"][:, :, None]
        memory, key = rotated(state["memory"].mT, angle).mT, rotated(state["key"], angle)
        state = {"memory": memory, "key": key, "value": state["value"]}
    parts = [x.flatten(1).double() for name, x in state.items() if name not in beside]
    return torch.cat(parts, 1) if parts else None


class Probe(NamedTuple):
    """A fitted linear map: standardise, project, regress."""

    mean: Tensor
    scale: Tensor
    axes: Tensor
    """[F,d]."""
    weight: Tensor
    """[d,outputs]."""
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs [N,outputs] of memories x [N,F]."""
        return ((x - self.mean) / self.scale) @ self.axes @ self.weight + self.bias


def fit(x: Tensor, y: Tensor, *, dimensions: int = DIMENSIONS) -> Probe:
    """Ridge regression in closed form on the first principal components.

    Args:
        x: [N,F], float64. Features that do not vary are left out.
        y: [N,outputs], float64.
        dimensions: d; fewer where there are fewer features or sequences.

    The penalty is the one of :data:`_PENALTIES` with the smallest leave-one-out error, which a ridge
    regression has in closed form: residual / (1 - leverage).
    """
    mean, spread = x.mean(0), x.std(0, correction=0)
    alive = spread > 1e-6 * spread.max().clamp_min(1e-30)
    scale = torch.where(alive, spread, torch.inf)
    z = (x - mean) / scale
    u, s, vt = torch.linalg.svd(z, full_matrices=False)
    kept = min(dimensions, int((s > 1e-9 * s.max().clamp_min(1e-30)).sum()))
    u, s, axes = u[:, :kept], s[:kept], vt[:kept].T
    bias = y.mean(0)
    target = u.T @ (y - bias)
    best: tuple[float, Tensor] | None = None
    for penalty in _PENALTIES * len(x):
        shrunk = s**2 / (s**2 + penalty)
        leverage = (u**2 @ shrunk + 1 / len(x)).clamp_max(1 - 1e-9)
        residual = (y - bias - u @ (shrunk[:, None] * target)) / (1 - leverage)[:, None]
        error = float((residual**2).mean())
        if best is None or error < best[0]:
            best = error, (s / (s**2 + penalty))[:, None] * target
    assert best is not None
    return Probe(mean, scale, axes, best[1], bias)


PROBE_COLUMNS: dict[str, tuple[Any, str]] = {
    "layer": (pl.Int64, "block in the stack, from 0"),
    "length": (pl.Int64, "length of the sequences whose last memory is decoded"),
    "fitted_length": (
        pl.Int64,
        "length of the sequences that the probe was fitted on: the same, or the shortest one",
    ),
    "label": (pl.String, "what is decoded"),
    "kind": (pl.String, "class: one of several; count: a number, right where it rounds to the true one"),
    "dimensions": (pl.Int64, "of what the probe sees; null: the memory grows with the length, no probe"),
    "accuracy": (pl.Float64, "share of held-out sequences decoded right"),
    "low": (pl.Float64, "exact 95 % interval of the accuracy (Clopper and Pearson)"),
    "high": (pl.Float64, "exact 95 % interval of the accuracy (Clopper and Pearson)"),
    "control": (pl.Float64, f"accuracy of the probe fitted to shuffled labels, mean of {SHUFFLES} shuffles"),
    "control_low": (pl.Float64, "of the worst shuffle"),
    "control_high": (pl.Float64, "of the best shuffle"),
    "most_frequent": (pl.Float64, "share of the most frequent label: what no memory gives"),
    "r2": (pl.Float64, "of a count: explained share of its variance on held-out sequences"),
    "n_fit": (pl.Int64, "sequences fitted on"),
    "n_test": (pl.Int64, "sequences scored on"),
}
"""Columns of the table of decodability: type and meaning."""


def measure_decodability(
    model: nn.Module,
    task: Any,
    lengths: Sequence[int],
    *,
    n_fit: int = 1024,
    n_test: int = 512,
    dimensions: int = DIMENSIONS,
    seed: int = 0,
) -> pl.DataFrame:
    """How well the true state can be read from the memory at the end of sequences, by length.

    At each length a probe is fitted on sequences of that length; and the probe of the shortest length is
    applied to the longer ones.

    Args:
        model: a trained model of the task.
        task: from ``synthetic_tasks``.
        lengths: of the sequences.
        n_fit: sequences to fit on, split valid.
        n_test: sequences to score on, split test.
        dimensions: see :func:`fit`.
        seed: of the sequences and of the shuffle.

    Returns:
        Columns as in :data:`PROBE_COLUMNS`; no row where the task has no label.
    """
    rows: list[dict[str, Any]] = []
    shortest: dict[int, tuple[int, Probe, Probe]] = {}
    for length in sorted(set(lengths)):
        fitting = _points(model, task, length, n_fit, seed, "valid")
        scoring = _points(model, task, length, n_test, seed, "test")
        if fitting is None or scoring is None:
            continue
        label, states = scoring
        for layer, (x, x_fit) in enumerate(zip(states, fitting[1], strict=True)):
            row = {"layer": layer, "length": length, "label": label.what, "kind": label.kind}
            if x is None or x_fit is None:
                rows.append(row)
                continue
            own = (length, *_fit_pair(x_fit, fitting[0], task.n_classes, dimensions, seed))
            first = shortest.setdefault(layer, own)
            for fitted_length, probe, control in [own] if first is own else [own, first]:
                row |= {
                    "fitted_length": fitted_length,
                    "dimensions": probe.axes.shape[1],
                    "n_fit": len(x_fit),
                }
                rows.append(row | _scores(probe, control, x, label))
    return pl.DataFrame(rows, schema={name: kind for name, (kind, _) in PROBE_COLUMNS.items()})


def _points(
    model: nn.Module, task: Any, length: int, count: int, seed: int, split: str
) -> tuple[Label, list[Tensor | None]] | None:
    """Labels and memories of the sequences that have a label; None for a task without one."""
    tokens = task.sample(count, length, seed=seed, split=split).tokens
    label = true_state(task, tokens)
    if label is None or not (label.value >= 0).any():
        return None
    known = label.value >= 0
    return label._replace(value=label.value[known]), memories(model, tokens[known])


def _fit_pair(x: Tensor, label: Label, n_classes: int, dimensions: int, seed: int) -> tuple[Probe, Probe]:
    """The probe, and its control: outputs for every shuffle of the labels, side by side."""
    if label.kind == "count":
        y = label.value[:, None].double()
    else:
        y = torch.nn.functional.one_hot(label.value, n_classes).double()
    generator = torch.Generator().manual_seed(seed)
    shuffled = [y[torch.randperm(len(y), generator=generator)] for _ in range(SHUFFLES)]
    return fit(x, y, dimensions=dimensions), fit(x, torch.cat(shuffled, 1), dimensions=dimensions)


def _scores(probe: Probe, control: Probe, x: Tensor, label: Label) -> dict[str, Any]:
    output = probe(x)
    count = len(label.value)
    right = _right(output, label)
    low, high = clopper_pearson(right, count)
    controls = [_right(piece, label) / count for piece in control(x).chunk(SHUFFLES, 1)]
    r2 = None
    if label.kind == "count":
        y = label.value.double()
        spread = float(((y - y.mean()) ** 2).sum())
        r2 = 1 - float(((output[:, 0] - y) ** 2).sum()) / spread if spread else None
    return {
        "dimensions": probe.axes.shape[1],
        "n_test": count,
        "accuracy": right / count,
        "low": low,
        "high": high,
        "control": sum(controls) / SHUFFLES,
        "control_low": min(controls),
        "control_high": max(controls),
        "most_frequent": float(label.value.bincount().max()) / count,
        "r2": r2,
    }


def _right(output: Tensor, label: Label) -> int:
    decoded = output[:, 0].round().long() if label.kind == "count" else output.argmax(1)
    return int((decoded == label.value).sum())
