"""``arena ablate``: the flags of the gate axes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arena.cli.common import (
    FAILED,
    INTERRUPTED,
    Address,
    Cpus,
    ExecutorName,
    Gpus,
    Slurm,
    Workers,
    check_machine,
    chosen_executor,
    complain,
    console,
    names,
)
from arena.cli.train import run_tuning


def ablate(
    experiment: Annotated[
        str | None,
        typer.Argument(help="A .toml file or the name of a shipped experiment, with [ablation] or without."),
    ] = None,
    arch: Annotated[str | None, typer.Option(help="The architecture to walk around.")] = None,
    task: Annotated[str | None, typer.Option(help="Tasks, with commas between.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="paper (GDN-2's own table), left-out (what it leaves out), or both.")
    ] = None,
    decay: Annotated[str | None, typer.Option(help="none, scalar, mean (of the channels), channel.")] = None,
    decay_sign: Annotated[str | None, typer.Option(help="positive, signed.")] = None,
    decay_form: Annotated[
        str | None, typer.Option(help="softplus_a, sigmoid, sigmoid_root, bounded.")
    ] = None,
    erase: Annotated[
        str | None, typer.Option(help="none, scalar, mean, channel, or a number to freeze it at.")
    ] = None,
    erase_range: Annotated[
        str | None, typer.Option(help="1, 2: its upper end. Free, 2 doubles erase; tied, write as well.")
    ] = None,
    write: Annotated[
        str | None,
        typer.Option(help="one, scalar, mean, channel, exponential, or a number to freeze it at."),
    ] = None,
    write_on: Annotated[
        str | None, typer.Option(help="value, correction (exploratory; reference backend, slow).")
    ] = None,
    coupling: Annotated[
        str | None,
        typer.Option(help="free, tied, complement, step, or a number: the dial from tied (0) to free (1)."),
    ] = None,
    normaliser: Annotated[str | None, typer.Option(help="none, max_abs, sum.")] = None,
    qk_map: Annotated[str | None, typer.Option(help="l2, none, elu1.")] = None,
    micro_steps: Annotated[
        str | None, typer.Option(help="1 to 8: updates of the memory a token, DeltaProduct's n.")
    ] = None,
    conv: Annotated[
        str | None, typer.Option(help="none, static, dynamic-lowrank, dynamic-headwise, gate.")
    ] = None,
    output_gate: Annotated[str | None, typer.Option(help="silu, sigmoid, none.")] = None,
    trials: Annotated[int | None, typer.Option(help="Learning rates tried for every point and task.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Number of fresh seeds that are tested.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps of every run.")] = None,
    out: Annotated[str | None, typer.Option(help="Result folder; default results/NAME.")] = None,
    storage: Annotated[
        str | None, typer.Option(help="Database of the Optuna studies; default: a file in --out.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    workers: Workers = None,
    executor: ExecutorName = "local",
    address: Address = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
    slurm: Slurm = None,
) -> int:
    """Walk in gate space around one architecture: every point tuned, then tested on fresh seeds.

    An axis takes levels with commas between; the levels of all axes named are crossed. Combinations that make
    no sense are listed with their reason and left out. Run it again to go on.
    """
    from arena.ablation import (
        ablation_request,
        make_ablation,
        plan_ablation,
        record_ablation,
        seeds_for_a_claim,
    )
    from arena.grid import StoreError
    from arena.grid.tuning_section import TuningSection

    check_machine(device, workers, out)
    flags = {
        "decay": decay,
        "decay_sign": decay_sign,
        "decay_form": decay_form,
        "erase": erase,
        "erase_range": erase_range,
        "write": write,
        "write_on": write_on,
        "coupling": coupling,
        "normaliser": normaliser,
        "qk_map": qk_map,
        "micro_steps": micro_steps,
        "conv": conv,
        "output_gate": output_gate,
    }
    axes = {axis: names(f"--{axis.replace('_', '-')}", text) for axis, text in flags.items()}
    ablation = plan_ablation(
        ablation_request(
            experiment,
            archs=names("--arch", arch),
            tasks=names("--task", task),
            points=trials,
            seeds=seeds,
            steps=steps,
            axes={axis: levels for axis, levels in axes.items() if levels},
            presets=names("--preset", preset),
        )
    )
    directory = Path(out) if out is not None else Path("results") / ablation.experiment.name
    engine = chosen_executor(
        executor,
        directory,
        device=device,
        workers=workers,
        address=address,
        cpus=cpus,
        gpus=gpus,
        slurm=slurm,
        shared=True,
    )
    print(f"{len(ablation.experiment.archs)} points: {', '.join(ablation.experiment.archs)}")
    for point, reason in ablation.left_out.items():
        print(f"left out: {point}: {reason}")
    comparisons, needed = seeds_for_a_claim(ablation)
    tested = len((ablation.experiment.tuning or TuningSection()).report_seeds)
    if tested < needed:
        print(f"no claims: {comparisons} main effects on {tested} seeds; --seeds {needed} can give some")
    status = run_tuning(ablation.experiment, directory, device=device, executor=engine, storage=storage)
    record_ablation(directory, ablation)
    if status == INTERRUPTED:
        return status
    try:
        written = make_ablation(directory, console)
    except StoreError as error:  # no run has ended well
        complain(str(error))
        return FAILED
    print("written: " + ", ".join(str(path) for path in written))
    return status
