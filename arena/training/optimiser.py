"""AdamW over a flat [R,P] buffer: a handful of operations a step, hyper-parameters per replica.

Legend: R replicas, P parameters of one replica, padded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from arena.training.config import Replica, TrainConfig

# Every parameter starts at a multiple of 64 bytes in every row, so that the arithmetic library takes the
# same path for each replica whatever the size of the fleet; a row is a multiple of the chunk that norms
# are summed in (see _row_norm).
_ALIGN = 16
_CHUNK = 1024


class FlatParameters:
    """Parameters of R replicas in one buffer, one row a replica, seen as named tensors [R, ...].

    Attributes:
        values: [R,P], the parameters; ``named`` are views of it.
        decayed: [P], 1 where weight decay applies, else 0.
        named: leaf tensors [R, *shape] by parameter name, for ``torch.func.functional_call`` under vmap.
    """

    def __init__(self, models: Sequence[nn.Module], device: torch.device) -> None:
        """Copy the parameters of the models, which must be alike, on to the device."""
        self._slices: dict[str, tuple[int, int, torch.Size]] = {}
        offset = 0
        for name, parameter in models[0].named_parameters():
            self._slices[name] = (offset, offset + parameter.numel(), parameter.shape)
            offset += -(-parameter.numel() // _ALIGN) * _ALIGN
        width = -(-offset // _CHUNK) * _CHUNK
        ends = [*[start for start, _, _ in self._slices.values()][1:], width]
        gaps = [end - stop for (_, stop, _), end in zip(self._slices.values(), ends, strict=True)]
        values = torch.zeros(len(models), width)
        decayed = torch.zeros(width)
        with torch.no_grad():
            for row, model in zip(values, models, strict=True):
                for name, parameter in model.named_parameters():
                    start, stop, _ = self._slices[name]
                    row[start:stop] = parameter.reshape(-1)
            for name, parameter in models[0].named_parameters():
                start, stop, _ = self._slices[name]
                decayed[start:stop] = 0.0 if getattr(parameter, "no_weight_decay", False) else 1.0
        self.values = values.to(device)
        self.decayed = decayed.to(device)
        self.named: dict[str, Tensor] = {
            name: self.values[:, start:stop].view(len(models), *shape).detach().requires_grad_()
            for name, (start, stop, shape) in self._slices.items()
        }
        self._padding = [self.values.new_zeros(len(models), gap) for gap in gaps]

    def gradients(self, loss: Tensor) -> Tensor:
        """Gradient of a scalar with respect to all parameters, [R,P]; 0 where the scalar does not depend."""
        leaves = list(self.named.values())
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        pieces: list[Tensor] = []
        for grad, padding in zip(grads, self._padding, strict=True):
            pieces += [grad.reshape(grad.shape[0], -1), padding]
        return torch.cat(pieces, 1)

    def row(self, index: int) -> dict[str, Tensor]:
        """Parameters of one replica, copied to the CPU."""
        row = self.values[index].cpu()
        return {name: row[a:b].view(shape).clone() for name, (a, b, shape) in self._slices.items()}


def learning_rates(config: TrainConfig, replicas: Sequence[Replica]) -> Tensor:
    """Learning rate of every step and replica, [steps, R], float64.

    Linear warm-up over W = round(warmup * steps) steps, lr (n + 1) / W, then a cosine from lr towards
    ``final_lr_fraction`` * lr over the rest.
    """
    final = config.final_lr_fraction
    step = torch.arange(config.steps, dtype=torch.float64)
    columns = []
    for replica in replicas:
        warm = round(replica.warmup * config.steps)
        progress = (step - warm) / max(config.steps - warm, 1)
        cosine = final + (1.0 - final) * 0.5 * (1.0 + torch.cos(math.pi * progress))
        columns.append(replica.lr * torch.where(step < warm, (step + 1) / max(warm, 1), cosine))
    return torch.stack(columns, 1)


class FleetAdamW:
    """AdamW (Loshchilov & Hutter, 1711.05101) with decoupled decay scaled by the learning rate.

    For each replica, with its own lr, weight decay, beta2 and clip::

        g <- g min(1, clip / ||g||)          m <- beta1 m + (1 - beta1) g      v <- beta2 v + (1 - beta2) g^2
        p <- p (1 - lr wd) - lr (m / (1 - beta1^n)) / (sqrt(v / (1 - beta2^n)) + eps)

    A replica that is not active keeps its parameters bit for bit.
    """

    def __init__(self, parameters: FlatParameters, config: TrainConfig, replicas: Sequence[Replica]) -> None:
        """Compute the tables of per-step factors once, so that a step reads them from the device."""
        values = parameters.values
        self._parameters = parameters
        self._beta1 = config.beta1
        self._m = torch.zeros_like(values)
        self._v = torch.zeros_like(values)
        n = torch.arange(1, config.steps + 1, dtype=torch.float64)[:, None]
        beta2 = torch.tensor([replica.beta2 for replica in replicas], dtype=torch.float64)
        lr = learning_rates(config, replicas)
        decay = lr * torch.tensor([replica.weight_decay for replica in replicas], dtype=torch.float64)
        # [3, steps, R, 1]: decay, size and epsilon of the step; v's bias correction goes into the last two.
        correction = (1.0 - beta2**n).sqrt()
        size = lr * correction / (1.0 - config.beta1**n)
        table = torch.stack([decay, size, correction * config.eps])
        self._table = table.to(values.dtype)[..., None].to(values.device)
        self._new_weight = (1.0 - beta2).to(values.dtype)[:, None].to(values.device)
        self._clip = torch.tensor([replica.clip for replica in replicas], device=values.device)

    @torch.no_grad()
    def step(self, n: int | Tensor, grads: Tensor, losses: Tensor, active: Tensor) -> Tensor:
        """Take step n (from 0) for the active replicas whose loss, gradient and result are finite.

        Gradients or parameters whose norm overflows (elements of some 1e19) count as not finite.

        Args:
            n: number of the step; as a tensor [1] on the device it is read there, each time a CUDA graph is
                replayed.
            grads: [R,P], from ``FlatParameters.gradients``.
            losses: [R], the losses that were differentiated.
            active: [R], bool: replicas that still train.

        Returns:
            [R], bool: those that took the step. An active replica that did not has diverged.
        """
        norm = _row_norm(grads)
        active = active & torch.isfinite(losses) & torch.isfinite(norm)
        factor = (self._clip / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1.0)
        # where, not a product: 0 * NaN is NaN.
        g = torch.where(active[:, None], grads * factor[:, None], 0.0)
        decay, size, eps = self._table[:, n] if isinstance(n, int) else self._table.index_select(1, n)[:, 0]
        self._m.lerp_(g, 1.0 - self._beta1)
        self._v.lerp_(g.square_(), self._new_weight)
        update = self._m / self._v.sqrt().add_(eps)
        values = self._parameters.values
        new = values * (1.0 - decay * self._parameters.decayed)
        new.sub_(update.mul_(size))
        active = active & torch.isfinite(_row_norm(new))
        values.copy_(torch.where(active[:, None], new, values))
        return active


def _row_norm(rows: Tensor) -> Tensor:
    """Euclidean norm of each row of [R,P], P a multiple of the chunk.

    Chunk by chunk, because a library may split one long sum over threads or vector lanes in a way that
    depends on the number of rows; a sum of a chunk has one way.
    """
    return rows.view(rows.shape[0], -1, _CHUNK).square().sum(-1).sum(-1).sqrt()
