"""The memory of a fleet, by trying out two small ones for one step."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from arena.model import ModelConfig
from arena.training.config import Replica, TrainConfig
from arena.training.data import step_lengths
from arena.training.fleet import _Fleet, in_memory

_CPU_PART, _GPU_PART = 0.8, 0.9
"""Parts of the memory to fill: what lies outside of tensors, and between them, needs some too."""
_PROCESS_BYTES = 2**29
"""Of a process that has imported torch."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of tensors at the peak of a training step: ``fixed + R * per_replica`` for R replicas."""

    fixed: int
    per_replica: int

    def fits(self, budget: float) -> int:
        """Replicas that fit into so many bytes; 0 where not even one does."""
        return max(0, int((budget - self.fixed) // max(1, self.per_replica)))


def measure_footprint(
    model_config: ModelConfig, task: Any, train_config: TrainConfig, *, device: torch.device | str = "cpu"
) -> Footprint:
    """Train two replicas, then one, for a step at the longest training length, and look at the peaks.

    An evaluation needs no more than a training step. On the CPU every allocation of torch is counted, so that
    the answer does not depend on what else the machine does.

    Args:
        model_config: the architecture.
        task: a task of ``synthetic_tasks``.
        train_config: of the fleet.
        device: ``cpu`` or ``cuda``.

    Raises:
        FleetOutOfMemory: not even two replicas fit.
    """
    device = torch.device(device)
    longest = max(step_lengths(train_config, task))
    one_step = dataclasses.replace(
        train_config,
        steps=1,
        train_lengths=(longest, longest),
        train_length_choices=(),
        eval_lengths=(),
        valid_lengths=(longest,),
        eval_every=0,
        stop_at=None,
    )

    def step(size: int) -> None:
        replicas = [Replica(seed=seed) for seed in range(size)]
        _Fleet(model_config, task, one_step, replicas, device).step(0)

    peak = _cuda_peak if device.type == "cuda" else _cpu_peak
    # two first: what a first step leaves behind for all later ones then counts as a replica's, not against it
    two = in_memory(2, lambda: peak(step, 2))
    one = in_memory(1, lambda: peak(step, 1))
    per_replica = max(two - one, 0)
    return Footprint(fixed=max(one - per_replica, 0), per_replica=per_replica)


def memory_budget(device: torch.device | str, share: float) -> float:
    """Bytes of tensors that one fleet may have.

    The size of the machine, not what is free at the moment: who trains with whom must not depend on that.

    Args:
        device: ``cpu`` or ``cuda``.
        share: part of the GPU, on the CPU of the machine, that is the fleet's.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return _GPU_PART * share * torch.cuda.get_device_properties(device).total_memory
    return _CPU_PART * share * _machine_bytes() - _PROCESS_BYTES


def _machine_bytes() -> int:
    """Memory of the machine, or of the container that holds this process."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def _cuda_peak(step: Any, size: int) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(size)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _cpu_peak(step: Any, size: int) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler announces itself on standard error
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step(size)
    held = peak = 0
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
