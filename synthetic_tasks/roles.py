"""What each position of a sequence is there for, and which positions write which key."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from synthetic_tasks.base import IGNORE, Task
from synthetic_tasks.keyvalue import ASK, BLANK, MemoryTask
from synthetic_tasks.memory_load import Interference
from synthetic_tasks.mqar import MQAR, MQARStacked

ROLES = ("content", "query", "distractor", "scored")
"""Index -> role. ``scored``: a position with a target. ``query``: the rest of a question that comes before
it ("?" and its key). ``distractor``: filler, a blank or noise. ``content``: everything else."""


class Writes(NamedTuple):
    """Positions that bind a key, one entry a write, sorted by sequence and position."""

    sequence: torch.Tensor
    """int64 [N]: row of the batch."""
    start: torch.Tensor
    """int64 [N]: the first position of the write (its key)."""
    position: torch.Tensor
    """int64 [N]: the last position of the write (its value)."""
    key: torch.Tensor
    """int64 [N]: a number that two writes of one sequence share if and only if they write the same key."""


class Asks(NamedTuple):
    """Scored positions that ask for a key, one entry a position, sorted by sequence and position."""

    sequence: torch.Tensor
    """int64 [N]: row of the batch."""
    position: torch.Tensor
    """int64 [N]: where the answer is due."""
    key: torch.Tensor
    """int64 [N]: the number that :class:`Writes` has for the key."""


def roles(task: Task, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The role of every position, an index into :data:`ROLES`: int64 [B,T].

    Args:
        task: The task that made the batch.
        tokens: int64 [B,T] or [B,T,C].
        targets: int64 [B,T], -100 where nothing is scored.
    """
    first = (tokens if tokens.dim() == 2 else tokens[..., 0]).numpy()
    scored = targets.numpy() != IGNORE
    found = np.zeros(first.shape, np.int64)
    found[_fillers(task, first) & ~scored] = ROLES.index("distractor")
    found[_questions(task, first, scored)] = ROLES.index("query")
    found[scored] = ROLES.index("scored")
    return torch.from_numpy(found)


def _named(task: Task, first: np.ndarray, *starts: str) -> np.ndarray:
    """Where the token's name is one of ``starts``, or one of them and a number."""
    names = [task.token_name(token) for token in range(task.vocab_size)]
    hits = [
        any(name == s or (name.startswith(s) and name[len(s) :].isdigit()) for s in starts) for name in names
    ]
    return np.array(hits)[first]


def _fillers(task: Task, first: np.ndarray) -> np.ndarray:
    if isinstance(task, MQAR):  # blank or noise: all of the region of the queries that is not one
        context = task.n_pairs if isinstance(task, MQARStacked) else 2 * task.n_pairs
        return np.broadcast_to(np.arange(first.shape[1]) >= context, first.shape)
    if task.family == "needle":
        return _named(task, first, "s", "t")
    if task.name == "noisy_recall":
        return _named(task, first, "n")
    if task.family == "state tracking":  # cycle_navigation's "." is the move that stays
        return np.zeros(first.shape, bool)
    return _named(task, first, ".")


def _questions(task: Task, first: np.ndarray, scored: np.ndarray) -> np.ndarray:
    """Unscored positions from a "?" to the position before the next scored one."""
    asks = _named(task, first, "?")
    place = np.arange(first.shape[1])
    asked = np.maximum.accumulate(np.where(asks, place, -1), axis=1)
    answered = np.maximum.accumulate(np.where(scored, place, -1), axis=1)
    pending = asked > answered
    if isinstance(task, MemoryTask):  # a question that nothing answers ends with its slot
        pending &= place // task._width == asked // task._width
    else:
        later = np.maximum.accumulate(scored[:, ::-1], axis=1)[:, ::-1]
        pending &= later
    return pending & ~scored


def writes(task: Task, tokens: torch.Tensor) -> Writes | None:
    """Which positions bind which key, for tasks of keys and values; None for other tasks.

    ``mqar``, ``mqar_stacked`` and the memory-editing tasks have them. Binding a key again, unbinding it,
    adding to it and updating one of its fields all count as writes of that key.
    """
    first = (tokens if tokens.dim() == 2 else tokens[..., 0]).numpy()
    if isinstance(task, MQAR):
        width = 1 if isinstance(task, MQARStacked) else 2
        key = first[:, : width * task.n_pairs : width]
        sequence, slot = np.nonzero(np.ones(key.shape, bool))
    elif isinstance(task, MemoryTask):
        width, head = task._width, first[:, :: task._width]
        key = _slot_keys(task, first)[0]
        sequence, slot = np.nonzero((head != BLANK) & (head != ASK))
    else:
        return None
    return Writes(*_tensors(sequence, slot * width, slot * width + width - 1, key[sequence, slot]))


def asks(task: Task, tokens: torch.Tensor, targets: torch.Tensor) -> Asks | None:
    """Which scored positions ask for which key, for the tasks that have :func:`writes`; None for others."""
    first = (tokens if tokens.dim() == 2 else tokens[..., 0]).numpy()
    sequence, position = np.nonzero(targets.numpy() != IGNORE)
    if isinstance(task, MQAR):
        key = first[sequence, position]
    elif isinstance(task, MemoryTask):
        key = _slot_keys(task, first)[1][sequence, position // task._width]
    else:
        return None
    return Asks(*_tensors(sequence, position, key))


def _slot_keys(task: MemoryTask, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of the key of every slot, int64 [B,slots]: if it is a write, and if it is a question."""
    slots = first.reshape(len(first), -1, task._width)
    if not isinstance(task, Interference):
        return slots[..., 0], slots[..., 1]
    n = task.key_tokens
    keys = np.stack([slots[..., :n], slots[..., 1 : 1 + n]])
    number = np.unique(keys.reshape(-1, n), axis=0, return_inverse=True)[1].reshape(keys.shape[:-1])
    return number[0], number[1]


def _tensors(*columns: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(column)) for column in columns]
