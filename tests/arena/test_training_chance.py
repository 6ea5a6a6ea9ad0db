"""Lengths at which a blind guess is always right measure nothing, and are refused before training."""

from __future__ import annotations

import pytest

import synthetic_tasks
from arena.grid.experiment import ExperimentError, parse_experiment
from arena.grid.plan import plan_runs
from arena.model import ModelConfig
from arena.training import Replica, TrainConfig, train_fleet
from arena.training.data import valid_lengths

TASK = synthetic_tasks.get("dyck")
REQUEST = {
    "name": "blind",
    "archs": ["gdn"],
    "model": {"d_model": 8, "n_layers": 1, "n_heads": 1},
    "train": {"steps": 1, "batch_size": 2},
    "tasks": [{"name": "dyck", "train_lengths": [2, 8], "eval_lengths": [2]}],
}


def test_a_blind_guess_is_right_there():
    assert TASK.chance(2) == 1.0 and TASK.chance(8) < 1.0


def test_refused_by_the_plan():
    with pytest.raises(ExperimentError, match=r"'dyck', eval_lengths: .*blind guess"):
        plan_runs(parse_experiment(REQUEST, label="request"))


def test_refused_by_the_trainer():
    config = TrainConfig(steps=1, batch_size=2, train_lengths=(2, 8), eval_lengths=(2,))
    model = ModelConfig(arch="gdn", vocab_size=TASK.vocab_size, n_classes=TASK.n_classes, d_model=8)
    with pytest.raises(ValueError, match="blind guess"):
        train_fleet(model, TASK, config, [Replica(seed=0)])


def test_never_chosen_for_validation():
    assert 2 not in valid_lengths(TrainConfig(steps=1, batch_size=2, train_lengths=(2, 2)), TASK)
