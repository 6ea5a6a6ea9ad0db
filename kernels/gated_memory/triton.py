"""The gated memory on a GPU: Triton kernels behind one autograd function, safe under ``torch.func.vmap``.

Import this module only where Triton is installed. ``TRITON_INTERPRET=1``, set before Triton is imported, runs the same
kernels on CPU tensors (slowly).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernels.gated_memory.triton_backward import backward_kernel
from kernels.gated_memory.triton_forward import forward_kernel

__all__ = ["gated_memory_triton"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_DIM = 256


def gated_memory_triton(
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
    """Run the gated memory (see :func:`kernels.gated_memory` for shapes and meaning) with the Triton kernels.

    The state, the sums of log decays and the triangular solve are fp32; for fp32 inputs so are the other products, for
    16-bit inputs those take tf32 operands. Deterministic. Any T; the key and value widths go to 256.

    Raises:
        ValueError: for float64 inputs (use ``backend="reference"``) or a head dimension above 256.
    """
    if q.dtype not in FLOATS or k.dtype not in FLOATS or v.dtype not in FLOATS:
        raise ValueError(f"the triton backend takes float32, bfloat16 or float16, not {q.dtype}, {k.dtype}, {v.dtype}")
    if max(k.shape[-1], v.shape[-1]) > MAX_DIM:
        raise ValueError(f"the triton backend takes head dimensions up to {MAX_DIM}, not {k.shape[-1]}, {v.shape[-1]}")
    sign = None
    if decay_sign is not None and log_decay is not None and q.shape[1] > 0:
        # S_t = diag(sign_1 ... sign_t) S'_t, where S' decays by |decay|: the running sign moves into q and k (and so e)
        sign = (1 - 2 * ((decay_sign < 0).cumsum(1) % 2)).to(q.dtype)
        sign = sign[..., None] if sign.dim() == 3 else sign
        q, k = q * sign, k * sign
    o, state, _ = GatedMemory.apply(
        q, k, v, log_decay, erase, write, initial_state, scale, torch.is_grad_enabled()
    )
    if sign is not None:
        state = state * sign[:, -1, :, :, None].to(state.dtype)
    return o, state


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a kernel is launched; chosen by :func:`launch_of` from the head dimensions alone."""

    chunk: int
    """Tokens a chunk, a power of two of at least 16."""
    value_block: int
    """Value columns a program."""
    warps: int
    """Warps a program."""


def launch_of(key_width: int, value_width: int, *, backward: bool) -> Launch:
    """Chunk, value tile and warps by head dimension."""
    wide = max(block_of(key_width), block_of(value_width))
    if wide <= 32:
        return Launch(chunk=16, value_block=32, warps=2 if backward else 1)
    if wide <= 64:
        return Launch(chunk=16, value_block=64, warps=4)
    return Launch(chunk=16, value_block=32, warps=4)


def block_of(width: int) -> int:
    """The block that holds a head dimension: a power of two, at least the 16 that a matrix product needs."""
    return max(16, triton.next_power_of_2(width))


class GatedMemory(torch.autograd.Function):
    """q, k, v, log_decay, erase, write, initial_state, scale, store_states -> o, final state, chunk states."""

    @staticmethod
    def forward(q, k, v, log_decay, erase, write, initial, scale, store_states):
        """Launch the forward; the chunk states (empty unless ``store_states``) are what the backward starts from."""
        q, k, v, log_decay, erase, write, initial = contiguous(q, k, v, log_decay, erase, write, initial)
        B, T, H, K = k.shape
        V = v.shape[-1]
        launch = launch_of(K, V, backward=False)
        chunks = triton.cdiv(T, launch.chunk)
        o = torch.empty_like(v)
        final = torch.empty(B, H, K, V, dtype=torch.float32, device=v.device)
        states = torch.empty(
            (B, H, chunks, K, V) if store_states else (B, 0), dtype=torch.float32, device=v.device
        )
        grid = (B * H, triton.cdiv(V, min(launch.value_block, block_of(V))))
        if B * H > 0:
            with device_of(v):
                forward_kernel[grid](
                    q, k, v, log_decay, erase, write, initial, o, final, states, scale, T, H,
                    HAS_INITIAL=initial is not None,
                    STORE_STATES=store_states,
                    **constants(k, v, log_decay, erase, write, launch),
                )  # fmt: skip
        return o, final, states

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keep the inputs and the chunk states."""
        q, k, v, log_decay, erase, write, initial, scale, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(q, k, v, log_decay, erase, write, initial, output[2])
        ctx.scale = scale

    @staticmethod
    def backward(ctx, do, d_final, _d_states):
        """Hand over to the backward's own function, which has a batching rule of its own."""
        grads = GatedMemoryBackward.apply(*ctx.saved_tensors, do, d_final, ctx.scale)
        return (*grads, None, None)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        """Fold the replicas into the batch."""
        folded = [fold(x, dim, info.batch_size) for x, dim in zip(inputs, in_dims, strict=True)]
        return unfold(GatedMemory.apply(*folded), info.batch_size)


class GatedMemoryBackward(torch.autograd.Function):
    """The inputs of :class:`GatedMemory`, its chunk states and the gradients of its outputs -> its inputs' gradients."""

    @staticmethod
    def forward(q, k, v, log_decay, erase, write, initial, states, do, d_final, scale):
        """Launch the backward and add the shares of the value tiles."""
        B, T, H, K = k.shape
        V = v.shape[-1]
        do = torch.zeros_like(v) if do is None else do
        d_final = (
            torch.zeros(B, H, K, V, dtype=torch.float32, device=v.device) if d_final is None else d_final
        )
        q, k, v, log_decay, erase, write, initial, do, d_final = contiguous(
            q, k, v, log_decay, erase, write, initial, do, d_final
        )
        launch = launch_of(K, V, backward=True)
        tiles = triton.cdiv(V, min(launch.value_block, block_of(V)))
        dq, dk, d_log_decay, d_erase = (shares_of(x, tiles) for x in (q, k, log_decay, erase))
        d_write = shares_of(write, tiles if write is not None and write.dim() == 3 else 1)
        dv = torch.empty_like(v)
        d_initial = None if initial is None else torch.empty_like(d_final)
        if B * H > 0:
            with device_of(v):
                backward_kernel[(B * H, tiles)](
                    q, k, v, log_decay, erase, write, states, do, d_final,
                    dq, dk, dv, d_log_decay, d_erase, d_write, d_initial, scale, T, H, B * T * H,
                    HAS_INITIAL=initial is not None,
                    **constants(k, v, log_decay, erase, write, launch),
                )  # fmt: skip
        d_initial = None if initial is None else d_initial.to(initial.dtype)
        return (
            total_of(dq, q),
            total_of(dk, k),
            dv,
            total_of(d_log_decay, log_decay),
            total_of(d_erase, erase),
            total_of(d_write, write),
            d_initial,
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Nothing is kept: there is no second derivative."""

    @staticmethod
    def backward(ctx, *grads):
        """Second derivatives are not implemented."""
        raise NotImplementedError("the triton backend has no second derivative; use backend='reference'")

    @staticmethod
    def vmap(info, in_dims, *inputs):
        """Fold the replicas into the batch."""
        folded = [fold(x, dim, info.batch_size) for x, dim in zip(inputs, in_dims, strict=True)]
        return unfold(GatedMemoryBackward.apply(*folded), info.batch_size)


def constants(k: Tensor, v: Tensor, log_decay, erase, write, launch: Launch) -> dict:
    """The compile-time arguments that both kernels take."""
    K, V = k.shape[-1], v.shape[-1]
    wide = k.dtype == torch.float32 or v.dtype == torch.float32
    exact = "tf32x3" if v.is_cuda and torch.version.hip is None else "ieee"
    return {
        "K": K,
        "V": V,
        "C": launch.chunk,
        "LEVELS": launch.chunk.bit_length() - 1,
        "BK": block_of(K),
        "BV": min(launch.value_block, block_of(V)),
        "DECAY": kind_of(log_decay),
        "ERASE": kind_of(erase),
        "WRITE": kind_of(write),
        "PRECISION": exact if wide or exact == "ieee" else "tf32",
        "EXACT": exact,
        "num_warps": launch.warps,
    }


def kind_of(gate: Tensor | None) -> int:
    """0 absent, 1 a scalar a token, 2 a value a channel."""
    return 0 if gate is None else gate.dim() - 2


def shares_of(x: Tensor | None, tiles: int) -> Tensor | None:
    """Room for a gradient of ``x``: its own type for one tile, else a fp32 share a tile."""
    if x is None:
        return None
    return torch.empty_like(x)[None] if tiles == 1 else x.new_empty(tiles, *x.shape, dtype=torch.float32)


def total_of(shares: Tensor | None, x: Tensor | None) -> Tensor | None:
    """The sum of the tiles' shares in the type of ``x``."""
    if shares is None or x is None:
        return None
    return shares[0] if shares.shape[0] == 1 else shares.sum(0).to(x.dtype)


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """Row-major copies where needed: the kernels address by shape."""
    return [None if x is None else x.contiguous() for x in tensors]


def device_of(x: Tensor):
    """Make the tensor's GPU the current one for a launch."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def fold(x, dim: int | None, replicas: int):
    """Move a replica axis into the batch axis (axis 0); what has none is repeated."""
    if not isinstance(x, Tensor):
        return x
    x = x.expand(replicas, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.reshape(replicas * x.shape[1], *x.shape[2:])


def unfold(outputs, replicas: int):
    """Undo :func:`fold` for the outputs of a function, with their axes."""
    split = tuple(None if x is None else x.unflatten(0, (replicas, -1)) for x in outputs)
    return split, tuple(None if x is None else 0 for x in split)
