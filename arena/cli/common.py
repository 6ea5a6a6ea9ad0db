"""What the commands share: how they speak, refuse and end."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

if TYPE_CHECKING:
    from arena.grid import GridReport
    from arena.grid.executors import Executor

OK, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130

console = Console(highlight=False)
debug = False
"""Whether ``--debug`` was given."""

Workers = Annotated[int | None, typer.Option(help="Processes; default: one a core, or one a GPU.")]
ExecutorName = Annotated[str, typer.Option(help="Where to train: local, ray or slurm.")]
Address = Annotated[
    str | None,
    typer.Option(help="Of a Ray cluster, such as auto or HOST:PORT; default: one on this machine."),
]
Cpus = Annotated[float | None, typer.Option(help="CPUs of a fleet (ray, slurm); default 1.")]
Gpus = Annotated[
    float | None,
    typer.Option(help="GPUs of a fleet (ray, slurm), for ray also a fraction of one; default 1."),
]
Slurm = Annotated[
    list[str] | None,
    typer.Option(help="KEY=VALUE for sbatch, as time=MINUTES (required) or partition=NAME; may be repeated."),
]


def complain(line: str) -> None:
    """One line on standard error; what a terminal would take for a command is shown, not sent."""
    text = " ".join(line.split())[:2000]
    text = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)
    print(f"arena: {text}", file=sys.stderr)


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


def plugins_first(words: list[str]) -> list[str]:
    """The words of a command line with every ``--plugin MODULE`` moved to the front.

    It belongs to all commands, and may be written wherever an option may.
    """
    if "--" in words:  # what follows are arguments
        end = words.index("--")
        return plugins_first(words[:end]) + words[end:]
    front: list[str] = []
    rest: list[str] = []
    left = iter(words)
    for word in left:
        if word == "--plugin":
            module = next(left, "")
            if not module or module.startswith("-"):
                raise typer.BadParameter("--plugin is followed by the name of a module")
            front += [word, module]
        else:
            (front if word.startswith("--plugin=") else rest).append(word)
    return front + rest


def check_machine(device: str, workers: int | None, out: str | None) -> None:
    """Refuse values that no command can use."""
    if device not in ("cpu", "cuda"):
        wrong(f"--device is cpu or cuda, not {device!r}")
    if workers is not None and not 1 <= workers <= 4096:
        wrong(f"--workers is a number from 1 to 4096, not {workers}")
    if out is not None and not out.strip():
        wrong("--out is a folder, not an empty name")


def chosen_executor(
    name: str,
    directory: Path,
    *,
    device: str,
    workers: int | None,
    address: str | None,
    cpus: float | None,
    gpus: float | None,
    slurm: list[str] | None,
    shared: bool = False,
) -> Executor:
    """The engine that the options name; ``shared``: other processes may be at work in the folder."""
    from arena.grid.executors import make_executor

    parameters: dict[str, Any] = {}
    for text in slurm or []:
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            wrong(f"--slurm is KEY=VALUE, not {text!r}")
        parameters[key.replace("-", "_")] = int(value) if value.isdigit() else value
    return make_executor(
        name,
        directory=directory,
        device=device,
        workers=workers,
        address=address,
        cpus=cpus,
        gpus=gpus,
        slurm=parameters,
        shared=shared,
    )


def told(report: GridReport, directory: Path) -> int:
    """Say how things stand after a grid or a tuning; the exit status."""
    print(f"{report.stored} of {report.planned} runs stored in {directory}")
    if report.interrupted:
        print(f"stopped; to go on: {again()}")
        return INTERRUPTED
    for run_id, reason in report.failed.items():
        print(f"failed: {report.labels[run_id]} ({run_id}): {reason}")
    if report.failed:
        count, where = len(report.failed), directory / "failures"
        print(f"{count} runs failed; details in {where}; to try them again: {again()}")
    if report.others:
        print(f"{report.others} runs of earlier requests are in {directory} too; reports leave them out")
    print(f"table and figure: arena report {directory}")
    return FAILED if report.failed else OK


def again() -> str:
    """The command line that was typed, to be typed again."""
    return shlex.join(["arena", *sys.argv[1:]])


def parameter(text: str) -> tuple[str, Any]:
    """The name and the value of NAME=VALUE, read as TOML; what is none is text."""
    import tomllib

    name, _, value = text.partition("=")
    try:
        return name.strip(), tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        return name.strip(), value.strip()
