"""From a :class:`~arena.memory.GateSpec` to the gates of every token, with the published parametrisations.

Sources: Mamba-2 (arXiv 2405.21060), GLA (2312.06635), Gated DeltaNet (2412.06464), KDA (2510.26692 section
4), GDN-2 (2605.22791 section 3.5), xLSTM (2405.04517), negative eigenvalues (2411.12537).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arena.blocks.base import memory_dtype, no_weight_decay
from arena.memory import GateSpec

GLA_RANK = 16
GLA_ROOT = 16.0
BOUNDED_LOG_DECAY = -5.0


class GateValues(NamedTuple):
    """The gates of every token; None is an absent gate. Shapes [B,T,H] (one a head) or [B,T,H,K or V].

    With n micro-steps a token, T stands for their number, n times that of the tokens.
    """

    log_decay: Tensor | None = None
    erase: Tensor | None = None
    write: Tensor | None = None
    decay_sign: Tensor | None = None
    step: Tensor | None = None
    """[B,T,H]: what decay and write were computed from, where they share it."""
    input_gate: Tensor | None = None
    """[B,T,H]: pre-activation of an exponential write."""
    forget_gate: Tensor | None = None
    """[B,T,H]: pre-activation of the sigmoid decay that goes with an exponential write."""
    key: Tensor | None = None
    """[B,T,H,K]: factor on the key, where write is a gate on the channels of K (``complement``)."""
    present: Tensor | None = None
    """[B,T,H]: share of write that goes to this token, the rest to the one before (Mamba-3)."""
    angle: Tensor | None = None
    """[B,T,H,P] float64: by how much the token turns the memory, in pairs of key channels (Mamba-3)."""


class StepDecay(nn.Module):
    """step = softplus(f + dt_bias), log decay = -exp(A_log) step: Mamba-2, Gated DeltaNet, KDA, GDN-2.

    A is uniform in ``a_range``, one a head; dt_bias is the inverse softplus of a step that is log-uniform in
    [1e-3, 1e-1], one a channel. Neither is decayed by the optimiser.
    """

    def __init__(self, n_heads: int, channels: int, a_range: tuple[float, float]) -> None:
        super().__init__()
        # A = 0 would be a head whose decay can never be learned.
        a = torch.empty(n_heads, 1).uniform_(*a_range).clamp_min(1e-4)
        self.A_log = no_weight_decay(nn.Parameter(a.log()))
        self.dt_bias = step_bias(n_heads, channels)

    def forward(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """Pre-activations f [B,T,H,C] to (log decay, step), both [B,T,H,C]."""
        step = F.softplus(f.to(memory_dtype(f.dtype)) + self.dt_bias)
        return -self.A_log.exp() * step, step


class BoundedDecay(StepDecay):
    """log decay = -5 sigmoid(exp(A_log) (f + dt_bias)), A_log = 0 at first: KDA's bounded ("safe") gate."""

    def __init__(self, n_heads: int, channels: int) -> None:
        super().__init__(n_heads, channels, (1.0, 16.0))
        nn.init.zeros_(self.A_log)

    def forward(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """Pre-activations f [B,T,H,C] to (log decay, the sigmoid), both [B,T,H,C]."""
        share = torch.sigmoid(self.A_log.exp() * (f.to(memory_dtype(f.dtype)) + self.dt_bias))
        return BOUNDED_LOG_DECAY * share, share


class ForgetBias(nn.Module):
    """f plus a bias, at first spaced linearly from 3 to 6 over the heads: mLSTM's forget gate."""

    def __init__(self, n_heads: int, channels: int) -> None:
        super().__init__()
        bias = torch.linspace(3.0, 6.0, n_heads)[:, None].repeat(1, channels)
        self.bias = no_weight_decay(nn.Parameter(bias))

    def forward(self, f: Tensor) -> Tensor:
        """Add to f [B,T,H,C]."""
        return f + self.bias


class Gates(nn.Module):
    """x [B,T,D] to :class:`GateValues` for one point of gate space.

    Decay reads x through a full projection where it is one a head, and through a rank-V projection without
    bias where it is one a channel (KDA, GDN-2: the rank is the head's value width); ``sigmoid_root`` has rank
    16 and a bias (GLA). Erase and write are sigmoids of full projections without bias; a ``mean`` gate has
    the parameters of a ``channel`` gate, and its value is the mean of that gate over a head's channels.
    mLSTM's gates start at zero weight, so that the biases alone decide. With micro-steps, erase and write
    have that many outputs, the first micro-step's first; decay is one a token, at its first micro-step.
    """

    def __init__(self, spec: GateSpec, *, d_model: int, n_heads: int, key_dim: int, value_dim: int) -> None:
        super().__init__()
        if spec.coupling == "tied" and spec.write == "channel" and key_dim != value_dim:
            raise ValueError(f"tied channel gates need K = V, got K={key_dim}, V={value_dim}")
        self.spec = spec
        self.n_heads = n_heads
        updates = spec.micro_steps * n_heads
        if spec.decay != "none":
            channels = 1 if spec.decay == "scalar" else key_dim
            self.decay_in = self._decay_projection(d_model, n_heads * channels, value_dim)
            self.decay = self._decay_parameters(n_heads, channels)
        if spec.erase != "none" and spec.erase_value is None:
            channels = 1 if spec.erase == "scalar" else key_dim
            self.erase = nn.Linear(d_model, updates * channels, bias=False)
        if spec.write == "exponential":
            self.input = nn.Linear(d_model, n_heads)
            nn.init.zeros_(self.input.weight)
            nn.init.normal_(self.input.bias, std=0.1)
            no_weight_decay(self.input.bias)
        elif spec.write != "one" and spec.write_value is None and spec.coupling in ("free", "dial"):
            channels = 1 if spec.write == "scalar" else value_dim
            self.write = nn.Linear(d_model, updates * channels, bias=False)
        if spec.coupling == "dial":
            self.shared = nn.Linear(d_model, updates, bias=False)

    def _decay_projection(self, d_model: int, width: int, value_dim: int) -> nn.Module:
        if self.spec.decay_form == "sigmoid":
            projection = nn.Linear(d_model, width, bias=False)
            nn.init.zeros_(projection.weight)
            return projection
        if self.spec.decay_form == "sigmoid_root":
            return low_rank(d_model, GLA_RANK, width, bias=True)
        if self.spec.decay != "scalar":
            return low_rank(d_model, value_dim, width, bias=False)
        return nn.Linear(d_model, width, bias=False)

    def _decay_parameters(self, n_heads: int, channels: int) -> nn.Module:
        if self.spec.decay_form == "softplus_a":
            return StepDecay(n_heads, channels, self.spec.a_range)
        if self.spec.decay_form == "bounded":
            return BoundedDecay(n_heads, channels)
        if self.spec.decay_form == "sigmoid":
            return ForgetBias(n_heads, channels)
        return nn.Identity()

    def forward(self, x: Tensor) -> GateValues:
        """Gates of x [B,T,D]; with n micro-steps a token, of T n updates."""
        spec = self.spec
        if spec.write == "exponential":
            forget_gate = self._axis(self.decay(self._heads(self.decay_in(x))), "scalar")
            return exponential_gates(self.input(x), forget_gate)
        log_decay = decay_sign = step = erase = write = key = None
        if spec.decay != "none":
            log_decay, step = self._log_decay(self._heads(self.decay_in(x)))
        if spec.erase != "none":
            erase = self._frozen(x, spec.erase_value)
        if spec.erase != "none" and erase is None:
            erase = spec.erase_range * self._axis(torch.sigmoid(self._updates(self.erase(x))), spec.erase)
        if spec.coupling == "tied":
            write = erase
        elif spec.coupling == "step":
            write = step
        elif spec.coupling == "complement":
            assert log_decay is not None
            complement = -(1 + spec.signed) * torch.expm1(
                log_decay
            )  # 1 - decay, before the sign is split off
            write, key = (None, complement) if spec.decay == "channel" else (complement, None)
        elif spec.write_value is not None:
            write = self._frozen(x, spec.write_value)
        elif spec.write != "one":
            write = self._axis(torch.sigmoid(self._updates(self.write(x))), spec.write)
        if spec.coupling == "dial":
            assert spec.dial is not None and erase is not None and write is not None
            shared = (1 - spec.dial) * spec.erase_range * torch.sigmoid(self._updates(self.shared(x))[..., 0])
            erase, write = _plus(shared, spec.dial * erase), _plus(shared, spec.dial * write)
        if spec.signed and log_decay is not None:
            log_decay, decay_sign = signed_decay(log_decay)
        if log_decay is not None:
            log_decay = at_micro_step(log_decay, 0, spec.micro_steps)
        if decay_sign is not None:
            decay_sign = at_micro_step(decay_sign, 0, spec.micro_steps, elsewhere=1.0)
        step = step if spec.coupling == "step" else None
        return GateValues(log_decay, erase, write, decay_sign, step=step, key=key)

    def _log_decay(self, f: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pre-activations f [B,T,H,C] to (log decay, step where there is one), with the axis of the spec."""
        step = None
        if self.spec.decay_form in ("softplus_a", "bounded"):
            log_decay, step = self.decay(f)
            step = self._axis(step, self.spec.decay)
        else:
            log_decay = F.logsigmoid(self.decay(f).to(memory_dtype(f.dtype)))
        if self.spec.decay_form == "sigmoid_root":
            log_decay = log_decay / GLA_ROOT
        if self.spec.decay == "mean":  # of the decays, not of their logarithms
            return torch.logsumexp(log_decay, -1) - math.log(log_decay.shape[-1]), step
        return self._axis(log_decay, self.spec.decay), step

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, -1))

    def _updates(self, x: Tensor) -> Tensor:
        """[B,T,n H C] to [B,T n,H,C]."""
        return micro_heads(x, self.spec.micro_steps, self.n_heads)

    def _frozen(self, x: Tensor, value: float | None) -> Tensor | None:
        """A gate [B,T n,H] that is the same for every token, or None where it is not frozen."""
        shape = (x.shape[0], x.shape[1] * self.spec.micro_steps, self.n_heads)
        return None if value is None else x.new_full(shape, value)

    @staticmethod
    def _axis(x: Tensor, axis: str) -> Tensor:
        """A gate [B,T,H,C] on its axis: [B,T,H] where that is one a head."""
        if axis == "mean":
            return x.mean(-1)
        return x[..., 0] if axis == "scalar" else x


def micro_heads(x: Tensor, micro_steps: int, n_heads: int) -> Tensor:
    """[B,T,n H C] to [B,T n,H,C]: all heads and channels of a token's first micro-step come first."""
    if micro_steps == 1:
        return x.unflatten(-1, (n_heads, -1))
    return x.unflatten(-1, (micro_steps, n_heads, -1)).flatten(1, 2)


def at_micro_step(x: Tensor, index: int, micro_steps: int, *, elsewhere: float = 0.0) -> Tensor:
    """[B,T,...] to [B,T n,...]: what a token has at its micro-step ``index``, else ``elsewhere``."""
    if micro_steps == 1:
        return x
    around = (0, 0) * (x.dim() - 2) + (index, micro_steps - 1 - index)
    return F.pad(x[:, :, None], around, value=elsewhere).flatten(1, 2)


def step_bias(*shape: int) -> nn.Parameter:
    """The inverse softplus of a step that is log-uniform in [1e-3, 1e-1]; not decayed."""
    step = torch.empty(shape).uniform_(math.log(1e-3), math.log(1e-1)).exp().clamp_min(1e-4)
    return no_weight_decay(nn.Parameter(step + torch.log(-torch.expm1(-step))))


def _plus(shared: Tensor, own: Tensor) -> Tensor:
    """[B,T,H] + [B,T,H] or [B,T,H,C]."""
    return (shared if own.dim() == shared.dim() else shared[..., None]) + own


def exponential_gates(input_gate: Tensor, forget_gate: Tensor) -> GateValues:
    """mLSTM: write exp(input_gate), decay sigmoid(forget_gate); both pre-activations are [B,T,H]."""
    return GateValues(
        F.logsigmoid(forget_gate), write=input_gate.exp(), input_gate=input_gate, forget_gate=forget_gate
    )


def signed_decay(log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """Decay s in [0,1], given as ln s, to 2 s - 1: (ln |2 s - 1|, its sign +-1), both shaped like
    ``log_decay``.

    ln has no derivative where 2 s = 1. Its derivative 1/v is replaced by v / (v^2 + eps^2), which differs
    only for |v| of the order of eps (1e-3; in float64 1e-6); the values are exact, -inf included.
    """
    value = 1 + 2 * torch.expm1(log_decay)
    eps = 1e-6 if value.dtype == torch.float64 else 1e-3
    smooth = 0.5 * torch.log(value.square() + eps * eps)
    log_magnitude = value.abs().log().detach() + (smooth - smooth.detach())
    return log_magnitude, torch.where(value < 0, -1.0, 1.0).to(value.dtype)


def low_rank(d_in: int, rank: int, d_out: int, *, bias: bool) -> nn.Sequential:
    """Two linear maps with nothing in between, d_in -> rank -> d_out; ``bias`` is of the second one."""
    up = nn.Linear(rank, d_out, bias=bias)
    if bias:
        no_weight_decay(up.bias)
    return nn.Sequential(nn.Linear(d_in, rank, bias=False), up)
