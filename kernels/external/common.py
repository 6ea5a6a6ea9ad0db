"""What the external backends share: versions of packages, and replicas folded into the batch."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from kernels.folding import fold, unfold

Version = tuple[int, ...]


@functools.cache
def version_of(*distributions: str) -> Version | None:
    """The numbers of the version of the first distribution that is installed; None: none is."""
    for name in distributions:
        try:
            text = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return tuple(int(x) for x in re.findall(r"\d+", text.split("+")[0])[:3])
    return None


@functools.cache
def can_import(module: str) -> str | None:
    """Why a module can't be imported, or None."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a package may fail in any way of its own: a compiler, a library, a version
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return None


def folded(operator: Callable[..., tuple[Tensor, ...]], *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Call a differentiable operator whose tensors all have the batch first, also under ``torch.func.vmap``.

    The packages' autograd functions have no batching rule: replicas are folded into the batch instead.
    """
    if torch._C._are_functorch_transforms_active():
        return _Folded.apply(operator, *tensors)
    return operator(*tensors)


class _Folded(Function):
    """Exists for its vmap rule, in which autograd records the operator itself."""

    @staticmethod
    def forward(operator: Callable[..., Any], *tensors: Any) -> Any:
        return operator(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            "backends of other packages are differentiated by backward(), not torch.func.grad"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], operator: Any, *tensors: Any) -> Any:
        return unfold(info.batch_size, operator(*fold(info.batch_size, in_dims[1:], tensors)))


class NotDifferentiable(Function):
    """Passes tensors on; a gradient through them is an error, not a silent zero."""

    @staticmethod
    def forward(ctx: Any, reason: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors."""
        ctx.reason = reason
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Raise NotImplementedError with the reason."""
        raise NotImplementedError(ctx.reason)
