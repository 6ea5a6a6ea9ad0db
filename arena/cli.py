"""The command line: parse, call, print. Heavy modules are imported by the commands that need them."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from arena.cli_ablate import ablate
from arena.cli_dynamics import dynamics
from arena.cli_machine import bench, doctor

if TYPE_CHECKING:
    from arena.grid import GridReport
    from arena.grid.experiment import Experiment

OK, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Compare linear-time sequence mixers on state tracking, counting, recall and memory editing.",
)
console = Console(highlight=False)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and end the process.

    Exit status: 0 all done; 1 some runs failed; 2 the request was wrong, nothing was started, one line says
    what; 130 ended by Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        status = typer.main.get_command(app).main(words, prog_name="arena", standalone_mode=False)
    except KeyboardInterrupt:
        print(f"stopped; to start again: {_again()}")
        status = INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = OK
    except Exception as error:
        if debug:
            traceback.print_exc()
        status = _explain(error, debug)
    sys.exit(status if isinstance(status, int) else OK)


def _explain(error: Exception, debug: bool) -> int:
    """Print one line about an error; its exit status."""
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error)
        return WRONG
    told = getattr(error, "format_message", None)  # typer's and click's usage errors
    if told is not None:
        text = str(told())
        if text:
            complain(f"{text.rstrip('.')}; see arena --help")
        return WRONG
    if type(error).__name__ in ("ExperimentError", "StoreError"):
        complain(str(error))
        return WRONG
    if type(error).__name__ == "Abort":
        return INTERRUPTED
    if isinstance(error, OSError) and error.filename is not None:
        complain(f"{error.filename}: {error.strerror}")
        return FAILED
    text = " ".join(str(error).split())[:300]
    complain(f"internal error: {type(error).__name__}: {text}" + ("" if debug else " (--debug shows where)"))
    return FAILED


def complain(line: str) -> None:
    """One line on standard error."""
    print(f"arena: {' '.join(line.split())}", file=sys.stderr)


def wrong(line: str) -> NoReturn:
    """Refuse a request."""
    complain(line)
    raise typer.Exit(WRONG)


def names(option: str, text: str | None) -> list[str]:
    """The names of an option, between commas."""
    if text is None:
        return []
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        wrong(f"{option} is names with commas between, not {text!r}")
    return names


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"memory-arena {version('memory-arena')}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Checks that hold for every command."""
    from arena.grid.environment import foreign_kernels

    problem = foreign_kernels()
    if problem is not None:
        wrong(problem)


@app.command("list")
def list_names(
    what: Annotated[str, typer.Argument(help="archs, tasks or experiments; without it, all three.")] = "all",
) -> int:
    """List architectures, tasks and experiments by name."""
    if what not in ("all", "archs", "tasks", "experiments"):
        wrong(f"cannot list {what!r}; choose archs, tasks or experiments")
    if what in ("all", "archs"):
        from arena.model import arch_names

        print("architectures (also a+b, which alternates two of them, and xlstm[a:b]):")
        print("  " + "\n  ".join(arch_names()))
    if what in ("all", "tasks"):
        import synthetic_tasks

        print("tasks (arena show NAME says more):")
        for name in synthetic_tasks.names():
            print(f"  {name:24} {synthetic_tasks.describe(name).splitlines()[1]}")
    if what in ("all", "experiments"):
        from arena.grid.experiment import load_experiment, shipped

        print("experiments (arena grid NAME):")
        for name in shipped():
            print(f"  {name:24} {load_experiment(name).title}")
    return OK


@app.command()
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
    workers: Annotated[int | None, typer.Option(help="Processes; default: one a core, or one a GPU.")] = None,
) -> int:
    """Train a grid of tasks x architectures x seeds. Run it again to do what is missing."""
    from arena.grid.request import request

    check_machine(device, workers, out)
    wanted = request(
        experiment, archs=names("--arch", arch), tasks=names("--task", task), seeds=seeds, steps=steps
    )
    directory = Path(out) if out is not None else Path("results") / wanted.name

    from arena.grid import StoreError, run_experiment
    from arena.grid.display import GridDisplay

    with GridDisplay(console) as display:
        try:
            report = run_experiment(
                wanted,
                directory,
                device=device,
                workers=workers,
                on_start=display.start,
                on_event=display.event,
            )
        except StoreError as error:
            if not display.started:
                raise
            complain(f"{error}; what had finished is stored; to go on: {_again()}")
            return FAILED
    return _told(report, directory)


def check_machine(device: str, workers: int | None, out: str | None) -> None:
    """Refuse values that no command can use."""
    if device not in ("cpu", "cuda"):
        wrong(f"--device is cpu or cuda, not {device!r}")
    if workers is not None and not 1 <= workers <= 4096:
        wrong(f"--workers is a number from 1 to 4096, not {workers}")
    if out is not None and not out.strip():
        wrong("--out is a folder, not an empty name")


def _told(report: GridReport, directory: Path) -> int:
    """Say how things stand after a grid or a tuning; the exit status."""
    print(f"{report.stored} of {report.planned} runs stored in {directory}")
    if report.interrupted:
        print(f"stopped; to go on: {_again()}")
        return INTERRUPTED
    for run_id, reason in report.failed.items():
        print(f"failed: {report.labels[run_id]} ({run_id}): {reason}")
    if report.failed:
        count, where = len(report.failed), directory / "failures"
        print(f"{count} runs failed; details in {where}; to try them again: {_again()}")
    if report.others:
        print(f"{report.others} runs of earlier requests are in {directory} too; reports leave them out")
    print(f"table and figure: arena report {directory}")
    return FAILED if report.failed else OK


@app.command()
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
    workers: Annotated[int | None, typer.Option(help="Processes; default: one a core, or one a GPU.")] = None,
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

    return run_tuning(wanted, directory, device=device, workers=workers, storage=storage)


def run_tuning(
    wanted: Experiment, directory: Path, *, device: str, workers: int | None, storage: str | None
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
                workers=workers,
                storage=storage,
                on_start=display.start,
                on_event=display.event,
                on_line=display.say,
            )
        except StoreError as error:
            if not display.started:
                raise
            complain(f"{error}; what had finished is stored; to go on: {_again()}")
            return FAILED
    if report.elsewhere:
        print(
            f"{report.elsewhere} runs were trained by other processes into folders of their own: copy their "
            f"runs/* into {directory / 'runs'} before arena report"
        )
    return _told(report, directory)


app.command()(ablate)
app.command()(dynamics)
app.command()(doctor)
app.add_typer(bench, name="bench")


def _again() -> str:
    import shlex

    return shlex.join(["arena", *sys.argv[1:]])


@app.command()
def report(directory: Annotated[Path, typer.Argument(help="A result folder of arena grid.")]) -> int:
    """Tables and figures of a result folder: printed, and written to DIR/report."""
    from arena.report import make_report

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        written = make_report(directory, console)
    for line in dict.fromkeys(str(entry.message) for entry in caught if entry.category is UserWarning):
        complain(line)
    from arena.ablation import is_ablation, make_ablation

    if is_ablation(directory):
        written += make_ablation(directory, console)
    print("written: " + ", ".join(str(path) for path in written))
    return OK


@app.command()
def show(
    task: Annotated[str, typer.Argument(help="Name of a task.")],
    length: Annotated[
        int | None, typer.Option(help="Sequence length; default: the shortest legal from 32 on.")
    ] = None,
    examples: Annotated[int, typer.Option(help="Number of sequences.")] = 3,
    param: Annotated[list[str] | None, typer.Option(help="NAME=VALUE, may be given again.")] = None,
) -> int:
    """Say what a task is and show example sequences with their targets."""
    import synthetic_tasks

    try:
        found = synthetic_tasks.get(task, **dict(_parameter(text) for text in param or []))
        if length is not None:
            found.check_length(length)
    except (ValueError, TypeError) as error:
        wrong(str(error))
    if length is not None and length > 100_000:
        wrong(f"--length is at most 100000 here, not {length}")
    if not 1 <= examples <= 100:
        wrong(f"--examples is a number from 1 to 100, not {examples}")
    print(synthetic_tasks.describe(task))
    print()
    print(synthetic_tasks.show(found, samples=examples, length=length, color=sys.stdout.isatty()))
    return OK


def _parameter(text: str) -> tuple[str, Any]:
    import tomllib

    name, _, value = text.partition("=")
    try:
        return name.strip(), tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        return name.strip(), value.strip()
