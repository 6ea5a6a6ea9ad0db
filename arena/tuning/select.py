"""Which point wins: by the declared metric on split valid, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from arena.grid.fields import ExperimentError
from arena.grid.plan import Setting
from arena.grid.tuning_section import TuningSection
from arena.tuning.study import Desk, Outcome


def metric_lengths(setting: Setting, section: TuningSection) -> list[int]:
    """The lengths of split valid that the metric is taken at.

    Raises:
        ExperimentError: the metric names a length that is reported, or one that is not measured on valid.
    """
    from arena.training.data import valid_lengths

    _, wanted = section.metric_parts()
    measured = valid_lengths(setting.train, setting.task)
    name = setting.shared["task"]["name"]
    for length in wanted:
        if length in setting.train.eval_lengths:
            raise ExperimentError(
                f"metric = {section.metric!r} would choose at length {length}, which is reported for task "
                f"{name!r}: nothing may be chosen on what is reported"
            )
        if length not in measured:
            raise ExperimentError(
                f"metric = {section.metric!r}: split valid of task {name!r} is measured at "
                f"{', '.join(map(str, measured))}, not at {length} (valid_lengths says where)"
            )
    return wanted or list(measured)


def score_rows(
    frames: Sequence[pl.DataFrame], metric: str, lengths: Sequence[int]
) -> tuple[float, dict[str, Any]]:
    """A point's score and what else its trial notes, from the rows of its runs, one frame a seed.

    The mean over lengths and seeds. A diverged run has the worst rows: every answer wrong, infinite loss.

    Raises:
        ValueError: a row is of split test, or one is missing.
    """
    scores: list[float] = []
    losses: list[float] = []
    for frame in frames:
        if frame.filter((pl.col("split") == "test") | pl.col("reported")).height:
            raise ValueError("a run of the search has been tested: it cannot be chosen on")
        at = frame.filter(pl.col("eval_length").is_in(list(lengths)))
        for name, found in ((metric, scores), ("loss", losses)):
            values = at.filter(metric=name)["value"].to_list()
            if len(values) != len(lengths):
                raise ValueError(f"a run has {len(values)} values of {name} at lengths {list(lengths)}")
            found.append(sum(values) / len(values))
    loss = sum(losses) / len(losses)
    diverged = any("diverged" in frame["status"].to_list() for frame in frames)
    return sum(scores) / len(scores), {
        "loss": loss if math.isfinite(loss) else None,
        "status": "diverged" if diverged else "done",
        "wall_s": round(sum(float(frame["wall_s"][0] or 0.0) for frame in frames), 2),
        "params": int(frames[0]["params"][0]),
    }


def best(outcomes: Mapping[int, Outcome], direction: str, default_lr: float) -> Outcome:
    """The winner: best score; ties by valid loss, then by the smaller rate, then by the earlier point."""
    sign = 1.0 if direction == "minimize" else -1.0

    def key(outcome: Outcome) -> tuple[float, float, float, int]:
        score = sign * outcome.score
        return (
            math.inf if math.isnan(score) else score,
            outcome.loss,
            outcome.values.get("lr", default_lr),
            outcome.point,
        )

    return min(outcomes.values(), key=key)


def winners_table(
    desks: Sequence[Desk], winners: Sequence[Outcome], defaults: Mapping[str, float]
) -> pl.DataFrame:
    """One row a study: the chosen point, its score, and how many points there were to choose from."""
    from arena.grid.plan import canonical
    from arena.training import Replica

    rows = []
    for desk, winner in zip(desks, winners, strict=True):
        setting = desk.setting
        replica = Replica(**{**setting.replica, **defaults, **winner.values, "seed": 0})
        rows.append(
            {
                "task": setting.shared["task"]["name"],
                "task_params": canonical(setting.shared["task"]["params"]),
                "arm": setting.arm,
                "trial": winner.point,
                **{
                    name: getattr(replica, name) for name in ("lr", "weight_decay", "warmup", "beta2", "clip")
                },
                "options": canonical(dict(winner.own)),
                "score": winner.score,
                "loss": winner.loss,
                "n_points": len(desk.outcomes()),
            }
        )
    return pl.DataFrame(rows, infer_schema_length=None)
