"""The gated matrix memory in chunks of tokens: matrix products, exact gradients, any batch of replicas.

The arithmetic is in passes.py. Here it is applied to a few sequences at a time, so that the intermediate
tensors stay in the processor's cache, and wrapped into autograd functions that fold the replicas of
``torch.func.vmap``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from kernels.folding import fold, unfold
from kernels.gated_memory.passes import Inputs, backward, chunks_of, forward

# Elements of one input tensor in a block of sequences: large enough to hide the cost of calling torch.
BLOCK = 2**17


def gated_memory_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase: Tensor | None,
    write: Tensor | None,
    decay_sign: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute what ``gated_memory_reference`` computes, chunk by chunk; arguments as there.

    Exact gradients; under ``torch.func.vmap`` replicas are folded into the batch. Outputs are in the dtype of
    the state.
    """
    B, T, H, K = k.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    state = (
        k.new_zeros(B, H, K, v.shape[-1], dtype=dtype) if initial_state is None else initial_state.to(dtype)
    )
    if T == 0:
        return v.to(dtype), state
    if decay_sign is not None:
        # S_t = diag(sign_1 ... sign_t) S'_t, and S' decays by |decay|: the sign moves into q, k and so e.
        sign = (1 - 2 * ((decay_sign < 0).cumsum(1) % 2)).to(q.dtype)
        sign = sign[..., None] if sign.dim() == 3 else sign
        q, k = q * sign, k * sign
    inputs = Inputs(q, k, v, log_decay, erase, write).map(lambda x: x.to(dtype))
    o, state, *_ = (_one_token if T == 1 else _Forward.apply)(*inputs, state, scale)
    return o, state if decay_sign is None else state * sign[:, -1, :, :, None].to(dtype)


def _one_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase: Tensor | None,
    write: Tensor | None,
    state: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One step of the recurrence, in plain differentiable operations: what decoding token by token calls."""
    q_bhk, k_bhk, z_bhv = q[:, 0], k[:, 0], v[:, 0]
    if write is not None:
        z_bhv = z_bhv * write[:, 0].reshape(*z_bhv.shape[:2], -1)
    if log_decay is not None:
        state = state * log_decay[:, 0].reshape(*k_bhk.shape[:2], -1, 1).exp()
    if erase is not None:
        e_bhk = k_bhk * erase[:, 0].reshape(*k_bhk.shape[:2], -1)
        z_bhv = z_bhv - (e_bhk[..., None, :] @ state)[..., 0, :]
    state = state + k_bhk[..., None] * z_bhv[..., None, :]
    return (q_bhk[:, None, :, None, :] * scale @ state[:, None])[..., 0, :], state


class _Forward(Function):
    """Outputs, last state, and what the backward pass would be slow to compute again."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        *tensors, state, scale = args
        B, T, H, _ = tensors[1].shape
        J, C = chunks_of(Inputs(*tensors))
        inputs = Inputs(*tensors).map(lambda x: _padded(x, J * C))
        o, last = torch.empty_like(inputs.v, memory_format=torch.contiguous_format), torch.empty_like(state)
        saved: list[Tensor] = []
        for b in _blocks(inputs):
            last_xkv, kept = forward(inputs.part(b), state[b].flatten(0, 1), scale, o[b])
            last[b] = last_xkv.view_as(last[b])
            if not saved:
                saved = [x.new_empty(J, B, H, *x.shape[1:]) for x in kept]
            for whole, x in zip(saved, kept, strict=True):
                whole[:, b] = x.view_as(whole[:, b])
        # The batch axis first: replicas are folded into it.
        return o[:, :T], last, *(x.transpose(0, 1) for x in saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, _, scale = inputs
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[2:])
        ctx.scale = scale

    @staticmethod
    def backward(
        ctx: Any, grad_o: Tensor | None, grad_state: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        inputs = Inputs(*ctx.saved_tensors[:6])
        if grad_o is None:
            grad_o = torch.zeros_like(inputs.v)
        if grad_state is None:
            grad_state = inputs.k.new_zeros(*inputs.k.shape[::2], inputs.k.shape[3], inputs.v.shape[3])
        grads = iter(_Backward.apply(*ctx.saved_tensors, grad_o, grad_state, ctx.scale))
        return *(None if x is None else next(grads) for x in inputs), next(grads), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], Any]:
        return _fold_replicas(_Forward, info.batch_size, in_dims, args)


class _Backward(Function):
    """The gradient as a function of its own, so that vmap over grad folds replicas too."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        *tensors, grad_o, grad_state, scale = args
        T = grad_o.shape[1]
        J, C = chunks_of(Inputs(*tensors[:6]))
        inputs = Inputs(*tensors[:6]).map(lambda x: _padded(x, J * C))
        saved = [x.transpose(0, 1) for x in tensors[6:]]
        grad_o = _padded(grad_o, J * C)
        grads = inputs.map(lambda x: torch.empty(x.shape, dtype=x.dtype, device=x.device))
        grad_start = torch.empty(grad_state.shape, dtype=grad_state.dtype, device=grad_state.device)
        for b in _blocks(inputs):
            kept = [x[:, b].reshape(-1, *x.shape[3:]) for x in saved]
            start_xkv = backward(
                inputs.part(b),
                kept,
                grad_o[b],
                grad_state[b].flatten(0, 1),
                scale,
                grads.part(b),
            )
            grad_start[b] = start_xkv.view_as(grad_start[b])
        return *(x[:, :T] for x in grads if x is not None), grad_start

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError("gated_memory: second derivatives need backend='reference'")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], Any]:
        return _fold_replicas(_Backward, info.batch_size, in_dims, args)


def _blocks(inputs: Inputs) -> Iterator[slice]:
    """Cut the batch into slices whose tensors have about BLOCK elements."""
    B, T, H, K = inputs.k.shape
    blocks = max(1, round(B * T * H * max(K, inputs.v.shape[-1]) / BLOCK))
    size = max(1, -(-B // blocks))
    return (slice(b, b + size) for b in range(0, B, size))


def _padded(x: Tensor, length: int) -> Tensor:
    """Extend [B,T,...] with zeros to ``length`` tokens: they leave the memory as it is."""
    missing = length - x.shape[1]
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing)) if missing else x


def _fold_replicas(
    function: type[Function], replicas: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """Run ``function`` with the replicas on the batch axis, which is the first of every tensor."""
    *tensors, scale = args
    return unfold(replicas, function.apply(*fold(replicas, in_dims[:-1], tensors), scale))
