"""The sLSTM on a GPU: Triton kernels behind one autograd function, safe under ``torch.func.vmap``.

Import this module only where Triton is installed. ``TRITON_INTERPRET=1``, set before Triton is imported, runs
the same kernels on CPU tensors (slowly).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.folding import fold, unfold
from kernels.slstm.fused import enter, leave
from kernels.slstm.reference import State, empty_state
from kernels.slstm.triton_kernels import backward_kernel, forward_kernel

__all__ = ["slstm_triton"]


def slstm_triton(gates: Tensor, recurrent: Tensor, initial_state: State | None) -> tuple[Tensor, State]:
    """Shapes and equations of :func:`kernels.slstm`, with the Triton kernels; the initial state in fp32.

    State, gates and their sums are fp32. The products with R are fp32 for fp32 gates, else take tf32 operands
    (heads of more than 64 channels: operands of the gates' type, so that R stays on chip). Deterministic.
    Heads of up to 128 channels; not fp64.
    """
    B, T, _, H, K = gates.shape
    like = gates.new_empty(0, dtype=torch.float32)
    if T == 0 or B == 0:
        return gates.new_zeros(B, T, H, K), initial_state or empty_state(like, B, H, K)
    inputs = (gates, recurrent, *enter(like, B, H, K, initial_state))
    out, *end = SLSTM.apply(*(x[None] for x in inputs), torch.is_grad_enabled())[:5]
    # squeeze, for the gradient of x[0] is a copy into zeros
    return out.squeeze(0), leave(*(x.squeeze(0) for x in end))


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How the kernels are launched; chosen by :func:`launch_of`."""

    batch_block: int
    """Sequences a program, a power of two of at least 16."""
    warps: int
    """Warps a program."""
    resident: bool
    """R stays on chip for the whole sequence."""
    precision: str
    """Operands of the products with R; see ``triton_products.py``."""


def launch_of(gates: Tensor, backward: bool) -> Launch:
    """The settings for gates [G,B,T,4,H,K]: from a sweep on an H100 (``kernels.gpu_bench_conv``)."""
    K = gates.shape[-1]
    if not gates.is_cuda or torch.version.hip is not None:
        precision = "ieee"
    elif gates.dtype == torch.float32:
        precision = "split"
    else:
        precision = "half" if K > 64 else "tf32"
    warps = {16: 1, 32: 4, 64: 8}.get(block_of(K), 8 if backward else 16)
    return Launch(batch_block=16, warps=warps, resident=K <= 64 or precision == "half", precision=precision)


def block_of(width: int) -> int:
    """The block that holds a head: a power of two, at least the 16 that a matrix product needs."""
    return max(16, triton.next_power_of_2(width))


class SLSTM(torch.autograd.Function):
    """Gates [G,B,T,4,H,K], recurrent [G,4,H,K,K], state 4 x [G,B,H,K] -> outputs, state, what was kept."""

    @staticmethod
    def forward(
        gates: Tensor, recurrent: Tensor, h: Tensor, y: Tensor, log_n: Tensor, m: Tensor, keep: bool
    ) -> tuple[Tensor, ...]:
        """Launch the forward kernel."""
        gates, recurrent, *start = (x.contiguous() for x in (gates, recurrent, h, y, log_n, m))
        G, B, T, _, H, K = gates.shape
        out = torch.empty(G, B, T, H, K, dtype=gates.dtype, device=gates.device)
        end = [torch.empty_like(x) for x in start]
        won = torch.empty(G, B, H, K if keep else 0, dtype=torch.int32, device=gates.device)
        saved = torch.empty(G, B, T, 5, H, K if keep else 0, dtype=torch.float32, device=gates.device)
        launch = launch_of(gates, False)
        with device_of(gates):
            forward_kernel[(G * H, triton.cdiv(B, launch.batch_block))](
                gates, recurrent, *start, out, *end, won, saved, B, T, STORE=keep, **constants(H, K, launch)
            )  # fmt: skip
        return out, *end, won, saved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep what the backward needs."""
        out, *_, won, saved = output
        ctx.mark_non_differentiable(won, saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[1], inputs[2], out, won, saved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Hand over to the backward's own function, which has a batching rule of its own."""
        return *SLSTMGradient.apply(*grads[:5], *ctx.saved_tensors), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        """Fold the mapped axis into G."""
        folded = fold(info.batch_size, in_dims[:6], args[:6])
        return unfold(info.batch_size, SLSTM.apply(*folded, args[6]))


class SLSTMGradient(torch.autograd.Function):
    """Gradients of the outputs and what :class:`SLSTM` kept -> gradients of its inputs."""

    @staticmethod
    def forward(
        d_out: Tensor | None,
        dh_end: Tensor | None,
        dy_end: Tensor | None,
        dl_end: Tensor | None,
        dm_end: Tensor | None,
        recurrent: Tensor,
        h: Tensor,
        out: Tensor,
        won: Tensor,
        saved: Tensor,
    ) -> tuple[Tensor, ...]:
        """Launch the backward kernel; then dR."""
        recurrent = recurrent.contiguous()
        d_out, dm_end = (None if x is None else x.contiguous() for x in (d_out, dm_end))
        G, B, T, H, K = out.shape
        d_end: list[Tensor | None] = [dh_end, dy_end, dl_end]
        has_end = any(x is not None for x in d_end)
        if has_end:
            d_end = [torch.zeros_like(h) if x is None else x.contiguous() for x in d_end]
        d_gates = torch.empty(G, B, T, 4, H, K, dtype=out.dtype, device=out.device)
        d_start = [torch.empty_like(h, memory_format=torch.contiguous_format) for _ in range(3)]
        dm = torch.zeros_like(d_start[0]) if dm_end is None else torch.empty_like(d_start[0])
        launch = launch_of(d_gates, True)
        upstream = d_gates if d_out is None else d_out
        with device_of(out):
            backward_kernel[(G * H, triton.cdiv(B, launch.batch_block))](
                recurrent, saved, won, upstream, *d_end, dm_end, d_gates, *d_start, dm, B, T,
                HAS_OUT=d_out is not None, HAS_END=has_end, HAS_M=dm_end is not None,
                **constants(H, K, launch),
            )  # fmt: skip
        return d_gates, weight_gradient(h, out, d_gates).to(recurrent.dtype), *d_start, dm

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        """Nothing is kept: there is no second derivative."""

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Second derivatives are not implemented."""
        raise NotImplementedError("slstm has no second derivative; backend='reference' has")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        """Fold the mapped axis into G."""
        return unfold(info.batch_size, SLSTMGradient.apply(*fold(info.batch_size, in_dims, args)))


def weight_gradient(h: Tensor, out: Tensor, d_gates: Tensor) -> Tensor:
    """The gradient of R, sum_t h_{t-1} x d_gates_t, [G,4,H,K,K] in fp32.

    A product of matrices for each head and part of the batch, then their sum: one product a head would be as
    long as the batch and as small as the head, too little for a GPU.
    """
    G, B, T, H, K = out.shape
    before = torch.empty(G, H, B, T, K, dtype=torch.float32, device=out.device)
    before[:, :, :, 0] = h.transpose(1, 2)
    before[:, :, :, 1:] = out[:, :, :-1].permute(0, 3, 1, 2, 4)
    d_bht4k = d_gates.permute(0, 4, 1, 2, 3, 5).to(torch.float32)
    parts = B
    while parts % 2 == 0 and G * H * parts * K * K > 2**22:
        parts //= 2
    left = before.view(G * H * parts, -1, K).transpose(1, 2)
    products = left @ d_bht4k.reshape(G * H * parts, -1, 4 * K)
    return products.view(G, H, parts, K, 4, K).sum(2).permute(0, 3, 1, 2, 4).contiguous()


def constants(H: int, K: int, launch: Launch) -> dict[str, Any]:
    """The launch arguments that both kernels take."""
    return {
        "H": H,
        "K": K,
        "BB": launch.batch_block,
        "BK": block_of(K),
        "RESIDENT": launch.resident,
        "PRECISION": launch.precision,
        "num_warps": launch.warps,
    }


def device_of(x: Tensor) -> Any:
    """Make the tensor's GPU the current one for a launch."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
