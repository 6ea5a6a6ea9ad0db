"""`arena compare`: differences against plain Python, what is beyond noise, settings, refusals."""

from __future__ import annotations

import json
import sys

import numpy as np
import polars as pl
import pytest
from page_checks import Page, check_alone
from test_report import make_rows

from arena.grid import StoreError
from arena.report import compare as entry
from arena.report import differences
from arena.report.compare import compare
from arena.report.differences import difference_table, request_changes, run_changes


def side(seeds=12, shift=0.0, first=0, archs=("gdn", "lstm"), noise=0.02, **columns):
    """Runs whose accuracy is 0.6, plus noise of the seed, plus a shift of gdn."""

    def accuracy(arch, trial, seed, split, length):
        luck = np.random.default_rng([seed, length, len(arch)]).normal(0, noise)
        own = np.random.default_rng([seed, length, len(arch), int(1e6 * abs(shift))]).normal(0, noise / 4)
        return 0.6 + luck + (own + shift if shift and arch == "gdn" else 0)

    rows = make_rows(archs=archs, seeds=seeds, accuracy=accuracy, **columns)
    if first:
        rows = rows.with_columns(seed=pl.col("seed") + first)
    return rows


def test_the_table_against_plain_python():
    a, b = side(), side(shift=0.05)
    table = difference_table(differences.tested_rows(a), differences.tested_rows(b))
    assert table.height == 2 * 2 * 4, "architectures, lengths, metrics"
    row = table.filter(arm="gdn", eval_length=32, metric="accuracy").row(0, named=True)
    values = {
        name: rows.filter(arm="gdn", eval_length=32, metric="accuracy").sort("seed")["value"].to_numpy()
        for name, rows in (("a", a), ("b", b))
    }
    difference = values["b"] - values["a"]
    assert row["mean_difference"] == pytest.approx(difference.mean())
    assert row["values"] == pytest.approx(sorted(difference))
    assert (row["least"], row["most"]) == pytest.approx((difference.min(), difference.max()))
    middle = [np.sort(values[name])[3:9].mean() for name in "ab"]
    assert row["iqm_difference"] == pytest.approx(middle[1] - middle[0])
    assert row["low"] < row["iqm_difference"] < row["high"] and row["paired"] and row["pairs"] == 12
    assert row["beyond"] and row["p"] == pytest.approx(2**-11) and row["p_holm"] == pytest.approx(4 * 2**-11)
    same = table.filter(arm="lstm")
    assert not same["beyond"].any() and (same["identical"] == 12).all() and (same["p"] == 1).all()
    assert set(same["reason"]) == {"no difference"} and (same["mean_difference"] == 0).all()


def test_pairs_only_where_half_of_the_seeds_are_in_both():
    for first, paired, pairs in ((0, True, 12), (6, True, 6), (7, False, 5), (50, False, 0)):
        table = difference_table(side(), side(shift=0.2, first=first))
        assert set(table["paired"]) == {paired} and set(table["pairs"]) == {pairs}, first
        gdn = table.filter(arm="gdn", metric="accuracy")
        assert gdn["beyond"].all() == (pairs != 6), "six pairs are too few"
    assert gdn["low"].is_not_null().all() and (gdn["p"] < 1e-4).all()
    assert (gdn["least"] < gdn["mean_difference"]).all() and (gdn["most"] > gdn["mean_difference"]).all()


def test_noise_is_rarely_beyond_noise():
    found = 0
    for trial in range(40):
        rng = np.random.default_rng(trial)
        draws = [side(seeds=12, archs=("gdn",)) for _ in range(2)]
        draws = [rows.with_columns(value=pl.Series(rng.uniform(size=rows.height))) for rows in draws]
        found += bool(difference_table(*draws).filter(metric="accuracy")["beyond"].any())
    assert found <= 6, "a family errs in 5 %; 7 of 40 has a chance of 0.3 %"


def test_few_seeds_and_lost_runs_are_no_finding():
    table = difference_table(side(seeds=9), side(seeds=9, shift=0.3))
    assert set(table.filter(arm="gdn")["reason"]) == {"9 of 10 pairs"} and not table["beyond"].any()
    lost = (pl.col("metric") == "loss") & (pl.col("seed") == 3)
    b = side().with_columns(value=pl.when(lost).then(np.inf).otherwise("value"))
    table = difference_table(side(), b)
    loss = table.filter(metric="loss")
    assert (
        set(loss["reason"]) == {"a diverged run has no finite loss"}
        and loss["mean_difference"].is_null().all()
    )
    assert table.filter(metric="accuracy")["mean_difference"].is_not_null().all()


def test_a_tuned_folder_is_compared_by_its_winners():
    rows = pl.concat(
        side().with_columns(stage=pl.lit(stage), value=pl.col("value") + extra)
        for stage, extra in (("search", 0.1), ("final", 0.0))
    )
    assert set(differences.tested_rows(rows)["stage"]) == {"final"}
    points = make_rows(points=2, accuracy=lambda arch, trial, seed, split, length: 0.5 + 0.1 * trial)
    assert set(differences.tested_rows(points)["trial"]) == {1}, (
        "of several points the one that is best on valid"
    )


def test_settings_that_differ_are_named():
    a = {"name": "x", "archs": ["gdn"], "train": {"steps": 10}, "tasks": [{"name": "s3", "params": {"n": 1}}]}
    b = json.loads(json.dumps(a)) | {"name": "y", "title": "T", "lr": [0.1, 0.01]}
    b["train"]["steps"], b["tasks"][0]["params"]["n"] = 20, 2
    assert list(request_changes(a, b)) == [
        ("train.steps", "10", "20", "experiment file"),
        ("task s3.params.n", "1", "2", "experiment file"),
        ("lr", "-", "0.1, 0.01", "experiment file"),
    ]
    assert list(request_changes(a, a | {"title": "other", "claim": "c"})) == []
    first = side(model_params='{"d":8,"options":{"x":1}}')
    wide = (
        pl.when(pl.col("arm") == "gdn").then(pl.lit('{"d":16,"options":{"x":1}}')).otherwise("model_params")
    )
    other = first.with_columns(
        model_params=wide,
        backend=pl.lit("gated_memory=triton"),
        version=pl.lit("blocks=2"),
        dtype=pl.lit("float64"),
    )
    found = {change[0]: change[1:] for change in run_changes(first, other, {("parity", "{}"): "parity"})}
    assert found == {
        "model.d": ("8", "16", "gdn on parity"),
        "dtype": ("float32", "float64", "all runs in both"),
        "backend of gated_memory": ("chunked", "triton", "all runs in both"),
        "result version of blocks": ("1", "2", "all runs in both"),
    }


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """(rows of A, rows of B, experiment files) -> two folders that `compare` reads so."""

    def make(a, b, files=("", ""), environments=({}, {})):
        paths = [tmp_path / "before <1>", tmp_path / "after"]
        for path, text in zip(paths, files, strict=True):
            path.mkdir(exist_ok=True)
            (path / "experiment.toml").write_text(text)
        held = dict(zip(paths, zip((a, b), environments, strict=True), strict=True))
        monkeypatch.setattr(entry_module(), "load_results", lambda directory: held[directory][0])
        monkeypatch.setattr(entry_module(), "load_environments", lambda directory: held[directory][1])
        return paths

    return make


def entry_module():
    return sys.modules[entry.__module__]


def test_the_page_says_what_changed(folders, tmp_path):
    extra = side(seeds=2, archs=("kda",))
    torch = ({"r": {"packages": {"torch": "2.11"}}}, {"r": {"packages": {"torch": "2.13"}}})
    a, b = folders(side(), pl.concat([side(shift=0.2), extra]), ("lr = [0.1]", "lr = [0.2]"), torch)
    written = compare(a, b, out=tmp_path / "out")
    assert all(path.stat().st_size for path in written)
    text = (tmp_path / "out" / "compare.html").read_text()
    page = check_alone(text)
    words = " ".join(" ".join(page.words).split())
    markdown = (tmp_path / "out" / "compare.md").read_text()
    for fact in (
        "24 of 48 paired measurements are identical.", "gdn on parity, length 32: accuracy", "Runs only in B",
        "kda on parity: seeds 0, 1", "packages torch", "Holm-corrected over the 4 rows", "YES", "before <1>",
    ):  # fmt: skip
        assert fact in words and fact in markdown, fact
    assert "before &lt;1&gt;" in text and "Runs only in A" not in words
    assert "<svg" in text
    frame = pl.read_parquet(tmp_path / "out" / "differences.parquet")
    assert set(frame["metric"]) == set(differences.METRICS) and frame.height == 16


def test_nothing_changed_is_said_so(folders, tmp_path):
    a, b = folders(side(), side())
    compare(a, b, out=tmp_path / "out")
    words = " ".join(Page((tmp_path / "out" / "compare.html").read_text()).words)
    assert "48 of 48 paired measurements are identical." in words and "Nothing changed." in words
    assert "None." in words and "TOO FEW" not in words


def test_unrelated_folders_are_refused(folders):
    a, b = folders(side(archs=("gdn",)), side(archs=("kda",)))
    with pytest.raises(StoreError, match=r"^nothing to compare: [^\n]*has gdn on parity[^\n]*kda on parity$"):
        compare(a, b)
    with pytest.raises(ValueError, match="metric is one of accuracy"):
        compare(a, b, metric="speed")


def test_the_command(here, tmp_path):
    for out, steps in (("one", 3), ("two", 4)):
        code, _, err = here("grid", "tiny.toml", "--steps", steps, "--out", out, "--workers", 1)
        assert code == 0, err
    code, out, err = here("compare", "one", "two", "--out", "told")
    assert code == 0, err
    assert "train.steps" in out and "No difference is beyond noise." in out and "TOO FEW SEEDS" in out
    assert (tmp_path / "told" / "compare.html").exists() and "written: told/compare.html" in out
    code, out, _ = here("compare", "one", "two", "--metric", "loss")
    assert code == 0 and "Differences in loss" in out and "written" not in out
    (tmp_path / "file").write_text("")
    for arguments, reason in (
        (["one", "nowhere"], "nowhere is not a result folder"),
        (["one", "one"], "are one folder"),
        (["one", "two", "--metric", "speed"], "--metric is accuracy, "),
        (["one", "two", "--out", "file"], "--out is a folder"),
        (["one"], "Missing argument"),
    ):
        code, _, err = here("compare", *arguments)
        assert code == 2 and reason in err and err.count("\n") == 1, (arguments, err)
