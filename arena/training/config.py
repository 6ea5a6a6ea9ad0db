"""What a fleet is trained on and for how long, who is in it, and what comes out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

METRICS = ("loss", "accuracy", "chance_scaled_accuracy", "sequence_accuracy")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What all replicas of a fleet share: data, number of steps, evaluation.

    Raises:
        ValueError: a field is out of its range; the message names it.
    """

    steps: int
    """Optimiser steps of a replica that neither diverges nor stops early."""
    batch_size: int
    """Sequences a step for each replica. With a multiple of 16 (``eval_examples`` too) a run in one CPU
    thread is the same bit for bit in a fleet of any size; else the last few elements of a replica may round
    otherwise, depending on who stands beside it."""
    train_lengths: tuple[int, int]
    """Shortest and longest training length, inclusive; lengths that the task refuses are left out."""
    train_length_choices: tuple[int, ...] = ()
    """When not empty: train on these lengths only (each within ``train_lengths``), equally often."""
    eval_lengths: tuple[int, ...] = ()
    """Lengths reported from split test, once, after the last step; the task must accept each of them."""
    valid_lengths: tuple[int, ...] = ()
    """Lengths measured on split valid; empty: the longest training length and twice that (never a
    length of ``eval_lengths``), each moved to the nearest length that the task accepts."""
    eval_every: int = 0
    """Steps between two points of the learning curve; 0: only after the last step."""
    eval_examples: int = 512
    """Sequences for each split and length of an evaluation."""
    final_lr_fraction: float = 0.01
    """The cosine ends at this fraction of the replica's learning rate."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    eps: float = 1e-8
    """AdamW's epsilon, outside the square root as in Loshchilov & Hutter (1711.05101)."""
    stop_at: float | None = None
    """None: no early stop (the rule in comparisons). Else a replica whose token accuracy reaches this on
    every valid length at a point of the learning curve is frozen at that step."""
    data_seed: int = 0
    """Seed of the lengths of the steps and of the evaluation sets; one for a whole experiment."""

    def __post_init__(self) -> None:
        for name in ("train_lengths", "train_length_choices", "eval_lengths", "valid_lengths"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("steps", "batch_size", "eval_examples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.eval_every < 0:
            raise ValueError(f"eval_every must be 0 (never) or more, not {self.eval_every}")
        if len(self.train_lengths) != 2 or not 1 <= self.train_lengths[0] <= self.train_lengths[1]:
            raise ValueError(
                f"train_lengths must be (shortest, longest) with 1 <= shortest, not {self.train_lengths}"
            )
        shortest, longest = self.train_lengths
        for length in self.train_length_choices:
            if not shortest <= length <= longest:
                raise ValueError(
                    f"train_length_choices: {length} is not within train_lengths {self.train_lengths}"
                )
        for name in ("eval_lengths", "valid_lengths"):
            if any(length < 1 for length in getattr(self, name)):
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        both = sorted({*self.eval_lengths} & {*self.valid_lengths})
        if both:
            raise ValueError(
                f"eval_lengths and valid_lengths share {both}: what is reported must not be chosen on"
            )
        if not 0.0 <= self.final_lr_fraction <= 1.0:
            raise ValueError(f"final_lr_fraction must be within 0..1, not {self.final_lr_fraction}")
        if not 0.0 <= self.beta1 < 1.0:
            raise ValueError(f"beta1 must be within 0..1 (1 excluded), not {self.beta1}")
        if not self.eps > 0.0:
            raise ValueError(f"eps must be positive, not {self.eps}")
        if self.stop_at is not None and not 0.0 < self.stop_at <= 1.0:
            raise ValueError(f"stop_at must be within 0..1 (0 excluded), not {self.stop_at}")
        if self.stop_at is not None and self.eval_every == 0:
            raise ValueError(
                "stop_at needs eval_every: early stop is decided at the points of the learning curve"
            )
        if self.data_seed < 0:
            raise ValueError(f"data_seed must be 0 or more, not {self.data_seed}")


@dataclass(frozen=True, kw_only=True)
class Replica:
    """One member of a fleet: a seed and a point of the hyper-parameter space.

    Raises:
        ValueError: a field is out of its range; the message names it.
    """

    seed: int
    """Seed of the initial weights and of the training data."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay, scaled by the learning rate; norms, biases and embeddings are not decayed."""
    warmup: float = 0.1
    """Fraction of the steps over which the learning rate rises linearly to its peak."""
    beta2: float = 0.99
    """Decay of AdamW's second moment."""
    clip: float = 1.0
    """Largest global norm of the gradient; infinity: no clipping."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, not {self.seed}")
        for name in ("lr", "weight_decay"):
            if not (getattr(self, name) >= 0.0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} must be finite and 0 or more, not {getattr(self, name)}")
        if not 0.0 <= self.warmup <= 1.0:
            raise ValueError(f"warmup must be within 0..1, not {self.warmup}")
        if not 0.0 <= self.beta2 < 1.0:
            raise ValueError(f"beta2 must be within 0..1 (1 excluded), not {self.beta2}")
        if not self.clip > 0.0:
            raise ValueError(f"clip must be positive, not {self.clip}")


@dataclass(frozen=True, kw_only=True)
class ReplicaResult:
    """What one replica came to."""

    replica: Replica
    """Who it was."""
    status: str
    """``done`` (early stop included) or ``diverged``."""
    steps: int
    """Optimiser steps that changed its parameters."""
    curve: list[dict[str, Any]] = field(default_factory=list)
    """Learning curve: rows with step, split, eval_length, metric, value, chance, n_examples. Beside the
    valid rows each point has one row of split train, metric loss, eval_length None: the mean loss of the
    steps since the point before; with experts also their mean ``balance_loss`` (mean over the layers)."""
    final: list[dict[str, Any]] = field(default_factory=list)
    """Final rows: split, eval_length, metric, value, chance, n_examples, state_bytes (of one sequence of
    that length). Where the task's space is exhaustible at a length the split is train: such a length is
    never reported as test. A diverged replica has the worst score: loss infinite, every answer wrong."""
    state_dict: dict[str, Tensor] = field(default_factory=dict)
    """Parameters on the CPU, for ``build_model(config, seed=...).load_state_dict``; always finite."""
    wall_s: float = 0.0
    """Its share of the fleet's seconds: the fleet's wall time over the number of replicas."""
    params: int = 0
    """Number of parameters."""
    active_params: int = 0
    """Those without the experts that a token does not go through."""
    state_bytes: int = 0
    """Bytes that the model carries for one sequence after the longest training length."""
    train_tokens: int = 0
    """Positions trained on, in the steps that changed its parameters."""


class FleetOutOfMemory(RuntimeError):
    """The fleet does not fit into memory; a smaller one may.

    Attributes:
        n_replicas: size of the fleet that did not fit.
        fits: the number of replicas that would fit, where it was measured.
    """

    def __init__(self, n_replicas: int, detail: str, fits: int | None = None) -> None:
        super().__init__(f"a fleet of {n_replicas} replicas does not fit into memory: {detail}")
        self.n_replicas = n_replicas
        self.fits = fits
