"""Tables, figures and pages of result folders."""

from __future__ import annotations

from arena.report.compare import compare
from arena.report.render import make_report

__all__ = ["compare", "make_report"]
