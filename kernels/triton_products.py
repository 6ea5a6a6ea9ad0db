"""Matrix products inside Triton kernels, by how exact they are (``PRECISION``, a compile-time name).

- ``split``: three tf32 products of halves, good to about 2^-23: for fp32 operands on tensor cores;
- ``tf32``: operands rounded to 11 bits;
- ``half``: operands rounded to the 16-bit type ``HALF``;
- ``ieee``: plain fp32, the only one that Triton's interpreter and other vendors' GPUs have.

All of them accumulate in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def operand(x, HALF: tl.constexpr, PRECISION: tl.constexpr):
    """A factor of a product, prepared: (what is multiplied, what rounding took from it)."""
    if PRECISION == "split" or PRECISION == "tf32":
        # rounding, which the tensor cores don't do: what they cut off is biased towards zero
        high = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        low = x - high
    elif PRECISION == "half":
        high = x.to(HALF)
        low = high
    else:
        high = x
        low = x
    return high, low


@triton.jit
def product(a, a_low, b, b_low, PRECISION: tl.constexpr):
    """Matrix product of two prepared factors."""
    if PRECISION == "split":
        c = tl.dot(a_low, b, input_precision="tf32")
        c = tl.dot(a, b_low, c, input_precision="tf32")
        c = tl.dot(a, b, c, input_precision="tf32")
    elif PRECISION == "half":
        c = tl.dot(a, b)
    else:
        c = tl.dot(a, b, input_precision=PRECISION)
    return c


@triton.jit
def multiply(a, b, HALF: tl.constexpr, PRECISION: tl.constexpr):
    """Matrix product of two tiles of any float type."""
    if PRECISION != "half":
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    a, a_low = operand(a, HALF, PRECISION)
    b, b_low = operand(b, HALF, PRECISION)
    return product(a, a_low, b, b_low, PRECISION)
