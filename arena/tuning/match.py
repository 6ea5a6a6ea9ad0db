"""Making architectures agree in one quantity by solving MLP sizes or widths, before anything is trained.

The hidden width of the MLP is tried first, as it moves parameters and FLOPs in small steps and leaves the
memory alone; where that is not enough, or there is no MLP, ``d_model`` moves too. States have sizes of their
own: there ``d_model`` and the number of heads are searched for the nearest one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arena.grid.experiment import Experiment, ModelOverride
from arena.grid.fields import ExperimentError
from arena.grid.plan import Setting, digest, plan_settings
from arena.grid.store import write_whole
from arena.tuning.flops import flops_per_token, relative

TOLERANCE = {"params": 0.02, "flops": 0.02, "state": 0.02, "time": 0.10}
"""Largest relative deviation from the reference that counts as matched."""
LEAST_HIDDEN = 8
_HEADS = (1, 2, 4, 8, 16)
_SECANTS = 4

Solution = dict[str, dict[str, Any]]
"""Arm -> fields of ``[overrides.ARM]``, on one task."""


@dataclass(frozen=True)
class Quantity:
    """What is matched: how to measure it on a model's configuration, and whether it is in steps of time."""

    name: str
    measure: Callable[[Mapping[str, Any]], float]


def model_quantity(name: str, length: int) -> Quantity:
    """Parameters, all or active, FLOPs a token or state bytes at a length, of a model's configuration."""
    from arena.model import ModelConfig, active_params, build_model, model_params

    def measure(model: Mapping[str, Any]) -> float:
        config = ModelConfig(**model)
        if name == "flops":
            return flops_per_token(config, length)
        built = build_model(config, seed=0)
        if name == "active_params":
            return active_params(built)
        return model_params(built) if name == "params" else built.state_bytes(length)

    return Quantity(name, measure)


def state_grows(model: Mapping[str, Any], length: int) -> bool:
    """Whether the state of twice the length is larger."""
    size = model_quantity("state", length).measure(model)
    return model_quantity("state", 2 * length).measure(model) > size


def plan_solved(
    experiment: Experiment,
    solved: Sequence[Solution],
    device: str,
    *,
    arm: str | None = None,
    own: Mapping[str, Any] | None = None,
) -> list[Setting]:
    """Every arm on every task with what was solved for it there.

    Args:
        experiment: the request.
        solved: for each task; empty: nothing was solved.
        device: ``cpu`` or ``cuda``.
        arm: this one only.
        own: with these fields of ``[overrides.ARM]`` too.

    Raises:
        ExperimentError: a field has no legal value.
    """
    from arena.grid.experiment import one_line

    if not any(solved) and arm is None:
        return plan_settings(experiment, device=device)
    settings: list[Setting] = []
    archs = experiment.archs if arm is None else [arm]
    for number, entry in enumerate(experiment.tasks):
        overrides = {name: value for name, value in experiment.overrides.items() if name in archs}
        for name in archs:
            extra = [solved[number].get(name, {})] if solved else []
            for fields in [*extra, *([own] if own is not None else [])]:
                held = overrides.get(name, ModelOverride()).model_dump(exclude_none=True)
                options = {**held["options"], **fields.get("options", {})}
                try:
                    overrides[name] = ModelOverride.model_validate({**held, **fields, "options": options})
                except ValueError as error:
                    raise ExperimentError(f"{name!r}: {one_line(error)}") from None
        update = {"archs": archs, "tasks": [entry], "overrides": overrides}
        settings += plan_settings(experiment.model_copy(update=update), device=device)
    return settings


def solve_all(
    experiment: Experiment, settings: Sequence[Setting], quantity: Callable[[Setting], Quantity], path: Path
) -> list[Solution]:
    """Solve every task; the solution is kept in a file, as a measured one would not come out the same twice.

    Args:
        experiment: with ``[tuning]``.
        settings: of the experiment as it is written, tasks outermost.
        quantity: what to match, on a setting's task.
        path: of the file.
    """
    section = experiment.tuning
    assert section is not None
    request = digest([section.match, section.reference, [setting.shared for setting in settings]])
    if path.exists():
        held = json.loads(path.read_text())
        if held["request"] == request:
            return held["solved"]
    arms = len(experiment.archs)
    solved = [
        solve_task(settings[start : start + arms], quantity, section.match, section.reference)
        for start in range(0, len(settings), arms)
    ]
    write_whole(path, json.dumps({"request": request, "solved": solved}, indent=1).encode())
    return solved


def solve_task(
    settings: Sequence[Setting], quantity: Callable[[Setting], Quantity], match: str, reference: str | None
) -> Solution:
    """What makes the arms of one task agree with the reference.

    Raises:
        ExperimentError: the state of the reference grows, so there is nothing to agree with.
    """
    length = settings[0].train.train_lengths[1]
    fixed = [s for s in settings if match != "state" or not state_grows(s.shared["model"], length)]
    if reference is not None and reference not in {setting.arm for setting in fixed}:
        raise ExperimentError(
            f"reference = {reference!r}: its state grows with the length, so none can be matched to it"
        )
    if len(fixed) < 2:
        return {}
    values = {setting.arm: quantity(setting).measure(setting.shared["model"]) for setting in fixed}
    target = target_value(values, reference)
    solution: Solution = {}
    for setting in fixed:
        if abs(relative(values[setting.arm], target)) > TOLERANCE[match] / 4:
            found = _solve(setting.shared["model"], quantity(setting), target)
            if found:
                solution[setting.arm] = found
    return solution


def target_value(values: Mapping[str, float], reference: str | None) -> float:
    """The value of the reference, or that of the (lower) median architecture."""
    if reference is not None and reference in values:
        return values[reference]
    return sorted(values.values())[(len(values) - 1) // 2]


def _solve(model: Mapping[str, Any], quantity: Quantity, target: float) -> dict[str, Any]:
    """The fields that bring a model nearest to the target: the first within the tolerance."""
    tolerance = TOLERANCE[quantity.name]
    best: dict[str, Any] = {}
    nearest = abs(relative(quantity.measure(model), target))
    for fields in _candidates(model, quantity, target):
        try:
            found = abs(relative(quantity.measure({**model, **fields}), target))
        except (ValueError, RuntimeError):  # no such width or number of heads
            continue
        if found < nearest:
            best, nearest = fields, found
        if quantity.name != "state" and nearest <= tolerance:
            break
        if nearest == 0.0:
            break
    return best


def _candidates(model: Mapping[str, Any], quantity: Quantity, target: float) -> Iterator[dict[str, Any]]:
    width, heads = model["d_model"], model["n_heads"]
    if quantity.name == "state":
        step = max(1, width // 16)
        widths = sorted(range(step, 4 * width + 1, step), key=lambda w: (abs(w - width), w))
        for w in widths:
            for h in sorted({*_HEADS, heads}, key=lambda h: (abs(h - heads), h)):
                if w % h == 0 and w % model["tokens_per_position"] == 0:
                    yield {"d_model": w, "n_heads": h}
        return
    yield from _hidden(model, quantity, target)
    step = heads * model["tokens_per_position"]
    for w in sorted(range(step, 2 * width + 1, step), key=lambda w: (abs(w - width), w)):
        if w != width and 2 * w >= width:
            yield {"d_model": w}
            for fields in _hidden({**model, "d_model": w}, quantity, target):
                yield {"d_model": w, **fields}


def _hidden(model: Mapping[str, Any], quantity: Quantity, target: float) -> Iterator[dict[str, Any]]:
    """Hidden widths of the MLP near the target: the quantity is linear in it (time: about so)."""
    low = max(LEAST_HIDDEN, model["d_model"] // 4)
    high = 2 * low
    for _ in range(_SECANTS if quantity.name == "time" else 1):
        try:
            at_low = quantity.measure({**model, "mlp_hidden": low})
            slope = (quantity.measure({**model, "mlp_hidden": high}) - at_low) / (high - low)
        except (ValueError, RuntimeError):
            return
        if slope <= 0:
            return  # no MLP, or lost in noise
        solved = low + (target - at_low) / slope
        if solved < LEAST_HIDDEN or solved > 64 * model["d_model"]:
            return
        for hidden in dict.fromkeys((round(solved), int(solved), int(solved) + 1)):
            yield {"mlp_hidden": max(LEAST_HIDDEN, hidden)}
        high = max(low + 8, round(solved))
