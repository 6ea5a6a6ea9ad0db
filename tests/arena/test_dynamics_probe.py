import pytest
import torch
from torch import nn

import synthetic_tasks
from arena.blocks import build_block
from arena.constructions import parity_model
from arena.dynamics import probe
from arena.model import ModelConfig, build_model

PARITY = synthetic_tasks.get("parity", supervision="running")


def test_the_state_of_the_counter_holds_parity_at_every_length():
    table = probe.measure_decodability(parity_model().double(), PARITY, [20, 60], n_fit=128, n_test=128)
    assert table.select("length", "fitted_length").rows() == [(20, 20), (60, 60), (60, 20)]
    assert (table["accuracy"] == 1).all() and (table["low"] > 0.97).all()
    assert table["control"].is_between(0.4, 0.6).all()
    assert set(table["label"]) == {"automaton state"} and table["r2"].null_count() == 3


def test_a_memory_that_knows_nothing_is_at_chance():
    """Tokens are all embedded alike: nothing about them can be in the memory."""
    model = build_model(ModelConfig(arch="gdn2", vocab_size=2, n_classes=2, d_model=16, n_layers=2), seed=0)
    with torch.no_grad():
        model.embedding.weight.fill_(1.0)
    table = probe.measure_decodability(model, PARITY, [30], n_fit=128, n_test=200)
    assert list(table["layer"]) == [0, 1]
    assert (table["accuracy"] <= table["most_frequent"]).all()


def test_a_growing_memory_has_no_probe():
    model = build_model(
        ModelConfig(arch="attention", vocab_size=2, n_classes=2, d_model=16, n_layers=1), seed=0
    )
    (row,) = probe.measure_decodability(model, PARITY, [20], n_fit=32, n_test=32).to_dicts()
    assert row["dimensions"] is None and row["accuracy"] is None


def test_weights_updated_beside_a_growing_memory_have_no_probe():
    options = {"mini_batch": 4, "window": 8}
    sizes = dict(vocab_size=2, n_classes=2, d_model=16, n_layers=2)
    model = build_model(ModelConfig(arch="ttt_e2e", **sizes, options=options), seed=0).eval()
    rows = probe.measure_decodability(model, PARITY, [12], n_fit=32, n_test=32).to_dicts()
    assert [(row["layer"], row["dimensions"], row["accuracy"]) for row in rows] == [
        (0, None, None),
        (1, None, None),
    ]


def test_a_memory_that_turns_is_probed_as_its_queries_read_it():
    block = build_block("mamba3", d_model=16, n_heads=2)
    x = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(0))
    (found,) = probe.memories(block, x)
    state = block.trace(x, states=True)["state"][:, -1].flatten(1)
    torch.testing.assert_close(found[:, : state.shape[1]], state.double())


class Ledger(nn.Module):
    """A model whose memory is the table of values that it was told, behind a random rotation."""

    def __init__(self, task, width):
        super().__init__()
        self.task, self.blocks = task, [self]
        self.turn = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0]

    def trace(self, *_):
        return {}

    def initial_state(self, _):
        return {"memory": torch.zeros(1)}

    def __call__(self, tokens):
        value = torch.zeros(len(tokens), self.task.vocab_size, self.task.vocab_size)
        for t in range(0, tokens.shape[1], 2):
            for b, (key, what) in enumerate(tokens[:, t : t + 2].tolist()):
                if key > 1:
                    value[b, key] = 0
                    value[b, key, what] = 1
        memory = value[:, 2:6, 6:].flatten(1).double()
        return None, [{"memory": memory @ self.turn, "conv": torch.randn(len(tokens), 3)}]


def test_bound_values_are_decoded_from_a_ledger():
    task = synthetic_tasks.get("rebind", n_keys=3, n_key_tokens=4, n_value_tokens=5, n_rebinds=3)
    torch.manual_seed(0)
    model = Ledger(task, 20)
    (row,) = probe.measure_decodability(model, task, [40], n_fit=400, n_test=200).to_dicts()
    assert row["accuracy"] > 0.99 and row["label"] == "value of k0" and row["dimensions"] <= 20
    assert 250 < row["n_fit"] < 350  # three keys in four tokens are bound
    assert row["control"] < 0.4
    # in fewer dimensions than the 20 that hold it, less is left of it
    (few,) = probe.measure_decodability(model, task, [40], n_fit=400, n_test=200, dimensions=5).to_dicts()
    assert few["dimensions"] == 5 and few["accuracy"] < row["accuracy"]


@pytest.mark.parametrize("name", ["rebind", "erase", "accumulate", "partial_update"])
def test_true_states_of_memory_tasks_are_what_the_next_query_would_say(name):
    small = {"n_keys": 3, "n_key_tokens": 5, "n_value_tokens": 4}
    task = synthetic_tasks.get(name, **small)
    tokens = task.sample(50, task.legal_length(60)).tokens
    label = probe.true_state(task, tokens)
    key, first = 2, 2 + task.n_key_tokens
    width = task.length_step
    for row, found in zip(tokens.tolist(), label.value.tolist(), strict=True):
        truth = -1
        for t in range(0, len(row), width):
            if row[t] != key:
                continue
            if name == "accumulate":
                truth = max(truth, 0) + row[t + 1] - first + 1
            elif name == "partial_update" and row[t + 1] >= first + task.n_value_tokens:
                truth = row[t + 2] if row[t + 1] == first + task.n_value_tokens else truth
            else:
                truth = row[t + 1]
        if name != "erase" or truth < 0 or truth >= first:
            assert found == truth
    assert label.kind == ("count" if name == "accumulate" else "class")


def test_a_count_is_regressed():
    torch.manual_seed(0)
    x = torch.randn(300, 6, dtype=torch.float64)
    x[:, 5] = 7.0  # does not vary
    y = (x @ torch.tensor([2.0, -1.0, 0.5, 0.0, 0.0, 0.0], dtype=torch.float64))[:, None] + 3
    fitted = probe.fit(x[:200], y[:200])
    assert fitted.axes.shape[1] == 5
    torch.testing.assert_close(fitted(x[200:]), y[200:], rtol=1e-4, atol=1e-4)


def test_the_penalty_is_chosen_by_leaving_one_out():
    """Against the loop that leaves every sequence out."""
    torch.manual_seed(0)
    x = torch.randn(12, 4, dtype=torch.float64)
    x = (x - x.mean(0)) / x.std(0, correction=0)
    y = x[:, :1] + torch.randn(12, 1, dtype=torch.float64)
    errors = []
    for penalty in probe._PENALTIES * len(x):
        gram = torch.linalg.inv(x.T @ x + penalty * torch.eye(4, dtype=torch.float64))
        hat = x @ gram @ x.T + 1 / len(x)
        residual = (y - hat @ y) / (1 - hat.diagonal())[:, None]
        errors.append((residual**2).mean())
    penalty = (probe._PENALTIES * len(x))[int(torch.stack(errors).argmin())]
    weight = torch.linalg.solve(x.T @ x + penalty * torch.eye(4, dtype=torch.float64), x.T @ (y - y.mean(0)))
    torch.testing.assert_close(probe.fit(x, y)(x), x @ weight + y.mean(0))


def test_tasks_without_a_label():
    task = synthetic_tasks.get("mqar", n_pairs=4)
    assert probe.true_state(task, task.sample(2, 64).tokens) is None
    model = build_model(ModelConfig(arch="gdn", vocab_size=task.vocab_size, n_classes=task.n_classes), seed=0)
    assert probe.measure_decodability(model, task, [64]).is_empty()
