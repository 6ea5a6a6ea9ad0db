"""Result folders made to mislead: names that leave the folder, links, tables and models of something else."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import warnings

import polars as pl
import pytest

from arena.grid.results import load_environments, load_model, load_results
from arena.grid.store import Store, StoreError
from tests.arena import fuzzing

TINY = ""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return fuzzing.train(tmp_path_factory.mktemp("untrusted"))


@pytest.fixture
def folder(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "out")
    return tmp_path / "out"


def forge(path, data: bytes) -> None:
    """Write a file of a run with a checksum that is right."""
    path.write_bytes(data)
    sums = json.loads((path.parent / "checksums.json").read_text())
    (path.parent / "checksums.json").write_text(
        json.dumps({**sums, path.name: hashlib.sha256(data).hexdigest()})
    )


@pytest.mark.parametrize(
    "name", [".lock", "plan.json.writing", "runs", "staging", "report", "runs/0123456789abcdef"]
)
def test_a_link_is_not_followed(folder, here, tmp_path, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    target = outside if "." not in name else outside / "file"
    path = folder / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    with pytest.raises(StoreError, match=r"is a link|cannot write"), Store(folder) as store:
        store.record_request("tiny", "", [])
    assert [entry.name for entry in outside.iterdir()] == ["file"]
    assert (outside / "file").read_text() == "mine"
    if name in ("runs", "report"):
        status, _, err = here("report", folder)
        assert status == 2 and "is a link" in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["../../up", "/up", "..", "a/b", "a\0b", "", "x" * 65, "é"])
def test_a_run_id_is_no_path(folder, here, name):
    plan = json.loads((folder / "plan.json").read_text())
    plan["runs"][name] = {"trial": 0}
    (folder / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(StoreError, match="is no run id"):
        load_results(folder)
    with pytest.raises(StoreError, match="holds no run"):
        load_model(folder, name)
    status, _, err = here("report", folder)
    assert status == 2 and err.count("\n") == 1


def test_a_table_that_names_another_run_is_left_out(folder, here):
    first, second = sorted((folder / "runs").iterdir())
    rows = pl.read_parquet(first / "rows.parquet")
    for frame in (
        rows.with_columns(run_id=pl.lit("../../up")),
        rows.with_columns(task=pl.lit(None, dtype=pl.String)),
        pl.DataFrame({"run_id": [1]}),
    ):
        buffer = io.BytesIO()
        frame.write_parquet(buffer)
        forge(first / "rows.parquet", buffer.getvalue())
        with pytest.warns(UserWarning, match="left out: .* cannot be used"):
            assert set(load_results(folder)["run_id"]) == {second.name}
    forge(first / "environment.json", b"[1]")
    with pytest.warns(UserWarning, match="no JSON object"):
        assert set(load_environments(folder)) == {second.name}


@pytest.mark.parametrize(
    "change",
    [
        {"n_layers": 10**9}, {"d_model": 2**40}, {"vocab_size": 10**12}, {"mlp_hidden": 10**9},
        {"arch": "../x"}, {"options": {"slots": 1}}, {"unknown": 1}, {"d_model": "8"}, {"n_heads": 0},
    ],
    ids=str,
)  # fmt: skip
def test_a_model_that_its_weights_are_not_of_is_not_built(folder, change):
    run = min((folder / "runs").iterdir())
    config = json.loads((run / "config.json").read_text())
    config["model"].update(change)
    forge(run / "config.json", json.dumps(config).encode())
    with pytest.raises(StoreError, match="does not hold a model that can be built"):
        load_model(folder, run.name)


def test_an_honest_folder_is_read(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        rows = load_results(folder)
    assert rows["run_id"].n_unique() == 2
    for run_id in rows["run_id"].unique():
        load_model(folder, run_id)
