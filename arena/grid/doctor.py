"""What this machine can run: versions, devices, the table of backends, and every fast path against its
reference, outputs and every gradient: on the default list of ``kernels.doctor``, or on what the models of an
experiment ask of the kernels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest import mock

from arena.grid.environment import cpu_count, environment
from arena.grid.experiment import Experiment

TWINS = 2
"""Sequences of a batch that is examined."""


def examine(experiment: Experiment | None = None) -> int:
    """Print what there is and what works, and keep the verdict.

    Args:
        experiment: Its models' calls of the kernels, at the longest training and evaluation lengths, instead
            of the default list.

    Returns:
        1 when a fast path that runs here disagrees with its reference, else 0.
    """
    import torch

    from arena.grid.verdict import keep
    from kernels.doctor import default_cases, defaults, devices_here
    from kernels.doctor import examine as examine_cases

    around = environment()
    print(f"python {around['python']}, {around['system']}, {around['cpu']}, {cpu_count()} cores")
    print(", ".join(f"{name} {version}" for name, version in around["packages"].items()))
    print(f"commit {around['commit'] or 'unknown (not a checkout)'}")
    for index, name in enumerate(around["gpus"]):
        print(f"cuda:{index} {name}, {torch.cuda.get_device_properties(index).total_memory / 2**30:.0f} GiB")
    if not around["gpus"]:
        print("no GPU that torch can use: --device cpu")
    print("what runs where nothing else is asked for (torch's path where no line fits):")
    for line in defaults():
        print(f"  {line}")
    print("largest error of any output or gradient against the float64 token loop:")
    cases = default_cases() if experiment is None else experiment_cases(experiment)
    found = examine_cases(cases, devices_here(), partial(print, flush=True))
    if not found:
        print("nothing to examine: no operator here has more than one path")
        return 0
    counts = {word: sum(x.verdict == word for x in found) for word in ("ok", "WRONG", "cannot run")}
    told = ", ".join(f"{count} {word}" for word, count in counts.items() if count or word == "ok")
    try:
        kept = keep(
            {f"{x.case} {x.backend} {x.device} {x.dtype}": x.verdict for x in found if x.verdict != "refused"}
        )
        print(f"{told}; verdict {kept}, which the rows of every run in this environment carry")
    except OSError as error:
        print(f"{told}; the verdict could not be kept ({error.strerror}: {error.filename})")
    return int(counts["WRONG"] > 0)


def experiment_cases(experiment: Experiment) -> Iterator[Any]:
    """What the models of an experiment ask of the kernels, each kind of call once.

    Args:
        experiment: Its architectures, tasks and lengths; weights as they are at the start, seed 0.

    Raises:
        ExperimentError: It cannot be planned.
    """
    import synthetic_tasks
    from arena.grid.plan import canonical, plan_runs
    from arena.model import ModelConfig, build_model

    seen: set[str] = set()
    built: set[str] = set()
    for run in plan_runs(experiment):
        model, task, train = (run.config[part] for part in ("model", "task", "train"))
        lengths = {train["train_lengths"][1], *train["eval_lengths"][-1:]}
        key = canonical([model, task, sorted(lengths)])
        if key in built:
            continue
        built.add(key)
        sampler = synthetic_tasks.get(task["name"], **task["params"])
        module = build_model(ModelConfig(**model), seed=0)
        for length in sorted(x for x in lengths if _legal(sampler, x)):
            tokens = sampler.sample(TWINS, length, 0, 0, "valid").tokens
            for case in _calls(module, tokens, f"{run.arm} on {task['name']}"):
                shapes = [(name, getattr(x, "shape", x)) for name, x in sorted(case.inputs.items())]
                kind = f"{case.operator} {shapes}"
                if kind not in seen:
                    seen.add(kind)
                    yield case


def _legal(task: Any, length: int) -> bool:
    from arena.training.data import is_legal

    return is_legal(task, length)


def _calls(module: Any, tokens: Any, who: str) -> list[Any]:
    """The calls of the kernels in a forward pass, as cases."""
    import torch

    import arena.blocks.lstm
    import arena.blocks.outer
    import arena.blocks.slstm
    import arena.mlp
    import kernels

    cases: list[Any] = []
    places = [
        (kernels, "gated_memory"),
        (kernels, "mlstm"),
        (arena.blocks.slstm, "slstm"),
        (arena.blocks.lstm, "lstm"),
        (arena.blocks.outer, "short_conv"),
        (arena.blocks.outer, "dynamic_short_conv"),
        (arena.mlp, "experts"),
    ]
    with ExitStack() as stack, torch.no_grad():
        for holder, name in places:
            operator = getattr(holder, name)
            stack.enter_context(mock.patch.object(holder, name, _recorder(operator, name, who, cases)))
        module(tokens)
    return cases


def _recorder(operator: Callable[..., Any], name: str, who: str, cases: list[Any]) -> Callable[..., Any]:
    import torch
    from torch import Tensor

    from kernels.doctor import Case

    def call(*args: Any, **options: Any) -> Any:
        given = inspect.signature(operator).bind(*args, **options).arguments
        given.pop("backend", None)
        tensors = {key: x.detach() for key, x in given.items() if isinstance(x, Tensor)}
        inputs = {key: x.double() if x.is_floating_point() else x for key, x in tensors.items()}
        if "decay_sign" in inputs:  # an integer tensor is not differentiated
            inputs["decay_sign"] = inputs["decay_sign"].to(torch.int8)
        states = {key: x for key, x in given.items() if isinstance(x, tuple)}
        fixed = {key: x for key, x in given.items() if key not in inputs and key not in states}
        if not states:
            shape = " ".join(f"{key} {list(x.shape)}" for key, x in list(inputs.items())[:1])
            cases.append(
                Case(
                    operator=name,
                    label=f"{who}, {shape}",
                    run=partial(_tied, operator, given.get("erase") is given.get("write"), fixed),
                    inputs=_untied(inputs, given),
                )
            )
        return operator(*args, **options)

    return call


def _untied(inputs: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The inputs without the write gate where it is the erase gate."""
    same = given.get("erase") is not None and given.get("erase") is given.get("write")
    return {key: x for key, x in inputs.items() if not (same and key == "write")}


def _tied(operator: Callable[..., Any], tied: bool, fixed: dict[str, Any], **inputs: Any) -> Any:
    gates = {"write": inputs["erase"]} if tied and "erase" in inputs else {}
    return operator(**fixed, **gates, **inputs)
