"""From an experiment with an ``[ablation]`` section to one with an arm for every point that makes sense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from arena.ablation.axes import Level, Levels, completed, label, levels_of, spec_of, wanted_points
from arena.blocks import block_names, block_options
from arena.blocks.matrix import MatrixMemoryBlock
from arena.blocks.memory_block import MemoryBlock
from arena.grid.experiment import (
    AblationSection,
    Arm,
    Experiment,
    ExperimentError,
    TaskSection,
    one_line,
    parse_experiment,
)
from arena.grid.plan import model_fields
from arena.grid.request import request
from arena.memory import GateSpec
from arena.model import Model, ModelConfig, build_model


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """A planned ablation."""

    asked: Experiment
    """The request, with its ``[ablation]`` section."""
    experiment: Experiment
    """With an arm for every point; the base is its first name."""
    levels: dict[str, Levels]
    """Name of a point -> its level on every axis."""
    left_out: dict[str, str]
    """Label of a point that cannot be -> why, in one line."""

    @property
    def base(self) -> str:
        """The architecture around which it walks."""
        return self.experiment.archs[0]


def ablation_request(
    source: str | None,
    *,
    archs: Sequence[str] = (),
    tasks: Sequence[str] = (),
    points: int | None = None,
    seeds: int | None = None,
    steps: int | None = None,
    axes: Mapping[str, Sequence[Level]] | None = None,
    presets: Sequence[str] = (),
) -> Experiment:
    """The experiment of a file with what the command line changes; see ``arena.grid.request.request``.

    Args:
        source: file or bare name; None: ``archs`` and ``tasks`` in the setting of ``quickstart``.
        archs: the architecture to walk around: one name.
        tasks: those of the file to keep; without a file, any.
        points: of the search, for every point of the ablation and task.
        seeds: number of fresh seeds that are tested.
        steps: training steps of every task.
        axes: axis -> levels, each in place of the file's.
        presets: in place of the file's.

    Raises:
        ExperimentError: one line.
    """
    if source is None and not (archs and tasks):
        raise ExperimentError("nothing to ablate: give an experiment, or --arch and --task")
    experiment = request(source, archs=archs, tasks=tasks, steps=steps, points=points, report_seeds=seeds)
    section = experiment.ablation or AblationSection()
    changed = section.model_dump() | {axis: list(levels) for axis, levels in (axes or {}).items()}
    if presets:
        changed["preset"] = list(presets)
    data = experiment.model_dump(exclude_none=True) | {"ablation": changed}
    if source is None:
        data["name"] = "ablation"
    return parse_experiment(data, label=experiment.name)


def plan_ablation(experiment: Experiment) -> Ablation:
    """Every point of the ``[ablation]`` section as an arm, the architecture itself first.

    A point whose gates contradict each other, or whose model can't be built on some task, is left out with
    its reason.

    Raises:
        ExperimentError: one line: no section, not one architecture, one without gates, an unknown axis or
            level, or no point but the architecture itself.
    """
    section = experiment.ablation
    if section is None or not (section.axes or section.preset):
        raise ExperimentError(
            "nothing to ablate: give an axis, such as --erase mean,channel, or --preset paper,left-out"
        )
    if len(experiment.archs) != 1:
        raise ExperimentError(
            f"an ablation walks around one architecture, not {len(experiment.archs)}: give one with --arch"
        )
    arch = experiment.archs[0]
    wanted = wanted_points(section.axes, section.preset)
    try:
        bases = [gates_of_model(_build(experiment, arch, entry)) for entry in experiment.tasks]
        own = _own_spec(experiment, arch, experiment.tasks[0])
    except ValueError as error:
        raise ExperimentError(one_line(error)) from None
    _check_gate_space(experiment.arch_of(arch), {axis for point in wanted for axis in point})
    base_spec, base = bases[0]
    for axis in {axis for point in wanted for axis in point} & set(base):
        if len({levels[axis] for _, levels in bases}) > 1:
            raise ExperimentError(
                f"{axis} differs between the tasks of {experiment.name}: it can't be an axis"
            )
    if any(spec != base_spec for spec, _ in bases):
        raise ExperimentError(f"the gates differ between the tasks of {experiment.name}: ablate each apart")
    plain = experiment.model_copy(update={"ablation": None})
    arms: dict[str, Arm] = {}
    left_out: dict[str, str] = {}
    kept = {arch: base}
    seen = [base]
    for point in wanted:
        levels = completed(point, base)
        if levels in seen:
            continue
        seen.append(levels)
        name = label(arch, levels, base)
        try:
            arm = _arm(experiment, arch, levels, base, spec_of(levels, base_spec), own)
            trial = plain.model_copy(update={"arms": {name: arm}})
            for task in experiment.tasks:
                _build(trial, name, task)
        except ValueError as error:
            left_out[name] = one_line(error).split(": GateSpec(")[0]
        else:
            arms[name], kept[name] = arm, levels
    if not arms:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise ExperimentError(f"no point to compare {arch!r} with{': ' if reasons else ''}{reasons}")
    data = plain.model_dump(exclude_none=True) | {
        "archs": [arch, *arms],
        "arms": {name: arm.model_dump(exclude_none=True) for name, arm in arms.items()},
    }
    planned = parse_experiment(data, label=experiment.name)
    return Ablation(asked=experiment, experiment=planned, levels=kept, left_out=left_out)


def gates_of_model(model: Model) -> tuple[GateSpec, Levels]:
    """The point of gate space of a model's memory, and its level on every axis of an ablation.

    Raises:
        ExperimentError: the model has no matrix memory, or several that differ.
    """
    found: list[tuple[GateSpec, Levels]] = []
    for block in model.blocks:
        if isinstance(block, MemoryBlock):
            gate = block.layer.output_gate if isinstance(block, MatrixMemoryBlock) else "official"
            point = block.spec, levels_of(block.spec, block.conv.kind, gate)
            if point not in found:
                found.append(point)
    if len(found) != 1:
        which = "no memory with gates" if not found else "several memories"
        raise ExperimentError(f"{model.config.arch!r} has {which}: ablate one architecture of gate space")
    return found[0]


def _check_gate_space(arch: str, axes: set[str]) -> None:
    """Refuse axes of gate space for a block whose gates can't be chosen, such as Mamba-3."""
    gates = sorted(axes - {"conv", "output_gate"})
    if gates and arch in block_names() and "gates" not in block_options(arch):
        options = ", ".join(sorted(set(block_options(arch)) - {"output_gate"}))
        free = "conv and output_gate" if "output_gate" in block_options(arch) else "conv alone"
        raise ExperimentError(
            f"{arch!r} has gates of its own, so that {', '.join(gates)} can't be an axis; {free} "
            f"can, and arms with its options ({options}) are written as [arms.NAME]"
        )


def _build(experiment: Experiment, arm: str, entry: TaskSection) -> Model:
    """The model of an arm on a task, but for the sizes of its alphabets."""
    fields = model_fields(experiment, arm, entry)
    return build_model(ModelConfig(arch=experiment.arch_of(arm), vocab_size=2, n_classes=2, **fields), seed=0)


def _own_spec(experiment: Experiment, arch: str, entry: TaskSection) -> GateSpec:
    """The architecture's own gates, whatever options the file gives."""
    fields = model_fields(experiment, arch, entry)
    fields["options"] = {key: value for key, value in fields["options"].items() if key != "gates"}
    return gates_of_model(build_model(ModelConfig(arch=arch, vocab_size=2, n_classes=2, **fields), seed=0))[0]


def _arm(
    experiment: Experiment, arch: str, levels: Levels, base: Levels, spec: GateSpec, own: GateSpec
) -> Arm:
    gates = {
        name: getattr(spec, name)
        for name in spec.__dataclass_fields__
        if getattr(spec, name) != getattr(own, name)
    }
    options: dict[str, Any] = {}
    if gates or "gates" in experiment.model.options:
        options["gates"] = gates
    if levels["output_gate"] != base["output_gate"]:
        options["output_gate"] = levels["output_gate"]
    conv = str(levels["conv"]) if levels["conv"] != base["conv"] else None
    return Arm(arch=arch, conv=conv, options=options)
