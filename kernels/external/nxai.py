"""mlstm_kernels (2.0 or newer, NX-AI) as a backend of ``mlstm``.

On a CPU its torch code runs, differentiated by autograd. On a GPU its "xl_chunk" kernels run, forward only:
their hand-written backward (that of its other kernels too) takes the normaliser for a constant. That gives
the right gradients of q, k and the gates only where a norm over each head follows, which makes the gradient
orthogonal to h (2.0.6, measured against autograd). Its licence is the NXAI community licence, not an
open-source one: it is called, never required.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.external.common import NotDifferentiable, can_import, folded, version_of

State = tuple[Tensor, Tensor, Tensor]
LONGEST_CHUNK = 64
NO_GRADIENT = "mlstm_kernels runs forward only on a GPU: its backward leaves the normaliser out"
# What a padded token's gates are: it writes nothing and forgets nothing.
CLOSED, OPEN = -1e4, 1e4


def refusal(q: Tensor, v: Tensor, initial_state: State | None) -> str | None:
    """Why these inputs of ``mlstm`` do not go to mlstm_kernels, or None."""
    version = version_of("mlstm-kernels")
    if version is None:
        return "needs the package mlstm-kernels, which is not installed"
    if version < (2,):
        return f"needs mlstm-kernels 2.0 or newer, not {'.'.join(map(str, version))}"
    if q.is_cuda and q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 or float16, not {q.dtype}"
    if not q.is_cuda and q.dtype != torch.float32:
        return f"takes float32 on a CPU, not {q.dtype}"
    if v.shape[3] % 16 or q.shape[3] % 16:
        return f"takes head dimensions that are multiples of 16, not {q.shape[3]} and {v.shape[3]}"
    error = can_import(_module(q))
    return None if error is None else f"can't be imported ({error})"


def _module(q: Tensor) -> str:
    kind = "triton_xl_chunk" if q.is_cuda else "native"
    return f"mlstm_kernels.torch.chunkwise.{kind}"


def mlstm_nxai(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    initial_state: State | None,
    stabiliser: Tensor,
) -> tuple[Tensor, State]:
    """Compute h and the state; its chunks are powers of 2, so the sequence is padded to whole ones.

    The state is given for ``stabiliser`` [B,H], our m after the last token (theirs starts from 0, ours from
    -inf). On a GPU a gradient of anything raises NotImplementedError.
    """
    T = q.shape[1]
    chunk = max(16, min(LONGEST_CHUNK, 1 << (T - 1).bit_length()))
    padding = -T % chunk

    def heads_first(x: Tensor, value: float = 0.0) -> Tensor:
        x = x.transpose(1, 2)
        return F.pad(x, (0, 0) * (x.dim() - 3) + (0, padding), value=value).contiguous()

    i, f = heads_first(input_gate.float(), CLOSED), heads_first(forget_gate.float(), OPEN)
    start: tuple[Tensor | None, ...] = (None, None, None)
    if initial_state is not None:
        c, n, m = (x.float() for x in initial_state)
        unit = q.shape[3] ** 0.5  # they scale q, we scale k
        start = (c * unit, n * unit, m.masked_fill(m == -torch.inf, 0.0))  # nothing seen: c and n are 0

    def run(*x: Any) -> Any:
        m = x[7]
        if x[0].is_cuda:
            from mlstm_kernels.torch.chunkwise.triton_xl_chunk import mlstm_chunkwise__xl_chunk as kernel

            m = None if m is None else m[..., None]
        else:
            from mlstm_kernels.torch.chunkwise.native import mlstm_chunkwise__native_autograd as kernel
        options = {"return_last_states": True, "chunk_size": chunk, "eps": 1e-6}
        h, state = kernel(*x[:7], m, **options, autocast_kernel_dtype=x[0].dtype)
        shapes = (q.shape[3], v.shape[3]), (q.shape[3],), ()
        state = (y.reshape(*y.shape[:2], *shape) for y, shape in zip(state, shapes, strict=True))
        return NotDifferentiable.apply(NO_GRADIENT, h, *state) if x[0].is_cuda else (h, *state)

    h, c, n, m = folded(run, *(heads_first(x) for x in (q, k, v)), i, f, *start)
    factor = torch.where(stabiliser == -torch.inf, 0.0, m.float() - stabiliser).exp() * q.shape[3] ** -0.5
    state = (c.float() * factor[..., None, None], n.float() * factor[..., None], stabiliser)
    return h[:, :, :T].transpose(1, 2).to(v.dtype), state
