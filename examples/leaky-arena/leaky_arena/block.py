"""Leaky averages: h_t = decay * h_{t-1} + (1 - decay) * W x_t, one learned decay a channel."""

import torch
from torch import Tensor, nn

from arena.blocks import Block


class Leaky(Block):
    """The simplest memory that can be trained. It has one layer: ``outer`` and ``conv`` change nothing."""

    def __init__(
        self, *, d_model: int, n_heads: int, outer: str, conv: str | None, depth: float, slowest: float = 0.99
    ) -> None:
        """Draw the weights; ``slowest`` is the largest decay at initialisation, the smallest is 0.5."""
        super().__init__(d_model)
        if not 0.5 < slowest < 1:
            raise ValueError(f"slowest is a number between 0.5 and 1, not {slowest}")
        self.n_heads = n_heads
        self.into = nn.Linear(d_model, d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.logit = nn.Parameter(torch.linspace(0.5, slowest, d_model).logit())

    def initial_state(self, batch_size, *, device=None, dtype=None):
        """H = 0: [B,D]."""
        device, dtype = self._placement(device, dtype)
        return {"h": torch.zeros(batch_size, self.d_model, device=device, dtype=dtype)}

    def forward(self, x: Tensor, state=None):
        """Mix x [B,T,D]."""
        h = self._scan(x, state)
        return self.out(h), {"h": h[:, -1]}

    def trace(self, x: Tensor, state=None, *, states: bool = False):
        """The averages, under the name that all architectures use for what a scalar memory holds."""
        return {"cell": self._scan(x, state).unflatten(-1, (self.n_heads, -1))}

    def _scan(self, x: Tensor, state) -> Tensor:
        """H [B,T,D], token by token: a plug-in may be slow at first."""
        decay = self.logit.sigmoid()
        h = (self.initial_state(x.shape[0], dtype=x.dtype) if state is None else state)["h"]
        new, averages = (1 - decay) * self.into(x), []
        for t in range(x.shape[1]):
            h = decay * h + new[:, t]
            averages.append(h)
        return torch.stack(averages, 1)
