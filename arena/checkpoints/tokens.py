"""Sequences of tokens for a model to read: from a file of token ids, or from text."""

from __future__ import annotations

import codecs
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arena.checkpoints.layout import CheckpointError

BYTES = 256
_PIECE = 2**16
FORMS = ".npy, .safetensors and .parquet with integers; any other file is text"


def read_tokens(
    path: str | Path, *, vocab_size: int, length: int, sequences: int, tokenizer: str | None = None
) -> Tensor:
    """The first ``sequences`` stretches of ``length`` tokens of a file, one behind the other.

    No more of it is read than that.

    .npy and .safetensors hold one array of integers, [N] or [B,N] (rows follow one another), .parquet a
    column ``tokens`` (or its only one) of integers or lists of them. Any other file is text in UTF-8: ids by
    ``tokenizer``, or without one the bytes themselves (ids 0 to 255).

    Args:
        path: the file.
        vocab_size: ids are below it.
        length: T.
        sequences: B; fewer where the file has fewer, but at least one.
        tokenizer: content of tokenizer.json; needs the package ``tokenizers``.

    Returns:
        int64 [B,T]; of a file with less than ``length`` tokens one sequence of all.

    Raises:
        CheckpointError: a file of another form, ids that the model does not know, no token at all.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is no file")
    wanted = length * sequences
    reader = _READERS.get(path.suffix)
    if reader is not None:
        found = reader(path, wanted)
    elif not is_text(path):
        raise CheckpointError(f"{path}: {path.suffix} is not read; what is: {FORMS}")
    elif tokenizer is None:
        if vocab_size < BYTES:
            raise CheckpointError(
                f"{path}: the checkpoint has no tokenizer.json, and {vocab_size} tokens are too few for "
                f"bytes: give token ids ({FORMS})"
            )
        with path.open("rb") as file:
            found = np.frombuffer(file.read(wanted), np.uint8)
    else:
        found = _encode(path, wanted, tokenizer)
    if not np.issubdtype(found.dtype, np.integer):
        raise CheckpointError(f"{path} holds {found.dtype}, not integers")
    if not len(found):
        raise CheckpointError(f"{path} holds no token")
    if found.min() < 0 or found.max() >= vocab_size:
        wrong = found.min() if found.min() < 0 else found.max()
        raise CheckpointError(f"{path} has the token {wrong}; the model knows 0 to {vocab_size - 1}")
    tokens = torch.from_numpy(found.astype(np.int64))
    if len(tokens) < length:
        return tokens[None]
    count = len(tokens) // length
    return tokens[: count * length].view(count, length)


def is_text(path: Path) -> bool:
    """Whether a file counts as text."""
    return path.suffix not in (*_READERS, ".pt", ".pth", ".bin", ".pkl", ".npz")


def _npy(path: Path, wanted: int) -> np.ndarray:
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # which has no pickled objects
    except (ValueError, OSError, EOFError) as error:
        raise CheckpointError(
            f"{path} is no array that can be read: {' '.join(str(error).split())[:200]}"
        ) from None
    return np.array(_flat(array, path)[:wanted])


def _flat(array: Any, path: Path) -> Any:
    if array.ndim not in (1, 2):
        raise CheckpointError(f"{path} holds an array {list(array.shape)}: tokens are [N] or [B,N]")
    return array.reshape(-1)


def _safetensors(path: Path, wanted: int) -> np.ndarray:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            names = list(file.keys())
            if len(names) != 1 and "tokens" not in names:
                raise CheckpointError(
                    f"{path} holds {', '.join(sorted(names)[:5]) or 'nothing'}: name it tokens"
                )
            name = "tokens" if "tokens" in names else names[0]
            part = file.get_slice(name)
            shape = part.get_shape()
            rows = wanted if len(shape) == 1 else -(-wanted // max(shape[-1], 1))
            return _flat(part[:rows] if shape else file.get_tensor(name), path)[:wanted]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from None


def _parquet(path: Path, wanted: int) -> np.ndarray:
    import polars as pl

    try:
        frame = pl.scan_parquet(path)
        columns = frame.collect_schema()
        name = "tokens" if "tokens" in columns else next(iter(columns), "")
        if "tokens" not in columns and len(columns) != 1:
            raise CheckpointError(f"{path} has the columns {', '.join(columns)[:200]}: name one tokens")
        kind = columns[name]
        inner = kind.inner if isinstance(kind, pl.List) else kind  # type: ignore[union-attr]
        if not inner.is_integer():  # type: ignore[union-attr]
            raise CheckpointError(f"{path}: column {name} is of {kind}, not of integers or lists of them")
        # every list that counts has a token, so that many rows are enough
        column = frame.select(name).drop_nulls()
        if isinstance(kind, pl.List):
            column = column.filter(pl.col(name).list.len() > 0).head(wanted).explode(name)
        return column.head(wanted).collect()[name].drop_nulls().to_numpy()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from None


def _encode(path: Path, wanted: int, tokenizer: str) -> np.ndarray:
    """Ids of the beginning of a text; the text is read until there are enough."""
    if importlib.util.find_spec("tokenizers") is None:
        raise CheckpointError(
            f"{path} is text, and the checkpoint's tokenizer.json needs the package tokenizers "
            "(pip install tokenizers, or memory-arena[checkpoints]); or give token ids: " + FORMS
        )
    from tokenizers import Tokenizer

    try:
        encoder = Tokenizer.from_str(tokenizer)
    except Exception as error:
        raise CheckpointError(
            f"tokenizer.json cannot be read: {' '.join(str(error).split())[:200]}"
        ) from None
    text, enough = "", 2 * wanted  # letters; most tokens have more than two
    for piece in _pieces(path):
        text += piece
        if len(text) < enough:
            continue
        found = encoder.encode(text).ids
        if len(found) > wanted + 32:  # the last ones may change with what follows
            return np.array(found[:wanted], dtype=np.int64)
        enough = 2 * len(text)
    return np.array(encoder.encode(text).ids[:wanted], dtype=np.int64)


def _pieces(path: Path) -> Iterator[str]:
    """A text file piece by piece."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with path.open("rb") as file:
            while data := file.read(_PIECE):
                yield decoder.decode(data)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise CheckpointError(f"{path} is neither text in UTF-8 nor one of {FORMS}") from None


_READERS = {".npy": _npy, ".safetensors": _safetensors, ".parquet": _parquet}
