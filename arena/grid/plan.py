"""Experiment -> runs: every field resolved, every run with an id."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, asdict, dataclass, field
from typing import Any

from arena.grid.experiment import Experiment, TaskSection, one_line
from arena.grid.fields import ExperimentError, near
from arena.plugins import used

ID_LENGTH = 16
"""Hex digits of a run id: 64 bits, so 128,000 runs collide with a chance of about 4e-10."""


STAGES = ("grid", "search", "extension", "exploit", "panel", "final")
"""``grid``: a plain grid. Of tuning: ``search`` (the paired points), ``extension`` (more of them beyond a
bound), ``exploit`` (adaptive trials), ``panel`` (sensitivity to the learning rate), ``final`` (the winner on
fresh seeds)."""
TESTED_STAGES = ("grid", "final")
"""The others are measured on split valid alone, so that nothing can be chosen on test."""
LATER_FIELDS = ("mlp_hidden", "conv_on", "experts", "experts_per_token", "load_balance")
"""Fields of the model that came after the first results: at their defaults they are absent from a run's
configuration, so that ids from before them stay."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One model to be trained once."""

    experiment: str
    """Name of the experiment that asked for it; no part of the id."""
    trial: int
    """Index of its (lr, weight_decay) among the experiment's points; no part of the id."""
    arm: str
    """The name in ``archs`` that it stands for: an arm, or the architecture; no part of the id."""
    stage: str = "grid"
    """Why it is trained, one of :data:`STAGES`; no part of the id."""
    space: str | None = None
    """Hash of the frozen search space that its point is from; no part of the id."""
    config: Mapping[str, Any]
    """Every field that can change the result, JSON values only: ``model``, ``task``, ``train``, ``replica``,
    ``versions``, ``device``, ``dtype``, ``backend``."""
    id: str = field(init=False)
    """Hash of ``config``."""
    group: str = field(init=False)
    """Hash of all of ``config`` but ``replica``: runs of one group can train together."""

    known: InitVar[Mapping[str, str] | None] = None
    """Canonical JSON of parts of ``config``, where it is at hand: the same for very many runs."""

    def __post_init__(self, known: Mapping[str, str] | None) -> None:
        known = known or {}
        texts = {key: known.get(key) or canonical(value) for key, value in self.config.items()}
        object.__setattr__(self, "id", _digest_of(texts))
        object.__setattr__(self, "group", _digest_of({k: v for k, v in texts.items() if k != "replica"}))

    @property
    def planned_tokens(self) -> float:
        """Positions that the run will train on, on average over its range of lengths."""
        train = self.config["train"]
        return train["steps"] * train["batch_size"] * sum(train["train_lengths"]) / 2

    @property
    def label(self) -> str:
        """For people: architecture, task, seed."""
        task, replica = self.config["task"], self.config["replica"]
        return f"{self.arm} {task['name']} seed {replica['seed']}"

    @property
    def notes(self) -> dict[str, Any]:
        """What is known of a run beside its configuration: kept in plan.json, not in the run's folder alone,
        as another request may ask for the same run for another reason.
        """
        return {"trial": self.trial, "arm": self.arm, "stage": self.stage, "space": self.space}


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """Runs of one group that train together, in this order."""

    runs: tuple[Run, ...]
    id: str = field(init=False)
    """Hash of the members' ids."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", digest([run.id for run in self.runs]))

    @property
    def planned_tokens(self) -> float:
        """Positions over all members."""
        return sum(run.planned_tokens for run in self.runs)

    @property
    def label(self) -> str:
        """For people: architecture, task, number of runs."""
        first, count = self.runs[0], len(self.runs)
        return f"{first.arm} · {first.config['task']['name']} · {count} run{'s' if count > 1 else ''}"


def canonical(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """The first ``ID_LENGTH`` hex digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:ID_LENGTH]


def _digest_of(texts: Mapping[str, str]) -> str:
    """:func:`digest` of a mapping whose values are canonical JSON already."""
    text = ",".join(f"{canonical(key)}:{texts[key]}" for key in sorted(texts))
    return hashlib.sha256(f"{{{text}}}".encode()).hexdigest()[:ID_LENGTH]


def result_versions(task: Any, blocks: Sequence[str] = ()) -> dict[str, Any]:
    """The hand-bumped result version of each part; a part raises its own when its results change.

    Plug-ins behind the task or one of the ``blocks`` are parts as well: ``plugin:NAME``, with the version of
    the distribution and a digest of its source.
    """
    import arena.blocks
    import arena.model
    import arena.training
    import kernels
    import synthetic_tasks

    parts = {
        "synthetic_tasks": synthetic_tasks,
        "kernels": kernels,
        "blocks": arena.blocks,
        "model": arena.model,
        "training": arena.training,
    }
    return {
        "task": task.version,
        **{name: module.RESULT_VERSION for name, module in parts.items()},
        **{f"plugin:{name}": version for name, version in used(blocks, task.name).items()},
    }


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One arm on one task: all of a run's configuration but the replica."""

    experiment: str
    """Name of the experiment."""
    arm: str
    """A name of ``archs``."""
    task: Any
    """The task."""
    train: Any
    """``arena.training.TrainConfig``."""
    shared: Mapping[str, Any]
    """The configuration, as in ``Run.config``."""
    replica: Mapping[str, Any]
    """Fields of ``arena.training.Replica`` that ``[train]`` gives."""

    def run(self, *, seed: int, trial: int, point: Mapping[str, Any], **changes: Any) -> Run:
        """The run of a seed at a point (fields of a replica); ``changes`` are other fields of the run, and
        ``train``: what takes the place of fields of the training.
        """
        from arena.training import Replica

        known, shared = self._texts, dict(self.shared)
        if train := changes.pop("train", {}):
            shared["train"] = {**shared["train"], **_plain(train)}
            known = {key: text for key, text in known.items() if key != "train"}
        shared["replica"] = _plain(asdict(Replica(**{**self.replica, **point, "seed": seed})))
        return Run(
            experiment=self.experiment, arm=self.arm, trial=trial, config=shared, known=known, **changes
        )

    @functools.cached_property
    def _texts(self) -> dict[str, str]:
        return {key: canonical(value) for key, value in self.shared.items()}


def plan_settings(experiment: Experiment, *, device: str = "cpu") -> list[Setting]:
    """Every arm on every task, in the order tasks, arms.

    Everything that can be refused is refused here, before anything is trained: names, parameters, lengths,
    and each architecture is built once.

    Raises:
        ExperimentError: one line that says what is wrong.
    """
    from arena.model import parse_arch
    from arena.training import TrainConfig
    from arena.training.data import valid_lengths
    from kernels.backends import NAMES, override

    if experiment.ablation is not None:
        raise ExperimentError(f"{experiment.name} has a section [ablation]: arena ablate runs it")
    try:
        override()
    except ValueError as error:
        wanted = os.environ["ARENA_BACKEND"]
        text = str(error) if "=" in wanted else f"ARENA_BACKEND is {wanted!r}{near(wanted, NAMES)}"
        raise ExperimentError(text) from None
    section: dict[str, Any] = experiment.train.model_dump(exclude_none=True)
    replica: dict[str, Any] = {key: section.pop(key) for key in ("warmup", "beta2", "clip") if key in section}
    settings: list[Setting] = []
    seen: set[tuple[str, str]] = set()
    tried: dict[str, str] = {}
    for entry in experiment.tasks:
        task = _task(entry)
        key = task.name, canonical(_plain(task.params))
        if key in seen:
            raise ExperimentError(
                f"two [[tasks]] are {task.name!r} with the same params: reports could not tell them apart, "
                "write two experiments"
            )
        seen.add(key)
        own = entry.model_dump(include={"steps", "batch_size"}, exclude_none=True)
        lengths = {
            key: tuple(getattr(entry, key))
            for key in ("train_lengths", "train_length_choices", "eval_lengths", "valid_lengths")
        }
        try:
            train = TrainConfig(**{**section, **own, **lengths})
            valid_lengths(train, task)
        except ValueError as error:
            raise ExperimentError(f"task {entry.name!r}: {one_line(error)}") from None
        same: dict[str, str] = {}
        for arm in experiment.archs:
            model, backend = _model(experiment, arm, entry, task, device, tried)
            blocks = parse_arch(model["arch"], model["n_layers"])  # gdn2+swa is gdn2+swa[1:1]
            twin = same.setdefault(canonical(_plain({**model, "arch": blocks})), arm)
            if twin != arm:
                raise ExperimentError(
                    f"{twin!r} and {arm!r} are the same model on task {entry.name!r}: leave one out"
                )
            shared = {
                "model": model,
                "task": {"name": task.name, "params": task.params},
                "train": asdict(train),
                "versions": result_versions(task, parse_arch(model["arch"], model["n_layers"])),
                "device": device,
                "dtype": "float32",
                "backend": backend,
            }
            settings.append(
                Setting(
                    experiment=experiment.name,
                    arm=arm,
                    task=task,
                    train=train,
                    shared=_plain(shared),
                    replica=replica,
                )
            )
    return settings


def plan_runs(experiment: Experiment, *, device: str = "cpu") -> list[Run]:
    """All runs of an experiment, in the order tasks, arms, points, seeds.

    Raises:
        ExperimentError: as :func:`plan_settings`.
    """
    return [
        setting.run(seed=seed, trial=trial, point={"lr": lr, "weight_decay": decay})
        for setting in plan_settings(experiment, device=device)
        for trial, (lr, decay) in enumerate(experiment.points)
        for seed in experiment.seeds
    ]


def _plain(value: Any) -> Any:
    """The value as JSON gives it back (tuples become lists).

    Raises:
        ExperimentError: it holds what JSON has no word for: dates, NaN.
    """
    try:
        return json.loads(canonical(value))
    except (TypeError, ValueError) as error:
        raise ExperimentError(
            f"a parameter or option is neither text, number nor list: {one_line(error)}"
        ) from None


def _task(entry: TaskSection) -> Any:
    import synthetic_tasks
    from arena.training.data import check_measurable

    try:
        task = synthetic_tasks.get(entry.name, **entry.params)
    except (ValueError, TypeError) as error:
        text = one_line(error)
        raise ExperimentError(text if repr(entry.name) in text else f"task {entry.name!r}: {text}") from None
    for key in ("eval_lengths", "valid_lengths", "train_length_choices"):
        check = type(task).check_length if key == "train_length_choices" else check_measurable
        for length in getattr(entry, key):
            try:
                check(task, length)
            except ValueError as error:
                raise ExperimentError(f"task {entry.name!r}, {key}: {one_line(error)}") from None
    shortest, longest = entry.train_lengths
    refusal: ValueError | None = None
    for length in range(shortest, longest + 1):
        try:
            task.check_length(length)
            return task
        except ValueError as error:
            refusal = error
    raise ExperimentError(
        f"task {entry.name!r} accepts no length of train_lengths [{shortest}, {longest}]: {one_line(refusal)}"
    )


def model_fields(experiment: Experiment, arm: str, entry: TaskSection) -> dict[str, Any]:
    """What the file says about the model of an arm on a task: the sections merged, the later ones winning."""
    fields = experiment.model.model_dump(exclude_none=True)
    for section in (entry.model, experiment.arms.get(arm), experiment.overrides.get(arm)):
        if section is not None:
            override = section.model_dump(exclude_none=True, exclude={"arch"})
            override["options"] = {**fields["options"], **override["options"]}
            fields.update(override)
    return fields


def _model(
    experiment: Experiment, arm: str, entry: TaskSection, task: Any, device: str, tried: dict[str, str]
) -> tuple[dict[str, Any], str]:
    """The resolved model, and the backends that it runs on: two tokens go through it to see.

    Models that differ in the sizes of vocabulary and head alone are tried out once: no block knows those, and
    what is equal for ``ttt_e2e`` is told apart. ``tried`` remembers the backends.
    """
    import torch

    from arena.grid.environment import memory_bytes
    from arena.model import ModelConfig, build_model, stack_options
    from kernels.backends import recording

    arch = experiment.arch_of(arm)
    fields = model_fields(experiment, arm, entry)
    try:
        config = ModelConfig(
            arch=arch,
            vocab_size=task.vocab_size,
            n_classes=task.n_classes,
            tokens_per_position=task.tokens_per_position,
            decoder=getattr(task, "needs_decoder", False),
            **fields,
        )
        least = 4 * config.d_model * (config.n_layers * config.d_model + config.vocab_size + config.n_classes)
        if least > memory_bytes():
            raise ValueError(f"its weights need over {least / 1e9:.3g} GB, more than this machine has")
        sizes = {"vocab_size": config.vocab_size == config.n_classes, "n_classes": None}
        key = canonical(_plain({**asdict(config), **sizes}))
        if key not in tried:
            model = build_model(config, seed=0).to(device)
            shape = (1, 2) if config.tokens_per_position == 1 else (1, 2, config.tokens_per_position)
            with recording() as used, torch.no_grad():
                model(torch.zeros(shape, dtype=torch.int64, device=device))
            tried[key] = " ".join(f"{operator}={name}" for operator, name in sorted(used.items())) or "torch"
    except (ValueError, TypeError, RuntimeError, MemoryError) as error:  # RuntimeError: sizes; torch's memory
        text, what = one_line(error), "architecture" if arm == arch else "arm"
        raise ExperimentError(text if repr(arm) in text else f"{what} {arm!r}: {text}") from None
    # what the model would fill in; at 2 layers it is what a block does alone: ids from before it stay
    implied = stack_options(config) if config.n_layers != 2 else {}
    fields = {**asdict(config), "options": {**implied, **config.options}}
    for name in LATER_FIELDS:
        if fields[name] == getattr(ModelConfig, name):
            del fields[name]
    return fields, tried[key]
