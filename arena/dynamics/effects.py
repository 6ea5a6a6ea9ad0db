"""What interventions do to the answers: effects with intervals, and the heads that an effect is claimed for.

Heads are chosen on one set of sequences (split valid) and the effect is measured on another (split test), so
that no head is chosen for the effect that is then reported. An effect is the accuracy with the intervention
less that without, on the same sequences; a sequence is one unit, for the answers within it are not
independent.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from arena.dynamics.hooks import blocks_of, gates_of, hooked
from arena.dynamics.intervene import Edit, check, edited, prepare
from arena.statistics import MIN_UNITS, clopper_pearson

IGNORED = -100
NEAR_MINUS_ONE = -0.9
"""A head counts as one that flips where its least eigenvalue is below this, on average over the tokens that
change the answer: a memory multiplied 16 times by 0.9 keeps 0.19 of itself."""
MOST_CONTROLS = 12
"""So many sets of control heads at most; where there are more, a fixed draw of them."""
REPLICATES = 4_000
_PIECE = 16_384  # tokens a forward pass


@dataclass(frozen=True, kw_only=True)
class Intervention:
    """Edits that are made together, and the part they play in an argument."""

    edits: tuple[Edit, ...]
    role: str = "chosen"
    """``chosen`` (asked for), ``all`` heads, one ``head``, ``identified`` heads, ``control`` heads."""


EFFECT_COLUMNS: dict[str, tuple[Any, str]] = {
    "gate": (pl.String, "gate that is changed"),
    "change": (pl.String, "what is done to it"),
    "role": (
        pl.String,
        "all heads; one head; the identified heads (least eigenvalue near -1 where the answer moves); control: as "
        "many other heads, the mean over all such sets; contrast: identified less control; chosen: by the user",
    ),
    "heads": (pl.String, "layer.head of the changed heads, or how many sets of control heads"),
    "n_heads": (pl.Int64, "number of changed heads"),
    "tokens": (pl.String, "class of the changed tokens; all: every token"),
    "accuracy": (pl.Float64, "accuracy with the intervention, mean over sequences"),
    "accuracy_low": (pl.Float64, "95 % interval of it over sequences"),
    "accuracy_high": (pl.Float64, "95 % interval of it over sequences"),
    "baseline": (pl.Float64, "accuracy of the same model on the same sequences without intervention"),
    "chance": (pl.Float64, "accuracy of an uninformed guess"),
    "effect": (pl.Float64, "accuracy less baseline, paired over sequences"),
    "low": (pl.Float64, "95 % interval of the effect over sequences; null below 10 sequences"),
    "high": (pl.Float64, "95 % interval of the effect over sequences; null below 10 sequences"),
    "worst": (pl.Float64, "of control heads: the effect of the set with the largest drop"),
    "n_sequences": (pl.Int64, "sequences, the units of the intervals"),
}
"""Columns of the table of effects: type and meaning."""


@torch.no_grad()
def sequence_accuracy(
    model: nn.Module,
    tokens: Tensor,
    targets: Tensor,
    edits: Sequence[Edit] = (),
    classes: Mapping[str, Tensor] | None = None,
) -> np.ndarray:
    """Share of each sequence's scored answers that are right: float64 [B], NaN where nothing is scored.

    Args:
        model: tokens -> (logits, state).
        tokens: [B,T] (or [B,T,C]).
        targets: [B,T], -100 is not scored.
        edits: prepared.
        classes: class of tokens -> bool [B,T].
    """
    found = []
    piece = max(1, _PIECE // tokens.shape[1])
    for start in range(0, len(tokens), piece):
        part = slice(start, start + piece)
        here = {name: mask[part] for name, mask in (classes or {}).items()}
        with edited(model, edits, here):
            logits = model(tokens[part])[0]
        scored = targets[part] != IGNORED
        right = scored & (logits.argmax(-1) == targets[part]) & logits.isfinite().all(-1)
        found.append(right.sum(-1).double() / scored.sum(-1))
    return torch.cat(found).numpy()


def mean_interval(values: np.ndarray, *, level: float = 0.95, seed: int = 0) -> tuple[float, float] | None:
    """Interval of the mean of values in [-1, 1] over independent units; None below 10 units.

    The percentile bootstrap over units. Where all units agree it has no width, which would claim too much:
    then the mean of others can differ from the common value c by no more than the Clopper-Pearson bound on
    the share of units that differ, times the largest difference there can be.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) < MIN_UNITS:
        return None
    if np.ptp(values) == 0:
        share = clopper_pearson(0, len(values), level)[1]
        common = float(values[0])
        return max(-1.0, common - share * (1 + common)), min(1.0, common + share * (1 - common))
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), size=REPLICATES)
    means = counts @ values / len(values)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def least_eigenvalue(k: Tensor, decay: Tensor, erase: Tensor) -> Tensor:
    """Least real part of the eigenvalues of (I - k e^T) D, e = erase * k, D = diag(decay).

    Args:
        k: [...,K].
        decay: [...,K] or [...,1], signed.
        erase: [...,K] or [...,1].

    Returns:
        [...]. With a decay a that is one a head the eigenvalues are a (K - 1 times) and a (1 - e . k); others
        are computed.
    """
    K = k.shape[-1]
    if decay.shape[-1] == 1:
        edit = decay[..., 0] * (1 - (erase * k * k).sum(-1))
        return torch.minimum(edit, decay[..., 0]) if K > 1 else edit
    transition = torch.eye(K, dtype=k.dtype) - k[..., :, None] * (erase * k)[..., None, :]
    return torch.linalg.eigvals(transition * decay[..., None, :]).real.amin(-1)
