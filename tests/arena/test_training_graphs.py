"""Steps and evaluations that are recorded and replayed equal those that are not; said where they can't be.

Without a GPU a stand-in records (tape.py): what would stay as it was at the recording does so here too.
"""

import gc
import math
import warnings
import weakref

import pytest
import tape
import torch

import synthetic_tasks
from arena.model import ModelConfig
from arena.training import Replica, ReplicaResult, TrainConfig, fleet, graphs, train_fleet
from arena.training.graphs import Graphs

TASK = synthetic_tasks.get("parity", supervision="running")
STOP = 0.57  # some replicas get there, others do not
CPU = torch.device("cpu")
REPLICAS = [
    Replica(seed=0),
    Replica(seed=1, lr=1e30, clip=math.inf),
    Replica(seed=2, lr=2e-2, weight_decay=0.3, beta2=0.9, warmup=0.4),
    Replica(seed=0, lr=3e-3, clip=0.1),
]


def model_config(arch: str, **changes) -> ModelConfig:
    sizes = {"vocab_size": TASK.vocab_size, "n_classes": TASK.n_classes, "d_model": 16, "n_layers": 1}
    return ModelConfig(**{"arch": arch, **sizes, **changes})


def train_config(**changes) -> TrainConfig:
    defaults = {
        "steps": 16,
        "batch_size": 16,
        "train_lengths": (4, 12),
        "train_length_choices": (4, 9, 12),
        "valid_lengths": (12, 20),
        "eval_lengths": (32,),
        "eval_examples": 48,
        "eval_every": 4,
    }
    return TrainConfig(**{**defaults, **changes})


def same(one: ReplicaResult, other: ReplicaResult) -> bool:
    """Bit for bit, all but the time."""
    return (
        (one.status, one.steps, one.curve, one.final) == (other.status, other.steps, other.curve, other.final)
        and one.state_dict.keys() == other.state_dict.keys()
        and all(torch.equal(one.state_dict[name], other.state_dict[name]) for name in one.state_dict)
    )


@pytest.fixture
def recorded(monkeypatch):
    """Graphs of every fleet that is trained, recorded by the stand-in where there is no GPU."""
    found: list[Graphs] = []

    def make(device: torch.device) -> Graphs:
        found.append(Graphs(device, tape.record if device.type == "cpu" else None))
        return found[-1]

    plain = fleet._Fleet.__init__

    def init(self, *args, graphs: bool = False, **kwargs):
        plain(self, *args, graphs=graphs, **kwargs)
        self.graphs = make(self.device) if graphs else None

    monkeypatch.setattr(fleet._Fleet, "__init__", init)
    return found


DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("gdn2", {}),
        ("mamba2", {}),
        ("slstm", {}),
        ("xlstm[1:1]", {"n_layers": 2}),
        ("attention", {}),
        ("gdn2", {"conv": "dynamic-lowrank"}),
        ("gdn", {"conv": "dynamic-headwise"}),
        ("gdn", {"experts": 4, "experts_per_token": 2}),
        ("ttt_e2e", {"options": {"inner_warmup": 0.5}}),
    ],
)
def test_replayed_steps_equal_plain_ones(recorded, monkeypatch, device, arch, changes):
    """Several lengths, rates that change, divergence, early stop, experts, TTT's schedule of its own."""
    monkeypatch.setenv("ARENA_BACKEND", "slstm=fused")  # numba's loops are not operations of torch
    model, config = model_config(arch, **changes), train_config(stop_at=STOP)
    replayed, plain = (
        train_fleet(model, TASK, config, REPLICAS, device=device, graphs=graphs) for graphs in (True, False)
    )
    assert all(same(one, other) for one, other in zip(replayed, plain, strict=True))
    assert replayed[1].status == "diverged"
    assert [graphs.count("training") for graphs in recorded] == [3]
    assert recorded[0].count("evaluation") >= 2


def test_some_stop_early_and_some_go_on(recorded):
    """So that the test above is about what it says."""
    steps = set()
    for arch in ("gdn2", "mamba2", "slstm", "attention"):
        results = train_fleet(model_config(arch), TASK, train_config(stop_at=STOP), REPLICAS)
        steps |= {result.steps for result in results if result.status == "done"}
    assert len(steps) > 1 and 16 in steps


def test_the_first_call_of_a_shape_runs_the_second_records():
    calls, recordings = [], []

    def capture(work):
        recordings.append(len(calls))
        return tape.record(work)

    total = torch.zeros(())

    def work(x: torch.Tensor) -> None:
        calls.append(tuple(x.shape))
        total.add_(x.sum())

    graphs = Graphs(CPU, capture)
    for size in (2, 3, 2, 2, 3):
        graphs.run("sums", work, torch.full((size,), 1.0 + size))
    assert calls == [(2,), (3,), (2,), (3,)] and recordings == [2, 3] and graphs.count("sums") == 2
    assert total.item() == 3 * 6 + 2 * 12


def test_a_recording_that_fails_is_said_once_and_changes_nothing(recorded, monkeypatch):
    def fails(work):
        try:
            raise ValueError("the kernel chooses its settings while it runs")
        finally:
            raise RuntimeError("capture was invalidated")

    config = train_config()
    plain = train_fleet(model_config("gdn2"), TASK, config, REPLICAS, graphs=False)
    monkeypatch.setattr(tape, "record", fails)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        results = train_fleet(model_config("gdn2"), TASK, config, REPLICAS, graphs=True)
    assert sorted(str(warning.message) for warning in said) == [
        f"{name}: no CUDA graph could be recorded (the kernel chooses its settings while it runs); "
        "it runs kernel by kernel"
        for name in ("evaluation", "training")
    ]
    assert all(same(one, other) for one, other in zip(results, plain, strict=True))
    assert recorded[0].count("training") == recorded[0].count("evaluation") == 0


def test_more_shapes_than_are_recorded(recorded, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    config = train_config()
    with pytest.warns(RuntimeWarning, match="training: further shapes than the first 2 run kernel by kernel"):
        results = train_fleet(model_config("gdn2"), TASK, config, REPLICAS, graphs=True)
    plain = train_fleet(model_config("gdn2"), TASK, config, REPLICAS, graphs=False)
    assert all(same(one, other) for one, other in zip(results, plain, strict=True))


def test_an_error_of_the_work_itself_is_the_works_error():
    def work(x: torch.Tensor) -> None:
        raise FloatingPointError("no")

    graphs = Graphs(CPU, tape.record)
    for _ in range(3):
        with pytest.raises(FloatingPointError):
            graphs.run("broken", work, torch.zeros(2))


def test_a_fleet_is_gone_when_its_last_name_is():
    """No cycle: the GPU's memory must be free for the next fleet at once, not at the next collection."""
    gc.disable()
    try:
        one = fleet._Fleet(model_config("gdn"), TASK, train_config(), REPLICAS, CPU)
        one.graphs = Graphs(CPU, lambda work: (int, None if torch.is_grad_enabled() else work()))
        for step in range(8):
            one.step(step)
        one.measure("valid")
        one.measure("valid")
        assert one.graphs.count("training") == 3 and one.graphs.count("evaluation") > 1
        ref = weakref.ref(one)
        del one
        assert ref() is None
    finally:
        gc.enable()
