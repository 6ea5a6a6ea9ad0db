"""Collects measurements and makes the tidy table of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from arena.dynamics.dictionary import COLUMNS
from synthetic_tasks import ROLES

Place = Tensor | int | None


class Rows:
    """Rows of :data:`~arena.dynamics.dictionary.COLUMNS`.

    Args:
        blocks: Architecture of each layer.
        roles: Role of every position, int64 [B,T], an index into ``synthetic_tasks.ROLES``; None: unknown.
        symbols: Name of the token at every position, [B,T]; None: there are no tokens.
    """

    def __init__(self, blocks: list[str], roles: Tensor | None, symbols: np.ndarray | None) -> None:
        self._blocks = blocks
        self._roles = None if roles is None else np.array(ROLES)[roles.numpy()]
        self._symbols = symbols
        self._parts: list[tuple[int, dict[str, Any]]] = []

    def add(
        self,
        layer: int,
        quantity: str,
        value: Tensor,
        *,
        sequence: Place = None,
        token: Place = None,
        source: Place = None,
        index: Place = None,
        micro: Place = None,
        n: Tensor | int = 1,
        role: str | None = None,
        statistic: str = "value",
    ) -> None:
        """Add one row for every element of ``value`` [...,H].

        The places (and ``n``) are numbers, or tensors that broadcast to the leading axes of ``value``. Role
        and symbol are those of (sequence, token); ``role`` is for rows that have no such place.
        """
        lead, H = value.shape[:-1], value.shape[-1]

        def column(x: Place) -> np.ndarray | None:
            if x is None:
                return None
            full = torch.as_tensor(x).expand(lead)[..., None].expand(*lead, H)
            return full.reshape(-1).numpy()

        places = {"sequence": sequence, "token": token, "source": source, "index": index, "n": n}
        places["micro"] = micro
        columns: dict[str, Any] = {name: column(place) for name, place in places.items()}
        columns["head"] = torch.arange(H).expand(*lead, H).reshape(-1).numpy()
        columns["value"] = value.detach().double().reshape(-1).cpu().numpy()
        placed = sequence is not None and token is not None
        at = (columns["sequence"], columns["token"])
        columns["role"] = self._roles[at] if placed and self._roles is not None else role
        columns["symbol"] = self._symbols[at] if placed and self._symbols is not None else None
        columns |= {
            "layer": layer,
            "block": self._blocks[layer],
            "quantity": quantity,
            "statistic": statistic,
        }
        self._parts.append((value.numel(), columns))

    def add_head(
        self,
        layer: int,
        quantity: str,
        head: int,
        value: float,
        *,
        n: int,
        role: str,
        statistic: str,
        micro: int | None = None,
    ) -> None:
        """Add one row of one head, taken over all positions of a role."""
        row = dict.fromkeys(COLUMNS) | {"layer": layer, "block": self._blocks[layer], "head": head}
        row |= {
            "micro": micro,
            "quantity": quantity,
            "value": value,
            "n": n,
            "role": role,
            "statistic": statistic,
        }
        self._parts.append((1, row))

    def missing(self, quantities: set[str]) -> None:
        """Add a row without head and value for every quantity that a layer has no row of."""
        seen = {(columns["layer"], columns["quantity"]) for _, columns in self._parts}
        for layer, block in enumerate(self._blocks):
            for quantity in sorted(quantities):
                if (layer, quantity) not in seen:
                    row = dict.fromkeys(COLUMNS) | {"layer": layer, "block": block, "quantity": quantity}
                    self._parts.append((1, row | {"statistic": "value", "n": 0}))

    def frame(self) -> pl.DataFrame:
        """All rows, in the order in which they were added; NaN has become null."""
        columns = []
        for name, (kind, _) in COLUMNS.items():
            pieces = []
            for size, part in self._parts:
                x = part[name]
                if isinstance(x, np.ndarray):
                    pieces.append(pl.Series(name, x).cast(kind))
                else:
                    pieces.append(pl.Series(name, [x], dtype=kind).new_from_index(0, size))
            columns.append(pl.concat(pieces) if pieces else pl.Series(name, [], dtype=kind))
        return pl.DataFrame(columns).with_columns(pl.col("value").fill_nan(None))
