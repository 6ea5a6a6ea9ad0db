"""Matched architectures, the ledger, FLOPs, and what is measured before the start."""

from __future__ import annotations

import dataclasses

import pytest
import tuning_fakes

from arena.grid.fields import ExperimentError
from arena.grid.plan import plan_settings
from arena.model import ModelConfig, build_model, model_params
from arena.tuning.flops import flops_per_token
from arena.tuning.ledger import ledger_lines, ledger_table
from arena.tuning.match import (
    TOLERANCE,
    Quantity,
    model_quantity,
    plan_solved,
    solve_all,
    solve_task,
    target_value,
)

ARCHS = ["attention", "swa", "gla", "mamba2", "mamba3", "gdn", "kda", "gdn2", "mlstm", "slstm", "lstm"]
ARCHS += ["deltaproduct[2]", "gdnproduct[3]-neg", "rwkv7"]


def planned(match, outer="common", archs=ARCHS, reference=None, d_model=32):
    tuning = {"match": match, **({"reference": reference} if reference else {})}
    model = {"d_model": d_model, "n_layers": 1, "n_heads": 2, "outer": outer}
    experiment = tuning_fakes.experiment(tuning, archs=archs, model=model)
    return experiment, plan_settings(experiment)


def solved_settings(experiment, settings, path, quantity=None):
    match = experiment.tuning.match
    made = solve_all(
        experiment,
        settings,
        quantity or (lambda s: model_quantity(match, s.train.train_lengths[1])),
        path / "matched.json",
    )
    return plan_solved(experiment, made, "cpu")


@pytest.mark.parametrize("match", ["params", "flops"])
@pytest.mark.parametrize(("outer", "d_model"), [("common", 32), ("official", 128)])
def test_parameters_and_flops_agree_within_two_per_cent(match, outer, d_model, tmp_path):
    """Official mLSTM and Mamba-2 have no MLP: there the width moves, finely enough from some size on."""
    archs = (
        ARCHS
        if outer == "common"
        else ["gdn2", "lstm", "mamba2", "mamba3", "mlstm", "deltaproduct[2]", "rwkv7"]
    )
    experiment, settings = planned(match, outer, archs, d_model=d_model)
    found = solved_settings(experiment, settings, tmp_path)
    table = ledger_table(found, experiment.tuning, dict.fromkeys(range(len(found)), 1e-3))
    assert table["matched"].all(), table.filter(~table["matched"])
    for setting in found:  # measured again, not read from the table
        config = ModelConfig(**setting.shared["model"])
        same = [s for s in found if s.shared["task"] == setting.shared["task"]]

        def value(s):
            c = ModelConfig(**s.shared["model"])
            return model_params(build_model(c, seed=0)) if match == "params" else flops_per_token(c, 16)

        if match == "params":
            values = [value(s) for s in same]
            assert max(values) / min(values) <= 1.02 / 0.98, config
    assert {setting.shared["task"]["name"] for setting in found} == {"mqar", "parity"}


def test_the_reference_is_declared_or_the_median(tmp_path):
    assert target_value({"a": 5.0, "b": 1.0, "c": 3.0, "d": 4.0}, None) == 3.0
    assert target_value({"a": 5.0, "b": 1.0}, "a") == 5.0
    experiment, settings = planned("params", reference="lstm")
    found = solved_settings(experiment, settings, tmp_path)
    lstm = next(s for s in found if s.arm == "lstm")
    assert lstm.shared == next(s for s in settings if s.arm == "lstm").shared, "left as it is written"


def test_states_agree_as_well_as_sizes_allow_and_growing_ones_are_exempt(tmp_path):
    experiment, settings = planned("state", archs=["attention", "gdn", "mlstm", "mamba2", "lstm"], d_model=16)
    found = solved_settings(experiment, settings, tmp_path)
    table = ledger_table(found, experiment.tuning, dict.fromkeys(range(len(found)), 1e-3))
    rows = {row["arm"]: row for row in table.filter(task="mqar").iter_rows(named=True)}
    assert rows["attention"]["state_grows"] and rows["attention"]["deviation"] is None
    assert not any(row["state_grows"] for arm, row in rows.items() if arm != "attention")
    assert all(abs(row["deviation"]) < 0.12 for arm, row in rows.items() if arm != "attention"), rows
    assert all(
        row["matched"] == (abs(row["deviation"]) <= 0.02) for a, row in rows.items() if a != "attention"
    )
    text = "\n".join(ledger_lines(table))
    assert "its state grows: exempt" in text
    before = {s.arm: model_quantity("state", 16).measure(s.shared["model"]) for s in settings}
    assert max(before.values()) / min(v for a, v in before.items() if a != "attention") > 2, "not by chance"


def test_a_state_that_grows_is_no_reference(tmp_path):
    experiment, settings = planned("state", archs=["attention", "gdn", "lstm"], reference="attention")
    with pytest.raises(ExperimentError, match="reference = 'attention': its state grows"):
        solved_settings(experiment, settings, tmp_path)


def test_times_agree_within_ten_per_cent_by_measurement(tmp_path):
    """With a clock that goes by FLOPs and a constant; the real one is noise on a busy machine."""
    experiment, settings = planned("time", archs=["attention", "gdn2", "lstm"])
    calls = []

    def quantity(setting):
        def measure(model):
            calls.append(model)
            return 1e-4 + 1e-8 * flops_per_token(ModelConfig(**model), 16) * (
                2 if setting.arm == "gdn2" else 1
            )

        return Quantity("time", measure)

    found = solved_settings(experiment, settings, tmp_path, quantity)
    seconds = {i: quantity(s).measure(s.shared["model"]) for i, s in enumerate(found)}
    table = ledger_table(found, experiment.tuning, seconds)
    assert table["matched"].all() and (table["deviation"].abs() <= TOLERANCE["time"]).all()
    before = len(calls)
    again = solve_all(experiment, settings, quantity, tmp_path / "matched.json")
    assert len(calls) == before and plan_solved(experiment, again, "cpu")[0].shared == found[0].shared


def with_model(setting, **fields):
    return dataclasses.replace(
        setting, shared={**setting.shared, "model": {**setting.shared["model"], **fields}}
    )


def test_what_cannot_be_matched_is_flagged(tmp_path):
    experiment, settings = planned("params", archs=["gdn", "mlstm"])
    huge = [with_model(s, n_layers=20) if s.arm == "mlstm" else s for s in settings[:2]]
    solution = solve_task(huge, lambda s: model_quantity("params", 16), "params", "gdn")
    assert set(solution) <= {"mlstm"}
    changed = [with_model(s, **solution.get(s.arm, {})) for s in huge]
    table = ledger_table(
        changed, experiment.tuning.model_copy(update={"reference": "gdn"}), {0: 1e-3, 1: 1e-3}
    )
    assert dict(table.select("arm", "matched").iter_rows()) == {"gdn": True, "mlstm": False}
    assert "UNMATCHED" in ledger_lines(table)[1]


def test_own_parameters_that_undo_the_match_are_refused(tmp_path):
    own = {"gdn": {"conv": {"choices": ["none", "dynamic-lowrank"]}}}
    with pytest.raises(ExperimentError, match=r"\[tuning.own.gdn\].* changes the params by .* drop one"):
        tuning_fakes.drive(tmp_path, archs=["gdn", "swa"], tuning={"match": "params", "own": own})
    assert not any((tmp_path / "runs").iterdir())
    window = {"swa": {"window": {"choices": [2, 4]}}}  # leaves the parameters alone
    report = tuning_fakes.drive(tmp_path, archs=["gdn", "swa"], tuning={"match": "params", "own": window})
    assert report.winners is not None


def test_a_hidden_width_is_exact_and_absent_fields_leave_ids_alone():
    base = {"arch": "gdn", "vocab_size": 8, "n_classes": 8, "d_model": 16, "n_layers": 1}
    sizes = [model_params(build_model(ModelConfig(**base, mlp_hidden=h), seed=0)) for h in (21, 22)]
    assert sizes[1] - sizes[0] == 3 * 16
    plain = planned("none")[1][0].shared["model"]
    assert "mlp_hidden" not in plain
    with pytest.raises(ValueError, match="mlp_hidden must be at least 1"):
        ModelConfig(**base, mlp_hidden=0)


def test_flops_are_those_of_the_formula():
    """Linear attention without convolution, by hand: products, then the loop's elementwise part."""
    D, hidden, V, T = 16, 24, 8, 12
    base = dict(vocab_size=V, n_classes=V, d_model=D, n_layers=1, n_heads=1, conv="none", mlp_hidden=hidden)

    def count(arch, **changes):
        return flops_per_token(ModelConfig(arch=arch, **{**base, **changes}), T)

    # one hidden unit more: a row in gate and up, a column in down, and silu, product
    assert count("gdn", mlp_hidden=hidden + 1) - count("gdn") == 2 * 3 * D + 2
    # another layer class: head of one class more
    assert count("gdn", n_classes=V + 1) - count("gdn") == 2 * D
    # softmax attention grows with the length, recurrences do not (up to what is done once a sequence)
    config = ModelConfig(arch="attention", **base)
    grown = flops_per_token(config, 2 * T) - flops_per_token(config, T)
    assert grown == pytest.approx(T * (2 * 2 * D + 3), rel=0.35)
    config = ModelConfig(arch="gdn2", **base)
    assert flops_per_token(config, 2 * T) == pytest.approx(flops_per_token(config, T), rel=1e-3)
    # the memory: decay, erase, write and read of a K x V state are at least these products
    assert count("linear_attention") > 2 * (4 * D * D + 3 * D * hidden + D * V) + 2 * 2 * D * D


def test_naive_updates_are_counted():
    def count(**options):
        options = {"mini_batch": 4, "window": 8, "next_token_head": "task", **options}
        sizes = dict(vocab_size=8, n_classes=8, d_model=16, n_layers=2)
        return flops_per_token(ModelConfig(arch="ttt_e2e", **sizes, options=options), 12)

    assert count(naive=True) == count() > 1.1 * count(mini_batch=0)


def test_the_count_does_not_depend_on_the_backend(monkeypatch):
    config = ModelConfig(arch="gdn2", vocab_size=8, n_classes=8, d_model=16, n_layers=1)
    counts = set()
    for name in ("chunked", "reference", "auto"):
        monkeypatch.setenv("ARENA_BACKEND", name)
        counts.add(flops_per_token(config, 16))
    assert len(counts) == 1


def test_a_probe_measures_a_step_once(tmp_path, monkeypatch):
    import arena.tuning.cost as cost

    setting = plan_settings(tuning_fakes.experiment(archs=["gdn"]))[0]
    probes = cost.Probes(tmp_path / "probes.json", device="cpu", threads=1)
    seconds = probes.seconds(setting)
    assert 1e-6 < seconds < 10
    monkeypatch.setattr(cost, "probe", None)
    again = cost.Probes(tmp_path / "probes.json", device="cpu", threads=1)
    assert again.seconds(setting) == seconds
    assert cost.run_tokens(setting) == pytest.approx(8 * 16 * cost.mean_length(setting))
    assert cost.run_seconds(setting, 1.0, tested=True) > cost.run_seconds(setting, 1.0, tested=False) > 8
