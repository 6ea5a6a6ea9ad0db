"""The tasks without our trainer: tensors, a torch dataset, a Parquet file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from synthetic_tasks.base import SPLITS, Batch, Task, get
from synthetic_tasks.rng import hash_key


def tensors(
    name: str, samples: int, length: int, *, seed: int = 0, split: str = "train", **params: Any
) -> Batch:
    """Tokens and targets of the first `samples` samples of the task `get(name, **params)`.

    Raises:
        ValueError: as `get` and `Task.sample`.
    """
    return get(name, **params).sample(samples, length=length, seed=seed, split=split)


class TaskDataset(IterableDataset):
    """Endless batches (tokens, targets), each sample new; use it with `DataLoader(dataset, batch_size=None)`.

    Batch number b holds the samples b * batch_size .. (b + 1) * batch_size - 1 at one length, which depends
    on (seed, b) alone. Worker w of W yields the batches w, w + W, ..., so a loader's order does not depend
    on W.

    Args:
        task: the task.
        length: one length, or the lengths to choose from, uniformly.
        batch_size: samples a batch.
        seed: seed of the samples and of the choice of lengths.
        split: "train", "valid" or "test".
        batches: how many batches to yield in all; None never stops.

    Raises:
        ValueError: an illegal length, an unknown split.
    """

    def __init__(
        self,
        task: Task,
        length: int | Sequence[int],
        *,
        batch_size: int = 32,
        seed: int = 0,
        split: str = "train",
        batches: int | None = None,
    ):
        self.task, self.batch_size, self.seed, self.split, self.batches = (
            task,
            batch_size,
            seed,
            split,
            batches,
        )
        self.lengths = [length] if isinstance(length, int) else list(length)
        for one in self.lengths:
            task.check_length(one)
        if split not in SPLITS:
            raise ValueError(f"{task.name}: split {split!r} is unknown; use one of {', '.join(SPLITS)}")

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        worker = get_worker_info()
        number, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        while self.batches is None or number < self.batches:
            length = self.lengths[hash_key("length", self.seed, number) % len(self.lengths)]
            batch = self.task.sample(
                self.batch_size,
                length=length,
                seed=self.seed,
                index=number * self.batch_size,
                split=self.split,
            )
            yield batch.tokens, batch.targets
            number += step


def write_parquet(
    task: Task,
    path: str | Path,
    samples: int,
    length: int,
    *,
    seed: int = 0,
    split: str = "train",
    index: int = 0,
) -> None:
    """Write samples as rows: index (int64), tokens and targets (lists of int64; -100 is not scored).

    Where a task puts C tokens in one position, tokens is a list of T lists of C.

    Raises:
        ImportError: polars is not installed.
        ValueError: as `Task.sample`.
    """
    try:
        import polars
    except ImportError as error:
        raise ImportError("write_parquet needs polars: pip install polars") from error
    tokens, targets = task.sample(samples, length=length, seed=seed, index=index, split=split)
    frame = polars.DataFrame(
        {
            "index": range(index, index + samples),
            "tokens": tokens.tolist(),
            "targets": targets.tolist(),
        }
    )
    frame.write_parquet(path)
