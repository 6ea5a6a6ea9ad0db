"""Causal softmax attention, whole or in a sliding window, that a fleet of replicas runs as one batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.folding import fold, unfold

__all__ = ["attention", "attention_composed", "attention_mask"]


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, scale: float | None = None
) -> Tensor:
    """o_t = sum_s softmax_s(scale * q_t . k_s) v_s over the keys that query t may see.

    The queries are the last Tq of the Tk positions. A query sees itself and what is before it, of that at
    most the ``window`` - 1 nearest.

    Args:
        q: [B,Tq,H,K].
        k: [B,Tk,H,K] with Tk >= Tq: keys of earlier tokens may precede those of the queries.
        v: [B,Tk,H,V].
        window: Number of positions seen, the query's own included; None means all. Time and memory are linear
            in Tq where the window is short against it.
        scale: Factor on the scores; None means K ** -0.5.

    Returns:
        o [B,Tq,H,V].

    Raises:
        ValueError: If shapes do not fit or the window is not positive.
    """
    B, Tq, H, K = q.shape
    Tk = k.shape[1]
    if k.shape != (B, Tk, H, K) or v.shape[:3] != (B, Tk, H) or Tk < Tq:
        raise ValueError(
            "attention needs q [B,Tq,H,K], k [B,Tk,H,K], v [B,Tk,H,V] with Tk >= Tq, got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if window is not None and window >= Tk:
        window = None
    scale = K**-0.5 if scale is None else scale
    # Function.apply itself asks this question. Under a functorch transform the Function brings the vmap rule;
    # otherwise torch's own backward is better, for it recomputes nothing.
    if torch._C._are_functorch_transforms_active():
        return _Attention.apply(q, k, v, window, scale)
    return _attend(q, k, v, window, scale)


def attention_composed(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, scale: float | None = None
) -> Tensor:
    """:func:`attention` of plain operations, which can be differentiated any number of times, under vmap too.

    Slower: it holds the weights of all pairs. Shapes and meaning as there.
    """
    scores = torch.einsum("bthk,bshk->bhts", q * (q.shape[-1] ** -0.5 if scale is None else scale), k)
    seen = attention_mask(q.shape[1], k.shape[1], window, q.device)
    return torch.einsum("bhts,bshv->bthv", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def attention_mask(
    queries: int, keys: int, window: int | None = None, device: torch.device | None = None
) -> Tensor:
    """Which key each of the last ``queries`` of ``keys`` positions sees: bool [queries, keys]."""
    ahead = torch.arange(keys, device=device) - torch.arange(keys - queries, keys, device=device)[:, None]
    return (ahead <= 0) if window is None else (ahead <= 0) & (ahead > -window)


def _attend(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    Tq, Tk = q.shape[1], k.shape[1]
    if window is None:
        return _sdpa(q, k, v, None if Tq in (1, Tk) else attention_mask(Tq, Tk, device=q.device), scale)
    # Key positions that no query sees: all before the window of the first query.
    unseen = max(Tk - Tq - (window - 1), 0)
    k, v, Tk = k[:, unseen:], v[:, unseen:], Tk - unseen
    block = max(window - 1, 32)
    if Tq <= 2 * block:
        return _sdpa(q, k, v, attention_mask(Tq, Tk, window, q.device), scale)
    return _attend_banded(q, k, v, window, block, scale)


def _attend_banded(q: Tensor, k: Tensor, v: Tensor, window: int, block: int, scale: float) -> Tensor:
    """Cut the queries into blocks so long that each sees its own keys and those of the block before."""
    B, Tq = q.shape[:2]
    n = -(-Tq // block)
    front, back = block - (k.shape[1] - Tq), n * block - Tq
    q = F.pad(q, (0, 0, 0, 0, 0, back)).unflatten(1, (n, block)).flatten(0, 1)

    def pairs(x: Tensor) -> Tensor:
        blocks = F.pad(x, (0, 0, 0, 0, front, back)).unflatten(1, (n + 1, block))
        return torch.cat([blocks[:, :-1], blocks[:, 1:]], 2).flatten(0, 1)

    band = attention_mask(block, 2 * block, window, q.device)
    real = (
        torch.arange(2 * block, device=q.device) >= front
    )  # only the first block meets the padding in front
    mask = torch.stack([band & real, *[band] * (n - 1)])[:, None].repeat(B, 1, 1, 1)
    return _sdpa(q, pairs(k), pairs(v), mask, scale).unflatten(0, (B, n)).flatten(1, 2)[:, :Tq]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Masked attention; without a mask, causal for as many queries as keys, and full for a single query."""
    causal = mask is None and q.shape[1] > 1
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale).transpose(1, 2)


class _Attention(torch.autograd.Function):
    """Gives :func:`_attend` a vmap rule that folds replicas into the batch: torch's own is a slow loop."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
        return _attend(q, k, v, window, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        q, k, v, ctx.window, ctx.scale = inputs
        ctx.save_for_backward(q, k, v)

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        return *_AttentionGradient.apply(*ctx.saved_tensors, do, ctx.window, ctx.scale), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        """Fold the mapped axis into the batch."""
        q, k, v = fold(info.batch_size, in_dims[:3], args[:3])
        o = attention(q, k, v, window=args[3], scale=args[4])
        return o.unflatten(0, (info.batch_size, -1)), 0


class _AttentionGradient(torch.autograd.Function):
    """The gradient by recomputation, for a vmap over a gradient (the other order needs it not)."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, do: Tensor, window: int | None, scale: float
    ) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
            return torch.autograd.grad(_attend(q, k, v, window, scale), (q, k, v), do)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            "attention under torch.func has no second derivative; attention_composed has"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        """Fold the mapped axis into the batch."""
        folded = fold(info.batch_size, in_dims[:4], args[:4])
        grads = _AttentionGradient.apply(*folded, *args[4:])
        return unfold(info.batch_size, grads)
