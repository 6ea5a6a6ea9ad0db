"""What a worker does with a fleet: train it and turn the results into the bytes of the files that the store
keeps.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from typing import Any

from arena.grid.plan import Fleet, Run, digest


def train(fleet: Fleet, progress: Callable[[int], None]) -> dict[str, dict[str, bytes]]:
    """Train a fleet.

    Args:
        fleet: runs of one group.
        progress: called with the number of steps done.

    Returns:
        Run id -> file name (``arena.grid.store.RUN_FILES``) -> bytes.

    Raises:
        arena.training.FleetOutOfMemory: a smaller fleet may fit.
        arena.plugins.PluginError: this process has not the plug-ins that the runs were planned with.
    """
    import synthetic_tasks
    from arena.grid.environment import environment
    from arena.model import ModelConfig
    from arena.plugins import loaded, require
    from arena.training import Replica, TrainConfig, train_fleet

    config = fleet.runs[0].config
    require(config["versions"])
    results = train_fleet(
        ModelConfig(**config["model"]),
        synthetic_tasks.get(config["task"]["name"], **config["task"]["params"]),
        TrainConfig(**config["train"]),
        [Replica(**run.config["replica"]) for run in fleet.runs],
        device=config["device"],
        on_step=progress,
    )
    around = {**environment(), **({"plugins": loaded()} if loaded() else {})}
    return {
        run.id: run_files(run, fleet.id, result, around)
        for run, result in zip(fleet.runs, results, strict=True)
    }


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
