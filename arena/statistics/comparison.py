"""Is one architecture better than another, or equal to it: exact tests for few paired seeds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal

import numpy as np

from arena.statistics.intervals import MIN_UNITS, Scores, at_most, finite_scores

EXACT_PAIRS = 20
"""Up to so many pairs that differ, every one of the 2^n sign patterns is counted."""
EXACT_DEALS = 200_000
"""Up to so many ways of dealing runs into two groups, every one is counted (two groups of ten: 184,756)."""


def probability_of_improvement(x_strata: Sequence[Scores], y_strata: Sequence[Scores]) -> float:
    """P(X > Y) of a run of X and a run of Y on one task, ties counted half, averaged over tasks.

    The Mann-Whitney statistic over the number of pairs of runs, as rliable has it (Agarwal et al. 2021,
    arXiv 2108.13264, section 4.3).

    Args:
        x_strata: scores of the runs of each task, higher is better.
        y_strata: the same tasks in the same order.

    Raises:
        ValueError: other tasks, a task without runs, or scores that are not numbers.
    """
    if len(x_strata) != len(y_strata) or not len(x_strata):
        raise ValueError(
            f"{len(x_strata)} tasks against {len(y_strata)}: one group of scores a task, for both"
        )
    found = []
    for x_scores, y_scores in zip(x_strata, y_strata, strict=True):
        x, y = finite_scores(x_scores), finite_scores(y_scores)
        found.append(np.mean((x[:, None] > y) + 0.5 * (x[:, None] == y)))
    return float(np.mean(found))


def sign_flip_test(
    differences: Scores,
    *,
    alternative: Literal["two-sided", "greater"] = "two-sided",
    replicates: int = 100_000,
    seed: int = 0,
) -> float:
    """p-value of the mean of paired differences, by flipping their signs (Fisher's randomisation test).

    Under the null hypothesis each difference is as likely as its negative, so all 2^n sign patterns are
    equally likely, and p is the share of them with a mean at least as extreme as the observed one. No normal
    distribution is assumed, and the smallest p that n pairs can give is 2^(1-n) (one-sided: 2^-n).

    Args:
        differences: score of X less score of Y with the same seed.
        alternative: ``two-sided``, or ``greater``: X is better.
        replicates: patterns drawn where more than :data:`EXACT_PAIRS` pairs differ; p is then
            (hits + 1) / (replicates + 1).
        seed: of those draws.

    Returns:
        The p-value; 1 where no pair differs.

    Raises:
        ValueError: no pairs, or a difference that is not finite.
    """
    values = finite_scores(differences)
    observed, size = values.sum(), np.abs(values).sum()
    values = values[values != 0]  # their sign changes nothing
    if not len(values):
        return 1.0
    exact = len(values) <= EXACT_PAIRS
    if exact:
        sums = np.zeros(1)
        for value in values:
            sums = np.concatenate([sums + value, sums - value])
    else:
        rng = np.random.default_rng(seed)
        sums = np.concatenate(
            [
                (2.0 * rng.integers(2, size=(min(10_000, replicates - start), len(values))) - 1) @ values
                for start in range(0, replicates, 10_000)
            ]
        )
    # Sums that tie in exact arithmetic differ by rounding: they count as ties.
    bound = (abs(observed) if alternative == "two-sided" else observed) - 1e-12 * size
    hits = int(((np.abs(sums) if alternative == "two-sided" else sums) >= bound).sum())
    return hits / len(sums) if exact else (hits + 1) / (len(sums) + 1)


def permutation_test(x: Scores, y: Scores, *, replicates: int = 100_000, seed: int = 0) -> float:
    """Two-sided p-value of the difference of means of two groups without pairs, by dealing the runs anew.

    Under the null hypothesis all ways of dealing the n + m runs into groups of n and m are equally likely,
    and p is the share of them whose difference of means is at least as large as the observed one, so at
    least one in C(n + m, n).

    Args:
        x: scores of the runs of X.
        y: scores of the runs of Y.
        replicates: deals drawn where there are more than :data:`EXACT_DEALS`; p is then
            (hits + 1) / (replicates + 1).
        seed: of those draws.

    Raises:
        ValueError: an empty group, or a score that is not finite.
    """
    first, second = finite_scores(x), finite_scores(y)
    pooled, n = np.concatenate([first, second]), len(first)
    total, count = pooled.sum(), len(pooled)
    deals = math.comb(count, n)
    exact = deals <= EXACT_DEALS
    if exact:
        places = np.fromiter(
            itertools.chain.from_iterable(itertools.combinations(range(count), n)), dtype=np.int64
        )
        sums = pooled[places.reshape(deals, n)].sum(axis=1)
    else:
        rng = np.random.default_rng(seed)
        sums = np.concatenate(
            [
                rng.permuted(np.tile(pooled, (min(5_000, replicates - start), 1)), axis=1)[:, :n].sum(axis=1)
                for start in range(0, replicates, 5_000)
            ]
        )
    # the difference of means, but for a factor, is the distance of a group's sum from its share of the total
    distance = np.abs(sums - total * n / count)
    bound = abs(first.sum() - total * n / count) - 1e-12 * np.abs(pooled).sum()
    hits = int((distance >= bound).sum())
    return hits / deals if exact else (hits + 1) / (len(sums) + 1)


def holm(p_values: Scores) -> np.ndarray:
    """p-values adjusted for a family of comparisons (Holm 1979): claim where the adjusted one is <= alpha.

    Args:
        p_values: of the whole declared family, 1 for a comparison that could not be made: leaving it out
            would make the others look better.

    Raises:
        ValueError: a value outside [0, 1].
    """
    values = np.asarray(p_values, dtype=np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError("p-values lie between 0 and 1")
    order = np.argsort(values, kind="stable")
    steps = np.minimum(1.0, values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty_like(values)
    adjusted[order] = np.maximum.accumulate(steps)
    return adjusted


def seeds_needed(m: int, alpha: float = 0.05) -> int:
    """Fewest paired seeds with which a family of m sign-flip tests can claim anything: 2^(1-n) <= alpha / m.

    Raises:
        ValueError: no comparisons, or alpha outside (0, 1).
    """
    if m < 1 or not 0 < alpha < 1:
        raise ValueError(f"{m} comparisons at level {alpha}: m should be at least 1, alpha between 0 and 1")
    seeds = 1
    while 2.0 ** (1 - seeds) > alpha / m:
        seeds += 1
    return seeds


def claim_seeds(m: int, alpha: float = 0.05, *, equal: bool = False) -> int:
    """Fewest paired seeds with which one of a family of m comparisons can be claimed.

    Those of :func:`seeds_needed`, and :data:`MIN_UNITS` for the interval that a claim of a difference needs.
    A claim of equality (``equal``) needs no interval, and each of its tests is one-sided: 2^-n <= alpha / m.
    """
    seeds = seeds_needed(m, alpha)
    return max(1, seeds - 1) if equal else max(MIN_UNITS, seeds)


def detectable_effect(n: int, m: int, alpha: float = 0.05, power: float = 0.8) -> float | None:
    """Smallest mean of n paired differences, in their standard deviations, that is found with ``power``.

    In a two-sided test at level alpha / m, the first step of Holm's, by the normal approximation with
    Guenther's correction for an unknown deviation, n = (z_a + z_b)^2 / effect^2 + z_a^2 / 2. None where n is
    too small for any effect.
    """
    normal = NormalDist()
    level, missed = normal.inv_cdf(1 - alpha / (2 * m)), normal.inv_cdf(power)
    rest = n - level**2 / 2
    return (level + missed) / rest**0.5 if n >= seeds_needed(m, alpha) and rest > 0 else None


def rate_seeds(rate: float, m: int, least: int, most: int, *, power: float = 0.8) -> int | None:
    """Fewest runs with which it is found that most runs succeed (or that most fail), with ``power``.

    By the exact two-sided binomial test against one half at level 0.05 / m, the first step of Holm's.

    Args:
        rate: of success, in truth.
        m: tests in the family.
        least: the first number of runs that is looked at.
        most: the last one.
        power: how often it has to be found.

    Returns:
        The number; None where it is above ``most``, as it is for a rate of one half.
    """
    rate, critical = max(rate, 1 - rate), 0
    if rate == 0.5:
        return None
    for n in range(least, most + 1):
        # the fewest successes of n that are significant: it never falls as n grows
        while critical <= n and 2 * at_most(n - critical, n, 0.5) > 0.05 / m:
            critical += 1
        if critical <= n and (rate == 1 or at_most(n - critical, n, 1 - rate) >= power):
            return n
    return None


def equivalence_test(x: Scores, y: Scores, margin: float) -> float:
    """p-value of the claim that X and Y differ by less than ``margin``: two one-sided tests (TOST).

    Each side is a :func:`sign_flip_test`, of the differences moved by the margin, and the larger p counts
    (Schuirmann 1987). The usual sides are paired t-tests; with some ten seeds of bimodal scores their normal
    assumption fails where it matters: ten equal pairs have no variance and would give p = 0, where ten coin
    flips can show no more than 2^-10. What is assumed is that differences scatter symmetrically.

    Args:
        x: scores by seed.
        y: scores of the same seeds in the same order.
        margin: the largest difference of means that counts as none, in the unit of the scores, stated before
            the data were seen.

    Raises:
        ValueError: a margin that is not positive and finite, unpaired scores, no scores.
    """
    if not 0 < margin < np.inf:
        raise ValueError(f"the margin is {margin}, and should be positive")
    first, second = finite_scores(x), finite_scores(y)
    if len(first) != len(second):
        raise ValueError(f"{len(first)} scores against {len(second)}: the test needs pairs")
    difference = first - second
    return max(
        sign_flip_test(margin + difference, alternative="greater"),
        sign_flip_test(margin - difference, alternative="greater"),
    )
