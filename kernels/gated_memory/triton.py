"""The gated memory on a GPU: Triton kernels behind one autograd function, safe under ``torch.func.vmap``.

Import this module only where Triton is installed. ``TRITON_INTERPRET=1``, set before Triton is imported,
runs the same kernels on CPU tensors (slowly).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernels.gated_memory.triton_backward import chunk_backward_kernel, state_backward_kernel
from kernels.gated_memory.triton_forward import forward_kernel, scores_kernel
from kernels.gated_memory.triton_step import step_kernel

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

    The state, the sums of log decays and the triangular solve are fp32; so are the other products, but for
    bf16 inputs those that feed the state are good to 2^-16 and the rest take bf16 operands. Deterministic.
    Any T; head dimensions to 256.

    Raises:
        ValueError: for float64 inputs (use ``backend="reference"``), a head dimension above 256, or a
            sequence of 2^31 numbers or more (offsets inside one are 32 bits).
    """
    if q.dtype not in FLOATS or k.dtype not in FLOATS or v.dtype not in FLOATS:
        raise ValueError(
            f"the triton backend takes float32, bfloat16 or float16, not {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if max(k.shape[-1], v.shape[-1]) > MAX_DIM:
        raise ValueError(
            f"the triton backend takes head dimensions up to {MAX_DIM}, not {k.shape[-1]}, {v.shape[-1]}"
        )
    T = q.shape[1]
    if T * q.shape[2] * max(k.shape[-1], v.shape[-1]) >= 2**31:
        raise ValueError(
            f"the triton backend takes sequences of fewer than 2^31 numbers, not {tuple(q.shape)}"
        )
    if T == 1 and not torch.is_grad_enabled() and not transforms_active():
        gates = [None if x is None else x[:, 0] for x in (log_decay, erase, write, decay_sign)]
        o, state = step(q[:, 0], k[:, 0], v[:, 0], *gates, scale=scale, state=initial_state)
        return o[:, None], state
    sign = None
    if decay_sign is not None and log_decay is not None and T > 0:
        # S_t = diag(sign_1 ... sign_t) S'_t, where S' decays by |decay|: the running sign moves into q, k, e
        sign = (1 - 2 * ((decay_sign < 0).cumsum(1) % 2)).to(q.dtype)
        sign = sign[..., None] if sign.dim() == 3 else sign
        q, k = q * sign, k * sign
    keep = torch.is_grad_enabled()
    run: Callable = GatedMemory.apply
    if not transforms_active():
        run = PlainGatedMemory.apply if keep else GatedMemory.forward
    o, state, *_ = run(q, k, v, log_decay, erase, write, initial_state, scale, keep)
    if sign is not None:
        state = state * sign[:, -1, :, :, None].to(state.dtype)
    return o, state


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase: Tensor | None,
    write: Tensor | None,
    decay_sign: Tensor | None,
    *,
    scale: float,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One token without gradients: all shapes as above less the time axis; the given state is not changed."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    log_decay, erase, write, decay_sign, state = contiguous(log_decay, erase, write, decay_sign, state)
    B, H, K = k.shape
    V = v.shape[-1]
    o = torch.empty_like(v)
    following = torch.empty(B, H, K, V, dtype=torch.float32, device=v.device)
    key_block = block_of(K)
    value_block = min(block_of(V), max(16, 2048 // key_block))
    kinds = [0 if x is None else x.dim() - 1 for x in (log_decay, erase, write, decay_sign)]
    if B * H > 0:
        with device_of(v):
            step_kernel[(B * H, triton.cdiv(V, value_block))](
                q, k, v, log_decay, erase, write, decay_sign, state, o, following, scale,
                K=K, V=V, BK=key_block, BV=value_block,
                DECAY=kinds[0], ERASE=kinds[1], WRITE=kinds[2], SIGN=kinds[3], HAS_STATE=state is not None,
                num_warps=2,
            )  # fmt: skip
    return o, following


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How the kernels are launched; chosen by :func:`launch_of`."""

    chunk: int
    """Tokens a chunk, a power of two of at least 16."""
    value_block: int
    """Value columns a program."""
    scores_warps: int
    """Warps a program of the kernel that makes the scores of all chunks at once; 0: no such kernel, the
    forward makes them on its way (one launch)."""
    state_warps: int
    """Warps a program of the two kernels that carry the state through the chunks."""
    chunk_warps: int
    """Warps a program of the backward over all chunks at once."""
    stages: int
    """Chunks whose loads are under way at once; each takes its share of shared memory."""


def launch_of(k: Tensor, v: Tensor, log_decay: Tensor | None) -> Launch:
    """The settings for a shape, by measurement on a H100 (``python -m kernels.gpu_check sweep``).

    No chunk of 64: its products take Hopper's warp-group instructions, and with Triton 3.6 they are slower
    here and in one setting read outside of memory.
    """
    B, _, H, K = k.shape
    width = max(block_of(K), block_of(v.shape[-1]))
    many = B * H >= 1024
    narrow = narrow_products(k, v)
    if width <= 32:
        return Launch(
            chunk=16,
            value_block=32,
            scores_warps=0 if many else 1,
            state_warps=1 if many else 2,
            chunk_warps=1 if narrow else 2,
            stages=3,
        )
    if width <= 64:
        warps = 2 if narrow else 4
        return Launch(chunk=16, value_block=64, scores_warps=1, state_warps=4, chunk_warps=warps, stages=3)
    if width <= 128 and narrow:
        channel = kind_of(log_decay) == 2
        warps = 8 if channel else 4
        block = 64 if channel else 32
        return Launch(
            chunk=32, value_block=block, scores_warps=4, state_warps=warps, chunk_warps=warps, stages=2
        )
    if width <= 128:
        return Launch(chunk=32, value_block=32, scores_warps=4, state_warps=4, chunk_warps=8, stages=2)
    return Launch(chunk=16, value_block=32, scores_warps=4, state_warps=8, chunk_warps=8, stages=1)


def narrow_products(k: Tensor, v: Tensor) -> bool:
    """Whether products may take 16-bit operands: only where keys and values are bf16 themselves."""
    return k.dtype == v.dtype == torch.bfloat16


def block_of(width: int) -> int:
    """The block that holds a head dimension: a power of two, at least the 16 that a matrix product needs."""
    return max(16, triton.next_power_of_2(width))


class GatedMemory(torch.autograd.Function):
    """The inputs, the scale and whether to keep chunk states -> o, final state, and what the backward needs.

    That is the states that enter the chunks, and the chunks' scores and inverses (empty where not kept).
    """

    @staticmethod
    def forward(q, k, v, log_decay, erase, write, initial, scale, keep):
        """Launch the forward kernels."""
        q, k, v, log_decay, erase, write, initial = contiguous(q, k, v, log_decay, erase, write, initial)
        B, T, H, K = k.shape
        V = v.shape[-1]
        launch = launch_of(k, v, log_decay)
        n_chunks = triton.cdiv(T, launch.chunk)
        fused = launch.scores_warps == 0

        o = torch.empty_like(v)
        final = torch.empty(B, H, K, V, dtype=torch.float32, device=v.device)
        # the copies are operands of products alone, so they may take the products' type
        copies = torch.bfloat16 if narrow_products(k, v) else torch.float32
        states = torch.empty(B, H, n_chunks if keep else 0, K, V, dtype=copies, device=v.device)
        squares = torch.empty(
            B, H, n_chunks if keep or not fused else 0, 1 if erase is None else 2, launch.chunk, launch.chunk,
            dtype=torch.float32, device=v.device,
        )  # fmt: skip
        common = constants(k, v, log_decay, erase, launch)
        key_block, value_block = block_of(K), min(launch.value_block, block_of(V))
        if B * H > 0:
            with device_of(v):
                if not fused and n_chunks > 0:
                    scores_kernel[(B * H * n_chunks,)](
                        q, k, log_decay, erase, squares, scale, T, H,
                        K=K, BK=key_block, LEVELS=launch.chunk.bit_length() - 1,
                        num_warps=launch.scores_warps, **common,
                    )  # fmt: skip
                forward_kernel[(B * H, triton.cdiv(V, value_block))](
                    q, k, v, log_decay, erase, write, initial, squares, o, final, states, scale, T, H,
                    K=K, V=V, BK=key_block, BV=value_block, LEVELS=launch.chunk.bit_length() - 1,
                    WRITE=kind_of(write), HAS_INITIAL=initial is not None, STORE=keep, FUSED=fused,
                    num_warps=launch.state_warps, **common,
                )  # fmt: skip
        return o, final, states, squares

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keep the inputs and what the forward kept."""
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*inputs[:7], *output[2:])
        ctx.scale = inputs[7]

    @staticmethod
    def backward(ctx, do, d_final, *_):
        """Hand over to the backward's own function, which has a batching rule of its own."""
        # the function matters only to a transform or a second derivative, and apply() costs time
        plain = not torch.is_grad_enabled() and not transforms_active()
        run: Callable = GatedMemoryBackward.forward if plain else GatedMemoryBackward.apply
        return (*run(*ctx.saved_tensors, do, d_final, ctx.scale), None, None)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        """Fold the replicas into the batch."""
        folded = [fold(x, dim, info.batch_size) for x, dim in zip(inputs, in_dims, strict=True)]
        return unfold(GatedMemory.apply(*folded), info.batch_size)


class PlainGatedMemory(torch.autograd.Function):
    """:class:`GatedMemory` without the rules for ``torch.func``, which make every call slower."""

    @staticmethod
    def forward(ctx, *inputs):
        """Launch the forward and keep what the backward needs."""
        output = GatedMemory.forward(*inputs)
        GatedMemory.setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, *grads):
        """As :class:`GatedMemory`."""
        return GatedMemory.backward(ctx, *grads)


class GatedMemoryBackward(torch.autograd.Function):
    """The inputs of :class:`GatedMemory`, what it kept, its outputs' gradients -> its inputs' gradients."""

    @staticmethod
    def forward(q, k, v, log_decay, erase, write, initial, states, squares, do, d_final, scale):
        """Launch the backward kernels."""
        do = torch.zeros_like(v) if do is None else do
        q, k, v, log_decay, erase, write, do, d_final = contiguous(
            q, k, v, log_decay, erase, write, do, d_final
        )
        B, T, H, K = k.shape
        V = v.shape[-1]
        launch = launch_of(k, v, log_decay)
        n_chunks = triton.cdiv(T, launch.chunk)
        dq, dk, dv, d_log_decay, d_erase, d_write = (
            None if x is None else torch.empty_like(x) for x in (q, k, v, log_decay, erase, write)
        )
        d_states = torch.empty_like(states)
        d_initial = None
        if initial is not None:
            d_initial = torch.empty(initial.shape, dtype=torch.float32, device=v.device)
        common = constants(k, v, log_decay, erase, launch)
        key_block, value_block = block_of(K), min(launch.value_block, block_of(V))
        if B * H > 0:
            with device_of(v):
                state_backward_kernel[(B * H, triton.cdiv(V, value_block))](
                    q, k, log_decay, erase, squares, do, d_final, d_states, d_initial, scale, T, H,
                    K=K, V=V, BK=key_block, BV=value_block,
                    HAS_FINAL=d_final is not None, HAS_INITIAL=initial is not None,
                    num_warps=launch.state_warps, **common,
                )  # fmt: skip
                if n_chunks > 0:
                    chunk_backward_kernel[(B * H * n_chunks,)](
                        q, k, v, log_decay, erase, write, squares, states, d_states, do,
                        dq, dk, dv, d_log_decay, d_erase, d_write, scale, T, H,
                        K=K, V=V, BK=key_block, BV=value_block, LEVELS=launch.chunk.bit_length() - 1,
                        WRITE=kind_of(write), num_warps=launch.chunk_warps, **common,
                    )  # fmt: skip
        d_initial = None if d_initial is None else d_initial.to(initial.dtype)
        return dq, dk, dv, d_log_decay, d_erase, d_write, d_initial

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


def constants(k: Tensor, v: Tensor, log_decay: Tensor | None, erase: Tensor | None, launch: Launch) -> dict:
    """The compile-time arguments that all kernels take."""
    exact = "split" if v.is_cuda and torch.version.hip is None else "ieee"
    narrow = narrow_products(k, v) and exact == "split"
    return {
        "C": launch.chunk,
        "DECAY": kind_of(log_decay),
        "ERASE": kind_of(erase),
        "RAGGED": k.shape[1] % launch.chunk != 0,
        "PRECISION": "bf16" if narrow else exact,
        "CARRY": "pair" if narrow else exact,
        "EXACT": exact,
        "num_stages": launch.stages,
    }


def transforms_active() -> bool:
    """Whether a ``torch.func`` transform (vmap, grad) is running."""
    return torch._C._are_functorch_transforms_active()


def kind_of(gate: Tensor | None) -> int:
    """0 absent, 1 a scalar a token, 2 a value a channel."""
    return 0 if gate is None else gate.dim() - 2


def contiguous(*tensors: Tensor | None) -> list:
    """Row-major copies where needed: the kernels address by shape."""
    return [None if x is None else x.contiguous() for x in tensors]


def device_of(x: Tensor):
    """Make the tensor's GPU the current one for a launch."""
    elsewhere = x.is_cuda and x.device.index != torch.cuda.current_device()
    return torch.cuda.device(x.device) if elsewhere else contextlib.nullcontext()


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
