"""Which public tensors a parameter of ours is made of, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arena.checkpoints.layout import CheckpointError
from arena.model import ModelConfig


class Part(NamedTuple):
    """A public tensor."""

    name: str
    shape: tuple[int, ...]
    copies: int = 1
    """Heads that share one of its heads: we have it once for each of them."""
    width: int = 1
    """Rows of one of its heads; counts where there are copies."""

    @property
    def rows(self) -> int:
        """Of what we make of it."""
        return self.shape[0] * self.copies


class Entry(NamedTuple):
    """A parameter of ours: public tensors one under the other."""

    name: str
    parts: tuple[Part, ...]
    taps: bool = False
    """Taps of a convolution, [C,1,W] with the present token last there, [W,C] with it first here."""


class Translation(NamedTuple):
    """What a config.json means."""

    family: str
    config: ModelConfig
    norm_eps: float
    """Of the norms of the residual stream; those inside a block are in its options."""
    tied: bool
    """The head's weight is the embedding's."""
    n_layers: int
    entries: tuple[Entry, ...]
    """All but those of the layers."""
    layer: tuple[Entry, ...]
    """Of one layer; public names have ``{layer}`` in them."""

    def all_entries(self) -> Iterator[Entry]:
        """Every parameter of the model."""
        yield from self.entries
        for index in range(self.n_layers):
            for entry in self.layer:
                parts = tuple(
                    part._replace(name=part.name.replace("{layer}", str(index))) for part in entry.parts
                )
                yield Entry(f"layers.{index}.{entry.name}", parts, entry.taps)

    def public_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor that the public file must have."""
        return {part.name: part.shape for entry in self.all_entries() for part in entry.parts}


def matrix(ours: str, public: str, *shape: int) -> Entry:
    """A parameter that is one public tensor."""
    return Entry(ours, (Part(public, shape),))


def to_ours(entry: Entry, tensors: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
    """The parameter, of shape ``shape``, from the public tensors."""
    pieces = []
    for part in entry.parts:
        x = tensors[part.name]
        if part.copies > 1:
            heads = x.unflatten(0, (-1, part.width))
            x = heads.repeat_interleave(part.copies, 0).flatten(0, 1)
        pieces.append(x[:, 0].flip(-1).T if entry.taps else x)
    made = torch.cat(pieces, 1 if entry.taps else 0)
    if made.numel() != torch.Size(shape).numel():
        raise CheckpointError(
            f"{entry.name}: the config and the tensors give {list(made.shape)}, not {list(shape)}"
        )
    return made.reshape(list(shape))


def to_public(entry: Entry, parameter: Tensor) -> dict[str, Tensor]:
    """The public tensors, from the parameter.

    Raises:
        CheckpointError: heads that share a key there have keys of their own by now.
    """
    if entry.taps:
        parameter = parameter.T.flip(-1)[:, None]
    rows = [part.rows for part in entry.parts]
    flat = parameter.reshape(sum(rows), *entry.parts[0].shape[1:])
    found = {}
    for part, piece in zip(entry.parts, flat.split(rows), strict=True):
        if part.copies > 1:
            heads = piece.unflatten(0, (-1, part.copies, part.width))
            if not (heads == heads[:, :1]).all():
                raise CheckpointError(
                    f"{part.name}: {part.copies} heads share it in the public layout; here they differ by now"
                )
            piece = heads[:, 0].flatten(0, 1)
        found[part.name] = piece.reshape(part.shape)
    return found


def options(**values: Any) -> dict[str, Any]:
    """Options of a block, without those that are None or empty."""
    return {name: value for name, value in values.items() if value not in (None, {})}
