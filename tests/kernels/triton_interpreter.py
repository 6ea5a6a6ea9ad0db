"""Running the Triton kernels' tests in Triton's interpreter, on the CPU.

``TRITON_INTERPRET`` counts when Triton is first imported, and a whole process interprets or does not: in one
that does not, the tests marked :data:`interpreted` are skipped and :func:`run_in_a_fresh_process` runs their
file by itself. The variable is never set here: it would reach the tests of other files, which time or examine
what a user's process does. A file that imports this module needs the fixture ``poisoned`` too.
"""

import os
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be interpreted")

from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

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
