"""How long a token is remembered: by the gates, and as measured in what the memory gives back.

Given the gates, a read is linear in the values, read_t = sum_s w(t,s) v_s, with one number a head for a
matrix memory,

    w(t,s) = q_t^T M_t M_{t-1} ... M_{s+1} k_s write_s / normaliser_t,

so that the weight of every earlier token follows from one vector carried backwards, a_t = q_t, a_{s-1} =
M_s^T a_s, without any stored memory. Where gates are per value channel, w is the mean over the channels of
d read_t / d v_s, gates given. A token of n micro-steps has n values and a weight for each: w(t,s,j). Its
weight among tokens is sum_j |w(t,s,j)|. What a micro-step writes of the token before (``lag``) counts there,
:func:`by_source`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from arena.blocks.trapezoid import rotated
from arena.dynamics.state import by_token, is_matrix_memory, micro_steps, write_gate

LN_2 = math.log(2)


def half_life(mean_log_decay: Tensor) -> Tensor:
    """Ln 2 / -mean ln |decay|, in tokens: infinite where nothing decays, 0 where a decay is 0."""
    return LN_2 / mean_log_decay.double().clamp(max=0.0).abs()


def log_decay(trace: Mapping[str, Tensor]) -> Tensor | None:
    """Ln |decay| [B,T,H,K|1] of the tokens of a trace, or None where it has no decay."""
    if "log_decay" in trace:
        return by_token(trace["log_decay"].double(), micro_steps(trace)).sum(2)
    return trace["decay"].double().abs().log() if "decay" in trace else None


class Past(NamedTuple):
    """What the contributions need of a piece of the sequence."""

    start: int
    trace: dict[str, Tensor]


def remembered(
    trace: Mapping[str, Tensor], log_norm: Tensor | None
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The vectors that :func:`contributions` needs of a chunk, float64, or {} where w is not defined.

    Args:
        trace: Fields [B,T,H,*], those of n micro-steps a token [B,T n,H,*].
        log_norm: For sLSTM, ln of the normaliser after the last chunk [B,H,V] (None: before the first token).

    Returns:
        The vectors (of a matrix memory [B,T,n,H,*], but for the query), and ``log_norm`` after this chunk.
    """
    if is_matrix_memory(trace):
        if "q" not in trace:  # several queries a token, mixed per value channel: no one weight of a value
            return {}, None
        k, n = trace["k"].double(), micro_steps(trace)
        scale = trace["normaliser"].double() if "normaliser" in trace else 1.0
        updates = {
            "k": k,
            "e": trace["erase"].double() * k,
            "decay": trace["decay"].double().expand_as(k),
            "write": write_gate(trace).mean(-1),
        }
        if "angle" in trace:
            updates["angle"] = trace["angle"].double()
        vectors = {name: by_token(x, n) for name, x in updates.items()}
        return {"start": trace["q"].double() / scale, **vectors}, None
    if "cell" not in trace or "decay" not in trace:
        return {}, log_norm
    log_f = log_decay(trace)
    assert log_f is not None
    if "normaliser" in trace and "input_gate" in trace:  # sLSTM: read = cell / normaliser, both sums over s
        log_i = trace["input_gate"].double()
        norms = []
        for f_t, i_t in zip(log_f.unbind(1), log_i.unbind(1), strict=True):
            log_norm = i_t if log_norm is None else torch.logaddexp(f_t + log_norm, i_t)
            norms.append(log_norm)
        return {"start": -torch.stack(norms, 1), "log_decay": log_f, "log_write": log_i}, log_norm
    if "write" in trace:  # LSTM: read = tanh(cell)
        size = trace["cell"].double().abs()
        slope = 2 * (
            LN_2 - size - torch.log1p((-2 * size).exp())
        )  # ln (1 - tanh^2), also where tanh rounds to 1
        return {"start": slope, "log_decay": log_f, "log_write": trace["write"].double().log()}, None
    return {}, log_norm


def contributions(
    past: Sequence[Past], sequence: Tensor, token: Tensor, horizon: int
) -> tuple[Tensor, Tensor]:
    """The weight w(t,s) of every token s in the read at token t, for a list of reads.

    Args:
        past: Pieces of the sequences, in order and without gaps, up to the reads.
        sequence: int64 [n], row of the batch of each read.
        token: int64 [n], its token t, within the last piece.
        horizon: Tokens to look back, t included.

    Returns:
        Weights [n,H,L,J], lag 0 first, where L = min(horizon, longest past) and J the micro-steps of a token;
        lags before the first token are 0. And the gain [n,H] with which what was in memory before the horizon
        still reaches the read: the norm of the vector carried back, over its norm at the read.
    """
    first, last = past[0].start, int(token.max())
    low = max(first, int(token.min()) - horizon + 1)
    n, _, H, width = len(token), *past[-1].trace["start"].shape[1:]
    matrix = "k" in past[-1].trace
    J = past[-1].trace["k"].shape[2] if matrix else 1
    weights = torch.zeros(n, H, min(horizon, last - first + 1), J, dtype=torch.float64)
    # A matrix memory carries a_s; a cell carries ln of the weight of its channels, which may be large.
    carried = torch.full((n, H, width), 0.0 if matrix else -torch.inf, dtype=torch.float64)
    begun = carried
    for piece in reversed(past):
        top = min(piece.start + piece.trace["start"].shape[1] - 1, last)
        for s in range(top, max(piece.start, low) - 1, -1):
            now = {name: x[sequence, s - piece.start] for name, x in piece.trace.items()}
            here = (token == s)[:, None, None]
            carried = torch.where(here, now["start"], carried)
            begun = torch.where(here, carried, begun)
            if matrix:
                ahead, values = carried, list[Tensor]()
                for j in range(J - 1, -1, -1):  # the last micro-step is the nearest to the read
                    along = (ahead * now["k"][:, j]).sum(-1)
                    values.insert(0, along * now["write"][:, j])
                    ahead = now["decay"][:, j] * (ahead - now["e"][:, j] * along[..., None])
                    if "angle" in now:
                        ahead = rotated(ahead, -now["angle"][:, j])
                value = torch.stack(values, -1)
            else:
                value = (carried + now["log_write"]).exp().mean(-1, keepdim=True)
                ahead = carried + now["log_decay"]
            lag = token - s
            inside = (lag >= 0) & (lag < weights.shape[2])
            carried = torch.where(inside[:, None, None], ahead, carried)
            rows = inside.nonzero()[:, 0]
            weights[rows, :, lag[rows]] = value[rows]
        if piece.start <= low:
            break
    cut = token + 1 > horizon
    left = carried.norm(dim=-1) / begun.norm(dim=-1) if matrix else (carried - begun).exp().mean(-1)
    return weights, torch.where(cut[:, None], left, 0.0)


def by_source(weights: Tensor, lags: Sequence[int]) -> Tensor:
    """Weights by the token whose value is read, where micro-steps write a value of the token before.

    Args:
        weights: [n,H,L,J] of :func:`contributions`.
        lags: of each micro-step, 0 or 1. The j-th that lags writes the same value as the j-th that does not.

    Returns:
        [n,H,L,J'], J' the micro-steps that do not lag; what was read before the last L tokens is left out.
    """
    own, late = (weights[..., [lag == which for lag in lags]] for which in (0, 1))
    if late.shape[-1]:
        own[:, :, 1:] += late[:, :, :-1]
    return own


def memory_length(weights: Tensor) -> Tensor:
    """(sum |w|)^2 / sum w^2 over the last axis: how many tokens a read is made of, at least 1."""
    return weights.abs().sum(-1).square() / weights.square().sum(-1)


def contribution_age(weights: Tensor) -> Tensor:
    """Sum |w| lag / sum |w| over the last axis (lag 0 first): how old what is read is, in tokens."""
    lag = torch.arange(weights.shape[-1], dtype=weights.dtype)
    return (weights.abs() * lag).sum(-1) / weights.abs().sum(-1)
