"""A stand-in for training that starts in a moment: runs without models, and workers that pretend.

As a script it is a driver to be killed: ``python grid_fakes.py DIR WORKERS``.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import sys
import time
from pathlib import Path

from arena.grid import ExperimentError
from arena.grid.driver import train_here, train_runs
from arena.grid.executors import Event, Slots, make_executor
from arena.grid.executors.base import attempt
from arena.grid.plan import Run
from arena.grid.store import RUN_FILES

SECONDS = 0.12


def make_runs(groups: int = 4, seeds: int = 3, **train) -> list[Run]:
    return [
        Run(
            experiment="fake",
            trial=0,
            arm=f"arch{group}",
            config={
                "model": {"arch": f"arch{group}"},
                "task": {"name": "fake", "params": {}},
                "train": {"steps": 10, "batch_size": 1, "train_lengths": [4, 8], **train},
                "replica": {"seed": seed, "lr": 0.1, "weight_decay": 0.0},
                "versions": {"task": 1},
                "device": "cpu",
                "dtype": "float32",
                "backend": "none",
            },
        )
        for group in range(groups)
        for seed in range(seeds)
    ]


def files(run, fleet_id, value=None) -> dict[str, bytes]:
    import polars as pl

    from arena.grid.results import CURVE_SCHEMA, ROW_SCHEMA, run_columns

    known = {**run_columns(run.id, run.notes, run.config), "experiment": "fake", "fleet_id": fleet_id}
    if value is None:
        value = int(hashlib.sha256(run.id.encode()).hexdigest()[:8], 16) / 2**32
    rows = [
        {
            **known,
            "split": "test",
            "eval_length": n,
            "reported": True,
            "metric": "accuracy",
            "value": value,
            "status": "done",
        }
        for n in (8, 16)
    ]

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
        "model.safetensors": run.id.encode() * 1000,
    }


def _note(text: str) -> None:
    """One line to the log of the test, if it wants one (appending a short line is atomic)."""
    if log := os.environ.get("FAKE_LOG"):
        with open(log, "a") as file:
            file.write(f"{text} {os.getpid()}\n")


def work(fleet, progress):
    _note(f"start {fleet.id}")
    for step in range(10):
        time.sleep(SECONDS / 10)
        progress(step + 1)
    return {run.id: files(run, fleet.id) for run in fleet.runs}


def marked(fleet, progress):
    """The results of another folder, $FAKE_RESULTS, with a line in the log for every step; two processes on
    one fleet at the same time are noticed.
    """
    results = Path(os.environ["FAKE_RESULTS"]) / "runs"
    with open(os.environ["FAKE_LOG"] + "." + fleet.id, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system drops it when the process dies
        except OSError:
            _note(f"twice {fleet.id}")
        _note(f"start {fleet.id}")
        for step in range(3):
            time.sleep(0.005)
            progress(step)
            _note(f"step {fleet.id}")
        found = {
            run.id: {name: (results / run.id / name).read_bytes() for name in RUN_FILES} for run in fleet.runs
        }
        _note(f"done {fleet.id}")
    return found


def quick(fleet, progress):
    return {run.id: files(run, fleet.id) for run in fleet.runs}


def refuse(text):
    raise ExperimentError(text)


def slow(fleet, progress):
    _note(f"start {fleet.id}")
    for step in range(1000):
        time.sleep(0.05)
        progress(step + 1)
    return {}


def until_released(fleet, progress):
    """Goes on only when the test says so."""
    _note(f"start {fleet.id}")
    while not Path(os.environ["FAKE_LOG"] + ".release").exists():
        progress(1)
        time.sleep(0.02)
    return {run.id: files(run, fleet.id) for run in fleet.runs}


def train_in_little_memory(fleet, progress):
    """Real training in a process that may have no more than a bit beyond what it has once torch is there."""
    import resource

    import polars as pl
    import safetensors.torch
    import torch

    # what writes the results has threads and memory of its own, which are not to be short
    pl.DataFrame({"x": list(range(100))}).write_parquet(io.BytesIO())
    safetensors.torch.save({"x": torch.zeros(1)})
    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = held + int(os.environ["FAKE_BYTES"])
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return train_here(fleet, progress)


def raise_in_one_group(fleet, progress):
    if fleet.runs[0].config["model"]["arch"] == "arch1":
        raise ArithmeticError("two and two\nis five")
    return work(fleet, progress)


def die_in_one_group(fleet, progress):
    _note(f"start {fleet.id}")
    if fleet.runs[0].config["model"]["arch"] == "arch1":
        os.kill(os.getpid(), 9)
    return {run.id: files(run, fleet.id) for run in fleet.runs}


def die_once(fleet, progress):
    marker = Path(os.environ["FAKE_LOG"] + ".died")
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), 9)
    return work(fleet, progress)


def two_fit(fleet, progress):
    _note(f"start {fleet.id}")
    if len(fleet.runs) > 2:
        raise MemoryError("no room")
    return {run.id: files(run, fleet.id) for run in fleet.runs}


def gpu_seen(fleet, progress):
    time.sleep(0.5)  # long enough for every worker to get a fleet
    raise RuntimeError(os.environ["CUDA_VISIBLE_DEVICES"])


def threads_seen(fleet, progress):
    omp, mkl = (os.environ.get(f"{name}_NUM_THREADS") for name in ("OMP", "MKL"))
    raise RuntimeError(f"OMP {omp} MKL {mkl}")


class Inline:
    """An engine without processes, which take seconds to start."""

    name = "inline"

    def slots(self, fleets):
        return Slots(workers=1, threads=1)

    def run(self, queue, work, slots):
        while queue:
            fleet = queue.popleft()
            yield Event(kind="started", fleet=fleet)
            kind, content = attempt(work, fleet, lambda steps: None)
            yield Event(kind=kind, fleet=fleet, **content)

    def call(self, function, *arguments):
        return function(*arguments)


def drive(directory, workers=1, work=work, fleet_size=2, executor="local", on_event=None, **changes):
    return train_runs(
        make_runs(**changes),
        directory,
        name="fake",
        request="",
        fleet_size=fleet_size,
        workers=workers,
        work=work,
        executor=executor,
        on_event=on_event,
    )


if __name__ == "__main__":
    directory, where, kind = sys.argv[1:4]
    works = {"work": work, "slow": slow, "held": until_released, "marked": marked}
    if where == "slurm":
        engine = make_executor("slurm", directory=directory, workers=2, slurm={"time": 5})
        result = drive(directory, work=works[kind], executor=engine)
    else:
        result = drive(directory, int(where), work=works[kind])
    print(result)
