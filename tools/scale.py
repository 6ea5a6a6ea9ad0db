"""What a grid of 128,000 runs costs beside its training: writes docs/scale.md.

python tools/scale.py [--folder DIR] [--points 32] [--page docs/scale.md]

Plans 20 architectures x 40 tasks x 5 seeds x 32 points, makes a result folder of all its runs with made-up
scores (real files, but for the weights), and times what the toolkit does with it.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import polars as pl

import synthetic_tasks
from arena.grid.cache import REST
from arena.grid.environment import cpu_count, environment
from arena.grid.experiment import Experiment, parse_experiment
from arena.grid.fleets import plan_fleets
from arena.grid.plan import Fleet, Run, digest, plan_runs
from arena.grid.results import CURVE_SCHEMA, ROW_SCHEMA, load_results, run_columns
from arena.grid.store import CHECKSUMS, RUN_FILES, Store
from arena.grid.toml import to_toml
from arena.training.data import check_measurable
from arena.training.evaluation import make_rows

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ROOT / "experiments" / "benchmarks" / "training_h100.json"
ARCHS = [
    "attention", "swa", "linear_attention", "gla", "mamba2", "mamba2-neg", "mamba3", "deltanet",
    "deltanet-neg", "deltaproduct[2]", "gdn", "gdn-neg", "gdnproduct[2]", "kda", "kda-neg", "gdn2", "mlstm",
    "slstm", "lstm", "rwkv7",
]  # fmt: skip
TASKS, SEEDS = 40, 5
GPUS = (1, 8, 64)


def experiment(points: int) -> Experiment:
    """The grid, at the setting that was measured on a GPU where the task has no say."""
    tasks = []
    for name in synthetic_tasks.names()[:TASKS]:
        task = synthetic_tasks.get(name)
        lengths: list[int] = []
        for wanted in (40, 80, 120, 160, 320):
            least = max([wanted, *(n + 1 for n in lengths)])
            lengths.append(next(n for n in range(least, least + 200) if _accepts(task, n)))
        tasks.append(
            {
                "name": name,
                "train_lengths": lengths[0],
                "eval_lengths": lengths[2:],
                "valid_lengths": lengths[:2],
            }
        )
    return parse_experiment(
        {
            "name": "scale",
            "archs": ARCHS,
            "tasks": tasks,
            "seeds": SEEDS,
            "lr": [1e-3 * 1.2**i for i in range(math.ceil(points / 2))],
            "weight_decay": [0.0, 0.1],
            "model": {"d_model": 32, "n_layers": 2, "n_heads": 2},
            "train": {"steps": 1000, "batch_size": 32},
        }
    )


def _accepts(task: Any, length: int) -> bool:
    try:
        type(task).check_length(task, length)
        check_measurable(task, length)
    except ValueError:
        return False
    return True


def fill(directory: Path, wanted: Experiment, fleets: list[Fleet]) -> None:
    """Make the result folder, as a grid that has ended would leave it."""
    with Store(directory) as store:
        store.record_request(wanted.name, to_toml(wanted.model_dump(exclude_none=True)), _runs(fleets))
    around = environment()
    content = json.dumps(around, indent=1, sort_keys=True).encode()
    curve = _parquet(pl.DataFrame(schema=CURVE_SCHEMA))
    for fleet in fleets:
        (directory / "fleets" / f"{fleet.id}.json").write_text(json.dumps([run.id for run in fleet.runs]))
        rows = pl.DataFrame(
            [row for run in fleet.runs for row in _scores(run, fleet.id, digest(around))], schema=ROW_SCHEMA
        )
        each = rows.height // len(fleet.runs)
        for number, run in enumerate(fleet.runs):
            files = {
                "config.json": json.dumps(run.config, sort_keys=True).encode(),
                "environment.json": content,
                "rows.parquet": _parquet(rows[number * each : (number + 1) * each]),
                "curve.parquet": curve,
                "model.safetensors": run.id.encode(),
            }
            sums = {name: sha256(files[name]).hexdigest() for name in RUN_FILES}
            folder = directory / "runs" / run.id
            folder.mkdir()
            for name, data in {**files, CHECKSUMS: json.dumps(sums, indent=1).encode()}.items():
                (folder / name).write_bytes(data)


def _runs(fleets: list[Fleet]) -> list[Run]:
    return [run for fleet in fleets for run in fleet.runs]


def _scores(run: Run, fleet_id: str, around: str) -> list[dict[str, Any]]:
    """Rows as a trained run has them."""
    draw = random.Random(run.id)
    known = {
        **dict.fromkeys(ROW_SCHEMA),
        **run_columns(run.id, run.notes, run.config),
        **{"experiment": run.experiment, "fleet_id": fleet_id, "params": 34436, "active_params": 34436},
        **{"steps": 1000, "train_tokens": 1280000, "wall_s": 1.0, "status": "done", "environment": around},
    }
    train = run.config["train"]
    rows: list[dict[str, Any]] = []
    for split, key in (("valid", "valid_lengths"), ("test", "eval_lengths")):
        for length in train[key]:
            right = draw.random()
            measured = make_rows(split, length, 0.1, 512, -math.log(right), right, right**4)
            rows += [{**known, "reported": split == "test", "state_bytes": 4096, **row} for row in measured]
    return rows


def _parquet(frame: pl.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    return buffer.getvalue()


def timed(name: str, times: dict[str, float], action: Any) -> Any:
    """Do it and note the seconds."""
    print(f"{name} ...", flush=True)
    begin = time.perf_counter()
    result = action()
    times[name] = time.perf_counter() - begin
    print(f"  {times[name]:.1f} s", flush=True)
    return result


def page(times: dict[str, float], facts: dict[str, Any]) -> str:
    """docs/scale.md."""
    measured = json.loads(MEASURED.read_text())
    lines = [
        "# Very large grids",
        "",
        "Written by `python tools/scale.py`; nothing on this page is typed by hand.",
        "",
        f"{len(ARCHS)} architectures x {TASKS} tasks x {SEEDS} seeds x {facts['points']} points: "
        f"{facts['runs']:,} runs in {facts['fleets']:,} fleets, {facts['rows']:,} rows of results.",
        "",
        "## What the toolkit needs beside training",
        "",
        "The runs were planned as any other, then given made-up scores instead of being "
        "trained; their files "
        "are those of a real run, but for the weights (a few bytes here; they are read only when a run is "
        "checked for the first time).",
        f"{facts['cores']} cores, load average {facts['load']:.1f}; python {facts['python']}, "
        f"polars {pl.__version__}; at most {facts['memory']:.1f} GB of memory. Seconds:",
        "",
        "| step | s |",
        "|---|---:|",
        *(f"| {name} | {seconds:.1f} |" for name, seconds in times.items()),
        "",
        f"The report: page.html {facts['page.html'] / 1e6:.1f} MB, report.md "
        f"{facts['report.md'] / 1e6:.2f} MB.",
        "",
        "The folders of the runs are the truth. A result folder of many runs has a "
        "folder `cache` beside them: "
        "rows that were read, checksums that held, each with the sizes and times (also "
        "of the last change) that "
        "the run's files had. Of a run whose files are no longer so, or of a copied "
        "folder, nothing in it is "
        "believed: the run is read again. It may be deleted at any time. What a disk "
        "corrupts without changing a "
        "file's times is found when the file is read; deleting `cache` makes the next "
        "command read them all.",
        "",
        "## What training would cost",
        "",
        f"Measured: {measured['rows'][0]['arch']} on {measured['rows'][0]['task']}, on one "
        f"{measured['machine']['device']} ({measured['how'][0]}; torch {measured['machine']['torch']}). "
        "Everything below is this one setting times the number of runs. It assumes that "
        "every run costs the same "
        "(longer sequences, larger vocabularies, other architectures cost more), that "
        "each GPU has fleets to "
        "train at all times, and that GPUs do not slow each other down (fleets do not "
        "talk to each other). More "
        "than one GPU was not measured.",
        "",
        "| runs in a fleet | runs per hour, measured, one GPU | GPU hours | "
        + " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in GPUS)
        + " |",
        "|---:|---:|---:|" + "---:|" * len(GPUS),
    ]
    for row in measured["rows"]:
        hours = facts["runs"] / row["runs_per_hour"]
        cells = " | ".join(_span(hours / n) for n in GPUS)
        lines.append(f"| {row['fleet']} | {row['runs_per_hour']:,.0f} | {hours:,.0f} | {cells} |")
    lines += [
        "",
        "`fleet_size` of the experiment file sets how many runs train together (16 where it is absent).",
        "",
    ]
    return "\n".join(lines)


def _span(hours: float) -> str:
    return (
        f"{hours / 24:,.1f} days"
        if hours >= 48
        else f"{hours:.1f} h"
        if hours >= 1
        else f"{60 * hours:.0f} min"
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="keep the result folder here; again: use it")
    parser.add_argument("--points", type=int, default=32, help="even number of points")
    parser.add_argument("--page", type=Path, help="write docs/scale.md here")
    parser.add_argument("--warm", action="store_true", help="leave out the slow steps without a cache")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="scale-")) / "grid"
    times: dict[str, float] = {}
    wanted = experiment(options.points)
    runs = timed("plan: runs", times, lambda: plan_runs(wanted))
    fleets = timed("plan: fleets", times, lambda: plan_fleets(runs, wanted.fleet_size))
    times["planning in all"] = sum(times.values())
    if not (folder / "runs").exists():
        timed("(writing the made-up results)", {}, lambda: fill(folder, wanted, fleets))
        time.sleep(REST)
    if not options.warm:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        timed("load_results, no cache yet", times, lambda: load_results(folder).height)
    count = timed("load_results", times, lambda: load_results(folder).height)

    command = "import sys; from arena.report import make_report; make_report(sys.argv[1])"
    timed(
        "arena report: tables, figures, page",
        times,
        lambda: subprocess.run([sys.executable, "-c", command, str(folder)], check=True),
    )

    def resume() -> int:
        with Store(folder) as store:
            done = store.finished(run.id for run in runs)
            plan_fleets(runs, wanted.fleet_size, store.recorded_fleets())
            return len(done)

    if not options.warm:
        timed("start of a resumed grid, no cache yet", times, resume)
    assert timed("start of a resumed grid", times, resume) == len(runs)
    memory = max(
        resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    facts = {
        "points": len(wanted.points),
        "runs": len(runs),
        "fleets": len(fleets),
        "rows": count,
        "cores": cpu_count(),
        "load": os.getloadavg()[0],
        "python": sys.version.split()[0],
        "memory": memory * 1024 / 1e9,
        **{name: (folder / "report" / name).stat().st_size for name in ("page.html", "report.md")},
    }
    text = page(times, facts)
    print(text)
    if options.page is not None:
        options.page.write_text(text, encoding="utf-8")
    if options.folder is None:
        shutil.rmtree(folder.parent)


if __name__ == "__main__":
    main()
