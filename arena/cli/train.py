"""``arena grid`` and ``arena tune``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from arena.cli.common import (
    FAILED,
    Address,
    Cpus,
    ExecutorName,
    Gpus,
    Slurm,
    Workers,
    again,
    check_machine,
    chosen_executor,
    complain,
    console,
    names,
    told,
)

if TYPE_CHECKING:
    from arena.grid.executors import Executor
    from arena.grid.experiment import Experiment


def grid(
    experiment: Annotated[
        str | None, typer.Argument(help="A .toml file or the name of a shipped experiment.")
    ] = None,
    arch: Annotated[str | None, typer.Option(help="Architectures, with commas between.")] = None,
    task: Annotated[str | None, typer.Option(help="Tasks, with commas between.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps of every run.")] = None,
    out: Annotated[str | None, typer.Option(help="Result folder; default results/NAME.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    workers: Workers = None,
    executor: ExecutorName = "local",
    address: Address = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
    slurm: Slurm = None,
) -> int:
    """Train a grid of tasks x architectures x seeds. Run it again to do what is missing."""
    from arena.grid.request import request

    check_machine(device, workers, out)
    wanted = request(
        experiment, archs=names("--arch", arch), tasks=names("--task", task), seeds=seeds, steps=steps
    )
    directory = Path(out) if out is not None else Path("results") / wanted.name
    engine = chosen_executor(
        executor,
        directory,
        device=device,
        workers=workers,
        address=address,
        cpus=cpus,
        gpus=gpus,
        slurm=slurm,
    )

    from arena.grid import StoreError, run_experiment
    from arena.grid.display import GridDisplay

    with GridDisplay(console) as display:
        try:
            report = run_experiment(
                wanted,
                directory,
                device=device,
                executor=engine,
                on_start=display.start,
                on_event=display.event,
            )
        except StoreError as error:
            if not display.started:
                raise
            complain(f"{error}; what had finished is stored; to go on: {again()}")
            return FAILED
    return told(report, directory)


def tune(
    experiment: Annotated[
        str | None, typer.Argument(help="A .toml file or the name of a shipped experiment.")
    ] = None,
    arch: Annotated[str | None, typer.Option(help="Architectures, with commas between.")] = None,
    task: Annotated[str | None, typer.Option(help="Tasks, with commas between.")] = None,
    trials: Annotated[int | None, typer.Option(help="Paired points of every architecture and task.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Number of fresh seeds of the winners.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps of every run.")] = None,
    out: Annotated[str | None, typer.Option(help="Result folder; default results/NAME.")] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            help="Database of the Optuna studies, such as sqlite:///tuning.db; default: a file in --out."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    workers: Workers = None,
    executor: ExecutorName = "local",
    address: Address = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
    slurm: Slurm = None,
) -> int:
    """Tune every architecture on the same budget and test the winners on fresh seeds. Run it again to go on.

    Several may run at once on one --out, or on one --storage.
    """
    from arena.grid.request import request

    check_machine(device, workers, out)
    wanted = request(
        experiment,
        archs=names("--arch", arch),
        tasks=names("--task", task),
        steps=steps,
        points=trials,
        report_seeds=seeds,
    )
    directory = Path(out) if out is not None else Path("results") / wanted.name
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
    return run_tuning(wanted, directory, device=device, executor=engine, storage=storage)


def run_tuning(
    wanted: Experiment, directory: Path, *, device: str, executor: Executor, storage: str | None
) -> int:
    """Tune and say how it goes; the exit status."""
    from arena.grid import StoreError
    from arena.grid.display import GridDisplay
    from arena.tuning import tune

    with GridDisplay(console) as display:
        try:
            report = tune(
                wanted,
                directory,
                device=device,
                executor=executor,
                storage=storage,
                on_start=display.start,
                on_event=display.event,
                on_line=display.say,
            )
        except StoreError as error:
            if not display.started:
                raise
            complain(f"{error}; what had finished is stored; to go on: {again()}")
            return FAILED
    if report.elsewhere:
        print(
            f"{report.elsewhere} runs were trained by other processes into folders of their own: copy their "
            f"runs/* into {directory / 'runs'} before arena report"
        )
    return told(report, directory)
