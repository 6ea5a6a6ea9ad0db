"""Measure a fleet on example sets that are the same for every replica and architecture.

Legend: R replicas, N examples, T positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arena.mlp import Routing
from arena.training.config import METRICS, TrainConfig
from arena.training.data import IGNORED, to_device

Forward = Callable[[Tensor], tuple[Tensor, Routing | None]]
"""Tokens [N,T] shared by the replicas -> logits [R,N,T,classes], and where experts are, their load and
importance, [R,L,E] over L layers."""
Row = dict[str, Any]

# Positions of a piece, in training batches: without gradients it needs no more memory than a training step.
_TRAINING_BATCHES = 4


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of each position, 0 where it is not scored.

    Args:
        logits: [R,B,T,classes].
        targets: [R,B,T], int64; -100 is not scored.

    Returns:
        [R,B,T].
    """
    nll = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return nll.view(targets.shape)


def row_sums(per_position: Tensor) -> Tensor:
    """Sum [R,B,T] over B and T. Row by row first: the sum of a replica then takes one way for every R."""
    return per_position.sum(-1).sum(-1)


@torch.no_grad()
def evaluate(
    forward: Forward,
    task: Any,
    config: TrainConfig,
    *,
    split: str,
    lengths: Sequence[int],
    device: torch.device,
    n_replicas: int,
    mixtures: Sequence[int] = (),
) -> list[list[Row]]:
    """Measure every replica at every length.

    The examples are samples 0 .. ``eval_examples`` - 1 of seed ``data_seed``, in pieces of about as many
    positions as a few training batches have. At a length whose space of sequences is exhaustible the rows are
    labelled train: all of that space may have been trained on.

    Where there are experts, in the layers ``mixtures``, also ``balance_loss`` (E sum_e f_e P_e over all the
    positions, mean over the layers: 1 is even, E is all in one) and a row for each ``expert_load[layer,
    expert]``, f_e.

    Returns:
        For each replica its rows: split, eval_length, metric, value, chance, n_examples. Metrics: ``loss``
        (nats a scored position), ``accuracy`` (of scored positions), ``chance_scaled_accuracy``
        (accuracy - chance) / (1 - chance), and ``sequence_accuracy`` (all scored positions right). An answer
        with a loss that is not finite is wrong.
    """
    rows: list[list[Row]] = [[] for _ in range(n_replicas)]
    budget = _TRAINING_BATCHES * config.batch_size * config.train_lengths[1]
    for length in lengths:
        label = "train" if task.is_exhaustible(length) else split
        # Columns: loss, correct positions, scored positions, correct sequences. Sums of integers in float64
        # are exact, so that only the loss could depend on the size of the pieces.
        totals = torch.zeros(n_replicas, 4, dtype=torch.float64, device=device)
        routes: list[tuple[Tensor, Tensor]] = []
        # Pieces of a multiple of 16 positions: vectorised loops of torch round what is left over otherwise.
        unit = 16 // math.gcd(16, length)
        piece = max(1, budget // (length * unit)) * unit
        for index in range(0, config.eval_examples, piece):
            size = min(piece, config.eval_examples - index)
            batch = task.sample(
                batch_size=size, length=length, seed=config.data_seed, index=index, split=split
            )
            targets = to_device(batch.targets, device).expand(n_replicas, -1, -1)
            logits, routing = forward(to_device(batch.tokens, device))
            if routing is not None:
                routes.append((routing.load.double() * size, routing.importance.double() * size))
            nll = negative_log_likelihood(logits, targets)
            scored = targets != IGNORED
            right = scored & (logits.argmax(-1) == targets) & nll.isfinite()
            whole = (right | ~scored).all(-1)
            totals += torch.stack(
                [row_sums(nll).double(), row_sums(right), row_sums(scored), whole.sum(-1)], 1
            )
        chance = task.chance(length)
        for replica, (loss_sum, correct, scored_sum, sequences) in enumerate(totals.tolist()):
            scored_sum = max(scored_sum, 1.0)
            measured = (loss_sum / scored_sum, correct / scored_sum, sequences / config.eval_examples)
            rows[replica] += make_rows(label, length, chance, config.eval_examples, *measured)
        if routes:
            over = Routing(*(torch.stack(y).sum(0) / config.eval_examples for y in zip(*routes, strict=True)))
            for replica in range(n_replicas):
                one = Routing(over.load[replica], over.importance[replica])
                rows[replica] += _routing_rows(label, length, config.eval_examples, one, mixtures)
    return rows


def make_rows(
    split: str, length: int, chance: float, n_examples: int, loss: float, accuracy: float, sequences: float
) -> list[Row]:
    """One row for each metric at one length."""
    scaled = (accuracy - chance) / (1.0 - chance)
    return [
        {
            "split": split,
            "eval_length": length,
            "metric": metric,
            "value": value,
            "chance": chance,
            "n_examples": n_examples,
        }
        for metric, value in zip(METRICS, (loss, accuracy, scaled, sequences), strict=True)
    ]


def _routing_rows(
    split: str, length: int, n_examples: int, routing: Routing, mixtures: Sequence[int]
) -> list[Row]:
    values = {"balance_loss": float(routing.imbalance.mean())}
    for layer, loads in zip(mixtures, routing.load.tolist(), strict=True):
        values |= {f"expert_load[{layer},{expert}]": load for expert, load in enumerate(loads)}
    same = {"split": split, "eval_length": length, "chance": None, "n_examples": n_examples}
    return [{**same, "metric": metric, "value": value} for metric, value in values.items()]


def worst_rows(task: Any, config: TrainConfig, *, split: str, lengths: Sequence[int]) -> list[Row]:
    """The rows of a diverged replica: loss infinite, every answer wrong."""
    return [
        row
        for length in lengths
        for row in make_rows(
            "train" if task.is_exhaustible(length) else split,
            length,
            task.chance(length),
            config.eval_examples,
            math.inf,
            0.0,
            0.0,
        )
    ]
