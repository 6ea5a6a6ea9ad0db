"""Running the Triton kernels' tests in Triton's interpreter, on the CPU.

``TRITON_INTERPRET`` counts when Triton is first imported, and a whole process interprets or does not: in one
that does not, the tests marked :data:`interpreted` are skipped and :func:`run_in_a_fresh_process` runs their
file by itself. The variable is never set here: it would reach the tests of other files, which time or examine
what a user's process does. A file that imports this module needs the fixture ``poisoned`` too.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be interpreted")

import triton.language as tl  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle  # noqa: E402

from kernels.triton_products import multiply  # noqa: E402

INTERPRETED = isinstance(triton.language.zeros, InterpretedFunction) and isinstance(
    multiply, InterpretedFunction
)
interpreted = pytest.mark.skipif(
    not INTERPRETED,
    reason="this process does not interpret; test_in_a_fresh_process runs these in one that does",
)
compiled = pytest.mark.skipif(INTERPRETED, reason="this process interprets already")


def run_in_a_fresh_process(file):
    """Run the tests of a file where Triton interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fill every buffer that a launcher takes with NaN: what a kernel does not write shows."""

    def poison(make):
        def made(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


@pytest.fixture
def bfloat16_products(monkeypatch):
    """Let the interpreter multiply bfloat16 tiles (not their bits), and round to nearest (not cut)."""

    def wide(x):
        bits = x.dtype.scalar == tl.bfloat16
        return (x.data.astype(np.uint32) << 16).view(np.float32) if bits else x.data

    def create_dot(self, a, b, d, *_):
        return TensorHandle(np.matmul(wide(a), wide(b), dtype=d.data.dtype) + d.data, d.dtype.scalar)

    plain = InterpreterBuilder.cast_impl

    def cast(self, x, to):
        kinds = x.dtype.scalar, to.scalar
        if kinds == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(x.data).view(np.uint32)
            return TensorHandle(((bits + ((bits >> 16) & 1) + 0x7FFF) >> 16).astype(np.uint16), tl.bfloat16)
        return TensorHandle(wide(x), tl.float32) if kinds == (tl.bfloat16, tl.float32) else plain(self, x, to)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast)
    monkeypatch.setattr(InterpreterBuilder, "create_fp_to_fp", lambda self, x, to, _: cast(self, x, to))
