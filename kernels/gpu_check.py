"""Check and time the gated memory's Triton kernels on this machine's GPU: ``python -m kernels.gpu_check``.

    check   outputs and every gradient against the float64 reference, over the gate space and its traps
            (in several processes: most of the time is compilation)
    bench   forward and forward + backward beside flash-linear-attention, where that is installed
    sweep   launch settings (chunk, value tile, warps) side by side
    all     check, then bench

Results are printed and, with ``--out FILE``, written as JSON with the GPU's name and the versions.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
import triton
from torch import Tensor
from triton.testing import do_bench

from kernels.gated_memory import triton as ours
from kernels.gated_memory.reference import gated_memory_reference

NAMES = ("o", "state", "dq", "dk", "dv", "d_log_decay", "d_erase", "d_write", "d_initial")
# normwise relative errors allowed: the whole budget in fp32; one rounding of the result and more in 16 bits
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 3e-3}
SHAPES = ((64, 256, 2, 32, 32), (64, 512, 2, 64, 64), (1024, 256, 2, 32, 32))
LM_SHAPE = (4, 4096, 16, 128, 128)
POINTS = {"gdn": (1, 1, 1), "kda": (2, 1, 1), "gdn2": (2, 2, 2)}


def make_inputs(
    shape, kinds, *, seed=0, keys="random", decay="mild", initial=False, sign=False, dtype=torch.float32
):
    """Fresh (q, k, v, log_decay, erase, write, state) of a case, float64 of rounded values, and signs."""
    B, T, H, K, V = shape
    rng = torch.Generator(device="cuda").manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=rng, device="cuda", dtype=torch.float64)

    def gate(kind, width):
        size = (B, T, H) if kind == 1 else (B, T, H, width)
        return None if kind == 0 else torch.rand(size, generator=rng, device="cuda", dtype=torch.float64)

    q, v = normal(B, T, H, K), normal(B, T, H, V)
    k = normal(B, T, H, K)
    if keys != "random":  # sequences of one or two keys: the unit-triangular system at its worst
        few = normal(B, 1 if keys == "one" else 2, H, K)
        which = torch.randint(few.shape[1], (T,), generator=rng, device="cuda")
        k = few[:, which]
    k = k / k.norm(dim=-1, keepdim=True)
    log_decay, erase, write = gate(kinds[0], K), gate(kinds[1], K), gate(kinds[2], V)
    if log_decay is not None:
        scales = {"mild": 0.1, "strong": 20.0, "one": 0.0, "erasing": 1.0}
        log_decay = log_decay.log() * scales[decay]
        if decay == "erasing":
            log_decay = torch.where(gate(kinds[0], K) < 0.2, -torch.inf, log_decay)
    if erase is not None:
        erase = torch.full_like(erase, 2.0) if keys != "random" else 2 * erase
    signs = None
    if sign and log_decay is not None:
        signs = torch.where(gate(kinds[0], K) < 0.5, -1.0, 1.0).double()
    state = normal(B, H, K, V) if initial else None
    inputs = [None if x is None else x.to(dtype).double() for x in (q, k, v)]
    gates = [None if x is None else x.float().double() for x in (log_decay, erase, write, state)]
    return [*inputs, *gates], signs


def evaluate(operator: Callable, inputs, sign, weights, dtype) -> list[Tensor | None]:
    """Outputs and gradients of one operator, the inputs cast to ``dtype`` (gates to fp32 unless float64)."""
    gate_type = torch.float64 if dtype == torch.float64 else torch.float32
    types = [dtype] * 3 + [gate_type] * 4
    leaves: list = [None if x is None else x.detach().to(t) for x, t in zip(inputs, types, strict=True)]
    for x in leaves:
        if x is not None:
            x.requires_grad_()
    q, k, v, log_decay, erase, write, state = leaves
    signs = None if sign is None else sign.to(gate_type)
    o, final = operator(q, k, v, log_decay, erase, write, signs, k.shape[-1] ** -0.5, state)
    loss = (o.double() * weights[0]).sum() + (final.double() * weights[1]).sum()
    grads = torch.autograd.grad(loss, [x for x in leaves if x is not None])
    found = iter(grads)
    return [o.detach(), final.detach()] + [None if x is None else next(found) for x in leaves]


def errors_of(shape, kinds, dtype, **options) -> dict[str, float]:
    """Normwise relative error of each output and gradient of one case."""
    inputs, sign = make_inputs(shape, kinds, dtype=dtype, **options)
    B, T, H, K, V = shape
    rng = torch.Generator(device="cuda").manual_seed(1)
    weights = [
        torch.randn(*size, generator=rng, device="cuda", dtype=torch.float64)
        for size in ((B, T, H, V), (B, H, K, V))
    ]
    weights[0] = weights[0].to(dtype).double()
    truth = evaluate(gated_memory_reference, inputs, sign, weights, torch.float64)
    poison()
    found = evaluate(ours.gated_memory_triton, inputs, sign, weights, dtype)
    return {
        name: float((a.double() - b).norm() / b.norm().clamp_min(1e-30))
        for name, a, b in zip(NAMES, found, truth, strict=True)
        if a is not None and b is not None
    }


def poison() -> None:
    """Leave NaN in the allocator's free blocks, so that what a kernel does not write shows."""
    torch.cuda.empty_cache()
    blocks = [
        torch.full((n,), float("nan"), device="cuda") for n in (1 << 24, 1 << 22, 1 << 20, 1 << 18, 1 << 16)
    ]
    del blocks


def cases_of() -> list[tuple]:
    """(shape, kinds, dtype, options) of every case that is checked."""
    cases: list[tuple] = []
    for i, kinds in enumerate(itertools.product(range(3), repeat=3)):
        shape = ((2, 70, 2, 32, 32), (1, 33, 3, 20, 40), (2, 16, 1, 64, 16), (1, 1, 2, 16, 64))[i % 4]
        cases.append((shape, kinds, torch.float32, {"sign": i % 2 == 1, "initial": i % 3 > 0, "seed": i}))
    for kinds in ((0, 1, 1), (1, 1, 1), (2, 1, 1), (2, 2, 2)):
        for width in (16, 32, 64, 128):
            for dtype in (torch.float32, torch.bfloat16):
                cases.append(((2, 130, 2, width, width), kinds, dtype, {"initial": True}))
        for decay in ("strong", "one", "erasing"):
            cases.append(((2, 100, 2, 32, 32), kinds, torch.float32, {"decay": decay, "initial": True}))
        for keys in ("one", "two"):
            cases.append(((2, 512, 2, 32, 32), kinds, torch.float32, {"decay": "one", "keys": keys}))
            cases.append(((2, 128, 2, 32, 32), kinds, torch.bfloat16, {"decay": "one", "keys": keys}))
    cases.append(((1, 100, 1, 256, 256), (2, 2, 2), torch.float32, {"initial": True}))
    cases.append(((2, 64, 2, 48, 33), (1, 0, 1), torch.float16, {}))
    return cases


def judge(case: tuple) -> dict:
    """The row of one case: its errors, and whether all are inside the limit."""
    shape, kinds, dtype, options = case
    row = {"shape": shape, "kinds": kinds, "dtype": str(dtype)[6:], "options": options, "good": False}
    try:
        found = errors_of(shape, kinds, dtype, **options)
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    limit = LIMIT[dtype]
    if options.get("keys"):
        # every token sees the same key: the roundings of k^T k and k^T S (2^-24, or 2^-16 for bf16) add up
        limit += shape[1] * (2.0**-22 if dtype == torch.float32 else 2.0**-14)
    return row | found | {"good": all(error < limit for error in found.values())}


def check(jobs: int, types: list[torch.dtype]) -> list[dict]:
    """Every case of the list; a row a case, the failures marked."""
    cases = [case for case in cases_of() if case[2] in types]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(judge, cases))
    for row in rows:
        values = " ".join(f"{name} {row[name]:.0e}" for name in NAMES if name in row) + row.get("error", "")
        print(
            "ok  " if row["good"] else "FAIL",
            *(row[x] for x in ("shape", "kinds", "dtype", "options")),
            values,
        )
    print(f"{sum(row['good'] for row in rows)} of {len(rows)} cases good", flush=True)
    return rows


def ours_of(leaves) -> Callable:
    """Our operator over fixed inputs."""
    q, k, v, log_decay, erase, write = leaves
    scale = k.shape[-1] ** -0.5
    return lambda: ours.gated_memory_triton(q, k, v, log_decay, erase, write, None, scale, None)[0]


def operators_of(point: str, leaves) -> dict[str, Callable]:
    """Ours and, where installed, flash-linear-attention's operator for a named point of the gate space."""
    q, k, v, log_decay, erase, write = leaves
    scale = k.shape[-1] ** -0.5
    found = {"ours": ours_of(leaves)}
    try:
        from fla.ops.common import chunk_o
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
        from fla.ops.gdn2 import chunk_gdn2
        from fla.ops.kda import chunk_kda
    except ImportError as error:
        print(f"flash-linear-attention cannot be imported ({error}): ours alone")
        return found
    # its guard refuses GDN's backward on Hopper with this Triton (wrong gate gradients): lifted, to time it
    chunk_o.IS_NVIDIA_HOPPER = False
    if point == "gdn":
        found["fla"] = lambda: chunk_gated_delta_rule(q, k, v, log_decay, erase, scale=scale)[0]
    elif point == "kda":
        found["fla"] = lambda: chunk_kda(q, k, v, log_decay, erase, scale=scale)[0]
    else:
        found["fla"] = lambda: chunk_gdn2(q, k, v, log_decay, erase, write, scale=scale)[0]
    return found


def leaves_of(shape, point: str, dtype=torch.bfloat16) -> list[Tensor]:
    """Random inputs of a benchmark, gates in fp32 as the layers make them (erase and write in ``dtype``)."""
    inputs, _ = make_inputs(shape, POINTS[point], dtype=dtype)
    q, k, v, log_decay, erase, write, _ = inputs
    erase = erase / 2
    write = erase if point != "gdn2" else write
    if point != "gdn2":
        erase, write = erase.to(dtype), None
        leaves = [q.to(dtype), k.to(dtype), v.to(dtype), log_decay.float(), erase]
        leaves = [x.requires_grad_() for x in leaves]
        return [*leaves, leaves[4]]
    leaves = [q.to(dtype), k.to(dtype), v.to(dtype), log_decay.float(), erase.to(dtype), write.to(dtype)]
    return [x.requires_grad_() for x in leaves]


def time_of(run: Callable, leaves, *, backward: bool) -> tuple[float, float]:
    """Median milliseconds of a call as the user makes it, and as a CUDA graph replays it (or NaN)."""
    unique = list({id(x): x for x in leaves}.values())
    upstream = torch.randn_like(run())

    def call():
        if not backward:
            with torch.no_grad():
                run()
        else:
            torch.autograd.grad(run(), unique, upstream)

    eager = do_bench(call, warmup=20, rep=80, return_mode="median")
    try:
        replayed = triton.testing.do_bench_cudagraph(call, rep=60, return_mode="median")
    except Exception as error:
        print("no CUDA graph:", type(error).__name__, str(error)[:100])
        replayed = float("nan")
    return eager, replayed


def bench(shapes, points) -> list[dict]:
    """Rows of milliseconds, ours and theirs in turn."""
    rows = []
    for shape, point in itertools.product(shapes, points):
        leaves = leaves_of(shape, point)
        for backward in (False, True):
            row: dict = {"shape": shape, "point": point, "pass": "both" if backward else "forward"}
            for name, run in operators_of(point, leaves).items():
                try:
                    row[name], row[name + "_graph"] = time_of(run, leaves, backward=backward)
                except Exception as error:
                    print(name, "failed:", type(error).__name__, str(error)[:200])
            if "fla" in row and "ours" in row:
                row["ratio"] = row["ours"] / row["fla"]
                row["ratio_graph"] = row["ours_graph"] / row["fla_graph"]
            rows.append(row)
            print({key: round(x, 4) if isinstance(x, float) else x for key, x in row.items()}, flush=True)
    return rows


def set_launch(chunk: int, tile: int, warps: int, stages: int, fused: bool) -> None:
    """Make every later launch of ours use these settings."""
    launch = ours.Launch(
        chunk=chunk,
        value_block=tile,
        scores_warps=0 if fused else warps,
        state_warps=warps,
        chunk_warps=warps,
        stages=stages,
    )
    ours.launch_of = lambda *_: launch  # type: ignore[assignment]


def compile_setting(setting: tuple) -> str:
    """Run a setting once, so that its kernels lie in Triton's cache; the error if it fails."""
    dtype, shape, point, *launch = setting
    leaves = leaves_of((1, shape[1], *shape[2:]), point, dtype)
    set_launch(*launch)
    try:
        ours_of(leaves)().sum().backward()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:120]}"
    return ""


def kernel_times(run: Callable, repeats: int = 10) -> dict[str, float]:
    """Mean microseconds of each of our kernels in one forward and backward."""
    for _ in range(3):
        run().sum().backward()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            run().sum().backward()
        torch.cuda.synchronize()
    return {
        event.key.removesuffix("_kernel"): event.device_time_total / event.count
        for event in profile.key_averages()
        if event.key in ("scores_kernel", "forward_kernel", "state_backward_kernel", "chunk_backward_kernel")
    }


def sweep(settings: Iterable[tuple], jobs: int) -> list[dict]:
    """Time every kernel of ours under every launch setting; a row a setting."""
    settings = list(settings)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        failures = list(pool.map(compile_setting, settings))
    rows = []
    for (dtype, shape, point, *launch), failure in zip(settings, failures, strict=True):
        row = {"dtype": str(dtype)[6:], "shape": shape, "point": point, "launch": launch}
        if failure:
            row["error"] = failure
        else:
            set_launch(*launch)
            row |= {
                name: round(x, 1) for name, x in kernel_times(ours_of(leaves_of(shape, point, dtype))).items()
            }
        rows.append(row)
        print(*row.values(), flush=True)
    return rows


def main() -> None:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("check", "bench", "sweep", "all"), nargs="?", default="all")
    parser.add_argument("--long", action="store_true", help="the language-model shape too")
    parser.add_argument("--out")
    parser.add_argument("--chunks", type=int, nargs="*", default=[16, 32])
    parser.add_argument("--tiles", type=int, nargs="*", default=[32, 64])
    parser.add_argument("--warps", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--stages", type=int, nargs="*", default=[3])
    parser.add_argument("--fused", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--points", nargs="*")
    parser.add_argument("--dtypes", nargs="*")
    parser.add_argument("--shapes", type=int, nargs="*", help="numbers of the shapes to run")
    parser.add_argument("--jobs", type=int, default=12)
    options = parser.parse_args()
    shapes = [*SHAPES, LM_SHAPE] if options.long else list(SHAPES)
    shapes = [shapes[i] for i in options.shapes] if options.shapes else shapes
    types = [getattr(torch, name) for name in options.dtypes or ("float32", "bfloat16", "float16")]
    points = options.points or list(POINTS)
    result: dict = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }
    if options.what in ("check", "all"):
        result["check"] = check(options.jobs, types)
    if options.what in ("bench", "all"):
        result["bench"] = bench(shapes, points)
    if options.what == "sweep":
        settings = itertools.product(
            types,
            shapes,
            points,
            options.chunks,
            options.tiles,
            options.warps,
            options.stages,
            map(bool, options.fused),
        )
        result["sweep"] = sweep(settings, options.jobs)
    if options.out:
        with open(options.out, "w") as file:
            json.dump(result, file, indent=1, default=str)
    if not all(row["good"] for row in result.get("check", [])):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
