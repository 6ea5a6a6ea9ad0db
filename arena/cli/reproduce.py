"""``arena reproduce``: run a published claim through the fair tuner and judge it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from arena.cli.common import (
    FAILED,
    OK,
    Address,
    Cpus,
    ExecutorName,
    Gpus,
    Slurm,
    Workers,
    check_machine,
    chosen_executor,
    console,
    wrong,
)
from arena.cli.train import run_tuning

if TYPE_CHECKING:
    from arena.claims import Claim
    from arena.claims.judge import Judged
    from arena.grid.executors import Executor

CONSTRUCTIONS = "constructions"


def reproduce(
    claim: Annotated[
        str | None, typer.Argument(help="Name or number of a claim, or constructions; see --list.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All claims, in their order.")] = False,
    listing: Annotated[bool, typer.Option("--list", help="Say which claims there are.")] = False,
    size: Annotated[str, typer.Option(help="cpu (small) or full (the published regime).")] = "cpu",
    out: Annotated[
        str, typer.Option(help="Folder for the result folders, one a claim and size.")
    ] = "results/claims",
    record: Annotated[
        bool, typer.Option("--record", help="Keep what was obtained in experiments/claims/results.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    workers: Workers = None,
    executor: ExecutorName = "local",
    address: Address = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
    slurm: Slurm = None,
) -> int:
    """Re-test published claims: tune all architectures alike, test the winners, judge by the file's rule.

    Run it again to go on, or to judge again: only what is missing is trained. Several may run at once.
    """
    from arena.claims import SIZES, claim_names, load_claim

    if listing:
        return _list()
    if (claim is None) is not every:
        wrong("give one claim, or --all; arena reproduce --list shows them")
    if size not in SIZES:
        wrong(f"--size is {' or '.join(SIZES)}, not {size!r}")
    check_machine(device, workers, out)
    names = claim_names() if every else [] if claim == CONSTRUCTIONS else [str(claim)]
    claims = [load_claim(name) for name in names]
    if every or claim == CONSTRUCTIONS:
        status = _constructions(record)
        if status != OK or claim == CONSTRUCTIONS:
            return status
    engines = []
    for found in claims:
        directory = Path(out) / f"{found.name}-{size}"
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
        engines.append((found, directory, engine))
    if every:
        _say_cost(engines, size, device)
    command = f" --size {size}" * (size != "cpu") + f" --device {device}" * (device != "cpu")
    status = OK
    for found, directory, engine in engines:
        print(f"\n{found.section.number}. {found.section.sentence}")
        done = run_tuning(found.experiments[size], directory, device=device, executor=engine, storage=None)
        if done not in (OK, FAILED):
            return done
        status = max(status, done)
        _judge(found, size, directory)
        if record:
            _keep(found, size, directory, f"arena reproduce {found.name}{command}")
    return status


def _list() -> int:
    from arena.claims import SIZES, claim_names, judge, load_claim, load_record

    print(f"  {CONSTRUCTIONS:16} weights set by hand: what the blocks can hold")
    for name in claim_names():
        claim = load_claim(name)
        print(f"  {name:16} {claim.section.number}. {claim.section.sentence}")
        for size in SIZES:
            kept = load_record(name, size)
            verdict = "not run" if kept is None else judge(claim, size, kept.table).verdict
            print(f"  {'':16}    {size}: {verdict}")
    return OK


def _say_cost(engines: list[tuple[Claim, Path, Executor]], size: str, device: str) -> None:
    """What all of it will cost, before any of it starts."""
    from arena.tuning.cost import hours
    from arena.tuning.prepare import planned_seconds

    total, count = 0.0, 1
    for claim, directory, engine in engines:
        experiment = claim.experiments[size]
        seconds, count = planned_seconds(experiment, directory / "tuning", device=device, executor=engine)
        total += seconds
        print(f"planned: {claim.section.number}. {claim.name}: {hours(seconds)} of computing")
    print(f"planned: all {len(engines)} claims: {hours(total)}, {hours(total / count)} on {count} workers")


def _judge(claim: Claim, size: str, directory: Path) -> Judged:
    """Print the verdict on every line, and on the claim."""
    from arena.claims import judge, score_table
    from arena.claims.page import rows_of
    from arena.grid import load_results

    judged = judge(claim, size, score_table(load_results(directory)))
    print()
    for statement, published, ours, verdict in rows_of(judged):
        console.print(f"{verdict.upper()}: {statement}", soft_wrap=True, markup=False)
        console.print(f"    published: {published}", soft_wrap=True, markup=False)
        console.print(f"    ours: {ours}", soft_wrap=True, markup=False)
    summary = f"claim {claim.section.number} at size {size}: {judged.verdict.upper()}"
    console.print(summary, soft_wrap=True, markup=False)
    return judged


def _keep(claim: Claim, size: str, directory: Path, command: str) -> None:
    from arena.claims.record import keep, make_record

    written = keep(make_record(claim, size, directory, command), claim.name, size)
    print("recorded: " + ", ".join(str(path) for path in written))


def _constructions(record: bool) -> int:
    """Run the constructions and show them."""
    from dataclasses import asdict

    from arena.claims.record import FOLDER
    from arena.constructions import CONSTRUCTIONS as ALL
    from arena.constructions import measure
    from arena.grid.environment import environment

    print("constructions: weights set by hand, in the real blocks, in float32")
    measured = []
    for construction in ALL:
        one = measure(construction, sequences=1)
        measured.append(one)
        print(
            f"{'passes' if one.passes else 'FAILS'}: {one.what} ({one.arch}, {one.backend}): accuracy "
            f"{one.accuracy:g} at {one.length:,} tokens; smallest margin of a logit {one.margin:.2g} "
            f"({one.ideal:.2g} in float64), largest error {one.error:.1g}"
        )
    failed = [one.name for one in measured if not one.passes]
    if failed:
        print(f"a construction fails ({', '.join(failed)}): nothing measured here can be trusted")
        return FAILED
    if record:
        FOLDER.mkdir(parents=True, exist_ok=True)
        origin: dict[str, Any] = {
            "command": f"arena reproduce {CONSTRUCTIONS}",
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "environments": [environment()],
        }
        data = {"origin": origin, "measured": [asdict(one) for one in measured]}
        (FOLDER / "constructions.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        print(f"recorded: {FOLDER / 'constructions.json'}")
    return OK
