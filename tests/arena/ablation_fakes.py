"""Rows of an ablation that nobody trained, with effects that are known."""

from __future__ import annotations

from dataclasses import asdict

import polars as pl

from arena.ablation.request import ablation_request, plan_ablation
from arena.grid.plan import canonical, model_fields
from arena.grid.results import ROW_SCHEMA
from arena.model import ModelConfig


def planned(arch="gdn2", tasks=("rebind", "mqar"), presets=(), **axes):
    return plan_ablation(
        ablation_request(None, archs=[arch] if arch else [], tasks=tasks, axes=axes, presets=presets)
    )


def rows(ablation, score, *, seeds=10, lengths=(64, 128)):
    """One row a run and length: ``score(task, length, gates, seed)`` is the chance-scaled accuracy; gates are
    what the arm changes. A score of None: that run failed.
    """
    experiment, found = ablation.experiment, []
    for entry in experiment.tasks:
        for arm in experiment.archs:
            fields = model_fields(experiment, arm, entry)
            config = ModelConfig(arch=experiment.arch_of(arm), vocab_size=4, n_classes=4, **fields)
            changes = experiment.arms[arm].options.get("gates", {}) if arm in experiment.arms else {}
            for seed in range(1000, 1000 + seeds):
                for length in lengths:
                    value = score(entry.name, length, changes, seed)
                    found.append(
                        {
                            **dict.fromkeys(ROW_SCHEMA),
                            "experiment": experiment.name,
                            "run_id": f"{entry.name} {arm} {seed}",
                            "arch": config.arch,
                            "arm": arm,
                            "model_params": canonical({**asdict(config), "options": dict(config.options)}),
                            "task": entry.name,
                            "task_params": "{}",
                            "seed": seed,
                            "trial": 3,
                            "stage": "final",
                            "split": "test",
                            "eval_length": length,
                            "reported": True,
                            "metric": "chance_scaled_accuracy",
                            "value": value,
                            "params": 1000 + 100 * len(changes),
                            "state_bytes": 2048,
                            "steps": 100,
                            "lr": 0.01,
                            "wall_s": 1.0 + 0.5 * ("erase" in changes),
                            "status": "done" if value is not None else "failed",
                        }
                    )
    return pl.DataFrame(found, schema=ROW_SCHEMA)
