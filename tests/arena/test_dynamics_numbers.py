"""The functions under the measurements, against brute force on random numbers."""

import itertools

import numpy as np
import polars as pl
import pytest
import torch

import synthetic_tasks
from arena.dynamics import gates, measure
from arena.dynamics import transition as tr
from arena.dynamics.state import effective_rank, growth_exponent
from arena.model import ModelConfig, build_model


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotated(matrix, seed):
    """The same map in another orthonormal basis."""
    q, _ = torch.linalg.qr(random(len(matrix), len(matrix), seed=seed))
    return q @ matrix @ q.T


@pytest.mark.parametrize("order", list(itertools.permutations(range(5)))[::7])
def test_every_permutation_of_five_points_in_any_basis_is_one(order):
    matrix = torch.eye(8, dtype=torch.float64)
    matrix[:5, :5] = torch.eye(5, dtype=torch.float64)[list(order)]
    found = tr.permutation_distance(tr.eigenvalues(rotated(matrix, sum(order[:2]))))
    assert found.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_permutation_distance_is_the_best_matching(seed):
    """Against all matchings with all permutations of 5 points."""
    found = torch.complex(random(5, seed=seed), random(5, seed=seed + 10))
    best = np.inf
    for order in itertools.permutations(range(5)):
        roots = torch.linalg.eigvals(torch.eye(5, dtype=torch.float64)[list(order)])
        for matching in itertools.permutations(range(5)):
            best = min(best, (found - roots[list(matching)]).abs().square().sum().sqrt().item())
    assert tr.permutation_distance(found).item() == pytest.approx(best)


def test_permutation_distance_of_rotations_and_of_few_channels():
    def turn(angle):
        z = torch.tensor(angle, dtype=torch.float64)
        return torch.complex(z.cos().expand(2), torch.stack([z.sin(), -z.sin()]))

    assert tr.permutation_distance(turn(2 * np.pi / 3)).item() == pytest.approx(0.0, abs=1e-7)
    small = (2 * (2 * np.sin(0.15)) ** 2) ** 0.5  # nearest to the identity
    assert tr.permutation_distance(turn(0.3)).item() == pytest.approx(small)
    one_channel = torch.tensor([[-1.0 + 0j], [0.0], [1.0]])
    torch.testing.assert_close(tr.permutation_distance(one_channel), torch.tensor([0.0, 1.0, 0.0]))
    assert tr.permutation_distance(torch.full((3,), torch.nan, dtype=torch.complex128)).isnan()


def test_reflection_distance_is_the_least_over_directions():
    matrix = random(4, 4)
    found = tr.reflection_distance(matrix)
    symmetric = (matrix + matrix.T) / 2
    best = torch.linalg.eigh(symmetric).eigenvectors[:, 0]
    eye = torch.eye(4, dtype=torch.float64)
    assert found.item() == pytest.approx((matrix - eye + 2 * torch.outer(best, best)).norm().item())
    directions = torch.nn.functional.normalize(random(5000, 4, seed=1), dim=-1)
    others = (matrix - eye + 2 * directions[:, :, None] * directions[:, None]).norm(dim=(1, 2))
    assert (others >= found - 1e-9).all() and others.min() < 1.2 * found


def test_orthogonal_distance_is_to_the_polar_factor():
    matrix = random(4, 4)
    u, _, v = torch.linalg.svd(matrix)
    found = tr.orthogonal_distance(tr.singular_values(matrix))
    assert found.item() == pytest.approx((matrix - u @ v).norm().item())


def test_window_product_is_the_product():
    k, decay, erase = random(3, 2, 4), random(3, 2, 4, seed=1), random(3, 2, 1, seed=2)
    matrices = [tr.transition_matrix(k[t], decay[t], erase[t]) for t in range(3)]
    torch.testing.assert_close(tr.window_product(k, decay, erase), matrices[2] @ matrices[1] @ matrices[0])
    torch.testing.assert_close(matrices[0][0], _loop(k[0, 0], decay[0, 0], erase[0, 0]))


def _loop(k, decay, erase):
    eye = torch.eye(len(k), dtype=torch.float64)
    return (eye - torch.outer(k, erase * k)) @ torch.diag(decay)


def test_complex_eigenvalues():
    angle = torch.tensor(0.3, dtype=torch.float64)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    found = tr.eigenvalues(turn)
    torch.testing.assert_close(found.imag.abs(), angle.sin().expand(2))
    assert tr.eigenvalues(turn * torch.inf).isnan().all()


def test_effective_rank_of_given_spectra():
    found = effective_rank(torch.tensor([[1.0, 1.0, 0.0], [3.0, 1.0, 0.0], [0.0, 0.0, 0.0]]).double())
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    torch.testing.assert_close(found, torch.tensor([2.0, np.exp(entropy), 0.0]).double())


def test_growth_of_powers():
    t = torch.tensor([10, 20, 40, 100])
    for power in (0.0, 0.5, 1.0):
        assert growth_exponent(t, 3 * t.double() ** power).item() == pytest.approx(power)


def test_distribution_of_more_values_than_are_kept(monkeypatch):
    monkeypatch.setattr(gates, "SAMPLE", 2000)
    values = np.random.default_rng(0).standard_normal(50_000) + 1e6
    found = gates.Distribution()
    for piece in np.array_split(values, 37):
        found.add(piece)
    statistics = found.statistics()
    assert statistics["mean"] == pytest.approx(values.mean(), rel=1e-12)
    assert statistics["std"] == pytest.approx(values.std(), rel=1e-6)
    assert (statistics["min"], statistics["max"]) == (values.min(), values.max())
    for name in ("q05", "q50", "q95"):  # 2000 of 50,000: a rank is off by 0.011 (one sigma at the median)
        rank = (values <= statistics[name]).mean()
        assert abs(rank - int(name[1:]) / 100) < 0.05
    assert found._values.size <= 4000


def test_distribution_of_infinities_and_nothing():
    assert gates.Distribution().statistics() == {}
    found = gates.Distribution()
    found.add(np.array([-np.inf, 1.0, np.nan, 2.0]))
    statistics = found.statistics()
    assert found.count == 3 and statistics["min"] == -np.inf and statistics["q50"] == 1.0


def test_correlation_in_pieces():
    x, noise = np.random.default_rng(0).standard_normal((2, 1000))
    y = noise + 0.5 * x
    x = x + 1e5
    found = gates.Correlation()
    for a, b in zip(np.array_split(x, 11), np.array_split(y, 11), strict=True):
        found.add(a, b)
    assert found.value() == pytest.approx(np.corrcoef(x, y)[0, 1], rel=1e-9)


def test_a_model_of_nan_is_measured_as_null():
    task = synthetic_tasks.get("rebind")
    config = ModelConfig(arch="gdn2-neg", vocab_size=task.vocab_size, n_classes=task.n_classes, d_model=8)
    model = build_model(config, seed=0)
    with torch.no_grad():
        model.embedding.weight.fill_(torch.nan)
    frame = measure(model, task.sample(2, 32), task=task, train_length=20)
    assert not frame["value"].is_nan().any()
    assert frame.filter(pl.col("quantity") == "spectral_radius")["value"].is_null().all()


def test_symbols_are_the_names_of_tokens():
    for name in ("rebind", "mqar_stacked"):
        params = {"vocab_size": 64} if name == "mqar_stacked" else {}
        task = synthetic_tasks.get(name, **params)
        config = ModelConfig(
            arch="gdn",
            vocab_size=task.vocab_size,
            n_classes=task.n_classes,
            d_model=8,
            tokens_per_position=task.tokens_per_position,
        )
        batch = task.sample(2, 32)
        frame = measure(build_model(config, seed=0), batch, task=task, quantities=["erase"], points=None)
        for sequence, token, symbol in frame.select("sequence", "token", "symbol").drop_nulls().rows()[::17]:
            tokens = batch.tokens[sequence, token].reshape(-1).tolist()
            assert symbol == "/".join(task.token_name(t) for t in tokens)
