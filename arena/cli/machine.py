"""``arena doctor`` and ``arena bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from arena.cli.common import OK, console, names, wrong

bench = typer.Typer(no_args_is_help=True, help="Time the kernels, and training, on this machine.")


def doctor(
    experiment: Annotated[
        str | None,
        typer.Argument(help="Examine what its models ask of the kernels, instead of the default list."),
    ] = None,
) -> int:
    """Say what this machine can run; check every fast path, gradients too, against its reference."""
    from arena.grid.doctor import examine
    from arena.grid.experiment import load_experiment

    return examine(None if experiment is None else load_experiment(experiment))


def _bench_folder(out: str, device: str) -> Path:
    """Refuse a device that is not there; the folder for the results."""
    if device not in ("cpu", "cuda"):
        wrong(f"--device is cpu or cuda, not {device!r}")
    if not out.strip():
        wrong("--out is a folder, not an empty name")
    if Path(out).exists() and not Path(out).is_dir():
        wrong(f"--out is a folder; {out} is a file")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            wrong("--device cuda: torch sees no GPU on this machine (arena doctor says more)")
    return Path(out)


@bench.command("kernels")
def bench_kernels(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    sizes: Annotated[str, typer.Option(help="arena (small, float32) or lm (large, bfloat16).")] = "arena",
    operator: Annotated[str | None, typer.Option(help="Operators, with commas between.")] = None,
    point: Annotated[str | None, typer.Option(help="Points of gated_memory, with commas between.")] = None,
    rounds: Annotated[int, typer.Option(help="Timed turns of each contender.")] = 7,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16, instead.")] = None,
    peer_configs: Annotated[
        int | None,
        typer.Option(help="Settings that other packages' autotuning tries (default: all)."),
    ] = None,
    out: Annotated[str, typer.Option(help="Folder for table and figure.")] = "results/bench",
) -> int:
    """Ours beside every public alternative installed, in turn: time, bandwidth, memory, error."""
    from arena.bench.report import draw_kernels, frame, show_kernels, write
    from arena.grid.experiment import near
    from kernels.backends import OPERATORS
    from kernels.bench.contenders import DTYPES, SIZES, comparisons
    from kernels.bench.operators import FIELDS, rows
    from kernels.bench.timing import ceilings, machine
    from kernels.bench.tuning import tuning
    from kernels.doctor import POINTS

    if sizes not in SIZES:
        wrong(f"--sizes is {' or '.join(SIZES)}, not {sizes!r}")
    if not 1 <= rounds <= 1000:
        wrong(f"--rounds is a number from 1 to 1000, not {rounds}")
    if dtype not in (None, *DTYPES):
        wrong(f"--dtype is {' or '.join(DTYPES)}, not {dtype!r}")
    if peer_configs is not None and peer_configs < 1:
        wrong(f"--peer-configs is a number from 1, not {peer_configs}")
    operators, points = names("--operator", operator), names("--point", point)
    timed = [name for name in OPERATORS if name not in ("lstm", "experts")]
    for option, given, known in (("--operator", operators, timed), ("--point", points, list(POINTS))):
        for name in given:
            if name not in known:
                wrong(f"{option} {name!r}{near(name, known)}")
    folder = _bench_folder(out, device)
    kind = SIZES[sizes] if dtype is None else DTYPES[dtype]
    limits = ceilings(device, [kind])
    about: dict[str, Any] = {"machine": machine(device), "ceilings": limits}
    wanted = comparisons(device, (sizes,), dtype=kind, operators=tuple(operators), points=tuple(points))
    with console.status("") as status, tuning(peer_configs) as about["settings"]:
        found = list(rows(wanted, device, limits, rounds=rounds, say=status.update))
    table = frame(found, FIELDS)
    show_kernels(table, console)
    told = ", ".join(f"{name} {value / 1e9:.4g}e9" for name, value in limits.items())
    print(f"{about['machine']['device']}; ceilings: {told}")
    written = [*write(table, about, folder, "kernels"), draw_kernels(table, about, folder / "kernels.png")]
    print("written: " + ", ".join(str(path) for path in written))
    return OK


@bench.command("training")
def bench_training(
    experiment: Annotated[
        str | None, typer.Argument(help="A .toml file or the name of a shipped experiment.")
    ] = None,
    arch: Annotated[str | None, typer.Option(help="Architectures, with commas between.")] = None,
    task: Annotated[str | None, typer.Option(help="Tasks, with commas between.")] = None,
    fleets: Annotated[str, typer.Option(help="Numbers of replicas, with commas between.")] = "1,4,16,64",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seconds: Annotated[float, typer.Option(help="For the steps of each fleet, about.")] = 5.0,
    out: Annotated[str, typer.Option(help="Folder for table and figure.")] = "results/bench",
) -> int:
    """Steps per second and runs per hour of fleets, and where the time goes."""
    from arena.grid.request import request

    numbers = names("--fleets", fleets)
    if not all(x.isdecimal() and 1 <= int(x) <= 4096 for x in numbers):
        wrong(f"--fleets is numbers from 1 to 4096 with commas between, not {fleets!r}")
    if not 0 < seconds <= 3600:
        wrong(f"--seconds is a number up to 3600, not {seconds:g}")
    archs, tasks = names("--arch", arch), names("--task", task)
    wanted = request(experiment or (None if archs and tasks else "quickstart"), archs=archs, tasks=tasks)
    folder = _bench_folder(out, device)

    from arena.bench.report import draw_training, frame, show_training, write
    from arena.bench.training import FIELDS, measure_experiment
    from kernels.bench.timing import machine

    sizes = sorted({int(x) for x in numbers})
    with console.status("") as status:
        found = list(measure_experiment(wanted, sizes, device=device, seconds=seconds, say=status.update))
    table = frame(found, FIELDS)
    show_training(table, console)
    about = {"machine": machine(device)}
    written = [*write(table, about, folder, "training"), draw_training(table, about, folder / "training.png")]
    print("written: " + ", ".join(str(path) for path in written))
    return OK
