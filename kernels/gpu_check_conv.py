"""Check the Triton kernels of sLSTM and short convolutions on a GPU: ``python -m kernels.gpu_check_conv``.

Outputs and every gradient against the float64 reference, with NaN left in the allocator's free memory, and
twice, for the same bits; also from under ``vmap``, a CUDA graph and ``torch.compile``. In several processes:
most of the time is compilation. ``kernels.gpu_bench_conv`` times what has passed.

Results are printed and, with ``--out FILE``, written as JSON with the GPU's name and the versions.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import itertools
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.short_conv import triton_dynamic, triton_static
from kernels.short_conv.dynamic import dynamic_short_conv
from kernels.short_conv.packing import packing_of
from kernels.short_conv.reference import short_conv_reference
from kernels.slstm.reference import slstm_reference

triton_slstm = importlib.import_module("kernels.slstm.triton")
# normwise relative errors allowed: the whole budget in fp32; one rounding of the result and more in 16 bits.
# The sLSTM feeds what it rounds back into itself.
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 3e-3}

Case = tuple[str, tuple[int, ...], torch.dtype, dict[str, Any]]


def cases_of() -> list[Case]:
    """(operator, shape, dtype, options) of every case that is checked."""
    cases: list[Case] = []
    types = (torch.float32, torch.bfloat16, torch.float16)
    for i, (K, dtype) in enumerate(itertools.product((16, 20, 32, 64, 128), types)):
        cases.append(("slstm", (17 + i, 60 + i, 2, K), dtype, {"initial": i % 2 == 0}))
    cases.append(("slstm", (3, 512, 2, 64), torch.float32, {"initial": True, "forget": 5.0}))
    for i, (W, D) in enumerate(itertools.product((1, 3, 4, 8), (96, 257))):
        options = {"silu": i % 2 == 0, "residual": i % 3 == 0, "bias": i % 3 < 2, "initial": i % 4 > 0}
        cases.append(("static", (2, 190 + i, D, W), types[i % 3], options))
        ranks = (3, 9, 14, 5) if i % 3 == 0 else (3, 16, 17, 40)  # fp32 takes fewer
        cases.append(("low-rank", (2, 190 + i, D, W, ranks[i % 4]), types[i % 3], options))
        cases.append(("head-wise", (2, 140 + i, 96, W, (1, 3, 8, 96)[i % 4]), types[i % 3], options))
    full = {"silu": True, "residual": True, "bias": True, "initial": True}
    for dtype in types[:2]:
        cases.append(("static", (2, 2048, 512, 4), dtype, full))
        cases.append(("low-rank", (2, 2048, 512, 4, 16), dtype, full))
        cases.append(("low-rank", (2, 2048, 512, 4, 16), dtype, {"residual": True, "bias": True}))
        for lengths in ((1, 2, 0, 60, 3, 100), (64, 1, 1, 1, 65)):
            cases.append(("static", (1, sum(lengths), 80, 4), dtype, full | {"lengths": lengths}))
            cases.append(("low-rank", (1, sum(lengths), 80, 4, 5), dtype, full | {"lengths": lengths}))
            cases.append(("head-wise", (1, sum(lengths), 80, 4, 5), dtype, full | {"lengths": lengths}))
        for how in ("vmap", "graph", "compile"):
            cases.append(("slstm", (5, 40, 2, 32), dtype, {"initial": True, "how": how}))
            cases.append(("static", (2, 70, 96, 4), dtype, full | {"how": how}))
            cases.append(("low-rank", (2, 70, 96, 4, 16), dtype, full | {"how": how}))
            cases.append(("head-wise", (2, 70, 96, 4, 6), dtype, full | {"how": how}))
    for i, (name, shape) in enumerate((("static", ()), ("low-rank", (16,)), ("head-wise", (4,)))):
        step = (5, 1, 64, 4, *shape)
        cases.append((name, step, types[i % 3], full))
        cases.append((name, (2, 9000, 64, 4, *shape), types[(i + 1) % 3], full | {"initial": False}))
        cases.append((name, (600, 64, 128, 4, *shape), torch.bfloat16, full))
    cases.append(("low-rank", (2, 300, 128, 4, 64), torch.bfloat16, full))
    cases.append(("low-rank", (2, 300, 128, 8, 62), torch.bfloat16, full))
    cases.append(("low-rank", (2, 300, 128, 4, 30), torch.float32, full))
    cases.append(("low-rank", (2, 300, 2048, 4, 14), torch.float16, {"bias": True, "residual": True}))
    return cases


def make(
    case: Case,
) -> tuple[dict[str, Tensor], Callable[..., list[Tensor]], Callable[..., list[Tensor]]]:
    """Inputs (float64 of rounded values), the Triton operator and the reference, from inputs to outputs."""
    name, shape, dtype, options = case
    rng = torch.Generator(device="cuda").manual_seed(sum(shape))

    def normal(*size: int) -> Tensor:
        made = torch.randn(*size, generator=rng, device="cuda", dtype=torch.float64)
        return made.to(dtype).double()

    if name == "slstm":
        B, T, H, K = shape
        gates = normal(B, T, 4, H, K)
        gates[:, :, 1] += options.get("forget", 0.0)
        inputs = {"gates": gates.to(dtype).double(), "recurrent": normal(4, H, K, K) * K**-0.5}
        inputs["recurrent"] = inputs["recurrent"].to(dtype).double()
        if options["initial"]:
            inputs |= {key: normal(B, H, K) for key in ("h", "c", "n", "m")}
            inputs["n"] = inputs["n"].abs() + 0.1

        def run(operator: Callable, x: dict[str, Tensor]) -> list[Tensor]:
            start = tuple(x[key] for key in ("h", "c", "n", "m")) if "h" in x else None
            if start is not None and x["gates"].dtype != torch.float64:
                start = tuple(a.float() for a in start)
            out, state = operator(x["gates"], x["recurrent"], start)
            return [out, *state]

        return inputs, lambda x: run(triton_slstm.slstm_triton, x), lambda x: run(slstm_reference, x)

    B, T, D, W = shape[:4]
    lengths = options.get("lengths")
    inputs = {"x": normal(B, T, D)}
    if name == "low-rank":
        inputs |= {"z": normal(B, T, shape[4]), "u": normal(shape[4], W, D)}
    elif name == "head-wise":
        inputs["filters"] = normal(B, T, W, shape[4])
    else:
        inputs["weight"] = normal(W, D)
    if options.get("bias"):
        inputs["bias"] = normal(D) if name == "static" else normal(W, D)
    if options.get("initial") and W > 1:
        inputs["initial_state"] = normal(len(lengths) if lengths else B, W - 1, D)
    activation, residual = "silu" if options.get("silu") else None, bool(options.get("residual"))
    packing = None
    if lengths:
        limits = torch.tensor((0, *itertools.accumulate(lengths)), device="cuda")
        packing = packing_of(limits, inputs["x"])

    def ours(x: dict[str, Tensor]) -> list[Tensor]:
        bias, state = x.get("bias"), x.get("initial_state")
        if name == "static":
            static = (x["x"], x["weight"], bias, activation, residual, state, packing)
            return [triton_static.short_conv_triton(*static)]
        form = (x["x"], x.get("z"), x.get("u"), x.get("filters"))
        return [triton_dynamic.dynamic_triton(*form, bias, activation, residual, state, packing)]

    def one(x: dict[str, Tensor]) -> Tensor:
        rest = {key: x.get(key) for key in ("z", "u", "filters")}
        if name == "static":
            args = (x["x"], x["weight"], x.get("bias"), activation, residual, x.get("initial_state"))
            return short_conv_reference(*args)
        common = {"bias": x.get("bias"), "initial_state": x.get("initial_state")}
        return dynamic_short_conv(
            x["x"], **rest, **common, activation=activation, residual=residual, backend="fused"
        )[0]

    def truth(x: dict[str, Tensor]) -> list[Tensor]:
        if not lengths:
            return [one(x)]
        pieces, start = [], 0
        for s, length in enumerate(lengths):
            part = dict(x)
            for key in ("x", "z", "filters"):
                if key in x:
                    part[key] = x[key][:, start : start + length]
            part["initial_state"] = x["initial_state"][s : s + 1]
            pieces.append(one(part))
            start += length
        return [torch.cat(pieces, 1)]

    return inputs, ours, truth


def errors_of(case: Case) -> dict[str, float]:
    """Normwise relative error of each output and gradient of one case."""
    inputs, ours, truth = make(case)
    dtype = case[2]

    def evaluate(operator: Callable, to: torch.dtype, weights: list[Tensor] | None, how: str = ""):
        leaves = {key: x.to(to).requires_grad_() for key, x in inputs.items()}
        if how == "vmap":  # the second of two replicas; the first has other values
            operator = second_replica(operator)
        elif how == "compile":
            operator = torch.compile(operator)

        def run() -> tuple[list[Tensor], list[Tensor]]:
            out = operator(leaves)
            nonlocal weights
            if weights is None:
                rng = torch.Generator(device="cuda").manual_seed(1)
                weights = [
                    torch.randn(o.shape, generator=rng, device="cuda", dtype=torch.float64).to(dtype).double()
                    for o in out
                ]
            loss = sum((o.double() * w).sum() for o, w in zip(out, weights, strict=True))
            return out, list(torch.autograd.grad(loss, list(leaves.values())))

        out, grads = replayed(run) if how == "graph" else run()
        found = {f"out{i}": o.detach() for i, o in enumerate(out)}
        return found | {f"d_{key}": g for key, g in zip(leaves, grads, strict=True)}, weights

    want, weights = evaluate(truth, torch.float64, None)
    torch.cuda.empty_cache()  # leave NaN in the allocator's free blocks: what a kernel does not write shows
    blocks = [torch.full((1 << n,), float("nan"), device="cuda") for n in (24, 22, 20, 18, 16, 14)]
    del blocks
    how = case[3].get("how", "")
    found, _ = evaluate(ours, dtype, weights, how)
    again, _ = evaluate(ours, dtype, weights, how)
    errors = {
        key: float((found[key].double() - b).norm() / b.norm().clamp_min(1e-30)) for key, b in want.items()
    }
    if not all(torch.equal(found[key], again[key]) for key in found):
        errors["not deterministic"] = float("inf")
    return errors


def second_replica(operator: Callable) -> Callable:
    """The operator under vmap over two replicas, of which the first has other values."""

    def run(leaves: dict[str, Tensor]) -> list[Tensor]:
        stacked = {key: torch.stack([0.5 * x.detach(), x]) for key, x in leaves.items()}
        return [x[1] for x in torch.func.vmap(operator)(stacked)]

    return run


def replayed(run: Callable) -> tuple[list[Tensor], list[Tensor]]:
    """What a CUDA graph of the call leaves, poisoned before the replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    gc.collect()
    gc.disable()  # what it throws away may belong to another stream, which a capture does not stand
    try:
        with torch.cuda.graph(graph):
            out, grads = run()
    finally:
        gc.enable()
    for x in (*out, *grads):
        x.detach().fill_(float("nan"))
    graph.replay()
    return [x.detach().clone() for x in out], [x.clone() for x in grads]


def judge(case: Case) -> dict:
    """The row of one case: its errors, and whether all are inside the limit."""
    row = {
        "operator": case[0],
        "shape": case[1],
        "dtype": str(case[2])[6:],
        "options": case[3],
        "good": False,
    }
    try:
        found = errors_of(case)
    except Exception as error:
        cause = error.__context__ or error  # what broke a capture, not that it was broken
        return row | {"error": f"{type(cause).__name__}: {str(cause)[:300]}"}
    return row | {"errors": found, "good": all(x < LIMIT[case[2]] for x in found.values())}


def check(jobs: int, only: str | None = None) -> list[dict]:
    """Every case of the list, or of the operators ``only`` names; a row a case, the failures marked."""
    cases = [case for case in cases_of() if only is None or case[0] in only.split(",")]
    rows = []
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for row in pool.map(judge, cases):
            rows.append(row)
            report(row)
    print(f"{sum(row['good'] for row in rows)} of {len(rows)} cases good", flush=True)
    return rows


def report(row: dict) -> None:
    """Print the row of a case: its worst error, or all if it failed."""
    errors = row.get("errors", {})
    worst = max(errors, key=lambda key: errors[key]) if errors else ""
    values = f"worst {worst} {errors[worst]:.1e}" if errors else row.get("error", "")
    print(
        "ok  " if row["good"] else "FAIL",
        *(row[x] for x in ("operator", "shape", "dtype")),
        values,
        flush=True,
    )
    if not row["good"]:
        print("     ", row["options"], {key: f"{x:.0e}" for key, x in errors.items()}, flush=True)


def main() -> None:
    """Parse, check, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out")
    parser.add_argument("--jobs", type=int, default=14)
    parser.add_argument("--only", help="operators, separated by commas: slstm, static, low-rank, head-wise")
    options = parser.parse_args()
    result = versions() | {"check": check(options.jobs, options.only)}
    if options.out:
        with open(options.out, "w") as file:
            json.dump(result, file, indent=1, default=str)
    if not all(row["good"] for row in result["check"]):
        raise SystemExit(1)


def versions() -> dict[str, Any]:
    """The GPU's name and what ran on it."""
    return {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}


if __name__ == "__main__":
    main()
