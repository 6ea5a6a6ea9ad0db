"""The store: whole or not at all, at every instant; damage is seen; one writer."""

from __future__ import annotations

import errno
import json
import os
import warnings
from pathlib import Path

import grid_fakes
import polars as pl
import pytest

from arena.grid import Fleet, Store, StoreError, load_curves, load_environments, load_results
from arena.grid.results import CURVE_SCHEMA, ROW_SCHEMA
from arena.grid.store import RUN_FILES, damage

FLEET = Fleet(runs=tuple(grid_fakes.make_runs(groups=1, seeds=3)))
RESULTS = {run.id: grid_fakes.files(run, FLEET.id) for run in FLEET.runs}


class Killed(BaseException):
    """Stands for kill -9: nothing in the store may catch it."""


def content(directory: Path) -> dict[str, bytes]:
    return {
        str(f.relative_to(directory)): f.read_bytes() for f in (directory / "runs").rglob("*") if f.is_file()
    }


def kill_at(monkeypatch, instant: int) -> list[str]:
    """Raise before the given one of the system calls that change or flush files; the calls made so far."""
    calls: list[str] = []
    for name in ("rename", "replace", "fsync", "rmdir", "mkdir", "unlink"):
        real = getattr(os, name)

        def call(*args, name=name, real=real, **kwargs):
            if len(calls) == instant:
                raise Killed
            calls.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)
    return calls


def test_killed_before_every_single_system_call(tmp_path):
    with Store(tmp_path / "calm") as store:
        store.record_failure(FLEET.runs, "earlier", "")
        store.commit(FLEET, RESULTS)
    expected = content(tmp_path / "calm")
    assert len(expected) == 3 * (len(RUN_FILES) + 1)
    outcomes = set()
    for instant in range(200):
        directory = tmp_path / str(instant)
        with Store(directory) as store:
            store.record_failure(FLEET.runs, "earlier", "")
        with pytest.MonkeyPatch.context() as patch:
            store = Store(directory)
            store.__enter__()
            kill_at(patch, instant)
            try:
                store.commit(FLEET, RESULTS)
                killed = False
            except Killed:
                killed = True
        os.close(store._lock)
        for folder in (directory / "runs").iterdir():
            assert damage(folder) is None  # never a half-written run, even before recovery
        with Store(directory) as store:
            finished = store.finished(RESULTS)
            assert finished in (set(), set(RESULTS))
            assert not list(store.staging.iterdir())
            outcomes.add(bool(finished))
            store.commit(FLEET, RESULTS)
            assert store.finished(RESULTS) == set(RESULTS)
            assert not list(store.failures.iterdir())
        assert content(directory) == expected
        if not killed:
            break
    assert not killed and instant > 20 and outcomes == {True, False}


def test_killed_while_recovering(tmp_path):
    for instant in range(200):
        directory = tmp_path / str(instant)
        store = Store(directory)
        store.__enter__()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store, "_move_in", lambda whole: None)  # killed right after the commit point
            store.commit(FLEET, RESULTS)
        os.close(store._lock)
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, instant)
            second = Store(directory)
            try:
                with second:
                    killed = False
            except Killed:
                killed = True
                if second._lock is not None:
                    os.close(second._lock)
        with Store(directory) as store:
            assert store.finished(RESULTS) == set(RESULTS)
        if not killed:
            break
    assert not killed and instant > 5


@pytest.mark.parametrize("name", [*RUN_FILES, "checksums.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "delete"])
def test_damage_is_seen_set_aside_and_run_again(tmp_path, name, how):
    with Store(tmp_path) as store:
        store.commit(FLEET, RESULTS)
    victim = FLEET.runs[1].id
    file = tmp_path / "runs" / victim / name
    data = bytearray(file.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
    elif how == "cut":
        file.write_bytes(data[: len(data) // 2])
    else:
        file.unlink()
    with Store(tmp_path) as store:
        assert store.finished(RESULTS) == set(RESULTS) - {victim}
        assert (tmp_path / "damaged" / f"{victim}-0").is_dir()
        others = {
            run_id: (tmp_path / "runs" / run_id).stat().st_mtime_ns for run_id in store.finished(RESULTS)
        }
        store.commit(FLEET, RESULTS)
        assert store.finished(RESULTS) == set(RESULTS)
    assert all((tmp_path / "runs" / run_id).stat().st_mtime_ns == then for run_id, then in others.items())


def test_damaged_rows_are_left_out_loudly(tmp_path):
    with Store(tmp_path) as store:
        store.record_request("fake", "", FLEET.runs)
        store.commit(FLEET, RESULTS)
    victim = FLEET.runs[0].id
    file = tmp_path / "runs" / victim / "rows.parquet"
    file.write_bytes(file.read_bytes()[:-9] + b"123456789")
    with pytest.warns(UserWarning, match=rf"{victim}.*damaged"):
        table = load_results(tmp_path)
    assert set(table["run_id"]) == set(RESULTS) - {victim}


def test_tables_have_the_stated_columns(tmp_path):
    with Store(tmp_path) as store:
        store.record_request("fake", "", FLEET.runs)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert load_results(tmp_path).is_empty()
        store.commit(FLEET, RESULTS)
    assert dict(load_results(tmp_path).schema) == ROW_SCHEMA
    assert dict(load_curves(tmp_path).schema) == CURVE_SCHEMA
    assert load_environments(tmp_path) == {run_id: {} for run_id in sorted(RESULTS)}
    stated = """experiment run_id fleet_id arch model_params task task_params seed trial split eval_length
    metric value chance n_examples params state_bytes steps train_tokens lr weight_decay wall_s device backend
    dtype status version"""
    assert set(stated.split()) <= set(ROW_SCHEMA)
    assert load_results(tmp_path).filter(pl.col("seed") == 1)["fleet_id"].unique().to_list() == [FLEET.id]


def test_a_full_disk_is_one_line_and_the_next_start_goes_on(tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for call in ("fsync", "rename"):
        with Store(tmp_path) as store:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, call, full)
                with pytest.raises(StoreError, match=r"cannot write to .*: No space left on device"):
                    store.commit(FLEET, RESULTS)
                with pytest.raises(StoreError, match="No space left"):
                    patch.setattr(os, "fsync", full)
                    store.record_failure(FLEET.runs, "reason", "")
            assert store.finished(RESULTS) == set()
    with Store(tmp_path) as store:
        store.commit(FLEET, RESULTS)
        assert store.finished(RESULTS) == set(RESULTS)


def test_another_experiment_is_refused(tmp_path):
    with Store(tmp_path) as store:
        store.record_request("fake", "", FLEET.runs)
        with pytest.raises(StoreError, match="holds experiment 'fake', not 'other'"):
            store.record_request("other", "", [])


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write to"), Store(tmp_path / "file"):
        pass
    with pytest.raises(StoreError, match="not a result folder"):
        load_results(tmp_path / "nothing")
    (tmp_path / "plan.json").write_text("{")
    (tmp_path / "runs").mkdir()
    with pytest.raises(StoreError, match="cannot be read"):
        load_results(tmp_path)
    (tmp_path / "plan.json").write_text(json.dumps([]))
    with pytest.raises(StoreError, match="is not a plan"):
        load_results(tmp_path)


def test_what_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "experiment.toml").write_text("mine")
    (tmp_path / "staging").mkdir()
    (tmp_path / "staging" / "x.partial").write_text("mine")
    with pytest.raises(StoreError, match="holds other files and is no result folder"), Store(tmp_path):
        pass
    assert (tmp_path / "experiment.toml").read_text() == "mine" and not (tmp_path / ".lock").exists()
    assert (tmp_path / "staging" / "x.partial").read_text() == "mine"


@pytest.mark.parametrize("folder", ["fleets", "failures"])
def test_a_damaged_record_is_named(tmp_path, folder):
    with Store(tmp_path) as store:
        store.record_request("fake", "", FLEET.runs)
    name = f"{FLEET.runs[0].id}.json"
    (tmp_path / folder / name).write_text("{")
    with pytest.raises(StoreError, match=f"{name} cannot be read.*delete it"), Store(tmp_path) as store:
        load_results(tmp_path)
        store.recorded_fleets()


def test_the_lock_is_dropped_on_leaving(tmp_path):
    with Store(tmp_path), pytest.raises(StoreError, match="in use"), Store(tmp_path):
        pass
    with Store(tmp_path):
        pass
