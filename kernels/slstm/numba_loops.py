"""The loops of ``fused.py`` with the elementwise work of a token in one pass, compiled by numba (optional).

torch needs some ten calls a token; here it is one matrix product and one compiled function. fp32 only. The
exponential and logarithm are polynomials that vectorise, exact to about one fp32 rounding error.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_ROUND = np.float32(1.5 * 2**23)  # adding it leaves the nearest integer in the low bits of the float
_LOWEST = np.float32(-87.0)
_ONE, _TWO = np.float32(1), np.float32(2)
_EXP = tuple(np.float32(1 / x) for x in (5040, 720, 120, 24, 6, 2))
_LOG = tuple(np.float32(2 / x) for x in (13, 11, 9, 7, 5, 3))
_STRICT = {"nopython": True, "cache": True, "fastmath": {"contract"}, "error_model": "numpy"}


@intrinsic
def _two_to_the(typing_context: Any, rounded: Any) -> Any:
    """2 ** n for a float whose low bits hold n (see _ROUND): n goes to the exponent field."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        bits = builder.bitcast(arguments[0], word)
        exponent = builder.add(builder.shl(bits, ir.Constant(word, 23)), ir.Constant(word, 127 << 23))
        return builder.bitcast(exponent, ir.FloatType())

    return types.float32(types.float32), code


@numba.jit(inline="always", **_STRICT)
def _exp_of_negative(x):  # type: ignore[no-untyped-def]
    """exp(x) for x <= 0, also -inf; NaN stays NaN."""
    x = _LOWEST if x < _LOWEST else x
    rounded = x * _LOG2E + _ROUND
    n = rounded - _ROUND
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = _EXP[0]
    p = p * r + _EXP[1]
    p = p * r + _EXP[2]
    p = p * r + _EXP[3]
    p = p * r + _EXP[4]
    p = p * r + _EXP[5]
    p = (p * r + _ONE) * r + _ONE
    return p * _two_to_the(rounded)


@numba.jit(inline="always", **_STRICT)
def _log_of_one_plus(x):  # type: ignore[no-untyped-def]
    """log(1 + x) for 0 <= x <= 1, as 2 artanh(x / (2 + x))."""
    s = x / (_TWO + x)
    q = s * s
    p = _LOG[0]
    p = p * q + _LOG[1]
    p = p * q + _LOG[2]
    p = p * q + _LOG[3]
    p = p * q + _LOG[4]
    p = p * q + _LOG[5]
    return s * (p * q + _TWO)


@numba.jit(**_STRICT)
def _forward_token(t, raw, means, scale, h4):  # type: ignore[no-untyped-def]
    """Raw [T,4,N], means [T+1,N], scale [2,N] (log_n, m), h4 [4,N]."""
    for j in range(raw.shape[2]):
        i, f, z, o = raw[t, 0, j], raw[t, 1, j], raw[t, 2, j], raw[t, 3, j]
        g = (f if f < 0 else np.float32(0)) - _log_of_one_plus(_exp_of_negative(-abs(f)))
        kept, m = scale[0, j] + g, scale[1, j] + g
        d = i - kept
        e = _exp_of_negative(-abs(d))
        scale[0, j] = (i if d > 0 else kept) + _log_of_one_plus(e)
        scale[1, j] = m if m > i else i
        a = (_ONE if d > 0 else e) / (_ONE + e)
        e = _exp_of_negative(-abs(o))
        o = (_ONE if o > 0 else e) / (_ONE + e)
        e = _exp_of_negative(np.float32(-2) * abs(z))
        e = (_ONE - e) / (_ONE + e)
        z = e if z > 0 else -e
        y = means[t, j]
        y += a * (z - y)
        h = o * y
        raw[t, 0, j], raw[t, 2, j], raw[t, 3, j] = a, z, o
        means[t + 1, j] = y
        h4[0, j] = h
        h4[1, j] = h
        h4[2, j] = h
        h4[3, j] = h


@numba.jit(**_STRICT)
def _backward_token(t, saved, means, dh, back, carry, d_raw):  # type: ignore[no-untyped-def]
    """Saved, d_raw [T,4,N]; means [T+1,N]; dh [T,N]; back [4,N] = R d_raw[t+1]; carry [2,N] (u, l)."""
    for j in range(saved.shape[2]):
        a, f, z, o = saved[t, 0, j], saved[t, 1, j], saved[t, 2, j], saved[t, 3, j]
        y = means[t + 1, j]
        dh_t = dh[t, j] + ((back[0, j] + back[1, j]) + (back[2, j] + back[3, j]))
        u, l = carry[0, j] + dh_t * o, carry[1, j]
        kept = (_ONE - a) * (l - u * (y - means[t, j]))
        e = _exp_of_negative(-abs(f))
        carry[0, j] = u * (_ONE - a)
        carry[1, j] = kept
        d_raw[t, 0, j] = l - kept
        d_raw[t, 1, j] = kept * ((e if f > 0 else _ONE) / (_ONE + e))
        d_raw[t, 2, j] = u * a * (_ONE - z * z)
        d_raw[t, 3, j] = dh_t * y * o * (_ONE - o)


def run_forward(
    raw: Tensor, weight: Tensor, means: Tensor, h: Tensor, log_n: Tensor, m: Tensor
) -> tuple[Tensor, Tensor]:
    """See :func:`kernels.slstm.fused.run_forward`."""
    h4, scale = h.expand(4, *h.shape).contiguous(), torch.stack([log_n, m])
    h_flat, raw_flat = h4.flatten(0, 1), raw.flatten(1, 2).unbind(0)
    arrays = raw.flatten(2).numpy(), means.flatten(1).numpy(), scale.flatten(1).numpy(), h4.flatten(1).numpy()
    for t, pre in enumerate(raw_flat):
        pre.baddbmm_(h_flat, weight)
        _forward_token(t, *arrays)
    return scale[0], scale[1]


@numba.jit(**_STRICT)
def _output_before(t, saved, means, h4):  # type: ignore[no-untyped-def]
    """The output of token t - 1, t > 0, once for each gate, to h4 [4,N]."""
    for j in range(saved.shape[2]):
        h = saved[t - 1, 3, j] * means[t, j]
        h4[0, j] = h
        h4[1, j] = h
        h4[2, j] = h
        h4[3, j] = h


def run_backward(
    saved: Tensor,
    weight: Tensor,
    means: Tensor,
    h: Tensor,
    dh: Tensor,
    u: Tensor,
    l: Tensor,
    inject: Tensor | None,
) -> tuple[Tensor, ...]:
    """See :func:`kernels.slstm.fused.run_backward`; R's gradient while its factors are hot."""
    d_raw, back, carry = torch.empty_like(saved), torch.zeros_like(saved[0]), torch.stack([u, l])
    d_flat, back_flat, transposed = d_raw.flatten(1, 2).unbind(0), back.flatten(0, 1), weight.transpose(1, 2)
    d_weight, h4 = torch.zeros_like(weight), torch.empty_like(back)
    h4_transposed = h4.flatten(0, 1).transpose(1, 2)
    before = saved.flatten(2).numpy(), means.flatten(1).numpy(), h4.flatten(1).numpy()
    tensors = (
        saved.flatten(2),
        means.flatten(1),
        dh.flatten(1),
        back.flatten(1),
        carry.flatten(1),
        d_raw.flatten(2),
    )
    arrays = [x.numpy() for x in tensors]
    for t in range(len(d_flat) - 1, -1, -1):
        _backward_token(t, *arrays)
        if inject is not None:
            d_raw[t, :2].add_(inject[t])
        torch.bmm(d_flat[t], transposed, out=back_flat)
        if t > 0:
            _output_before(t, *before)
        else:
            h4.copy_(h)
        d_weight.baddbmm_(h4_transposed, d_flat[t])
    return d_raw, d_weight, back.sum(0), carry[0], carry[1]
