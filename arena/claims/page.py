"""docs/claims.md and the tables of ``arena reproduce``: claim, published, ours, verdict. Nothing is typed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import polars as pl

from arena.claims.file import SIZES, Claim, claim_names, load_claim
from arena.claims.judge import Judged, judge
from arena.claims.record import FOLDER, Record, load_record
from arena.constructions import CONSTRUCTIONS, Measured
from arena.grid.experiment import Experiment
from arena.tuning.space import make_space

COLUMNS = ("statement", "published", "ours", "verdict")

_HOW = """\
Findings that others have published, re-tested with `arena reproduce`. Each is a file of
`experiments/claims/`: settings, published numbers and the rule of the verdict were fixed there before any
run. Every architecture is tuned on the same points; its winner is trained on fresh seeds and tested once. A
score is the chance-scaled accuracy, (accuracy - chance) / (1 - chance), on split test. Every statement is
tested in both directions, with Holm's correction over the statements of a claim: *confirmed* and *not
confirmed* are both findings, and *undecided* says what is lacking. A claim is confirmed where every statement
of it is; statements marked *ours* are beside the claim and do not count; where a *control* does not learn
the task, nothing is decided on it. The small size (`cpu`) is not the published regime: what it does not
confirm may hold there.

{rule}

This page is made by `python tools/claims.py` from the records in `experiments/claims/results/`."""

RULE = """\
How to read a line. Of *most runs*: how many runs do, with the exact 95 % interval of that rate; it is
confirmed where an exact two-sided binomial test, after Holm's correction, shows that more than half of all
seeds would, and not confirmed where it shows that fewer would. 8 of 10 show neither: a fair coin is as far
from half in 11 % of such series. Of *above*: interquartile means over the seeds, their difference with its
95 % bootstrap interval, and how many runs solve the task. *Undecided: needs n seeds*: with n seeds in all, a
rate or a difference that is in truth as large as the one seen would be decided four times in five; a rate
near one half needs more than a thousand."""


_ASIDE = {"claim": "", "ours": " (ours)", "control": " (control)"}


def rows_of(judged: Judged) -> list[tuple[str, str, str, str]]:
    """A claim's lines in :data:`COLUMNS`."""
    return [
        (
            finding.line.statement(finding.place) + _ASIDE[finding.line.family],
            finding.line.published or "-",
            finding.ours,
            finding.text,
        )
        for finding in judged.findings
    ]


def construction_rows(measured: Sequence[Measured]) -> list[tuple[str, ...]]:
    """Ability, architecture, backend, length, accuracy, margin, error."""
    return [
        (
            one.what,
            f"`{one.arch}`",
            one.backend,
            f"{one.length:,}",
            f"{one.accuracy:.4f}".rstrip("0").rstrip("."),
            f"{one.margin:.2g} ({one.ideal:.2g})",
            f"{one.error:.1g}",
            "passes" if one.passes else "FAILS",
        )
        for one in measured
    ]


CONSTRUCTION_COLUMNS = (
    "ability",
    "architecture",
    "backend",
    "length",
    "accuracy",
    "margin (in float64)",
    "largest error",
    "verdict",
)


def page() -> str:
    """The text of docs/claims.md."""
    parts = ["# Claims", _HOW.format(rule=RULE), "## Constructions", _constructions()]
    for name in claim_names():
        parts.append(_claim(load_claim(name)))
    return "\n\n".join(parts) + "\n"


def _constructions() -> str:
    text = (
        "Weights set by hand, so that it is known that the blocks can hold an ability and that the operator "
        "carries it, before anyone asks whether training finds it. In float32; the margin is the smallest "
        "distance of the right answer's logit from the best wrong one, the error the largest deviation of a "
        "logit from the same model in float64."
    )
    path = FOLDER / "constructions.json"
    if not path.exists():
        names = ", ".join(construction.name for construction in CONSTRUCTIONS)
        return f"{text}\n\nNot run here yet ({names}): `arena reproduce constructions --record`."
    data = json.loads(path.read_text(encoding="utf-8"))
    measured = [Measured(**entry) for entry in data["measured"]]
    table = _table(CONSTRUCTION_COLUMNS, construction_rows(measured))
    return f"{text}\n\n{table}\n\n{_origin(data['origin'])}"


def _claim(claim: Claim) -> str:
    section = claim.section
    head = f"## {section.number}. {section.sentence}"
    kind = "Ours, exploratory. " if section.exploratory else ""
    lines = [
        f"{kind}Source: {section.source}",
        f"Published numbers: {section.trust}",
        f"Settings: {section.settings} All of them: `experiments/claims/{claim.name}.toml`.",
    ]
    parts = [head, "\n".join(f"- {' '.join(line.split())}" for line in lines)]
    for size in SIZES:
        record = load_record(claim.name, size)
        if record is None:
            parts.append(f"**Size {size}: not run** (`{command(claim.name, size)}`).")
        else:
            parts.append(_size(claim, size, record))
    if load_record(claim.name, "cpu") is None and load_record(claim.name, "full") is None:
        table = [(line.statement(_place(claim, line)), line.published or "-") for line in claim.lines]
        parts.append(_table(("statement to be tested", "published"), table))
    return "\n\n".join(parts)


def _place(claim: Claim, line: Any) -> str:
    rule = line.rule
    place = rule.task or claim.experiments["cpu"].tasks[0].name
    if rule.params:
        place += " (" + ", ".join(f"{name} {value}" for name, value in rule.params.items()) + ")"
    return place + (f", length {rule.length_at('cpu')}" if rule.length else "")


def _size(claim: Claim, size: str, record: Record) -> str:
    judged = judge(claim, size, record.table)
    lines = [f"**Size {size}: {judged.verdict}.**"]
    if record.origin["seal"] != claim.seal(size):
        lines.append("**The settings or rules were changed after this run: it does not count.**")
    lines += [_table(COLUMNS, rows_of(judged)), *_by_length(claim, size, record), _origin(record.origin)]
    return "\n\n".join(lines)


def _by_length(claim: Claim, size: str, record: Record) -> Iterator[str]:
    """Medians over the seeds at every reported length: whether an arm has learned at all."""
    finals = record.table.filter(stage="final")
    for (task, params), part in finals.group_by("task", "task_params", maintain_order=True):
        lengths = sorted(part["eval_length"].unique())
        medians = part.group_by("arm", "eval_length").agg(pl.col("score").median())
        found = {(arm, length): score for arm, length, score in medians.iter_rows()}
        rate = _rates(claim.experiments[size])
        costs = part.group_by("arm").agg(
            pl.col("lr").first(), pl.col("params").first(), pl.col("state_bytes").max()
        )
        about = {arm: (rate(lr), f"{count:,}", f"{state:,}") for arm, lr, count, state in costs.iter_rows()}
        rows = [
            (arm, *(f"{found[arm, length]:.2f}" for length in lengths), *about[arm])
            for arm in claim.experiments[size].archs
        ]
        yield (
            f"Medians of the scores on {task} {params}, the tuned learning rate (where it is the lowest or "
            "the highest that was tried, a better one may lie beyond), and what each may spend "
            f"(bytes of the state of one sequence of length {lengths[-1]}):"
        )
        columns = (
            "architecture",
            *(f"length {length}" for length in lengths),
            "rate",
            "parameters",
            "state bytes",
        )
        yield _table(columns, rows)


def _rates(experiment: Experiment) -> Callable[[float], str]:
    """A tuned rate in words, with a remark where it is the lowest or the highest that was tried."""
    section = experiment.tuning
    assert section is not None
    tried = [point.shared.get("lr") for point in make_space(experiment, section).search_points()]
    rates = [rate for rate in tried if rate is not None]
    if section.extension_points or len(set(rates)) < 2:  # others may have been tried
        return lambda lr: f"{lr:.2g}"
    ends = {min(rates): " (lowest tried)", max(rates): " (highest tried)"}
    return lambda lr: f"{lr:.2g}{ends.get(lr, '')}"


def _origin(origin: Mapping[str, Any]) -> str:
    places = []
    for around in origin["environments"]:
        machine = ", ".join(around["gpus"]) or around["cpu"]
        commit, plus, rest = (around["commit"] or "unknown").partition("+")
        places.append(
            f"torch {around['packages']['torch']}, Python {around['python']}, {machine}, {around['system']}, "
            f"commit {commit[:10]}{plus}{rest}"
        )
    spent = ""
    if "runs" in origin:
        spent = f"{origin['runs']} runs, {origin['seconds'] / 60:.0f} minutes of computing; "
    mixed = "MIXED environments: " if len(places) > 1 else ""
    return f"`{origin['command']}` on {origin['date']}: {spent}{mixed}{' / '.join(places)}."


def command(name: str, size: str) -> str:
    """What runs a claim."""
    return f"arena reproduce {name}" + ("" if size == "cpu" else f" --size {size}")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(columns), "|" + "---|" * len(columns), *(line(row) for row in rows)])
