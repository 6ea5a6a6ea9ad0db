"""Rows of a tuned experiment as the store gives them, made up from a formula."""

from __future__ import annotations

import math
import zlib

import numpy as np
import polars as pl

from arena.grid.results import ROW_SCHEMA

CHANCE = 0.125


def tuned_rows(
    arms=("gdn", "gdn2"),
    tasks=("mqar", "rebind"),
    points=16,
    seeds=10,
    panel=(),
    extension=0,
    best=None,
    spread=0.02,
    luck=None,
) -> pl.DataFrame:
    """Search, extension, panel and final runs.

    Args:
        best: {arm: accuracy that its best point tends to}; 0.9 where it is not named.
        luck: f(arm, task, seed) -> test accuracy of a final run, instead of best plus noise.
    """
    rows: list[dict] = []
    rng = np.random.default_rng(0)
    rates = 10 ** rng.uniform(-4, -1.5, points + extension)
    decays = rng.uniform(0, 0.3, points + extension)
    for task in tasks:
        for arm in arms:
            own = np.random.default_rng(zlib.crc32(f"{task} {arm}".encode()))
            top = (best or {}).get(arm, 0.9)
            optimum, width = own.uniform(-3, -2.3), own.uniform(0.4, 1.0)

            def score(lr, top=top, optimum=optimum, width=width, own=own):
                curve = CHANCE + (top - CHANCE) * math.exp(-(((math.log10(lr) - optimum) / width) ** 2))
                return float(np.clip(curve + own.normal(0, spread), 0, 1))

            for trial, (lr, decay) in enumerate(zip(rates, decays, strict=True)):
                stage = "search" if trial < points else "extension"
                lost = lr > 10 ** (optimum + 0.75)
                rows += _run(
                    arm, task, stage, trial, 0, lr, decay, 0.0 if lost else score(lr), lost, ("valid",)
                )
            if arm in panel:
                for trial, lr in enumerate(np.geomspace(1e-4, 3e-2, 9)):
                    for seed in range(3):
                        rows += _run(arm, task, "panel", trial, seed, lr, 0.1, score(lr), False, ("valid",))
            for seed in range(1000, 1000 + seeds):
                value = luck(arm, task, seed) if luck else float(np.clip(top + own.normal(0, spread), 0, 1))
                rows += _run(
                    arm,
                    task,
                    "final",
                    points - 1,
                    seed,
                    rates[points - 1],
                    decays[points - 1],
                    value,
                    False,
                    ("valid", "test"),
                )
    return pl.DataFrame(rows, schema=ROW_SCHEMA)


def _run(arm, task, stage, trial, seed, lr, decay, accuracy, diverged, splits):
    known = {
        **dict.fromkeys(ROW_SCHEMA),
        "experiment": "e", "run_id": f"{task}-{arm}-{stage}-{trial}-{seed}", "fleet_id": f"{task}-{arm}",
        "arch": arm.partition("_")[0], "arm": arm, "model_params": "{}", "task": task, "task_params": "{}",
        "seed": seed, "trial": trial, "stage": stage, "space": "abc", "params": 1000, "state_bytes": 64,
        "steps": 10, "train_tokens": 5000, "train_length_min": 8, "train_length_max": 64, "lr": lr,
        "weight_decay": decay, "wall_s": 1.5, "n_examples": 100, "device": "cpu",
        "backend": "gated_memory=chunked", "dtype": "float32", "version": "blocks=1",
        "status": "diverged" if diverged else "done",
    }  # fmt: skip
    for split in splits:
        for length in (64, 128) if split == "valid" else (128, 256):
            values = {
                "accuracy": accuracy,
                "chance_scaled_accuracy": (accuracy - CHANCE) / (1 - CHANCE),
                "sequence_accuracy": accuracy**2,
                "loss": math.inf if diverged else 1 - accuracy,
            }
            for metric, value in values.items():
                yield {
                    **known, "split": split, "reported": split == "test", "eval_length": length,
                    "metric": metric, "value": value, "chance": CHANCE,
                }  # fmt: skip
