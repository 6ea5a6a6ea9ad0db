"""What a worker does with a fleet: train it and turn the results into the bytes of the files that the store
keeps.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from typing import Any

from arena.grid.plan import Fleet, Run, digest, result_versions

_footprints: dict[str, Any] = {}  # group of runs -> arena.training.Footprint


def train(
    fleet: Fleet, progress: Callable[[int], None], *, share: float = 1.0
) -> dict[str, dict[str, bytes]]:
    """Train a fleet, if a short probe says that it fits into memory.

    Args:
        fleet: runs of one group.
        progress: called with the number of steps done.
        share: part of the GPU's memory, on the CPU of the machine's, that is the fleet's.

    Returns:
        Run id -> file name (``arena.grid.store.RUN_FILES``) -> bytes.

    Raises:
        arena.training.FleetOutOfMemory: a smaller fleet may fit.
        arena.plugins.PluginError: this process has not the plug-ins that the runs were planned with.
        RuntimeError: nor the version of this toolkit.
    """
    import synthetic_tasks
    from arena.grid.environment import environment
    from arena.model import ModelConfig
    from arena.plugins import loaded, require
    from arena.training import Replica, TrainConfig, train_fleet

    config = fleet.runs[0].config
    require(config["versions"])
    model, settings = ModelConfig(**config["model"]), TrainConfig(**config["train"])
    task = synthetic_tasks.get(config["task"]["name"], **config["task"]["params"])
    _require_versions(config["versions"], result_versions(task))
    if len(fleet.runs) > 1:
        _require_memory(fleet, model, task, settings, share)
    replicas = [Replica(**run.config["replica"]) for run in fleet.runs]
    results = train_fleet(model, task, settings, replicas, device=config["device"], on_step=progress)
    around = {**environment(), **({"plugins": loaded()} if loaded() else {})}
    return {
        run.id: run_files(run, fleet.id, result, around)
        for run, result in zip(fleet.runs, results, strict=True)
    }


def _require_versions(planned: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """RuntimeError where a worker on another machine would give results of another version."""
    other = [f"{part} {here[part]}, not {planned[part]}" for part in here if here[part] != planned.get(part)]
    if other:
        raise RuntimeError(
            f"this worker has another memory-arena than the driver ({'; '.join(other)}): install the same"
        )


def _require_memory(fleet: Fleet, model: Any, task: Any, settings: Any, share: float) -> None:
    """FleetOutOfMemory where the fleet would not fit; each shape is tried out once in a process."""
    from arena.training import FleetOutOfMemory, measure_footprint, memory_budget

    device, size = fleet.runs[0].config["device"], len(fleet.runs)
    group = fleet.runs[0].group
    if group not in _footprints:
        _footprints[group] = measure_footprint(model, task, settings, device=device)
    footprint, budget = _footprints[group], memory_budget(device, share)
    fits = footprint.fits(budget)
    if fits < size:
        need = footprint.fixed + size * footprint.per_replica
        room = max(0.0, budget)
        detail = f"a step takes {need / 2**30:.2f} GiB by a short probe, of {room / 2**30:.2f} GiB"
        raise FleetOutOfMemory(size, detail, fits=fits)


def run_files(run: Run, fleet_id: str, result: Any, around: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of one run.

    Args:
        run: what was asked for.
        fleet_id: who it trained with.
        result: ``arena.training.ReplicaResult``.
        around: the environment.
    """
    import polars as pl
    import safetensors.torch

    from arena.grid.results import CURVE_SCHEMA, ROW_SCHEMA, run_columns
    from arena.grid.verdict import verdict

    known = run_columns(run.id, run.notes, run.config)
    common = {
        **dict.fromkeys(ROW_SCHEMA),
        **known,
        "experiment": run.experiment,
        "fleet_id": fleet_id,
        "params": result.params,
        "active_params": result.active_params,
        "state_bytes": result.state_bytes,
        "steps": result.steps,
        "train_tokens": result.train_tokens,
        "wall_s": result.wall_s,
        "status": result.status,
        "environment": digest(around),
        "verdict": verdict(),
    }
    # where a task's space is exhausted, both kinds of row are of split train
    lengths = run.config["train"]["eval_lengths"]
    rows = [
        {**common, "reported": row["split"] != "valid" and row["eval_length"] in lengths, **row}
        for row in result.final
    ]
    curve = [{**{key: known.get(key) for key in CURVE_SCHEMA}, **row} for row in result.curve]
    weights = {name: tensor.detach().clone().contiguous() for name, tensor in result.state_dict.items()}
    return {
        "config.json": json.dumps(run.config, indent=1, sort_keys=True).encode(),
        "environment.json": json.dumps(around, indent=1, sort_keys=True).encode(),
        "rows.parquet": _parquet(pl.DataFrame(rows, schema=ROW_SCHEMA)),
        "curve.parquet": _parquet(pl.DataFrame(curve, schema=CURVE_SCHEMA)),
        "model.safetensors": safetensors.torch.save(weights),
    }


def _parquet(frame: Any) -> bytes:
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    return buffer.getvalue()
