"""The decoder of MAD's compression: every answer is read out of the last position."""

from __future__ import annotations

import pytest
import torch

import synthetic_tasks
from arena.model import ModelConfig, PositionDecoder, build_model
from arena.training import Replica, TrainConfig, train_fleet

TASK = synthetic_tasks.get("compression", compat="mad", n_symbols=4)
SIZES = {"vocab_size": TASK.vocab_size, "n_classes": TASK.n_classes, "d_model": 32, "n_layers": 1}
TRAIN = TrainConfig(steps=2, batch_size=16, train_lengths=(6, 6), eval_lengths=(16,), eval_examples=16)


def test_only_the_last_position_is_read():
    decoder = PositionDecoder(7, 3).double()
    x, other = torch.randn(2, 5, 7).double(), torch.randn(2, 5, 7).double()
    other[:, -1] = x[:, -1]
    assert torch.equal(decoder(x), decoder(other))
    other[:, -1] += 1
    assert not torch.allclose(decoder(x), decoder(other))
    logits = decoder(x)
    assert logits.shape == (2, 5, 3) and not torch.allclose(logits[:, 0], logits[:, 1])


def test_the_positions_are_those_of_the_formula():
    decoder = PositionDecoder(4, 4).double()
    with torch.no_grad():
        for linear in (decoder.hidden, decoder.out):
            linear.weight.copy_(torch.eye(4))
            linear.bias.zero_()
    t = torch.arange(6).double()
    expected = torch.stack([t.sin(), t.cos(), (t / 100).sin(), (t / 100).cos()], -1)
    assert torch.allclose(decoder(torch.zeros(1, 6, 4).double())[0], torch.nn.functional.gelu(expected))


def test_a_task_that_needs_it_is_refused_without():
    with pytest.raises(ValueError, match="decoder=True"):
        train_fleet(ModelConfig(arch="gdn", **SIZES), TASK, TRAIN, [Replica(seed=0)])


def test_it_trains_in_a_fleet_and_has_no_step_form():
    config = ModelConfig(arch="gdn", decoder=True, **SIZES)
    results = train_fleet(config, TASK, TRAIN, [Replica(seed=0), Replica(seed=1)])
    assert [result.status for result in results] == ["done", "done"]
    model = build_model(config, seed=0)
    with pytest.raises(ValueError, match="no step form"):
        model.step(torch.zeros(1, dtype=torch.int64), model.initial_state(1))
