"""arena tune killed, started again, started twice; journal file, SQLite and a real PostgreSQL server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import polars as pl
import pytest
import tuning_fakes
from tuning_fakes import STUDIES, complete, drive, studies


def start(folder, url="-", seconds="0.4", log=None):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **({"FAKE_LOG": str(log)} if log else {})}
    script = Path(tuning_fakes.__file__)
    command = [sys.executable, str(script), str(folder), url, seconds]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def finish(process):
    out, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    return tuple(int(word) for word in out.split()[-3:])


def test_two_processes_share_a_folder_and_one_is_killed(tmp_path):
    """The other takes its trials over; nothing is trained by two that live."""
    folder, log = tmp_path / "out", tmp_path / "log"
    one, two = start(folder, log=log), start(folder, log=log)
    wait_for(lambda: log.exists() and log.read_text().count("start") >= 4)
    one.send_signal(signal.SIGKILL)
    one.wait()
    assert finish(two) == (36, 36, 0)
    alone = drive(tmp_path / "alone")
    winners = pl.read_parquet(folder / "tuning" / "winners.parquet")
    assert winners.equals(alone.winners)
    for study in studies(folder):
        assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 4
    started = [line.split()[1] for line in log.read_text().splitlines()]
    assert len(started) - len(set(started)) <= 1, "only what the killed one was at is trained again"
    one.stdout.close(), one.stderr.close()


def test_both_are_killed_and_one_starts_again(tmp_path):
    folder, log = tmp_path / "out", tmp_path / "log"
    both = [start(folder, log=log) for _ in range(2)]
    wait_for(lambda: log.exists() and log.read_text().count("start") >= 3)
    for process in both:
        process.kill()
        process.communicate()
    report = drive(folder)
    assert report.stored == report.planned == 36
    assert {len(complete(study)) for study in studies(folder)} == {4}


@pytest.fixture(scope="session")
def postgres():
    """A real server on loopback, in a folder of its own."""
    import shutil
    import socket

    places = [Path(path) for path in sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")))]
    initdb = shutil.which("initdb") or next(
        (str(p / "initdb") for p in places if (p / "initdb").exists()), None
    )
    if initdb is None:
        pytest.skip("no PostgreSQL server is installed (Debian: apt install postgresql)")
    pytest.importorskip("psycopg", reason="psycopg, which speaks to PostgreSQL, is not installed")
    folder = Path(tempfile.mkdtemp(prefix="arena-postgres-"))  # pytest's own are closed to other users
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    as_user: list[str] = []
    if os.geteuid() == 0:  # the server refuses to run as root
        user = next((name for name in ("postgres", "nobody") if _exists(name)), None)
        if user is None or shutil.which("setpriv") is None:
            pytest.skip("PostgreSQL does not run as root, and there is no other user to run it as")
        shutil.chown(folder, user)
        as_user = ["setpriv", "--reuid", user, "--clear-groups", "--"]
    data, server = folder / "data", str(Path(initdb).parent / "postgres")
    made = subprocess.run(
        [*as_user, initdb, "-D", str(data), "-U", "arena", "--auth=trust", "--no-sync"],
        capture_output=True, text=True, cwd="/",
    )  # fmt: skip
    if made.returncode:
        shutil.rmtree(folder)
        pytest.skip(f"initdb does not run here: {made.stderr.strip().splitlines()[-1:]}")
    if not Path(server).exists():
        server = str(next(p / "postgres" for p in places))
    process = subprocess.Popen(
        [*as_user, server, "-D", str(data), "-p", str(port), "-h", "127.0.0.1", "-k", str(folder)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/",
    )  # fmt: skip
    import psycopg

    def answers() -> bool:
        try:
            psycopg.connect(host="127.0.0.1", port=port, user="arena", dbname="postgres").close()
        except psycopg.OperationalError:
            return False
        return True

    try:
        wait_for(answers, 60)
        yield lambda name: _database(port, name)
    finally:
        process.send_signal(signal.SIGINT)  # without waiting for connections
        process.wait(timeout=30)
        shutil.rmtree(folder)


def _exists(user: str) -> bool:
    import pwd

    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True


def _database(port: int, name: str) -> str:
    import psycopg

    with psycopg.connect(
        host="127.0.0.1", port=port, user="arena", dbname="postgres", autocommit=True
    ) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"postgresql://arena@127.0.0.1:{port}/{name}"


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'tuning.db'}"
    return request.getfixturevalue("postgres")(f"t{time.monotonic_ns()}")


def test_a_database_holds_the_studies_and_two_folders_share_the_work(tmp_path, database):
    log = tmp_path / "log"
    one, two = (start(tmp_path / name, database, log=log) for name in ("one", "two"))
    counts = [finish(one), finish(two)]
    assert all(stored + elsewhere == planned == 36 for stored, planned, elsewhere in counts), counts
    tables = [pl.read_parquet(tmp_path / name / "tuning" / "winners.parquet") for name in ("one", "two")]
    assert tables[0].equals(tables[1]) and tables[0].equals(drive(tmp_path / "alone").winners)
    from arena.tuning.study import _with_driver

    found = studies(url=_with_driver(database))
    assert [len(study.trials) for study in found] == [4] * STUDIES
    assert all(trial.state.name == "COMPLETE" for study in found for trial in study.trials)
    assert not (tmp_path / "one" / "tuning" / "journal.log").exists()


def test_a_process_that_shows_no_life_is_replaced(tmp_path, monkeypatch):
    """In another folder no lock tells that it died: the one that is left waits for a while."""
    import arena.tuning.crew as crew

    url = f"sqlite:///{tmp_path / 'tuning.db'}"
    log = tmp_path / "log"
    dead = start(tmp_path / "one", url, seconds="30", log=log)
    wait_for(lambda: log.exists() and "start" in log.read_text())
    dead.kill()
    dead.communicate()
    monkeypatch.setattr(crew, "GRACE", 1.0)
    report = drive(tmp_path / "two", storage=url)
    assert report.stored == report.planned == 36
    taken = [t for study in studies(url=url) for t in study.trials if t.user_attrs.get("attempts") == 2]
    assert taken and all(trial.state.name == "COMPLETE" for trial in taken)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("tuning.db", "no database URL"),
        ("nosql:///x", "nosql"),
        ("sqlite:////nowhere/at/all/x.db", "unable to open database file"),
        ("postgresql://arena@127.0.0.1:1/x", "--storage: "),
    ],
)
def test_a_storage_that_is_none_is_refused_in_one_line(tmp_path, url, message):
    from arena.grid import ExperimentError
    from arena.tuning.study import open_storage

    with pytest.raises(ExperimentError, match=message) as error:
        open_storage(url, tmp_path)
    assert "\n" not in str(error.value)


def test_a_torn_last_line_of_the_journal_is_dropped(tmp_path):
    drive(tmp_path, archs=["gdn", "swa"])
    path = tmp_path / "tuning" / "journal.log"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code": 4, "work')
    assert drive(tmp_path, archs=["gdn", "swa"]).stored == 2 * 2 * 6
    assert path.read_bytes() == whole


def test_a_grid_and_a_tuning_do_not_write_into_one_folder_at_once(tmp_path):
    from arena.grid.store import Store, StoreError

    refused = pytest.raises(StoreError, match="in use by another arena process")
    with Store(tmp_path, shared=True), Store(tmp_path, shared=True), refused, Store(tmp_path):
        pass
    with Store(tmp_path), refused, Store(tmp_path, shared=True):
        pass
