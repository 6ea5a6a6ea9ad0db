"""Tables and figures of a result folder."""

from __future__ import annotations

from arena.report.render import make_report

__all__ = ["make_report"]
