"""A result folder may come from anywhere: what is checked before it is believed.

Checksums tell damage, not intent: whoever writes a file can write its checksum. So names that become paths
are checked, links are not followed, and a file that has not the form that ours have is not read further.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_NOTES: dict[str, type] = {"trial": int, "arm": str, "stage": str, "space": str}
_REQUIRED = (
    "run_id", "arch", "arm", "model_params", "task", "task_params", "seed", "split", "eval_length", "metric",
    "status",
)  # fmt: skip
_HELD = (
    "runs", "staging", "fleets", "failures", "damaged", "tuning", "ablation", "report", "dynamics", "cache",
)  # fmt: skip


def is_id(text: Any) -> bool:
    """Whether a text may name a run or a fleet, and so a file."""
    return isinstance(text, str) and _ID.fullmatch(text) is not None


def link_in(directory: Path) -> Path | None:
    """A symbolic link where a result folder has files of its own, or None. The folder itself may be one."""
    folders = [directory, *(directory / name for name in _HELD)]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_symlink() and not entry.name.endswith(".lock"):
                        return folder / entry.name
        except (FileNotFoundError, NotADirectoryError):
            continue
    return None


def open_own(path: Path, flags: int) -> int:
    """``os.open`` of a file of the store: never through a link, made where it is missing."""
    return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW, 0o666)


def read_own(path: Path) -> bytes:
    """The bytes of a file of the store: neither through a link nor from a pipe or a device.

    Raises:
        OSError: it is none of that, or cannot be read.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return file.read()


def check_plan(plan: Any) -> str | None:
    """What is wrong with the content of plan.json; None: nothing."""
    if not isinstance(plan, dict) or not isinstance(plan.get("runs"), dict):
        return "it lists no runs"
    if not isinstance(plan.get("experiment"), str):
        return "it names no experiment"
    for run_id, notes in plan["runs"].items():
        if not is_id(run_id):
            return f"{run_id[:80]!r} is no run id"
        if not isinstance(notes, dict):
            return f"run {run_id} has no notes"
        for name, kind in _NOTES.items():
            value = notes.get(name)
            if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
                return f"{name} of run {run_id} is {value!r:.80}"
    return None


def parse_frame(data: bytes, run_id: str, schema: Mapping[str, Any]) -> pl.DataFrame:
    """A table of a run, in the columns of ``schema``; those that it lacks (older ones do) are null.

    Raises:
        ValueError: it is no such table, or of another run.
    """
    try:
        frame = pl.read_parquet(io.BytesIO(data))
        columns = [
            pl.col(name).cast(kind) if name in frame.columns else pl.lit(None, dtype=kind).alias(name)
            for name, kind in schema.items()
        ]
        frame = frame.select(columns) if len(frame) else pl.DataFrame(schema=dict(schema))
    except BaseException as error:  # a broken file makes polars panic, which is no Exception
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"it is not the table of a run ({type(error).__name__})") from None
        raise
    # arm is a later column: where it is missing, the architecture stands for it; the loss in training, a line
    # of the learning curve, is of all training lengths
    curve = "step" in schema
    for name in _REQUIRED:
        scored = frame.filter(pl.col("split") != "train") if curve and name == "eval_length" else frame
        if name in schema and name != "arm" and scored[name].null_count():
            raise ValueError(f"its column {name} has gaps")
    if not frame["run_id"].eq(run_id).all():
        raise ValueError("it is the table of another run")
    return frame


def parse_object(data: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: it is none.
    """
    found = json.loads(data)
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found


def check_size(config: Any, weights: Mapping[str, Any]) -> None:
    """Refuse to build a model that its weights are not of, before it fills the memory.

    Args:
        config: ``arena.model.ModelConfig``.
        weights: name -> tensor, as stored.

    Raises:
        ValueError: they are another model's.
    """
    embedding = weights.get("embedding.weight")
    shape = [config.vocab_size, config.d_model // config.tokens_per_position]
    if embedding is None or list(embedding.shape) != shape:
        raise ValueError(f"its weights have no embedding of shape {shape}")
    layers = {name.split(".")[1] for name in weights if name.startswith("layers.")}
    if len(layers) != config.n_layers:
        raise ValueError(f"its weights have {len(layers)} layers, not {config.n_layers}")
    hidden = config.mlp_hidden or int(config.mlp_ratio * config.d_model)
    most = max((tensor.numel() for tensor in weights.values()), default=0)
    if hidden * config.d_model > 4 * most + 1_000_000:
        raise ValueError(f"its weights have no MLP of {hidden} hidden channels")
