"""What every task is: a frozen object with parameters, a pure sampler, an exact solver and a chance level."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch

from synthetic_tasks.rng import Rows, fingerprint, hash_key, mix64

RESULT_VERSION = 1
"""Bumped by hand when a change to the shared machinery changes any sample."""

IGNORE = -100
"""The target of a position that is not scored."""

SPLITS = ("train", "valid", "test")
EXHAUSTIBLE_BELOW = 1_000_000
_MAX_ATTEMPTS = 20_000
_BLOCK_TOKENS = 32_768
_SMALL_ROUND = 6144


class Batch(NamedTuple):
    """CPU tensors. The target at position t is what a causal model must output at position t (no shift)."""

    tokens: torch.Tensor
    """int64 [B,T], or [B,T,C] where a task puts C tokens in one position."""
    targets: torch.Tensor
    """int64 [B,T], -100 where nothing is scored."""


class Draw(NamedTuple):
    """What a generator returns for N rows."""

    tokens: np.ndarray
    """int64 [N,T] or [N,T,C]."""
    targets: np.ndarray | None = None
    """int64 [N,T]; None means: what the solver says."""
    content: np.ndarray | None = None
    """uint64 [N], the hash that decides the split; None means: the hash of the whole token sequence."""
    valid: np.ndarray | None = None
    """bool [N]; rows that are not valid are drawn again. None means that all are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A synthetic task. Subclasses are frozen dataclasses whose fields are the task's parameters.

    A subclass gives `vocab_size`, `n_classes`, `chance`, `min_length` (and `length_step`, `max_length`
    where not every longer length is legal), `space`, `_generate` and `_solve`.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    version: ClassVar[int] = 1
    tokens_per_position: ClassVar[int] = 1

    @property
    def vocab_size(self) -> int:
        """Input token ids are below this."""
        raise NotImplementedError

    @property
    def n_classes(self) -> int:
        """Targets are in 0..n_classes-1."""
        raise NotImplementedError

    @property
    def needs_decoder(self) -> bool:
        """Whether the targets are for a separate decoder head, not for causal outputs (`compression`)."""
        return False

    @property
    def min_length(self) -> int:
        """The shortest legal length."""
        return 1

    @property
    def length_step(self) -> int:
        """Legal lengths are min_length, min_length + length_step, ..."""
        return 1

    @property
    def max_length(self) -> int | None:
        """The longest legal length, None where there is no limit."""
        return None

    def chance(self, length: int) -> float:
        """Accuracy at scored positions of the best guess that does not do the task (class docstring)."""
        raise NotImplementedError

    def space(self, length: int) -> int:
        """A lower bound on the number of different sequences at this length."""
        raise NotImplementedError

    def _generate(self, rows: Rows, length: int) -> Draw:
        raise NotImplementedError

    def _solve(self, tokens: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def token_name(self, token: int) -> str:
        """How `show` prints a token."""
        return str(token)

    def class_name(self, label: int) -> str:
        """How `show` prints a target."""
        return self.token_name(label) if self.n_classes == self.vocab_size else str(label)

    @property
    def params(self) -> dict[str, Any]:
        """All parameters, defaults filled in; JSON-able."""
        return dataclasses.asdict(self)

    def is_exhaustible(self, length: int) -> bool:
        """Whether the sequences at this length are so few (under a million) that training may meet them all.

        Such a length is not partitioned: every split draws from all of it, and it is not reported as test.
        """
        return self.space(length) < EXHAUSTIBLE_BELOW

    def check_length(self, length: int) -> None:
        """Raise ValueError, saying which lengths are legal, unless `length` is."""
        low, step, high = self.min_length, self.length_step, self.max_length
        whole = isinstance(length, int | np.integer) and length >= low and (length - low) % step == 0
        if whole and (high is None or length <= high):
            return
        more = f" up to {high}" if high is not None else ""
        legal = f"{low} or more{more}" if step == 1 else f"{low}, {low + step}, {low + 2 * step}, ...{more}"
        raise ValueError(f"{self.name}: length {length!r} is not legal with these parameters; legal: {legal}")

    def legal_length(self, wanted: int) -> int:
        """The shortest legal length >= wanted, or the longest legal one where there is none."""
        steps = -(-max(wanted - self.min_length, 0) // self.length_step)
        length = self.min_length + steps * self.length_step
        return length if self.max_length is None else min(length, self.max_length)

    def answers_of_tokens(self) -> np.ndarray:
        """The class that each token names, -1 where it names none (matched by name): int64 [vocab_size]."""
        label_of = {self.class_name(label): label for label in range(self.n_classes)}
        return np.array([label_of.get(self.token_name(token), -1) for token in range(self.vocab_size)])

    def sample(
        self, batch_size: int = 1, length: int = 64, seed: int = 0, index: int = 0, split: str = "train"
    ) -> Batch:
        """Samples index .. index + batch_size - 1: row i is `sample(batch_size=1, index=index + i)`.

        A sample is a pure function of (task, parameters, length, split, seed, index), in integer arithmetic.
        Which split a sequence belongs to is decided by a hash of its content that does not depend on the seed
        (6/8 train, 1/8 valid, 1/8 test), so no two splits ever share a sequence, whatever the seeds.

        Raises:
            ValueError: an illegal length, an unknown split, a negative index.
        """
        tokens, targets = self.sample_seeds([seed], batch_size, length, index, split)
        return Batch(tokens[0], targets[0])

    def sample_seeds(
        self,
        seeds: Sequence[int],
        batch_size: int = 1,
        length: int = 64,
        index: int = 0,
        split: str = "train",
    ) -> Batch:
        """`sample` for several seeds in one call, which is faster.

        Returns:
            Tokens [S,B,T] or [S,B,T,C] and targets [S,B,T]; entry s is what `sample` gives for seed s.

        Raises:
            ValueError: as `sample`.
        """
        self.check_length(length)
        if split not in SPLITS:
            raise ValueError(f"{self.name}: split {split!r} is unknown; use one of {', '.join(SPLITS)}")
        if batch_size < 1 or index < 0:
            right = "batch_size must be >= 1 and index >= 0"
            raise ValueError(f"{self.name}: {right}, got {batch_size} and {index}")
        length, rows = int(length), len(seeds) * batch_size
        keys = np.array([_key(self._identity, length, split, int(seed)) for seed in seeds], np.uint64)
        key, number = np.repeat(keys, batch_size), np.tile(np.arange(index, index + batch_size), len(seeds))
        wide = (length,) if self.tokens_per_position == 1 else (length, self.tokens_per_position)
        tokens, targets = np.empty((rows, *wide), np.int64), np.empty((rows, length), np.int64)
        # Blocks of some 32,000 tokens stay in the processor's cache.
        block = max(_BLOCK_TOKENS // length, 8)
        for start in range(0, rows, block):
            part = slice(start, start + block)
            self._fill(tokens[part], targets[part], key[part], number[part], split)
        shape = (len(seeds), batch_size)
        return Batch(
            torch.from_numpy(tokens.reshape(*shape, *wide)), torch.from_numpy(targets.reshape(*shape, length))
        )

    @functools.cached_property
    def _identity(self) -> str:
        """What the samples depend on besides length, split, seed and index. 1 and 1.0 are one parameter."""
        params = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        exact = {name: float(v) if type(v) is int else v for name, v in params.items()}
        return json.dumps([RESULT_VERSION, self.name, self.version, exact], sort_keys=True)

    def _fill(
        self, tokens: np.ndarray, targets: np.ndarray, key: np.ndarray, index: np.ndarray, split: str
    ) -> None:
        """Write samples into tokens [N,T] or [N,T,C] and targets [N,T], for keys and indices [N]."""
        length = tokens.shape[1]
        partitioned = not self.is_exhaustible(length)
        pending = np.arange(len(index))
        # Several attempts a row at once save rounds where little is left; seven in eight draws miss valid and
        # test. Their number does not change the result: the first good one counts.
        least = 1 if split == "train" or not partitioned else 4
        attempt = 0
        while pending.size:
            width = min(max(_SMALL_ROUND // (length * len(pending)), least), 64)
            if not partitioned and attempt == 0:
                width = 1  # nearly always enough
            if attempt > _MAX_ATTEMPTS:
                raise ValueError(
                    f"{self.name}: no {split} sequence of length {length} found in {attempt} draws; "
                    "make the parameters less tight or the length longer"
                )
            attempts = np.tile(np.arange(attempt, attempt + width), len(pending))
            again = np.repeat(pending, width)
            draw = self._generate(Rows.of(key[again], index[again], attempts), length)
            good = np.ones(len(attempts), bool) if draw.valid is None else draw.valid
            if partitioned:
                good = good & self._belongs(draw, split)
            grid = good.reshape(-1, width)
            found = grid.any(axis=1)
            pick = (np.arange(len(pending)) * width + grid.argmax(axis=1))[found]
            if pick.size:
                labels = self._solve(draw.tokens[pick]) if draw.targets is None else draw.targets[pick]
                tokens[pending[found]] = draw.tokens[pick]
                targets[pending[found]] = labels
                pending = pending[~found]
            attempt += width

    @staticmethod
    def _belongs(draw: Draw, split: str) -> np.ndarray:
        content = fingerprint(draw.tokens) if draw.content is None else draw.content
        eighth = mix64(content ^ np.uint64(0xA0761D6478BD642F)) >> np.uint64(61)
        if split == "train":
            return eighth < 6
        return eighth == (6 if split == "valid" else 7)

    def solve(self, tokens: torch.Tensor) -> torch.Tensor:
        """The exact answers, from the tokens alone: int64 [B,T], -100 where nothing is scored."""
        return torch.from_numpy(self._solve(tokens.numpy()))

    def _require(self, parameter: str, low: int, high: int | None = None) -> None:
        """Raise ValueError unless the parameter is an integer in low..high."""
        value = getattr(self, parameter)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < low or (high is not None and value > high):
            right = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
            raise ValueError(f"{self.name}: {parameter} must be {right}, got {value!r}")

    def _require_choice(self, parameter: str, choices: Iterable[str]) -> None:
        """Raise ValueError unless the parameter is one of the choices."""
        value, known = getattr(self, parameter), list(choices)
        if value not in known:
            right = ", ".join(map(repr, known))
            raise ValueError(f"{self.name}: {parameter} must be one of {right}, got {value!r}")

    def _require_fraction(self, parameter: str) -> None:
        """Raise ValueError unless the parameter is a number in 0..1."""
        value = getattr(self, parameter)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ValueError(f"{self.name}: {parameter} must be a number from 0 to 1, got {value!r}")

    def _require_flag(self, *parameters: str) -> None:
        """Raise ValueError unless the parameters are booleans."""
        for parameter in parameters:
            if not isinstance(getattr(self, parameter), bool):
                value = getattr(self, parameter)
                raise ValueError(f"{self.name}: {parameter} must be true or false, got {value!r}")


@functools.lru_cache(maxsize=1 << 14)
def _key(identity: str, length: int, split: str, seed: int) -> int:
    """Of all samples of a task, length, split and seed; kept, for a training asks again at every step."""
    return hash_key(identity, length, split, seed)


def unscored(tokens: np.ndarray) -> np.ndarray:
    """Targets [N,T] with nothing scored, for tokens [N,T] or [N,T,C]."""
    return np.full(tokens.shape[:2], IGNORE, np.int64)


@functools.lru_cache(maxsize=256)
def most_frequent_answer(task: Task, length: int, at_least: int = 20_000) -> float:
    """The share of the most frequent answer, measured on fixed training samples."""
    counts = np.zeros(task.n_classes, np.int64)
    index = 0
    while counts.sum() < at_least:
        targets = task.sample(batch_size=256, length=length, seed=0, index=index).targets.numpy()
        counts += np.bincount(targets[targets != IGNORE], minlength=task.n_classes)
        index += 256
    return float(counts.max() / counts.sum())


_REGISTRY: dict[str, type[Task]] = {}
_T = TypeVar("_T", bound=type[Task])


def register(name: str, family: str) -> Callable[[_T], _T]:
    """Class decorator: make the task known as `name`.

    Raises:
        ValueError: the name is taken by another class.
    """

    def add(cls: _T) -> _T:
        taken = _REGISTRY.get(name)
        if taken is not None and taken is not cls:
            raise ValueError(f"task name {name!r} is taken by {taken!r}")
        cls.name, cls.family = name, family
        _REGISTRY[name] = cls
        return cls

    return add


def _near(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"


def names() -> list[str]:
    """All task names, sorted."""
    return sorted(_REGISTRY)


def task_class(name: str) -> type[Task]:
    """The class behind a task name.

    Raises:
        ValueError: unknown name; the message lists near ones.
    """
    if name not in _REGISTRY:
        raise ValueError(f"unknown task {name!r}; {_near(str(name), names())}")
    return _REGISTRY[name]


def get(name: str, **params: Any) -> Task:
    """The task of that name with the given parameters.

    Raises:
        ValueError: unknown name or parameter (the message lists near ones), or a parameter that cannot be
        met.
    """
    cls = task_class(name)
    known = [f.name for f in dataclasses.fields(cls)]
    for parameter in params:
        if parameter not in known:
            near = _near(parameter, known) if known else "it has no parameters"
            raise ValueError(f"{name}: unknown parameter {parameter!r}; {near}")
    return cls(**params)


def describe(name: str) -> str:
    """The task's documentation as plain text, with its parameters and their defaults."""
    cls = task_class(name)
    fields = ", ".join(f"{f.name}={f.default!r}" for f in dataclasses.fields(cls))
    return f"{name} ({cls.family})\n{inspect.getdoc(cls)}\nParameters: {fields or 'none'}"
