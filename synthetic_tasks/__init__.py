"""Synthetic tasks with exact solvers. Needs torch and numpy only; knows nothing of models.

`get("mqar", n_pairs=8)` makes a task, `task.sample(batch_size=32, length=64, seed=0, index=0,
split="train")` gives its tokens and targets, `task.solve(tokens)` the exact answers.
"""

from synthetic_tasks import (  # noqa: F401 - importing a family registers its tasks
    arithmetic,
    brackets,
    copying,
    counting,
    fuzzy,
    languages,
    mad,
    memory_editing,
    memory_load,
    memory_updates,
    mqar,
    needle,
    recall,
    stacks,
    state_tracking,
    strings,
    word_problems,
)
from synthetic_tasks.base import IGNORE, RESULT_VERSION, SPLITS, Batch, Task, describe, get, names, register
from synthetic_tasks.export import TaskDataset, tensors, write_parquet
from synthetic_tasks.roles import ROLES, Asks, Writes, asks, roles, writes
from synthetic_tasks.text import show

__all__ = [
    "IGNORE",
    "RESULT_VERSION",
    "ROLES",
    "SPLITS",
    "Asks",
    "Batch",
    "Task",
    "TaskDataset",
    "Writes",
    "asks",
    "describe",
    "get",
    "names",
    "register",
    "roles",
    "show",
    "tensors",
    "write_parquet",
    "writes",
]
