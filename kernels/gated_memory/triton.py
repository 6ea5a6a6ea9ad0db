"""The gated memory on a GPU: Triton kernels behind one autograd function, safe under ``torch.func.vmap``.

Import this module only where Triton is installed. ``TRITON_INTERPRET=1``, set before Triton is imported,
runs the same kernels on CPU tensors (slowly).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from kernels.folding import fold, unfold
from kernels.gated_memory.triton_backward import state_backward_kernel, value_backward_kernel
from kernels.gated_memory.triton_forward import forward_kernel
from kernels.gated_memory.triton_keys import key_backward_kernel
from kernels.gated_memory.triton_launch import (
    Launch,
    block_of,
    constants,
    kind_of,
    launch_of,
    precisions,
    product_type,
)
from kernels.gated_memory.triton_pairs import pair_backward_kernel
from kernels.gated_memory.triton_prepare import prepare_kernel
from kernels.gated_memory.triton_step import step_kernel

__all__ = ["Launch", "gated_memory_triton"]

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
    if torch.compiler.is_compiling():  # a graph break: the kernels need no further compilation
        return torch.compiler.disable(gated_memory_triton)(
            q, k, v, log_decay, erase, write, decay_sign, scale, initial_state
        )
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


class GatedMemory(torch.autograd.Function):
    """The inputs, the scale and whether to keep intermediates -> o, final state, and what the backward needs.

    That is, for each chunk: A, X, Qbar, Kbar, Ebar, the decays, R, and the state that enters (each
    empty where it is not kept or not there).
    """

    @staticmethod
    def forward(q, k, v, log_decay, erase, write, initial, scale, keep):
        """Launch the forward kernels."""
        q, k, v, log_decay, erase, write, initial = contiguous(q, k, v, log_decay, erase, write, initial)
        B, T, H, K = k.shape
        V = v.shape[-1]
        launch = launch_of(k, v, log_decay)
        C = launch.chunk
        N = triton.cdiv(T, C)
        erases, channels = erase is not None, kind_of(log_decay) == 2
        # operands of products alone, so they may take the products' type
        made = functools.partial(torch.empty, dtype=product_type(k, v), device=v.device)
        o = torch.empty_like(v)
        final = torch.empty(B, H, K, V, dtype=torch.float32, device=v.device)
        narrow = made.keywords["dtype"] == torch.bfloat16
        scores = made(B, H, N, C, C)
        inverse = made(B, H, N if erases else 0, 2 if narrow else 1, C, C)
        q_in, k_out = (made(B, H, N * C if channels else 0, K) for _ in range(2))
        e_in = made(B, H, N * C if erases and (channels or kind_of(erase) == 2) else 0, K)
        decays = torch.empty(
            (B, H, N, K) if channels else (B, H, N if log_decay is not None else 0, 2, C),
            dtype=torch.float32, device=v.device,
        )  # fmt: skip
        # sums over repeated keys cancel: to 2^-16 only in fp32
        r = torch.empty(B, H, N * C if erases and keep else 0, V, dtype=torch.float32, device=v.device)
        states = made(B, H, N if keep else 0, K, V)
        common, kinds = constants(k, v, log_decay, erase, C)
        modes = precisions(narrow, v)
        if B * H > 0:
            with device_of(v):
                if N > 0:
                    prepare_kernel[(B * H * N,)](
                        q, k, log_decay, erase, scores, inverse, q_in, k_out, e_in, decays, scale, T, H,
                        K=K, C=C, RAGGED=common["RAGGED"], BK=launch.pair_block if channels else block_of(K),
                        NARROW=narrow, PRECISION=modes["PRECISION"], LEFT=modes["LEFT"], EXACT=modes["EXACT"],
                        SUMS=modes["RIGHT"], num_warps=launch.prepare_warps, num_stages=1, **kinds,
                    )  # fmt: skip
                key_in, key_out = (q_in, k_out) if channels else (q, k)
                BV = min(launch.value_block, block_of(V))
                forward_kernel[(B * H, triton.cdiv(V, BV))](
                    key_in, key_out, v, erase, write, initial, scores, inverse, e_in, r, decays,
                    o, final, states, scale, T, H, BK=block_of(K), BV=BV, WRITE=kind_of(write),
                    HAS_INITIAL=initial is not None, STORE=keep, NARROW=narrow,
                    PRECISION=modes["PRECISION"], RIGHT=modes["RIGHT"],
                    num_warps=launch.state_warps, num_stages=launch.stages, **common, **kinds,
                )  # fmt: skip
        return o, final, scores, inverse, q_in, k_out, e_in, decays, r, states

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
        folded = fold(info.batch_size, in_dims[:7], inputs[:7])
        return unfold(info.batch_size, GatedMemory.apply(*folded, *inputs[7:]))


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
    def forward(
        q, k, v, log_decay, erase, write, initial, scores, inverse, q_in, k_out, e_in, decays, r, states,
        do, d_final, scale,
    ):  # fmt: skip
        """Launch the backward kernels."""
        do = torch.zeros_like(v) if do is None else do
        q, k, v, log_decay, erase, write, do, d_final = contiguous(
            q, k, v, log_decay, erase, write, do, d_final
        )
        B, T, H, K = k.shape
        V = v.shape[-1]
        launch = launch_of(k, v, log_decay)
        C = launch.chunk
        N = triton.cdiv(T, C)
        dq, dk, dv, d_erase, d_write = (
            None if x is None else torch.empty_like(x) for x in (q, k, v, erase, write)
        )
        d_log_decay = None if log_decay is None else torch.empty_like(log_decay, dtype=torch.float32)
        d_initial = None
        if initial is not None:
            d_initial = torch.empty(initial.shape, dtype=torch.float32, device=v.device)
        d_states = torch.empty_like(states)
        dz = torch.empty(B, H, N * C, V, dtype=scores.dtype, device=v.device)
        d_scores = torch.empty_like(scores, dtype=scores.dtype if erase is None else torch.float32)
        channels = kind_of(log_decay) == 2
        de = torch.empty_like(k) if channels and erase is not None else None
        d_triangle = torch.empty_like(d_scores) if erase is not None else d_scores  # not used
        common, kinds = constants(k, v, log_decay, erase, C)
        narrow = scores.dtype == torch.bfloat16
        modes = precisions(narrow, v)
        key_in, key_out = (q_in, k_out) if channels else (q, k)
        BV = min(launch.value_block, block_of(V))
        if B * H > 0:
            with device_of(v):
                state_backward_kernel[(B * H, triton.cdiv(V, BV))](
                    key_in, key_out, erase, scores, inverse, e_in, decays, do, d_final, dz, d_states,
                    d_initial, scale, T, H, BK=block_of(K), BV=BV, HAS_FINAL=d_final is not None,
                    HAS_INITIAL=initial is not None, NARROW=narrow, PRECISION=modes["PRECISION"],
                    RIGHT=modes["RIGHT"], num_warps=launch.state_warps, num_stages=launch.stages,
                    **common, **kinds,
                )  # fmt: skip
                if N > 0:
                    value_backward_kernel[(B * H * N,)](
                        q, k, v, log_decay, erase, write, r, dz, do, dv, d_write, d_log_decay,
                        d_scores, d_triangle, scale, T, H, BK=block_of(K), BV=min(64, block_of(V)),
                        WRITE=kind_of(write), PRECISION=modes["PRECISION"], RIGHT=modes["RIGHT"],
                        num_warps=launch.chunk_warps, num_stages=launch.chunk_stages, **common, **kinds,
                    )  # fmt: skip
                    key_backward_kernel[(B * H * N,)](
                        q, k, v, log_decay, erase, write, states, d_states, r, dz, do, d_scores, d_triangle,
                        decays, dq, dk, de, d_log_decay, d_erase, scale, T, H,
                        BK=launch.key_block, BV=min(64, block_of(V)), WRITE=kind_of(write),
                        PRECISION=modes["PRECISION"], LEFT=modes["LEFT"], SUMS=modes["RIGHT"],
                        num_warps=launch.chunk_warps, num_stages=launch.chunk_stages, **common, **kinds,
                    )  # fmt: skip
                    if channels:
                        pair_backward_kernel[(B * H * N,)](
                            q, k, log_decay, erase, d_scores, d_triangle, dq, dk, de, d_log_decay, d_erase,
                            T, H, K=K, C=C, RAGGED=common["RAGGED"], BK=launch.pair_block,
                            ERASE=kinds["ERASE"], PRECISION=modes["PRECISION"], LEFT=modes["LEFT"],
                            SUMS=modes["RIGHT"],
                            num_warps=launch.pair_warps, num_stages=1,
                        )  # fmt: skip
        d_initial = None if d_initial is None else d_initial.to(initial.dtype)
        d_log_decay = None if d_log_decay is None else d_log_decay.to(log_decay.dtype)
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
        folded = fold(info.batch_size, in_dims[:-1], inputs[:-1])
        return unfold(info.batch_size, GatedMemoryBackward.apply(*folded, inputs[-1]))


def transforms_active() -> bool:
    """Whether a ``torch.func`` transform (vmap, grad) is running."""
    return torch._C._are_functorch_transforms_active()


def contiguous(*tensors: Tensor | None) -> list:
    """Row-major copies where needed: the kernels address by shape."""
    return [None if x is None else x.contiguous() for x in tensors]


def device_of(x: Tensor):
    """Make the tensor's GPU the current one for a launch."""
    elsewhere = x.is_cuda and x.device.index != torch.cuda.current_device()
    return torch.cuda.device(x.device) if elsewhere else contextlib.nullcontext()
