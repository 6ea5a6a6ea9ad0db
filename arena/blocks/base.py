"""The one interface of all sequence mixers: :class:`Block`.

Axes in names and comments: B batch, T tokens, D model width, H heads, K key channels of a head, V value
channels of a head, W convolution width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from arena.memory import state_bytes

State = dict[str, Tensor]
"""What a block carries from token to token: flat, every tensor batch-first."""


class Block(nn.Module):
    """A causal sequence mixer from x [B,T,D] to y [B,T,D], without residual and without pre-norm.

    A subclass implements :meth:`forward`, :meth:`initial_state` and :meth:`trace`. Blocks are pure: forward
    keeps nothing on the Python side, calls no ``.item()`` and has no shape that depends on data, so that a
    fleet of replicas can run it under ``torch.func.vmap``. Initial weights are drawn in the constructor from
    torch's global generator; ``arena.model.build_model`` forks and seeds it.

    Attributes:
        d_model: D, the width of x and y.
        mlp: Which MLP the model puts after the block: ``"swiglu"`` (the model's default one), ``"gelu"``
            (gated GELU of factor 1.3, official sLSTM) or ``"none"`` (official mLSTM and Mamba-2).
        micro_steps: Updates of a matrix memory a token; see ``arena.memory.TRACE_FIELDS``.
        gate_steps: How many of these have gates of their own, which can be changed one by one: all, or one,
            where a token's gates decide on all of its updates (Mamba-3).
        map_out: Attribute that holds the ``nn.Linear`` that is the very last thing the block does, so that a
            model can put a convolution after it; ``""``: the block ends without one; None: it does not say.
    """

    mlp: Literal["swiglu", "gelu", "none"] = "swiglu"
    micro_steps: int = 1
    gate_steps: int = 1
    map_out: str | None = None

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Mix x [B,T,D] causally, from ``state`` on (None: the initial one); returns y and the new state."""
        raise NotImplementedError

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """One token x_t [B,D]: equal to :meth:`forward` over a sequence of length 1."""
        y, state = self(x_t[:, None], state)
        return y[:, 0], state

    def initial_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The state before the first token.

        Args:
            batch_size: B.
            device: None means the parameters' device.
            dtype: Type of x; None means the parameters' type. Memories are fp32 or better all the same.
        """
        raise NotImplementedError

    def trace(self, x: Tensor, state: State | None = None, *, states: bool = False) -> dict[str, Tensor]:
        """What happened inside at every token, under the names of ``arena.memory.TRACE_FIELDS``.

        Args:
            x: [B,T,D].
            state: As in :meth:`forward`.
            states: Also the whole memory after every token (``state``, T times the size of one).
        """
        raise NotImplementedError

    def state_bytes(self, length: int = 0) -> int:
        """Bytes that one sequence carries after ``length`` tokens, measured on a state that the block gave.

        Only a state that grows (a key-value cache) is run to ``length``; others have their size at once.
        """
        reference = next(self.parameters())
        x = reference.new_zeros(1, max(length, 1), self.d_model)
        with torch.no_grad():
            before = state_bytes(self.initial_state(1))
            if length == 0:
                return before
            after = state_bytes(self(x[:, :1])[1])
            return after if after == before else state_bytes(self(x)[1])

    def _placement(
        self, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> tuple[torch.device, torch.dtype]:
        """Fill in the defaults of :meth:`initial_state` from the parameters."""
        reference = next(self.parameters())
        return torch.device(device) if device is not None else reference.device, dtype or reference.dtype


def memory_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which recurrent memory of inputs of type ``dtype`` is kept: fp32 or better."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def no_weight_decay(parameter: nn.Parameter) -> nn.Parameter:
    """Mark a parameter (a decay rate, a bias, a norm's weight) that the optimiser must not decay."""
    parameter.no_weight_decay = True  # type: ignore[attr-defined]
    return parameter
