"""Gated MLPs of which every token goes through a few: sum over the chosen e of weight_e down_e(act(gate_e(x))
* up_e(x)).

Which are chosen, and with what weight, is the caller's business. Axes: N tokens, D model width, E experts, k
chosen ones, F hidden width of one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backends import resolve_backend

_PIECE = 16  # tokens whose experts' weights the reference lays side by side


def experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    chosen: Tensor,
    weights: Tensor,
    *,
    gelu: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Send every token through its chosen experts.

    ``fused`` runs all experts on all tokens, as one MLP of width E F whose hidden channels are weighted, 0
    where an expert is not chosen: no shape depends on the choice, no token is dropped, and one that an expert
    does not get has no part in its gradient. ``reference`` runs the chosen ones alone, from weights gathered
    for each token: what the layer costs where tokens are dispatched, and what FLOPs are counted on.

    Args:
        x: [...,D].
        gate_up: [E,2F,D], gate first.
        down: [D,E,F].
        chosen: [...,k] integers below E, all different.
        weights: [...,k].
        gelu: GELU in place of SiLU.
        backend: ``"fused"``, ``"reference"`` or ``"auto"``.

    Returns:
        [...,D].
    """
    if resolve_backend("experts", backend, ("fused", "reference")) == "reference":
        return _reference(x, gate_up, down, chosen, weights, gelu)
    E = gate_up.shape[0]
    gate, up = (x @ gate_up.flatten(0, 1).T).unflatten(-1, (E, -1)).chunk(2, -1)
    hit = chosen[..., None] == torch.arange(E, device=x.device)
    share = (weights[..., None] * hit).sum(-2)
    hidden = _act(gate, gelu) * up * share[..., None]
    return hidden.flatten(-2) @ down.flatten(1).T


def _reference(
    x: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, weights: Tensor, gelu: bool
) -> Tensor:
    pieces = []
    tokens = (y.reshape(-1, y.shape[-1]).split(_PIECE) for y in (x, chosen, weights))
    for x_nd, chosen_nk, weights_nk in zip(*tokens, strict=True):
        gate, up = torch.einsum("nd,nkfd->nkf", x_nd, gate_up[chosen_nk]).chunk(2, -1)
        hidden = _act(gate, gelu) * up * weights_nk[..., None]
        pieces.append(torch.einsum("nkf,nkdf->nd", hidden, down.transpose(0, 1)[chosen_nk]))
    return torch.cat(pieces).reshape(x.shape)


def _act(x: Tensor, gelu: bool) -> Tensor:
    return F.gelu(x) if gelu else F.silu(x)
