"""The command line: parse, call, print. Heavy modules are imported by the commands that need them."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import traceback
from typing import Annotated, NoReturn

import typer

from arena.cli import common
from arena.cli.ablate import ablate
from arena.cli.check import check_block
from arena.cli.checkpoints import export, import_
from arena.cli.common import (
    FAILED,
    INTERRUPTED,
    OK,
    WRONG,
    again,
    complain,
    parameter,
    plugins_first,
    wrong,
)
from arena.cli.dynamics import dynamics
from arena.cli.machine import bench, doctor
from arena.cli.report import compare, report
from arena.cli.reproduce import reproduce
from arena.cli.train import grid, tune

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Compare linear-time sequence mixers on state tracking, counting, recall and memory editing.",
)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and end the process.

    Exit status: 0 all done; 1 some runs failed; 2 the request was wrong, nothing was started, one line says
    what; 130 ended by Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):  # names of files may hold bytes that are no text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    debug = common.debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        status = typer.main.get_command(app).main(
            plugins_first(words), prog_name="arena", standalone_mode=False
        )
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(f"stopped; to start again: {again()}")
        status = INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = OK
    except Exception as error:
        if debug:
            traceback.print_exc()
        status = _explain(error, debug)
    if status == INTERRUPTED:  # it ends already: Ctrl-C once more must not make a traceback of that
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(status if isinstance(status, int) else OK)


_WRONG_PATH = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS,
    errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL,
)  # fmt: skip
"""What a path that was given can be to blame for; a full disk, say, is another matter."""


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
    if type(error).__name__ in ("ExperimentError", "StoreError", "PluginError", "CheckpointError"):
        complain(str(error))
        return WRONG
    if type(error).__name__ == "Abort":
        return INTERRUPTED
    if isinstance(error, OSError) and error.filename is not None:
        complain(f"{error.filename}: {error.strerror}")
        return WRONG if error.errno in _WRONG_PATH else FAILED
    text = " ".join(str(error).split())[:300]
    complain(
        f"internal error: {type(error).__name__}: {text}"
        + ("" if debug else " (run it with --debug to see where)")
    )
    return FAILED


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
    plugin: Annotated[
        list[str] | None,
        typer.Option(
            help="Module that registers blocks, tasks or measurements; may be given again, anywhere."
        ),
    ] = None,
) -> None:
    """Checks that hold for every command."""
    from arena.grid.environment import foreign_kernels
    from arena.plugins import load

    problem = foreign_kernels()
    if problem is not None:
        wrong(problem)
    load(plugin or [])


@app.command("list")
def list_names(
    what: Annotated[str, typer.Argument(help="archs, tasks or experiments; without it, all three.")] = "all",
) -> int:
    """List architectures, tasks and experiments by name."""
    if what not in ("all", "archs", "tasks", "experiments"):
        wrong(f"cannot list {what!r}; choose archs, tasks or experiments")
    if what in ("all", "archs"):
        from arena.model import arch_names

        print("architectures (also xlstm[m:n], a+b, a+b[3:1], a+b[first], a+b[last]: stacks of two):")
        for name in arch_names():
            print(f"  {name:24} {_origin('arena.blocks', name)}".rstrip())
    if what in ("all", "tasks"):
        import synthetic_tasks

        print("tasks (arena show NAME says more):")
        for name in synthetic_tasks.names():
            told = synthetic_tasks.describe(name).splitlines()[1]
            print(f"  {name:24} {told} {_origin('arena.tasks', name)}".rstrip())
    if what in ("all", "experiments"):
        from arena.grid.experiment import load_experiment, shipped

        print("experiments (arena grid NAME):")
        for name in shipped():
            print(f"  {name:24} {load_experiment(name).title}")
    return OK


def _origin(group: str, name: str) -> str:
    """Which plug-in a name is from; empty for our own."""
    from arena.plugins import owner

    found = owner(group, name)
    return f"(plug-in {found.name} {found.version})" if found is not None else ""


app.command()(grid)
app.command()(tune)
app.command()(ablate)
app.command()(dynamics)
app.command()(reproduce)
app.command()(report)
app.command()(compare)
app.command()(doctor)
app.command("check-block")(check_block)
app.command("import")(import_)
app.command()(export)
app.add_typer(bench, name="bench")


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
        found = synthetic_tasks.get(task, **dict(parameter(text) for text in param or []))
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
