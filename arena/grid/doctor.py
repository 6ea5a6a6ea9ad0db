"""What this machine can run: versions, devices, and every fast path against its reference, gradients
included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from arena.grid.environment import cpu_count, environment

LIMIT = 1e-4
"""Largest normwise relative error of a float32 output or gradient against the float64 reference."""
ON_CPU = ("chunked", "fused", "numba")
ON_CUDA = ("chunked", "fused", "triton")


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
    wrong = 0
    for device in ["cpu", *(["cuda"] if around["gpus"] else [])]:
        for operator, (backends, make) in _cases().items():
            for backend in (b for b in backends if b in (ON_CPU if device == "cpu" else ON_CUDA)):
                verdict = _compare(make, backend, device)
                wrong += verdict.startswith("WRONG")
                print(f"{operator:14} {backend:10} {device:5} {verdict}")
    return int(wrong > 0)


def _cases() -> dict[str, tuple[tuple[str, ...], Callable[..., Any]]]:
    """Operator -> (fast paths, a function that makes its inputs and calls it)."""
    import torch
    import torch.nn.functional as F

    from kernels import gated_memory, mlstm, short_conv
    from kernels.slstm import slstm

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    rng = torch.Generator().manual_seed(0)
    B, T, H, K = 2, 130, 2, 16
    key = F.normalize(normal(B, T, H, K), dim=-1)
    gates = [
        F.logsigmoid(normal(B, T, H, K)),
        torch.sigmoid(normal(B, T, H, K)),
        torch.sigmoid(normal(B, T, H, K)),
    ]
    return {
        "gated_memory": (("chunked", "triton"), _call(gated_memory, normal(B, T, H, K), key, normal(B, T, H, K), *gates)),
        "mlstm": (
            ("chunked", "triton"),
            _call(mlstm, *(normal(B, T, H, K) for _ in range(3)), normal(B, T, H), normal(B, T, H) + 2),
        ),
        "slstm": (("fused", "numba", "triton"), _call(slstm, normal(B, T, 4, H, K), normal(4, H, K, K) / 8)),
        "short_conv": (("fused", "triton"), _call(short_conv, normal(B, T, K), normal(4, K))),
    }


def _call(operator: Callable[..., Any], *inputs: Any) -> Callable[..., list[Any]]:
    """A function (backend, device, dtype) -> the output and every gradient, on the CPU in float64."""

    def run(backend: str, device: str, dtype: Any) -> list[Any]:
        import torch

        tensors = [x.to(device=device, dtype=dtype).requires_grad_() for x in inputs]
        output = operator(*tensors, backend=backend)[0]
        weight = torch.linspace(-1, 1, output.numel(), device=device, dtype=dtype).view_as(output)
        gradients = torch.autograd.grad((output * weight).sum(), tensors)
        return [x.detach().cpu().double() for x in (output, *gradients)]

    return run


def _compare(run: Callable[..., list[Any]], backend: str, device: str) -> str:
    import torch

    expected = run("reference", "cpu", torch.float64)
    try:
        found = run(backend, device, torch.float32)
    except Exception as error:  # a missing package, a device that the path is not for, a compiler that fails
        return f"cannot run: {' '.join(str(error).split())[:120]}"
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
    worst = max(errors)
    fine = worst <= LIMIT  # false for NaN too
    return f"{'ok' if fine else 'WRONG'}, largest relative error {worst:.1e} (outputs and gradients)"
