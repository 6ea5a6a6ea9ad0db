"""The table of constructions, and how each does in float32 beside float64."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import synthetic_tasks
from arena.constructions.models import counting_model, parity_model, recall_model, s3_model
from arena.model import Model

LENGTH = 32_768
"""Tokens at which a construction has to pass."""


@dataclass(frozen=True, kw_only=True)
class Construction:
    """A model set by hand, and the task that it is to solve."""

    name: str
    what: str
    """The ability, and what it takes."""
    build: Callable[[], Model]
    task: str
    params: dict[str, Any]


CONSTRUCTIONS = (
    Construction(
        name="parity",
        what="parity: erase 2 (eigenvalue -1)",
        build=parity_model,
        task="parity",
        params={"supervision": "running"},
    ),
    Construction(
        name="parity, signed decay",
        what="parity: decay -1",
        build=lambda: parity_model(arch="mamba2-neg"),
        task="parity",
        params={"supervision": "running"},
    ),
    Construction(
        name="s3",
        what="S3 in one layer: two Householder factors a token, eigenvalues down to -1",
        build=s3_model,
        task="s3",
        params={},
    ),
    Construction(
        name="counting, gla",
        what="majority of 8 symbols: decay 1",
        build=lambda: counting_model("gla"),
        task="majority",
        params={"n_symbols": 8, "supervision": "running"},
    ),
    Construction(
        name="counting, mlstm",
        what="majority of 8 symbols: decay 1",
        build=lambda: counting_model("mlstm"),
        task="majority",
        params={"n_symbols": 8, "supervision": "running"},
    ),
    Construction(
        name="counting, gdn2",
        what="majority of 8 symbols: decay 1, erase 0 and write 1",
        build=lambda: counting_model("gdn2"),
        task="majority",
        params={"n_symbols": 8, "supervision": "running"},
    ),
    Construction(
        name="recall",
        what="recall of 32 pairs from 32 key channels",
        build=recall_model,
        task="mqar_stacked",
        params={"n_pairs": 32, "vocab_size": 66},
    ),
)
"""What has to pass."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """How a construction did."""

    name: str
    what: str
    """In words."""
    arch: str
    backend: str
    """Of the memory operator."""
    length: int
    accuracy: float
    """At scored positions."""
    sequences: int
    margin: float
    """Smallest distance of the right answer's logit from the best wrong one."""
    ideal: float
    """The same in float64."""
    error: float
    """Largest deviation of any logit from the same model in float64."""
    seconds: float

    @property
    def passes(self) -> bool:
        """Every answer is right."""
        return self.accuracy == 1.0


def measure(
    construction: Construction, *, length: int = LENGTH, sequences: int = 2, backend: str = "auto"
) -> Measured:
    """Run a construction in float32 on test sequences of its task, beside the same model in float64.

    Args:
        construction: one of :data:`CONSTRUCTIONS`.
        length: tokens.
        sequences: how many.
        backend: of the memory operator: ``auto``, ``reference``, ``chunked`` ...
    """
    task = synthetic_tasks.get(construction.task, **construction.params)
    batch = task.sample(batch_size=sequences, length=length, seed=0, index=0, split="test")
    model = construction.build()
    start = time.perf_counter()
    with torch.no_grad(), _backend(backend) as used:
        logits = model(batch.tokens)[0]
        seconds = time.perf_counter() - start
    with torch.no_grad():
        exact = model.double()(batch.tokens)[0]
    where = batch.targets >= 0
    answers = batch.targets[where]
    right = logits[where].argmax(-1) == answers
    return Measured(
        name=construction.name,
        what=construction.what,
        arch=model.config.arch,
        backend=used.get("gated_memory") or used["mlstm"],
        length=length,
        accuracy=float(right.double().mean()),
        sequences=sequences,
        margin=_margin(logits[where], answers),
        ideal=_margin(exact[where], answers),
        error=float((logits[where] - exact[where]).abs().max()),
        seconds=seconds,
    )


def _margin(logits: Tensor, answers: Tensor) -> float:
    """Smallest distance of the right logit [N,C] from the largest wrong one; negative where it is wrong."""
    right = logits.gather(-1, answers[:, None])
    wrong = logits.scatter(-1, answers[:, None], -math.inf)
    return float((right[:, 0] - wrong.amax(-1)).min())


@contextmanager
def _backend(name: str) -> Iterator[dict[str, str]]:
    """Run the operators on a backend; yields a record of what ran."""
    from kernels.backends import recording

    held = os.environ.get("ARENA_BACKEND")
    if name != "auto":
        os.environ["ARENA_BACKEND"] = name
    try:
        with recording() as used:
            yield used
    finally:
        if held is not None:
            os.environ["ARENA_BACKEND"] = held
        elif name != "auto":
            del os.environ["ARENA_BACKEND"]
