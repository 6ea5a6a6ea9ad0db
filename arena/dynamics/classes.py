"""Classes of tokens: where to look, and what an intervention can be confined to."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

import synthetic_tasks


def token_classes(task: Any, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Classes of tokens that an intervention can be confined to, each bool [B,T].

    ``content``, ``query``, ``distractor`` and ``scored``: the roles of ``synthetic_tasks.roles``; and, for a
    task that can be asked at every position, ``moves``, where the running answer changes, and ``stays``.
    """
    role = synthetic_tasks.roles(task, tokens, targets)
    classes = {name: role == index for index, name in enumerate(synthetic_tasks.ROLES)}
    running = running_answers(task, tokens)
    if running is not None:
        # between elements of several tokens the answer is the last one; class 0 is the identity, or even
        place = torch.where(running >= 0, torch.arange(running.shape[1]), -1).cummax(1).values
        now = torch.where(place >= 0, running.gather(1, place.clamp_min(0)), 0)
        before = torch.nn.functional.pad(now[:, :-1], (1, 0))
        classes |= {"moves": now != before, "stays": now == before}
    return classes


def running_answers(task: Any, tokens: Tensor) -> Tensor | None:
    """The state of a task's automaton after every position, int64 [B,T], -100 where it has no answer; None
    for tasks that cannot be asked at every position.
    """
    if not hasattr(task, "supervision") or tokens.dim() != 2:
        return None
    return dataclasses.replace(task, supervision="running").solve(tokens)
