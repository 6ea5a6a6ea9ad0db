"""Train R replicas of one model together: stacked parameters, one vmapped forward, one flat optimiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from arena.training.config import Replica, ReplicaResult, TrainConfig


def train_fleet(
    model_config: Any,
    task: Any,
    train_config: TrainConfig,
    replicas: Sequence[Replica],
    *,
    device: str = "cpu",
    on_step: Callable[[int], None] | None = None,
) -> list[ReplicaResult]:
    """Train ``replicas`` of one model on one task together.

    Args:
        model_config: the architecture, one for all.
        task: a task of ``synthetic_tasks``.
        train_config: data, steps and evaluation, one for all.
        replicas: seeds and hyper-parameters; one replica is the plain case.
        device: ``cpu`` or ``cuda``.
        on_step: called after every step with the number of steps done.

    Returns:
        One result for each replica, in the order of ``replicas``.

    Raises:
        ValueError: a length that the task does not accept, or no replica.
        FleetOutOfMemory: the fleet does not fit; split it.
    """
    raise NotImplementedError
