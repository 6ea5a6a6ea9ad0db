"""What every block must do: the checks behind ``arena check-block`` and the tests of our own blocks.

Each check is a function of a :class:`Subject` that raises where the block fails and returns a note (how far
apart, how many) where it passes. Weights are moved away from their initial values first, so that nothing is
hidden by an initialisation of zero. Arithmetic is float64 unless a check is about another type.

Axes: B sequences, T tokens, M micro-steps (``T * block.micro_steps``), D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from arena.conformance.behaviour import (
    causal,
    deterministic,
    forward_is_steps,
    initial_state_is_no_state,
    initial_weights,
    pure,
    rows_are_independent,
    state_continues,
    state_is_what_it_says,
)
from arena.conformance.gradients import fleet_is_singles, gradient, gradient_in_float32
from arena.conformance.subject import Failed, Subject
from arena.conformance.tracing import trace_adds_up, trace_continues, trace_speaks_the_vocabulary

__all__ = ["CHECKS", "Failed", "Finding", "Subject", "examine"]

CHECKS: dict[str, Callable[[Subject], str]] = {
    "forward = steps": forward_is_steps,
    "state continues": state_continues,
    "initial state": initial_state_is_no_state,
    "causality": causal,
    "independent rows": rows_are_independent,
    "vmap: fleet = singles": fleet_is_singles,
    "gradient": gradient,
    "gradient in float32": gradient_in_float32,
    "determinism": deterministic,
    "initial weights": initial_weights,
    "purity": pure,
    "state": state_is_what_it_says,
    "trace vocabulary": trace_speaks_the_vocabulary,
    "trace continues": trace_continues,
    "trace adds up": trace_adds_up,
}
"""Name -> check."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check has found."""

    check: str
    passed: bool
    note: str
    """Where it passed, what was measured; else what is wrong, on one line."""
    error: Exception | None = None
    """Where it failed."""


def examine(subject: Subject, checks: Mapping[str, Callable[[Subject], str]] = CHECKS) -> list[Finding]:
    """Run every check; whatever a block raises is a check that failed.

    Args:
        subject: the block.
        checks: name -> check.
    """
    found = []
    for name, check in checks.items():
        try:
            found.append(Finding(check=name, passed=True, note=check(subject)))
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            note = text if isinstance(error, Failed) else f"{type(error).__name__}: {text}"
            found.append(Finding(check=name, passed=False, note=note, error=error))
    return found
