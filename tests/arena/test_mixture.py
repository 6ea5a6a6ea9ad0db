"""Mixture of experts: against a loop over tokens, in models, in fleets, and what it costs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import tuning_fakes
from torch.func import functional_call, stack_module_state, vmap

import synthetic_tasks
from arena.grid import load_experiment, load_results, plan_runs, run_experiment
from arena.grid.plan import plan_settings
from arena.mlp import GatedMLP, MixtureMLP, Routing
from arena.model import ModelConfig, active_params, build_model, model_params
from arena.report import make_report
from arena.report.routing import routing_table
from arena.training import Replica, TrainConfig, train_fleet
from arena.tuning.flops import flops_per_token
from arena.tuning.ledger import ledger_lines, ledger_table
from arena.tuning.space import own_override
from kernels.backends import recording
from kernels.experts import experts

CASES = [(2, 1), (4, 1), (4, 2), (5, 3), (3, 3)]


def mixture(E: int, k: int, *, gelu: bool = False, width: int = 6, hidden: int = 5) -> MixtureMLP:
    with torch.random.fork_rng():
        torch.manual_seed(E + k)
        return MixtureMLP(width, hidden, gelu=gelu, n_experts=E, per_token=k).double()


def by_hand(mlp: MixtureMLP, x: torch.Tensor, gelu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Token by token, expert by expert: y and the load-balance loss without its coefficient."""
    E, k = mlp.n_experts, mlp.per_token
    gates_ups = mlp.gate_up.weight.chunk(E, 0)
    downs = mlp.down.weight.chunk(E, 1)
    tokens = x.reshape(-1, x.shape[-1])
    rows, counts, mean_p = [], [0] * E, torch.zeros(E, dtype=x.dtype)
    for token in tokens:
        scores = mlp.router.weight @ token
        p = scores.exp() / scores.exp().sum()
        best = sorted(range(E), key=lambda e: -p[e].item())[:k]
        total = sum(p[e] for e in best)
        y = torch.zeros_like(token)
        for e in best:
            gate, up = (w @ token for w in gates_ups[e].chunk(2, 0))
            act = F.gelu(gate) if gelu else gate * torch.sigmoid(gate)
            y = y + (p[e] if k == 1 else p[e] / total) * (downs[e] @ (act * up))
            counts[e] += 1
        rows.append(y)
        mean_p = mean_p + p / len(tokens)
    loss = E * sum(count / (len(tokens) * k) * mean_p[e] for e, count in enumerate(counts))
    return torch.stack(rows).reshape(x.shape), loss


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("E", "k"), CASES)
@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_it_is_the_loop_over_tokens_with_every_gradient(E, k, gelu, backend, scale, monkeypatch):
    """At scale 30 the router's softmax is saturated: weights near 0 and 1."""
    monkeypatch.setenv("ARENA_BACKEND", f"experts={backend}")
    mlp = mixture(E, k, gelu=gelu)
    with torch.no_grad():
        mlp.router.weight.mul_(scale)
    generator = torch.Generator().manual_seed(E)
    x = torch.randn(3, 7, 6, generator=generator, dtype=torch.float64).requires_grad_()
    upstream = torch.randn(3, 7, 6, generator=generator, dtype=torch.float64)
    leaves = [x, *mlp.parameters()]
    found = []
    for run in (mlp, lambda x: by_hand(mlp, x, gelu)):
        y, routing = run(x)
        loss = routing.imbalance if isinstance(routing, Routing) else routing
        grads = torch.autograd.grad((y * upstream).sum() + 0.7 * loss, leaves)
        found.append([y, loss, *grads])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert all(grad.abs().sum() > 0 for grad in found[0][2:])


def test_an_expert_that_is_not_chosen_has_no_part():
    x = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gate_up = torch.randn(3, 8, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    down = torch.randn(3, 3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gate_up.requires_grad_()
    chosen = torch.tensor([0, 2, 2, 0]).view(1, 4, 1)
    weights = torch.full((1, 4, 1), 0.5, dtype=torch.float64)
    for backend in ("fused", "reference"):
        (grad,) = torch.autograd.grad(
            experts(x, gate_up, down, chosen, weights, backend=backend).sum(), gate_up
        )
        assert (grad[1] == 0).all() and (grad[0] != 0).any() and (grad[2] != 0).any()


def test_the_loss_is_one_where_loads_are_even_and_the_number_of_experts_where_one_takes_all():
    even = torch.full((4,), 0.25)
    one = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert Routing(even, even).imbalance == 1.0
    assert Routing(one, one).imbalance == 4.0


def test_each_expert_starts_as_the_plain_mlp_does():
    mlp = MixtureMLP(64, 96, gelu=False, n_experts=8, per_token=2)
    bound = 96**-0.5
    assert 0.95 * bound < mlp.down.weight.abs().max() <= bound
    plain = GatedMLP(64, 96, gelu=False)
    assert mlp.idle_params == 6 * sum(p.numel() for p in plain.parameters())


SIZES = {"vocab_size": 11, "n_classes": 7, "d_model": 16}


def config(arch: str = "gdn+swa", **changes) -> ModelConfig:
    return ModelConfig(**{"arch": arch, **SIZES, "experts": 4, "experts_per_token": 2, **changes})


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("arch", ["gdn+swa", "slstm"])
@pytest.mark.parametrize("outer", ["common", "official"])
def test_a_model_reads_in_steps_and_halves_and_is_causal(arch, outer):
    model = build_model(config(arch, outer=outer), seed=1).double()
    x = tokens(2, 9)
    logits, _ = model(x)
    first, middle = model(x[:, :4])
    torch.testing.assert_close(
        torch.cat([first, model(x[:, 4:], middle)[0]], 1), logits, rtol=1e-9, atol=1e-9
    )
    running, steps = model.initial_state(2), []
    for t in range(9):
        step, running = model.step(x[:, t], running)
        steps.append(step)
    torch.testing.assert_close(torch.stack(steps, 1), logits, rtol=1e-9, atol=1e-9)
    changed = x.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 11
    torch.testing.assert_close(model(changed)[0][:, :5], logits[:, :5], rtol=0, atol=0)


def test_a_fleet_routes_each_replica_by_itself():
    models = [build_model(config(), seed=seed) for seed in range(3)]
    stacked, buffers = stack_module_state(models)
    x = tokens(3, 2, 7)

    def one(parameters, buffer, x_bt):
        logits, _, routing = functional_call(models[0], (parameters, buffer), (x_bt,), {"routing": True})
        return logits, *routing

    logits, load, importance = vmap(one)(stacked, buffers, x)
    for index, (model, x_bt) in enumerate(zip(models, x, strict=True)):
        alone, _, routing = model(x_bt, routing=True)
        torch.testing.assert_close(logits[index], alone, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(load[index], routing.load)
        torch.testing.assert_close(importance[index], routing.importance)
    assert load.shape == (3, 2, 4)
    torch.testing.assert_close(load.sum(-1), torch.ones(3, 2))


TASK = synthetic_tasks.get("mqar", n_pairs=2, vocab_size=16)
TRAIN = TrainConfig(
    steps=4, batch_size=16, train_lengths=(16, 16), eval_lengths=(32,), eval_every=2, eval_examples=32
)


def task_config(**changes) -> ModelConfig:
    sizes = {"vocab_size": TASK.vocab_size, "n_classes": TASK.n_classes, "d_model": 16, "n_layers": 2}
    return ModelConfig(**{"arch": "gdn", **sizes, "experts": 4, "experts_per_token": 2, **changes})


def test_a_fleet_trains_as_its_replicas_alone_and_records_the_load():
    replicas = [Replica(seed=0, lr=3e-3), Replica(seed=1, lr=1e-2)]
    together = train_fleet(task_config(), TASK, TRAIN, replicas)
    for replica, result in zip(replicas, together, strict=True):
        (alone,) = train_fleet(task_config(), TASK, TRAIN, [replica])
        for name, value in result.state_dict.items():
            assert torch.equal(value, alone.state_dict[name]), name
        loads = {
            row["metric"]: row["value"]
            for row in result.final
            if row["eval_length"] == 32 and row["metric"].startswith("expert_load")
        }
        assert set(loads) == {f"expert_load[{layer},{e}]" for layer in range(2) for e in range(4)}
        for layer in range(2):
            assert sum(loads[f"expert_load[{layer},{e}]"] for e in range(4)) == pytest.approx(1.0)
        balance = [
            row for row in result.curve if row["metric"] == "balance_loss" and row["eval_length"] is None
        ]
        assert [row["step"] for row in balance] == [2, 4]
        assert all(0.9 < row["value"] < 4 for row in balance)
        model = build_model(task_config(), seed=0)
        assert result.params == model_params(model) and result.active_params == active_params(model)


def test_recorded_load_is_that_of_the_trained_model_on_the_examples():
    (result,) = train_fleet(task_config(), TASK, TRAIN, [Replica(seed=3)])
    model = build_model(task_config(), seed=0)
    model.load_state_dict(result.state_dict)
    batch = TASK.sample(batch_size=32, length=32, seed=TRAIN.data_seed, index=0, split="test")
    with torch.no_grad():
        _, _, routing = model(batch.tokens, routing=True)
    rows = {row["metric"]: row["value"] for row in result.final if row["eval_length"] == 32}
    for layer in range(2):
        for e in range(4):
            assert rows[f"expert_load[{layer},{e}]"] == pytest.approx(routing.load[layer, e].item(), abs=1e-3)
    assert rows["balance_loss"] == pytest.approx(routing.imbalance.mean().item(), abs=1e-3)


def test_the_balance_loss_is_in_the_training_loss_and_not_in_the_recorded_one():
    """A router that sends all to one expert is pulled apart with a large coefficient and not without."""
    long = TrainConfig(steps=25, batch_size=8, train_lengths=(16, 16), valid_lengths=(16,), eval_examples=32)
    values = {}
    for coefficient in (0.0, 5.0):
        (result,) = train_fleet(
            task_config(load_balance=coefficient, experts_per_token=1, experts=8),
            TASK,
            long,
            [Replica(seed=0, lr=1e-2)],
        )
        rows = {row["metric"]: row["value"] for row in result.final if row["eval_length"] == 16}
        values[coefficient] = rows["balance_loss"]
        train = {row["metric"]: row["value"] for row in result.curve if row["eval_length"] is None}
        assert train["loss"] < 4.0, "5 times two layers' balance loss is not in it"
    assert values[5.0] < 1.1 < values[0.0]


def test_costs_are_those_of_the_chosen_experts():
    """Of a token's FLOPs what grows with E is the router alone; parameters grow with E, active ones not."""
    few, many, plain = (
        config("gdn", experts=E, experts_per_token=k, mlp_hidden=32, n_layers=1)
        for E, k in ((2, 2), (16, 2), (1, 1))
    )
    D, F_, length = 16, 32, 24
    difference = flops_per_token(many, length) - flops_per_token(few, length)
    router = 2 * D * 14
    assert router <= difference <= router + 14 * 8
    over = flops_per_token(few, length) - flops_per_token(plain, length)
    assert over == pytest.approx(2 * 3 * D * F_, rel=0.15), "one more expert, and its router"
    built = [build_model(c, seed=0) for c in (few, many)]
    assert model_params(built[1]) - model_params(built[0]) == 14 * (3 * D * F_ + D)
    assert active_params(built[1]) - active_params(built[0]) == 14 * D


def test_the_reference_runs_where_flops_are_counted_and_the_fused_path_elsewhere():
    model = build_model(config(), seed=0)
    with recording() as used:
        model(tokens(1, 3))
    assert used["experts"] == "fused"


def test_flops_are_matched_by_the_width_of_an_expert(tmp_path):
    from test_tuning_match import solved_settings

    tuning = {"match": "flops"}
    experiment = tuning_fakes.experiment(
        tuning,
        archs=["gdn", "moe"],
        model={"d_model": 32, "n_layers": 1, "n_heads": 2},
        arms={"moe": {"arch": "gdn", "experts": 4, "experts_per_token": 2}},
    )
    found = solved_settings(experiment, plan_settings(experiment), tmp_path)
    table = ledger_table(found, experiment.tuning, dict.fromkeys(range(len(found)), 1e-3))
    assert table["matched"].all()
    mixed = table.filter(arm="moe")
    assert (mixed["active_params"] < mixed["params"]).all()
    plain = table.filter(arm="gdn")
    assert (plain["active_params"] == plain["params"]).all()
    assert sum(" active)" in line for line in ledger_lines(table)) == len(mixed)


def test_what_an_architecture_may_tune_of_its_own():
    own = own_override({"experts": 4, "load_balance": 0.1, "window": 3})
    assert own == {"experts": 4, "load_balance": 0.1, "options": {"window": 3}}


def test_a_stack_without_mlps_is_refused():
    with pytest.raises(ValueError, match="has no MLP"):
        build_model(config("mamba2", outer="official"), seed=0)
    assert build_model(config("mamba2+gdn", outer="official"), seed=0).mixtures == [1]


def test_a_grid_with_an_arm_of_experts_is_trained_stored_and_reported(tmp_path):
    """From the experiment file to the report: fields, rows, the section about the loads."""
    text = """
name = "moe"
archs = ["gdn", "moe"]
seeds = 1
[model]
d_model = 16
n_layers = 1
[arms.moe]
arch = "gdn"
experts = 4
experts_per_token = 2
load_balance = 0.02
[[tasks]]
name = "parity"
train_lengths = [3, 8]
eval_lengths = 32
[train]
steps = 2
batch_size = 16
eval_examples = 16
"""
    path = tmp_path / "moe.toml"
    path.write_text(text)
    experiment = load_experiment(path)
    runs = plan_runs(experiment)
    plain, mixed = (run.config["model"] for run in runs)
    assert not {"experts", "experts_per_token", "load_balance", "conv_on"} & set(plain)
    assert (mixed["experts"], mixed["experts_per_token"], mixed["load_balance"]) == (4, 2, 0.02)
    out = tmp_path / "out"
    run_experiment(experiment, out, workers=1)
    rows = load_results(out)
    wide = rows.filter(arm="moe", eval_length=32, reported=True)
    assert set(wide["metric"]) >= {"accuracy", "balance_loss", *(f"expert_load[0,{e}]" for e in range(4))}
    assert (rows.filter(arm="gdn")["active_params"] == rows.filter(arm="gdn")["params"]).all()
    assert (wide["active_params"] < wide["params"]).all()
    table = routing_table(rows)
    assert table["arm"].unique().to_list() == ["moe"] and table["experts"].to_list() == [4]
    assert 0 <= table["least"][0] <= 1 <= table["most"][0] <= 2, "at most every token: 1/k of the choices"
    make_report(out)
    report = (out / "report" / "report.md").read_text()
    active = wide["active_params"][0]
    assert f"({active:,} active)" in report
    assert "## Experts" in report and "| moe | parity | 4 |" in report
    assert (out / "report" / "routing.csv").is_file()
