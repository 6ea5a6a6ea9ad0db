"""Reports: statistics against the definitions, tables against plain Python, figures that are there and
stable."""

from __future__ import annotations

import io
import random
import tomllib

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from arena.grid.results import ROW_SCHEMA
from arena.report.figure import accuracy_figure, overview_figure
from arena.report.palette import _BASE, family_order, look
from arena.report.render import make_report
from arena.report.tables import (
    accuracy_table,
    budget_table,
    chosen_points,
    mixtures,
    overall_table,
    runs_table,
    task_labels,
)
from arena.statistics import clopper_pearson

ARCHS = [
    "attention",
    "swa",
    "linear_attention",
    "gla",
    "mamba2",
    "mamba2-neg",
    "deltanet",
    "gdn",
    "gdn-neg",
    "kda",
]
ARCHS += ["gdn2", "mlstm", "slstm", "lstm"]


KNOWN = {
    **dict.fromkeys(ROW_SCHEMA),
    **dict.fromkeys(("model_params", "task_params"), "{}"),
    **{
        "experiment": "e",
        "params": 1000,
        "state_bytes": 64,
        "steps": 10,
        "train_tokens": 5000,
        "wall_s": 1.0,
    },
    **{"train_length_min": 3, "train_length_max": 16, "weight_decay": 0.0, "n_examples": 100},
    **{"device": "cpu", "backend": "gated_memory=chunked", "dtype": "float32"},
    **{"status": "done", "version": "blocks=1"},
}


def make_rows(
    archs=("gdn", "lstm"), seeds=3, tasks=("parity",), points=1, accuracy=None, **columns
) -> pl.DataFrame:
    rng = random.Random(4)
    rows = []
    for task in tasks:
        for arch in archs:
            for trial in range(points):
                for seed in range(seeds):
                    known = {
                        **KNOWN,
                        "run_id": f"{task}-{arch}-{trial}-{seed}",
                        "fleet_id": f"{task}-{arch}",
                        "arch": arch,
                        "arm": arch,
                        "stage": "grid",
                        "task": task,
                        "seed": seed,
                        "trial": trial,
                        "lr": 10.0 ** (trial - 3),
                    }
                    for split, length in (("valid", 15), ("test", 16), ("test", 32)):
                        score = accuracy(arch, trial, seed, split, length) if accuracy else rng.random()
                        for metric, value in {
                            "accuracy": score,
                            "chance_scaled_accuracy": 2 * score - 1,
                            "sequence_accuracy": score**2,
                            "loss": 1 - score,
                        }.items():
                            rows.append(
                                {
                                    **known,
                                    "split": split,
                                    "reported": split == "test",
                                    "eval_length": length,
                                    "metric": metric,
                                    "value": value,
                                    "chance": 0.5 if metric == "accuracy" else None,
                                    **columns,
                                }
                            )
    return pl.DataFrame(rows, schema=ROW_SCHEMA)


def test_accuracy_table_against_plain_python():
    rows = make_rows(archs=("gdn", "lstm"), seeds=4, tasks=("parity", "s3"))
    table = accuracy_table(rows)
    assert table.height == 2 * 2 * 2
    for cell in table.iter_rows(named=True):
        values = [
            row["value"]
            for row in rows.iter_rows(named=True)
            if row["metric"] == "accuracy"
            and row["split"] == "test"
            and all(row[key] == cell[key] for key in ("task", "arm", "eval_length"))
        ]
        assert cell["runs"] == 4 and cell["values"] == sorted(values)
        assert cell["mean"] == pytest.approx(sum(values) / 4)
        assert (cell["min"], cell["max"], cell["chance"]) == (min(values), max(values), 0.5)
        assert cell["chance_scaled"] == pytest.approx(sum(2 * v - 1 for v in values) / 4)
        assert cell["sequence_accuracy"] == pytest.approx(sum(v**2 for v in values) / 4)
        assert cell["solved"] == sum(2 * v - 1 >= 0.95 for v in values)
        assert (cell["solve_low"], cell["solve_high"]) == clopper_pearson(cell["solved"], 4)
        assert cell["iqm"] is None and cell["iqm_low"] is None, "no interval from four runs"


def test_intervals_appear_from_ten_runs_on_and_have_width():
    many = accuracy_table(make_rows(seeds=10))
    assert (many["iqm_low"] < many["iqm"]).all() and (many["iqm"] < many["iqm_high"]).all()
    alike = accuracy_table(make_rows(seeds=10, accuracy=lambda *_: 1.0))
    assert alike["iqm_low"].is_null().all() and (alike["iqm"] == 1.0).all()
    units = overall_table(make_rows(seeds=5, tasks=("parity", "s3")))  # 10 units in two strata
    assert units["low"].is_not_null().all() and (units["units"] == 10).all()
    assert overall_table(make_rows(seeds=4, tasks=("parity", "s3")))["low"].is_null().all()


def test_points_are_chosen_on_valid_whatever_the_test_says():
    def accuracy(arch, trial, seed, split, length):
        on_valid = {0: 0.6, 1: 0.9, 2: 0.7}[trial]
        return on_valid if split == "valid" else 1 - on_valid  # test would choose the first

    rows = make_rows(points=3, accuracy=accuracy)
    assert set(chosen_points(rows)["trial"]) == {1} and set(chosen_points(rows)["points"]) == {3}
    tied = make_rows(points=3, accuracy=lambda *_: 0.75)
    assert set(chosen_points(tied)["trial"]) == {0}, "ties go to the smaller rate"


def test_unequal_budgets_are_flagged():
    rows = make_rows(archs=("gdn", "kda", "lstm", "swa"))
    fat = pl.when(pl.col("arch") == "lstm").then(1030).otherwise(pl.col("params")).alias("params")
    wide = pl.when(pl.col("arch") == "swa").then(65).otherwise(pl.col("state_bytes")).alias("state_bytes")
    table = budget_table(rows.with_columns(fat, wide))
    assert dict(table.select("arm", "unmatched").iter_rows()) == {
        "gdn": "",
        "kda": "",
        "lstm": "params",
        "swa": "state_bytes",
    }
    near = pl.when(pl.col("arch") == "lstm").then(1015).otherwise(pl.col("params")).alias("params")
    assert set(budget_table(rows.with_columns(near))["unmatched"]) == {""}


def test_mixtures_are_named():
    rows = make_rows()
    same = {"packages": {"torch": "2.13.0"}, "commit": "a" * 40}
    assert mixtures(rows, {"x": same, "y": same}) == []
    other = {"packages": {"torch": "2.11.0"}, "commit": "b" * 40 + "+changes"}
    assert mixtures(rows, {"x": same, "y": other}) == [
        "packages torch: 2.11.0 / 2.13.0",
        "commit: aaaaaaaaaa / bbbbbbbbbb+changes",
    ]
    mixed = pl.when(pl.col("seed") == 1).then(pl.lit("cuda")).otherwise(pl.col("device")).alias("device")
    assert mixtures(rows.with_columns(mixed), {}) == ["device: cpu / cuda"]
    triton, more = "gated_memory=triton", "gated_memory=chunked short_conv=fused"
    for text, lines in ((triton, ["backend of gated_memory: chunked / triton"]), (more, [])):
        other_backend = pl.when(pl.col("seed") == 1).then(pl.lit(text)).otherwise(pl.col("backend"))
        assert mixtures(rows.with_columns(backend=other_backend), {}) == lines
    version = (
        pl.when(pl.col("seed") == 1).then(pl.lit("blocks=2")).otherwise(pl.col("version")).alias("version")
    )
    assert mixtures(rows.with_columns(version), {}) == ["version of parity: blocks=1 / blocks=2"]


def test_tasks_are_told_apart_by_what_differs():
    rows = pl.DataFrame(
        {
            "task": ["mqar", "mqar", "parity"],
            "task_params": ['{"n":2,"v":8}', '{"n":4,"v":8}', "{}"],
        }
    )
    assert list(task_labels(rows).values()) == ["mqar (n=2)", "mqar (n=4)", "parity"]


def test_every_architecture_has_its_own_look_for_ever():
    looks = {name: look(name) for name in _BASE}
    assert len({l.colour for l in looks.values()}) == len(looks)
    assert look("gdn").colour == look("gdn-neg").colour == "#4292c6"
    assert look("gdn-neg").dashed and not look("gdn").dashed
    assert look("xlstm[1:1]") == look("xlstm[7:1]") == look("xlstm")
    assert look("gdn2+swa") == look("gdn2+swa") and look("gdn2+swa").dashed
    assert sorted(["lstm", "gdn-neg", "attention", "gdn", "zzz"], key=family_order) == [
        "attention",
        "gdn",
        "gdn-neg",
        "lstm",
        "zzz",
    ]


def pixels(path):
    from matplotlib.image import imread

    return imread(path)[..., :3]


def test_figures_show_every_architecture(tmp_path):
    rows = make_rows(archs=ARCHS, tasks=("mqar", "parity", "rebind", "s3"))
    labels = task_labels(rows)
    accuracy_figure(rows, labels, tmp_path / "a.png", title="A [title] with $ and %")
    overview_figure(accuracy_table(rows), labels, tmp_path / "o.png")
    image = pixels(tmp_path / "a.png")
    assert image.shape[0] > 800 and image.shape[1] > 1500
    for arch in ARCHS:
        colour = np.array([int(look(arch).colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        assert (np.abs(image - colour).max(-1) < 0.01).sum() > 50, arch
    assert pixels(tmp_path / "o.png").std() > 0.05


@pytest.mark.parametrize(
    "rows", [make_rows(archs=("gdn",), seeds=1), make_rows().filter(pl.col("eval_length") < 32)]
)
def test_figures_of_little_data(tmp_path, rows):
    accuracy_figure(rows, task_labels(rows), tmp_path / "a.png")
    overview_figure(accuracy_table(rows), task_labels(rows), tmp_path / "o.png")
    assert pixels(tmp_path / "a.png").std() > 0.02 and pixels(tmp_path / "o.png").std() > 0.02


def test_a_task_whose_runs_all_failed_does_not_stop_the_report(tmp_path, monkeypatch):
    from arena.report import render

    rows = make_rows(tasks=("s3", "parity"), points=2)
    failed = pl.col("task") == "s3"
    rows = rows.with_columns(
        status=pl.when(failed).then(pl.lit("failed")).otherwise(pl.col("status")),
        reason=pl.when(failed).then(pl.lit("no luck")).otherwise(pl.col("reason")),
        **{
            name: pl.when(failed).then(None).otherwise(pl.col(name))
            for name in ("value", "reported", "split", "metric", "eval_length")
        },
    )
    monkeypatch.setattr(render, "load_results", lambda directory: rows)
    monkeypatch.setattr(render, "load_environments", lambda *_: {})
    make_report(tmp_path)
    markdown = (tmp_path / "report" / "report.md").read_text()
    assert "## parity" in markdown and "## s3" not in markdown
    assert "gdn on s3, seed 0, lr 0.001, weight decay 0 (no luck)" in markdown
    assert "gdn on s3, seed 0, lr 0.01, weight decay 0 (no luck)" in markdown


def test_a_report_tells_what_is_missing_failed_and_diverged(tmp_path, monkeypatch):
    from arena.report import render

    rows = make_rows(archs=("gdn", "lstm"), tasks=("s3", "parity"))
    lost = (pl.col("run_id") == "s3-gdn-0-1") & (pl.col("metric") != "loss")
    rows = rows.with_columns(
        value=pl.when(lost).then(0.0).otherwise(pl.col("value")),
        status=pl.when(pl.col("run_id") == "s3-gdn-0-1").then(pl.lit("diverged")).otherwise(pl.col("status")),
    )
    failed = {
        **dict.fromkeys(ROW_SCHEMA),
        **rows.row(0, named=True),
        "run_id": "f",
        "seed": 9,
        "status": "failed",
    }
    failed |= {"reason": "out of [luck]", "value": None, "reported": None, "split": None, "metric": None}
    rows = pl.concat([rows, pl.DataFrame([failed], schema=ROW_SCHEMA)])
    (tmp_path / "experiment.toml").write_text(
        'title = "The [bold] title"\nclaim = "A claim"\n[[tasks]]\nname="s3"\n[[tasks]]\nname="parity"\n'
    )
    monkeypatch.setattr(render, "load_results", lambda directory: rows)
    monkeypatch.setattr(render, "load_environments", lambda *_: {})
    monkeypatch.setattr(
        render, "read_plan", lambda directory: {"experiment": "e", "runs": dict.fromkeys(range(15))}
    )
    output = io.StringIO()
    written = make_report(tmp_path, Console(file=output, highlight=False))
    text, markdown = output.getvalue(), (tmp_path / "report" / "report.md").read_text()
    for words in (
        "The [bold] title",
        "A claim",
        "12 of 15 runs have a result.",
        "INCOMPLETE: 3 runs have none",
        "1 runs failed: gdn on s3, seed 9 (out of [luck]).",
        "1 runs diverged (counted with the worst score): gdn on s3, seed 1.",
    ):
        assert words in text and words in markdown, words
    assert markdown.index("## s3") < markdown.index("## parity"), "tasks in the order of the file"
    assert "MIXED" not in text
    for path in written:
        assert path.stat().st_size > 0
    table = pl.read_csv(tmp_path / "report" / "accuracy.csv")
    cell = table.filter(task="s3", arch="gdn", eval_length=32).row(0, named=True)
    assert cell["diverged"] == 1 and cell["min"] == 0.0 and cell["runs"] == 3, "a diverged run counts"
    assert pl.read_parquet(tmp_path / "report" / "runs.parquet").height == runs_table(rows).height == 13
    assert tomllib.loads((tmp_path / "experiment.toml").read_text())["claim"] in markdown
