"""What a tuning will cost, said before it starts: runs, training tokens, and time by a short measurement."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from arena.grid.plan import Setting, digest
from arena.grid.store import write_whole
from arena.grid.tuning_section import TuningSection

WARM, MEASURED = 2, 6  # steps of a probe
REPLICAS = 4
_FORWARD = 1 / 3  # of a training step


def probe(setting: Setting, *, device: str, threads: int) -> float:
    """Seconds of one training step of one run, as its share of a small fleet.

    The median of a few steps, at the mean of the training lengths; a busy machine makes it larger.
    """
    import torch

    from arena.model import ModelConfig
    from arena.training import Replica, TrainConfig, train_fleet
    from arena.training.data import step_lengths

    full: TrainConfig = setting.train
    train = dataclasses.replace(
        full,
        steps=WARM + MEASURED,
        eval_every=0,
        eval_lengths=(),
        valid_lengths=(step_lengths(full, setting.task)[0],),
        eval_examples=1,
        stop_at=None,
    )
    lengths = step_lengths(train, setting.task)
    ends: list[float] = []

    def note(_: int) -> None:
        if device == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    held = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        train_fleet(
            ModelConfig(**setting.shared["model"]),
            setting.task,
            train,
            [Replica(seed=seed) for seed in range(REPLICAS)],
            device=device,
            on_step=note,
        )
    finally:
        torch.set_num_threads(held)
    # by position: steps have lengths of their own
    shares = sorted((ends[n] - ends[n - 1]) / lengths[n] for n in range(WARM, WARM + MEASURED))
    return shares[len(shares) // 2] * mean_length(setting) / REPLICAS


def mean_length(setting: Setting) -> float:
    """Mean training length over the steps."""
    from arena.training.data import step_lengths

    lengths = step_lengths(setting.train, setting.task)
    return sum(lengths) / len(lengths)


class Probes:
    """Measured times, kept in a file: starting again measures nothing twice."""

    def __init__(self, path: Path, *, device: str, threads: int) -> None:
        self.path, self.device, self.threads = path, device, threads
        self.known: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    def seconds(self, setting: Setting) -> float:
        """As :func:`probe`."""
        key = digest([setting.shared, self.threads])
        if key not in self.known:
            self.known[key] = probe(setting, device=self.device, threads=self.threads)
            write_whole(self.path, json.dumps(self.known, indent=1).encode())
        return self.known[key]


def run_seconds(setting: Setting, step: float, *, tested: bool) -> float:
    """Seconds of a run from those of a step: training, and evaluations as forward passes."""
    from arena.training.data import valid_lengths

    train = setting.train
    points = -(-train.steps // train.eval_every) if train.eval_every else 1
    positions = points * sum(valid_lengths(train, setting.task)) + (sum(train.eval_lengths) if tested else 0)
    forward = _FORWARD * step / (train.batch_size * mean_length(setting))
    return train.steps * step + train.eval_examples * positions * forward


def run_tokens(setting: Setting) -> float:
    """Positions that a run trains on."""
    return setting.train.steps * setting.train.batch_size * mean_length(setting)


def cost_lines(
    settings: Sequence[Setting],
    section: TuningSection,
    seconds: Mapping[int, float],
    *,
    workers: int,
    panel_runs: int,
) -> list[str]:
    """The plan and what it costs, for people.

    Args:
        settings: every architecture on every task.
        section: the rules.
        seconds: index of a setting -> seconds of a step of one run.
        workers: processes.
        panel_runs: runs of one panel.
    """
    seeds = len(section.search_seeds)
    per_study = (section.points + section.trials) * seeds
    search, final = per_study * len(settings), len(section.report_seeds) * len(settings)
    panel = panel_runs * sum(setting.arm in section.panel for setting in settings)
    total, tokens = total_cost(settings, section, seconds, panel_runs=panel_runs)
    arms = {setting.arm for setting in settings}
    tasks = len(settings) // len(arms)
    lines = [
        f"plan: {len(arms)} architectures x {tasks} tasks, {section.points} paired points each"
        + (f" and {section.trials} {section.exploit} trials" if section.trials else "")
        + (f" x {seeds} seeds" if seeds > 1 else "")
        + f": {search} runs of the search, {final} of the winners, {panel} of panels; {tokens / 1e6:,.1f} M "
        "training tokens",
        f"cost: {hours(total)} of computing by a short measurement, about {hours(total / workers)} on "
        f"{workers} worker{'s' if workers > 1 else ''}",
    ]
    if section.extension_points:
        more = section.extension_points * seeds * len(settings)
        lines.append(f"      and {more} runs more for every bound that a best point comes close to")
    return lines


def total_cost(
    settings: Sequence[Setting], section: TuningSection, seconds: Mapping[int, float], *, panel_runs: int
) -> tuple[float, float]:
    """Seconds of computing and training tokens, extensions apart; arguments as of :func:`cost_lines`."""
    per_study = (section.points + section.trials) * len(section.search_seeds)
    total = tokens = 0.0
    for index, setting in enumerate(settings):
        untested = per_study + (panel_runs if setting.arm in section.panel else 0)
        tested = len(section.report_seeds)
        tokens += (untested + tested) * run_tokens(setting)
        total += untested * run_seconds(setting, seconds[index], tested=False)
        total += tested * run_seconds(setting, seconds[index], tested=True)
    return total, tokens


def family_lines(section: TuningSection, tasks: int) -> list[str]:
    """Whether the reported seeds suffice for the declared comparisons, before anything is trained."""
    from arena.statistics import claim_seeds

    lines = []
    seeds = len(section.report_seeds)
    for what, count in (("pairs", len(section.pairs)), ("equivalences", len(section.equivalence))):
        if not count:
            continue
        needed = claim_seeds(count * tasks, equal=what == "equivalences")
        enough = "are declared" if seeds >= needed else "are declared: NO CLAIM will be possible"
        lines.append(
            f"seeds: {count} {what} x {tasks} tasks are a family of {count * tasks} comparisons, which needs "
            f"{needed} seeds; {seeds} {enough}"
        )
    return lines or ["seeds: no pairs are declared in [tuning], so there will be no verdict on any pair"]


def hours(seconds: float) -> str:
    """A time for people."""
    return f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{max(1, round(seconds / 60))} minutes"
