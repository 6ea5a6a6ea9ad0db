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
    probability_of_improvement,
    seeds_needed,
    sign_flip_test,
)
from arena.statistics.intervals import (
    MIN_UNITS,
    bootstrap_interval,
    clopper_pearson,
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
    "equivalence_test",
    "expected_best",
    "expected_best_band",
    "holm",
    "interquartile_mean",
    "paired_difference",
    "paired_difference_interval",
    "probability_of_improvement",
    "seeds_needed",
    "sign_flip_test",
]
