"""Statistics for few, paired, bimodal runs: intervals that cover, tests that are exact, estimators of luck.

Needs numpy only. Every number here is held to rliable, scipy or statsmodels in
``tests/arena/test_statistics.py``.
"""

from __future__ import annotations

from arena.statistics.best_of_n import expected_best, expected_best_band
from arena.statistics.comparison import (
    claim_seeds,
    detectable_effect,
    equivalence_test,
    holm,
    permutation_test,
    probability_of_improvement,
    rate_seeds,
    seeds_needed,
    sign_flip_test,
)
from arena.statistics.intervals import (
    MIN_UNITS,
    bootstrap_interval,
    clopper_pearson,
    difference_interval,
    interquartile_mean,
    paired_difference,
    paired_difference_interval,
)

__all__ = [
    "MIN_UNITS",
    "bootstrap_interval",
    "claim_seeds",
    "clopper_pearson",
    "detectable_effect",
    "difference_interval",
    "equivalence_test",
    "expected_best",
    "expected_best_band",
    "holm",
    "interquartile_mean",
    "paired_difference",
    "paired_difference_interval",
    "permutation_test",
    "probability_of_improvement",
    "rate_seeds",
    "seeds_needed",
    "sign_flip_test",
]
