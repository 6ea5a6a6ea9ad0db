"""Several micro-steps a token: every measurement against a case whose answer is known, or a recurrence."""

import math

import numpy as np
import polars as pl
import pytest
import torch
from dynamics_blocks import Frozen, steps, unit

import arena
import synthetic_tasks
from arena.constructions import s3_model
from arena.dynamics import edited, measure, measure_decodability, measure_effects, measure_fields, parse_edit
from arena.dynamics.classes import token_classes
from arena.dynamics.effects import head_eigenvalues
from arena.dynamics.hooks import gates_of, hooked
from arena.dynamics.intervene import check, prepare
from arena.dynamics.state import advance, writing_step
from arena.model import ModelConfig, build_model
from synthetic_tasks import Writes

T, H, K, V = 12, 2, 3, 3


def values(frame, quantity, head=0, **where):
    rows = frame.filter(
        pl.col("quantity") == quantity, pl.col("head") == head, pl.col("statistic") == "value"
    )
    for name, value in where.items():
        rows = rows.filter(pl.col(name).is_null() if value is None else pl.col(name) == value)
    assert len(rows), quantity
    return torch.tensor(rows["value"].fill_null(math.nan).to_list(), dtype=torch.float64)


def close(found, wanted, **kwargs):
    wanted = torch.as_tensor(wanted, dtype=torch.float64).expand_as(found)
    torch.testing.assert_close(found, wanted, **({"rtol": 1e-9, "atol": 1e-9} | kwargs))


def mirrors(angle):
    """Keys [2 T,H,K]: two of a token in the plane of the first two channels, with an angle between them."""
    first = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    second = torch.tensor([math.cos(angle), math.sin(angle), 0.0], dtype=torch.float64)
    return torch.stack([first, second]).repeat(T, 1)[:, None].expand(2 * T, H, K)


@pytest.mark.parametrize("degrees", [15.0, 45.0, 60.0, 90.0])
@pytest.mark.parametrize("chunk", [1, 5, 12])
def test_two_reflections_are_a_rotation(degrees, chunk):
    """H_2 H_1 turns the plane by twice the angle between its mirrors; eigenvalues e^(+-2i angle) and 1."""
    angle = math.radians(degrees)
    turn, k = 2 * angle, mirrors(angle)
    block = Frozen(unit(T, H, K), k, unit(2 * T, H, V, seed=1), erase=2.0)
    wanted = ["transition", "eigenvalue_real", "eigenvalue_imaginary"]
    frame = measure(block, steps(T), quantities=wanted, chunk=chunk, window=3)
    close(values(frame, "eigenvalue_min"), math.cos(turn))
    close(values(frame, "eigenvalue_max_imaginary"), math.sin(turn), atol=1e-7)
    close(values(frame, "eigenvalue_imaginary", index=0).abs(), math.sin(turn), atol=1e-7)
    close(values(frame, "eigenvalue_real", index=2), 1.0)
    close(values(frame, "spectral_radius"), 1.0)
    close(values(frame, "transition_norm"), 1.0)
    close(values(frame, "orthogonal_distance"), 0.0, atol=1e-7)
    close(values(frame, "identity_distance"), 2 * math.sqrt(2) * math.sin(angle))
    # of the rotation R (and 1): || R - I ||^2 + 4 l + 4 with l = cos(turn) - 1
    close(values(frame, "reflection_distance"), math.sqrt(8 * math.sin(angle) ** 2 + 4 * math.cos(turn)))
    for micro in (0, 1):
        close(values(frame, "key_eigenvalue", micro=micro), -1.0)
    assert len(values(frame, "key_eigenvalue")) == 2 * T
    close(values(frame, "window_eigenvalue_min"), min(math.cos(3 * turn), 1.0), atol=1e-7)
    assert len(values(frame, "window_norm")) == T - 2
    if degrees == 60.0:  # a turn by 120 degrees is a cycle of three, and three of them are nothing
        close(values(frame, "permutation_distance"), 0.0, atol=1e-6)
        close(values(frame, "window_permutation_distance"), 0.0, atol=1e-6)
    weight = torch.einsum("thk,thl->hkl", k, k)[0]
    share = torch.linalg.eigvalsh(weight) / weight.trace()
    share = share[share > 1e-12]
    close(values(frame, "key_rank"), (-(share * share.log()).sum()).exp())


def test_a_decay_stands_before_the_reflections_and_is_one_a_token():
    """M = H_2 H_1 D: half-life and gate of the token; both eigenvalues are shrunk."""
    decay = torch.tensor([0.5, 1.0], dtype=torch.float64).repeat(T)[:, None, None].expand(2 * T, H, 1)
    block = Frozen(unit(T, H, K), mirrors(math.pi / 4), unit(2 * T, H, V, seed=1), erase=2.0, decay=decay)
    frame = measure(block, steps(T), chunk=5)
    close(values(frame, "half_life"), 1.0)
    close(values(frame, "decay", micro=None), 0.5)
    close(values(frame, "erase", micro=0), 2.0)
    close(values(frame, "eigenvalue_max_imaginary"), 0.5)
    close(values(frame, "spectral_radius"), 0.5)
    rows = frame.filter(pl.col("quantity") == "decay", pl.col("statistic") == "mean", pl.col("head") == 1)
    assert rows["value"].to_list() == [0.5] and rows["micro"].to_list() == [None]


def test_rayleigh_quotient_of_a_rotation():
    """<S, R S> / ||S||^2 is the cosine of the turn for a memory in the plane; written at token 0 alone."""
    angle = math.radians(25)
    v = torch.zeros(2 * T, H, 1, dtype=torch.float64)
    v[1] = 1.0
    block = Frozen(unit(T, H, K), mirrors(angle), v, erase=2.0)
    found = values(measure(block, steps(T), quantities=["state"], points=None, chunk=5), "rayleigh_quotient")
    assert found[0].isnan()
    close(found[1:], math.cos(2 * angle))


def make(arch="deltaproduct[3]-neg", length=17):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = arena.build_block(arch, d_model=12, n_heads=2).double()
        for parameter in block.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
        return block, torch.randn(2, length, 12, dtype=torch.float64)


PRODUCTS = ["deltaproduct[2]", "deltaproduct[3]-neg", "gdnproduct[2]-neg", "gdnproduct[4]"]


@pytest.mark.parametrize("arch", PRODUCTS)
def test_the_memory_from_the_trace_is_the_blocks_own(arch):
    block, x = make(arch)
    trace = block.trace(x, states=True)
    for t, now in advance(trace, torch.zeros_like(trace["state"][:, 0]), range(17)):
        torch.testing.assert_close(now, trace["state"][:, t], rtol=1e-9, atol=1e-9)
    assert t == 16 and writing_step(trace) is None
    frame = measure(block, x, quantities=["state"], points=None, chunk=5)
    close(
        values(frame, "state_frobenius", head=1, sequence=1),
        torch.linalg.matrix_norm(trace["state"][1, :, 1]),
    )


@pytest.mark.parametrize("arch", PRODUCTS)
def test_contributions_add_up_to_the_read(arch):
    """sum over tokens and micro-steps of w(t,s,j) v_sj is the read; a token's weight is that of its steps."""
    block, x = make(arch)
    n, trace = block.micro_steps, block.trace(x)
    frame = measure(block, x, quantities=["retention"], chunk=5, reads=17, maps=2)
    for b, t, head in ((0, 0, 0), (0, 16, 1), (1, 11, 0)):
        rows = frame.filter(
            pl.col("quantity") == "contribution",
            pl.col("sequence") == b,
            pl.col("token") == t,
            pl.col("head") == head,
        ).sort("source", "micro")
        assert rows.select("source", "micro").rows() == [(s, j) for s in range(t + 1) for j in range(n)]
        weights = torch.tensor(rows["value"].to_list(), dtype=torch.float64)
        read = weights @ trace["v"][b, : (t + 1) * n, head]
        torch.testing.assert_close(read, trace["read"][b, t, head], rtol=1e-9, atol=1e-11)
        size = weights.abs().view(-1, n).sum(1)
        age = (size * torch.arange(t, -1, -1)).sum() / size.sum()
        close(values(frame, "memory_length", head, sequence=b, token=t), size.sum() ** 2 / (size**2).sum())
        close(values(frame, "contribution_age", head, sequence=b, token=t), age)


def test_gates_have_a_row_a_micro_step():
    block, x = make("gdnproduct[3]-neg")
    trace, frame = block.trace(x), measure(block, x, quantities=["gates"], chunk=4, points=None)
    by_token = {name: trace[name].unflatten(1, (17, 3)) for name in ("decay", "erase", "write")}
    for j in range(3):
        for head in (0, 1):
            rows = frame.filter(
                pl.col("quantity") == "erase", pl.col("micro") == j, pl.col("head") == head, role="all"
            )
            found = dict(rows.select("statistic", "value").iter_rows())
            erase = by_token["erase"][:, :, j, head].detach()
            assert found["mean"] == pytest.approx(float(erase.mean()))
            assert found["max"] == pytest.approx(float(erase.max()))
            pair = (by_token["decay"][:, :, 0, head, 0], by_token["write"][:, :, j, head, 0])
            r = np.corrcoef(*(y.detach().flatten().numpy() for y in pair))[0, 1]
            close(values(frame, "corr_decay_write", head, micro=j), float(r))
            close(values(frame, "corr_erase_write", head, micro=j), 1.0)
    assert frame.filter(pl.col("quantity") == "decay")["micro"].to_list() == [None] * len(
        frame.filter(pl.col("quantity") == "decay")
    )


def test_a_token_that_erases_and_then_writes_is_one_step_of_the_delta_rule():
    """The same memory told in one micro-step and in two: everything of a token is the same number."""
    q, k, v = unit(T, H, K), unit(T, H, K, seed=1), unit(T, H, V, seed=2)
    draw = torch.Generator().manual_seed(3)
    decay, erase, write = (torch.rand(T, H, 1, generator=draw, dtype=torch.float64) for _ in range(3))
    one = Frozen(q, k, v, decay=decay, erase=2 * erase, write=write)
    nothing, kept = torch.zeros_like(erase), torch.ones_like(erase)

    def interleaved(x, y):
        return torch.stack([x, y], 1).flatten(0, 1)

    two = Frozen(
        q,
        interleaved(k, k),
        interleaved(v, v),
        decay=interleaved(decay, kept),
        erase=interleaved(2 * erase, nothing),
        write=interleaved(nothing, write),
    )
    keys = torch.tensor([[0, t, t, t % 3] for t in range(T)])
    writes = Writes(*keys.unbind(1))
    frames = [
        measure(block, steps(T), writes=writes, chunk=5, points=None, train_length=6, window=3)
        for block in (one, two)
    ]
    place = ["quantity", "head", "sequence", "token", "source", "index", "statistic"]
    skipped = ("erase", "write", "key_eigenvalue", "corr_erase_write", "corr_decay_write")
    single, double = (
        frame.filter(~pl.col("quantity").is_in(skipped))
        .filter(pl.col("micro").is_null() | (pl.col("micro") == 1))
        .sort(place, nulls_last=True)
        for frame in frames
    )
    assert {"old_value_left", "interference", "contribution", "window_norm"} <= set(double["quantity"])
    assert single.select(place).equals(double.select(place))
    np.testing.assert_allclose(single["value"].to_numpy(), double["value"].to_numpy(), rtol=1e-7, atol=1e-7)


def test_edits_have_no_meaning_where_a_token_writes_under_several_keys():
    block, x = make()
    writes = Writes(*torch.tensor([[0, 2, 2, 0], [0, 9, 9, 0]]).unbind(1))
    frame = measure(block, x, quantities=["edit", "gates"], writes=writes)
    rows = frame.filter(pl.col("quantity") == "old_value_left")
    assert rows["value"].to_list() == [None] and rows["head"].to_list() == [None]
    task = synthetic_tasks.get("partial_update")
    config = ModelConfig(
        arch="deltaproduct[2]", vocab_size=task.vocab_size, n_classes=task.n_classes, d_model=8
    )
    length = task.legal_length(24)
    assert measure_fields(build_model(config, seed=0), task, length, n_sequences=2).is_empty()


@pytest.mark.parametrize("arch", PRODUCTS)
def test_nothing_changes_where_a_hook_changes_nothing(arch):
    block, x = make(arch)
    n, seen = block.micro_steps, {}

    def look(layer, now, start):
        seen.update(now)
        return now

    before = block(x)[0]
    with hooked(block, look):
        assert torch.equal(block(x)[0], before)
    assert set(seen) == set(gates_of(block))
    assert seen["erase"].shape == (2, 17, 2, n)
    trace = block.trace(x)
    close(seen["erase"][:, :, :, 1], trace["erase"][:, 1::n, :, 0])
    if "decay" in seen:
        close(seen["decay"][..., 0], trace["decay"][:, ::n, :, 0])


@pytest.mark.parametrize("arch", ["deltaproduct[3]-neg", "gdnproduct[3]-neg"])
@pytest.mark.parametrize(
    "text", ["erase:clamp:0.2:0.6", "decay:freeze:0.5", "write:zero", "decay:freeze:-0.5"]
)
def test_edits_are_those_of_the_recurrence(arch, text):
    block, x = make(arch)
    edit = parse_edit(text + "@head=1@class=some")
    if edit.gate not in gates_of(block):
        with pytest.raises(ValueError, match="has no decay gate; its gates: erase, write"):
            check(block, [edit])
        return
    some = torch.rand(2, 17, generator=torch.Generator().manual_seed(0)) < 0.5
    clean = block.trace(x)
    with edited(block, [edit], {"some": some}):
        trace, y = block.trace(x), block(x)[0]
    bounds = {"zero": (0, 0), "freeze": (edit.value, edit.value), "clamp": (edit.low, edit.high)}
    expected, where = clean[edit.gate].clone(), some.repeat_interleave(3, 1)
    if edit.gate == "decay":
        where = where & (torch.arange(51) % 3 == 0)
    new = expected.clamp(*bounds[edit.action])
    expected[:, :, 1] = torch.where(where[..., None], new[:, :, 1], expected[:, :, 1])
    close(trace[edit.gate], expected)
    S, reads = torch.zeros(2, 2, 6, 6, dtype=torch.float64), []
    for m in range(51):
        k, v, d, e, w = (trace[g][:, m] for g in ("k", "v", "decay", "erase", "write"))
        S = d[..., None] * S
        S = S + k[..., None] * (w * v - torch.einsum("bhk,bhkv->bhv", e * k, S))[..., None, :]
        if m % 3 == 2:
            reads.append(torch.einsum("bhk,bhkv->bhv", trace["q"][:, m // 3], S))
    close(trace["read"], torch.stack(reads, 1))
    assert not torch.allclose(y, block(x)[0])


def test_a_gate_is_frozen_at_the_mean_of_each_micro_step():
    block, x = make("deltaproduct[3]-neg")
    (edit,) = prepare(block, [parse_edit("erase:freeze")], x, {})
    with edited(block, [edit], {}):
        trace = block.trace(x)
    erase = block.trace(x)["erase"].unflatten(1, (17, 3))
    close(trace["erase"].unflatten(1, (17, 3)), erase.mean((0, 1)).expand_as(erase))


def test_one_micro_step_is_changed_alone():
    block, x = make("gdnproduct[3]-neg")
    clean = block.trace(x)
    for text, value in (("erase:zero@micro=2@head=1", 0.0), ("erase:freeze:0.5@micro=0@head=1", 0.5)):
        edit = parse_edit(text)
        check(block, [edit])
        with edited(block, [edit], {}):
            trace = block.trace(x)
        expected = clean["erase"].clone()
        expected[:, edit.micro :: 3, 1] = value
        close(trace["erase"], expected)
        assert torch.equal(trace["write"], clean["write"]) and edit.what.startswith("erase of micro-step")
    (edit,) = prepare(block, [parse_edit("write:freeze@micro=1")], x, {})
    with edited(block, [edit], {}):
        write = block.trace(x)["write"].unflatten(1, (17, 3))
    wanted = clean["write"].unflatten(1, (17, 3)).clone()
    wanted[:, :, 1] = wanted[:, :, 1].mean((0, 1))
    close(write, wanted)
    for text, why in (
        ("erase:zero@micro=3", "a token of layer 0 has micro-steps 0..2"),
        ("decay:freeze@micro=0", ""),
        ("decay:freeze@micro=1", "a token of layer 0 has one of it"),
        ("output:zero@micro=-1", "a token of layer 0 has one of it"),
    ):
        if why:
            with pytest.raises(ValueError, match=why):
                check(block, [parse_edit(text)])
        else:
            check(block, [parse_edit(text)])


def test_without_the_first_reflection_s3_has_no_rotations():
    """It reflects at the second micro-step: without the first, a rotation is one reflection too few."""
    model, batch = s3_model(), S3.sample(16, 8, split="test")
    with edited(model, [parse_edit("erase:zero@micro=0"), parse_edit("write:zero@micro=0")], {}):
        answers = model(batch.tokens)[0].argmax(-1)
    turned = torch.isin(batch.tokens, torch.tensor(_KINDS["rotation"])).long().cumsum(1) > 0
    assert bool((answers == batch.targets)[~turned].all())
    first = turned & (turned.long().cumsum(1) == 1)
    assert bool((answers != batch.targets)[first].all())


def test_swaps_that_have_no_meaning_are_refused():
    block, x = make("gdnproduct[3]-neg")
    with pytest.raises(ValueError, match="a token of layer 0 has one decay, 3 of the other"):
        check(block, [parse_edit("erase:swap:decay")])
    with edited(block, [parse_edit("erase:swap:write")], {}):
        trace = block.trace(x)
    close(trace["erase"], block.trace(x)["write"])


S3 = synthetic_tasks.get("s3")


def test_eigenvalues_of_the_s3_model_are_those_of_the_group():
    """By hand: nothing at the identity, -1 at a reflection, -1/2 +- i sqrt(3)/2 at a rotation."""
    model, batch = s3_model(), S3.sample(4, 40, split="valid")
    classes = {name: torch.isin(batch.tokens, torch.tensor(ids)) for name, ids in _KINDS.items()}
    table = head_eigenvalues(model, batch.tokens, classes).filter(head=0)
    found = dict(table.select("tokens", "least_eigenvalue").iter_rows())
    assert found == pytest.approx(
        {"identity": 1.0, "reflection": -1.0, "rotation": -0.5}, abs=1e-4
    )  # the keys' norm has an epsilon
    frame = measure(model, batch, task=S3, quantities=["transition"], points=None)
    turning = frame.filter(pl.col("quantity") == "eigenvalue_max_imaginary", pl.col("head") == 0)
    for sequence, token, value in turning.select("sequence", "token", "value").iter_rows():
        rotation = int(batch.tokens[sequence, token]) in _KINDS["rotation"]
        assert value == pytest.approx(math.sqrt(3) / 2 if rotation else 0.0, abs=1e-3)


_KINDS = {"identity": [0], "reflection": [1, 2, 5], "rotation": [3, 4]}


def test_the_s3_model_depends_on_its_reflections():
    model = s3_model().float()
    table = measure_effects(model, S3, 24, n_sequences=32)
    clamped = table.filter(pl.col("change").str.contains("clamped"))
    effect = dict(clamped.filter(role="head").select("heads", "effect").iter_rows())
    assert effect["0.0"] < -0.3
    assert table["baseline"].to_list() == [1.0] * len(table)
    decoded = measure_decodability(model, S3, [24], n_fit=128, n_test=64)
    assert decoded["accuracy"].to_list() == [1.0]
    assert set(token_classes(S3, *S3.sample(2, 12)[:2])) >= {"moves", "stays"}
