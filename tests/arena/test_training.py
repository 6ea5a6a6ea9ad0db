"""Parts of the fleet trainer: data, schedule, optimiser, evaluation, configuration."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import synthetic_tasks
from arena.training import Replica, TrainConfig
from arena.training.data import step_lengths, train_batch, valid_lengths
from arena.training.evaluation import evaluate
from arena.training.optimiser import FlatParameters, FleetAdamW, learning_rates


def train_config(**changes) -> TrainConfig:
    return TrainConfig(**{"steps": 10, "batch_size": 4, "train_lengths": (3, 12), **changes})


class Toy:
    """Random bits, target = the bit; lengths are multiples of ``unit``; short ones are exhaustible."""

    vocab_size, n_classes, tokens_per_position = 2, 2, 1

    def __init__(self, unit: int = 1) -> None:
        self.unit = unit

    def chance(self, length: int) -> float:
        return 0.5

    def check_length(self, length: int) -> None:
        if length % self.unit:
            raise ValueError(f"length must be a multiple of {self.unit}")

    def is_exhaustible(self, length: int) -> bool:
        return length < 6

    def sample(self, *, batch_size: int, length: int, seed: int, index: int, split: str):
        rows = []
        for i in range(index, index + batch_size):
            key = hash((("train", "valid", "test").index(split), length, seed, i)) % (1 << 31)
            rows.append(torch.randint(0, 2, (length,), generator=torch.Generator().manual_seed(key)))
        tokens = torch.stack(rows)
        targets = tokens.clone()
        targets[:, 0] = -100
        return SimpleNamespace(tokens=tokens, targets=targets)


# --- configuration -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"steps": 0}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"eval_examples": 0}, "eval_examples"),
        ({"train_lengths": (0, 3)}, "train_lengths"),
        ({"train_lengths": (5, 3)}, "train_lengths"),
        ({"train_lengths": (5,)}, "train_lengths"),
        ({"train_length_choices": (3, 13)}, "train_length_choices"),
        ({"eval_lengths": (0,)}, "eval_lengths"),
        ({"eval_lengths": (20, 30), "valid_lengths": (30,)}, "share \\[30\\]"),
        ({"eval_every": -1}, "eval_every"),
        ({"final_lr_fraction": 1.5}, "final_lr_fraction"),
        ({"beta1": 1.0}, "beta1"),
        ({"eps": 0.0}, "eps"),
        ({"stop_at": 0.9}, "eval_every"),
        ({"stop_at": 1.5, "eval_every": 1}, "stop_at"),
        ({"data_seed": -1}, "data_seed"),
    ],
)
def test_bad_train_config(change, field):
    with pytest.raises(ValueError, match=field):
        train_config(**change)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": -1},
        {"lr": -1.0},
        {"lr": math.nan},
        {"weight_decay": math.inf},
        {"warmup": 1.5},
        {"beta2": 1.0},
        {"clip": 0.0},
    ],
)
def test_bad_replica(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Replica(**{"seed": 0, **change})


# --- data ----------------------------------------------------------------------------------------------


def test_length_of_a_step_depends_on_data_seed_and_step_alone():
    task = Toy()
    long = step_lengths(train_config(steps=500), task)
    assert step_lengths(train_config(steps=100, batch_size=9, beta1=0.5), task) == long[:100]
    assert step_lengths(train_config(steps=500, data_seed=1), task) != long


def test_lengths_are_uniform_over_the_legal_ones():
    lengths = step_lengths(train_config(steps=4000, train_lengths=(3, 12)), Toy(unit=3))
    counts = torch.bincount(torch.tensor(lengths))
    assert set(lengths) == {3, 6, 9, 12}
    # Standard deviation of a count is 27: six of them.
    assert all(abs(int(counts[length]) - 1000) < 165 for length in (3, 6, 9, 12))
    follows = [b for a, b in itertools.pairwise(lengths) if a == 3]
    assert abs(follows.count(3) - len(follows) / 4) < 6 * math.sqrt(len(follows) * 3 / 16)


def test_length_choices():
    lengths = step_lengths(train_config(steps=200, train_length_choices=(4, 12)), Toy())
    assert set(lengths) == {4, 12}


def test_no_legal_length():
    with pytest.raises(ValueError, match="multiple of 20"):
        step_lengths(train_config(), Toy(unit=20))


def test_valid_lengths():
    assert valid_lengths(train_config(), Toy()) == (12, 24)
    assert valid_lengths(train_config(eval_lengths=(24, 23)), Toy()) == (12, 25)
    assert valid_lengths(train_config(eval_lengths=(24,)), Toy(unit=8)) == (8, 16)
    assert valid_lengths(train_config(valid_lengths=(7, 9)), Toy()) == (7, 9)
    with pytest.raises(ValueError, match="multiple"):
        valid_lengths(train_config(valid_lengths=(7,)), Toy(unit=2))


def test_batches_are_the_samples_of_step_and_seed():
    task = synthetic_tasks.get("parity")
    seen = []
    for step in range(3):
        tokens, targets = train_batch(task, [5, 7, 5], step=step, batch_size=4, length=9)
        assert tokens.shape == targets.shape == (3, 4, 9)
        for row, seed in enumerate((5, 7, 5)):
            batch = task.sample(batch_size=4, length=9, seed=seed, index=4 * step, split="train")
            assert torch.equal(tokens[row], batch.tokens)
            assert torch.equal(targets[row], batch.targets)
        seen.append(tokens[0])
    every = task.sample(batch_size=12, length=9, seed=5, index=0, split="train")
    assert torch.equal(torch.cat(seen), every.tokens)


# --- optimiser -----------------------------------------------------------------------------------------


def test_schedule():
    config = train_config(steps=20, final_lr_fraction=0.1)
    replicas = [Replica(seed=0, lr=2.0, warmup=0.2), Replica(seed=0, lr=1.0, warmup=0.0)]
    table = learning_rates(config, replicas)
    assert table[:4, 0].tolist() == [0.5, 1.0, 1.5, 2.0]
    for step in range(20):
        x = step / 20
        assert table[step, 1].item() == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * x)) / 2)
    assert table[4, 0] == 2.0
    assert (table[4:, 0].diff() < 0).all()
    assert learning_rates(config, [Replica(seed=0, lr=1.0, warmup=1.0)])[-1].item() == 1.0


def small_net(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(5, 33), nn.Tanh(), nn.Linear(33, 3))
        net[2].register_parameter("gain", nn.Parameter(torch.tensor(0.7)))
    for name, parameter in net.named_parameters():
        parameter.no_weight_decay = name.endswith(("bias", "gain"))
    return net


def random_gradients(net: nn.Module, step: int, seed: int, size: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + step)
    return [size * torch.randn(p.shape, generator=generator) for p in net.parameters()]


def test_adamw_matches_torch_for_every_replica():
    config = train_config(steps=12, beta1=0.8, eps=1e-6, final_lr_fraction=0.05)
    replicas = [
        Replica(seed=0, lr=1e-2, weight_decay=0.3, warmup=0.25, beta2=0.9, clip=1.0),
        Replica(seed=1, lr=3e-3, weight_decay=0.0, warmup=0.0, beta2=0.999, clip=math.inf),
        Replica(seed=2, lr=1e-1, weight_decay=0.1, warmup=0.5, beta2=0.5, clip=0.01),
    ]
    nets = [small_net(replica.seed) for replica in replicas]
    flat = FlatParameters(nets, torch.device("cpu"))
    ours = FleetAdamW(flat, config, replicas)
    rates = learning_rates(config, replicas)
    theirs = [
        torch.optim.AdamW(
            [
                {
                    "params": [p for p in net.parameters() if not p.no_weight_decay],
                    "weight_decay": r.weight_decay,
                },
                {"params": [p for p in net.parameters() if p.no_weight_decay], "weight_decay": 0.0},
            ],
            lr=1.0,
            betas=(0.8, r.beta2),
            eps=1e-6,
        )
        for net, r in zip(nets, replicas, strict=True)
    ]
    everyone = torch.ones(3, dtype=torch.bool)
    for step in range(12):
        size = 10.0 ** (step % 3 - 1)
        grads = [random_gradients(net, step, r.seed, size) for net, r in zip(nets, replicas, strict=True)]
        leaves = flat.named.values()
        scalar = sum(
            (leaf * torch.stack(g)).sum() for leaf, g in zip(leaves, zip(*grads, strict=True), strict=True)
        )
        stepped = ours.step(step, flat.gradients(scalar), torch.zeros(3), everyone)
        assert stepped.all()
        for index, (net, optimiser) in enumerate(zip(nets, theirs, strict=True)):
            for parameter, grad in zip(net.parameters(), grads[index], strict=True):
                parameter.grad = grad
            # torch adds 1e-6 to the norm before it divides; we do not.
            nn.utils.clip_grad_norm_(net.parameters(), replicas[index].clip)
            for group in optimiser.param_groups:
                group["lr"] = rates[step, index].item()
            optimiser.step()
    for index, net in enumerate(nets):
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(flat.row(index)[name], parameter.detach(), rtol=1e-5, atol=1e-6)


def test_unused_parameter_gets_gradient_zero_and_no_update():
    net = small_net(0)
    flat = FlatParameters([net], torch.device("cpu"))
    optimiser = FleetAdamW(flat, train_config(), [Replica(seed=0, weight_decay=0.0)])
    before = flat.row(0)
    grads = flat.gradients(flat.named["0.weight"].sum())
    optimiser.step(0, grads, torch.zeros(1), torch.ones(1, dtype=torch.bool))
    after = flat.row(0)
    assert not torch.equal(after["0.weight"], before["0.weight"])
    assert all(torch.equal(after[name], before[name]) for name in before if name != "0.weight")


@pytest.mark.parametrize("poison", ["gradient nan", "gradient inf", "loss nan", "inactive"])
def test_a_bad_replica_stays_and_its_mate_moves_as_if_alone(poison):
    config = train_config(steps=6)
    replicas = [Replica(seed=0), Replica(seed=1)]

    def run(count: int) -> FlatParameters:
        flat = FlatParameters([small_net(r.seed) for r in replicas[:count]], torch.device("cpu"))
        optimiser = FleetAdamW(flat, config, replicas[:count])
        active = torch.ones(count, dtype=torch.bool)
        for step in range(6):
            grads = torch.stack([
                torch.randn(flat.values.shape[1], generator=torch.Generator().manual_seed(10 * step + r))
                for r in range(count)
            ])  # fmt: skip
            losses = torch.zeros(count)
            if count == 2 and step == 3:
                if poison == "inactive":
                    active[1] = False
                elif poison == "loss nan":
                    losses[1] = math.nan
                else:
                    grads[1, 7] = math.nan if poison.endswith("nan") else math.inf
                frozen = flat.row(1)
            active = optimiser.step(step, grads, losses, active)
        if count == 2:
            assert active.tolist() == [True, False]
            assert all(torch.equal(frozen[name], value) for name, value in flat.row(1).items())
        return flat

    together, alone = run(2), run(1)
    assert torch.equal(together.values[0], alone.values[0])


def test_overflowing_norm_is_a_divergence_not_a_zero_step():
    flat = FlatParameters([small_net(0)], torch.device("cpu"))
    optimiser = FleetAdamW(flat, train_config(), [Replica(seed=0)])
    huge = torch.full_like(flat.values, 1e30)
    assert not optimiser.step(0, huge, torch.zeros(1), torch.ones(1, dtype=torch.bool)).item()


@pytest.mark.parametrize("lr", [1e25, 1e38, 1e300])
def test_a_step_out_of_range_is_a_divergence_and_is_not_taken(lr):
    flat = FlatParameters([small_net(0), small_net(1)], torch.device("cpu"))
    optimiser = FleetAdamW(flat, train_config(), [Replica(seed=0, lr=lr, warmup=0.0), Replica(seed=1)])
    before, mate = flat.row(0), flat.row(1)
    active = torch.ones(2, dtype=torch.bool)
    for step in range(3):
        active = optimiser.step(step, torch.ones_like(flat.values), torch.zeros(2), active)
    assert active.tolist() == [False, True]
    assert all(torch.equal(before[name], value) for name, value in flat.row(0).items())
    assert not torch.equal(flat.row(1)["0.weight"], mate["0.weight"])


# --- evaluation ----------------------------------------------------------------------------------------


def noisy_logits(tokens: torch.Tensor, n_replicas: int) -> torch.Tensor:
    """Logits that are right about two times in three, a function of the sequence alone."""
    rows = []
    for replica in range(n_replicas):
        per_sequence = []
        for row in tokens:
            key = (int((row * 2 ** torch.arange(len(row))).sum()) + replica) % (1 << 31)
            noise = torch.randn(len(row), 2, generator=torch.Generator().manual_seed(key))
            per_sequence.append(noise + F.one_hot(row, 2))
        rows.append(torch.stack(per_sequence))
    return torch.stack(rows)


def test_metrics_against_a_loop_over_sequences():
    task, config = Toy(), train_config(eval_examples=23, batch_size=2, data_seed=4)
    rows = evaluate(
        lambda tokens: (noisy_logits(tokens, 3), None),
        task,
        config,
        split="test",
        lengths=(7, 13, 40),
        device=torch.device("cpu"),
        n_replicas=3,
    )
    assert len(rows) == 3
    for replica in range(3):
        got = {(row["eval_length"], row["metric"]): row for row in rows[replica]}
        for length in (7, 13, 40):
            losses, right, whole = [], [], 0
            for index in range(23):
                batch = task.sample(batch_size=1, length=length, seed=4, index=index, split="test")
                logits = noisy_logits(batch.tokens, 3)[replica, 0]
                answers = []
                for t in range(1, length):
                    losses.append(-logits[t].log_softmax(-1)[batch.targets[0, t]].item())
                    answers.append(logits[t].argmax().item() == batch.targets[0, t].item())
                right += answers
                whole += all(answers)
            accuracy = sum(right) / len(right)
            assert got[length, "loss"]["value"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
            assert got[length, "accuracy"]["value"] == pytest.approx(accuracy, abs=1e-12)
            assert got[length, "chance_scaled_accuracy"]["value"] == pytest.approx(2 * accuracy - 1)
            assert got[length, "sequence_accuracy"]["value"] == pytest.approx(whole / 23)
            assert {row["n_examples"] for row in rows[replica]} == {23}
            assert {row["split"] for row in rows[replica]} == {"test"}


def test_exhaustible_length_is_not_reported_as_test():
    rows = evaluate(
        lambda tokens: (noisy_logits(tokens, 1), None),
        Toy(),
        train_config(eval_examples=3),
        split="test",
        lengths=(5, 6),
        device=torch.device("cpu"),
        n_replicas=1,
    )[0]
    assert {(row["eval_length"], row["split"]) for row in rows} == {(5, "train"), (6, "test")}


def test_answers_that_are_not_finite_are_wrong():
    rows = evaluate(
        lambda tokens: (torch.full((1, *tokens.shape, 2), math.nan), None),
        Toy(),
        train_config(eval_examples=8),
        split="test",
        lengths=(6,),
        device=torch.device("cpu"),
        n_replicas=1,
    )[0]
    value = {row["metric"]: row["value"] for row in rows}
    assert value["accuracy"] == value["sequence_accuracy"] == 0.0
    assert math.isnan(value["loss"])
