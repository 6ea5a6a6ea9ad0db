"""RWKV-7 "Goose": what a key holds is taken out in part, then a value is written under another key.

    S_t = (diag(w_t) - (a_t * c_t) c_t^T) S_{t-1} + k_t v_t^T        o_t = S_t^T r_t

per head, S being the transpose of the paper's wkv state, c the removal key of length 1, a the in-context
learning rate of each channel, k = k' * (1 + (a - 1) * alpha) the replacement key. Peng et al., arXiv
2503.14456, section 4: w = exp(-e^(-1/2) sigmoid(d)), c = k' * xi over its length; d and a = sigmoid(.) are
low-rank maps of x with a bias.

On the one memory a token is two micro-steps. The first decays and deletes: its key is u = a * c / s of length
1, s = |a * c|, its erase s^2 / (a * w), one a channel, so that u (erase * u * w)^T = (a * c) c^T. (Where a is
the same for all channels, this is erase a / w at the key c.) The second writes v under k and erases nothing.

Official layer: token shift (x_t and x_{t-1} mixed by channel, for each of r, w, k, v, a and g), no other
convolution, no norm on r and k, GroupNorm per head with eps 1e-5 K, plus (r . (rho * k)) v, times g =
sigmoid(x A) B, initial weights as in its authors' code. Left out: the value residual, since a block alone
knows no first layer; and their channel mixing, in whose place the model has its SwiGLU MLP. Under ``common``
all but w, a, xi and alpha is the common layer: r = q and k' have length 1.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arena.blocks.base import Block, State, memory_dtype, no_weight_decay
from arena.blocks.gates import GateValues, at_micro_step
from arena.blocks.matrix import MatrixMemoryBlock
from arena.blocks.memory_block import Inputs, MemoryBlock
from arena.blocks.outer import COMMON, ShortConv, l2_norm
from arena.blocks.registry import register
from arena.memory import GateSpec

SPEC = GateSpec(decay="channel", decay_form="bounded", erase="channel", micro_steps=2)
"""Its place in gate space, from where the gates cannot be walked: how two micro-steps go together is its own.
"""
LOG_DECAY = -math.exp(-0.5)
LEAST_RATE = 1e-12
"""Of a: below it nothing is deleted in any precision, and 1 / a would overflow."""
_SHIFTS = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
"""Names of the token shifts -> exponent of their initial share."""


class _TwoSteps(MemoryBlock):
    """What both layers share: the first micro-step writes nothing, the second erases nothing."""

    erasing_steps = 1

    def trace(self, x: Tensor, state: State | None = None, *, states: bool = False) -> dict[str, Tensor]:
        """See :class:`~arena.blocks.base.Block`."""
        trace = super().trace(x, state, states=states)
        one = trace["q"].new_ones(*trace["q"].shape[:3], 1)
        return trace | {"write": at_micro_step(one, 1, 2)}


class LowRank(nn.Module):
    """act(x A) B + bias, A of zeros and B orthogonal of gain 0.1 at first; the bias is not decayed."""

    def __init__(self, d_model: int, rank: int, bias: Tensor | None, activation: str = "none") -> None:
        super().__init__()
        self.activation = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "none": lambda x: x}[activation]
        self.down = nn.Parameter(torch.zeros(d_model, rank))
        self.up = nn.Parameter(nn.init.orthogonal_(torch.empty(rank, d_model), 0.1 * _tall(rank, d_model)))
        self.bias = None if bias is None else no_weight_decay(nn.Parameter(bias))

    def forward(self, x: Tensor) -> Tensor:
        """Map x [...,D] to [...,D]."""
        y = self.activation(x @ self.down) @ self.up
        return y if self.bias is None else y + self.bias


def _tall(rows: int, columns: int) -> float:
    """Their gain of a matrix with more rows than columns."""
    return math.sqrt(max(1.0, rows / columns))


def rank_of(d_model: int, factor: float) -> int:
    """Published ranks: ``factor`` sqrt(D) to the nearest multiple of 32, at least 32."""
    return max(32, round(factor * math.sqrt(d_model) / 32) * 32)


class TwoStepGates(nn.Module):
    """w and a of every token and channel, the factors xi and alpha on k', and the micro-steps they make.

    Initial values are those of the authors' code.

    Args:
        d_model: D.
        n_heads: H.
        depth: layer index / (layers - 1).
        eps: inside the root of the removal key's length.
    """

    def __init__(self, d_model: int, n_heads: int, depth: float, eps: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.eps = eps
        K = d_model // n_heads
        place = torch.arange(d_model) / max(d_model - 1, 1)
        zigzag = (torch.arange(d_model) % K) / max(K - 1, 1) * 2 - 1
        zigzag = zigzag * zigzag.abs() if K > 1 else torch.zeros(d_model)
        decay = -5.5 + 6 * place ** (1 + depth**0.3) + 2.5 * zigzag
        rank = rank_of(d_model, 2.5)
        self.decay = LowRank(d_model, rank, decay, "tanh")
        self.rate = LowRank(d_model, rank, -0.19 + 0.3 * zigzag + 0.4 * (place - 0.5))
        self.xi = no_weight_decay(nn.Parameter((0.71 - 0.1 * (place - 0.5)).view(n_heads, K)))
        self.alpha = no_weight_decay(nn.Parameter(torch.full((n_heads, K), 1.02)))

    def forward(self, x_decay: Tensor, x_rate: Tensor) -> GateValues:
        """Of tokens: ln w and, in the place of erase, a, each [B,T,H,K]; x [B,T,D] as each sees it."""
        d, z = (y.unflatten(-1, (self.n_heads, -1)) for y in (self.decay(x_decay), self.rate(x_rate)))
        wide = memory_dtype(d.dtype)
        return GateValues(LOG_DECAY * torch.sigmoid(d.to(wide)), torch.sigmoid(z.to(wide)))

    def two_steps(self, q: Tensor, k: Tensor, v: Tensor, gates: GateValues, carry: State) -> Inputs:
        """The micro-steps of tokens.

        Args:
            q: [B,T,H,K].
            k: k', [B,T,H,K].
            v: [B,T,H,V].
            gates: As :meth:`forward` gives them.
            carry: State of the layer.
        """
        log_decay, rate = gates.log_decay, gates.erase
        assert log_decay is not None and rate is not None
        rate = rate.clamp_min(LEAST_RATE)
        deleted = rate * l2_norm((k * self.xi).to(rate.dtype), self.eps)
        # What is computed does not depend on s, nor does its gradient. 1e-30: a removal key of 0 stays 0.
        size = (deleted.square().sum(-1, keepdim=True) + 1e-30).sqrt().detach()
        erase = size.square() / (rate * log_decay.exp())
        replacement = k * (1 + (rate - 1) * self.alpha).to(k.dtype)
        keys = torch.stack([(deleted / size).to(k.dtype), replacement], 2).flatten(1, 2)
        steps = GateValues(at_micro_step(log_decay, 0, 2), at_micro_step(erase, 0, 2))
        return Inputs(q, keys, at_micro_step(v, 1, 2), steps, carry)


class CommonRWKV7(_TwoSteps, MatrixMemoryBlock):
    """The memory in the common layer."""

    keys_a_token = 1

    def __init__(self, *, d_model: int, n_heads: int, conv: str | None, depth: float) -> None:
        self._depth = depth
        super().__init__(d_model=d_model, n_heads=n_heads, spec=SPEC, layer=COMMON, conv=conv)

    def make_gates(self) -> None:
        """See :class:`~arena.blocks.matrix.MatrixMemoryBlock`."""
        self.rates = TwoStepGates(self.d_model, self.n_heads, self._depth, eps=1e-6)

    def gates(self, x: Tensor) -> GateValues:
        """Of tokens: ln w and a."""
        return self.rates(x, x)

    def inputs(self, x: Tensor, state: State | None) -> Inputs:
        """See :class:`~arena.blocks.matrix.MemoryBlock`."""
        q, k, v, gates, carry, _ = super().inputs(x, state)
        return self.rates.two_steps(q, k, v, gates, carry)


class OfficialRWKV7(_TwoSteps):
    """The time mixing of the paper, without value residual.

    Args:
        d_model: D.
        n_heads: H.
        conv: Short convolution on r, k and v; None: none.
        depth: layer index / (layers - 1).
        n_blocks: layers of the stack, for initial values; a model gives it (2: a block alone).

    State: beside those of the memory ``shift`` [B,1,D], the last x.
    """

    scale = 1.0
    map_out = "out"

    def __init__(self, *, d_model: int, n_heads: int, conv: str | None, depth: float, n_blocks: int) -> None:
        if n_blocks < 1:
            raise ValueError(f"n_blocks must be at least 1, got {n_blocks}")
        K = d_model // n_heads
        super().__init__(d_model=d_model, n_heads=n_heads, spec=SPEC, key_dim=K, value_dim=K)
        layer = depth * (n_blocks - 1)
        place = torch.arange(d_model) / d_model
        shares = [1 - place ** (power * (1 - layer / n_blocks)) for power in _SHIFTS.values()]
        self.shift = no_weight_decay(nn.Parameter(torch.stack(shares)))
        self.receptance, self.key, self.value, self.out = (
            nn.Linear(d_model, d_model, bias=False) for _ in range(4)
        )
        for linear, bound in ((self.receptance, 0.5), (self.key, 0.05), (self.value, 0.5), (self.out, 0.0)):
            nn.init.uniform_(linear.weight, -bound / math.sqrt(d_model), bound / math.sqrt(d_model))
        conv = conv or "none"
        self.conv = ShortConv(conv, d_model, [d_model] * 3, activation=conv != "none")
        self.rates = TwoStepGates(d_model, n_heads, depth, eps=1e-12)
        self.output_map = LowRank(d_model, rank_of(d_model, 5), None, "sigmoid")
        self.bonus = no_weight_decay(nn.Parameter(torch.full((n_heads, K), -0.04)))
        size = ((layer + 1) / n_blocks) ** 0.7
        self.norm_weight = no_weight_decay(nn.Parameter(torch.full((n_heads, K), size)))
        self.norm_bias = no_weight_decay(nn.Parameter(torch.zeros(n_heads, K)))

    def inputs(self, x: Tensor, state: State | None) -> Inputs:
        """See :class:`~arena.blocks.matrix.MemoryBlock`; the skip is (x_g, (r . (rho * k)) v)."""
        before = torch.zeros_like(x[:, :1]) if state is None else state["shift"].to(x.dtype)
        off = torch.cat([before, x[:, :-1]], 1) - x
        x_r, x_w, x_k, x_v, x_a, x_g = (x + off * share for share in self.shift)
        rkv = torch.cat([self.receptance(x_r), self.key(x_k), self.value(x_v)], -1)
        rkv, rows = self.conv(rkv, x, None if state is None else state.get("conv"))
        r, k, v = (y.unflatten(-1, (self.n_heads, -1)) for y in rkv.chunk(3, -1))
        carry = {"shift": x[:, -1:]} | ({} if rows is None else {"conv": rows})
        into = self.rates.two_steps(r, k, v, self.rates(x_w, x_a), carry)
        bonus = (r * self.bonus * into.k[:, 1::2]).sum(-1, keepdim=True) * v
        return into._replace(skip=torch.cat([x_g, bonus.flatten(-2)], -1))

    def output_gate(self, x: Tensor, into: Inputs) -> Tensor:
        """The factor g."""
        assert into.skip is not None
        return self.output_map(into.skip[..., : self.d_model]).unflatten(-1, (self.n_heads, -1))

    def output(self, x: Tensor, into: Inputs, read: Tensor) -> Tensor:
        """See :class:`~arena.blocks.matrix.MemoryBlock`."""
        assert into.skip is not None
        normed = F.layer_norm(read, read.shape[-1:], eps=1e-5 * self.key_dim)
        bonus = into.skip[..., self.d_model :].unflatten(-1, (self.n_heads, -1))
        mixed = normed * self.norm_weight + self.norm_bias + bonus
        return self.out((mixed * self.output_gate(x, into)).flatten(-2))

    def initial_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """See :class:`~arena.blocks.base.Block`."""
        state = super().initial_state(batch_size, device=device, dtype=dtype)
        device, dtype = self._placement(device, dtype)
        return state | {"shift": torch.zeros(batch_size, 1, self.d_model, device=device, dtype=dtype)}


@register("rwkv7")
def _build(
    *,
    d_model: int,
    n_heads: int,
    outer: str,
    conv: str | None,
    depth: float,
    n_blocks: int | None = None,
) -> Block:
    if outer == "official":
        return OfficialRWKV7(
            d_model=d_model,
            n_heads=n_heads,
            conv=conv,
            depth=depth,
            n_blocks=2 if n_blocks is None else n_blocks,
        )
    if n_blocks is not None:
        raise ValueError("n_blocks belongs to the official RWKV-7 layer (outer='official')")
    return CommonRWKV7(d_model=d_model, n_heads=n_heads, conv=conv, depth=depth)
