"""Exact solve-rate intervals, interquartile means and their differences with stratified bootstrap."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np

MIN_UNITS = 10
"""Fewest units for a bootstrap interval: at n = 5 its coverage is 89 % instead of 95 %, and worse on bimodal
scores."""
REPLICATES = 20_000

Scores = Sequence[float] | np.ndarray


@functools.lru_cache(maxsize=4096)
def clopper_pearson(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """The exact interval of a success rate (Clopper & Pearson 1934).

    Its ends are the rates p at which P(X >= successes) and P(X <= successes), with X ~ Binomial(trials, p),
    fall to (1 - level) / 2.

    Raises:
        ValueError: not 0 <= successes <= trials, or no trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials")
    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else _solve(lambda p: 1 - at_most(successes - 1, trials, p) - tail)
    high = 1.0 if successes == trials else _solve(lambda p: tail - at_most(successes, trials, p))
    return low, high


def at_most(successes: int, trials: int, rate: float) -> float:
    """P(X <= successes) for X ~ Binomial(trials, rate), 0 < rate < 1."""
    log_odds = math.log(rate) - math.log1p(-rate)
    base = trials * math.log1p(-rate) + math.lgamma(trials + 1)
    terms = (
        math.exp(base - math.lgamma(i + 1) - math.lgamma(trials - i + 1) + i * log_odds)
        for i in range(successes + 1)
    )
    return math.fsum(terms)


def _solve(rising: Callable[[float], float]) -> float:
    """The zero in (0, 1) of a function that rises with its argument, by bisection to the last bit that
    counts.
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if rising(middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def interquartile_mean(scores: Scores, axis: int | None = None) -> np.ndarray:
    """Mean of the middle half: a quarter of the values, rounded down, is cut from each end (as rliable
    does).
    """
    values = np.sort(np.asarray(scores, dtype=np.float64), axis=-1 if axis is None else axis)
    if axis is None:
        values, axis = values.ravel(), 0
        values.sort()
    count = values.shape[axis]
    cut = count // 4
    return values.take(range(cut, count - cut), axis=axis).mean(axis=axis)


def paired_difference(x_strata: Sequence[Scores], y_strata: Sequence[Scores]) -> float:
    """Interquartile mean of X over all units less that of Y.

    Args:
        x_strata: scores of the runs of each task.
        y_strata: the same tasks, and in each the same seeds, in the same order.

    Raises:
        ValueError: no scores, unpaired ones, or one that is not finite.
    """
    x, y = (np.concatenate(groups) for groups in _paired(x_strata, y_strata))
    return float(interquartile_mean(x) - interquartile_mean(y))


def paired_difference_interval(
    x_strata: Sequence[Scores],
    y_strata: Sequence[Scores],
    *,
    level: float = 0.95,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Percentile interval of :func:`paired_difference`: in each task seeds are drawn anew, for both alike.

    It is a little short: of two arms with the same law of scores, a nominal 95 % interval left out 0 in 6 %
    (normal scores) to 10 % (solved or unsolved) of simulations with 10 seeds, in 6 to 7 % with 20. So no
    claim is made from it alone.

    Returns:
        The interval, or None where it would mislead: fewer than :data:`MIN_UNITS` units, or no width.

    Raises:
        ValueError: as :func:`paired_difference`.
    """
    x_groups, y_groups = _paired(x_strata, y_strata)
    if sum(len(group) for group in x_groups) < MIN_UNITS:
        return None
    rng = np.random.default_rng(seed)
    draws = [rng.integers(len(group), size=(replicates, len(group))) for group in x_groups]
    x, y = (
        interquartile_mean(
            np.concatenate([group[draw] for group, draw in zip(groups, draws, strict=True)], axis=1), axis=1
        )
        for groups in (x_groups, y_groups)
    )
    return _interval(x - y, level)


def difference_interval(
    x: Scores, y: Scores, *, level: float = 0.95, replicates: int = REPLICATES, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile interval of the interquartile mean of X less that of Y, whose runs have nothing in common.

    Runs are drawn anew in each group by itself.

    Returns:
        The interval, or None where it would mislead: a group of fewer than :data:`MIN_UNITS`, or no width.

    Raises:
        ValueError: no scores, or one that is not finite.
    """
    groups = [finite_scores(x), finite_scores(y)]
    if min(len(group) for group in groups) < MIN_UNITS:
        return None
    rng = np.random.default_rng(seed)
    means = [
        interquartile_mean(group[rng.integers(len(group), size=(replicates, len(group)))], axis=1)
        for group in groups
    ]
    return _interval(means[0] - means[1], level)


def _paired(
    x_strata: Sequence[Scores], y_strata: Sequence[Scores]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    if [len(group) for group in x_strata] != [len(group) for group in y_strata] or not len(x_strata):
        raise ValueError("X and Y should have the same tasks and, in each, the same seeds")
    return [finite_scores(group) for group in x_strata], [finite_scores(group) for group in y_strata]


def finite_scores(scores: Scores) -> np.ndarray:
    """The scores as float64 [N].

    Raises:
        ValueError: there are none, or one is not finite.
    """
    values = np.asarray(scores, dtype=np.float64).ravel()
    if not len(values) or not np.isfinite(values).all():
        raise ValueError("scores should be finite numbers, at least one (a diverged run: the worst score)")
    return values


def bootstrap_interval(
    strata: Sequence[Scores], *, level: float = 0.95, replicates: int = REPLICATES, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile interval of the interquartile mean over all units; runs are drawn anew inside each stratum.

    Args:
        strata: scores of the runs of each task.
        level: of the interval.
        replicates: number of bootstrap samples.
        seed: of the draws.

    Returns:
        The interval, or None where it would mislead: fewer than :data:`MIN_UNITS` units, or no width.
    """
    groups = [np.asarray(group, dtype=np.float64) for group in strata if len(group)]
    if sum(len(group) for group in groups) < MIN_UNITS:
        return None
    rng = np.random.default_rng(seed)
    drawn = [group[rng.integers(len(group), size=(replicates, len(group)))] for group in groups]
    means = interquartile_mean(np.concatenate(drawn, axis=1), axis=1)
    return _interval(means, level)


def _interval(replicates: np.ndarray, level: float) -> tuple[float, float] | None:
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return (float(low), float(high)) if high > low else None
