"""What this machine can run: versions, devices, and every fast path against its reference, outputs and every
gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from arena.grid.environment import cpu_count, environment

LIMIT = 1e-4
"""Largest error of a float32 output or gradient against float64, relative to its largest entry (or to 1)."""
LOOP_FACTOR = 20
"""Where the float32 token loop itself is that much off, the limit is this many times its error."""
BACKENDS = {"cpu": ("chunked", "fused", "numba"), "cuda": ("chunked", "fused", "triton")}


class Case(NamedTuple):
    """One operator on one kind of inputs."""

    name: str
    operator: Callable[..., Any]
    backends: tuple[str, ...]
    inputs: dict[str, Any]


def examine() -> int:
    """Print what there is and what works; 1 when a fast path that runs here disagrees with its reference,
    else 0.
    """
    import torch

    around = environment()
    print(f"python {around['python']}, {around['system']}, {around['cpu']}, {cpu_count()} cores")
    print(", ".join(f"{name} {version}" for name, version in around["packages"].items()))
    print(f"commit {around['commit'] or 'unknown (not a checkout)'}")
    for index, name in enumerate(around["gpus"]):
        print(f"cuda:{index} {name}, {torch.cuda.get_device_properties(index).total_memory / 2**30:.0f} GiB")
    if not around["gpus"]:
        print("no GPU that torch can use: --device cpu")
    print("largest float32 error of any output or gradient against the float64 token loop:")
    wrong = 0
    for case in _cases():
        for device in ["cpu", *(["cuda"] if around["gpus"] else [])]:
            for backend in (name for name in case.backends if name in BACKENDS[device]):
                verdict = _compare(case, backend, device)
                wrong += verdict.startswith("WRONG")
                print(f"{case.name:32} {backend:8} {device:5} {verdict}")
    return int(wrong > 0)


def _cases() -> Iterator[Case]:
    """Every operator; the memory also where tasks are hardest on numerics."""
    import torch

    from kernels import gated_memory, mlstm, short_conv, slstm
    from kernels.check import gated_memory_inputs

    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    B, T, H, K = 2, 130, 2, 16
    chunked = ("chunked", "triton")
    settings: dict[str, dict[str, Any]] = {
        "": {},
        ", scalar gates": {"log_decay": "scalar", "erase": "scalar", "write": "scalar"},
        ", no erase": {"erase": None},
        ", gates at their ends": {"extreme": True},
        ", one repeated key": {"n_keys": 1, "log_decay": None},
    }
    for name, setting in settings.items():
        inputs = gated_memory_inputs(shape=(B, T, H, K, K), **setting)
        yield Case(f"gated_memory{name}", gated_memory, chunked, inputs)
    heads = {name: normal(B, T, H, K) for name in ("q", "k", "v")}
    gates = {"input_gate": normal(B, T, H), "forget_gate": normal(B, T, H) + 2}
    yield Case("mlstm", mlstm, chunked, heads | gates)
    inputs = {"gates": normal(B, T, 4, H, K), "recurrent": normal(4, H, K, K) / 8}
    yield Case("slstm", slstm, ("fused", "numba", "triton"), inputs)
    yield Case("short_conv", short_conv, ("fused", "triton"), {"x": normal(B, T, K), "weight": normal(4, K)})


def _compare(case: Case, backend: str, device: str) -> str:
    import torch

    from kernels.check import errors, outputs_and_gradients

    loop = partial(case.operator, backend="reference")
    truth = outputs_and_gradients(loop, case.inputs)
    there = {name: None if x is None else x.to(device) for name, x in case.inputs.items()}
    fast = partial(case.operator, backend=backend)
    try:
        found = outputs_and_gradients(fast, there, dtype=torch.float32)
    except Exception as error:  # a missing package, a device that the path is not for, a compiler that fails
        return f"cannot run: {' '.join(str(error).split())[:120]}"
    of_loop = errors(outputs_and_gradients(loop, case.inputs, dtype=torch.float32), truth)
    of_fast = errors({name: x.cpu() for name, x in found.items()}, truth)
    fine = all(error <= max(LIMIT, LOOP_FACTOR * of_loop[name]) for name, error in of_fast.items())
    worst = max(of_fast, key=lambda name: of_fast[name])
    return f"{'ok' if fine else 'WRONG'} {of_fast[worst]:.1e} ({worst})"
