"""The layer around a memory: projections in, short convolution, norm, output gate, projection out.

``COMMON`` is the one layer that all architectures share under ``outer="common"``, so that only the memory
differs: q, k and v of width d_model from one linear map without bias, a static causal convolution of width 4
over each of them (the ``conv`` option replaces it) and SiLU, the memory (q and k of length 1 for all
architectures, also those that do without it in their papers), RMSNorm per head (eps 1e-5), times SiLU of a
full linear map of x, linear map out without bias, then the model's SwiGLU MLP. Linear maps start as
``nn.Linear`` starts them, convolution taps uniform in +-1/sqrt(4). The gates of the memory keep their
published parametrisation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arena.blocks.base import no_weight_decay
from arena.blocks.gates import low_rank
from kernels.short_conv import dynamic_short_conv, short_conv

CONV_WIDTH = 4
CONV_RANK = 16
CONV_GROUP = 16
XAVIER_GAIN = 2.0**-2.5


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """What stands around a memory; the defaults are the common layer."""

    key_ratio: float = 1.0
    """Key width of all heads together over d_model (rounded per head, at least 1)."""
    value_ratio: float = 1.0
    """Value width of all heads together over d_model."""
    key_dim: int | None = None
    """Key width of one head, in place of ``key_ratio``."""
    value_dim: int | None = None
    """Value width of one head, in place of ``value_ratio``."""
    conv: str = "static"
    """Short convolution on q, k and v, one of ``arena.blocks.registry.CONVS``."""
    conv_width: int = CONV_WIDTH
    """Taps of a static or dynamic convolution."""
    activation: Literal["silu", "none"] = "silu"
    """On q, k and v. After a convolution it is always SiLU."""
    norm: Literal["rms", "none"] = "rms"
    """On what a head reads, over its V channels."""
    norm_eps: float = 1e-5
    """Of that norm."""
    output_gate: Literal["silu", "sigmoid", "none"] = "silu"
    """Non-linearity of the factor on the normed read."""
    output_gate_rank: Literal["full", "head"] = "full"
    """Full linear map of x without bias, or rank V with a bias on the second map."""
    init: Literal["linear", "xavier"] = "linear"
    """Linear maps as ``nn.Linear`` starts them, or Xavier-uniform of gain 2^-2.5 with biases 0 (GDN-2)."""

    def __post_init__(self) -> None:
        if self.output_gate not in ("silu", "sigmoid", "none"):
            raise ValueError(f"output_gate must be 'silu', 'sigmoid' or 'none', got {self.output_gate!r}")
        for name in ("key_dim", "value_dim", "conv_width"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not (whole and value >= 1) and (value is not None or name == "conv_width"):
                raise ValueError(f"{name} is an integer of at least 1, not {value!r}")

    def head_dims(self, d_model: int, n_heads: int) -> tuple[int, int]:
        """K and V of one head."""
        key_dim = self.key_dim or max(1, round(d_model * self.key_ratio / n_heads))
        return key_dim, self.value_dim or max(1, round(d_model * self.value_ratio / n_heads))

    def changed(self, fields: Mapping[str, Any] | None) -> LayerSpec:
        """The same layer with some fields changed; ValueError for an unknown one."""
        known = [one.name for one in dataclasses.fields(self)]
        for name in fields or {}:
            if name not in known:
                raise ValueError(f"a layer has no field {name!r}; known: {', '.join(known)}")
        return dataclasses.replace(self, **(fields or {}))


COMMON = LayerSpec()


class ShortConv(nn.Module):
    """Short causal convolution over neighbouring groups of channels, then SiLU (unless ``activation=False``).

    ``static`` is depthwise of width 4. The dynamic kinds (arXiv 2606.03825) make the taps from the layer's
    input h, each group of channels with its own generator, and add x itself: ``dynamic-lowrank`` of width 4
    and rank 16, ``dynamic-headwise`` of width 4 with one filter for 16 neighbouring channels (fewer where 16
    does not divide), ``gate`` the low-rank kind of width 1. Their generators start at zero: a static
    convolution plus x.

    Args:
        kind: One of ``arena.blocks.registry.CONVS``.
        d_in: Width of h.
        widths: Channels of each group (q, k and v, say); x has all of them side by side.
        bias: Give a static convolution a bias.
        activation: Apply SiLU.
        residual: Add x where the kind is static too.
        width: Taps, of the kinds that have more than one.
    """

    def __init__(
        self,
        kind: str,
        d_in: int,
        widths: Sequence[int],
        *,
        bias: bool = False,
        activation: bool = True,
        residual: bool = False,
        width: int = CONV_WIDTH,
    ) -> None:
        super().__init__()
        self.residual = residual
        self.kind = kind
        self.widths = list(widths)
        self.activation = activation
        self.composed = False
        self.rows = 0 if kind in ("none", "gate") else width - 1
        self.bias = None
        if kind == "none":
            return
        taps = torch.empty(self.rows + 1, sum(widths)).uniform_(-1, 1) / math.sqrt(self.rows + 1)
        self.weight = nn.Parameter(taps)
        if kind == "static" and bias:
            start = torch.empty(sum(widths)).uniform_(-1, 1) / math.sqrt(width)
            self.bias = no_weight_decay(nn.Parameter(start))
        if kind in ("dynamic-lowrank", "gate"):
            self.down = nn.Linear(d_in, CONV_RANK * len(self.widths), bias=False)
            self.up = nn.Parameter(torch.zeros(CONV_RANK, self.rows + 1, sum(widths)))
        if kind == "dynamic-headwise":
            self.groups = [width // math.gcd(CONV_GROUP, width) for width in self.widths]
            self.filters = nn.Linear(d_in, width * sum(self.groups), bias=False)
            nn.init.zeros_(self.filters.weight)

    def forward(self, x: Tensor, h: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Convolve x [B,T,C], C the sum of the widths, with h [B,T,D] at hand for dynamic taps.

        Args:
            state: [B,rows,C], the rows before x, or None for zeros; there is no state where ``rows`` is 0.

        Returns:
            y [B,T,C] and the new state.
        """
        if self.kind == "none":
            y, new = x, None
        elif self.composed:
            y, new = self._composed(x, h, state)
        elif self.kind == "static":
            activation = "silu" if self.activation else None
            return short_conv(
                x,
                self.weight,
                bias=self.bias,
                activation=activation,
                residual=self.residual,
                initial_state=state,
            )
        else:
            y, new = self._dynamic(x, h, state)
        return (F.silu(y) if self.activation else y), new

    def _composed(self, x: Tensor, h: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The same of plain operations, which have derivatives of any order."""
        taps: Tensor = self.weight  # [W,C], or [B,T,W,C] where they are made from h
        if self.kind == "dynamic-headwise":
            made = self.filters(h).unflatten(-1, (self.rows + 1, -1)).split(self.groups, -1)
            pairs = zip(made, self.widths, self.groups, strict=True)
            taps = taps + torch.cat([f.repeat_interleave(w // g, -1) for f, w, g in pairs], -1)
        elif self.kind != "static":
            pieces = zip(self.down(h).split(CONV_RANK, -1), self.up.split(self.widths, -1), strict=True)
            taps = taps + torch.cat([torch.einsum("btr,rwc->btwc", z, u) for z, u in pieces], -1)
        before = x.new_zeros(x.shape[0], self.rows, x.shape[-1]) if state is None else state
        rows, T = torch.cat([before, x], 1), x.shape[1]
        y = x if self.kind != "static" else torch.zeros_like(x)
        for lag in range(self.rows + 1):
            y = y + taps[..., lag, :] * rows[:, self.rows - lag : self.rows - lag + T]
        y = y if self.bias is None else y + self.bias
        return y, rows[:, T:] if self.rows else None

    def _dynamic(self, x: Tensor, h: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        parts = []
        xs, taps = x.split(self.widths, -1), self.weight.split(self.widths, -1)
        states = [None] * len(self.widths) if state is None else state.split(self.widths, -1)
        if self.kind == "dynamic-headwise":
            filters = self.filters(h).unflatten(-1, (self.rows + 1, -1)).split(self.groups, -1)
            for x_part, bias, start, made in zip(xs, taps, states, filters, strict=True):
                parts.append(dynamic_short_conv(x_part, filters=made, bias=bias, initial_state=start))
        else:
            zs, us = self.down(h).split(CONV_RANK, -1), self.up.split(self.widths, -1)
            for x_part, bias, start, z, u in zip(xs, taps, states, zs, us, strict=True):
                parts.append(dynamic_short_conv(x_part, z=z, u=u, bias=bias, initial_state=start))
        y, new = (torch.cat(pieces, -1) for pieces in zip(*parts, strict=True))
        return y, new if self.rows else None


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, rms(x) = sqrt(mean(x^2) + eps)."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = no_weight_decay(nn.Parameter(torch.ones(width)))

    def forward(self, x: Tensor) -> Tensor:
        """Norm x [...,width]."""
        width = x.shape[-1]
        return _Unit.apply(x, width * self.eps)[0] * (width**0.5 * self.weight)


class OutputGate(nn.Module):
    """The factor on a head's read, [B,T,H,V], from x [B,T,D]."""

    def __init__(self, layer: LayerSpec, d_model: int, n_heads: int, value_dim: int) -> None:
        super().__init__()
        self.activation = torch.sigmoid if layer.output_gate == "sigmoid" else F.silu
        self.n_heads = n_heads
        width = n_heads * value_dim
        if layer.output_gate_rank == "full":
            self.linear: nn.Module = nn.Linear(d_model, width, bias=False)
        else:
            self.linear = low_rank(d_model, value_dim, width, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Gate of x [B,T,D]."""
        return self.activation(self.linear(x)).unflatten(-1, (self.n_heads, -1))


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Length 1 over the last axis (``eps`` inside the root)."""
    return _Unit.apply(x, eps)[0]


class _Unit(torch.autograd.Function):
    """(x r, r) with r = 1 / sqrt(sum x^2 + eps) over the last axis.

    Written out because the composed operations take three times as long in their backward pass.
    """

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, None], x: Tensor, eps: float) -> Any:
        """The last axis is the only one that matters, so replicas are one more leading axis."""
        assert in_dims[0] is not None  # torch calls this only where something is mapped
        return _Unit.apply(x.movedim(in_dims[0], 0), eps), (0, 0)

    @staticmethod
    def forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        r = torch.rsqrt(torch.linalg.vecdot(x, x)[..., None] + eps)
        return x * r, r

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_r: Tensor | None) -> tuple[Tensor | None, None]:
        y, r = ctx.saved_tensors
        grad_x = None
        if grad is not None:
            grad_x = torch.addcmul(grad, y, torch.linalg.vecdot(grad, y)[..., None], value=-1) * r
        if grad_r is not None:  # in second derivatives only
            through_r = -grad_r * y * r.square()
            grad_x = through_r if grad_x is None else grad_x + through_r
        return grad_x, None


def xavier_(module: nn.Module, fused: dict[nn.Linear, Sequence[int]]) -> None:
    """Xavier-uniform of gain 2^-2.5 and biases 0 for every linear map of ``module``.

    Args:
        module: Changed in place.
        fused: Output widths of maps that are several maps in one tensor; each piece has its own fan.
    """
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            for piece in linear.weight.data.split(list(fused.get(linear, [linear.out_features]))):
                nn.init.xavier_uniform_(piece, gain=XAVIER_GAIN)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
