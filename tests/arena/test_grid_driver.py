"""The grid under fire: kills, failures, splits, several workers. Training is faked (grid_fakes.py)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import grid_fakes
import pytest

from arena.grid import StoreError, load_results

HERE = Path(__file__).parent


@pytest.fixture
def log(tmp_path, monkeypatch):
    path = tmp_path / "log"
    monkeypatch.setenv("FAKE_LOG", str(path))
    return path


def starts(log: Path) -> list[str]:
    return [line.split()[1] for line in log.read_text().splitlines() if line.startswith("start")]


def stored(directory: Path) -> set[str]:
    return {folder.name for folder in (directory / "runs").glob("*")}


def fleets_of(directory: Path) -> dict[str, list[str]]:
    return {path.stem: json.loads(path.read_text()) for path in (directory / "fleets").glob("*.json")}


def start_driver(directory: Path, workers: int, kind: str = "work") -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(HERE / "grid_fakes.py"), str(directory), str(workers), kind],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_two_workers_equal_one(tmp_path):
    grid_fakes.drive(tmp_path / "one", workers=1)
    grid_fakes.drive(tmp_path / "two", workers=2)
    assert load_results(tmp_path / "one").equals(load_results(tmp_path / "two"))


def test_the_second_invocation_trains_nothing(tmp_path, log):
    grid_fakes.drive(tmp_path / "out", workers=2)
    count = len(starts(log))
    assert count == 8
    report = grid_fakes.drive(tmp_path / "out", workers=2)
    assert (report.stored, report.failed, len(starts(log))) == (12, {}, count)


def test_a_second_driver_is_refused_and_a_killed_one_is_not_in_the_way(tmp_path, log):
    driver = start_driver(tmp_path / "out", 1, "slow")
    try:
        wait_until(log.exists)
        with pytest.raises(StoreError, match=f"in use by another arena process.*process {driver.pid}"):
            grid_fakes.drive(tmp_path / "out")
    finally:
        driver.kill()
        driver.wait()
    assert grid_fakes.drive(tmp_path / "out").stored == 12


def test_a_failing_fleet_is_recorded_and_does_not_stop_the_others(tmp_path):
    report = grid_fakes.drive(tmp_path / "out", workers=2, work=grid_fakes.raise_in_one_group)
    assert report.stored == 9 and len(report.failed) == 3
    assert set(report.failed.values()) == {"ArithmeticError: two and two is five"}
    table = load_results(tmp_path / "out")
    failed = table.filter(table["status"] == "failed")
    assert failed["arch"].to_list() == ["arch1"] * 3 and failed["value"].is_null().all()
    assert sorted(failed["seed"]) == [0, 1, 2]
    assert failed["reason"].unique().to_list() == ["ArithmeticError: two and two is five"]
    record = next((tmp_path / "out" / "failures").glob("*.json")).read_text()
    assert "raise_in_one_group" in record  # the traceback
    # tried again, and forgotten once it works
    report = grid_fakes.drive(tmp_path / "out")
    assert report.stored == 12 and not report.failed
    assert set(load_results(tmp_path / "out")["status"]) == {"done"}
    assert not list((tmp_path / "out" / "failures").iterdir())


def test_a_dying_worker_is_noticed_and_its_fleet_tried_once_more(tmp_path, log):
    report = grid_fakes.drive(tmp_path / "out", workers=2, work=grid_fakes.die_in_one_group)
    assert report.stored == 9 and len(report.failed) == 3
    assert all("SIGKILL" in reason for reason in report.failed.values())
    arch1 = {f for f, members in _planned_fleets("arch1").items()}
    assert sorted(f for f in starts(log) if f in arch1) == sorted([*arch1, *arch1])
    report = grid_fakes.drive(tmp_path / "other", work=grid_fakes.die_once)
    assert report.stored == 12 and not report.failed


def _planned_fleets(arch: str) -> dict[str, list[str]]:
    from arena.grid.fleets import plan_fleets

    fleets = plan_fleets(grid_fakes.make_runs(), 2)
    return {f.id: [run.id for run in f.runs] for f in fleets if f.runs[0].config["model"]["arch"] == arch}


def test_a_fleet_that_does_not_fit_is_split_and_the_split_is_kept(tmp_path, log):
    report = grid_fakes.drive(tmp_path / "out", work=grid_fakes.two_fit, fleet_size=8, groups=1, seeds=7)
    assert report.stored == 7 and not report.failed
    table = load_results(tmp_path / "out")
    sizes = sorted(table.select("fleet_id", "run_id").unique()["fleet_id"].value_counts()["count"])
    assert sizes == [1, 2, 2, 2]
    # a lost result is trained again with the same mates
    before = set(table["fleet_id"])
    victim = table["run_id"][0]
    shutil.rmtree(tmp_path / "out" / "runs" / victim)
    log.unlink()
    grid_fakes.drive(tmp_path / "out", work=grid_fakes.two_fit, fleet_size=8, groups=1, seeds=7)
    assert len(starts(log)) == 1 and set(starts(log)) <= before
    assert load_results(tmp_path / "out").equals(table)


def test_more_seeds_leave_what_is_finished(tmp_path, log):
    grid_fakes.drive(tmp_path / "out", fleet_size=8, groups=1, seeds=3)
    before = load_results(tmp_path / "out")
    grid_fakes.drive(tmp_path / "out", fleet_size=8, groups=1, seeds=5)
    assert len(starts(log)) == 2
    after = load_results(tmp_path / "out")
    assert after.filter(after["seed"] < 3).equals(before) and after["run_id"].n_unique() == 5


def test_runs_of_an_earlier_request_stay_out_of_the_table(tmp_path):
    grid_fakes.drive(tmp_path / "out", groups=1)
    report = grid_fakes.drive(tmp_path / "out", groups=1, steps=20)
    assert report.others == 3
    assert load_results(tmp_path / "out")["run_id"].n_unique() == 3
    assert load_results(tmp_path / "out", all_requests=True)["run_id"].n_unique() == 6


def test_ctrl_c_stops_and_what_finished_is_kept(tmp_path, log):
    driver = start_driver(tmp_path / "out", 2)
    wait_until(lambda: (tmp_path / "out" / "runs").exists() and len(stored(tmp_path / "out")) >= 2)
    driver.send_signal(signal.SIGINT)
    output, errors = driver.communicate(timeout=60)
    assert "interrupted=True" in output and "Traceback" not in errors
    pids = {int(line.split()[2]) for line in log.read_text().splitlines()}
    assert not any(alive(pid) for pid in pids)
    assert grid_fakes.drive(tmp_path / "out").stored == 12


def test_threads_are_shared_out(monkeypatch):
    from arena.grid.executors import local

    monkeypatch.setattr(local, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert local.share_cores(None, 100) == (8, 1)
    assert local.share_cores(2, 100) == (2, 4)
    assert local.share_cores(None, 3) == (3, 2)
    assert local.share_cores(16, 100) == (16, 1)
    assert local.share_cores(4, 0) == (1, 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert local.share_cores(2, 100) == (2, 1)


def test_workers_get_their_threads(tmp_path, monkeypatch):
    from arena.grid.executors import local

    monkeypatch.setattr(local, "cpu_count", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    report = grid_fakes.drive(tmp_path / "out", workers=2, work=grid_fakes.threads_seen)
    assert set(report.failed.values()) == {"RuntimeError: OMP 3 MKL 3"}
    assert "OMP_NUM_THREADS" not in os.environ


@pytest.mark.parametrize(("visible", "expected"), [(None, {"0", "1"}), ("5,7", {"5", "7"})])
def test_workers_share_out_the_gpus(monkeypatch, visible, expected):
    from collections import deque

    from arena.grid.executors import LocalExecutor, Slots
    from arena.grid.fleets import plan_fleets

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    queue = deque(plan_fleets(grid_fakes.make_runs(groups=3, seeds=1), 1))
    slots = Slots(workers=3, threads=1)
    events = list(LocalExecutor(gpus=2).run(queue, grid_fakes.gpu_seen, slots))
    seen = [event.reason.removeprefix("RuntimeError: ") for event in events if event.kind == "error"]
    assert len(seen) == 3 and set(seen) == expected
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible
