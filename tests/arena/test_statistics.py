"""Statistics held to rliable, scipy and statsmodels on the same scores, to closed forms, and to loops."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import scipy.stats
from rliable import metrics
from statsmodels.stats import multitest, weightstats
from statsmodels.stats.power import TTestPower

from arena.statistics import (
    bootstrap_interval,
    clopper_pearson,
    detectable_effect,
    difference_interval,
    equivalence_test,
    expected_best,
    expected_best_band,
    holm,
    interquartile_mean,
    paired_difference,
    paired_difference_interval,
    permutation_test,
    probability_of_improvement,
    seeds_needed,
    sign_flip_test,
)


def binomial(k: int, n: int, p: float) -> float:
    return math.comb(n, k) * p**k * (1 - p) ** (n - k)


def test_clopper_pearson_is_exact():
    # the ends for all successes or none have a closed form; 5 of 10 is in every table
    for n in (1, 3, 10, 200):
        assert clopper_pearson(n, n) == pytest.approx((0.025 ** (1 / n), 1.0), abs=1e-12)
        assert clopper_pearson(0, n) == pytest.approx((0.0, 1 - 0.025 ** (1 / n)), abs=1e-12)
    assert clopper_pearson(5, 10) == pytest.approx((0.1870860284, 0.8129139716), abs=1e-9)
    rng = random.Random(1)
    for _ in range(50):
        n = rng.randint(2, 60)
        k, level = rng.randint(1, n - 1), rng.choice([0.8, 0.95, 0.99])
        low, high = clopper_pearson(k, n, level)
        assert sum(binomial(i, n, low) for i in range(k, n + 1)) == pytest.approx((1 - level) / 2, rel=1e-8)
        assert sum(binomial(i, n, high) for i in range(k + 1)) == pytest.approx((1 - level) / 2, rel=1e-8)
    for wrong in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="successes"):
            clopper_pearson(*wrong)


def trimmed(values):
    ordered = sorted(values)
    cut = int(0.25 * len(ordered))
    kept = ordered[cut : len(ordered) - cut]
    return sum(kept) / len(kept)


def test_interquartile_mean_is_the_trimmed_mean():
    rng = random.Random(2)
    for n in range(1, 30):
        values = [rng.random() for _ in range(n)]
        assert interquartile_mean(values) == pytest.approx(trimmed(values), abs=1e-15)
    block = np.random.default_rng(0).random((4, 9))
    assert interquartile_mean(block, axis=1) == pytest.approx([trimmed(row) for row in block])


def test_bootstrap_matches_plain_loops():
    rng = random.Random(3)
    strata = [[rng.random() for _ in range(n)] for n in (5, 7, 9)]
    means = sorted(
        trimmed([rng.choice(group) for group in strata for _ in range(len(group))]) for _ in range(20_000)
    )
    low, high = bootstrap_interval(strata)
    assert low == pytest.approx(means[499], abs=0.01) and high == pytest.approx(means[19_499], abs=0.01)
    assert bootstrap_interval(strata) == (low, high), "the draws are fixed"


def test_no_interval_that_would_mislead():
    assert bootstrap_interval([[0.1, 0.9, 0.5]] * 3) is None  # 9 units
    assert bootstrap_interval([[0.1, 0.9, 0.5]] * 4) is not None
    assert bootstrap_interval([[1.0] * 20]) is None  # no width
    assert bootstrap_interval([[]]) is None


def accuracies(rng, *shape):
    """Scores as they are here: counts over 256, many ties, some solved, some at chance."""
    solved = rng.random(shape) < 0.4
    return np.round(np.where(solved, 1.0, 0.5) * 256 - solved * rng.integers(0, 3, shape)) / 256


@pytest.mark.parametrize("seed", range(5))
def test_point_estimates_equal_rliable_and_scipy(seed):
    rng = np.random.default_rng(seed)
    for make in (accuracies, lambda rng, *shape: rng.normal(size=shape)):
        x, y = make(rng, 11, 3), make(rng, 11, 3)  # runs x tasks
        assert interquartile_mean(x) == pytest.approx(metrics.aggregate_iqm(x), abs=1e-12)
        assert interquartile_mean(x) == pytest.approx(scipy.stats.trim_mean(x, 0.25, axis=None), abs=1e-12)
        assert paired_difference(x.T, y.T) == pytest.approx(
            metrics.aggregate_iqm(x) - metrics.aggregate_iqm(y), abs=1e-12
        )
        theirs = metrics.probability_of_improvement(x, y)
        assert probability_of_improvement(x.T, y.T) == pytest.approx(theirs, abs=1e-12)
        assert probability_of_improvement(y.T, x.T) == pytest.approx(1 - theirs, abs=1e-12)
        k = int((x[:, 0] > 0.6).sum())
        exact = scipy.stats.binomtest(k, 11).proportion_ci(0.95, method="exact")
        assert clopper_pearson(k, 11) == pytest.approx((exact.low, exact.high), abs=1e-9)


def test_probability_of_improvement_of_known_scores():
    assert probability_of_improvement([[1, 2, 3]], [[0, 0]]) == 1.0
    assert probability_of_improvement([[1, 1]], [[1, 1, 1]]) == 0.5
    assert probability_of_improvement([[1.0], [0.0]], [[0.0], [1.0]]) == 0.5  # tasks count alike
    assert probability_of_improvement([[0, 1, 1, 1]], [[0]]) == (3 + 0.5) / 4
    for wrong in (([], []), ([[1]], [[1], [2]]), ([[]], [[1]]), ([[math.nan]], [[1]])):
        with pytest.raises(ValueError):
            probability_of_improvement(*wrong)


def test_paired_interval_equals_rliable_on_the_same_draws():
    rng = np.random.default_rng(7)
    x, y = accuracies(rng, 3, 10), accuracies(rng, 3, 10)  # tasks x seeds
    draws = np.random.default_rng(5)
    rows = [draws.integers(10, size=(400, 10)) for _ in range(3)]
    means = []
    for replicate in range(400):
        a, b = (np.stack([scores[task, rows[task][replicate]] for task in range(3)], 1) for scores in (x, y))
        means.append(metrics.aggregate_iqm(a) - metrics.aggregate_iqm(b))
    theirs = np.quantile(means, [0.025, 0.975])
    ours = paired_difference_interval(x, y, replicates=400, seed=5)
    assert ours == pytest.approx(tuple(theirs), abs=1e-9)


def test_pairing_narrows_the_interval_where_seeds_are_alike():
    rng = np.random.default_rng(0)
    luck = rng.normal(size=12)
    x, y = [luck + 0.5 + 0.01 * rng.normal(size=12)], [luck]
    low, high = paired_difference_interval(x, y)
    assert 0.4 < low < 0.5 < high < 0.6, "the common luck of a seed cancels"
    assert paired_difference_interval([x[0][:9]], [y[0][:9]]) is None, "under ten units"
    assert paired_difference_interval([[1.0] * 10], [[0.5] * 10]) is None, "no width"
    for wrong in (([[1.0, 2.0]], [[1.0]]), ([], []), ([[]], [[]]), ([[math.inf]], [[1.0]])):
        with pytest.raises(ValueError):
            paired_difference(*wrong)


@pytest.mark.parametrize("n", [1, 2, 5, 10, 13])
def test_sign_flips_equal_scipy_and_plain_enumeration(n):
    rng = np.random.default_rng(n)
    for differences in (rng.normal(0.3, 1, n), accuracies(rng, n) - accuracies(rng, n)):
        observed = abs(sum(differences))
        patterns = list(itertools.product([-1, 1], repeat=n))
        extreme = sum(
            abs(sum(s * d for s, d in zip(p, differences, strict=True))) >= observed - 1e-9 for p in patterns
        )
        ours = sign_flip_test(differences)
        assert ours == extreme / len(patterns)
        if n == 1:
            continue  # scipy refuses a single pair
        for alternative in ("two-sided", "greater"):
            theirs = scipy.stats.permutation_test(
                (differences,),
                lambda d, axis: np.mean(d, axis=axis),
                permutation_type="samples",
                n_resamples=np.inf,
                alternative=alternative,
                vectorized=True,
            ).pvalue
            assert sign_flip_test(differences, alternative=alternative) == pytest.approx(theirs, abs=1e-9)


def test_sign_flips_of_known_differences():
    for n in range(1, 15):
        assert sign_flip_test([0.1] * n) == 2.0 ** (1 - n), "the smallest p there is"
        assert sign_flip_test([0.1] * n, alternative="greater") == 2.0**-n
    assert sign_flip_test([0.0] * 10) == 1.0
    assert sign_flip_test([0.1 + 0.2, -0.3]) == 1.0, "ties up to rounding are ties"
    assert sign_flip_test([0.1] * 6 + [0.0] * 30) == 2.0**-5, "equal pairs say nothing"
    with pytest.raises(ValueError):
        sign_flip_test([])
    with pytest.raises(ValueError):
        sign_flip_test([0.1, math.nan])


def test_sampled_sign_flips_agree_with_a_normal_law():
    rng = np.random.default_rng(1)
    differences = rng.normal(0.35, 1, 40)
    p = sign_flip_test(differences)
    scale = math.sqrt((differences**2).sum())
    assert p == pytest.approx(2 * scipy.stats.norm.sf(abs(differences.sum()) / scale), abs=0.01)
    assert p == sign_flip_test(differences), "the draws are fixed"
    assert sign_flip_test([1.0] * 40) == pytest.approx(1 / 100_001), "never 0"


def test_sign_flips_keep_their_level():
    rng = np.random.default_rng(2)
    p = np.array([sign_flip_test(accuracies(rng, 10) - accuracies(rng, 10)) for _ in range(2000)])
    assert (p <= 0.05).mean() <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)


def test_holm_equals_statsmodels():
    rng = np.random.default_rng(3)
    for size in (1, 2, 7, 20):
        p = np.round(rng.random(size) ** 3, 2)  # with ties
        theirs = multitest.multipletests(p, method="holm")[1]
        assert holm(p) == pytest.approx(theirs, abs=1e-12)
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert list(holm([])) == []
    assert holm([0.02, 1.0, 1.0])[0] == pytest.approx(0.06), "comparisons that are missing count"
    for wrong in ([1.2], [-0.1], [math.nan]):
        with pytest.raises(ValueError):
            holm(wrong)


def test_seeds_needed_is_where_the_smallest_p_survives_holm():
    assert [seeds_needed(m) for m in (1, 2, 3, 6, 12, 100)] == [6, 7, 7, 8, 9, 12]
    for m in range(1, 60):
        n = seeds_needed(m)
        family = [1.0] * (m - 1)
        assert holm([sign_flip_test([1.0] * n), *family])[0] <= 0.05
        assert holm([sign_flip_test([1.0] * (n - 1)), *family])[0] > 0.05
    for wrong in ((0, 0.05), (3, 0.0), (3, 1.0)):
        with pytest.raises(ValueError):
            seeds_needed(*wrong)


def test_the_detectable_effect_is_that_of_a_t_test():
    for n, m in ((10, 1), (10, 4), (20, 6), (30, 1)):
        theirs = TTestPower().solve_power(nobs=n, alpha=0.05 / m, power=0.8, alternative="two-sided")
        assert detectable_effect(n, m) == pytest.approx(theirs, rel=0.02)
    assert detectable_effect(7, 4) is None, "no effect is found with fewer seeds than the family needs"


def test_equivalence_is_two_one_sided_exact_tests():
    rng = np.random.default_rng(4)
    x, y = rng.normal(0, 0.01, 12), rng.normal(0.002, 0.01, 12)

    def one_sided(values):
        return scipy.stats.permutation_test(
            (values,),
            lambda d, axis: np.mean(d, axis=axis),
            permutation_type="samples",
            n_resamples=np.inf,
            alternative="greater",
            vectorized=True,
        ).pvalue

    for margin in (0.002, 0.01, 0.03):
        theirs = max(one_sided(margin + x - y), one_sided(margin - (x - y)))
        assert equivalence_test(x, y, margin) == pytest.approx(theirs, abs=1e-9)
        assert equivalence_test(x, y, margin) == pytest.approx(equivalence_test(y, x, margin))


@pytest.mark.parametrize("margin", [0.2, 0.3, 0.5])
def test_equivalence_agrees_with_paired_t_tests_where_those_hold(margin):
    rng = np.random.default_rng(5)
    x = rng.normal(size=60)
    y = x + rng.normal(0, 1, 60)
    assert equivalence_test(x, y, margin) == pytest.approx(
        weightstats.ttost_paired(x, y, -margin, margin)[0], abs=0.012
    )


def test_equivalence_where_t_tests_fail():
    ones = [1.0] * 10
    assert equivalence_test(ones, ones, 0.05) == 2.0**-10, "no variance is no proof"
    lost = [1.0] * 9 + [0.2]
    assert equivalence_test(ones, lost, 0.05) > 0.5, "one seed in ten that fails is a difference"
    assert equivalence_test([0.9], [0.9], 0.05) == 0.5
    for wrong in ((ones, ones, 0.0), (ones, ones, math.inf), (ones, ones, math.nan), (ones, lost[:3], 0.1)):
        with pytest.raises(ValueError):
            equivalence_test(*wrong)


def test_equivalence_keeps_its_level_at_the_margin():
    rng = np.random.default_rng(6)
    p = [equivalence_test(rng.normal(0.1, 0.05, 10), np.zeros(10), 0.1) for _ in range(1000)]
    assert np.mean(np.array(p) <= 0.05) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1000)


def test_expected_best_of_n_by_enumeration():
    rng = np.random.default_rng(8)
    for scores in (rng.random(6), accuracies(rng, 6)):
        for n in range(1, 5):
            drawn = [max(pick) for pick in itertools.product(scores, repeat=n)]
            assert expected_best(scores, n, unbiased=False) == pytest.approx(np.mean(drawn), abs=1e-12)
            subsets = [max(pick) for pick in itertools.combinations(scores, n)]
            assert expected_best(scores, n, unbiased=True) == pytest.approx(np.mean(subsets), abs=1e-12)
    assert expected_best([0.3], [1], unbiased=True) == [0.3]
    assert expected_best([0.2, 0.9, 0.4], 3, unbiased=True) == 0.9
    assert expected_best([0.2] * 5, [1, 3, 5], unbiased=False) == pytest.approx([0.2] * 3)
    curve = expected_best(rng.random(500), range(1, 501), unbiased=True)
    assert curve.shape == (500,) and np.isfinite(curve).all() and (np.diff(curve) > 0).all()
    for wrong in (([], 1), ([0.1], 0), ([0.1], 2), ([math.nan], 1), ([0.1, math.inf], 1), ([0.1, 0.2], 1.5)):
        with pytest.raises(ValueError):
            expected_best(*wrong, unbiased=True)


def test_the_unbiased_estimator_is_that():
    rng = np.random.default_rng(9)
    samples = rng.random((4000, 8))  # the best of n uniform numbers is n / (n + 1)
    for n in (1, 2, 4):
        tang = np.mean([expected_best(s, n, unbiased=True) for s in samples])
        assert tang == pytest.approx(n / (n + 1), abs=0.006)
    dodge = np.mean([expected_best(s, 4, unbiased=False) for s in samples])
    assert dodge < 0.8 - 0.02, "with replacement: biased low"


@pytest.mark.parametrize("unbiased", [False, True])
def test_bands_of_expected_best(unbiased):
    rng = np.random.default_rng(10)
    scores = rng.random(16)
    low, high = expected_best_band(scores, [1, 4, 8], unbiased=unbiased)
    middle = expected_best(scores, [1, 4, 8], unbiased=unbiased)
    assert (low < middle).all() and (middle <= high).all()
    means = [np.mean(rng.choice(scores, 16)) for _ in range(5000)]  # n = 1: the bootstrap of a mean
    assert (low[0], high[0]) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.01)
    for flat in ([0.5] * 16, [0.5]):
        assert np.isnan(expected_best_band(flat, 1, unbiased=unbiased)).all(), "no band without width"


@pytest.mark.parametrize("kind", ["normal", "solved or unsolved"])
def test_the_rule_of_a_claim_keeps_its_level(kind):
    rng = np.random.default_rng(11)
    claims, tries = 0, 500
    for number in range(tries):
        x, y = (rng.normal(size=(2, 10)) if kind == "normal" else accuracies(rng, 2, 10)).tolist()
        interval = paired_difference_interval([x], [y], replicates=400, seed=number)
        better = probability_of_improvement([x], [y])
        claims += (
            interval is not None
            and not interval[0] <= 0 <= interval[1]
            and max(better, 1 - better) >= 0.75
            and sign_flip_test(np.subtract(x, y)) <= 0.05
        )
    assert 0 < claims <= tries * (0.05 + 2 * math.sqrt(0.05 * 0.95 / tries))


@pytest.mark.parametrize(("n", "m"), [(2, 3), (4, 4), (3, 7), (6, 7), (12, 15)])
def test_permutation_test_against_scipy(n, m):
    rng = np.random.default_rng([n, m])
    for shift in (0.0, 1.0):
        x, y = rng.normal(size=n) + shift, np.round(rng.normal(size=m), 1)
        ours = permutation_test(x, y)
        theirs = scipy.stats.permutation_test(
            (x, y),
            lambda a, b, axis: np.abs(a.mean(axis=axis) - b.mean(axis=axis)),
            alternative="greater",
            n_resamples=200_000 if n + m <= 20 else 20_000,
            rng=np.random.default_rng(0),
            vectorized=True,
        ).pvalue
        assert ours == pytest.approx(theirs, abs=1e-9 if n + m <= 20 else 0.015)
        assert ours == pytest.approx(permutation_test(y, x), abs=1e-9 if n + m <= 20 else 0.01)


def test_permutation_test_at_its_ends():
    assert permutation_test([1.0, 1.0], [1.0]) == 1.0
    assert permutation_test([0.0] * 10, [1.0] * 10) == pytest.approx(2 / math.comb(20, 10))
    with pytest.raises(ValueError, match="at least one"):
        permutation_test([], [1.0])


def test_interval_of_a_difference_without_pairs():
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(100):
        x, y = rng.normal(0.5, 1, size=20), rng.normal(0, 1, size=20)
        low, high = difference_interval(x, y, replicates=2_000)
        inside += low <= 0.5 <= high
    assert inside >= 86, "nominal 95 %: under 86 of 100 has a chance of 1e-4"
    assert difference_interval([1.0] * 9, [0.0] * 20) is None
    assert difference_interval([1.0] * 10, [0.0] * 10) is None, "no width"
