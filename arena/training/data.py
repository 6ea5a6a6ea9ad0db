"""Which samples a step takes: pure functions of the experiment, the replica's seed and the step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from arena.training.config import TrainConfig

IGNORED = -100
_MASK = (1 << 64) - 1


def _mix(value: int) -> int:
    """SplitMix64's output function (Steele, Lea & Flood 2014): 64 well-mixed bits of an integer."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def is_legal(task: Any, length: int) -> bool:
    """Whether the task accepts sequences of this length."""
    try:
        task.check_length(length)
    except ValueError:
        return False
    return True


def check_measurable(task: Any, length: int) -> None:
    """Refuse a length to evaluate at.

    Raises:
        ValueError: the task does not accept it, or a blind guess is always right there.
    """
    task.check_length(length)
    if task.chance(length) >= 1.0:
        raise ValueError(
            f"{task.name}: at length {length} a blind guess is always right, which measures nothing"
        )


def step_lengths(config: TrainConfig, task: Any) -> list[int]:
    """Sequence length of every step, the same for all replicas and architectures.

    The length of step n is drawn, equally likely, from the training lengths that the task accepts; it
    depends on (``config.data_seed``, n) alone, not on the number of steps.

    Raises:
        ValueError: the task accepts none of the training lengths; the message says why.
    """
    shortest, longest = config.train_lengths
    choices = config.train_length_choices or range(shortest, longest + 1)
    legal = [length for length in choices if is_legal(task, length)]
    if not legal:
        try:
            task.check_length(longest)
        except ValueError as reason:
            raise ValueError(f"no training length within {config.train_lengths} is legal: {reason}") from None
    stream = _mix(config.data_seed)
    return [legal[_mix(stream ^ step) * len(legal) >> 64] for step in range(config.steps)]


def valid_lengths(config: TrainConfig, task: Any) -> tuple[int, ...]:
    """Lengths that the learning curve is measured at.

    Either the declared ones, or the longest training length and twice that, each moved to the nearest
    length that the task accepts and that is not reported as test.

    Raises:
        ValueError: the task refuses a declared length, or none near the default ones is free.
    """
    if config.valid_lengths:
        for length in config.valid_lengths:
            check_measurable(task, length)
        return config.valid_lengths
    longest = max(config.train_length_choices or config.train_lengths)
    found: list[int] = []
    for target in (longest, 2 * longest):
        near = sorted(range(1, 3 * longest + 1), key=lambda length: (abs(length - target), length))
        taken = {*config.eval_lengths, *found}
        usable = (n for n in near if n not in taken and is_legal(task, n) and task.chance(n) < 1.0)
        free = next(usable, None)
        if free is None:
            raise ValueError(f"no length near {target} is free for validation: give valid_lengths")
        found.append(free)
    return tuple(found)


def train_batch(
    task: Any, seeds: Sequence[int], *, step: int, batch_size: int, length: int
) -> tuple[Tensor, Tensor]:
    """The batch of one step for every replica: samples ``step * batch_size`` onwards of its seed.

    Returns:
        Tokens [R,B,T] (or [R,B,T,C]) and targets [R,B,T], int64, on the CPU. Replicas of one seed share
        the samples, which are then generated once.
    """
    distinct = list(dict.fromkeys(seeds))
    batch = task.sample_seeds(distinct, batch_size, length, step * batch_size, "train")
    if len(distinct) == len(seeds):
        return batch.tokens, batch.targets
    own = torch.tensor([distinct.index(seed) for seed in seeds])
    return batch.tokens[own], batch.targets[own]


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """For CUDA in pinned memory, from where it is copied without waiting for the device."""
    return tensor if device.type == "cpu" else tensor.pin_memory()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move without waiting for the device."""
    return pinned(tensor, device).to(device, non_blocking=True)
