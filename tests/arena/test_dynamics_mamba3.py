"""Memories that turn, and writes a token late: every measurement against a case whose answer is known."""

import math

import numpy as np
import polars as pl
import pytest
import torch
from dynamics_blocks import Frozen, steps, unit
from test_blocks_mamba3 import make, parity_block

import arena
import synthetic_tasks
from arena.dynamics import QUANTITIES, edited, measure, parse_edit
from arena.dynamics.effects import head_eigenvalues, measure_effects
from arena.dynamics.hooks import gates_of, hooked
from arena.dynamics.intervene import check
from arena.dynamics.retention import by_source
from arena.dynamics.state import advance
from arena.model import ModelConfig, build_model
from synthetic_tasks import Writes

T, H, K, V = 12, 2, 4, 3
X = torch.randn(2, 17, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def close(found, wanted, **kwargs):
    wanted = torch.as_tensor(wanted, dtype=torch.float64).expand_as(found)
    torch.testing.assert_close(found, wanted, **({"rtol": 1e-9, "atol": 1e-9} | kwargs))


def values(frame, quantity, **where):
    rows = frame.filter(pl.col("quantity") == quantity, pl.col("statistic") == "value", **where)
    assert len(rows), quantity
    return torch.tensor(rows["value"].fill_null(math.nan).to_list(), dtype=torch.float64)


@pytest.mark.parametrize("chunk", [1, 5, 12])
def test_a_turn_is_two_reflections(chunk):
    """The same memory told with an angle and with two mirrors: everything of a token is the same number."""
    q, k, v = unit(T, H, K), unit(T, H, K, seed=1), unit(T, H, V, seed=2)
    draw = torch.Generator().manual_seed(3)
    decay, erase, write = (torch.rand(T, H, 1, generator=draw, dtype=torch.float64) for _ in range(3))
    angle = 6 * torch.rand(T, H, 2, generator=draw, dtype=torch.float64) - 3
    one = Frozen(q, k, v, decay=decay, erase=2 * erase, write=write, angle=angle)

    def mirror(pair, turn):
        key = torch.zeros(T, H, K, dtype=torch.float64)
        key[..., 2 * pair], key[..., 2 * pair + 1] = (turn / 2).cos(), (turn / 2).sin()
        return key

    zero, full = torch.zeros_like(erase), torch.ones_like(erase)
    still = torch.zeros(T, H, dtype=torch.float64)
    keys = [mirror(0, still), mirror(0, angle[..., 0]), mirror(1, still), mirror(1, angle[..., 1]), k]
    many = Frozen(
        q,
        torch.stack(keys, 1).flatten(0, 1),
        torch.stack([v] * 5, 1).flatten(0, 1),
        decay=torch.stack([decay, *[full] * 4], 1).flatten(0, 1),
        erase=torch.stack([*[2 * full] * 4, 2 * erase], 1).flatten(0, 1),
        write=torch.stack([*[zero] * 4, write], 1).flatten(0, 1),
    )
    places = Writes(*torch.tensor([[0, t, t, t % 3] for t in range(T)]).unbind(1))
    frames = [
        measure(block, steps(T), writes=places, chunk=chunk, points=None, train_length=6, window=3)
        for block in (one, many)
    ]
    place = ["quantity", "head", "sequence", "token", "source", "index", "statistic"]
    skipped = (
        "erase",
        "write",
        "angle",
        "key_eigenvalue",
        "key_rank",
        "corr_erase_write",
        "corr_decay_write",
    )
    turning, mirrored = (
        frame.filter(~pl.col("quantity").is_in(skipped))
        .filter(pl.col("micro").is_null() | (pl.col("micro") == 4))
        .sort(place, nulls_last=True)
        for frame in frames
    )
    assert {"old_value_left", "interference", "contribution", "window_norm"} <= set(turning["quantity"])
    assert turning.select(place).equals(mirrored.select(place))
    np.testing.assert_allclose(
        turning["value"].to_numpy(), mirrored["value"].to_numpy(), rtol=1e-6, atol=1e-7
    )


def test_a_turn_in_closed_form():
    turn, decay = math.radians(50), 0.9
    angle = torch.full((T, H, 1), turn, dtype=torch.float64)
    v = torch.zeros(T, H, V, dtype=torch.float64)
    v[0] = 1.0
    k = torch.zeros(T, H, K, dtype=torch.float64)
    k[..., 0] = 1.0
    block = Frozen(k, k, v, decay=decay, angle=angle)
    frame = measure(block, steps(T), quantities=list(QUANTITIES), points=None, chunk=5, reads=1, maps=1)
    close(values(frame, "eigenvalue_min"), decay * math.cos(turn))
    close(values(frame, "eigenvalue_max_imaginary"), decay * math.sin(turn))
    close(values(frame, "spectral_radius"), decay)
    close(values(frame, "transition_norm"), decay)
    close(values(frame, "rayleigh_quotient", head=0)[1:], decay * math.cos(turn))
    close(values(frame, "angle"), turn)
    lag = torch.arange(T - 1, -1, -1, dtype=torch.float64)
    close(values(frame, "contribution", head=0), (decay**lag * (turn * lag).cos()).flip(0))


@pytest.mark.parametrize("outer", ["common", "official"])
@pytest.mark.parametrize("options", [{}, dict(rank=3), dict(rotary="none"), dict(trapezoid=1.0)], ids=str)
def test_the_memory_from_the_trace_is_the_blocks_own(outer, options):
    block = make(outer, **options)
    trace = block.trace(X, states=True)
    for t, now in advance(trace, torch.zeros_like(trace["state"][:, 0]), range(17)):
        close(now, trace["state"][:, t])
    assert t == 16
    frame = measure(block, X, quantities=["state"], points=None, chunk=5)
    norms = values(frame, "state_frobenius", head=1, sequence=1)
    close(norms, torch.linalg.matrix_norm(trace["state"][1, :, 1]))


@pytest.mark.parametrize("outer", ["common", "official"])
def test_contributions_add_up_to_the_read(outer):
    """A value counts once, for its own token, though it is written twice."""
    block = make(outer)
    trace = block.trace(X)
    frame = measure(block, X, quantities=["contribution"], chunk=5, reads=17, maps=2)
    assert frame["micro"].is_null().all()
    for b, t, head in ((0, 0, 0), (0, 16, 1), (1, 11, 0)):
        rows = frame.filter(sequence=b, token=t, head=head).sort("source")
        assert rows["source"].to_list() == list(range(t + 1))
        weights = torch.tensor(rows["value"].fill_null(math.nan).to_list(), dtype=torch.float64)
        close(weights @ trace["v"][b, 1 : 2 * t + 2 : 2, head], trace["read"][b, t, head])


def test_by_source():
    weights = torch.tensor([[[[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]]]])
    assert by_source(weights.clone(), [1, 0]).flatten().tolist() == [10.0, 21.0, 42.0]
    assert torch.equal(by_source(weights.clone(), [0, 0]), weights)


@pytest.mark.parametrize("rank", [1, 2])
def test_chunks_do_not_matter_and_what_has_no_meaning_is_null(rank):
    block = make("common", rank=rank)
    places = Writes(*torch.tensor([[0, 2, 2, 0], [0, 9, 9, 0]]).unbind(1))
    wanted = list(QUANTITIES)
    frames = [measure(block, X, quantities=wanted, chunk=c, points=None, writes=places) for c in (4, 17)]
    order = ["quantity", "head", "sequence", "token", "source", "index", "micro", "role", "statistic"]
    one, other = (frame.sort(order, nulls_last=True) for frame in frames)
    assert one.select(order).equals(other.select(order))
    np.testing.assert_allclose(one["value"].to_numpy(), other["value"].to_numpy(), rtol=1e-6, atol=1e-8)
    missing = set(one.filter(pl.col("head").is_null())["quantity"])
    others = {name for name, entry in QUANTITIES.items() if entry.family in ("edit", "update")}
    reads = {"contribution", "memory_length", "contribution_age", "gain_beyond"}
    growth = {"state_growth", "state_growth_exponent"}  # no training length given
    assert missing == others | growth | {"normaliser", "input_gate", "forget_gate", "cell_norm"} | (
        reads if rank > 1 else set()
    )
    assert set(one.filter(pl.col("quantity") == "write")["micro"]) == set(range(2 * rank))
    trace = block.trace(X)
    keys = trace["k"].unflatten(1, (17, 2, rank))[:, :, 1].detach()
    share = torch.linalg.eigvalsh(torch.einsum("btrhk,btrhl->hkl", keys, keys))
    share = share / share.sum(-1, keepdim=True)
    close(values(one, "key_rank"), torch.special.entr(share).sum(-1).exp())


@pytest.mark.parametrize("outer", ["common", "official"])
@pytest.mark.parametrize("rank", [1, 2])
def test_nothing_changes_where_a_hook_changes_nothing(outer, rank):
    block, seen = make(outer, rank=rank), {}

    def look(layer, now, start):
        seen.update(now)
        return now

    before = block(X)[0]
    with hooked(block, look):
        assert torch.equal(block(X)[0], before)
    assert set(seen) == set(gates_of(block)) == {"decay", "write", "angle", "output"}
    trace = block.trace(X)
    close(seen["angle"], trace["angle"][:, :: 2 * rank])
    close(seen["decay"], trace["decay"][:, :: 2 * rank])
    close(seen["write"], trace["step"][:, :: 2 * rank])


@pytest.mark.parametrize(
    "text",
    [
        "decay:freeze:0.5",
        "decay:freeze:-0.5",
        "decay:zero",
        "write:freeze:0.25",
        "angle:zero",
        "angle:clamp:-0.01:0.01",
    ],
)
def test_edits_are_those_of_the_recurrence(text):
    block = make("common", rope_fraction=1.0)
    some = torch.rand(2, 17, generator=torch.Generator().manual_seed(0)) < 0.5
    clean, edit = block.trace(X), parse_edit(text + "@head=1@class=some")
    check(block, [edit])
    with edited(block, [edit], {"some": some}):
        trace, y = block.trace(X), block(X)[0]
    gate = "step" if edit.gate == "write" else edit.gate
    bounds = {"zero": (0, 0), "freeze": (edit.value, edit.value), "clamp": (edit.low, edit.high)}
    first, expected = clean[gate].unflatten(1, (17, 2))[:, :, 0], trace[gate].unflatten(1, (17, 2))[:, :, 0]
    close(expected[:, :, 0], first[:, :, 0])
    close(expected[:, :, 1][~some], first[:, :, 1][~some])
    if edit.gate == "write":
        shares = [x["write"].unflatten(1, (17, 2))[:, :, :, 1, 0] for x in (clean, trace)]
        new = shares[1].clone()
        ratio = edit.value / first[:, :, 1]  # both writes are in proportion to the step
        close(new[some], (shares[0] * ratio)[some])
    else:
        close(expected[:, :, 1][some], first[:, :, 1].clamp(*bounds[edit.action])[some])
    state = torch.zeros_like(block.initial_state(2)["memory"])
    for t, now in advance(trace, state, range(17)):
        close(torch.einsum("bhkv,bhk->bhv", now, trace["q"][:, t]), trace["read"][:, t])
    assert not torch.allclose(y, block(X)[0])


def test_swaps_that_have_no_meaning_are_refused():
    with pytest.raises(ValueError, match="cannot swap angle with decay"):
        parse_edit("angle:swap:decay")
    block = arena.build_block("gdn2", d_model=8, n_heads=2)
    with pytest.raises(ValueError, match="has no angle gate; its gates: decay, erase, write, output"):
        check(block, [parse_edit("angle:zero")])


def test_the_parity_of_the_hand_set_block_hangs_on_its_angle():
    """A turn by pi at the ones: eigenvalue -1 there, 1 elsewhere; without it the block counts."""
    block = parity_block()
    bits = torch.randint(2, (4, 40), generator=torch.Generator().manual_seed(1))
    x = torch.zeros(4, 40, 8)
    x[..., 0], x[..., 1] = bits, 1.0
    table = head_eigenvalues(block, x, {"ones": bits == 1, "zeros": bits == 0}).filter(head=0)
    found = dict(table.select("tokens", "least_eigenvalue").iter_rows())
    assert found == pytest.approx({"ones": -1.0, "zeros": 1.0}, abs=1e-3)
    with torch.no_grad(), edited(block, [parse_edit("angle:zero")], {}):
        counted = block(x)[0][..., 0]
    torch.testing.assert_close(counted, bits.cumsum(1).float(), rtol=1e-2, atol=1e-2)


def parity_model():
    """The hand-set block in a model: after the norm a one is [2, 2, 0 ...], a zero [0, 8^(1/2), 0 ...]."""
    config = ModelConfig(
        arch="mamba3", vocab_size=2, n_classes=2, d_model=8, n_heads=1, n_layers=1, outer="official"
    )
    model = build_model(config, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        block = model.blocks[0]
        block.load_state_dict(parity_block().state_dict())
        block.project.weight[:, 0] /= 2
        block.project.weight[:16, 1] /= 2  # z is 10 at a one, 14 at a zero: SiLU is the identity on both
        block.out.weight[2] = block.out.weight[0]
        block.out.weight[0] = 0.0
        model.embedding.weight[1, :2] = 1.0
        model.embedding.weight[0, 1] = 1.0
        model.head.weight[1, 2], model.head.weight[1, 1] = 1.0, -0.5
    return model


def test_the_head_that_turns_is_found_and_confirmed():
    """Known answer: with its turn clamped to a quarter the memory adds up instead of going back and forth."""
    task = synthetic_tasks.get("parity", supervision="running")
    table = measure_effects(parity_model(), task, 40, n_sequences=64)
    clamped = table.filter(pl.col("change") == "angle clamped to [-1.5708, 1.5708]")
    (found,) = clamped.filter(role="identified").to_dicts()
    assert found["heads"] == "0.0" and found["baseline"] == 1
    assert found["accuracy"] < 0.8 and found["high"] < -0.2
    (elsewhere,) = clamped.filter(role="elsewhere").to_dicts()
    assert elsewhere["effect"] == 0
    (control,) = clamped.filter(role="control").to_dicts()
    assert control["effect"] == 0
    single = clamped.filter(role="head").select("heads", "effect").rows()
    assert [heads for heads, effect in single if effect != 0] == ["0.0"]
