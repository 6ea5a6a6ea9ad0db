"""Measurements of real blocks and models: against autograd, against traces of all states, chunk by chunk."""

import math
import subprocess
import sys

import polars as pl
import pytest
import torch

import arena
import kernels
import synthetic_tasks
from arena.dynamics import COLUMNS, QUANTITIES, data_dictionary, data_dictionary_markdown, measure, record
from arena.dynamics.dictionary import select
from arena.dynamics.retention import Past, contributions, remembered
from arena.dynamics.state import advance, is_matrix_memory
from arena.model import ModelConfig, build_model

MATRIX = [
    "linear_attention",
    "gla",
    "mamba2",
    "mamba2-neg",
    "deltanet",
    "gdn-neg",
    "kda",
    "gdn2-neg",
    "mlstm",
]
ALL = [*MATRIX, "attention", "swa", "slstm", "lstm"]
UPDATES = {"update_norm", "update_drift", "inner_loss_before", "inner_loss_after"}


def make(arch, **options):
    torch.manual_seed(1)
    if arch == "swa":
        options["window"] = 6
    block = arena.build_block(arch, d_model=12, n_heads=2, **options).double()
    with torch.no_grad():  # fresh blocks have gates that hardly vary
        for parameter in block.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return block, torch.randn(2, 17, 12, dtype=torch.float64)


@pytest.mark.parametrize("arch", MATRIX)
@pytest.mark.parametrize("outer", ["common", "official"])
def test_the_memory_from_the_trace_is_the_blocks_own(arch, outer):
    block, x = make(arch, outer=outer)
    trace = block.trace(x, states=True)
    B, _, H, K, V = trace["state"].shape
    state = torch.zeros(B, H, K, V, dtype=torch.float64)
    for t, now in advance(trace, state, range(x.shape[1])):
        torch.testing.assert_close(now, trace["state"][:, t], rtol=1e-9, atol=1e-9)
    assert t == x.shape[1] - 1


POINTS = {
    "max_abs": ("gdn-neg", {"normaliser": "max_abs"}),
    "sum": ("gla", {"normaliser": "sum", "qk_map": "elu1"}),
    "complement": ("gla", {"write": "channel", "coupling": "complement"}),
    "frozen": ("gdn", {"erase_value": 1.5, "write_value": 0.5, "coupling": "free"}),
    "dial": ("gdn2", {"coupling": "dial", "dial": 0.3, "erase": "scalar", "write": "scalar"}),
    "mean": ("gdn2", {"erase": "mean", "write": "mean"}),
}


@pytest.mark.parametrize("point", POINTS)
def test_points_of_gate_space(point):
    """The memory from the trace is the block's own, and the contributions add up to the read."""
    arch, gates = POINTS[point]
    block, x = make(arch, gates=gates)
    trace = block.trace(x, states=True)
    state = torch.zeros_like(trace["state"][:, 0])
    for t, now in advance(trace, state, [4, 16]):
        torch.testing.assert_close(now, trace["state"][:, t], rtol=1e-9, atol=1e-9)
    frame = measure(block, x, quantities=["contribution"], reads=1, maps=1)
    rows = frame.filter(pl.col("head") == 1)
    weights = torch.tensor(rows["value"].to_list(), dtype=torch.float64)
    read = weights @ trace["v"][0, rows["source"].to_list(), 1]
    torch.testing.assert_close(read, trace["read"][0, 16, 1], rtol=1e-7, atol=1e-9)


def test_a_gated_correction_is_left_out_rather_than_measured_wrongly():
    """Its transition is another one for every value channel, which the vocabulary cannot say."""
    block, x = make("gdn2", gates={"write_on": "correction"})
    frame = measure(block, x)
    for name in ("state_frobenius", "spectral_radius", "contribution", "memory_length", "erase"):
        assert frame.filter(pl.col("quantity") == name)["value"].to_list() == [None], name
    assert frame.filter(pl.col("quantity") == "half_life")["value"].is_not_null().all()


@pytest.mark.parametrize("arch", [a for a in ALL if a not in ("gdn2-neg", "lstm")])
def test_contributions_add_up_to_the_read(arch):
    """Where a value has one weight for all its channels, sum_s w(t,s) v_s is the read itself."""
    block, x = make(arch)
    if arch == "slstm":  # one channel a head
        block = arena.build_block("slstm", d_model=12, n_heads=12).double()
    trace = block.trace(x)
    frame = measure(block, x, quantities=["contribution"], chunk=5, reads=x.shape[1], maps=2)
    for b, t, head in ((0, 0, 0), (0, 16, 1), (1, 11, 0)):
        rows = frame.filter((pl.col("sequence") == b) & (pl.col("token") == t) & (pl.col("head") == head))
        assert sorted(rows["source"]) == list(range(t + 1))
        weights = torch.tensor(rows["value"].to_list(), dtype=torch.float64)
        read = weights @ trace["v"][b, rows["source"].to_list(), head]
        torch.testing.assert_close(read, trace["read"][b, t, head], rtol=1e-9, atol=1e-11)


def test_contributions_with_channel_gates_are_the_mean_gradient():
    block, x = make("gdn2-neg")
    trace = block.trace(x)
    v = trace["v"].clone().requires_grad_()
    read, _ = kernels.gated_memory(
        trace["q"],
        trace["k"],
        v,
        trace["log_decay"],
        trace["erase"],
        trace["write"],
        scale=1.0,
        backend="reference",
    )
    vectors, _ = remembered(trace, None)
    t, head = 13, 1
    weights, _ = contributions([Past(0, vectors)], torch.tensor([0]), torch.tensor([t]), 100)
    total = torch.zeros(t + 1, dtype=torch.float64)
    for channel in range(v.shape[-1]):
        (grad,) = torch.autograd.grad(read[0, t, head, channel], v, retain_graph=True)
        total += grad[0, : t + 1, head, channel]
    torch.testing.assert_close(weights[0, head, :, 0].flip(0), total / v.shape[-1])


def test_contributions_of_an_lstm_are_the_gradient():
    block, x = make("lstm", conv="none")
    trace = block.trace(x)
    v = trace["v"].clone().requires_grad_()
    cell, cells = torch.zeros_like(v[:, 0]), []
    for t in range(v.shape[1]):
        cell = trace["decay"][:, t] * cell + trace["write"][:, t] * v[:, t]
        cells.append(cell)
    read = torch.stack(cells, 1).tanh()
    torch.testing.assert_close(read, trace["read"])
    grads = torch.autograd.grad(read[1, 9].sum(), v)[0]  # channels do not mix
    frame = measure(block, x, quantities=["contribution"], reads=17, maps=2, chunk=4)
    rows = frame.filter((pl.col("sequence") == 1) & (pl.col("token") == 9)).sort("source")
    found = torch.tensor(rows["value"].to_list(), dtype=torch.float64)
    torch.testing.assert_close(found, grads[1, :10, 0].mean(-1))


@pytest.mark.parametrize("arch", [*ALL, "ttt_e2e"])
def test_every_quantity_is_in_the_dictionary_and_every_block_answers_all(arch):
    task = synthetic_tasks.get("rebind")
    model = build_model(
        ModelConfig(arch=arch, vocab_size=task.vocab_size, n_classes=task.n_classes, d_model=8), seed=0
    )
    frame = measure(model, task.sample(2, 32), task=task, quantities=list(QUANTITIES), train_length=20)
    assert dict(frame.schema) == {name: kind for name, (kind, _) in COLUMNS.items()}
    assert set(frame["quantity"]) == set(QUANTITIES)
    for layer in (0, 1):
        assert set(frame.filter(pl.col("layer") == layer)["quantity"]) == set(QUANTITIES)
    assert set(frame["block"]) == {arch}
    missing = set(frame.filter(pl.col("head").is_null())["quantity"])
    if arch in MATRIX:
        assert missing <= {"angle", "step", "normaliser", "input_gate", "forget_gate", "cell_norm", *UPDATES}
    if arch == "ttt_e2e":  # the first layer has none
        found = frame.filter(pl.col("quantity").is_in(UPDATES) & pl.col("head").is_not_null())
        assert set(found["layer"]) == {1}
        assert set(found["token"]) == {16}
        assert set(found["quantity"]) == UPDATES
    if arch in ("attention", "swa", "ttt_e2e"):
        assert set(QUANTITIES) - missing - UPDATES == {
            "contribution",
            "previous_write_share",
            "memory_length",
            "contribution_age",
            "gain_beyond",
        }
    if arch == "slstm":
        assert not missing & {"cell_norm", "normaliser", "decay", "forget_gate", "memory_length", "half_life"}


@pytest.mark.parametrize("arch", ["gdn2-neg", "mlstm", "slstm", "attention+gdn", "ttt_e2e"])
def test_the_chunk_does_not_change_the_numbers(arch):
    task = synthetic_tasks.get("rebind")
    config = ModelConfig(arch=arch, vocab_size=task.vocab_size, n_classes=task.n_classes, d_model=8)
    model = build_model(config, seed=0).double()
    batch = task.sample(3, 40)
    keys = ["layer", "head", "sequence", "token", "role", "source", "index", "quantity", "statistic"]
    whole, pieces = (
        measure(model, batch, task=task, chunk=chunk, train_length=20, horizon=9).sort(keys)
        for chunk in (40, 7)
    )
    assert whole.drop("value").equals(pieces.drop("value"))
    x, y = (
        torch.tensor(f["value"].fill_null(float("nan")).to_list(), dtype=torch.float64)
        for f in (whole, pieces)
    )
    torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-9, equal_nan=True)


def test_roles_are_kept_apart():
    task = synthetic_tasks.get("rebind")
    config = ModelConfig(arch="gdn", vocab_size=task.vocab_size, n_classes=task.n_classes, d_model=8)
    model = build_model(config, seed=0)
    batch = task.sample(3, 40)
    frame = measure(model, batch, task=task, quantities=["erase"], points=None)
    roles = synthetic_tasks.roles(task, *batch)
    trace = next(record(model, batch.tokens, chunk=40)).traces[1]
    for code, role in enumerate(synthetic_tasks.ROLES):
        rows = frame.filter(
            (pl.col("role") == role)
            & (pl.col("layer") == 1)
            & (pl.col("head") == 0)
            & (pl.col("statistic") == "mean")
        )
        wanted = trace["erase"][..., 0, 0].double()[roles == code]
        assert rows["n"].item() == len(wanted)
        assert rows["value"].item() == pytest.approx(wanted.mean().item(), rel=1e-9)
        tokens = frame.filter(
            (pl.col("role") == role) & (pl.col("statistic") == "value") & (pl.col("layer") == 1)
        )
        assert len(tokens) == 2 * len(wanted)


def test_large_input_gates_of_an_mlstm():
    """exp(input_gate) is beyond float32 from 89 on; the memory is still measured."""
    block = arena.build_block("mlstm", d_model=8, n_heads=1, conv="none")
    with torch.no_grad():
        block.gate.input.bias.fill_(150.0)
    x = torch.randn(1, 6, 8)
    trace = next(record(block, x)).traces[0]
    assert trace["write"].isinf().all() and is_matrix_memory(trace)
    frame = measure(block, x)
    for name in ("state_frobenius", "state_effective_rank", "write", "memory_length", "half_life"):
        value = frame.filter(pl.col("quantity") == name)["value"]
        assert value.is_finite().all() and value.max() > 0, name


def test_one_token_and_dead_decay():
    for arch in ("gdn2", "mlstm", "slstm", "attention"):
        block = arena.build_block(arch, d_model=8, n_heads=2)
        frame = measure(block, torch.randn(1, 1, 8))
        assert frame.filter(pl.col("quantity") == "memory_length")["value"].to_list() == pytest.approx(
            [1.0] * 2
        )
    block = arena.build_block("gdn", d_model=8, n_heads=2)
    with torch.no_grad():
        block.gate.decay.A_log.fill_(300.0)  # log decay -inf
    frame = measure(block, torch.randn(1, 9, 8))
    assert frame.filter(pl.col("quantity") == "half_life")["value"].to_list() == [0.0, 0.0]
    length = frame.filter(pl.col("quantity") == "memory_length")["value"]
    assert length.to_list() == pytest.approx([1.0] * len(length))


def test_bad_requests_are_named():
    block = arena.build_block("gdn", d_model=8, n_heads=2)
    x = torch.zeros(1, 3, 8)
    with pytest.raises(ValueError, match="unknown quantity 'half_live'; did you mean half_life"):
        measure(block, x, quantities=["half_live"])
    with pytest.raises(ValueError, match="no quantity asked for"):
        measure(block, x, quantities=[])
    with pytest.raises(ValueError, match="window must be at least 1"):
        measure(block, x, window=0)
    with pytest.raises(ValueError, match="needs a sequence and a token"):
        measure(block, torch.zeros(0, 3, 8))


def test_the_dictionary_as_a_table():
    table = data_dictionary()
    assert table["name"].to_list() == list(QUANTITIES)
    for text in table.select("family", "unit", "rows", "meaning", "equation").iter_columns():
        assert (text.str.len_chars() > 0).all()
    markdown = data_dictionary_markdown()
    assert all(f"| `{name}` |" in markdown for name in [*QUANTITIES, *COLUMNS])
    assert select("gates") == {name for name, entry in QUANTITIES.items() if entry.family == "gates"}


LONG = """
import resource, sys, torch, arena
from arena.dynamics import measure
block = arena.build_block("gdn2", d_model=64, n_heads=2)
peak = []
for length in (2048, 16384):
    measure(block, torch.randn(1, length, 64), horizon=1024)
    peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
print(peak[1] - peak[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
def test_memory_does_not_grow_with_the_length():
    """All states of the 14,336 tokens more would take 229 MiB in float64."""
    grown = float(
        subprocess.run([sys.executable, "-c", LONG], capture_output=True, text=True, check=True).stdout
    )
    assert grown < 100


def test_a_saturated_lstm_in_single_precision_still_has_a_memory_length():
    """A cell that counts reaches tanh(c) = 1 in float32; its weights are small then, and not lost."""
    torch.manual_seed(0)
    block = arena.build_block("lstm", d_model=4, n_heads=1, conv="none")
    with torch.no_grad():
        block.bias.zero_()
        block.bias[:3] = 20.0  # input and forget gate open, tanh(z) = 1
        for weight in (block.gates.weight, block.values.weight, block.recurrent):
            weight.zero_()
    T = 15
    frame = measure(
        block, torch.randn(1, T, 4), quantities=["memory_length", "contribution"], reads=1, maps=1
    )
    assert bool((block.trace(torch.randn(1, T, 4))["read"][:, -1] == 1).all())
    lengths = frame.filter(pl.col("quantity") == "memory_length")["value"].to_list()
    assert lengths == [pytest.approx(T, rel=1e-6)]  # all tokens alike
    weights = frame.filter(pl.col("quantity") == "contribution")["value"].to_list()
    assert weights == [pytest.approx(1 / math.cosh(T) ** 2, rel=1e-4)] * T
