"""Fair tuning: paired points, equal budgets, selection on valid, one report on test."""

from __future__ import annotations

from arena.tuning.tune import TuneReport, tune

__all__ = ["TuneReport", "tune"]
