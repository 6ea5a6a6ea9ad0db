"""`python -m synthetic_tasks.bench`: sequences per second of every task on this machine, one thread."""

from __future__ import annotations

import argparse
import time

from synthetic_tasks.base import Task, get, names


def sequences_per_second(task: Task, length: int, *, batch_size: int = 256, seconds: float = 0.5) -> float:
    """The best rate over repeated batches of fresh train samples."""
    task.sample(batch_size, length=length)
    best, index = float("inf"), 0
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or index < 3 * batch_size:
        start = time.perf_counter()
        task.sample(batch_size, length=length, index=index)
        best = min(best, time.perf_counter() - start)
        index += batch_size
    return batch_size / best


def main(argv: list[str] | None = None) -> None:
    """Print a table of sequences per second, and milliseconds for a batch of 64."""
    parser = argparse.ArgumentParser(prog="python -m synthetic_tasks.bench", description=main.__doc__)
    parser.add_argument("tasks", nargs="*", help="task names; none means all")
    parser.add_argument(
        "--length", type=int, default=64, help="the shortest legal length from this on is used"
    )
    parser.add_argument("--batch-size", type=int, default=256)
    options = parser.parse_args(argv)
    cases = [(get(name), options.length) for name in options.tasks or names()]
    if not options.tasks:
        cases += [(get("mqar", n_pairs=pairs), length) for length, pairs in ((64, 4), (256, 64), (1024, 256))]
        cases += [(get("fuzzy_recall", vocab_size=129), 128), (get("niah_single_2"), 32768)]
    print(f"{'task':26}{'length':>8}{'sequences/s':>14}{'ms / 64':>10}")
    for task, wanted in cases:
        length = task.legal_length(wanted)
        large = max(options.batch_size * 64 // length, 1) if length > 4096 else options.batch_size
        rate = sequences_per_second(task, length, batch_size=large)
        batch = 64_000 / sequences_per_second(task, length, batch_size=min(64, large))
        print(f"{task.name:26}{length:8}{rate:14,.0f}{batch:10.2f}", flush=True)


if __name__ == "__main__":
    main()
