"""Softmax attention with rotary positions: over all earlier tokens (``attention``) or a window (``swa``).

Official: the attention of Llama (Touvron et al., arXiv 2302.13971): q, k, v and out without bias, RoPE (Su et
al., arXiv 2104.09864; channel j of the first half of a head turns with channel j of the second), no norm, no
output gate, no convolution; one given by ``conv`` acts on q, k and v before RoPE, without SiLU (arXiv
2606.03825).
Common: the common layer, whose q and k have length 1; their products are scaled by K ** 0.5, so that scores
reach as far as those of RMS-normed q and k do.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from arena.blocks.base import Block, State
from arena.blocks.outer import COMMON, OutputGate, RMSNorm, ShortConv, l2_norm
from arena.blocks.registry import register
from kernels.attention import attention, attention_composed, attention_mask


class Attention(Block):
    """Multi-head attention.

    State: ``k`` and ``v`` [B,S,H,K], the tokens that the next one can see; ``conv``. Without a window S is
    the number of tokens so far and the keys are turned to their positions. With one, S is at most window - 1
    and the keys are kept unturned: positions count from the first of them, for only distances matter.

    Args:
        d_model: D.
        n_heads: H.
        outer: ``"common"`` or ``"official"``.
        conv: Short convolution; None: static in common, none in official.
        window: Number of tokens seen, the present one included; None means all.
        rope_theta: Base of the rotary wavelengths, theta^(2 j / K).
    """

    map_out = "out"

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int,
        outer: str,
        conv: str | None,
        window: int | None,
        rope_theta: float,
    ) -> None:
        super().__init__(d_model)
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        if not rope_theta > 1:
            raise ValueError(f"rope_theta must be above 1, got {rope_theta}")
        common = outer == "common"
        kind = conv or (COMMON.conv if common else "none")
        self.n_heads = n_heads
        self.head_dim = d_model // n_heads
        self.window = window
        self.rope_theta = rope_theta
        self.unit = common
        self.scale = self.head_dim ** (0.5 if common else -0.5)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.conv = ShortConv(kind, d_model, [d_model] * 3, activation=common)
        self.norm = RMSNorm(self.head_dim) if common else None
        self.gate_out = OutputGate(COMMON, d_model, n_heads, self.head_dim) if common else None
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        self.composed = False

    def norm_qk(self) -> None:
        """Norm q and k of every head, each with a weight of its own, before RoPE (QK-norm)."""
        self.q_norm, self.k_norm = RMSNorm(self.head_dim), RMSNorm(self.head_dim)

    def compose(self) -> None:
        """Compute by plain operations, which have derivatives of any order; the fused ones have one."""
        self.composed = self.conv.composed = True

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """See :class:`~arena.blocks.base.Block`."""
        q, k, v, after = self._remember(x, state)
        attend = attention_composed if self.composed else attention
        read = attend(q, k, v, window=self.window, scale=self.scale)
        if self.norm is not None and self.gate_out is not None:
            read = self.norm(read) * self.gate_out(x)
        return self.out(read.flatten(-2)), after

    def initial_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """See :class:`~arena.blocks.base.Block`."""
        device, dtype = self._placement(device, dtype)
        empty = torch.zeros(batch_size, 0, self.n_heads, self.head_dim, device=device, dtype=dtype)
        state = {"k": empty, "v": empty.clone()}
        if self.conv.rows:
            rows = (batch_size, self.conv.rows, sum(self.conv.widths))
            state["conv"] = torch.zeros(rows, device=device, dtype=dtype)
        return state

    def trace(self, x: Tensor, state: State | None = None, *, states: bool = False) -> dict[str, Tensor]:
        """See :class:`~arena.blocks.base.Block`; q and k are those before RoPE, S counts the tokens kept."""
        q, k, v, _ = self._qkv(x, state)
        turned_q, keys, values, _ = self._remember(x, state)
        scores = torch.einsum("bthk,bshk->bhts", turned_q * self.scale, keys)
        seen = attention_mask(x.shape[1], keys.shape[1], self.window, x.device)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        trace = {"q": q * self.scale, "k": k, "v": v, "attention": weights}
        trace["read"] = torch.einsum("bhts,bshv->bthv", weights, values)
        if self.gate_out is not None:
            trace["output_gate"] = self.gate_out(x)
        return trace

    def _qkv(self, x: Tensor, state: State | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, v [B,T,H,K] before RoPE, and the new rows of the convolution."""
        mixed, rows = self.conv(self.qkv(x), x, None if state is None else state.get("conv"))
        q, k, v = mixed.unflatten(-1, (3, self.n_heads, self.head_dim)).unbind(2)
        if self.unit:
            q, k = l2_norm(q), l2_norm(k)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v, rows

    def _remember(self, x: Tensor, state: State | None) -> tuple[Tensor, Tensor, Tensor, State]:
        """Turned q [B,T,H,K], turned k and v of all tokens within reach [B,S,H,*], and the new state."""
        q, k, v, rows = self._qkv(x, state)
        past = 0 if state is None else state["k"].shape[1]
        total = past + x.shape[1]
        if self.window is None:
            k = self._turn(k, past)
        if state is not None:
            k, v = torch.cat([state["k"], k], 1), torch.cat([state["v"], v], 1)
        kept = 0 if self.window is None else max(total - (self.window - 1), 0)
        after = {"k": k[:, kept:], "v": v[:, kept:]}
        if rows is not None:
            after["conv"] = rows
        if self.window is not None:
            k = self._turn(k, 0)
        return self._turn(q, past), k, v, after

    def _turn(self, x: Tensor, first: int) -> Tensor:
        """RoPE on x [B,T,H,K] at positions first, first + 1, ...; the odd channel of an odd K stays."""
        half = self.head_dim // 2
        # Angles in float64: at position 4096 fp32 would be off by 2e-4.
        rate = self.rope_theta ** (-torch.arange(half, device=x.device, dtype=torch.float64) / max(half, 1))
        angle = torch.arange(first, first + x.shape[1], device=x.device, dtype=torch.float64)[:, None] * rate
        cos, sin = angle.cos().to(x.dtype)[:, None], angle.sin().to(x.dtype)[:, None]
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


@register("attention")
def _attention(
    *,
    d_model: int,
    n_heads: int,
    outer: str,
    conv: str | None,
    depth: float,
    rope_theta: float = 10000.0,
) -> Block:
    return Attention(
        d_model=d_model,
        n_heads=n_heads,
        outer=outer,
        conv=conv,
        window=None,
        rope_theta=rope_theta,
    )


@register("swa")
def _swa(
    *,
    d_model: int,
    n_heads: int,
    outer: str,
    conv: str | None,
    depth: float,
    window: int = 64,
    rope_theta: float = 10000.0,
) -> Block:
    return Attention(
        d_model=d_model,
        n_heads=n_heads,
        outer=outer,
        conv=conv,
        window=window,
        rope_theta=rope_theta,
    )
