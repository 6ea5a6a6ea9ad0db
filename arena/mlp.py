"""What follows a block: a gated MLP, or several of which every token goes through a few.

Axes: B batch, T positions, D model width, E experts, k experts of a token, F hidden width (of one expert).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.experts import experts


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), without biases; weights as nn.Linear draws them, U(+-1/sqrt(fan in))."""

    def __init__(self, width: int, hidden: int, *, gelu: bool) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self._gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., D] to [..., D]."""
        return self.down(self.hidden(self.gate_up(x)))

    def hidden(self, gate_up: Tensor) -> Tensor:
        """act(gate) * up, from both side by side [..., 2F]."""
        gate, up = gate_up.chunk(2, -1)
        return (F.gelu(gate) if self._gelu else F.silu(gate)) * up


class Routing(NamedTuple):
    """What a router did, over all positions of a batch."""

    load: Tensor
    """[E]: f_e, the share of expert e in all (token, chosen expert) pairs; sums to 1, no gradient."""
    importance: Tensor
    """[E]: P_e, the mean probability of expert e; sums to 1."""

    @property
    def imbalance(self) -> Tensor:
        """E sum_e f_e P_e, 1 for equal loads, at most E: the auxiliary loss without its coefficient.

        Switch Transformer (Fedus et al., arXiv 2101.03961), equations 4 to 6, there for k = 1; f counts the k
        choices of a token alike and divides by k, as DeepSeekMoE does (Dai et al., 2401.06066, section 3.3).
        Code that does not divide has k times this loss. The gradient is through P alone.
        """
        return self.load.shape[-1] * (self.load * self.importance).sum(-1)


class MixtureMLP(nn.Module):
    """Mixture of experts: every token goes through k of E gated MLPs (token choice, nothing dropped).

    p = softmax(router(x)); the k largest are chosen; y = sum over them of w_e expert_e(x). With k = 1, w = p
    (Switch Transformer, equation 2: else the router would have no gradient from the task); with k > 1, w is p
    over the sum of the chosen (GShard, arXiv 2006.16668; ST-MoE). Router and experts have no bias and start
    as nn.Linear starts them, each expert with its own fan in. No noise, no capacity: a function of x alone.
    """

    def __init__(self, width: int, hidden: int, *, gelu: bool, n_experts: int, per_token: int) -> None:
        super().__init__()
        self.n_experts, self.per_token = n_experts, per_token
        self.router = nn.Linear(width, n_experts, bias=False)
        self.gate_up = nn.Linear(width, n_experts * 2 * hidden, bias=False)
        self.down = nn.Linear(n_experts * hidden, width, bias=False)
        nn.init.uniform_(self.down.weight, -1 / math.sqrt(hidden), 1 / math.sqrt(hidden))
        self._gelu = gelu

    @property
    def idle_params(self) -> int:
        """Parameters that a token does not go through."""
        used = self.gate_up.weight.numel() + self.down.weight.numel()
        return used // self.n_experts * (self.n_experts - self.per_token)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """Map x [..., D] to [..., D], and say where its tokens went."""
        p = self.router(x).softmax(-1)
        weights, chosen = p.topk(self.per_token)
        if self.per_token > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        y = experts(
            x,
            self.gate_up.weight.unflatten(0, (self.n_experts, -1)),
            self.down.weight.unflatten(1, (self.n_experts, -1)),
            chosen,
            weights,
            gelu=self._gelu,
        )
        hits = chosen[..., None] == torch.arange(self.n_experts, device=x.device)
        load = hits.to(x.dtype).flatten(0, -2).mean(0)
        return y, Routing(load, p.flatten(0, -2).mean(0))
