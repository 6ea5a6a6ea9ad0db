"""How fast fleets train here, and where the time goes: ``python -m arena.bench.training`` (torch, numpy)."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import synthetic_tasks
from arena.model import ModelConfig, build_model
from arena.training import Replica, TrainConfig
from arena.training.data import IGNORED, step_lengths
from arena.training.fleet import _Fleet
from kernels.backends import recording
from kernels.bench.timing import machine, synchronise

FLEETS = (1, 4, 16, 64)
PHASES = ("data", "forward", "backward", "optimiser")
_STEPS = 10_000  # of the timed fleet; a step is one of these, over and over
FIELDS = {
    "arch": str,
    "task": str,
    "fleet": int,
    "path": str,
    "device": str,
    "backend": str,
    "params": int,
    "batch_size": int,
    "length": int,
    "step_ms": float,
    "run_steps_s": float,
    "runs_per_hour": float,
    "times_one_by_one": float,
    "times_plain_loop": float,
    "generation_ms": float,
    "data_ms": float,
    "forward_ms": float,
    "backward_ms": float,
    "optimiser_ms": float,
    "evaluation_ms": float,
    "new_length_ms": float,
    "data_share": float,
    "forward_share": float,
    "backward_share": float,
    "optimiser_share": float,
    "evaluation_share": float,
    "memory_mb": float,
    "note": str,
}
"""Columns. ``path``: ``graph``, steps replayed as CUDA graphs, or ``eager``, launched one kernel at a time.
``length``: of each timed step, the longest of training. ``step_ms``: of the fleet, median, data included.
``run_steps_s``: steps of single runs a second, fleet / step. ``runs_per_hour``: whole runs, with evaluations
and the first steps of each new length. ``times_one_by_one``: run_steps_s over that of a fleet of 1 on the
same path. ``times_plain_loop``: runs_per_hour over those of :func:`plain_loop`, which has no evaluation.

``generation_ms``: making a batch for the fleet and putting it into pinned memory; ``data_ms``: the part of
it by which a step is longer (eager: all of it; of a replayed step, that which the GPU waits for).
``forward_ms``, ``backward_ms``, ``optimiser_ms``: eager, with a wait for the device after each; graph, by
replaying the step up to there. ``evaluation_ms``: one, on split valid. ``new_length_ms``: the first two steps
of a length, of which the second is recorded. ``*_share``: of a run's time. ``memory_mb``: what torch holds of
the GPU's, at its peak."""


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
        device: ``cpu`` or ``cuda``: then each size on both paths.
        seconds: Time for the steps of each row, about.
    """
    alone: dict[str, float] = {}
    loop_s = config.steps * plain_loop(model, task, config, device=device, seconds=seconds / 4)
    for size, path in itertools.product(fleets, ("eager", "graph") if device == "cuda" else ("eager",)):
        row: dict[str, Any] = {
            **dict.fromkeys(FIELDS),
            "arch": model.arch,
            "task": task.name,
            "fleet": size,
            "path": path,
            "device": device,
            "batch_size": config.batch_size,
        }
        try:
            row |= _one(model, task, config, size, device, seconds, path == "graph")
        except (torch.OutOfMemoryError, MemoryError) as error:
            yield {**row, "note": f"does not fit: {' '.join(str(error).split())[:100]}"}
            continue
        if size == 1:
            alone[path] = row["run_steps_s"]
        row["times_one_by_one"] = row["run_steps_s"] / alone[path] if path in alone else None
        row["times_plain_loop"] = row["runs_per_hour"] * loop_s / 3600
        yield row


def plain_loop(model: ModelConfig, task: Any, config: TrainConfig, *, device: str, seconds: float) -> float:
    """Seconds a step, median, of one run in a plain PyTorch loop: what most trainers do.

    ``torch.optim.AdamW``, and ``loss.item()`` at each step for a progress bar, as in Zoology's trainer. The
    batches lie ready in memory; no evaluation, no schedule, no clipping: no such loop is faster.
    """
    length = max(step_lengths(config, task))
    net = build_model(model, seed=0).to(device)
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.1)
    size = config.batch_size
    batches = [task.sample(batch_size=size, length=length, index=size * index) for index in range(16)]
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < 6 or time.perf_counter() < end:
        start = time.perf_counter()
        tokens, targets = (x.to(device) for x in batches[len(taken) % len(batches)])
        optimiser.zero_grad()
        loss = F.cross_entropy(net(tokens)[0].flatten(0, -2), targets.flatten(), ignore_index=IGNORED)
        loss.backward()
        optimiser.step()
        loss.item()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[3:])


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
    model: ModelConfig, task: Any, config: TrainConfig, size: int, device: str, seconds: float, graphs: bool
) -> dict[str, Any]:
    lengths = step_lengths(config, task)
    longest = max(lengths)
    timed = replace(config, steps=_STEPS, train_length_choices=(longest,))
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    replicas = [Replica(seed=seed) for seed in range(size)]
    fleet = _Fleet(model, task, timed, replicas, torch.device(device), graphs=graphs)
    steps = itertools.cycle(range(_STEPS))

    def several(count: int) -> float:
        """Seconds of so many steps, without a wait between them, as in training."""
        start = time.perf_counter()
        for _ in range(count):
            fleet.step(next(steps))
        synchronise(device)
        return time.perf_counter() - start

    with recording() as used:
        several(3)
    group = 1 if device == "cpu" else max(1, min(100, round(0.1 / several(1))))
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < 3 or time.perf_counter() < end:
        taken.append(several(group) / group)
    step_s = statistics.median(taken)
    memory = torch.cuda.max_memory_reserved() if device == "cuda" else 0
    recorded = fleet.graphs is not None and fleet.graphs.count("training") > 0
    phases = _replayed_phases(fleet, step_s) if recorded else _phases(fleet, max(3, min(20, len(taken))))
    evaluation_s = _timed(lambda: fleet.measure("valid"), device, 2)
    points = -(-config.steps // config.eval_every) if config.eval_every else 1
    run_s = config.steps * step_s + (points + 1) * evaluation_s  # test is about as long as valid
    new_length_s = None
    if recorded:
        new_length_s = _new_length(fleet, sorted({*lengths})[:-1], device)
        run_s += len({*lengths}) * max(0.0, new_length_s - 2 * step_s)
    inside = sum(phases[name] for name in PHASES)
    shares = {
        name: config.steps * step_s * phases[name] / inside / run_s for name in PHASES
    }  # the phases' sum is longer than a step where waiting for the device costs
    shares["evaluation"] = (points + 1) * evaluation_s / run_s
    return {
        "backend": " ".join(f"{key}={value}" for key, value in sorted(used.items())) or "torch",
        "params": sum(x[0].numel() for x in fleet.parameters.named.values()),
        "length": longest,
        "step_ms": 1e3 * step_s,
        "run_steps_s": size / step_s,
        "runs_per_hour": 3600 * size / run_s,
        **{f"{name}_ms": 1e3 * value for name, value in phases.items()},
        "evaluation_ms": 1e3 * evaluation_s,
        "new_length_ms": None if new_length_s is None else 1e3 * new_length_s,
        **{f"{name}_share": value for name, value in shares.items()},
        "memory_mb": memory / 2**20 if device == "cuda" else None,
        "note": "no CUDA graph could be recorded" if graphs and not recorded else None,
    }


def _phases(fleet: _Fleet, repeats: int) -> dict[str, float]:
    """Median seconds of the parts of ``_Fleet.step``, waiting for the device after each."""
    device = fleet.device.type
    taken: dict[str, list[float]] = {name: [] for name in PHASES}

    def done(name: str, since: float) -> float:
        synchronise(device)
        now = time.perf_counter()
        taken[name].append(now - since)
        return now

    for step in range(repeats):
        now = time.perf_counter()
        tokens, targets = (x.to(fleet.device, non_blocking=True) for x in fleet.batch(step))
        now = done("data", now)
        losses, _ = fleet.losses(tokens, targets)
        now = done("forward", now)
        grads = fleet.parameters.gradients(losses.sum())
        now = done("backward", now)
        fleet.optimiser.step(step, grads, losses.detach(), fleet.active)
        done("optimiser", now)
    found = {name: statistics.median(values) for name, values in taken.items()}
    return {**found, "generation": found["data"]}


def _replayed_phases(fleet: _Fleet, step_s: float) -> dict[str, float]:
    """The same of a step that is replayed, from replays of its first part, its first two, and all of it."""
    graphs = fleet.graphs
    assert graphs is not None
    batch = tuple(x.to(fleet.device) for x in fleet.batch(0))

    def forward(*batch: Tensor) -> None:
        fleet.losses(*batch)

    def backward(*batch: Tensor) -> None:
        fleet.parameters.gradients(fleet.losses(*batch)[0].sum())

    def seconds(name: str, work: Callable[..., None]) -> float:
        for _ in range(3):
            graphs.run(name, work, *batch)
        return _timed(lambda: graphs.run(name, work, *batch), "cuda", 30)

    first, two = seconds("forward", forward), seconds("forward and backward", backward)
    all_of_it = seconds("training", fleet._update)
    taken = []
    for step in range(20):
        start = time.perf_counter()
        fleet.batch(step)
        taken.append(time.perf_counter() - start)
    return {
        "data": max(0.0, step_s - all_of_it),
        "forward": first,
        "backward": max(0.0, two - first),
        "optimiser": max(0.0, all_of_it - two),
        "generation": statistics.median(taken),
    }


def _new_length(fleet: _Fleet, lengths: Sequence[int], device: str) -> float:
    """Seconds of the first two steps of a length; the least of a few, for a first one may compile kernels."""
    found = [0.0]
    for step, length in enumerate(lengths[-3:]):
        fleet.lengths[step] = length
        start = time.perf_counter()
        for _ in range(2):
            fleet.step(step)
        synchronise(device)
        found.append(time.perf_counter() - start)
    return min(found[1:], default=0.0)


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
            gain = f"x{row['times_one_by_one'] or 0:.1f}, of a plain loop x{row['times_plain_loop'] or 0:.1f}"
            said = f"{speed}, {gain}; {shares} {row['backend']} {row['note'] or ''}"
            print(f"{arch} fleet of {row['fleet']}, {row['path']}: {said}", flush=True)
            if options.out:
                Path(options.out).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
