"""Ablations: grids in gate space around one architecture, each point tuned on its own."""

from __future__ import annotations

from arena.ablation.effects import seeds_for_a_claim
from arena.ablation.render import ablation_sections, is_ablation, make_ablation, record_ablation
from arena.ablation.request import Ablation, ablation_request, plan_ablation

__all__ = [
    "Ablation",
    "ablation_request",
    "ablation_sections",
    "is_ablation",
    "make_ablation",
    "plan_ablation",
    "record_ablation",
    "seeds_for_a_claim",
]
