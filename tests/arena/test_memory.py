from __future__ import annotations

import dataclasses
import math
import re

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
    (dict(erase="channel", erase_value=1.0), "a frozen erase is one number"),
    (dict(erase_value=1.0), "a frozen erase is one number"),
    (dict(erase="scalar", erase_value=2.5), "in [0, 2]"),
    (dict(erase="scalar", erase_value=float("nan")), "in [0, 2]"),
    (dict(erase="scalar", erase_value=True), "erase_value must be a number"),
    (dict(erase="scalar", erase_value=1.0, erase_range=2), "has no range"),
    (dict(write_value=1.0), "a frozen write is one number"),
    (dict(write="scalar", write_value=0.0), "above 0"),
    (dict(write="scalar", write_value="1"), "write_value must be a number"),
    (dict(erase="scalar", write="scalar", coupling="tied", erase_value=1.0), "can't be frozen"),
    (dict(erase="scalar", write="scalar", coupling="dial", dial=0.5, write_value=1.0), "can't be frozen"),
    (dict(decay="scalar", write="scalar", coupling="complement", write_value=1.0), "can't be frozen"),
    (dict(write="scalar", coupling="complement"), "needs a decay"),
    (dict(decay="scalar", write="channel", coupling="complement"), "the axis of decay"),
    (dict(decay="channel", erase="scalar", write="channel", coupling="complement"), "erase must be 'none'"),
    (dict(erase="scalar", write="scalar", coupling="dial"), "need each other"),
    (dict(erase="scalar", write="scalar", dial=0.5), "need each other"),
    (dict(erase="scalar", write="scalar", coupling="dial", dial=1.5), "in [0, 1]"),
    (dict(erase="scalar", coupling="dial", dial=0.5), "needs an erase gate and a write gate"),
    (dict(write="channel", write_on="correction"), "write_on='correction' needs"),
    (dict(erase="scalar", write="scalar", coupling="tied", write_on="correction"), "write_on='correction'"),
    (
        dict(erase="scalar", write="scalar", write_on="correction", normaliser="max_abs"),
        "a write gate without channels, on the value",
    ),
    (
        dict(
            decay="scalar", decay_form="sigmoid", write="exponential", normaliser="max_abs", coupling="step"
        ),
        "needs scalar decay",
    ),
]


@pytest.mark.parametrize(("fields", "reason"), BAD)
def test_contradictions_are_refused(fields, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
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


def test_the_intervals_of_the_gates():
    def both(**fields):
        spec = GateSpec(**fields)
        return spec.erase_interval, spec.write_interval

    assert both() == ((0, 0), (1, 1))
    free = dict(erase="channel", write="channel")
    assert both(**free, erase_range=2) == ((0, 2), (0, 1))  # free: erase alone is doubled
    assert both(**free, erase_range=2, coupling="tied") == ((0, 2), (0, 2))  # tied: write as well
    assert both(**free, erase_range=2, coupling="dial", dial=0.25) == ((0, 2), (0, 1.75))
    assert both(erase="scalar", erase_value=1, write="scalar", write_value=0.5) == ((1, 1), (0.5, 0.5))
    complement = dict(decay="scalar", write="scalar", coupling="complement")
    assert both(**complement)[1] == (0, 1) and both(**complement, signed=True)[1] == (0, 2)
    assert NAMED["mamba2"].write_interval == NAMED["mlstm"].write_interval == (0, math.inf)


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
