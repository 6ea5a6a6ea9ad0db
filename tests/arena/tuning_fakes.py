"""Tuning without training: a worker whose scores are a function of the run, and a small experiment.

As a script it is a process to be killed: ``python tuning_fakes.py DIR STORAGE SECONDS``.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import time
from unittest import mock

import optuna
import polars as pl

from arena.grid import parse_experiment
from arena.grid.results import CURVE_SCHEMA, ROW_SCHEMA, run_columns

SMALL = {
    "name": "small",
    "archs": ["gdn", "mlstm", "swa"],
    "tasks": [
        {
            "name": "mqar",
            "params": {"n_pairs": 2, "vocab_size": 8},
            "train_lengths": [8, 16],
            "eval_lengths": [24, 48],
        },
        {"name": "parity", "train_lengths": [20, 30], "eval_lengths": [90]},
    ],
    "fleet_size": 4,
    "model": {"d_model": 16, "n_layers": 1, "n_heads": 2},
    "train": {"steps": 8, "batch_size": 16, "eval_every": 4, "eval_examples": 32},
    "tuning": {
        "points": 4,
        "report_seeds": 2,
        "extension": 2,
        "space": {"lr": [1e-3, 1e-1], "weight_decay": [0.0, 0.3]},
    },
}


STUDIES = 6  # three architectures, two tasks


def studies(folder=None, url=None):
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = url or JournalStorage(JournalFileBackend(str(folder / "tuning" / "journal.log")))
    names = [summary.study_name for summary in optuna.get_all_study_summaries(storage)]
    return [optuna.load_study(study_name=name, storage=storage) for name in sorted(names)]


def complete(study):
    return [trial for trial in study.trials if trial.state.name == "COMPLETE"]


def experiment(tuning=None, **changes):
    data = json.loads(json.dumps(SMALL)) | changes
    data["tuning"] |= tuning or {}
    return parse_experiment(data)


def score_of(run) -> float:
    """The better, the nearer the rate is to the middle of its range; a little of the run's own."""
    import math

    distance = abs(math.log10(run.config["replica"]["lr"]) + float(os.environ.get("FAKE_BEST", "2")))
    own = int(hashlib.sha256(run.id.encode()).hexdigest()[:4], 16) / 2**16 / 100
    return max(0.0, 0.95 - distance / 4 - own)


def files(run, fleet_id) -> dict[str, bytes]:
    from arena.training.config import METRICS

    train = run.config["train"]
    score = score_of(run)
    known = {
        **run_columns(run.id, run.notes, run.config),
        "experiment": "small",
        "fleet_id": fleet_id,
        "params": 100,
        "steps": train["steps"],
        "train_tokens": 1000,
        "state_bytes": 64,
        "wall_s": 0.5,
        "status": "diverged"
        if run.config["replica"]["lr"] > float(os.environ.get("FAKE_DIVERGES", "9"))
        else "done",
    }
    poison = float(os.environ.get("FAKE_TEST", "0.5"))
    rows = []
    for split in ("valid", "test"):
        for length in train["valid_lengths" if split == "valid" else "eval_lengths"]:
            for metric in METRICS:
                value = poison if split == "test" else 1.0 - score if metric == "loss" else score
                if known["status"] == "diverged":
                    value = float("inf") if metric == "loss" else 0.0
                rows.append(
                    {**known, "split": split, "eval_length": length, "metric": metric, "value": value,
                     "chance": 0.1, "n_examples": 32, "reported": split == "test"}
                )  # fmt: skip

    def parquet(content, schema):
        buffer = io.BytesIO()
        frame = [
            {**dict.fromkeys(schema), **{k: v for k, v in row.items() if k in schema}} for row in content
        ]
        pl.DataFrame(frame, schema=schema).write_parquet(buffer)
        return buffer.getvalue()

    return {
        "config.json": json.dumps(run.config).encode(),
        "environment.json": b"{}",
        "rows.parquet": parquet(rows, ROW_SCHEMA),
        "curve.parquet": parquet([], CURVE_SCHEMA),
        "model.safetensors": b"none",
    }


def work(fleet, progress):
    note(f"start {fleet.id} {len(fleet.runs)}")
    for step in range(4):
        time.sleep(float(os.environ.get("FAKE_SECONDS", "0")) / 4)
        progress(2 * step)
    return {run.id: files(run, fleet.id) for run in fleet.runs}


def fail_mlstm(fleet, progress):
    if fleet.runs[0].arm == "mlstm":
        raise ArithmeticError("two and two is five")
    return work(fleet, progress)


def note(text: str) -> None:
    if log := os.environ.get("FAKE_LOG"):
        with open(log, "a") as file:
            file.write(f"{text}\n")


def drive(directory, *, storage=None, work=work, say=None, executor=None, **changes):
    from grid_fakes import Inline

    from arena.tuning import tune

    with mock.patch("arena.tuning.prepare.Probes.seconds", lambda self, setting: 1e-3):  # nothing is measured
        return tune(
            experiment(**changes),
            directory,
            storage=storage,
            work=work,
            executor=executor or Inline(),
            on_line=say,
        )


if __name__ == "__main__":
    from arena.grid.executors import LocalExecutor

    folder, url, seconds = sys.argv[1:4]
    os.environ["FAKE_SECONDS"] = seconds
    result = drive(folder, storage=None if url == "-" else url, executor=LocalExecutor(workers=1))
    print(result.stored, result.planned, result.elsewhere, flush=True)
