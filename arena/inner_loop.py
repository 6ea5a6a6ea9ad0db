"""A gradient step inside of a model, differentiated through, its graph rebuilt in the backward pass.

``torch.utils.checkpoint`` has no rule for ``torch.func.vmap``, in which a fleet runs; :func:`inner_step` has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

Dims = tuple[int | None, ...]
Loss = Callable[..., tuple[Tensor, tuple[Tensor, ...]]]


def sgd(fast: tuple[Tensor, ...], grads: tuple[Tensor, ...], lr: Tensor, clip: float) -> tuple[Tensor, ...]:
    """W - lr g min(1, clip / ||g||), the norm of each sequence taken over all its weights.

    Args:
        fast: W, tensors [B, ...].
        grads: g, as ``fast``.
        lr: A number.
        clip: Largest norm; infinity: none.
    """
    rate: Tensor = lr
    if clip != float("inf"):
        squares = torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0)
        # clip / max(norm, clip): the root's argument is never 0, where its slope is infinite.
        rate = lr * clip * squares.clamp_min(clip * clip).rsqrt()
    return tuple(
        w - (rate if rate.dim() == 0 else rate.view(-1, *[1] * (w.dim() - 1))) * g
        for w, g in zip(fast, grads, strict=True)
    )


@dataclass(frozen=True)
class _Step:
    """What :class:`_InnerStep` needs beside tensors; an object, for vmap looks into tuples."""

    loss: Loss
    n_fast: int
    clip: float
    levels: tuple[Dims, ...] = ()
    """Mapped axes of all tensors, those of the innermost vmap first."""

    def run(self, lr: Tensor, *tensors: Tensor, create_graph: bool) -> tuple[Tensor, ...]:
        """The step on tensors with their mapped axes; see :func:`inner_step`."""
        n = self.n_fast

        def loss(*xs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            return self.loss(xs[:n], *xs[n:])

        def update(lr: Tensor, *xs: Tensor) -> tuple[Tensor, ...]:
            return sgd(xs[:n], xs[n:], lr, self.clip)

        with torch.enable_grad():
            if not create_graph:
                tensors = (*(w.detach().requires_grad_() for w in tensors[:n]), *tensors[n:])
            losses, outputs = self._mapped(loss, lambda dims: dims[1:])(*tensors)
            # Sequences do not meet, so the gradient of the sum holds that of each.
            grads = torch.autograd.grad(losses.sum(), tensors[:n], create_graph=create_graph)
            stepped = self._mapped(update, lambda dims: (*dims[: n + 1], *dims[1 : n + 1]))
            return (losses, *stepped(lr, *tensors[:n], *grads), *outputs)

    def _mapped(
        self,
        function: Callable[..., Any],
        dims_of: Callable[[tuple[int | None, ...]], tuple[int | None, ...]],
    ) -> Callable[..., Any]:
        for dims in self.levels:
            function = vmap(function, in_dims=dims_of(dims))
        return function


class _InnerStep(torch.autograd.Function):
    """:meth:`_Step.run`, of which nothing but the inputs is kept for the backward pass."""

    @staticmethod
    def forward(step: _Step, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.detach() for x in step.run(*tensors, create_graph=False))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.step = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError("a model with an inner loop has first derivatives only")
        needs = ctx.needs_input_grad[1:]
        # fast weights always: the inner gradient is taken with respect to them
        tracked = [need or 1 <= at <= ctx.step.n_fast for at, need in enumerate(needs)]
        with torch.enable_grad():
            tensors = [
                x.detach().requires_grad_() if track else x
                for x, track in zip(ctx.saved_tensors, tracked, strict=True)
            ]
            outputs = ctx.step.run(*tensors, create_graph=True)
            wanted = [x for x, need in zip(tensors, needs, strict=True) if need]
            pairs = [(y, dy) for y, dy in zip(outputs, grads, strict=True) if y.requires_grad]
            ys, dys = zip(*pairs, strict=True)
            results = iter(torch.autograd.grad(ys, wanted, dys, allow_unused=True))
        return None, *(next(results) if need else None for need in needs)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], step: _Step, *tensors: Tensor) -> tuple[Any, Any]:
        """Remember the mapped axes; every replica gets fast weights of its own."""
        dims, own = list(in_dims[1:]), list(tensors)
        for at in range(1, 1 + step.n_fast):
            if dims[at] is None:
                own[at], dims[at] = own[at].expand(info.batch_size, *own[at].shape), 0
        outputs = _InnerStep.apply(replace(step, levels=(*step.levels, tuple(dims))), *own)
        return outputs, (0,) * len(outputs)


def inner_step(
    loss: Loss, fast: tuple[Tensor, ...], lr: Tensor, clip: float, *tensors: Tensor
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Take one step of SGD on each sequence's own weights.

    Gradients flow through the step, to the weights before it and to all tensors. Its graph is not kept but
    built again in the backward pass. A fleet's vmap goes around it; a second derivative is refused.

    Args:
        loss: (fast, *tensors) -> (losses [B], outputs): pure, of nothing but its arguments, twice
            differentiable, each sequence by itself.
        fast: Weights [B, ...].
        lr: A number.
        clip: Largest norm of a sequence's gradient.
        *tensors: What else the loss needs, parameters included, or they would have no gradient.

    Returns:
        The losses before the step [B], the weights after it, the outputs.
    """
    found = _InnerStep.apply(_Step(loss, len(fast), clip), lr, *fast, *tensors)
    return found[0], tuple(found[1 : 1 + len(fast)]), tuple(found[1 + len(fast) :])


def with_loss(x: Tensor, extra: Tensor) -> Tensor:
    """Give x as it is, but the gradient of a loss of it is that of the loss plus the number ``extra``."""
    return _WithLoss.apply(x, extra)


class _WithLoss(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, extra: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones_like(ctx.saved_tensors[0])
