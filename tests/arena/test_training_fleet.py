"""The fleet as a whole: equal to a plain loop, equal to runs alone, divergence, early stop, learning."""

import math

import pytest
import torch
import torch.nn.functional as F

import synthetic_tasks
from arena.model import ModelConfig, arch_names, build_model, model_params
from arena.training import METRICS, FleetOutOfMemory, Replica, ReplicaResult, TrainConfig, train_fleet
from arena.training.data import step_lengths
from arena.training.optimiser import learning_rates

TASK = synthetic_tasks.get("parity", supervision="running")


def model_config(arch: str, **changes) -> ModelConfig:
    sizes = {"vocab_size": TASK.vocab_size, "n_classes": TASK.n_classes, "d_model": 16, "n_layers": 1}
    return ModelConfig(**{"arch": arch, **sizes, **changes})


def train_config(**changes) -> TrainConfig:
    defaults = {
        "steps": 6,
        "batch_size": 16,
        "train_lengths": (4, 20),
        "eval_lengths": (32,),
        "eval_examples": 16,
    }
    return TrainConfig(**{**defaults, **changes})


def same(one: ReplicaResult, other: ReplicaResult) -> bool:
    """Bit for bit, all but the time."""
    return (
        one.replica == other.replica
        and one.status == other.status
        and one.steps == other.steps
        and one.curve == other.curve
        and one.final == other.final
        and one.train_tokens == other.train_tokens
        and one.state_dict.keys() == other.state_dict.keys()
        and all(torch.equal(one.state_dict[name], other.state_dict[name]) for name in one.state_dict)
    )


def losses(result: ReplicaResult) -> list[float]:
    return [row["value"] for row in result.final if row["metric"] == "loss"]


def test_one_replica_equals_a_plain_training_loop():
    # A large epsilon: without it AdamW blows the rounding of a gradient near 0 up to the size of a step.
    config, replica = (
        train_config(steps=8, beta1=0.85, eps=1e-3),
        Replica(seed=3, lr=3e-3, clip=0.5, beta2=0.95),
    )
    model = build_model(model_config("linear_attention"), seed=3)
    decayed = [p for p in model.parameters() if not getattr(p, "no_weight_decay", False)]
    free = [p for p in model.parameters() if getattr(p, "no_weight_decay", False)]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": free, "weight_decay": 0.0}],
        betas=(0.85, 0.95),
        eps=1e-3,
    )
    rates, seen = learning_rates(config, [replica]), []
    for step, length in enumerate(step_lengths(config, TASK)):
        batch = TASK.sample(batch_size=16, length=length, seed=3, index=16 * step, split="train")
        for group in optimiser.param_groups:
            group["lr"] = rates[step, 0].item()
        optimiser.zero_grad()
        loss = F.cross_entropy(model(batch.tokens)[0].flatten(0, 1), batch.targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimiser.step()
        seen.append(loss.item())
    [result] = train_fleet(model_config("linear_attention"), TASK, config, [replica])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(result.state_dict[name], value, rtol=1e-5, atol=2e-6)
    [train_row] = [row for row in result.curve if row["split"] == "train"]
    assert train_row["value"] == pytest.approx(sum(seen) / 8, rel=1e-5)
    model.load_state_dict(result.state_dict)
    batch = TASK.sample(batch_size=16, length=32, seed=0, index=0, split="test")
    logits = model(batch.tokens)[0]
    final = {(row["split"], row["metric"]): row["value"] for row in result.final}
    assert final["test", "loss"] == pytest.approx(
        F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).item(), rel=1e-5
    )
    assert final["test", "accuracy"] == (logits.argmax(-1) == batch.targets).float().mean().item()


def test_rows_and_totals():
    config = train_config(eval_every=4, eval_lengths=(32, 64), train_lengths=(10, 20))
    [result] = train_fleet(model_config("gdn"), TASK, config, [Replica(seed=0)])
    assert [(row["step"], row["split"], row["eval_length"], row["metric"]) for row in result.curve] == [
        (step, *point)
        for step in (4, 6)
        for point in [("train", None, "loss"), *(("valid", n, m) for n in (20, 40) for m in METRICS)]
    ]
    assert [(row["split"], row["eval_length"], row["metric"]) for row in result.final] == [
        (split, length, metric)
        for split, lengths in (("valid", (20, 40)), ("test", (32, 64)))
        for length in lengths
        for metric in METRICS
    ]
    assert all(row["state_bytes"] > 0 and row["chance"] == 0.5 for row in result.final)
    assert result.final[:8] == [
        {**{k: v for k, v in row.items() if k != "step"}, "state_bytes": result.final[0]["state_bytes"]}
        for row in result.curve[-8:]
    ]
    assert result.train_tokens == 16 * sum(step_lengths(config, TASK))
    assert result.params == model_params(build_model(model_config("gdn"), seed=0))
    assert (result.status, result.steps) == ("done", 6)
    assert result.wall_s > 0


@pytest.mark.parametrize("arch", arch_names())
def test_result_does_not_depend_on_the_size_of_the_fleet(arch):
    """Bit for bit on the CPU, in one thread, for batches of a multiple of 16 sequences.

    Every operation either works element by element, or is a batched matrix product whose batches are computed
    one by one, or sums along an axis that belongs to one replica; parameters of all replicas have the same
    alignment.
    """
    replicas = [
        Replica(seed=seed, lr=lr, weight_decay=wd, warmup=warmup, beta2=beta2, clip=clip)
        for seed, lr, wd, warmup, beta2, clip in [
            (0, 1e-2, 0.1, 0.5, 0.99, 1.0),
            (0, 1e-3, 0.0, 0.2, 0.9, 0.1),
            (1, 1e-2, 0.1, 0.5, 0.99, math.inf),
            (2, 3e-3, 0.5, 0.0, 0.95, 1.0),
            (3, 1e-2, 0.1, 0.5, 0.99, 1.0),
            (4, 1e-2, 0.1, 0.5, 0.99, 1.0),
            (5, 1e-2, 0.1, 0.5, 0.99, 1.0),
            (6, 1e-2, 0.1, 0.5, 0.99, 1.0),
        ]
    ]
    config = train_config(steps=4)
    model = model_config(arch, n_layers=2 if arch.startswith("xlstm") else 1)
    three, eight = (train_fleet(model, TASK, config, replicas[:size]) for size in (3, 8))
    [alone] = train_fleet(model, TASK, config, replicas[2:3])
    pairs = [(alone, three[2]), *zip(three, eight, strict=False)]
    assert all(same(one, other) for one, other in pairs)


@pytest.mark.parametrize("arch", ["gdn-neg", "mamba2"])
def test_odd_batches_agree_to_rounding(arch):
    """Not bit for bit.

    A vectorised loop of torch (softplus, sigmoid) computes the last elements, those beyond a multiple of 16,
    with the scalar function, which rounds differently; in a fleet they belong to the last replica only.
    """
    config = train_config(batch_size=5, eval_examples=7, steps=4)
    replicas = [Replica(seed=seed) for seed in range(3)]
    together = train_fleet(model_config(arch), TASK, config, replicas)
    for replica, result in zip(replicas, together, strict=True):
        [alone] = train_fleet(model_config(arch), TASK, config, [replica])
        assert losses(result) == pytest.approx(losses(alone), rel=1e-5)


def test_same_call_same_bits_and_no_global_random_state():
    replicas = [Replica(seed=0, lr=1e-2), Replica(seed=1)]
    before = torch.get_rng_state()
    one, other = (train_fleet(model_config("gdn2"), TASK, train_config(), replicas) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(same(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[0].state_dict["embedding.weight"], one[1].state_dict["embedding.weight"])


@pytest.mark.parametrize("arch", ["gdn-neg", "mlstm"])
def test_divergence_is_isolated(arch):
    replicas = [Replica(seed=0), Replica(seed=1, lr=1e30, clip=math.inf), Replica(seed=2)]
    config = train_config(eval_every=2)
    together = train_fleet(model_config(arch), TASK, config, replicas)
    assert [result.status for result in together] == ["done", "diverged", "done"]
    for replica, result in zip(replicas, together, strict=True):
        [alone] = train_fleet(model_config(arch), TASK, config, [replica])
        assert same(alone, result)
    lost = together[1]
    assert lost.steps < 6
    assert lost.train_tokens == 16 * sum(step_lengths(config, TASK)[: lost.steps])
    assert all(value.isfinite().all() for value in lost.state_dict.values())
    assert {(row["metric"], row["value"]) for row in lost.final} == {
        ("loss", math.inf),
        ("accuracy", 0.0),
        ("chance_scaled_accuracy", -1.0),
        ("sequence_accuracy", 0.0),
    }
    keys = [[(row["split"], row["eval_length"], row["metric"]) for row in r.final] for r in together]
    assert keys[0] == keys[1]


def test_all_diverged_ends_early():
    steps: list[int] = []
    replicas = [Replica(seed=0, lr=1e30, clip=math.inf)]
    config = train_config(steps=50, eval_every=5)
    [result] = train_fleet(model_config("gdn"), TASK, config, replicas, on_step=steps.append)
    assert result.status == "diverged"
    assert steps[-1] < 50


def test_early_stop_freezes_a_replica_at_its_own_step():
    model = model_config("gdn-neg")
    replicas = [Replica(seed=0, lr=0.0), Replica(seed=1, lr=2e-2)]

    def config(**changes) -> TrainConfig:
        return train_config(
            **{"steps": 24, "eval_every": 4, "train_lengths": (9, 13), "eval_examples": 64, **changes}
        )

    def accuracies(result: ReplicaResult) -> list[float]:
        """The worse of the two valid lengths, point by point."""
        rows = [row["value"] for row in result.curve if row["metric"] == "accuracy"]
        return [min(pair) for pair in zip(rows[::2], rows[1::2], strict=True)]

    free = train_fleet(model, TASK, config(), replicas)
    slow, fast = (accuracies(result) for result in free)
    # A bar that the fast replica passes before the end and the slow one never does.
    point = next(i for i, value in enumerate(fast) if value > max(slow))
    assert point < len(fast) - 1
    bar = fast[point]
    stopped = train_fleet(model, TASK, config(stop_at=bar), replicas)
    assert [result.steps for result in stopped] == [24, 4 * (point + 1)]
    assert [result.status for result in stopped] == ["done", "done"]
    assert same(stopped[0], free[0])
    assert stopped[1].curve == free[1].curve[: len(stopped[1].curve)]
    assert stopped[1].curve[-1]["step"] == 4 * (point + 1)
    for replica, result in zip(replicas, stopped, strict=True):
        [alone] = train_fleet(model, TASK, config(stop_at=bar), [replica])
        assert same(alone, result)


def test_data_order_is_paired_across_architectures(monkeypatch):
    seen: dict[str, list] = {"gdn": [], "mlstm": []}
    plain = type(TASK).sample_seeds
    for arch, calls in seen.items():

        def record(self, *args, calls=calls, **kwargs):
            calls.append((args, kwargs))
            return plain(self, *args, **kwargs)

        monkeypatch.setattr(type(TASK), "sample_seeds", record)
        train_fleet(model_config(arch), TASK, train_config(), [Replica(seed=4), Replica(seed=5)])
    assert seen["gdn"] == seen["mlstm"]
    assert len(seen["gdn"]) >= 6


def test_out_of_memory_is_told_apart(monkeypatch):
    def fail(error: Exception):
        def step(*_):
            raise error

        monkeypatch.setattr("arena.training.fleet.FleetAdamW.step", step)
        train_fleet(model_config("gdn"), TASK, train_config(), [Replica(seed=0), Replica(seed=1)])

    with pytest.raises(FleetOutOfMemory, match="2 replicas") as caught:
        fail(torch.OutOfMemoryError("CUDA out of memory"))
    assert caught.value.n_replicas == 2
    assert caught.value.__context__ is None
    with pytest.raises(FleetOutOfMemory):
        fail(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    with pytest.raises(RuntimeError, match="shape") as other:
        fail(RuntimeError("shape mismatch"))
    assert not isinstance(other.value, FleetOutOfMemory)


def test_requests_that_make_no_sense():
    with pytest.raises(ValueError, match="at least one replica"):
        train_fleet(model_config("gdn"), TASK, train_config(), [])
    with pytest.raises(ValueError, match="n_classes is 5, the task's 2"):
        train_fleet(model_config("gdn", n_classes=5), TASK, train_config(), [Replica(seed=0)])
    with pytest.raises(ValueError, match="length"):
        train_fleet(
            model_config(
                "gdn", vocab_size=(mqar := synthetic_tasks.get("mqar")).vocab_size, n_classes=mqar.n_classes
            ),
            mqar,
            train_config(eval_lengths=(1,)),
            [Replica(seed=0)],
        )


def test_what_on_step_raises_ends_the_training():
    def stop(done: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_fleet(model_config("gdn"), TASK, train_config(), [Replica(seed=0)], on_step=stop)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_steps_on_a_gpu_do_not_wait_for_it():
    replicas = [Replica(seed=0), Replica(seed=1, lr=1e30, clip=math.inf), Replica(seed=2)]
    config = train_config(steps=8)

    def forbid(done: int) -> None:
        # Warm-up, which compiles and loads, may wait; the last step is followed by an evaluation, which does.
        torch.cuda.set_sync_debug_mode("error" if 3 <= done < 8 else "default")

    try:
        on_gpu = train_fleet(model_config("gdn"), TASK, config, replicas, device="cuda", on_step=forbid)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_cpu = train_fleet(model_config("gdn"), TASK, config, replicas)
    assert [result.status for result in on_gpu] == ["done", "diverged", "done"]
    for one, other in zip(on_gpu, on_cpu, strict=True):
        assert one.steps == other.steps
        assert all(value.device.type == "cpu" for value in one.state_dict.values())
        for row, twin in zip(one.final, other.final, strict=True):
            if row["metric"] == "loss" and one.status == "done":
                assert row["value"] == pytest.approx(twin["value"], rel=1e-2)


def test_gdn_neg_learns_parity_and_gdn_does_not():
    config = train_config(steps=250, train_lengths=(3, 16), valid_lengths=(20,), eval_examples=64)

    def best(arch: str) -> float:
        replicas = [Replica(seed=seed, lr=1e-2) for seed in range(4)]
        results = train_fleet(model_config(arch), TASK, config, replicas)
        rows = [row for result in results for row in result.final]
        return max(row["value"] for row in rows if (row["split"], row["metric"]) == ("test", "accuracy"))

    assert best("gdn-neg") > 0.95
    assert best("gdn") < 0.75
