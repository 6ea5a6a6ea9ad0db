"""arena ablate, from flags and files to tables and a figure."""

from __future__ import annotations

import json

import polars as pl
import pytest

from arena.ablation import plan_ablation, seeds_for_a_claim
from arena.grid.experiment import load_experiment
from arena.grid.plan import plan_settings

TINY = """
name = "tiny"
archs = ["gdn2"]
[model]
d_model = 8
n_layers = 1
n_heads = 1
[train]
steps = 3
batch_size = 4
eval_examples = 8
[[tasks]]
name = "parity"
train_lengths = [3, 8]
eval_lengths = [24, 32]
[tuning]
points = 2
extension = 0
report_seeds = 2
space = { lr = [1e-3, 1e-2] }
[ablation]
erase = ["channel", "mean", 1]
coupling = ["free", "step"]
"""


def test_every_point_is_tuned_tested_and_reported(here, tmp_path):
    code, out, err = here("ablate", "tiny.toml", "--write", "channel,one", "--workers", 1)
    assert code == 0, err
    folder = tmp_path / "results" / "tiny"
    names = ["gdn2", "gdn2 write=one", "gdn2 erase=mean", "gdn2 erase=mean write=one"]
    names += ["gdn2 erase=1", "gdn2 erase=1 write=one"]
    assert f"6 points: {', '.join(names)}" in out
    assert "left out: gdn2 write=one coupling=step: coupling='step' needs scalar decay" in out
    assert "no claims: 3 main effects on 2 seeds; --seeds 10 can give some" in out
    assert "24 of 24 runs stored" in out  # 6 points x (2 rates x 1 seed + 2 seeds)
    assert "erase: channel → mean" in out and "no claim: 2 of 10 seeds" in out
    assert "mean instead of channel allows no claim on parity" in out

    points = pl.read_parquet(folder / "ablation" / "points.parquet")
    assert list(dict.fromkeys(points["arm"])) == names  # in the order asked for
    assert set(points["eval_length"]) == {24, 32} and set(points["seeds"]) == {2}
    effects = pl.read_parquet(folder / "ablation" / "effects.parquet")
    assert set(effects["kind"]) == {"main", "interaction"} and not effects["claim"].any()
    assert (folder / "ablation" / "ablation.png").stat().st_size > 10_000
    text = (folder / "ablation" / "ablation.md").read_text()
    assert "![ablation](ablation.png)" in text and "## left out" in text
    request = json.loads((folder / "ablation" / "request.json").read_text())
    assert request["points"] == names and request["tasks"] == ["parity"]

    # Each point has its own rate, chosen on valid.
    winners = pl.read_parquet(folder / "tuning" / "winners.parquet")
    assert set(winners["arm"]) == set(names)

    again, out, _ = here("ablate", "tiny.toml", "--write", "channel,one", "--workers", 1)
    assert again == 0 and "24 of 24 runs stored" in out and ": done" not in out

    code, out, err = here("report", folder)
    assert code == 0, err
    assert "Ablation of gdn2" in out and "ablation.md" in out and "gdn2 erase=mean" in out
    page = (folder / "report" / "page.html").read_text()
    assert page.index("<h2>Ablation of gdn2") < page.index("<h2>Accuracy over sequence length")
    assert "arena ablate tiny.toml --out results/tiny" in page and "<h3>main effects" in page
    asked = load_experiment(folder / "ablation" / "request.toml")  # what the page's command takes
    assert plan_ablation(asked).experiment.archs == names and asked.ablation.write == ["channel", "one"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--arch", "gdn2", "--task", "parity"], "nothing to ablate: give an axis"),
        (["--erase", "mean"], "nothing to ablate: give an experiment, or --arch and --task"),
        (
            ["--arch", "gdn2", "--erase", "mean"],
            "nothing to ablate: give an experiment, or --arch and --task",
        ),
        (
            ["--arch", "gdn2", "--task", "parity", "--erase", "men"],
            "has no level 'men'; did you mean 'mean'?",
        ),
        (["--arch", "gdn2", "--task", "parity", "--erase", "mean,"], "--erase is names with commas between"),
        (["--arch", "gdn2,kda", "--task", "parity", "--erase", "mean"], "one architecture, not 2"),
        (
            ["--arch", "gdn2", "--task", "parity", "--preset", "pager"],
            "no preset 'pager'; did you mean 'paper'?",
        ),
        (["--arch", "gdn3", "--task", "parity", "--preset", "paper"], "unknown architecture 'gdn3'"),
        (["--arch", "lstm", "--task", "parity", "--preset", "paper"], "'lstm' has no memory with gates"),
        (["--arch", "gdn2", "--task", "paritty", "--preset", "paper"], "did you mean parity"),
        (["--arch", "gdn2", "--task", "parity", "--decay-sgn", "signed"], "No such option"),
        (["--arch", "kda", "--task", "parity", "--erase-range", "3"], "no level 3; known: 1, 2"),
        (
            ["--arch", "kda", "--task", "parity", "--write", "one"],
            "no point to compare 'kda' with: kda write=one",
        ),
        (["tiny.toml", "--device", "tpu"], "--device is cpu or cuda"),
        (["tiny.toml", "--trials", "1"], "points"),
        (["none.toml"], "cannot read none.toml"),
    ],
)
def test_wrong_requests_start_nothing(here, tmp_path, arguments, reason):
    code, _, err = here("ablate", *arguments)
    assert code == 2 and reason in err and err.count("\n") == 1, err
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("command", ["grid", "tune"])
def test_an_ablation_is_no_grid(here, tmp_path, command):
    code, _, err = here(command, "tiny.toml")
    assert code == 2 and "tiny has a section [ablation]: arena ablate runs it" in err
    assert not (tmp_path / "results").exists()


def test_a_wrong_key_of_the_section_is_named(here, tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY.replace("coupling =", "couplings ="))
    code, _, err = here("ablate", "tiny.toml")
    assert code == 2 and "unknown key 'couplings' in [ablation]; did you mean 'coupling'?" in err


def test_the_shipped_study():
    experiment = load_experiment("ablation")
    planned = plan_ablation(experiment)
    assert len(planned.experiment.archs) == 10 and not planned.left_out
    changes, needed = seeds_for_a_claim(planned)
    assert changes == 24 and needed <= len(experiment.tuning.report_seeds)
    for setting in plan_settings(planned.experiment.model_copy(update={"archs": ["gdn2"], "arms": {}})):
        longest = max(setting.train.train_lengths)
        assert not {longest, 2 * longest} & set(
            setting.train.eval_lengths
        )  # nothing is chosen where it is tested
