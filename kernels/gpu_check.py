"""Check and tune the gated memory's Triton kernels on this machine's GPU: ``python -m kernels.gpu_check``.

    check   outputs and every gradient against the float64 reference, over the gate space and its traps,
            and the ways of calling (in several processes: most of the time is compilation)
    sweep   the time of every kernel under launch settings side by side

``python -m kernels.bench operators`` times them beside other people's.

Results are printed and, with ``--out FILE``, written as JSON with the GPU's name and the versions.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import platform
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
import triton
from torch import Tensor

from kernels.gated_memory import triton as ours
from kernels.gated_memory.reference import gated_memory_reference

NAMES = ("o", "state", "dq", "dk", "dv", "d_log_decay", "d_erase", "d_write", "d_initial")
# normwise relative errors allowed: the whole budget in fp32; one rounding of the result and more in 16 bits
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 3e-3}
SHAPES = ((64, 256, 2, 32, 32), (64, 512, 2, 64, 64), (1024, 256, 2, 32, 32), (4, 4096, 16, 128, 128))
CASE = ("use", "shape", "kinds", "dtype", "options")
KERNELS = (
    "prepare_kernel",
    "forward_kernel",
    "state_backward_kernel",
    "value_backward_kernel",
    "key_backward_kernel",
    "pair_backward_kernel",
)
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
        for width in (16, 64, 128):
            for dtype in (torch.float32, torch.bfloat16):
                cases.append(((2, 130, 2, width, width), kinds, dtype, {"initial": True}))
        for decay in ("strong", "one", "erasing"):
            cases.append(((2, 132, 2, 32, 32), kinds, torch.float32, {"decay": decay, "initial": True}))
            cases.append(((2, 132, 2, 32, 32), kinds, torch.bfloat16, {"decay": decay, "initial": True}))
        for keys in ("one", "two"):
            cases.append(((2, 512, 2, 32, 32), kinds, torch.float32, {"decay": "one", "keys": keys}))
            cases.append(((2, 128, 2, 32, 32), kinds, torch.bfloat16, {"decay": "one", "keys": keys}))
        cases.append(((1, 4100, 2, 32, 32), kinds, torch.float32, {"initial": True}))
        cases.append(((1, 4100, 2, 32, 32), kinds, torch.bfloat16, {"initial": True}))
    for kinds in ((1, 1, 1), (2, 2, 2)):
        for dtype in (torch.float32, torch.bfloat16):
            cases.append(((1, 100, 1, 256, 256), kinds, dtype, {"initial": True}))
    for kinds in ((1, 0, 1), (2, 0, 0)):
        cases.append(((2, 130, 2, 64, 64), kinds, torch.bfloat16, {"initial": True}))
    cases.append(((2, 130, 2, 128, 129), (1, 0, 1), torch.bfloat16, {"initial": True}))
    cases.append(((2, 64, 2, 48, 33), (1, 0, 1), torch.float16, {}))
    return cases


def judge(case: tuple) -> dict:
    """The row of one case: its errors, and whether all are inside the limit."""
    shape, kinds, dtype, options = case
    row = {"shape": shape, "kinds": kinds, "dtype": str(dtype)[6:], "options": options, "good": False}
    try:
        found = errors_of(shape, kinds, dtype, **options)
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {str(error)[-300:]}"}
    limit = LIMIT[dtype]
    if options.get("keys"):
        # every token sees the same key: the roundings of k^T k and k^T S (2^-24, or 2^-16 for bf16) add up
        limit += shape[1] * (2.0**-22 if dtype == torch.float32 else 2.0**-14)
    return row | found | {"good": all(error < limit for error in found.values())}


def judge_all(cases: list[tuple]) -> list[dict]:
    """The rows of cases that share their compiled kernels."""
    return [judge(case) for case in cases]


def check(jobs: int, types: list[torch.dtype]) -> list[dict]:
    """Every case of the list; a row a case, the failures marked."""
    groups: dict[tuple, list] = {}
    for case in cases_of():
        shape, kinds, dtype, options = case
        if dtype in types:
            signature = (*shape[3:], kinds, dtype, bool(options.get("initial")), shape[1] % 64)
            groups.setdefault(signature, []).append(case)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        tasks = [pool.submit(judge_all, group) for group in groups.values()]
        tasks.append(pool.submit(uses))
        rows = [row for task in tasks for row in task.result()]
    for row in rows:
        values = " ".join(f"{name} {row[name]:.0e}" for name in NAMES if name in row) + row.get("error", "")
        print("ok  " if row["good"] else "FAIL", *(row[x] for x in CASE if x in row), values)
    print(f"{sum(row['good'] for row in rows)} of {len(rows)} cases good", flush=True)
    return rows


def uses() -> list[dict]:
    """Ways of calling: twice, under vmap, in a CUDA graph, under torch.compile, token by token."""
    rows = []
    inputs, _ = make_inputs((4, 70, 2, 32, 32), (2, 2, 2), initial=True)
    leaves = [x.float().requires_grad_() for x in inputs if x is not None]
    scale = 32**-0.5

    def run(q, k, v, log_decay, erase, write, state):
        return ours.gated_memory_triton(q, k, v, log_decay, erase, write, None, scale, state)

    def all_of(operator):
        o, state = operator(*leaves)
        return [o, state, *torch.autograd.grad(o.square().sum() + state.sin().sum(), leaves)]

    def graphed():
        run(*leaves)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            o, state = run(*leaves)
        graph.replay()
        return [o, state]

    def mapped():
        parts = [x.unflatten(0, (2, 2)) for x in leaves]
        o, state = torch.func.vmap(run)(*parts)
        grads = torch.autograd.grad(o.square().sum() + state.sin().sum(), leaves)
        return [o.flatten(0, 1), state.flatten(0, 1), *grads]

    def stepped():
        state, steps = leaves[6], []
        with torch.no_grad():
            for t in range(70):
                q, k, v, log_decay, erase, write = (x[:, t : t + 1] for x in leaves[:6])
                o, state = run(q, k, v, log_decay, erase, write, state)
                steps.append(o)
        return [torch.cat(steps, 1), state]

    once = all_of(run)
    ways: dict[str, tuple[Callable, float]] = {
        "twice, bit for bit": (lambda: all_of(run), 0.0),
        "vmap, bit for bit": (mapped, 0.0),
        "CUDA graph, bit for bit": (graphed, 0.0),
        "torch.compile": (lambda: all_of(torch.compile(run)), 1e-6),
        "token by token": (stepped, 1e-5),
    }
    for name, (way, limit) in ways.items():
        row: dict = {"use": name, "good": False}
        try:
            errors = [
                float((a - b).detach().norm() / b.detach().norm()) for a, b in zip(way(), once, strict=False)
            ]
            row |= {"good": all(error <= limit for error in errors), "largest": max(errors)}
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {str(error)[-300:]}"
        rows.append(row)
    return rows


def ours_of(leaves) -> Callable:
    """Our operator over fixed inputs."""
    q, k, v, log_decay, erase, write = leaves
    scale = k.shape[-1] ** -0.5
    return lambda: ours.gated_memory_triton(q, k, v, log_decay, erase, write, None, scale, None)[0]


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


def set_launch(numbers: Iterable[int]) -> None:
    """Make every later launch of ours use these settings, in the order of the fields of Launch."""
    names = (field.name for field in dataclasses.fields(ours.Launch))
    launch = ours.Launch(**dict(zip(names, numbers, strict=True)))
    ours.launch_of = lambda *_: launch  # type: ignore[assignment]


def compile_setting(setting: tuple) -> str:
    """Run a setting once, so that its kernels lie in Triton's cache; the error if it fails."""
    dtype, shape, point, launch = setting
    leaves = leaves_of((1, shape[1], *shape[2:]), point, dtype)
    if launch is not None:
        set_launch(launch)
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
        if event.key in KERNELS
    }


def sweep(settings: Iterable[tuple], jobs: int) -> list[dict]:
    """Time every kernel of ours under every launch setting; a row a setting."""
    settings = list(settings)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        failures = list(pool.map(compile_setting, settings))
    rows = []
    for (dtype, shape, point, launch), failure in zip(settings, failures, strict=True):
        row = {"dtype": str(dtype)[6:], "shape": shape, "point": point, "launch": launch}
        if failure:
            row["error"] = failure
        else:
            set_launch(launch)
            times = kernel_times(ours_of(leaves_of(shape, point, dtype)))
            row |= {name: round(x, 1) for name, x in times.items()}
        rows.append(row)
        print(*row.values(), flush=True)
    return rows


def main() -> None:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("check", "sweep"), nargs="?", default="check")
    parser.add_argument("--out")
    parser.add_argument("--launch", nargs="*", default=[], help="to sweep: fields of Launch, 64,2,64,4,...")
    parser.add_argument("--points", nargs="*")
    parser.add_argument("--dtypes", nargs="*")
    parser.add_argument("--shapes", type=int, nargs="*", help="numbers of the shapes to run")
    parser.add_argument("--jobs", type=int, default=12)
    options = parser.parse_args()
    shapes = [SHAPES[i] for i in options.shapes] if options.shapes else list(SHAPES)
    types = [getattr(torch, name) for name in options.dtypes or ("float32", "bfloat16", "float16")]
    points = options.points or list(POINTS)
    result: dict = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }
    if options.what == "check":
        result["check"] = check(options.jobs, types)
    else:
        launches = [tuple(map(int, text.split(","))) for text in options.launch]
        settings = itertools.product(types, shapes, points, launches)
        result["sweep"] = sweep(settings, options.jobs)
    if options.out:
        with open(options.out, "w") as file:
            json.dump(result, file, indent=1, default=str)
    if not all(row["good"] for row in result.get("check", [])):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
