"""Example sequences as coloured text for a terminal."""

from __future__ import annotations

import numpy as np

from synthetic_tasks.base import IGNORE, Task

_DIM, _SCORED, _ANSWER, _BOLD, _RESET = "\x1b[2m", "\x1b[33m", "\x1b[1;32m", "\x1b[1m", "\x1b[0m"


def _cell(task: Task, token: np.ndarray, target: int) -> tuple[str, str, str]:
    """The token's text, the arrow with the answer (empty where nothing is scored), and the token's colour."""
    text = "/".join(task.token_name(int(part)) for part in np.atleast_1d(token))
    if target == IGNORE:
        return text, "", "" if text != "." else _DIM
    return text, f"→{task.class_name(int(target))}", _SCORED


def show(
    task: Task,
    *,
    samples: int = 3,
    length: int | None = None,
    seed: int = 0,
    split: str = "train",
    color: bool = True,
    width: int = 100,
    tokens_shown: int = 256,
) -> str:
    """Some samples with their answers, as text with ANSI colours.

    A scored position is printed as token→answer.

    Args:
        task: the task.
        samples: how many sequences.
        length: their length; None takes the shortest legal length from 32 on.
        seed: seed of the samples.
        split: split of the samples.
        color: False leaves the ANSI codes out.
        width: columns after which a line is broken.
        tokens_shown: positions after which a sequence is cut, with a note of how many follow.

    Returns:
        The text, without a newline at its end.
    """
    length = task.legal_length(32) if length is None else length
    batch = task.sample(samples, length=length, seed=seed, split=split)

    def paint(text: str, code: str) -> str:
        return f"{code}{text}{_RESET}" if color and code and text else text

    parameters = ", ".join(f"{key}={value}" for key, value in task.params.items())
    facts = f"length {length}, {task.vocab_size} tokens, {task.n_classes} classes"
    lines = [f"{paint(task.name, _BOLD)}({parameters})", f"{facts}, chance {task.chance(length):.4f}"]
    for tokens, targets in zip(batch.tokens.numpy(), batch.targets.numpy(), strict=True):
        lines.append("")
        line, column = "", 0
        for token, target in zip(tokens[:tokens_shown], targets[:tokens_shown].tolist(), strict=True):
            text, answer, code = _cell(task, token, target)
            size = len(text) + len(answer) + 1
            if column and column + size > width:
                lines.append(line.rstrip())
                line, column = "", 0
            line += paint(text, code) + paint(answer, _ANSWER) + " "
            column += size
        lines.append(line.rstrip())
        if length > tokens_shown:
            lines.append(f"... {length - tokens_shown} more")
    return "\n".join(lines)
