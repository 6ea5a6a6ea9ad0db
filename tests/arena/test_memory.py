from __future__ import annotations

import dataclasses

import pytest
import torch

from arena.memory import NAMED, TRACE_FIELDS, GateSpec, state_bytes

BAD = [
    (dict(decay="vector"), "decay must be one of"),
    (dict(erase_range=3, erase="scalar"), "erase_range must be one of"),
    (dict(a_range=(2.0, 1.0)), "a_range"),
    (dict(signed=True), "signed decay needs a decay"),
    (dict(erase_range=2), "needs an erase gate"),
    (dict(erase="scalar", qk_map="none"), "keys of length 1"),
    (dict(coupling="tied"), "tied gates share"),
    (dict(coupling="tied", erase="scalar", write="channel"), "tied gates share"),
    (dict(coupling="step", decay="channel", write="scalar"), "coupling='step'"),
    (dict(coupling="step", decay="scalar"), "coupling='step'"),
    (dict(write="exponential", normaliser="max_abs"), "exponential write needs a positive scalar decay"),
    (dict(write="exponential", decay="scalar", decay_form="sigmoid"), "needs normaliser='max_abs'"),
    (dict(write="channel", normaliser="max_abs"), "without channels"),
    (dict(normaliser="sum"), "positive features"),
]


@pytest.mark.parametrize(("fields", "reason"), BAD)
def test_contradictions_are_refused(fields, reason):
    with pytest.raises(ValueError, match=reason.replace("(", r"\(")):
        GateSpec(**fields)


def test_replace_names_the_axes():
    assert NAMED["gdn"].replace(decay="channel", a_range=(1.0, 16.0)) == NAMED["kda"]
    with pytest.raises(ValueError, match="no axis 'erse'; known: decay"):
        NAMED["gdn"].replace(erse="scalar")


def test_named_points_are_the_table_of_the_design():
    axes = {name: (g.decay, g.erase, g.write, g.coupling) for name, g in NAMED.items()}
    assert axes["linear_attention"] == ("none", "none", "one", "free")
    assert axes["gla"] == ("channel", "none", "one", "free")
    assert axes["mamba2"] == ("scalar", "none", "scalar", "step")
    assert axes["deltanet"] == ("none", "scalar", "scalar", "tied")
    assert axes["gdn"] == ("scalar", "scalar", "scalar", "tied")
    assert axes["kda"] == ("channel", "scalar", "scalar", "tied")
    assert axes["gdn2"] == ("channel", "channel", "channel", "free")
    assert axes["mlstm"] == ("scalar", "none", "exponential", "free")
    for name, spec in NAMED.items():
        if name.endswith("-neg"):
            plain = NAMED[name.removesuffix("-neg")]
            changed = dict(signed=True) if name == "mamba2-neg" else dict(erase_range=2)
            assert spec == dataclasses.replace(plain, **changed)


def test_common_points_treat_queries_and_keys_alike():
    assert {spec.qk_map for spec in NAMED.values()} == {"l2"}


def test_state_bytes_counts_one_sequence():
    state = {
        "a": torch.zeros(5, 3, 2),
        "b": torch.zeros(5, 4, dtype=torch.float64),
        "c": torch.zeros(5, 0, 7),
    }
    assert state_bytes(state) == 3 * 2 * 4 + 4 * 8


def test_trace_fields_are_documented():
    for name, field in TRACE_FIELDS.items():
        assert field.axes.split()[0] == "B" and field.meaning, name
