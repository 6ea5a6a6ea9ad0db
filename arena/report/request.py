"""What a result folder was asked for: its experiment file, as a report tells it."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_request(directory: Path) -> dict[str, Any]:
    """The experiment file of a result folder; empty where it has none that can be read."""
    try:
        return tomllib.loads((directory / "experiment.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def in_file_order(
    labels: Mapping[tuple[str, str], str], request: Mapping[str, Any]
) -> dict[tuple[str, str], str]:
    """The labels of tasks in the order in which the experiment file names the tasks."""
    order = [entry.get("name") for entry in request.get("tasks", [])]
    return dict(
        sorted(
            labels.items(), key=lambda item: order.index(item[0][0]) if item[0][0] in order else len(order)
        )
    )
