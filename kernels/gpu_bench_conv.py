"""Time the Triton kernels of sLSTM and short convolutions on a GPU: ``python -m kernels.gpu_bench_conv``.

    bench   the convolutions beside the copy bandwidth measured in the same run, torch's conv1d and, where it
            is installed, flash-linear-attention's convolution; the sLSTM beside the torch path and the
            token loop
    sweep   launch settings side by side

A time is the median over replays of a CUDA graph of several calls, so that what the CPU spends on a launch
does not count; ``call_us`` is the time of a call as the user makes it. Results are printed and, with
``--out FILE``, written as JSON with the GPU's name and the versions.
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
import torch.nn.functional as F
from torch import Tensor
from triton.testing import do_bench

from kernels.gpu_check_conv import make, versions
from kernels.short_conv import triton_dynamic, triton_static
from kernels.slstm.fused import slstm_fused
from kernels.slstm.reference import slstm_reference

triton_slstm = importlib.import_module("kernels.slstm.triton")
LM = (4, 4096, 2048, 4, 16)
SLSTM_SHAPES = ((64, 256, 2, 32), (64, 512, 4, 64), (1024, 256, 2, 32), (16, 1024, 4, 128))
FORMS = ("static", "static silu", "low-rank", "low-rank no bias", "low-rank silu", "head-wise")


def graph_us(call: Callable[[], Any], calls: int = 8, replays: int = 15) -> float:
    """Median microseconds of a call inside a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return do_bench_of(graph.replay, replays) / calls


def do_bench_of(call: Callable[[], Any], repeats: int) -> float:
    """Median microseconds between two events around the call."""
    call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in times)[repeats // 2] * 1e3


def copy_rate() -> float:
    """Bytes a second, read and written, of a device-to-device copy."""
    a = torch.randn(1 << 28, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.nbytes / (do_bench(lambda: b.copy_(a), warmup=20, rep=100, return_mode="median") / 1e3)


def work_of(name: str, tokens: int | None = None) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """An operator in bf16 over fixed random inputs, and its leaves; convolutions at the shape LM.

    ``tokens``: one sequence that short in place of LM's, enough to compile for.
    """
    if name.startswith("slstm"):
        return slstm_work(
            SLSTM_SHAPES[[f"slstm {shape}" for shape in SLSTM_SHAPES].index(name)], torch.bfloat16
        )
    B, T, D, W, R = LM
    if tokens is not None:
        B, T = 1, tokens
    form = "low-rank" if name.startswith("low-rank") else name.split()[0]
    options = {"bias": "no bias" not in name, "residual": form != "static", "silu": "silu" in name}
    shape = {"static": (B, T, D, W), "head-wise": (B, T, D, W, D // 16)}.get(form, (B, T, D, W, R))
    inputs, ours, _ = make((form, shape, torch.bfloat16, options))
    leaves = {key: x.to(torch.bfloat16).requires_grad_() for key, x in inputs.items()}
    return lambda: ours(leaves)[0], list(leaves.values())


def times_of(run: Callable[[], Tensor], leaves: list[Tensor]) -> dict[str, float]:
    """Microseconds of the forward, of forward and backward, and the difference."""
    upstream = torch.randn_like(run())

    def forward() -> None:
        with torch.no_grad():
            run()

    alone, together = graph_us(forward), graph_us(partial(gradients, run, leaves, upstream))
    return {"forward_us": alone, "backward_us": together - alone, "both_us": together}


def gradients(run: Callable[[], Tensor], leaves: list[Tensor], upstream: Tensor) -> None:
    """One forward and backward."""
    torch.autograd.grad(run(), leaves, upstream)


def bench_convolutions(rate: float) -> list[dict]:
    """Ours, then the alternatives, at the language-model shape."""
    B, T, D, W, R = LM
    rows: list[dict] = []
    for name in FORMS:
        run, leaves = work_of(name)
        # every input read once, every output written once, in both passes
        extra = 3 * W * D // 16 if name == "head-wise" else 4 * R if name.startswith("low-rank") else 0
        floor = B * T * (5 * D + extra) * 2 / rate * 1e6
        times = times_of(run, leaves)
        call_us = do_bench_of(partial(gradients, run, leaves, torch.randn_like(run())), 25)
        row = {"what": name, **times, "call_us": call_us, "floor_us": floor}
        rows.append(row | {"of_copy": floor / times["both_us"]})
        show(rows[-1])
    x = torch.randn(B, T, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(D, 1, W, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(D, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def conv1d() -> Tensor:
        return F.conv1d(x.transpose(1, 2), weight, bias, padding=W - 1, groups=D)[..., :T].transpose(1, 2)

    rows.append({"what": "torch conv1d, no activation", **times_of(conv1d, [x, weight, bias])})
    show(rows[-1])
    try:
        from fla.modules.convolution import causal_conv1d
    except ImportError as error:
        print(f"flash-linear-attention is not installed: {error}", flush=True)
        return rows
    taps = weight.detach()[:, 0].clone().requires_grad_()
    for activation in (None, "silu"):

        def theirs(activation: str | None = activation) -> Tensor:
            out = causal_conv1d(x, taps, bias, activation=activation, backend="triton")
            return out[0] if isinstance(out, tuple) else out

        with torch.no_grad():
            padded = torch.cat([x.new_zeros(B, W - 1, D), x], 1).double()
            want = sum(padded[:, j : j + T] * taps[:, j].double() for j in range(W)) + bias.double()
            want = want if activation is None else F.silu(want)
            off = float((theirs().double() - want).norm() / want.norm())
        name = f"flash-linear-attention causal_conv1d, {activation or 'no activation'}"
        rows.append({"what": name, **times_of(theirs, [x, taps, bias]), "error": off})
        show(rows[-1])
    return rows


def slstm_work(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """The Triton sLSTM over random gates [B,T,4,H,K] and R, and those."""
    B, T, H, K = shape
    gates = torch.randn(B, T, 4, H, K, device="cuda", dtype=dtype, requires_grad=True)
    recurrent = (torch.randn(4, H, K, K, device="cuda") * K**-0.5).requires_grad_()
    return lambda: triton_slstm.slstm_triton(gates, recurrent, None)[0], [gates, recurrent]


def bench_slstm() -> list[dict]:
    """Forward and backward: ours, the torch path and the token loop as the user calls them."""
    rows = []
    for shape, dtype in itertools.product(SLSTM_SHAPES, (torch.float32, torch.bfloat16)):
        run, leaves = slstm_work(shape, dtype)
        row = {"what": "slstm", "shape": shape, "dtype": str(dtype)[6:], **times_of(run, leaves)}
        gates, recurrent = leaves
        upstream = torch.randn_like(gates[:, :, 0])
        others: dict[str, Callable[[], Tensor]] = {
            "call_us": run,
            "torch_call_us": lambda g=gates, r=recurrent: slstm_fused(g.float(), r, None, False)[0],  # type: ignore[misc]
        }
        if dtype == torch.float32:
            others["loop_call_us"] = lambda g=gates, r=recurrent: slstm_reference(g, r, None)[0]  # type: ignore[misc]
        for key, operator in others.items():
            row[key] = do_bench_of(
                partial(gradients, operator, leaves, upstream), 9 if key == "call_us" else 3
            )
        rows.append(row)
        show(row)
    return rows


def settings_of() -> list[tuple[str, bool, dict]]:
    """(form, backward, settings) worth comparing at the language-model shape."""
    found: list[tuple[str, bool, dict]] = []
    for shape, warps in itertools.product(SLSTM_SHAPES, (1, 2, 4, 8)):
        found.append((f"slstm {shape}", False, {"warps": warps}))
    for time, channels, warps, registers in (
        (64, 64, 4, None), (64, 32, 4, None), (64, 32, 4, 128), (64, 64, 4, 128), (128, 64, 8, 128),
    ):  # fmt: skip
        setting = {"time_block": time, "channels": channels, "warps": warps, "registers": registers}
        found.append(("low-rank", False, setting | {"run": 1024}))
    for time, channels, warps, registers in (
        (64, 64, 4, None), (64, 32, 4, None), (64, 32, 4, 168), (64, 64, 4, 168), (128, 32, 8, 128),
        (128, 64, 8, None),
    ):  # fmt: skip
        setting = {"time_block": time, "channels": channels, "warps": warps, "registers": registers}
        found.append(("low-rank", True, setting | {"run": 2048}))
    for time, channels, warps in ((16, 64, 1), (16, 64, 2), (32, 64, 2), (32, 64, 4), (16, 128, 4)):
        for backward in (False, True):
            setting = {"time_block": time, "channels": channels, "warps": warps, "run": 256}
            found.append(("head-wise", backward, setting))
    for channels, ahead, run in itertools.product((128, 256), (4, 8), (128,)):
        for backward in (False, True):
            found.append(("static", backward, {"channel_block": channels, "ahead": ahead, "run": run}))
    return found


def set_launch(name: str, backward: bool, setting: dict) -> None:
    """Make every later launch of one direction of ours use these settings."""
    modules: dict[str, Any] = {"static": triton_static, "slstm": triton_slstm}
    module = modules.get(name.split()[0], triton_dynamic)
    usual = module.__dict__.setdefault("usual_launch_of", module.launch_of)

    def launch_of(
        *args: Any,
    ) -> Any:  # the last argument is whether it is for the backward, but for the sLSTM
        mine = module is triton_slstm or args[-1] == backward
        return replace(usual(*args), **setting) if mine else usual(*args)

    module.launch_of = launch_of


def compile_setting(work: tuple[str, bool, dict]) -> str:
    """Run a setting once, so that its kernels lie in Triton's cache; the error if it fails."""
    try:
        set_launch(*work)
        run, leaves = work_of(work[0], 128)
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
    cases = {name: work_of(name) for name in dict.fromkeys(name for name, *_ in settings)}
    for (name, backward, setting), failure in zip(settings, failures, strict=True):
        row: dict = {"what": name, "backward": backward, **setting}
        if failure:
            row["error"] = failure
        else:
            set_launch(name, backward, setting)
            row |= times_of(*cases[name])
        rows.append(row)
        show(row)
    return rows


def show(row: dict) -> None:
    """One line, numbers rounded."""
    print(*(f"{k}={round(v, 2) if isinstance(v, float) else v}" for k, v in row.items()), flush=True)


def main() -> None:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("bench", "sweep"), nargs="?", default="bench")
    parser.add_argument("--out")
    parser.add_argument("--jobs", type=int, default=14)
    options = parser.parse_args()
    result: dict = versions()
    if options.what == "bench":
        rate = copy_rate()
        show({"copy TB/s": rate / 1e12})
        result |= {"copy_bytes_per_s": rate, "convolutions": bench_convolutions(rate), "slstm": bench_slstm()}
    else:
        result["sweep"] = sweep(options.jobs)
    if options.out:
        with open(options.out, "w") as file:
            json.dump(result, file, indent=1, default=str)


if __name__ == "__main__":
    main()
