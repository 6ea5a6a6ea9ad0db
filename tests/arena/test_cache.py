"""The cache of a big result folder: it says what the folders of the runs say, or nothing."""

from __future__ import annotations

import os
import shutil
import time

import pytest

from arena.grid import Store, load_results
from arena.grid import cache as caching
from arena.grid import rows as row_tables
from arena.grid import store as stores
from arena.grid.fleets import plan_fleets
from arena.grid.results import cache_results
from tests.arena.grid_fakes import files, make_runs


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Twelve runs are many here, and files are at rest after 50 ms."""
    for module in (caching, row_tables, stores):
        monkeypatch.setattr(module, "FROM_RUNS", 4)
    monkeypatch.setattr(caching, "REST", 0.05)


@pytest.fixture
def folder(tmp_path):
    runs = make_runs()
    with Store(tmp_path) as store:
        store.record_request("fake", "", runs)
        for fleet in plan_fleets(runs, 3):
            store.commit(fleet, {run.id: files(run, fleet.id) for run in fleet.runs})
    time.sleep(0.1)
    return tmp_path


def truth(folder):
    """The table without a cache."""
    shutil.rmtree(folder / "cache", ignore_errors=True)
    return load_results(folder)


@pytest.fixture
def opened(monkeypatch):
    """Names of the runs whose rows are read from their folders."""
    from arena.grid import results

    seen = []
    real = results._parsed

    def parsed(folder, name, parse):
        seen.append(folder.name)
        return real(folder, name, parse)

    monkeypatch.setattr(results, "_parsed", parsed)
    return seen


def test_second_read_opens_no_run_and_says_the_same(folder, opened):
    first = load_results(folder)
    assert len(opened) == 12
    opened.clear()
    assert load_results(folder).equals(first)
    assert opened == []


@pytest.mark.parametrize("keep_date", [False, True])
def test_an_altered_file_is_read_again_even_with_its_old_date(folder, opened, keep_date):
    load_results(folder)
    opened.clear()
    path = sorted((folder / "runs").iterdir())[5] / "rows.parquet"
    before, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    if keep_date:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.warns(UserWarning, match="left out"):
        table = load_results(folder)
    assert opened == [path.parent.name]
    assert path.parent.name not in table["run_id"].to_list()


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "version", "schema"])
def test_a_cache_that_cannot_be_used_is_passed_over(folder, opened, harm, monkeypatch):
    first = load_results(folder)
    (path,) = (folder / "cache").glob("*.rows")
    data = bytearray(path.read_bytes())
    if harm == "flip":
        data[-200] ^= 4
        path.write_bytes(data)
    elif harm in ("cut", "empty"):
        path.write_bytes(data[: len(data) // 2] if harm == "cut" else b"")
    elif harm == "version":
        monkeypatch.setattr(caching, "_VERSION", 2)
    else:
        monkeypatch.setattr(row_tables, "digest", lambda _: "another")
    opened.clear()
    assert load_results(folder).equals(first)
    assert len(opened) == 12


def test_a_copied_cache_is_not_believed(folder, opened, tmp_path_factory):
    load_results(folder)
    copy = tmp_path_factory.mktemp("copy") / "grid"
    shutil.copytree(folder, copy)
    opened.clear()
    load_results(copy)
    assert len(opened) == 12


def test_a_run_that_is_gone_is_gone(folder):
    load_results(folder)
    gone = sorted((folder / "runs").iterdir())[3]
    shutil.rmtree(gone)
    assert gone.name not in load_results(folder)["run_id"].to_list()


def test_files_that_were_just_written_are_not_recorded(folder, monkeypatch):
    monkeypatch.setattr(caching, "REST", 3600.0)
    load_results(folder)
    assert not list((folder / "cache").glob("*")) if (folder / "cache").exists() else True


def test_no_cache_where_it_cannot_be_written(folder, monkeypatch):
    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(caching, "open_own", refuse)
    first = load_results(folder)
    assert load_results(folder).equals(first)
    assert not list((folder / "cache").glob("*.rows"))


def test_pieces_are_merged_and_half_written_ones_removed(folder, opened, monkeypatch):
    monkeypatch.setattr(row_tables, "MOST_FILES", 2)
    expected = truth(folder)
    shutil.rmtree(folder / "cache")
    ids = sorted(run.name for run in (folder / "runs").iterdir())
    (folder / "cache").mkdir()
    (folder / "cache" / "1-x.rows.writing").write_bytes(b"half")
    for start in range(0, 12, 4):
        assert cache_results(folder, ids[start : start + 4]) == set(ids[start : start + 4])
    assert len(list((folder / "cache").iterdir())) <= 2
    opened.clear()
    assert load_results(folder).equals(expected)
    assert opened == []


def test_resumed_grid_reads_no_run_twice_but_sees_damage(folder, monkeypatch):
    ids = [run.id for run in make_runs()]
    checked = []
    real = stores.damage
    monkeypatch.setattr(stores, "damage", lambda path: checked.append(path.name) or real(path))
    with Store(folder) as store:
        assert store.finished(ids) == set(ids)
    assert len(checked) == 12
    checked.clear()
    with Store(folder) as store:
        assert store.finished(ids) == set(ids)
    assert checked == []
    model = folder / "runs" / ids[0] / "model.safetensors"
    before, data = model.stat(), model.read_bytes()
    model.write_bytes(b"#" + data[1:])
    os.utime(model, ns=(before.st_atime_ns, before.st_mtime_ns))
    with Store(folder) as store:
        assert store.finished(ids) == set(ids[1:])
    assert set(checked) == {ids[0]}


def test_work_grows_with_the_number_of_runs(tmp_path, monkeypatch):
    """Calls of the system, not seconds: twice the runs, no more than twice the calls."""
    counts = {}
    for groups in (8, 16):
        directory = tmp_path / str(groups)
        runs = make_runs(groups=groups)
        with Store(directory) as store:
            store.record_request("fake", "", runs)
            for fleet in plan_fleets(runs, 3):
                store.commit(fleet, {run.id: files(run, fleet.id) for run in fleet.runs})
        time.sleep(0.1)
        load_results(directory)
        calls = []
        for name in ("stat", "open", "scandir"):
            real = getattr(os, name)
            monkeypatch.setattr(
                os, name, lambda *a, _real=real, _calls=calls, **k: _calls.append(1) or _real(*a, **k)
            )
        load_results(directory)
        monkeypatch.undo()
        monkeypatch.setattr(caching, "REST", 0.05)
        for module in (caching, row_tables, stores):
            monkeypatch.setattr(module, "FROM_RUNS", 4)
        counts[groups] = len(calls)
    assert counts[16] <= 2 * counts[8]
    assert counts[16] <= 3 * 48 + 20


def test_ids_are_the_digests_of_the_configuration():
    """However the texts of its parts were come by."""
    import tomllib

    from arena.grid.experiment import parse_experiment
    from arena.grid.plan import digest, plan_settings

    text = """
    name = "x"
    archs = ["gdn"]
    train = { steps = 3 }
    tasks = [{ name = "parity", train_lengths = 8, eval_lengths = 40 }]
    """
    (setting,) = plan_settings(parse_experiment(tomllib.loads(text)))
    for changes in ({}, {"train": {"steps": 9}}):
        run = setting.run(seed=1, trial=0, point={"lr": 0.1}, **changes)
        assert run.config["train"]["steps"] == (9 if changes else 3)
        assert run.id == digest(run.config)
        assert run.group == digest({k: v for k, v in run.config.items() if k != "replica"})
