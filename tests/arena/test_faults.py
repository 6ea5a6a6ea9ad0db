"""What goes wrong on machines, done for real: the table in the end is that of an undisturbed grid."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import grid_fakes
import polars as pl
import pytest
from slurm_fakes import alive

import arena.grid.store
import synthetic_tasks
from arena.grid import StoreError, load_results, parse_experiment, plan_runs, run_experiment
from arena.grid.executors import LocalExecutor
from arena.model import ModelConfig
from arena.training import TrainConfig, measure_footprint

HERE = Path(__file__).parent

ROOT = HERE.parents[1]
SMALL = {
    "name": "small",
    "archs": ["mlstm"],
    "seeds": 4,
    "model": {"d_model": 32, "n_layers": 2, "n_heads": 2},
    "train": {"steps": 2, "batch_size": 32, "eval_examples": 16},
    "tasks": [{"name": "parity", "train_lengths": [64, 64], "eval_lengths": [96]}],
}


@pytest.fixture
def log(tmp_path, monkeypatch):
    path = tmp_path / "log"
    monkeypatch.setenv("FAKE_LOG", str(path))
    return path


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """The folder of an undisturbed grid."""
    directory = tmp_path_factory.mktemp("calm") / "out"
    grid_fakes.drive(directory, executor=grid_fakes.Inline(), work=grid_fakes.quick)
    return directory


def wait_until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def lines(log: Path) -> list[list[str]]:
    """(what, fleet, process) of every line."""
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def start_driver(directory: Path, workers: int, kind: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(HERE / "grid_fakes.py"), str(directory), str(workers), kind],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_hundred_kills_at_random_instants_leave_the_table_as_it_is(tmp_path, log, monkeypatch, calm):
    """kill -9 of workers and drivers. Instants are counted in what the workers write down, not in seconds."""
    monkeypatch.setenv("FAKE_RESULTS", str(calm))
    expected, seed = load_results(calm), random.randrange(2**32)
    print(f"seed {seed}")  # shown when the test fails
    rng = random.Random(seed)
    victims = ["driver"] * 15 + ["worker"] * 85
    rng.shuffle(victims)
    grids = 0
    while victims:
        directory, grids = tmp_path / f"grid{grids}", grids + 1
        done: set[str] = set()  # fleets that were stored when a driver started
        ended = False
        while not ended:
            driver, position = start_driver(directory, 2, "marked"), len(lines(log))
            while driver.poll() is None and victims:
                wait_for = len(lines(log)) + rng.randrange(1, 12)
                wait_until(lambda n=wait_for, d=driver: len(lines(log)) >= n or d.poll() is not None)
                time.sleep(rng.random() * 0.01)
                workers = [pid for pid in {int(line[2]) for line in lines(log)[position:]} if alive(pid)]
                if victims[-1] == "worker" and workers:
                    os.kill(rng.choice(workers), signal.SIGKILL)
                    victims.pop()
                elif victims[-1] == "driver" and driver.poll() is None:
                    driver.kill()
                    victims.pop()
            output, errors = driver.communicate(timeout=60)
            assert driver.returncode in (0, -signal.SIGKILL), errors
            pids = {int(line[2]) for line in lines(log)[position:]}
            wait_until(lambda p=pids: not any(alive(pid) for pid in p))  # workers end with their driver
            again = {line[1] for line in lines(log)[position:] if line[0] == "start"} & done
            assert not again, "a stored fleet was run again"
            # a fleet whose worker was killed twice counts as failed: the next start tries it again
            ended = driver.returncode == 0 and "stored=12" in output
            if (directory / "runs").exists():
                stored = {folder.name for folder in (directory / "runs").iterdir()}
                fleets = {path.stem: json.loads(path.read_text()) for path in directory.glob("fleets/*.json")}
                done = {name for name, members in fleets.items() if set(members) <= stored}
                if stored and (directory / "plan.json").exists():
                    part = load_results(directory).filter(pl.col("status") == "done")
                    assert part.equals(expected.filter(pl.col("run_id").is_in(list(stored))))
        assert load_results(directory).equals(expected)
        assert not list((directory / "staging").iterdir()) and not list((directory / "failures").iterdir())
    assert not [line for line in lines(log) if line[0] == "twice"], "a run was trained twice at the same time"
    print(f"{grids} grids")


def test_two_drivers_on_one_folder_train_nothing_twice(tmp_path, log, monkeypatch, calm):
    monkeypatch.setenv("FAKE_RESULTS", str(calm))
    drivers = [start_driver(tmp_path / "out", 2, "marked") for _ in range(4)]
    outcomes = [(*driver.communicate(timeout=120), driver.returncode) for driver in drivers]
    assert sum("stored=12" in output for output, _, _ in outcomes) >= 1
    for output, errors, status in outcomes:
        assert (status == 0 and "stored=12" in output) or "in use by another arena process" in errors
    begun = [fleet for what, fleet, _ in lines(log) if what == "start"]
    assert len(begun) == len(set(begun)) == 8
    assert load_results(tmp_path / "out").equals(load_results(calm))


def test_a_disk_that_is_full_at_any_write(tmp_path, monkeypatch, calm):
    """Every write of a grid fails once, one a try; what is stored by then stays; the next start goes on."""
    changes = {"groups": 2, "seeds": 2, "executor": grid_fakes.Inline(), "work": grid_fakes.quick}
    grid_fakes.drive(tmp_path / "calm", **changes)
    expected = load_results(tmp_path / "calm")
    write, count, stored_before = arena.grid.store._write, 0, 0

    def failing(path, data):
        nonlocal count
        count += 1
        if count == full_at:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    monkeypatch.setattr(arena.grid.store, "_write", failing)
    for full_at in range(1, 200):
        count, directory = 0, tmp_path / str(full_at)
        try:
            grid_fakes.drive(directory, **changes)
        except StoreError as error:
            assert "No space left on device" in str(error)
        else:
            break
        kept = {folder.name for folder in (directory / "runs").iterdir()}
        assert len(kept) >= stored_before and len(kept) in (0, 2, 4)
        stored_before = len(kept)
        count = -1000
        assert grid_fakes.drive(directory, **changes).stored == 4
        assert load_results(directory).equals(expected)
    assert 20 < full_at < 199 and stored_before == 4 - 2


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 120 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let the tests mount a tmpfs: no disk to fill")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_real_disk_that_fills_up_and_one_that_is_read_only(small_disk, calm):
    changes = {"executor": grid_fakes.Inline(), "work": grid_fakes.quick}
    with pytest.raises(StoreError, match="No space left on device"):
        grid_fakes.drive(small_disk / "out", **changes)
    assert 0 < len(list((small_disk / "out" / "runs").iterdir())) < 12
    remount = ["mount", "-o", "remount,size=10m", str(small_disk)]
    subprocess.run(remount, check=True)
    assert grid_fakes.drive(small_disk / "out", **changes).stored == 12
    assert load_results(small_disk / "out").equals(load_results(calm))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StoreError, match=f"cannot write to {small_disk}.*Read-only file system"):
        grid_fakes.drive(small_disk / "out", **changes)
    assert load_results(small_disk / "out").equals(load_results(calm)), "reading needs no writing"


def test_a_folder_without_the_right_to_write(tmp_path):
    place = tmp_path / "closed"
    place.mkdir(mode=0o555)
    if os.access(place, os.W_OK):
        pytest.skip("this user may write everywhere")
    with pytest.raises(StoreError, match=r"cannot write to .*Permission denied"):
        grid_fakes.drive(place / "out", executor=grid_fakes.Inline(), work=grid_fakes.quick)


@pytest.mark.parametrize("how", ["flip", "cut"])
def test_a_damaged_result_is_run_again(tmp_path, log, how, calm):
    changes = {"executor": grid_fakes.Inline(), "work": grid_fakes.quick}
    grid_fakes.drive(tmp_path / "out", **changes)
    victim = sorted((tmp_path / "out" / "runs").iterdir())[3]
    file = victim / "rows.parquet"
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(data if how == "flip" else data[:-7])
    with pytest.warns(UserWarning, match=victim.name):
        assert load_results(tmp_path / "out")["run_id"].n_unique() == 11
    assert grid_fakes.drive(tmp_path / "out", **changes).stored == 12
    assert load_results(tmp_path / "out").equals(load_results(calm))
    assert (tmp_path / "out" / "damaged" / f"{victim.name}-0" / "rows.parquet").exists()


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    experiment = parse_experiment(SMALL | {"seeds": 2})
    run_experiment(experiment, tmp_path / "calm", executor=grid_fakes.Inline())
    jumps = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: jumps.choice([0.0, -1e9, 4e9]))
    run_experiment(experiment, tmp_path / "jumps", executor=grid_fakes.Inline())
    calm, table = (load_results(tmp_path / name) for name in ("calm", "jumps"))
    assert table.drop("wall_s").equals(calm.drop("wall_s"))
    assert table["wall_s"].is_between(0, 600).all()


def test_no_part_of_a_grid_asks_for_the_time_of_day():
    """What waits, or measures how long something took, must ask a clock that never jumps."""
    for room in ("grid", "tuning", "training"):
        for file in (ROOT / "arena" / room).rglob("*.py"):
            assert not re.search(r"\btime\.time\(|datetime", file.read_text()), file


def test_ctrl_c_again_and_again(tmp_path):
    (tmp_path / "tiny.toml").write_text(
        'name = "tiny"\narchs = ["gdn"]\nseeds = 4\nfleet_size = 2\n[model]\nd_model = 8\nn_layers = 1\n'
        "n_heads = 1\n[train]\nsteps = 100000\nbatch_size = 4\n"
        '[[tasks]]\nname = "parity"\ntrain_lengths = [3, 8]\neval_lengths = [24]\n'
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", "from arena.cli import main; main()", "grid", "tiny.toml", "--workers", "2"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # the terminal sends it to all processes of the group
    )
    assert "4 runs: 0 stored already" in driver.stdout.readline()
    wait_until(lambda: len(children(driver.pid)) >= 2)
    workers = children(driver.pid)
    while driver.poll() is None:
        os.killpg(driver.pid, signal.SIGINT)
        time.sleep(0.005)
    output, errors = driver.communicate()
    assert driver.returncode == 130 and errors == ""
    assert "to go on: arena grid tiny.toml" in output or "to start again: arena grid tiny.toml" in output
    wait_until(lambda: not any(alive(pid) for pid in workers))


def children(pid: int) -> set[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return {int(child) for task in tasks for child in task.read_text().split()}


def test_a_process_that_runs_out_of_memory(tmp_path, monkeypatch):
    """A worker that really may not have more, and a probe that does not see it coming."""
    recall = {"name": "mqar", "params": {"n_pairs": 4}, "train_lengths": [64, 64], "eval_lengths": [96]}
    experiment = parse_experiment(SMALL | {"archs": ["gdn"], "tasks": [recall]})
    run_experiment(experiment, tmp_path / "calm", executor=grid_fakes.Inline())
    config = plan_runs(experiment)[0].config
    task = synthetic_tasks.get("mqar", **config["task"]["params"])
    found = measure_footprint(ModelConfig(**config["model"]), task, TrainConfig(**config["train"]))
    monkeypatch.setenv("FAKE_BYTES", str(3 * found.per_replica))  # four do not fit, one does
    report = run_experiment(
        experiment,
        tmp_path / "tight",
        executor=LocalExecutor(workers=1),
        work=grid_fakes.train_in_little_memory,
    )
    assert (report.stored, report.failed) == (4, {})
    events = [json.loads(line) for line in (tmp_path / "tight" / "events.jsonl").read_text().splitlines()]
    assert {event["event"] for event in events} == {"halved"}
    assert "does not fit into memory" in events[0]["reason"] and events[0]["runs"] == 4
    calm, tight = (load_results(tmp_path / name).drop("wall_s", "fleet_id") for name in ("calm", "tight"))
    assert tight.equals(calm)


def test_a_block_of_somebody_else_that_raises(tmp_path, monkeypatch):
    from arena.blocks import registry
    from arena.blocks.attention import Attention

    class Raises(Attention):
        def forward(self, x, state=None):
            if x.shape[1] > 8:
                raise IndexError("only short ones,\nplease")
            return super().forward(x, state)

    monkeypatch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))

    def build(*, d_model, n_heads, outer, conv, depth):
        return Raises(
            d_model=d_model, n_heads=n_heads, outer=outer, conv=conv, window=None, rope_theta=10000.0
        )

    registry.register("raises")(build)
    experiment = parse_experiment(SMALL | {"archs": ["raises", "gdn"], "seeds": 2})
    report = run_experiment(experiment, tmp_path / "out", executor=grid_fakes.Inline())
    assert report.stored == 2 and set(report.failed.values()) == {"IndexError: only short ones, please"}
    table = load_results(tmp_path / "out")
    assert set(table.filter(arch="gdn")["status"]) == {"done"}
    assert set(table.filter(arch="raises")["status"]) == {"failed"}
