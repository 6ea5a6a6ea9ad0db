"""Distributions and correlations of gates over tokens, sequences and channels, in one pass."""

from __future__ import annotations

import numpy as np

SAMPLE = 16_384
"""Values that quantiles are computed from: all of them up to this number, beyond it a uniform sample."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Distribution:
    """Mean, spread, extremes and quantiles of a stream of numbers in bounded memory."""

    def __init__(self) -> None:
        self.count = 0
        self.total = self.square = 0.0  # of the differences from the first value
        self.first = 0.0
        self.low, self.high = np.inf, -np.inf
        self._values, self._ranks, self._limit = np.empty(0), np.empty(0), 1.0
        self._draw = np.random.default_rng(0)  # of its own: no global random state

    def add(self, values: np.ndarray) -> None:
        """Take in more values, of any shape; NaN is left out."""
        values = values.ravel()
        values = values[~np.isnan(values)]
        if not values.size:
            return
        if not self.count:
            self.first = float(values[0]) if np.isfinite(values[0]) else 0.0
        self.count += values.size
        with np.errstate(invalid="ignore", over="ignore"):
            self.total += float((values - self.first).sum())
            self.square += float(((values - self.first) ** 2).sum())
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        # Every value gets a random rank; those of the lowest ranks are a uniform sample.
        ranks = self._draw.random(values.size)
        enters = ranks < self._limit
        self._values = np.concatenate([self._values, values[enters]])
        self._ranks = np.concatenate([self._ranks, ranks[enters]])
        if self._values.size > 2 * SAMPLE:
            self._thin()

    def _thin(self) -> None:
        """Keep the sample of the lowest ranks."""
        if self._values.size > SAMPLE:
            kept = np.argpartition(self._ranks, SAMPLE - 1)[:SAMPLE]
            self._values, self._ranks = self._values[kept], self._ranks[kept]
            self._limit = float(self._ranks.max())

    def statistics(self) -> dict[str, float]:
        """Name -> value: mean, std (of the population), min, max and q05 ... q95; empty without a value."""
        if not self.count:
            return {}
        self._thin()
        mean = self.total / self.count
        variance = max(self.square / self.count - mean * mean, 0.0)
        found = {"mean": self.first + mean, "std": variance**0.5, "min": self.low, "max": self.high}
        with np.errstate(invalid="ignore"):
            points = np.quantile(self._values, QUANTILES)
        return {
            **found,
            **{f"q{round(100 * q):02d}": float(p) for q, p in zip(QUANTILES, points, strict=True)},
        }


class Correlation:
    """Pearson's correlation of a stream of pairs."""

    def __init__(self) -> None:
        self.count = 0
        self._mean = np.zeros(2)
        self._comoment = np.zeros((2, 2))

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """Take in more pairs, two arrays of one shape; pairs that are not finite are left out."""
        pairs = np.stack([x.ravel(), y.ravel()])
        pairs = pairs[:, np.isfinite(pairs).all(0)]
        count = pairs.shape[1]
        if not count:
            return
        mean = pairs.mean(1)
        off = pairs - mean[:, None]
        shift = mean - self._mean
        both = self.count + count
        # Chan, Golub and LeVeque (1979): moments of a union from those of its parts.
        self._comoment += off @ off.T + np.outer(shift, shift) * self.count * count / both
        self._mean += shift * count / both
        self.count = both

    def value(self) -> float:
        """The correlation; NaN where one of the two does not vary beyond rounding."""
        spread = np.diag(self._comoment) / max(self.count, 1)
        if self.count < 2 or (spread <= 1e-14 * np.maximum(self._mean**2, 1e-14)).any():
            return float("nan")
        return float(self._comoment[0, 1] / np.sqrt(self._comoment[0, 0] * self._comoment[1, 1]))
