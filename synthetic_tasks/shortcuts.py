"""What can be had without doing the task: baselines that look at one superficial property each.

`python -m synthetic_tasks.shortcuts [TASK ...]` prints the table. A baseline is fitted on train samples and
scored on test samples of the same length (accuracy at scored positions):

- constant: the most frequent answer; - position: the most frequent answer at this position of the sequence;
- frequent token: the most frequent token so far among those that name an answer; - last value, first value:
the last, the first token so far that names an answer; - bag: the better of the most frequent answer after
this multiset of tokens (in any order), and a linear classifier on
  the tokens' counts;
- match: the token that followed the last earlier occurrence of the present token, among those that name an
answer
  (what one induction head does; on plain recall this is the task itself, not a shortcut);
- window w: the most frequent answer after these last w tokens (fewer, where these w were never seen).
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch

from synthetic_tasks.base import IGNORE, Task, get, names
from synthetic_tasks.rng import mix64

WINDOWS = (1, 2, 4)
BASELINES = (
    "constant",
    "position",
    "frequent token",
    "last value",
    "first value",
    "bag",
    "match",
    *(f"window {w}" for w in WINDOWS),
)
_LARGEST_LINEAR = 130
_GAMMA = np.uint64(0x9E3779B97F4A7C15)


class _Data(NamedTuple):
    """Samples as one flat token stream a row, and their scored places."""

    tokens: np.ndarray
    """int64 [N,T*C]."""
    row: np.ndarray
    """int64 [M]: the row of each scored place."""
    place: np.ndarray
    """int64 [M]: its position."""
    end: np.ndarray
    """int64 [M]: how many tokens have been read there."""
    answer: np.ndarray
    """int64 [M]."""


def _read(task: Task, length: int, split: str, samples: int) -> _Data:
    tokens, targets = (x.numpy() for x in task.sample(samples, length=length, seed=0, split=split))
    row, place = np.nonzero(targets != IGNORE)
    return _Data(
        tokens.reshape(samples, -1), row, place, (place + 1) * task.tokens_per_position, targets[row, place]
    )


def _lookup(fit_keys: np.ndarray, answers: np.ndarray, keys: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """The most frequent answer that came with each key, or the given answer where the key is new."""
    order = np.lexsort((answers, fit_keys))
    key, answer = fit_keys[order], answers[order]
    starts = np.flatnonzero(np.r_[True, (key[1:] != key[:-1]) | (answer[1:] != answer[:-1])])
    counts = np.diff(np.r_[starts, len(key)])
    key, answer = key[starts], answer[starts]
    best = np.lexsort((-counts, key))
    key, answer = key[best], answer[best]
    first = np.r_[True, key[1:] != key[:-1]]
    key, answer = key[first], answer[first]
    at = np.minimum(np.searchsorted(key, keys), len(key) - 1)
    return np.where(key[at] == keys, answer[at], otherwise)


def _hashed(tokens: np.ndarray) -> np.ndarray:
    return mix64((tokens.astype(np.uint64) + np.uint64(1)) * _GAMMA)


def _bag_keys(data: _Data) -> np.ndarray:
    total = np.cumsum(_hashed(data.tokens), axis=1, dtype=np.uint64)
    return total[data.row, data.end - 1]


def _window_keys(data: _Data, width: int) -> np.ndarray:
    key = np.full(len(data.row), width, np.uint64)
    for back in range(width):
        place = data.end - 1 - back
        token = np.where(place >= 0, data.tokens[data.row, np.maximum(place, 0)], -1) + 1
        key = mix64(key * _GAMMA + token.astype(np.uint64))
    return key


def _ends(data: _Data, answer_of: np.ndarray, otherwise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The last and the first token so far that names an answer."""
    named = answer_of[data.tokens] >= 0
    where = np.arange(data.tokens.shape[1])
    last = np.maximum.accumulate(np.where(named, where, -1), axis=1)[data.row, data.end - 1]
    first = named.argmax(axis=1)[data.row]
    found = last >= 0
    last_token = data.tokens[data.row, np.maximum(last, 0)]
    first_token = data.tokens[data.row, np.minimum(first, data.end - 1)]
    return np.where(found, answer_of[last_token], otherwise), np.where(
        found, answer_of[first_token], otherwise
    )


def _frequent(data: _Data, answer_of: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    guess = otherwise.copy()
    done: dict[int, tuple[Counter[int], int]] = {}
    for i, (row, end) in enumerate(zip(data.row.tolist(), data.end.tolist(), strict=True)):
        counts, start = done.get(row, (Counter(), 0))
        counts.update(t for t in data.tokens[row, start:end].tolist() if answer_of[t] >= 0)
        done[row] = counts, end
        if counts:
            guess[i] = answer_of[counts.most_common(1)[0][0]]
    return guess


def _match(data: _Data, answer_of: np.ndarray, otherwise: np.ndarray, block: int = 1024) -> np.ndarray:
    guess = otherwise.copy()
    where = np.arange(data.tokens.shape[1])
    for start in range(0, len(guess), block):
        part = slice(start, start + block)
        tokens, end = data.tokens[data.row[part]], data.end[part, None]
        same = tokens == np.take_along_axis(tokens, end - 1, axis=1)
        followed = np.zeros_like(same)
        followed[:, :-1] = answer_of[tokens[:, 1:]] >= 0
        last = np.where(same & followed & (where < end - 1), where, -1).max(axis=1)
        after = answer_of[np.take_along_axis(tokens, last[:, None] + 1, axis=1)[:, 0]]
        guess[part] = np.where(last >= 0, after, guess[part])
    return guess


def _linear(fit: _Data, test: _Data, vocab_size: int, n_classes: int, limit: int = 4096) -> np.ndarray | None:
    """Softmax regression on counts, share of counts and a constant; None where it would be too large."""
    if max(vocab_size, n_classes) > _LARGEST_LINEAR:
        return None

    def features(data: _Data, many: int) -> torch.Tensor:
        counts = np.zeros((many, vocab_size), np.float32)
        for i in range(many):
            counts[i] = np.bincount(data.tokens[data.row[i], : data.end[i]], minlength=vocab_size)
        share = counts / counts.sum(axis=1, keepdims=True)
        return torch.from_numpy(np.concatenate([counts / 8, share, np.ones((many, 1), np.float32)], axis=1))

    many = min(len(fit.row), limit)
    x, y = features(fit, many), torch.from_numpy(fit.answer[:many])
    weight = torch.zeros(x.shape[1], n_classes, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.2)
    for _ in range(100):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(x @ weight, y).backward()
        optimizer.step()
    with torch.no_grad():
        return (features(test, len(test.row)) @ weight).argmax(dim=1).numpy()


def scores(task: Task, length: int, *, fit_samples: int = 4096, test_samples: int = 1024) -> dict[str, float]:
    """What each baseline scores on test samples of this length: name -> accuracy at scored positions.

    A length that is exhaustible is scored too, on samples that training may have seen.
    """
    fit, test = _read(task, length, "train", fit_samples), _read(task, length, "test", test_samples)
    constant = np.full(len(test.row), np.bincount(fit.answer).argmax())
    answer_of = task.answers_of_tokens()
    # Keys and marks are classes too in some tasks, but never answers.
    answer_of[~np.isin(answer_of, fit.answer)] = -1
    last, first = _ends(test, answer_of, constant)
    guesses = {
        "constant": constant,
        "position": _lookup(fit.place, fit.answer, test.place, constant),
        "frequent token": _frequent(test, answer_of, constant),
        "last value": last,
        "first value": first,
        "match": _match(test, answer_of, constant),
    }
    table = {name: float((guess == test.answer).mean()) for name, guess in guesses.items()}
    by_bag = _lookup(_bag_keys(fit), fit.answer, _bag_keys(test), constant)
    linear = _linear(fit, test, task.vocab_size, task.n_classes)
    table["bag"] = max(float((g == test.answer).mean()) for g in (by_bag, linear) if g is not None)
    guess = constant
    for width in range(1, max(WINDOWS) + 1):
        guess = _lookup(_window_keys(fit, width), fit.answer, _window_keys(test, width), guess)
        if width in WINDOWS:
            table[f"window {width}"] = float((guess == test.answer).mean())
    return table


def main(argv: list[str] | None = None) -> None:
    """Print the table of the named tasks, or of all, at one length each."""
    parser = argparse.ArgumentParser(prog="python -m synthetic_tasks.shortcuts", description=main.__doc__)
    parser.add_argument("tasks", nargs="*", help="task names; none means all")
    parser.add_argument(
        "--length", type=int, default=64, help="the shortest legal length from this on is used"
    )
    options = parser.parse_args(argv)
    print(f"{'task':24}{'length':>7}{'chance':>8}" + "".join(f"{name:>15}" for name in BASELINES))
    for name in options.tasks or names():
        task = get(name)
        length = task.legal_length(options.length)
        row = scores(task, length)
        cells = "".join(f"{row[baseline]:15.3f}" for baseline in BASELINES)
        print(f"{name:24}{length:7}{task.chance(length):8.3f}{cells}", flush=True)


if __name__ == "__main__":
    main()
