"""The probe of a fleet's memory, and the packing that follows from it."""

from __future__ import annotations

import dataclasses

import grid_fakes
import pytest
import torch

import synthetic_tasks
from arena.grid import load_results, parse_experiment, plan_runs, run_experiment
from arena.grid.plan import Fleet
from arena.grid.worker import train
from arena.model import ModelConfig
from arena.training import FleetOutOfMemory, Replica, TrainConfig, footprint, measure_footprint

TASK = synthetic_tasks.get("mqar", n_pairs=2, vocab_size=16)
TRAIN = TrainConfig(steps=3, batch_size=8, train_lengths=(40, 40), eval_lengths=(48,), eval_examples=16)


def model(arch: str) -> ModelConfig:
    return ModelConfig(
        arch=arch, vocab_size=TASK.vocab_size, n_classes=TASK.n_classes, d_model=16, n_layers=1, n_heads=2
    )


@pytest.mark.parametrize("arch", ["gdn2", "mlstm", "slstm", "attention"])
def test_two_small_fleets_tell_the_memory_of_a_larger_one(arch):
    found = measure_footprint(model(arch), TASK, TRAIN)
    replicas = [Replica(seed=seed) for seed in range(7)]
    one_step = dataclasses.replace(TRAIN, steps=1, eval_lengths=(), valid_lengths=(40,))

    def step(size: int) -> None:
        footprint._Fleet(model(arch), TASK, one_step, replicas[:size], torch.device("cpu")).step(0)

    peak = footprint._cpu_peak(step, 7)
    assert found.fixed + 7 * found.per_replica == pytest.approx(peak, rel=0.01)
    assert found.fits(peak * 1.05) >= 7 > found.fits(peak * 0.9)
    assert found.fits(0) == found.fits(-1e9) == 0


def test_a_probe_leaves_no_trace(capfd):
    before = torch.random.get_rng_state()
    assert measure_footprint(model("gdn"), TASK, TRAIN) == measure_footprint(model("gdn"), TASK, TRAIN)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert capfd.readouterr() == ("", "")


def test_the_budget_is_a_share_of_the_machine(monkeypatch):
    monkeypatch.setattr(footprint, "_machine_bytes", lambda: 100 * 2**30)
    assert footprint.memory_budget("cpu", 1.0) == 79.5 * 2**30
    assert footprint.memory_budget("cpu", 0.25) == 19.5 * 2**30
    gpu = type("GPU", (), {"total_memory": 80 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    assert footprint.memory_budget("cuda", 1.0) == 72 * 2**30
    assert footprint.memory_budget("cuda", 0.5) == 36 * 2**30


SMALL = {
    "name": "packed",
    "archs": ["gdn"],
    "seeds": 7,
    "model": {"d_model": 8, "n_layers": 1, "n_heads": 1},
    "train": {"steps": 3, "batch_size": 16, "eval_examples": 16},
    "tasks": [{"name": "parity", "train_lengths": [3, 8], "eval_lengths": [24, 32]}],
}


def test_a_fleet_that_the_probe_finds_too_large_is_halved_before_it_trains(tmp_path, monkeypatch):
    """The table is that of the whole fleet, bit for bit."""
    import arena.training

    experiment = parse_experiment(SMALL)
    run_experiment(experiment, tmp_path / "whole", executor=grid_fakes.Inline())
    asked = []

    def budget(device, share):
        asked.append((device, share))
        return found.fixed + 2.5 * found.per_replica

    monkeypatch.setattr(arena.training, "memory_budget", budget)
    config = plan_runs(experiment)[0].config
    found = measure_footprint(
        ModelConfig(**config["model"]), synthetic_tasks.get("parity"), TrainConfig(**config["train"])
    )
    report = run_experiment(experiment, tmp_path / "pieces", executor=grid_fakes.Inline())
    assert report.stored == 7 and set(asked) == {("cpu", 1.0)}
    whole, pieces = (load_results(tmp_path / name) for name in ("whole", "pieces"))
    sizes = pieces.select("fleet_id", "run_id").unique()["fleet_id"].value_counts()["count"]
    assert sorted(sizes) == [1, 2, 2, 2] and whole["fleet_id"].n_unique() == 1
    other = ("fleet_id", "wall_s")
    assert pieces.drop(other).equals(whole.drop(other))
    (event,) = [line for line in (tmp_path / "pieces" / "events.jsonl").read_text().splitlines()]
    assert '"halved"' in event and "by a short probe" in event


def test_one_run_is_tried_whatever_the_probe_would_say(monkeypatch):
    import arena.training

    monkeypatch.setattr(arena.training, "memory_budget", lambda device, share: 0)
    runs = plan_runs(parse_experiment(SMALL))
    one, two = (Fleet(runs=tuple(runs[:count])) for count in (1, 2))
    assert set(train(one, lambda steps: None)) == {runs[0].id}
    with pytest.raises(FleetOutOfMemory, match="by a short probe") as caught:
        train(two, lambda steps: None)
    assert caught.value.fits == 0


def test_a_worker_of_another_version_is_refused(monkeypatch):
    import kernels

    runs = plan_runs(parse_experiment(SMALL))
    monkeypatch.setattr(kernels, "RESULT_VERSION", 99)
    with pytest.raises(RuntimeError, match=r"another memory-arena than the driver \(kernels 99, not"):
        train(Fleet(runs=tuple(runs[:1])), lambda steps: None)
