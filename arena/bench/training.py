"""How fast fleets train here, and where the time goes: ``python -m arena.bench.training`` (torch, numpy)."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import synthetic_tasks
from arena.model import ModelConfig
from arena.training import Replica, TrainConfig
from arena.training.data import step_lengths, to_device, train_batch
from arena.training.fleet import _Fleet
from kernels.backends import recording
from kernels.bench.timing import machine, synchronise

FLEETS = (1, 4, 16, 64)
PHASES = ("data", "forward", "backward", "optimiser")
FIELDS = {
    "arch": str,
    "task": str,
    "fleet": int,
    "device": str,
    "backend": str,
    "params": int,
    "batch_size": int,
    "length": int,
    "step_ms": float,
    "run_steps_s": float,
    "runs_per_hour": float,
    "times_one_by_one": float,
    "data_ms": float,
    "forward_ms": float,
    "backward_ms": float,
    "optimiser_ms": float,
    "evaluation_ms": float,
    "data_share": float,
    "forward_share": float,
    "backward_share": float,
    "optimiser_share": float,
    "evaluation_share": float,
    "memory_mb": float,
    "note": str,
}
"""Columns. ``length``: of each timed step, the longest of training. ``step_ms``: of the fleet, median.
``run_steps_s``: steps of single runs a second, fleet / step. ``runs_per_hour``: whole runs with evaluations.
``times_one_by_one``: run_steps_s over that of a fleet of 1. ``*_ms``: the phases of a step, with a wait for
the device after each, and one evaluation; ``*_share``: of a run's time. ``memory_mb``: the GPU's peak."""


def measure(
    model: ModelConfig,
    task: Any,
    config: TrainConfig,
    fleets: Sequence[int],
    *,
    device: str,
    seconds: float,
) -> Iterator[dict[str, Any]]:
    """Yield a row for each size of fleet.

    Args:
        model: The architecture.
        task: Of ``synthetic_tasks``.
        config: What a run is: steps, batch, lengths, evaluations.
        fleets: Numbers of replicas, smallest first: 1 is what the others are compared with.
        device: ``cpu`` or ``cuda``.
        seconds: Time for the steps of each size, about.
    """
    alone: float | None = None
    for size in fleets:
        row: dict[str, Any] = {
            **dict.fromkeys(FIELDS),
            "arch": model.arch,
            "task": task.name,
            "fleet": size,
            "device": device,
            "batch_size": config.batch_size,
        }
        try:
            row |= _one(model, task, config, size, device, seconds)
        except (torch.OutOfMemoryError, MemoryError) as error:
            yield {**row, "note": f"does not fit: {' '.join(str(error).split())[:100]}"}
            continue
        alone = row["run_steps_s"] if size == 1 else alone
        row["times_one_by_one"] = None if alone is None else row["run_steps_s"] / alone
        yield row


def measure_experiment(
    experiment: Any, fleets: Sequence[int], *, device: str, seconds: float, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """:func:`measure` for each architecture on each task of an experiment.

    Args:
        experiment: ``arena.grid.experiment.Experiment``.
        fleets: As for :func:`measure`.
        device: As for :func:`measure`.
        seconds: As for :func:`measure`.
        say: Told what is being measured.
    """
    from arena.grid.plan import canonical, plan_runs

    seen: set[str] = set()
    for run in plan_runs(experiment, device=device):
        model, task, train = (run.config[part] for part in ("model", "task", "train"))
        key = canonical([model, task])
        if key in seen:
            continue
        seen.add(key)
        say(f"{run.arm} on {task['name']}")
        sampler = synthetic_tasks.get(task["name"], **task["params"])
        config = TrainConfig(**train)
        for row in measure(ModelConfig(**model), sampler, config, fleets, device=device, seconds=seconds):
            yield {**row, "arch": run.arm}


def _one(
    model: ModelConfig, task: Any, config: TrainConfig, size: int, device: str, seconds: float
) -> dict[str, Any]:
    longest = max(step_lengths(config, task))
    timed = replace(config, steps=10**6, train_length_choices=(longest,))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    fleet = _Fleet(model, task, timed, [Replica(seed=seed) for seed in range(size)], torch.device(device))
    with recording() as used:
        for step in range(3):
            fleet.step(step)
    synchronise(device)
    start = time.perf_counter()
    fleet.step(3)
    synchronise(device)
    once = time.perf_counter() - start
    group = 1 if device == "cpu" else max(1, min(20, round(0.1 / once)))  # no wait inside: as in training
    taken: list[float] = []
    step, end = 4, time.perf_counter() + seconds
    while len(taken) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(group):
            fleet.step(step)
            step += 1
        synchronise(device)
        taken.append((time.perf_counter() - start) / group)
    step_s = statistics.median(taken)
    phases = _phases(fleet, step, device, max(3, min(20, len(taken))))
    phases["evaluation"] = _timed(lambda: fleet.measure("valid"), device, 2)
    points = -(-config.steps // config.eval_every) if config.eval_every else 1
    run_s = config.steps * step_s + (points + 1) * phases["evaluation"]  # test is about as long as valid
    inside = sum(phases[name] for name in PHASES)
    shares = {
        name: config.steps * step_s * phases[name] / inside / run_s for name in PHASES
    }  # the phases' sum is longer than a step where waiting for the device costs
    shares["evaluation"] = (points + 1) * phases["evaluation"] / run_s
    return {
        "backend": " ".join(f"{key}={value}" for key, value in sorted(used.items())) or "torch",
        "params": sum(x[0].numel() for x in fleet.parameters.named.values()),
        "length": longest,
        "step_ms": 1e3 * step_s,
        "run_steps_s": size / step_s,
        "runs_per_hour": 3600 * size / run_s,
        **{f"{name}_ms": 1e3 * value for name, value in phases.items()},
        **{f"{name}_share": value for name, value in shares.items()},
        "memory_mb": torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None,
    }


def _phases(fleet: _Fleet, step: int, device: str, repeats: int) -> dict[str, float]:
    """Median seconds of the parts of ``_Fleet.step``, waiting for the device after each."""
    size, length = fleet.config.batch_size, max(fleet.config.train_length_choices)
    taken: dict[str, list[float]] = {name: [] for name in PHASES}

    def done(name: str, since: float) -> float:
        synchronise(device)
        now = time.perf_counter()
        taken[name].append(now - since)
        return now

    for index in range(repeats):
        now = time.perf_counter()
        tokens, targets = train_batch(
            fleet.task, fleet.seeds, step=step + index, batch_size=size, length=length
        )
        tokens, targets = to_device(tokens, fleet.device), to_device(targets, fleet.device)
        now = done("data", now)
        losses, _ = fleet.losses(tokens, targets)
        now = done("forward", now)
        grads = fleet.parameters.gradients(losses.sum())
        now = done("backward", now)
        fleet.optimiser.step(step + index, grads, losses.detach(), fleet.active)
        done("optimiser", now)
    return {name: statistics.median(values) for name, values in taken.items()}


def _timed(run: Callable[[], Any], device: str, repeats: int) -> float:
    run()
    synchronise(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronise(device)
    return (time.perf_counter() - start) / repeats


def main() -> None:
    """Fleets of the quickstart's setting: d_model 32, 2 layers, 2 heads, parity at length 40, batch 32."""
    parser = argparse.ArgumentParser(prog="python -m arena.bench.training", description=main.__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--archs", default="gdn,gdn2,mlstm,mamba2", help="with commas between")
    parser.add_argument("--fleets", default=",".join(map(str, FLEETS)), help="with commas between")
    parser.add_argument("--task", default="parity")
    parser.add_argument("--length", type=int, default=40)
    parser.add_argument("--d-model", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=3.0, help="for the steps of each fleet")
    parser.add_argument("--out", help="file for the rows, JSON")
    options = parser.parse_args()
    task = synthetic_tasks.get(options.task)
    config = TrainConfig(
        steps=1000,
        batch_size=options.batch_size,
        train_lengths=(max(1, options.length // 4), options.length),
        eval_lengths=(),
        eval_every=250,
    )
    found: dict[str, Any] = {"machine": machine(options.device), "rows": []}
    print(json.dumps(found["machine"]), flush=True)
    for arch in options.archs.split(","):
        model = ModelConfig(
            arch=arch,
            vocab_size=task.vocab_size,
            n_classes=task.n_classes,
            d_model=options.d_model,
            n_layers=2,
            n_heads=2,
        )
        sizes = [int(x) for x in options.fleets.split(",")]
        for row in measure(model, task, config, sizes, device=options.device, seconds=options.seconds):
            found["rows"].append(row)
            shares = " ".join(f"{name} {row[f'{name}_share'] or 0:.0%}" for name in (*PHASES, "evaluation"))
            speed = f"{row['step_ms'] or 0:.2f} ms, {row['runs_per_hour'] or 0:.0f} runs/h"
            gain = f"x{row['times_one_by_one'] or 0:.1f}"
            said = f"{speed}, {gain}; {shares} {row['backend']} {row['note'] or ''}"
            print(f"{arch} fleet of {row['fleet']}: {said}", flush=True)
            if options.out:
                Path(options.out).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
