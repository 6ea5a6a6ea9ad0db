"""Every measurement against a case whose answer is known in closed form."""

import math

import polars as pl
import pytest
import torch
from dynamics_blocks import Frozen, steps, unit

import synthetic_tasks
from arena.dynamics import measure
from arena.dynamics.edit import last_two_writes, previous_write_share
from synthetic_tasks import Writes

T, H, K, V = 12, 2, 4, 3


def values(frame, quantity, head=0, **where):
    rows = frame.filter((pl.col("quantity") == quantity) & (pl.col("head") == head))
    for name, value in where.items():
        rows = rows.filter(pl.col(name) == value)
    assert len(rows), quantity
    return torch.tensor(rows["value"].fill_null(math.nan).to_list(), dtype=torch.float64)


def close(found, wanted, **kwargs):
    wanted = torch.as_tensor(wanted, dtype=torch.float64).expand_as(found)
    torch.testing.assert_close(found, wanted, **({"rtol": 1e-9, "atol": 1e-9} | kwargs))


def frozen(seed=0, **gates):
    return Frozen(
        unit(T, H, K, seed=seed), unit(T, H, K, seed=seed + 1), unit(T, H, V, seed=seed + 2), **gates
    )


@pytest.mark.parametrize("chunk", [1, 5, 12])
def test_half_life_is_ln2_over_minus_ln_decay(chunk):
    decay = torch.tensor([0.5, 0.9], dtype=torch.float64)[:, None].expand(T, 2, 1)
    frame = measure(frozen(decay=decay), steps(T), quantities=["retention"], chunk=chunk)
    close(values(frame, "half_life", 0), 1.0)
    close(values(frame, "half_life", 1), math.log(2) / -math.log(0.9))


def test_half_life_of_channels_and_of_the_extremes():
    decay = torch.tensor([0.5, 1.0, 0.0, -0.25], dtype=torch.float64).expand(T, H, K)
    frame = measure(frozen(decay=decay), steps(T), quantities=["half_life", "half_life_channel"])
    close(values(frame, "half_life_channel"), [1.0, math.inf, 0.0, 0.5])
    assert values(frame, "half_life").tolist() == [0.0]  # one dead channel: its mean log is -inf
    frame = measure(frozen(), steps(T), quantities=["half_life"])
    assert values(frame, "half_life").tolist() == [math.inf]


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0, 2.0])
def test_transition_of_a_delta_rule(beta):
    frame = measure(frozen(erase=beta), steps(T), quantities=["transition"], window=1)
    close(values(frame, "key_eigenvalue"), 1 - beta)
    close(values(frame, "eigenvalue_min"), min(1 - beta, 1))
    close(values(frame, "eigenvalue_max_imaginary"), 0.0)
    close(values(frame, "spectral_radius"), 1.0)
    close(values(frame, "transition_norm"), 1.0)
    close(values(frame, "identity_distance"), beta)
    close(values(frame, "reflection_distance"), 2 - beta, atol=1e-7)
    close(values(frame, "permutation_distance"), min(beta, 2 - beta), atol=1e-7)
    close(values(frame, "orthogonal_distance"), 0.0 if beta in (0, 2) else min(beta, 2 - beta))
    close(values(frame, "window_eigenvalue_min"), 1 - beta)


def test_a_rotation_is_two_reflections():
    """Reflections along two keys at the angle a turn by 2 a: eigenvalues exp(+- 2 i a)."""
    a = 0.4
    k = torch.tensor([[1.0, 0.0], [math.cos(a), math.sin(a)]], dtype=torch.float64)[:, None]
    block = Frozen(k, k, k, erase=2.0)
    frame = measure(block, steps(2), quantities=["transition"], window=2)
    close(values(frame, "window_radius"), 1.0)
    close(values(frame, "window_norm"), 1.0)
    close(values(frame, "window_eigenvalue_min"), math.cos(2 * a))
    assert len(values(frame, "window_norm")) == 1  # the second token has the first whole window


def test_a_three_cycle_takes_two_tokens():
    """S3: the product of two swaps turns by 120 degrees, which no single token of a delta rule can do."""
    root = math.sqrt(0.5)
    k = torch.tensor([[root, -root, 0.0], [0.0, root, -root]], dtype=torch.float64)[:, None]
    frame = measure(Frozen(k, k, k, erase=2.0), steps(2), quantities=["transition"], window=2)
    close(values(frame, "permutation_distance"), 0.0, atol=1e-7)
    close(values(frame, "reflection_distance"), 0.0, atol=1e-7)
    close(values(frame, "eigenvalue_max_imaginary"), 0.0, atol=1e-7)
    close(values(frame, "window_permutation_distance"), 0.0, atol=1e-7)
    close(values(frame, "window_eigenvalue_min"), -0.5)
    plain = measure(Frozen(k, k, k, erase=1.0), steps(2), quantities=["transition"], window=2)
    assert (values(plain, "window_permutation_distance") > 0.5).all()


def test_erase_by_channel_is_no_contraction():
    """With b in {0,1} and sum b k^2 = 1/3 the norm is 2/sqrt(3)."""
    k = torch.tensor([math.sqrt(1 / 3), math.sqrt(2 / 3)], dtype=torch.float64).expand(1, 1, 2)
    erase = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, 1, 2)
    frame = measure(Frozen(k, k, k, erase=erase), steps(1), quantities=["transition"])
    assert values(frame, "transition_norm").item() == pytest.approx(2 / math.sqrt(3), abs=1e-12)
    assert values(frame, "key_eigenvalue").item() == pytest.approx(2 / 3, abs=1e-12)
    rows = frame.filter(pl.col("quantity") == "window_norm")
    assert rows["value"].to_list() == [None]  # T = 1 has no window of 8


def test_a_swap_is_a_permutation_and_a_reflection():
    k = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64).expand(1, 1, 3) / math.sqrt(2)
    frame = measure(
        Frozen(k, k, k, erase=2.0), steps(1), quantities=["permutation_distance", "reflection_distance"]
    )
    close(values(frame, "permutation_distance"), 0.0, atol=1e-7)
    close(values(frame, "reflection_distance"), 0.0, atol=1e-7)


def test_key_rank_counts_directions():
    """Keys along two of three directions, one three times as often as the other."""
    eye = torch.eye(3, dtype=torch.float64)
    k = eye[[0, 0, 1, 0]][:, None]
    frame = measure(Frozen(k, k, k), steps(4), quantities=["transition"], chunk=3)
    close(values(frame, "key_rank"), math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
    assert frame.filter(pl.col("quantity") == "key_rank")["n"].to_list() == [4]


def test_signed_decay():
    frame = measure(
        frozen(decay=-0.5),
        steps(T),
        quantities=["eigenvalue_min", "half_life", "eigenvalue_real", "decay"],
    )
    close(values(frame, "eigenvalue_min"), -0.5)
    close(values(frame, "half_life"), 1.0)
    close(values(frame, "eigenvalue_real", index=K - 1), -0.5)
    close(values(frame, "decay", statistic="value"), -0.5)


def test_tied_gate_counter_saturates():
    """Mamba-2's counter: write c and decay exp(-a c) every token; the sum tends to c / (1 - exp(-a c))."""
    a, c, length = 1.0, 0.1, 400
    one = torch.ones(length, 1, 1, dtype=torch.float64)
    block = Frozen(one, one, one, decay=math.exp(-a * c), write=c)
    frame = measure(block, steps(length), train_length=100, points=None)
    t = torch.arange(1, length + 1, dtype=torch.float64)
    limit = c / (1 - math.exp(-a * c))
    close(values(frame, "state_frobenius"), limit * (1 - torch.exp(-a * c * t)))
    assert values(frame, "state_frobenius")[-1].item() == pytest.approx(limit, rel=1e-9)
    close(values(frame, "half_life"), math.log(2) / (a * c))
    assert values(frame, "state_growth").item() == pytest.approx(1 / (1 - math.exp(-a * c * 100)), rel=1e-9)
    assert abs(values(frame, "state_growth_exponent").item()) < 1e-3
    counter = measure(Frozen(one, one, one), steps(length), train_length=100)
    close(values(counter, "state_growth_exponent"), 1.0)
    close(values(counter, "state_growth"), 4.0)


def test_rank_and_norms():
    """Orthogonal keys and values of equal size: rank t after t tokens, 1 if all keys are one."""
    eye = torch.eye(4, dtype=torch.float64)[:, None]
    frame = measure(Frozen(eye, eye, 3 * eye), steps(4), quantities=["state"], points=None)
    close(values(frame, "state_effective_rank"), [1.0, 2.0, 3.0, 4.0])
    close(values(frame, "state_frobenius"), [3 * math.sqrt(t) for t in (1, 2, 3, 4)])
    close(values(frame, "state_spectral"), 3.0)
    one = eye[:1].expand(4, 1, 4)
    frame = measure(Frozen(one, one, one), steps(4), quantities=["state"])
    close(values(frame, "state_effective_rank"), 1.0)
    close(values(frame, "state_spectral"), [1.0, 2.0, 3.0, 4.0])
    frame = measure(Frozen(one, one, 0 * one), steps(4), quantities=["state"])
    close(values(frame, "state_effective_rank"), 0.0)


def test_contributions_of_plain_decay():
    """One key, decay g: the weight of lag l is g^l; its length is ((1-g^n)/(1-g))^2 (1-g^2)/(1-g^2n)."""
    g = 0.8
    one = torch.ones(T, 1, 1, dtype=torch.float64)
    frame = measure(Frozen(one, one, one, decay=g), steps(T), quantities=["retention"], reads=1, chunk=5)
    close(values(frame, "contribution"), [g**lag for lag in range(T)])
    n = T
    length = ((1 - g**n) / (1 - g)) ** 2 * (1 - g**2) / (1 - g ** (2 * n))
    close(values(frame, "memory_length"), length)
    age = sum(g**lag * lag for lag in range(n)) / sum(g**lag for lag in range(n))
    close(values(frame, "contribution_age"), age)
    close(values(frame, "gain_beyond"), 0.0)
    for chunk in (1, 2, 3, 4, 12):
        block = Frozen(one, one, one, decay=g)
        cut = measure(block, steps(T), quantities=["retention"], reads=1, horizon=4, chunk=chunk)
        close(values(cut, "contribution"), [g**lag for lag in range(4)])
        close(values(cut, "gain_beyond"), g**4)


def test_parity_by_a_reflection():
    """A token 1 reflects the one key there is: eigenvalue -1, and the first value flips with every 1."""
    bits = torch.tensor([0, 1, 1, 0, 1, 0, 1, 1, 1, 0])
    n = len(bits)
    k = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(n, 1, 2)
    erase = 2.0 * bits[:, None, None].double()
    v = torch.zeros(n, 1, 1, dtype=torch.float64)
    v[0] = 1.0
    frame = measure(Frozen(k, k, v, erase=erase), steps(n), reads=n, points=None)
    close(values(frame, "eigenvalue_min"), 1 - 2 * bits.double())
    factor = values(frame, "rayleigh_quotient")
    assert factor[0].isnan()  # the memory is still zero
    close(factor[1:], 1 - 2 * bits[1:].double())
    parity = 1 - 2.0 * (bits.cumsum(0) % 2)
    close(values(frame, "contribution", source=0), parity)
    close(values(frame, "reflection_distance"), 2.0 - 2 * bits.double(), atol=1e-7)
    close(values(frame, "memory_length", token=n - 1), float(n))  # nothing is forgotten


@pytest.mark.parametrize("chunk", [1, 3, 12])
def test_rayleigh_quotient_of_what_is_held(chunk):
    """Along a key at the cosine c to the one that is held, the factor is decay (1 - beta c^2)."""
    c, beta, decay = 0.6, 1.5, 0.9
    k = torch.tensor([[1.0, 0.0], [c, math.sqrt(1 - c * c)]], dtype=torch.float64)[:, None]
    erase = torch.tensor([0.0, beta], dtype=torch.float64)[:, None, None]
    block = Frozen(k, k, k, decay=decay, erase=erase)
    found = values(measure(block, steps(2), quantities=["state"], chunk=chunk), "rayleigh_quotient")
    close(found[1:], decay * (1 - beta * c * c))


def writes(*triples):
    columns = torch.tensor(triples).T
    return Writes(columns[0], columns[1], columns[1], columns[2])


@pytest.mark.parametrize("beta", [0.25, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("chunk", [1, 2, 8])
def test_left_over_after_overwriting_is_one_minus_beta(beta, chunk):
    """Keys a, b orthogonal, then a again with another value."""
    eye = torch.eye(K, dtype=torch.float64)
    k = torch.stack([eye[0], eye[1], eye[0]])[:, None].expand(3, H, K)
    v = unit(3, H, V)
    block = Frozen(
        k, k, v, erase=torch.tensor([0.0, 0.0, beta], dtype=torch.float64)[:, None, None].expand(3, H, 1)
    )
    frame = measure(block, steps(3), writes=writes((0, 0, 7), (0, 1, 9), (0, 2, 7)), chunk=chunk)
    close(values(frame, "old_value_left", token=2), 1 - beta)
    close(values(frame, "old_value_held", token=2), 1.0)
    close(values(frame, "other_value_left", token=2), 1.0)
    close(values(frame, "interference", token=2), 0.0)
    close(values(frame, "key_similarity", token=2), 0.0)
    close(values(frame, "overwrite_error", token=2), abs(1 - beta))  # the values have length 1
    close(values(frame, "overwrite_error", token=0), 0.0)


def test_edit_with_similar_keys():
    """Key b at the cosine c to a: the delta rule of strength 1 at b changes a's read by c (z_b - c z_a)."""
    c = 0.6
    a, b = [1.0, 0.0], [c, math.sqrt(1 - c * c)]
    k = torch.tensor([a, b], dtype=torch.float64)[:, None]
    v = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)[:, None]
    frame = measure(Frozen(k, k, v, erase=1.0), steps(2), writes=writes((0, 0, 0), (0, 1, 1)))
    close(values(frame, "key_similarity", token=1), c)
    close(values(frame, "other_value_left", token=1), 1 - c * c)
    close(values(frame, "interference", token=1), c * math.sqrt(1 + c * c))
    close(values(frame, "overwrite_error", token=1), 0.0)  # strength 1 replaces whatever the key read
    plain = measure(Frozen(k, k, v), steps(2), writes=writes((0, 0, 0), (0, 1, 1)))
    close(values(plain, "overwrite_error", token=1), c)
    close(values(plain, "other_value_left", token=1), 1.0)
    close(values(plain, "interference", token=1), c)


def test_a_write_of_several_tokens_is_one_edit():
    """Erase at its first token, write at its second: the old value is gone over the whole write."""
    k = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(3, 1, 2)
    erase = torch.tensor([0.0, 0.75, 0.5], dtype=torch.float64)[:, None, None]
    zero = torch.zeros(1, dtype=torch.int64)
    rebind = Writes(
        zero.repeat(2), torch.tensor([0, 1]), torch.tensor([0, 2]), zero.repeat(2)
    )  # sequence, start, position, key
    frame = measure(Frozen(k, k, k, erase=erase), steps(3), writes=rebind, chunk=2)
    close(values(frame, "old_value_left", token=2), 0.25 * 0.5)


def test_a_value_that_is_no_longer_held_has_no_share_left():
    """Decay a and erase beta at each of three tokens: a (1 - beta) a token."""
    k = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(3, 1, 2)
    for decay, held in ((0.5, 0.25), (0.05, 0.025)):
        block = Frozen(k, k, k, decay=decay, erase=0.5)
        frame = measure(block, steps(3), writes=writes((0, 0, 0), (0, 2, 0)))
        close(values(frame, "old_value_held", token=2), held)
        left = frame.filter(pl.col("quantity") == "old_value_left")["value"].to_list()
        assert left == ([pytest.approx(0.25)] if held > 0.05 else [None])


def test_gate_distribution_and_correlation():
    torch.manual_seed(0)
    erase, write = torch.rand(2, T, H, 1, dtype=torch.float64)
    block = frozen(erase=erase, write=write)
    frame = measure(block, steps(T), quantities=["gates"], chunk=5)
    for head in range(H):
        x, y = erase[:, head, 0], write[:, head, 0]
        wanted = torch.corrcoef(torch.stack([x, y]))[0, 1]
        close(values(frame, "corr_erase_write", head), wanted)
        close(values(frame, "erase", head, statistic="mean"), x.mean())
        close(values(frame, "erase", head, statistic="std"), x.std(correction=0))
        close(values(frame, "erase", head, statistic="q25"), x.quantile(0.25))
        close(values(frame, "erase", head, statistic="max"), x.max())
    assert frame.filter(pl.col("quantity") == "corr_decay_write")["value"].to_list() == [None] * H
    tied = measure(frozen(erase=erase, write=erase), steps(T), quantities=["corr_erase_write"])
    close(values(tied, "corr_erase_write"), 1.0)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_share_of_the_previous_write(beta):
    """rebind, one key: a delta rule of strength beta leaves 1 - beta of the old value beside the new one."""
    task = synthetic_tasks.get("rebind", n_keys=1, n_rebinds=1, n_queries=1)
    tokens, targets = task.sample(1, 12)
    wrote = synthetic_tasks.writes(task, tokens).position.tolist()
    k = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(12, 1, 2)
    gates = torch.zeros(2, 12, 1, 1, dtype=torch.float64)
    gates[0, wrote[1]] = beta
    gates[1, wrote] = 1.0
    model = Frozen(k, k, k, erase=gates[0], write=gates[1])
    x = torch.zeros(1, 12, 1, dtype=torch.float64)

    pairs = last_two_writes(synthetic_tasks.writes(task, tokens), synthetic_tasks.asks(task, tokens, targets))
    assert pairs == {(0, 11): tuple(range(p - 1, p + 1) for p in wrote)}
    frame = measure(model, x, quantities=["contribution"], reads=1)
    weights = torch.zeros(1, 12, dtype=torch.float64)
    for source, value in frame.select("source", "value").rows():
        weights[0, 11 - source] = value
    close(previous_write_share(weights, 11, pairs[0, 11]), (1 - beta) / (2 - beta))
    assert previous_write_share(weights[:, :3], 11, pairs[0, 11]).isnan().all()
