"""Train R replicas of one model together: stacked parameters, one vmapped forward, one flat optimiser.

Legend: R replicas, B sequences of a batch, T positions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from arena.mlp import Routing
from arena.model import Model, ModelConfig, active_params, build_model, model_params
from arena.training.config import FleetOutOfMemory, Replica, ReplicaResult, TrainConfig
from arena.training.data import IGNORED, check_measurable, pinned, step_lengths, train_batch, valid_lengths
from arena.training.evaluation import Forward, Row, evaluate, negative_log_likelihood, row_sums, worst_rows
from arena.training.graphs import Graphs
from arena.training.optimiser import FlatParameters, FleetAdamW

T = TypeVar("T")


def train_fleet(
    model_config: ModelConfig,
    task: Any,
    train_config: TrainConfig,
    replicas: Sequence[Replica],
    *,
    device: torch.device | str = "cpu",
    on_step: Callable[[int], None] | None = None,
    graphs: bool = False,
) -> list[ReplicaResult]:
    """Train ``replicas`` of one model on one task together, each as if it were alone.

    A replica's initial weights and training samples follow from its seed: step n takes samples n B ..
    (n + 1) B - 1 of that seed, at a length that follows from the experiment and n alone. So the order of the
    data is the same for every architecture. A replica whose loss or gradient is not finite is frozen before
    that step and marked ``diverged`` (also one whose validation loss is not finite at a point of the learning
    curve); its mates do not notice.

    Args:
        model_config: the architecture, one for all.
        task: a task of ``synthetic_tasks``.
        train_config: data, steps and evaluation, one for all.
        replicas: seeds and hyper-parameters; one replica is the plain case of the same code.
        device: ``cpu`` or ``cuda``.
        on_step: called after every step with the number of steps done; what it raises ends the training.
        graphs: on a GPU, record steps and evaluations as CUDA graphs (:mod:`arena.training.graphs`). Off by
            default: what they give on a GPU has not been compared with the plain steps there yet.

    Returns:
        One result for each replica, in the order of ``replicas``.

    Raises:
        ValueError: no replica, a length that the task does not accept, a model that does not fit the task.
        FleetOutOfMemory: the fleet does not fit; split it.
    """
    _check(model_config, task, train_config, replicas)
    return in_memory(
        len(replicas),
        lambda: _train(
            _Fleet(model_config, task, train_config, replicas, torch.device(device), graphs=graphs), on_step
        ),
    )


def in_memory(n_replicas: int, work: Callable[[], T]) -> T:
    """The value of ``work``; FleetOutOfMemory, with nothing of it left, where memory runs out."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        detail = str(error)
    # Outside of the handler: the error's traceback, which holds the fleet's tensors, is gone by now.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    raise FleetOutOfMemory(n_replicas, detail)


def _check(
    model_config: ModelConfig, task: Any, train_config: TrainConfig, replicas: Sequence[Replica]
) -> None:
    if not replicas:
        raise ValueError("a fleet needs at least one replica")
    for ours, theirs in (
        ("vocab_size", "vocab_size"),
        ("n_classes", "n_classes"),
        ("tokens_per_position", "tokens_per_position"),
    ):
        if getattr(model_config, ours) != getattr(task, theirs):
            raise ValueError(
                f"the model's {ours} is {getattr(model_config, ours)}, the task's {getattr(task, theirs)}"
            )
    if getattr(task, "needs_decoder", False) and not model_config.decoder:
        raise ValueError(
            f"task {task.name!r} needs a model with decoder=True: its targets are its own inputs"
        )
    for length in train_config.eval_lengths:
        check_measurable(task, length)


def _is_out_of_memory(error: Exception) -> bool:
    # The CPU allocator raises a plain RuntimeError; its message is all that tells.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


class _Fleet:
    """The state of a fleet between steps."""

    def __init__(
        self,
        model_config: ModelConfig,
        task: Any,
        config: TrainConfig,
        replicas: Sequence[Replica],
        device: torch.device,
        *,
        graphs: bool = False,
    ) -> None:
        self.task, self.config, self.replicas, self.device = task, config, replicas, device
        self.lengths = step_lengths(config, task)
        self.valid = valid_lengths(config, task)
        self.seeds = [replica.seed for replica in replicas]
        models = {seed: build_model(model_config, seed=seed) for seed in dict.fromkeys(self.seeds)}
        self.parameters = FlatParameters([models[seed] for seed in self.seeds], device)
        self.template = models[self.seeds[0]].to(device)
        measured = {*self.valid, *config.eval_lengths, config.train_lengths[1]}
        self.state_bytes = {length: self.template.state_bytes(length) for length in sorted(measured)}
        self.optimiser = FleetAdamW(self.parameters, config, replicas)
        self.train_logits, self.eval_logits = _forwards(self.template, self.parameters)
        self.graphs = Graphs(device) if graphs and device.type == "cuda" else None
        self.active = torch.ones(len(replicas), dtype=torch.bool, device=device)
        self.taken = torch.zeros(len(replicas), dtype=torch.int64, device=device)
        self.diverged = torch.zeros_like(self.active)
        self.number = torch.zeros(1, dtype=torch.int64, device=device)
        self.loss_sum = torch.zeros(len(replicas), device=device)
        self.balance_sum = torch.zeros_like(self.loss_sum)
        self.last_point = 0
        self.curves: list[list[Row]] = [[] for _ in replicas]
        self.last_valid: list[list[Row]] = [[] for _ in replicas]

    def step(self, step: int) -> None:
        """Take one step; nothing here waits for the device."""
        self.template.train()
        self.template.before_step(step, self.config.steps)
        self.number.fill_(step)
        self._run("training", self._update, *self.batch(step))

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Tokens and targets of a step, on the host, from where they can be copied without waiting."""
        tokens, targets = train_batch(
            self.task, self.seeds, step=step, batch_size=self.config.batch_size, length=self.lengths[step]
        )
        return pinned(tokens, self.device), pinned(targets, self.device)

    def _run(self, name: str, work: Callable[..., Any], *inputs: Tensor) -> Any:
        if self.graphs is not None:
            return self.graphs.run(name, work, *inputs)
        return work(*(x.to(self.device, non_blocking=True) for x in inputs))

    def _update(self, tokens: Tensor, targets: Tensor) -> None:
        """Take step ``number``: all of it is on the device, and what it changes is changed in place."""
        losses, balance = self.losses(tokens, targets)
        total = losses if balance is None else losses + self.template.config.load_balance * balance
        grads = self.parameters.gradients(total.sum())
        stepped = self.optimiser.step(self.number, grads, total.detach(), self.active)
        self.diverged |= self.active & ~stepped
        self.active.copy_(stepped)
        self.taken += stepped
        self.loss_sum += torch.where(stepped, losses.detach(), 0.0)
        if balance is not None:
            self.balance_sum += torch.where(stepped, balance.detach(), 0.0)

    def losses(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of each replica on its own batch [R,B,T]: the mean negative log-likelihood [R], and the sum of the
        load-balance losses of its layers [R] where there are experts.
        """
        logits, routing = self.train_logits(tokens)
        nll = negative_log_likelihood(logits, targets)
        losses = row_sums(nll) / row_sums(targets != IGNORED).clamp_min(1)
        return losses, None if routing is None else routing.imbalance.sum(-1)

    def measure(self, split: str) -> list[list[Row]]:
        """Rows of every replica at the lengths of a split."""
        self.template.eval()
        return evaluate(
            lambda tokens: self._run("evaluation", self.eval_logits, tokens),
            self.task,
            self.config,
            split=split,
            lengths=self.valid if split == "valid" else self.config.eval_lengths,
            device=self.device,
            n_replicas=len(self.replicas),
            mixtures=self.template.mixtures,
        )

    def curve_point(self, done: int) -> bool:
        """Add a point after ``done`` steps; whether any replica goes on."""
        rows = self.measure("valid")
        going = self.active.tolist()
        lost = [False] * len(going)
        steps, layers = done - self.last_point, self.template.mixtures
        sums = {"loss": self.loss_sum}
        if layers:
            sums["balance_loss"] = self.balance_sum / len(layers)
        means = {metric: (value / steps).tolist() for metric, value in sums.items()}
        for index in (index for index, on in enumerate(going) if on):
            value = {(row["metric"], row["eval_length"]): row["value"] for row in rows[index]}
            if not all(math.isfinite(value["loss", length]) for length in self.valid):
                lost[index] = True
                going[index] = False
                continue
            train_rows = [
                {
                    "split": "train",
                    "eval_length": None,
                    "metric": metric,
                    "value": mean[index],
                    "chance": None,
                    "n_examples": steps * self.config.batch_size,
                }
                for metric, mean in means.items()
            ]
            self.curves[index] += [{"step": done, **row} for row in (*train_rows, *rows[index])]
            self.last_valid[index] = rows[index]
            stop_at = self.config.stop_at
            if stop_at is not None:
                going[index] = any(value["accuracy", length] < stop_at for length in self.valid)
        self.diverged |= torch.tensor(lost, device=self.device)
        self.active.copy_(torch.tensor(going, device=self.device))
        self.loss_sum.zero_()
        self.balance_sum.zero_()
        self.last_point = done
        return any(going)

    def results(self, started: float) -> list[ReplicaResult]:
        """Measure split test and put everything together."""
        tests = self.measure("test")
        lost_valid = worst_rows(self.task, self.config, split="valid", lengths=self.valid)
        lost_tests = worst_rows(self.task, self.config, split="test", lengths=self.config.eval_lengths)
        state = self.template.state_dict()
        buffers = {name: value.cpu() for name, value in state.items() if name not in self.parameters.named}
        wall_s = (time.perf_counter() - started) / len(self.replicas)
        results = []
        for index, replica in enumerate(self.replicas):
            lost = bool(self.diverged[index])
            steps = int(self.taken[index])
            final = lost_valid + lost_tests if lost else self.last_valid[index] + tests[index]
            results.append(
                ReplicaResult(
                    replica=replica,
                    status="diverged" if lost else "done",
                    steps=steps,
                    curve=self.curves[index],
                    final=[{**row, "state_bytes": self.state_bytes[row["eval_length"]]} for row in final],
                    state_dict={**self.parameters.row(index), **buffers},
                    wall_s=wall_s,
                    params=model_params(self.template),
                    active_params=active_params(self.template),
                    state_bytes=self.state_bytes[self.config.train_lengths[1]],
                    train_tokens=self.config.batch_size * sum(self.lengths[:steps]),
                )
            )
        return results


def _train(fleet: _Fleet, on_step: Callable[[int], None] | None) -> list[ReplicaResult]:
    started = time.perf_counter()
    steps, every = fleet.config.steps, fleet.config.eval_every
    for step in range(steps):
        fleet.step(step)
        if on_step is not None:
            on_step(step + 1)
        is_point = step + 1 == steps or (every and (step + 1) % every == 0)
        if is_point and not fleet.curve_point(step + 1):
            break
    return fleet.results(started)


def _forwards(template: Model, parameters: FlatParameters) -> tuple[Forward, Forward]:
    """Forward of all replicas: over tokens of their own [R,B,T], and over tokens that they share [B,T]."""
    mixed = bool(template.mixtures)

    def one(named: dict[str, Tensor], tokens: Tensor) -> tuple[Tensor, ...]:
        found = functional_call(template, named, (tokens,), {"routing": mixed})
        return (found[0], *found[2]) if mixed else (found[0],)

    def forward(mapped: Callable[..., tuple[Tensor, ...]]) -> Forward:
        def run(tokens: Tensor) -> tuple[Tensor, Routing | None]:
            logits, *routing = mapped(parameters.named, tokens)
            return logits, Routing(*routing) if mixed else None

        return run

    return forward(vmap(one)), forward(vmap(one, in_dims=(0, None)))
