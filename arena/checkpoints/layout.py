"""A checkpoint in the layout of Hugging Face: config.json, and tensors in one *.safetensors or in shards.

What is read here may come from anywhere: nothing of it is run, no pickle is opened, and every shape is known
from the files' headers before anything is built.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

CONFIG, WEIGHTS, INDEX, TOKENIZER = (
    "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json",
)  # fmt: skip
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_MOST_JSON = 64 * 2**20


class CheckpointError(ValueError):
    """A checkpoint that is not what it should be, or has what we have not; one line."""


class Stored(NamedTuple):
    """Where a tensor is, and what its header says."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors writes it, a key of :data:`DTYPES`."""


class PublicFiles(NamedTuple):
    """What lies in a folder; no tensor is read yet."""

    folder: Path
    config: dict[str, Any]
    config_text: str
    """config.json as it stands."""
    tensors: dict[str, Stored]


def read_public(folder: str | Path) -> PublicFiles:
    """Look at a folder.

    Raises:
        CheckpointError: it is none of that layout, or damaged; one line says what.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is no folder: give one with {CONFIG} and *.safetensors (nothing is downloaded)"
        )
    text = read_text(folder / CONFIG)
    config = parse_json(text, folder / CONFIG)
    tensors: dict[str, Stored] = {}
    for file in _weight_files(folder):
        for name, stored in headers(file).items():
            if name in tensors:
                raise CheckpointError(
                    f"{file.name} and {tensors[name].file.name} both have the tensor {name}"
                )
            tensors[name] = stored
    index = folder / INDEX
    if index.exists():
        _check_index(index, tensors)
    return PublicFiles(folder, config, text, tensors)


def headers(file: Path) -> dict[str, Stored]:
    """What the header of a safetensors file says."""
    try:
        with safe_open(file, "pt") as opened:
            names = opened.keys()
            slices = {name: opened.get_slice(name) for name in names}
            found = {
                name: Stored(file, tuple(one.get_shape()), str(one.get_dtype()))
                for name, one in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is no safetensors file that can be read: {_line(error)}") from None
    for name, stored in found.items():
        if stored.dtype not in DTYPES:
            raise CheckpointError(
                f"{file.name}: {name} is of type {stored.dtype}; what can be read is {', '.join(DTYPES)}"
            )
    return found


def read_tensor(stored: Stored, name: str) -> Tensor:
    """One tensor, in its own type."""
    try:
        with safe_open(stored.file, "pt") as opened:
            return opened.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{stored.file}: {name} cannot be read: {_line(error)}") from None


def write_public(
    folder: Path, config_text: str, tensors: Mapping[str, Tensor], tokenizer: str | None = None
) -> None:
    """Write the layout to a folder, the tensors in one file."""
    folder.mkdir(parents=True, exist_ok=True)
    own = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    save_file(own, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(config_text, encoding="utf-8")
    if tokenizer is not None:
        (folder / TOKENIZER).write_text(tokenizer, encoding="utf-8")


def read_text(path: Path) -> str:
    """A text file of moderate size.

    Raises:
        CheckpointError: it is missing, too large or not UTF-8.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}")
    if path.stat().st_size > _MOST_JSON:
        raise CheckpointError(f"{path} has more than {_MOST_JSON} bytes")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise CheckpointError(f"{path} is not text in UTF-8") from None


def parse_json(text: str, path: Path) -> dict[str, Any]:
    """A JSON object; ``path`` is for the message."""
    try:
        found = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON that can be read: {_line(error)}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is no JSON object")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _weight_files(folder: Path) -> list[Path]:
    index, whole = folder / INDEX, folder / WEIGHTS
    if index.exists():
        if whole.exists():
            raise CheckpointError(f"{folder} has both {WEIGHTS} and {INDEX}: which one holds is not clear")
        shards = _weight_map(index).values()
        files = [folder / name for name in sorted(set(shards))]
    elif whole.exists():
        files = [whole]
    else:
        pickles = sorted(
            path.name for end in ("bin", "pt", "pth", "ckpt") for path in folder.glob(f"*.{end}")
        )
        if pickles:
            raise CheckpointError(
                f"{folder} has {pickles[0]}, a pickle, which is not opened: it can run code. Convert it "
                "where you trust it: safetensors.torch.save_file({name: x.clone() for name, x in torch.load("
                f"{pickles[0]!r}, weights_only=True).items()}}, {WEIGHTS!r})"
            )
        raise CheckpointError(f"{folder} has neither {WEIGHTS} nor {INDEX}")
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{folder} has no {file.name}, which {INDEX} names")
    return files


def _weight_map(index: Path) -> dict[str, str]:
    found = parse_json(read_text(index), index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{index} has no weight_map")
    for name, shard in found.items():
        plain = isinstance(shard, str) and Path(shard).name == shard and shard.endswith(".safetensors")
        if not plain:
            raise CheckpointError(f"{index}: {name} is in {shard!r}, which is no name of a safetensors file")
    return found


def _check_index(index: Path, tensors: Mapping[str, Stored]) -> None:
    listed = _weight_map(index)
    for name in sorted(listed.keys() ^ tensors.keys()):
        where = "the index, not in its shard" if name in listed else "a shard, not in the index"
        raise CheckpointError(f"{index.parent}: tensor {name} is in {where}")
    for name, shard in listed.items():
        if tensors[name].file.name != shard:
            raise CheckpointError(f"{index}: {name} is in {tensors[name].file.name}, not in {shard}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
