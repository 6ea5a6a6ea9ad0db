"""A stand-in for CUDA graphs on the CPU: the operations of a piece of work, written down and run again.

As in a CUDA graph, the work is not done by recording it, every replay runs the same operations on the same
memory, numbers that Python held stay what they were, and waiting for a value is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """Operations, with what they read and wrote; :meth:`replay` runs them again."""

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Any, Any, Any, Any]] = []
        self._before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a recording can't wait for a value")
        given = {name.name: value for name, value in zip(func._schema.arguments, args, strict=False)}
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for x in tree_leaves({**given, **kwargs}.get(argument.name)):
                    if isinstance(x, Tensor):
                        self._before.append((x, x.clone()))
        found = func(*args, **kwargs)
        self._operations.append((func, args, kwargs, found))
        return found

    def undo(self) -> None:
        """Give every tensor that was changed in place what it held before."""
        for x, old in reversed(self._before):
            x.copy_(old)
        self._before.clear()

    def replay(self) -> None:
        """Run the operations again, results into the tensors that held them at the recording."""
        with torch.no_grad():
            for func, args, kwargs, found in self._operations:
                aliased = [x.alias_info is not None for x in func._schema.returns]
                again = func(*args, **kwargs)
                if any(aliased):
                    continue
                for old, new in zip(tree_leaves(found), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor):
                        old.copy_(new)


def record(work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """What ``arena.training.graphs.Recorder`` does on a GPU."""
    tape = Tape()
    with tape:
        output = work()
    with torch.no_grad():
        tape.undo()
    return tape.replay, output
