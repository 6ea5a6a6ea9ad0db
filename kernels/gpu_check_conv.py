"""Check and time the Triton kernels of sLSTM and short convolutions: ``python -m kernels.gpu_check_conv``.

    check   outputs and every gradient against the float64 reference (in several processes: most of the time
            is compilation)
    bench   sLSTM beside the torch path; the convolutions beside the copy bandwidth measured in the same run
    sweep   launch settings side by side, microseconds of each kernel
    all     check, then bench

Results are printed and, with ``--out FILE``, written as JSON with the GPU's name and the versions.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
import triton
from torch import Tensor
from triton.testing import do_bench, do_bench_cudagraph

from kernels.short_conv import triton_dynamic, triton_static
from kernels.short_conv.dynamic import dynamic_short_conv
from kernels.short_conv.packing import packing_of
from kernels.short_conv.reference import short_conv_reference
from kernels.slstm.fused import slstm_fused
from kernels.slstm.reference import slstm_reference

triton_slstm = importlib.import_module("kernels.slstm.triton")
# normwise relative errors allowed: the whole budget in fp32; one rounding of the result and more in 16 bits.
# The sLSTM feeds what it rounds back into itself.
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 3e-3}
LM = (4, 4096, 2048, 4, 16)
SLSTM_SHAPES = ((64, 256, 2, 32), (64, 512, 4, 64), (1024, 256, 2, 32), (16, 1024, 4, 128))

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
        cases.append(("low-rank", (2, 190 + i, D, W, (3, 16, 17, 40)[i % 4]), types[i % 3], options))
        cases.append(("head-wise", (2, 140 + i, 96, W, (1, 3, 8, 96)[i % 4]), types[i % 3], options))
    full = {"silu": True, "residual": True, "bias": True, "initial": True}
    for dtype in types[:2]:
        cases.append(("static", (2, 2048, 512, 4), dtype, full))
        cases.append(("low-rank", (2, 2048, 512, 4, 16), dtype, full))
        cases.append(("low-rank", (2, 2048, 512, 4, 16), dtype, {"residual": True, "bias": True}))
        for lengths in ((1, 2, 0, 60, 3, 100), (64, 1, 1, 1, 65)):
            cases.append(("static", (1, sum(lengths), 80, 4), dtype, full | {"lengths": lengths}))
            cases.append(("low-rank", (1, sum(lengths), 80, 4, 5), dtype, full | {"lengths": lengths}))
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

    def evaluate(operator: Callable, to: torch.dtype, weights: list[Tensor] | None):
        leaves = {key: x.to(to).requires_grad_() for key, x in inputs.items()}
        out = operator(leaves)
        if weights is None:
            rng = torch.Generator(device="cuda").manual_seed(1)
            weights = [
                torch.randn(o.shape, generator=rng, device="cuda", dtype=torch.float64).to(dtype).double()
                for o in out
            ]
        loss = sum((o.double() * w).sum() for o, w in zip(out, weights, strict=True))
        grads = torch.autograd.grad(loss, list(leaves.values()))
        return {
            **{f"out{i}": o.detach() for i, o in enumerate(out)},
            **{f"d_{key}": g for key, g in zip(leaves, grads, strict=True)},
        }, weights

    want, weights = evaluate(truth, torch.float64, None)
    torch.cuda.empty_cache()  # leave NaN in the allocator's free blocks: what a kernel does not write shows
    blocks = [torch.full((1 << n,), float("nan"), device="cuda") for n in (24, 22, 20, 18, 16, 14)]
    del blocks
    found, _ = evaluate(ours, dtype, weights)
    again, _ = evaluate(ours, dtype, weights)
    errors = {
        key: float((found[key].double() - b).norm() / b.norm().clamp_min(1e-30)) for key, b in want.items()
    }
    if not all(torch.equal(found[key], again[key]) for key in found):
        errors["not deterministic"] = float("inf")
    return errors


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
        return row | {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    return row | {"errors": found, "good": all(x < LIMIT[case[2]] for x in found.values())}


def check(jobs: int) -> list[dict]:
    """Every case of the list; a row a case, the failures marked."""
    rows = []
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for row in pool.map(judge, cases_of()):
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


def copy_rate() -> float:
    """Bytes a second, read and written, of a device-to-device copy."""
    a = torch.randn(1 << 28, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.nbytes / (do_bench(lambda: b.copy_(a), warmup=20, rep=100, return_mode="median") / 1e3)


def conv_of(name: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Callable, list[Tensor]]:
    """A convolution of the language-model shape over fixed random inputs, and its leaves."""
    B, T, D, W, R = LM
    form = {"static": "static", "static silu": "static", "head-wise": "head-wise"}.get(name, "low-rank")
    options = {"bias": True, "residual": form != "static", "silu": name == "static silu"}
    shape = (B, T, D, W, D // 16 if form == "head-wise" else R)
    if name == "low-rank no bias":
        options["bias"] = False
    inputs, ours, _ = make((form, shape if form != "static" else shape[:4], dtype, options))
    leaves = {key: x.to(dtype).requires_grad_() for key, x in inputs.items()}
    return lambda: ours(leaves)[0], list(leaves.values())


def kernel_times(run: Callable, leaves: list[Tensor], repeats: int = 20) -> dict[str, float]:
    """Mean microseconds on the GPU of each kernel in one forward and backward, the small sums included."""
    upstream = torch.randn_like(run())
    flush = torch.empty(1 << 26, device="cuda")

    def call() -> None:
        out = run()
        torch.autograd.grad(out, leaves, upstream)

    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            flush.zero_()
            call()
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in profile.key_averages():
        key = event.key if event.key in ("forward_kernel", "backward_kernel") else "sums"
        if "FillFunctor" not in event.key and event.device_time_total > 0:
            times[key] = times.get(key, 0.0) + event.device_time_total / repeats
    return times


def bench() -> list[dict]:
    """Rows of times."""
    rate = copy_rate()
    rows: list[dict] = [{"what": "copy", "TB/s": rate / 1e12}]
    B, T, D, W, R = LM
    for name in ("static", "static silu", "low-rank", "low-rank no bias", "head-wise"):
        run, leaves = conv_of(name)
        extra = {"head-wise": 3 * W * D // 16, "low-rank": 4 * R, "low-rank no bias": 4 * R}.get(name, 0)
        least = B * T * (5 * D + extra) * 2  # every input read once, every output written once, both passes
        times = kernel_times(run, leaves)
        spent = sum(times.values())
        upstream = torch.randn_like(run())
        call = partial(lambda run, *rest: torch.autograd.grad(run(), *rest), run, leaves, upstream)
        replayed = do_bench_cudagraph(call, rep=60, return_mode="median")
        row = {"what": name, "us": times, "total_us": spent, "graph_us": replayed * 1e3}
        row |= {"of_copy": least / rate / (spent * 1e-6), "of_copy_graph": least / rate / (replayed * 1e-3)}
        rows.append(row)
        print(row, flush=True)
    for shape, dtype in itertools.product(SLSTM_SHAPES, (torch.float32, torch.bfloat16)):
        rows.append(slstm_times(shape, dtype))
        print(rows[-1], flush=True)
    return rows


def slstm_times(shape: tuple[int, int, int, int], dtype: torch.dtype) -> dict:
    """Milliseconds of a forward and backward as the user calls them, ours and the torch path's."""
    B, T, H, K = shape
    gates = torch.randn(B, T, 4, H, K, device="cuda", dtype=dtype, requires_grad=True)
    recurrent = (torch.randn(4, H, K, K, device="cuda") * K**-0.5).requires_grad_()

    def ours() -> None:
        triton_slstm.slstm_triton(gates, recurrent, None)[0].sum().backward()

    def torch_path() -> None:
        slstm_fused(gates.float(), recurrent, None, False)[0].sum().backward()

    mine = do_bench(ours, warmup=10, rep=60, return_mode="median")
    theirs = do_bench(torch_path, warmup=1, rep=1, return_mode="median")
    row = {"what": "slstm", "shape": shape, "dtype": str(dtype)[6:]}
    return row | {"triton_ms": round(mine, 3), "torch_ms": round(theirs, 3), "ratio": round(theirs / mine, 1)}


def settings_of() -> list[tuple[str, dict]]:
    """Launch settings worth comparing at the language-model shape."""
    found: list[tuple[str, dict]] = []
    for block, ahead, run in itertools.product((128, 256), (4, 8), (64, 128)):
        for name in ("static", "static silu"):
            found.append((name, {"channel_block": block, "ahead": ahead, "run": run}))
    for time, block, warps in (
        (32, 64, 4), (32, 64, 8), (32, 128, 8), (64, 64, 8), (32, 32, 1), (32, 128, 4), (64, 64, 4),
        (16, 64, 1), (64, 128, 8), (64, 32, 4),
    ):  # fmt: skip
        for registers in (None, 128):
            setting = {"time_block": time, "channel_block": block, "warps": warps, "registers": registers}
            found.append(("low-rank", setting | {"tiles_a_run": 1024 // time}))
    found.append(("low-rank", {"time_block": 32, "channel_block": 64, "warps": 8, "tiles_a_run": 64}))
    found.append(("low-rank", {"time_block": 32, "channel_block": 64, "warps": 8, "tiles_a_run": 16}))
    found.append(("low-rank no bias", {"time_block": 32, "channel_block": 64, "warps": 4, "tiles_a_run": 32}))
    return found


def set_launch(name: str, setting: dict) -> None:
    """Make every later launch of ours use these settings."""
    module = triton_static if name.startswith("static") else triton_dynamic
    usual = module.__dict__.setdefault("usual_launch_of", module.launch_of)
    module.launch_of = lambda *args: replace(usual(*args), **setting)  # type: ignore[attr-defined]


def compile_setting(work: tuple[str, dict]) -> str:
    """Run a setting once, so that its kernels lie in Triton's cache; the error if it fails."""
    try:
        set_launch(*work)
        run, leaves = conv_of(work[0])
        torch.autograd.grad(run().sum(), leaves)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:120]}"
    return ""


def sweep(jobs: int) -> list[dict]:
    """Time the kernels under every launch setting; a row a setting."""
    settings = settings_of()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        failures = list(pool.map(compile_setting, settings))
    rows = []
    for (name, setting), failure in zip(settings, failures, strict=True):
        row: dict = {"what": name, **setting}
        if failure:
            row["error"] = failure
        else:
            set_launch(name, setting)
            row |= {key: round(x, 1) for key, x in kernel_times(*conv_of(name)).items()}
        rows.append(row)
        print(*row.items() if failure else row.values(), flush=True)
    return rows


def main() -> None:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("check", "bench", "sweep", "all"), nargs="?", default="all")
    parser.add_argument("--out")
    parser.add_argument("--jobs", type=int, default=14)
    options = parser.parse_args()
    result: dict = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    if options.what in ("check", "all"):
        result["check"] = check(options.jobs)
    if options.what in ("bench", "all"):
        result["bench"] = bench()
    if options.what == "sweep":
        result["sweep"] = sweep(options.jobs)
    if options.out:
        with open(options.out, "w") as file:
            json.dump(result, file, indent=1, default=str)
    if not all(row["good"] for row in result.get("check", [])):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
