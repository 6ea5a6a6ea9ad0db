"""Weights set by hand solve what the claims are about, in the real blocks, in float32, at every length."""

from __future__ import annotations

import pytest
import torch

import synthetic_tasks
from arena.constructions import (
    CONSTRUCTIONS,
    LENGTH,
    before_silu,
    counting_model,
    measure,
    parity_model,
    recall_model,
    s3_model,
)

BY_NAME = {construction.name: construction for construction in CONSTRUCTIONS}


@pytest.mark.parametrize("name", BY_NAME)
def test_solved_at_32k_by_the_default_backend(name):
    found = measure(BY_NAME[name], sequences=1)
    assert found.length == LENGTH == 32_768
    assert found.accuracy == 1.0 and found.passes
    assert found.margin > 0 and found.ideal > 0
    assert found.backend == "chunked"


@pytest.mark.parametrize("name", BY_NAME)
def test_solved_by_the_reference_too(name):
    found = measure(BY_NAME[name], length=1024, sequences=2, backend="reference")
    assert found.backend == "reference" and found.passes
    assert found.margin == pytest.approx(found.ideal, abs=0.02)


def accuracy(model, construction, length=512):
    task = synthetic_tasks.get(construction.task, **construction.params)
    batch = task.sample(batch_size=8, length=length, seed=0, index=0, split="test")
    with torch.no_grad():
        right = model(batch.tokens)[0].argmax(-1) == batch.targets
    return float(right[batch.targets >= 0].double().mean())


def test_parity_needs_erase_above_1():
    model = parity_model()
    model.blocks[0].gate.spec = model.blocks[0].spec.replace(erase_range=1)
    assert accuracy(model, BY_NAME["parity"]) < 0.6


def test_counting_needs_decay_1():
    """With a half-life of some 70 tokens the last symbols decide."""
    model = counting_model("gla")
    with torch.no_grad():
        model.blocks[0].gate.decay_in[-1].bias.fill_(1.75)  # sigmoid(1.75)^(1/16) = 0.99
    assert accuracy(model, BY_NAME["counting, gla"], length=4096) < 0.9


def test_counting_needs_an_untied_erase():
    model = counting_model("gdn2")
    with torch.no_grad():
        model.blocks[0].gate.erase.weight.neg_()  # erase 1, as much as is written
    assert accuracy(model, BY_NAME["counting, gdn2"]) < 0.6


def test_recall_stops_at_capacity():
    """One key more than there are channels cannot be orthogonal to all others: its pair is lost."""
    model, K = recall_model(8), 8
    with torch.no_grad():
        model.embedding.weight[8, :K] = model.embedding.weight[7, :K]  # two keys in one direction
    task = BY_NAME["recall"]
    small = synthetic_tasks.get(task.task, n_pairs=8, vocab_size=18)
    batch = small.sample(batch_size=16, length=64, seed=0, index=0, split="test")
    scored = batch.targets >= 0
    right = (model(batch.tokens)[0].argmax(-1) == batch.targets)[scored]
    assert float(right.double().mean()) == pytest.approx(7 / 8)
    whole = recall_model(8)(batch.tokens)[0].argmax(-1) == batch.targets
    assert bool(whole[scored].all())


@pytest.mark.parametrize("change", ["one factor", "range 1"])
def test_s3_needs_both_factors_and_the_range(change):
    model = s3_model()
    block = model.blocks[0]
    with torch.no_grad():
        if change == "one factor":
            block.gate.erase.weight.view(2, -1)[1] = -40.0
        else:
            block.gate.spec = block.spec.replace(erase_range=1)
    assert accuracy(model, BY_NAME["s3"]) < 0.6


def test_before_silu_is_its_inverse():
    y = torch.tensor([-0.27, -0.1, 0.0, 1e-3, 1.0, 40.0], dtype=torch.float64)
    assert torch.nn.functional.silu(before_silu(y)) == pytest.approx(y, abs=1e-12)
