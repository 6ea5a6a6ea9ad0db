"""The sLSTM, one token at a time: slow, obvious, and the truth that the fast path is held to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

State = tuple[Tensor, Tensor, Tensor, Tensor]


def empty_state(like: Tensor, batch: int, heads: int, channels: int) -> State:
    """The state before the first token, of ``like``'s type: zeros, and -inf for the stabiliser m."""
    zero = like.new_zeros(batch, heads, channels)
    return zero, zero, zero, torch.full_like(zero, -torch.inf)


def slstm_reference(gates: Tensor, recurrent: Tensor, initial_state: State | None) -> tuple[Tensor, State]:
    """Shapes and equations as in :func:`kernels.slstm`, differentiated by autograd, stabiliser included."""
    B, _, _, H, K = gates.shape
    h, c, n, m = empty_state(gates, B, H, K) if initial_state is None else initial_state
    m = torch.where(n == 0, -torch.inf, m)
    outputs = []
    for gates_t in gates.unbind(1):
        i, f, z, o = (gates_t + torch.einsum("bhk,ghkl->bghl", h, recurrent)).unbind(1)
        kept = F.logsigmoid(f) + m
        m = torch.maximum(i, kept)
        write, keep = torch.exp(i - m), torch.exp(kept - m)
        c = keep * c + write * torch.tanh(z)
        n = keep * n + write
        h = torch.sigmoid(o) * c / n
        outputs.append(h)
    return (torch.stack(outputs, 1) if outputs else gates.new_zeros(B, 0, H, K)), (h, c, n, m)
