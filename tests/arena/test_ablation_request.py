"""From axes and presets to arms: what is crossed, what follows, what is left out and why."""

from __future__ import annotations

import pytest

from arena.ablation.axes import AXES, completed, levels_of, named, parse_level, spec_of, wanted_points
from arena.ablation.request import ablation_request, plan_ablation
from arena.grid.experiment import AblationSection, ExperimentError, load_experiment, parse_experiment
from arena.grid.plan import plan_runs
from arena.memory import NAMED

GDN2 = levels_of(NAMED["gdn2"], "static", "silu")


def planned(arch="gdn2", tasks=("parity",), model=None, **axes):
    presets = axes.pop("presets", ())
    experiment = ablation_request(None, archs=[arch] if arch else [], tasks=tasks, axes=axes, presets=presets)
    if model is not None:
        data = experiment.model_dump(exclude_none=True)
        experiment = parse_experiment({**data, "model": {**data["model"], **model}})
    return plan_ablation(experiment)


def arms(ablation):
    """Label -> what the arm's gates change."""
    return {name: arm.options.get("gates") for name, arm in ablation.experiment.arms.items()}


def test_every_axis_is_a_key_of_the_section_and_a_field_or_option_of_a_model():
    assert set(AXES) == set(AblationSection.model_fields) - {"preset"} == set(GDN2)


@pytest.mark.parametrize("name", NAMED)
def test_levels_describe_a_point_wholly(name):
    spec = NAMED[name]
    assert (
        spec_of(levels_of(spec, "static", "silu"), NAMED["gdn2"]).replace(
            a_range=spec.a_range, decay_form=spec.decay_form
        )
        == spec
    )


def test_the_product_of_the_axes_with_the_base_first():
    found = planned(erase=["channel", "mean"], write=["mean", "channel"], decay=["channel", "scalar"])
    assert found.base == found.experiment.archs[0] == "gdn2" and not found.left_out
    assert found.experiment.archs[1:] == list(arms(found)) and found.experiment.ablation is None
    assert arms(found) == {
        "gdn2 write=mean": {"write": "mean"},
        "gdn2 decay=scalar write=mean": {"decay": "scalar", "write": "mean"},
        "gdn2 decay=scalar": {"decay": "scalar"},
        "gdn2 erase=mean write=mean": {"erase": "mean", "write": "mean"},
        "gdn2 decay=scalar erase=mean write=mean": {"decay": "scalar", "erase": "mean", "write": "mean"},
        "gdn2 erase=mean": {"erase": "mean"},
        "gdn2 decay=scalar erase=mean": {"decay": "scalar", "erase": "mean"},
    }
    assert {run.arm for run in plan_runs(found.experiment)} == {"gdn2", *arms(found)}


def test_numbers_freeze_and_dial():
    found = planned(erase=["channel", 1.5], write=[0.5, 1], coupling=["free", 0.25])
    assert arms(found)["gdn2 erase=1.5 write=0.5"] == {
        "erase": "scalar",
        "erase_value": 1.5,
        "write": "scalar",
        "write_value": 0.5,
    }
    assert arms(found)["gdn2 write=one"] == {"write": "one"}
    assert set(found.left_out) == {
        "gdn2 write=0.5 coupling=0.25",
        "gdn2 write=one coupling=0.25",
        "gdn2 erase=1.5 write=0.5 coupling=0.25",
        "gdn2 erase=1.5 write=one coupling=0.25",
    }
    assert arms(planned(coupling=["free", "0.25"])) == {
        "gdn2 coupling=0.25": {"coupling": "dial", "dial": 0.25}
    }


def test_an_axis_that_is_not_named_follows():
    tied = arms(planned(erase=["channel", "scalar", "mean"], coupling=["tied"]))
    assert tied["gdn2 erase=scalar write=scalar coupling=tied"]["write"] == "scalar"
    assert arms(planned(coupling=["complement"], erase=["none"])) == {
        "gdn2 erase=none coupling=complement": {"erase": "none", "coupling": "complement"}
    }
    assert arms(planned("gdn2-neg", erase=["none", 1.0])) == {
        "gdn2-neg erase=none": {"erase": "none", "erase_range": 1},
        "gdn2-neg erase=1": {"erase": "scalar", "erase_value": 1.0, "erase_range": 1},
    }
    step = planned(decay=["scalar"], coupling=["step"], erase=["none"])
    assert list(arms(step)) == ["gdn2 decay=scalar erase=none write=scalar coupling=step"]
    assert spec_of(completed({"decay": "none"}, GDN2), NAMED["gdn2"]).decay == "none"


def test_what_contradicts_itself_is_left_out_with_its_reason():
    found = planned(erase=["none", "channel"], erase_range=[1, 2], coupling=["free", "step"])
    assert found.left_out == {
        "gdn2 erase=none erase_range=2": "erase_range needs an erase gate",
        "gdn2 erase=none write=scalar coupling=step": "coupling='step' needs scalar decay of form "
        "'softplus_a' and scalar write",
        "gdn2 erase=none erase_range=2 write=scalar coupling=step": "erase_range needs an erase gate",
        "gdn2 write=scalar coupling=step": "coupling='step' needs scalar decay of form 'softplus_a' and "
        "scalar write",
        "gdn2 erase_range=2 write=scalar coupling=step": "coupling='step' needs scalar decay of form "
        "'softplus_a' and scalar write",
    }
    assert list(arms(found)) == ["gdn2 erase=none", "gdn2 erase_range=2"]


def test_what_cannot_be_built_is_left_out_with_its_reason():
    found = planned(
        "gdn",
        model={"outer": "official", "d_model": 32, "n_heads": 2},
        erase=["channel"],
        write=["channel"],
        coupling=["free", "tied"],
    )
    assert found.left_out == {
        "gdn erase=channel write=channel": "tied channel gates need K = V, got K=12, V=24"
    }


def test_convolution_and_output_gate():
    found = planned(
        tasks=["mqar"], conv=["none", "static", "gate"], output_gate=["silu", "none"], qk_map=["l2"]
    )
    fields = {name: (arm.conv, arm.options) for name, arm in found.experiment.arms.items()}
    assert fields["gdn2 conv=none"] == ("none", {})
    assert fields["gdn2 conv=gate output_gate=none"] == ("gate", {"output_gate": "none"})
    assert len(fields) == 5


def test_axes_outside_of_gate_space_are_open_to_every_memory():
    found = planned("mamba3", tasks=["mqar"], conv=["none", "static"], output_gate=["silu", "none"])
    assert len(found.experiment.arms) == 3 and not found.left_out


def test_presets():
    paper = planned(presets=["paper"])
    assert list(arms(paper)) == ["gdn2 erase=mean", "gdn2 write=mean", "gdn2 erase_range=2"]
    assert not paper.left_out
    both = planned(presets=["paper", "left-out"], erase=["mean"])
    assert not both.left_out
    assert set(arms(both)) - set(arms(paper)) == {
        "gdn2 erase=mean write=mean",
        "gdn2 coupling=tied",
        "gdn2 write=one",
        "gdn2 erase=1",
        "gdn2 erase=none",
        "gdn2 erase=none coupling=complement",
    }
    # From another architecture the same rows, with its own decay.
    from_kda = planned("kda", presets=["paper"])
    assert "kda erase=channel write=channel coupling=free" in arms(from_kda)
    assert list(planned("deltanet", presets=["left-out"]).left_out.values()) == [
        "coupling='complement' needs a decay"
    ]


def test_the_gates_of_the_file_are_the_base():
    data = {
        "name": "mine",
        "archs": ["gdn2"],
        "model": {"options": {"gates": {"erase": "scalar"}}},
        "train": {"steps": 1},
        "tasks": [{"name": "parity", "train_lengths": [3, 8], "eval_lengths": [16]}],
        "ablation": {"erase": ["channel", "none"], "write": ["channel"]},
    }
    found = plan_ablation(parse_experiment(data))
    assert arms(found) == {"gdn2 erase=channel": {}, "gdn2 erase=none": {"erase": "none"}}
    assert {run.arm for run in plan_runs(found.experiment)} == {"gdn2", *arms(found)}


@pytest.mark.parametrize(
    ("axes", "reason"),
    [
        (dict(erase=["chanel"]), "axis 'erase' has no level 'chanel'; did you mean 'channel'?"),
        (dict(erase=["chanel"]), "a number freezes it"),
        (dict(erase_range=[3]), "axis 'erase_range' has no level 3; known: 1, 2"),
        (dict(conv=[4]), "axis 'conv' has no level 4"),
        (dict(erases=["channel"]), "unknown key 'erases' in [ablation]; did you mean 'erase'?"),
        (dict(erase=["channel", "channel"]), "axis 'erase' repeats a level"),
        (dict(presets=["papers"]), "no preset 'papers'; did you mean 'paper'?"),
        (dict(), "nothing to ablate: give an axis"),
        (dict(erase=["channel"]), "no point to compare 'gdn2' with"),
        (dict(decay=["scalar"], write=["exponential"]), "exponential write needs"),
        (dict(arch="slstm", erase=["none"]), "'slstm' has no memory with gates"),
        (
            dict(arch="mamba3", erase=["none"]),
            "'mamba3' has gates of its own, so that erase can't be an axis",
        ),
        (
            dict(arch="rwkv7", erase=["none"]),
            "'rwkv7' has gates of its own, so that erase can't be an axis; conv alone can,",
        ),
        (dict(arch="gdn+kda", model={"n_layers": 2}, erase=["none"]), "'gdn+kda' has several memories"),
        (dict(tasks=["parity", "mqar"], conv=["gate"]), "conv differs between the tasks of ablation"),
        (dict(arch="gdn9", erase=["none"]), "unknown architecture 'gdn9'"),
        (dict(arch=None, erase=["none"]), "nothing to ablate: give an experiment, or --arch and --task"),
    ],
)
def test_wrong_requests_are_one_line(axes, reason):
    with pytest.raises(ExperimentError) as refusal:
        planned(**axes)
    assert reason in str(refusal.value) and "\n" not in str(refusal.value)


def test_too_many_points():
    many = dict(erase=[i / 32 for i in range(1, 33)], write=[i / 32 for i in range(1, 33)])
    with pytest.raises(ExperimentError, match="span 1024 points: at most 256"):
        wanted_points(many, [])


def test_levels_have_one_name():
    assert parse_level("write", 1) == "one" and parse_level("erase", 0.0) == "none"
    assert parse_level("erase", "1") == 1.0 and parse_level("coupling", 0) == 0.0
    with pytest.raises(ExperimentError, match="text or a number, not True"):
        parse_level("erase", True)


def test_an_ablation_is_no_grid():
    experiment = ablation_request(None, archs=["gdn2"], tasks=["parity"], presets=["paper"])
    with pytest.raises(ExperimentError, match=r"has a section \[ablation\]: arena ablate runs it"):
        plan_runs(experiment)


def test_the_command_line_wins_over_the_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'name = "mine"\narchs = ["gdn2"]\n[train]\nsteps = 5\n[[tasks]]\nname = "parity"\n'
        'train_lengths = [3, 8]\neval_lengths = [16]\n[ablation]\npreset = "paper"\nerase = ["none", 1.0]\n'
    )
    section = load_experiment(path).ablation
    assert section.preset == ["paper"] and section.axes == {"erase": ["none", 1.0]}
    changed = ablation_request(str(path), axes={"erase": ["mean"], "conv": ["none"]}, presets=["left-out"])
    assert changed.ablation.preset == ["left-out"]
    assert changed.ablation.axes == {"erase": ["mean"], "conv": ["none"]}
    assert changed.name == "mine" and ablation_request(str(path), seeds=2).tuning.report_seeds == [1000, 1001]


def test_micro_steps_are_an_axis():
    found = planned("deltanet-neg", micro_steps=[1, 2, 3], coupling=["tied", "free"])
    assert arms(found)["deltanet-neg micro_steps=2"] == {"micro_steps": 2}
    assert arms(found)["deltanet-neg coupling=free micro_steps=3"] == {"micro_steps": 3, "coupling": "free"}
    assert named(spec_of(found.levels["deltanet-neg micro_steps=3"], NAMED["deltanet"])) == (
        "deltaproduct[3]-neg"
    )
    assert list(arms(planned("gdnproduct[4]", micro_steps=[1, 2]))) == [
        "gdnproduct[4] micro_steps=1",
        "gdnproduct[4] micro_steps=2",
    ]
    assert named(NAMED["gdn"].replace(micro_steps=4)) == "gdnproduct[4]"
    assert named(NAMED["kda"].replace(micro_steps=4)) is None
    step = planned("gdn", coupling=["step", "tied"], erase=["none", "scalar"], micro_steps=[1, 2])
    assert "takes one micro-step" in step.left_out["gdn erase=none coupling=step micro_steps=2"]
    with pytest.raises(ExperimentError, match="axis 'micro_steps' has no level 9; known: 1, 2"):
        planned("gdn", micro_steps=[9])
