"""One grid in every engine: the same table; what is lost, runs out of memory or raises, in each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import grid_fakes
import pytest
from slurm_fakes import alive

from arena.grid import ExperimentError, load_results, make_executor

HERE = Path(__file__).parent


def wait_until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def events_of(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """The undisturbed table."""
    directory = tmp_path_factory.mktemp("calm") / "out"
    grid_fakes.drive(directory, executor=grid_fakes.Inline())
    return load_results(directory)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    path = tmp_path_factory.mktemp("log") / "log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAKE_LOG", str(path))
        yield path


@pytest.fixture(scope="module")
def cluster(log):  # nodes have the environment that they were started in
    """A Ray cluster of two nodes on this machine, each with processes of its own."""
    pytest.importorskip("ray", reason="ray is not installed: extra [cluster]")
    import ray
    from ray.cluster_utils import Cluster

    system = {"health_check_period_ms": 500, "health_check_failure_threshold": 6}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": system})
    try:
        cluster.add_node(num_cpus=1)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def ray_on(cluster, directory):
    return make_executor("ray", directory=directory, address=cluster.address)


def test_ray_gives_the_same_table_and_events(cluster, tmp_path, calm):
    directory = tmp_path / "out"
    seen = []
    report = grid_fakes.drive(directory, executor=ray_on(cluster, directory), on_event=seen.append)
    assert (report.stored, report.failed) == (12, {})
    assert load_results(directory).equals(calm)
    kinds = [event.kind for event in seen]
    assert kinds.count("done") == kinds.count("started") == 8
    for event in seen:
        if event.kind == "done":
            before = [e.kind for e in seen[: seen.index(event)] if e.fleet.id == event.fleet.id]
            assert before[0] == "started"


def test_ray_records_what_fails_and_halves_what_does_not_fit(cluster, tmp_path):
    directory = tmp_path / "raises"
    report = grid_fakes.drive(
        directory, executor=ray_on(cluster, directory), work=grid_fakes.raise_in_one_group
    )
    assert report.stored == 9 and set(report.failed.values()) == {"ArithmeticError: two and two is five"}
    directory = tmp_path / "large"
    report = grid_fakes.drive(
        directory,
        executor=ray_on(cluster, directory),
        work=grid_fakes.two_fit,
        fleet_size=8,
        groups=1,
        seeds=7,
    )
    assert report.stored == 7 and not report.failed
    assert [event["event"] for event in events_of(directory)] == ["halved"] * 3
    directory = tmp_path / "dies"
    report = grid_fakes.drive(
        directory, executor=ray_on(cluster, directory), work=grid_fakes.die_in_one_group, groups=2
    )
    assert report.stored == 3 and len(report.failed) == 3
    assert all("Ray has given up" in reason for reason in report.failed.values())


def test_ray_calls_a_function_on_a_worker(cluster, tmp_path):
    ray = ray_on(cluster, tmp_path)
    assert ray.call(os.getpid) != os.getpid()
    with pytest.raises(ExperimentError, match=r"^no such thing$"):
        ray.call(grid_fakes.refuse, "no such thing")


def test_ray_runs_elsewhere_what_a_killed_node_had(cluster, tmp_path, log, calm):
    """kill -9 of a node's processes while it trains a fleet."""
    node = cluster.add_node(num_cpus=1)
    raylet = node.all_processes["raylet"][0].process.pid
    directory = tmp_path / "out"
    lost: list[str] = []
    events = []
    log.unlink(missing_ok=True)

    def kill_the_node(event):
        events.append(event)
        if lost:
            return
        begun = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
        known = {event.fleet.id for event in events if event.kind == "started"}  # told, not only begun
        on_node = [fleet for _, fleet, pid in begun if fleet in known and parent(int(pid)) == raylet]
        if on_node:
            lost.append(on_node[-1])
            cluster.remove_node(node, allow_graceful=False)
            log.with_name(log.name + ".release").touch()

    report = grid_fakes.drive(
        directory, executor=ray_on(cluster, directory), work=grid_fakes.until_released, on_event=kill_the_node
    )
    assert lost, "no fleet began on the node"
    assert (report.stored, report.failed) == (12, {})
    assert load_results(directory).equals(calm)
    starts = [line.split()[1] for line in log.read_text().splitlines()]
    assert starts.count(lost[0]) == 2 and len(starts) == 9, "what the node had ran again, and nothing else"
    # told over the board, which a busy machine may be late with: none of another fleet
    assert {event.fleet.id for event in events if event.kind == "retried"} <= set(lost)


def parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return None


@pytest.fixture
def submitit():
    return pytest.importorskip("submitit", reason="submitit is not installed: extra [cluster]")


@pytest.fixture
def slurm(submitit, tmp_path, monkeypatch):
    """sbatch, srun, sacct and scancel that run jobs on this machine; the folder of their jobs."""
    folder = tmp_path / "cluster"
    (folder / "bin").mkdir(parents=True)
    for name in ("sbatch", "srun", "sacct", "scancel"):
        script = folder / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {HERE / "slurm_fakes.py"} {name} "$@"\n')
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), *sys.path]))
    return folder


def slurm_on(directory, **parameters):
    return make_executor("slurm", directory=directory, workers=2, slurm=parameters)


@pytest.mark.parametrize("kind", ["local", "debug"])
def test_submitit_without_slurm_gives_the_same_table(submitit, kind, tmp_path, monkeypatch, calm):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), *sys.path]))
    directory = tmp_path / "out"
    report = grid_fakes.drive(directory, executor=slurm_on(directory, cluster=kind), work=grid_fakes.quick)
    assert (report.stored, report.failed) == (12, {})
    assert load_results(directory).equals(calm)
    assert not list((directory / "slurm").rglob("*.pkl")), "left behind"


def test_an_array_job_gives_the_same_table(slurm, tmp_path, calm):
    directory = tmp_path / "out"
    report = grid_fakes.drive(directory, executor=slurm_on(directory, time=5), work=grid_fakes.quick)
    assert (report.stored, report.failed) == (12, {})
    assert load_results(directory).equals(calm)
    (text,) = [path.read_text() for path in slurm.glob("*.sh")]
    assert "#SBATCH --array=0-7%2" in text and "#SBATCH --time=5" in text
    assert "#SBATCH --cpus-per-task=1" in text and "gpus" not in text


def test_slurm_records_what_fails_and_halves_what_does_not_fit(slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    directory = tmp_path / "raises"
    executor = slurm_on(directory, time=5)
    report = grid_fakes.drive(directory, executor=executor, work=grid_fakes.raise_in_one_group, groups=2)
    assert report.stored == 3 and set(report.failed.values()) == {"ArithmeticError: two and two is five"}
    directory = tmp_path / "large"
    executor = slurm_on(directory, time=5)
    report = grid_fakes.drive(
        directory, executor=executor, work=grid_fakes.two_fit, fleet_size=4, groups=1, seeds=3
    )
    assert report.stored == 3 and not report.failed
    directory = tmp_path / "dies"
    executor = slurm_on(directory, cluster="local")
    report = grid_fakes.drive(directory, executor=executor, work=grid_fakes.die_in_one_group, groups=2)
    assert report.stored == 3 and len(report.failed) == 3
    assert all("ended without a result" in reason for reason in report.failed.values())


def test_jobs_end_with_the_driver_and_those_of_a_killed_one_with_the_next(slurm, tmp_path, monkeypatch, calm):
    log = tmp_path / "log"
    monkeypatch.setenv("FAKE_LOG", str(log))
    directory = tmp_path / "out"

    def stop(event):
        if event.kind == "started":
            raise KeyboardInterrupt

    executor = slurm_on(directory, time=5)
    report = grid_fakes.drive(directory, executor=executor, work=grid_fakes.until_released, on_event=stop)
    assert report.interrupted
    wait_until(lambda: not jobs_alive(slurm))

    driver = subprocess.Popen([sys.executable, str(HERE / "grid_fakes.py"), str(directory), "slurm", "held"])
    wait_until(lambda: jobs_alive(slurm))
    driver.kill()
    driver.wait()
    assert jobs_alive(slurm), "a job outlives its driver"
    before = jobs_alive(slurm)
    report = grid_fakes.drive(directory, executor=slurm_on(directory, time=5), work=grid_fakes.quick)
    assert (report.stored, report.failed) == (12, {})
    assert not before & jobs_alive(slurm)
    assert load_results(directory).equals(calm)


def jobs_alive(slurm: Path) -> set[int]:
    pids = {int(path.read_text() or 0) for path in slurm.glob("*.pid")}
    return {pid for pid in pids if pid and alive(pid)}


def test_a_function_is_called_in_a_job(slurm, tmp_path):
    assert slurm_on(tmp_path / "out", time=5).call(os.getpid) != os.getpid()
    with pytest.raises(ExperimentError, match=r"^no such thing$"):
        slurm_on(tmp_path / "out", time=5).call(grid_fakes.refuse, "no such thing")
