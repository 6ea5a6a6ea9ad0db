"""The verdict on every line of a claim: ``confirmed``, ``not confirmed`` or ``undecided``, with its reason.

Every line is tested in both directions, so that a verdict rests on evidence and never on the sign of a mean:

- ``solves``, ``fails``: how many runs do; an exact two-sided binomial test against one half ("most runs
  do"), with the exact 95 % interval of the rate. A median over seeds, as papers report it, says the same.
- ``above``: confirmed by the rule of :mod:`arena.report.verdicts` (interval of the difference of
  interquartile means, probability of improvement, sign-flip test), if the mean difference is ``least`` or
  more; not confirmed where a sign-flip test shows that it is below ``least``. Where neither arm is above
  chance, or both solve the task in every run, the setting cannot tell and the line is undecided.
- ``equal``: two one-sided sign-flip tests against the margin; not confirmed where one shows that the
  difference is beyond it.
- ``narrower``: as ``above``, on the width in decades of each seed's window of good learning rates. A window
  that reaches the end of the panel is wider than measured: the first arm's keeps the line from being
  confirmed, the second's from being refuted.

Where a control, a ``solves`` line of an arm that is known to be able to, is not confirmed, training was too
short: every other line on its task is undecided.

p-values are Holm-corrected over the lines of the claim (controls, and those marked ``ours``, are families of
their own), the confirming and the refuting ones apart. The claim is confirmed where all its lines are, not
confirmed where one of them is not, and else undecided. An undecided line says how many seeds it would need if
the rate or the difference that was seen is the true one: at a power of 80 %.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from arena.claims.file import Claim, families
from arena.claims.rules import Line
from arena.claims.scores import windows
from arena.grid.experiment import Experiment
from arena.report.tables import SOLVED
from arena.report.verdicts import ALPHA, LEARNED, compared, lacking, p_text
from arena.statistics import (
    MIN_UNITS,
    claim_seeds,
    clopper_pearson,
    detectable_effect,
    holm,
    interquartile_mean,
    rate_seeds,
    sign_flip_test,
)

CONFIRMED, NOT_CONFIRMED, UNDECIDED = "confirmed", "not confirmed", "undecided"
MOST_SEEDS = 1000
"""Beyond so many, an undecided line says only that it needs more."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A line and what the runs say of it."""

    line: Line
    place: str
    """Task and length in words."""
    seeds: int = 0
    """Runs, or pairs of runs."""
    ours: str = "no result"
    """What was measured, with its interval."""
    p_yes: float = 1.0
    """Of the test that would confirm it, before the correction."""
    p_no: float = 1.0
    """Of the test that would refute it."""
    missing: tuple[str, ...] = ()
    """What keeps it from being confirmed, whatever p says."""
    open: str | None = None
    """Why it cannot be decided in this setting at all."""
    effect: float | None = None
    """Standardised effect, by which the seeds are counted that it would need; of a rate: the share."""
    verdict: str = UNDECIDED
    reason: str = ""
    """Behind ``undecided``, or a remark."""

    @property
    def text(self) -> str:
        """The verdict in words."""
        return f"{self.verdict}: {self.reason}" if self.reason else self.verdict


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A claim and its verdict."""

    claim: Claim
    size: str
    findings: Sequence[Finding]

    @property
    def verdict(self) -> str:
        """Of the whole claim."""
        counted = [finding for finding in self.findings if finding.line.family == "claim"]
        counted = counted or [finding for finding in self.findings if finding.line.family == "ours"]
        verdicts = [finding.verdict for finding in counted]
        if all(verdict == CONFIRMED for verdict in verdicts):
            return CONFIRMED
        if NOT_CONFIRMED in verdicts:
            return f"{NOT_CONFIRMED}: {verdicts.count(NOT_CONFIRMED)} of {len(verdicts)} lines are not"
        return f"{UNDECIDED}: {verdicts.count(UNDECIDED)} of {len(verdicts)} lines are"


def judge(claim: Claim, size: str, table: pl.DataFrame) -> Judged:
    """The verdict on a claim.

    Args:
        claim: with its rules.
        size: of the runs.
        table: as ``score_table`` gives it.
    """
    experiment = claim.experiments[size]
    declared = _declared(experiment)
    found: dict[tuple[int, tuple[str, ...]], Finding] = {}
    idle: dict[str, str] = {}
    """Task -> the control that does not solve it."""
    for family in families(claim):
        measured = [_measure(line, size, experiment, table) for line in family]
        for index, finding in enumerate(measured):
            control = idle.get(_task_of(finding))
            if control is not None and finding.line.family != "control":
                why = f"the control {control} does not solve the task at this size"
                measured[index] = replace(finding, open=why)
        yes = holm([finding.p_yes for finding in measured])
        no = holm([finding.p_no for finding in measured])
        for finding, p_yes, p_no in zip(measured, yes, no, strict=True):
            wanted = declared[finding.line.rule.kind == "narrower"]
            decided = _decide(finding, float(p_yes), float(p_no), len(family), wanted)
            found[id(finding.line.rule), finding.line.subject] = decided
            if finding.line.family == "control" and decided.verdict != CONFIRMED:
                idle[_task_of(finding)] = finding.line.subject[0]
    findings = [found[id(line.rule), line.subject] for line in claim.lines]
    return Judged(claim=claim, size=size, findings=findings)


def _task_of(finding: Finding) -> str:
    return finding.place.partition(", length")[0]


def _declared(experiment: Experiment) -> tuple[int, int]:
    """Seeds of the winners and of a panel."""
    assert experiment.tuning is not None
    return len(experiment.tuning.report_seeds), experiment.tuning.panel_seeds


def _decide(finding: Finding, p_yes: float, p_no: float, family: int, declared: int) -> Finding:
    if not finding.seeds:
        return replace(finding, reason="no result")
    if finding.seeds < declared:
        return replace(finding, reason=f"{finding.seeds} of {declared} seeds have a result")
    if finding.open is not None:
        return replace(finding, reason=finding.open)
    if p_no <= ALPHA:
        return replace(finding, verdict=NOT_CONFIRMED, reason=f"p = {p_text(p_no)}")
    if p_yes <= ALPHA and not finding.missing:
        return replace(finding, verdict=CONFIRMED, reason="")
    needed = _needed(finding, family)
    seeds = f"needs {needed} seeds" if needed <= MOST_SEEDS else f"needs more than {MOST_SEEDS} seeds"
    why = "; ".join(finding.missing)
    return replace(finding, reason=f"{seeds} ({why})" if why else seeds)


def _needed(finding: Finding, family: int) -> int:
    """Seeds at which the observed effect would be decided four times in five, in a family of lines."""
    least = max(claim_seeds(family), finding.seeds + 1)
    effect = finding.effect
    if effect is None:
        return MOST_SEEDS + 1
    if finding.line.rule.kind in ("solves", "fails"):
        return rate_seeds(effect, family, least, MOST_SEEDS) or MOST_SEEDS + 1
    for n in range(least, MOST_SEEDS + 1):
        found = detectable_effect(n, family, ALPHA)
        if found is not None and found <= abs(effect):
            return n
    return MOST_SEEDS + 1


def _more_than_half(successes: int, n: int) -> float:
    """Two-sided exact p-value of the hypothesis that at most half of the runs do."""
    tail = sum(math.comb(n, k) for k in range(successes, n + 1))
    return min(1.0, 2 * tail / 2**n)


def _measure(line: Line, size: str, experiment: Experiment, table: pl.DataFrame) -> Finding:
    rule = line.rule
    (task,) = (
        entry
        for entry in experiment.tasks
        if rule.task in (None, entry.name) and rule.params.items() <= entry.params.items()
    )
    length = rule.length_at(size) or max(task.eval_lengths)
    params = ", ".join(f"{name} {value}" for name, value in rule.params.items())
    place = task.name + (f" ({params})" if params else "")
    mine = [
        key
        for key in table.filter(task=task.name).select("task", "task_params").unique().iter_rows()
        if rule.params.items() <= json.loads(key[1]).items()
    ]
    if rule.kind == "narrower":
        finding = Finding(line=line, place=place)
        return _windows(finding, table, mine[0]) if mine else finding
    finding = Finding(line=line, place=f"{place}, length {length}")
    units = _units(table, length)
    if not mine:
        return finding
    if rule.kind in ("solves", "fails"):
        return _rate(finding, units.filter(task=mine[0][0], task_params=mine[0][1], arm=line.subject[0]))
    return _difference(finding, units, mine[0])


def _units(table: pl.DataFrame, length: int) -> pl.DataFrame:
    """Scores at a length in the columns of ``arena.report.verdicts.final_scores``."""
    return table.filter(stage="final", eval_length=length).select(
        "task",
        "task_params",
        "arm",
        "seed",
        "eval_length",
        accuracy="score",
        chance_scaled_accuracy="score",
        solved=pl.col("score") >= SOLVED,
    )


def _rate(finding: Finding, units: pl.DataFrame) -> Finding:
    scores = units["accuracy"].to_numpy()
    n, rule = len(scores), finding.line.rule
    if not n:
        return finding
    solves = rule.kind == "solves"
    hits = int((scores >= rule.at_least).sum() if solves else (scores <= rule.at_most).sum())
    low, high = clopper_pearson(hits, n)
    bound = f">= {rule.at_least:g}" if solves else f"<= {rule.at_most:g}"
    ours = (
        f"{hits}/{n} runs {bound} [{low:.2f}, {high:.2f}]; median {np.median(scores):.2f} "
        f"({scores.min():.2f} to {scores.max():.2f})"
    )
    p_yes, p_no = _more_than_half(hits, n), _more_than_half(n - hits, n)
    return replace(finding, seeds=n, ours=ours, p_yes=p_yes, p_no=p_no, effect=hits / n)


def _difference(finding: Finding, units: pl.DataFrame, key: tuple[str, str]) -> Finding:
    rule, (x, y) = finding.line.rule, finding.line.subject
    margin = rule.margin if rule.kind == "equal" else None
    row = compared(units, "equal" if margin else "better", x, y, [key], margin)
    if not row["seeds"]:
        return finding
    pairs = units.filter(task=key[0], task_params=key[1])
    both = pairs.filter(arm=x).join(pairs.filter(arm=y), on="seed", suffix="_y").sort("seed")
    differences = (both["accuracy"] - both["accuracy_y"]).to_numpy()
    interval = f" [{row['low']:+.2f}, {row['high']:+.2f}]" if row["low"] is not None else ""
    ours = (
        f"{row['iqm_x']:.2f} and {row['iqm_y']:.2f}, difference {row['difference']:+.2f}{interval}; solved "
        f"{row['solved_x']}/{row['seeds']} and {row['solved_y']}/{row['seeds']}"
    )
    cannot = None
    if max(row["scaled_x"], row["scaled_y"]) < LEARNED:
        cannot = "neither is above chance at this size"
    elif rule.kind == "above" and row["solved_x"] == row["solved_y"] == row["seeds"]:
        cannot = "both solve it in every run at this size"
    found = replace(finding, seeds=row["seeds"], ours=ours, open=cannot)
    if rule.kind == "equal":
        return _equal(found, differences, float(row["p"]), rule.margin)
    missing = tuple(lacking({**row, "p_holm": 0.0})) if row["difference"] >= 0 else ("the sign is the other",)
    return _above(found, differences, rule.least, missing)


def _equal(finding: Finding, differences: np.ndarray, p: float, margin: float) -> Finding:
    beyond = min(
        sign_flip_test(differences - margin, alternative="greater"),
        sign_flip_test(-differences - margin, alternative="greater"),
    )
    effect = _effect(margin - np.abs(differences.mean()), differences)
    return replace(finding, p_yes=p, p_no=min(1.0, 2 * beyond), effect=effect)


def _above(finding: Finding, differences: np.ndarray, least: float, missing: tuple[str, ...]) -> Finding:
    mean = float(differences.mean())
    p_yes = sign_flip_test(differences) if mean > 0 else 1.0
    p_no = min(1.0, 2 * sign_flip_test(least - differences, alternative="greater"))
    if 0 <= mean < least:
        missing = (*missing, f"a mean difference below {least:g} counts as none")
    effect = _effect(mean if mean >= least else least - mean, differences)
    return replace(finding, p_yes=p_yes, p_no=p_no, missing=missing, effect=effect)


def _effect(distance: float, differences: np.ndarray) -> float | None:
    """A distance in standard deviations of the differences."""
    spread = float(differences.std(ddof=1)) if len(differences) > 1 else 0.0
    if spread == 0:
        return math.inf if distance else None
    return float(distance) / spread


def _windows(finding: Finding, table: pl.DataFrame, key: tuple[str, str]) -> Finding:
    x, y = finding.line.subject
    panel = table.filter(stage="panel", task=key[0], task_params=key[1])
    widths = windows(panel)
    both = widths.filter(arm=x).join(widths.filter(arm=y), on="seed", suffix="_y").sort("seed")
    if both.is_empty():
        return finding
    mine, other = both["decades"].to_numpy(), both["decades_y"].to_numpy()
    differences = other - mine
    least = finding.line.rule.least
    ours = (
        f"{interquartile_mean(mine):.2f} and {interquartile_mean(other):.2f} decades, mean difference "
        f"{differences.mean():+.2f} ({differences.min():+.2f} to {differences.max():+.2f})"
    )
    open_ends = [arm for arm, name in ((x, "open"), (y, "open_y")) if both[name].any()]
    if open_ends:
        ours += f"; a window of {' and of '.join(open_ends)} reaches the end of the panel: it is wider"
    idle = [arm for arm, name in ((x, "best"), (y, "best_y")) if np.median(both[name].to_numpy()) < LEARNED]
    cannot = f"{' and '.join(idle)} learned nothing at this size" if idle else None
    missing = () if len(differences) >= MIN_UNITS else (f"{MIN_UNITS} pairs at least",)
    if x in open_ends:
        missing = (*missing, f"rates beyond the panel, where {x} may still be good")
    found = replace(finding, seeds=len(differences), ours=ours, open=cannot)
    judged = _above(found, differences, least, missing)
    return replace(judged, p_no=1.0) if y in open_ends else judged
