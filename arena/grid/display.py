"""Progress of a grid: bars on a terminal, a line a fleet elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from arena.grid.driver import Pending
from arena.grid.executors import Event


class GridDisplay:
    """Follows the events of a grid. Work is counted in planned training tokens."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.started = False
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.bars: dict[str, TaskID] = {}
        self.total: TaskID | None = None
        self.planned = 0.0
        self.done = 0.0
        self.running: dict[str, float] = {}
        self.begin = time.monotonic()
        self.training: float | None = None

    def __enter__(self) -> GridDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def say(self, line: str) -> None:
        """A line above the bars."""
        self.console.print(line, markup=False, soft_wrap=True)

    def start(self, pending: Pending) -> None:
        """Say what is about to be done; again for each stage, where there are several."""
        self.started = True
        if self.total is not None:
            self.progress.remove_task(self.total)
            self.total, self.done, self.training = None, 0.0, None
        todo = sum(len(fleet.runs) for fleet in pending.fleets)
        slots = pending.slots
        crew = f"{_counted(slots.workers, 'worker')} x {_counted(slots.threads, 'thread')}"
        self.console.print(
            f"{pending.planned} runs: {pending.stored} stored already, {todo} to train in "
            f"{_counted(len(pending.fleets), 'fleet')}; {crew}",
            soft_wrap=True,
        )
        self.planned = sum(fleet.planned_tokens for fleet in pending.fleets)
        self.begin = time.monotonic()
        if pending.fleets:
            self.progress.start()
            self.total = self.progress.add_task("all", total=1.0, left="")

    def event(self, event: Event) -> None:
        """Take note of an event."""
        fleet = event.fleet
        steps = fleet.runs[0].config["train"]["steps"]
        if event.kind == "started":
            self.running[fleet.id] = 0.0
            self.bars[fleet.id] = self.progress.add_task(fleet.label, total=steps, left="")
        elif event.kind == "progress":
            self.training = self.training or time.monotonic()
            self.running[fleet.id] = fleet.planned_tokens * event.steps / steps
            self.progress.update(self.bars[fleet.id], completed=event.steps)
        elif event.kind == "retried":
            self.running[fleet.id] = 0.0
            self.progress.update(self.bars[fleet.id], completed=0)
            self._line(f"{fleet.label}: started again ({event.reason})")
        else:
            self.running.pop(fleet.id, None)
            self.progress.remove_task(self.bars.pop(fleet.id))
            if event.kind in ("done", "error"):
                self.done += fleet.planned_tokens
            words = {"done": "done", "error": "FAILED", "memory": "does not fit into memory", "died": "DIED"}
            line = f"{fleet.label}: {words[event.kind]}" + (f" ({event.reason})" if event.reason else "")
            if event.kind != "done" or not self.console.is_terminal:
                self._line(line)
        if self.total is not None and self.planned:
            share = min(1.0, (self.done + sum(self.running.values())) / self.planned)
            self.progress.update(self.total, completed=share, left=self._left(share))

    def _line(self, text: str) -> None:
        self.console.print(f"{self._clock()} {text}", markup=False, soft_wrap=True)

    def _clock(self) -> str:
        return f"[{_duration(time.monotonic() - self.begin)}]"

    def _left(self, share: float) -> str:
        if share <= 0.01 or self.training is None:
            return ""
        passed = time.monotonic() - self.training  # without the start of the workers
        return f"about {_duration(passed * (1 - share) / share)} left"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
