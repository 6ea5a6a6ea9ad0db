"""Memorization, compression and selective copying of MAD (Poli et al. 2024, mad/data/instances.py)."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar

import numpy as np

from synthetic_tasks.base import Draw, Task, register, unscored
from synthetic_tasks.rng import Rows, hash_key


@register("memorization", "recall")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Memorization(Task):
    """Facts that are nowhere in the context: a fixed map, learnt into the weights.

    Definition: one random map from the V/2 - 1 keys to the V/2 values (all different) for all samples of
    all splits; keys drawn uniformly, each followed by the "insert" token, where the answer is the key's
    value.
    Tokens: keys 0 .. V/2-2, "insert" V/2-1, values V/2 .. V-1 for V = vocab_size. Classes: the same tokens.
    Example: 3 ! 5 ! -> the values of 3 and of 5.
    Scored: every "insert".
    Source: MAD's memorisation, baseline V 256 and length 32. Training and test share the map by design: the
    splits differ in the sequences of keys. `solve` knows the map; it cannot be read from the tokens.
    Metric: accuracy at scored positions. Dials: vocab_size (facts).
    Chance: 1/(V/2 - 1), one of the values in use guessed always.
    Shortcuts: a window of 2 tokens is all there is to it.
    """

    vocab_size: int = 256
    """Number of tokens, even."""
    map_seed: int = 0
    """Which map."""

    def __post_init__(self) -> None:
        self._require("vocab_size", 4, 2**20)
        self._require("map_seed", 0)
        if self.vocab_size % 2:
            raise ValueError(f"{self.name}: vocab_size must be even, got {self.vocab_size}")

    @property
    def n_classes(self) -> int:
        """Tokens."""
        return self.vocab_size

    @property
    def min_length(self) -> int:
        """One fact."""
        return 2

    @property
    def length_step(self) -> int:
        """A fact."""
        return 2

    @functools.cached_property
    def facts(self) -> np.ndarray:
        """int64 [V/2 - 1]: the value token of each key."""
        half = self.vocab_size // 2
        key = np.array([hash_key(self.name, self.version, self.vocab_size, self.map_seed)], np.uint64)
        return half + Rows(key).order(0, half)[0, : half - 1]

    def chance(self, length: int) -> float:
        """One of the values in use guessed always."""
        return 1 / (self.vocab_size // 2 - 1)

    def space(self, length: int) -> int:
        """Sequences of keys."""
        return (self.vocab_size // 2 - 1) ** (length // 2)

    def _generate(self, rows: Rows, length: int) -> Draw:
        half = self.vocab_size // 2
        tokens = np.full((len(rows), length), half - 1, np.int64)
        tokens[:, 0::2] = rows.below(half - 1, 0, length // 2)
        return Draw(tokens)

    def _solve(self, tokens: np.ndarray) -> np.ndarray:
        targets = unscored(tokens)
        targets[:, 1::2] = self.facts[tokens[:, 0::2]]
        return targets

    def token_name(self, token: int) -> str:
        """`k3`, `!`, `v5`."""
        half = self.vocab_size // 2
        if token == half - 1:
            return "!"
        return f"k{token}" if token < half else f"v{token - half}"


@register("compression", "recall")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Compression(Task):
    """Hold a random string in the state, then give any place of it.

    Definition: n = (T - 1)/2 uniform symbols, a marker, then n position tokens, each place once, in random
    order (or in sequence for order="sequence"); at position token i the answer is the i-th symbol.
    Tokens: the symbols, the marker n_symbols, then the positions 0 .. max_items-1. Classes: the symbols and
    the marker.
    Example: 7 2 5 ! #2 #0 #1 -> 5 7 2.
    Scored: the position tokens.
    Source: MAD's compression (baseline V 16 with the marker, so n_symbols=15; length 32). There the model's
    state at the marker, with a position encoding, is decoded by a two-layer MLP that is not part of the
    model: compat="mad" gives T - 1 symbols and the marker with all T tokens as targets, for such a head only
    (`needs_decoder` is true).
    Read causally those targets are the inputs, so a trainer without this head must refuse it. MAD's noise
    variant returns the inputs as targets, noise included; there is no noise here.
    Metric: accuracy. Dials: length (load), n_symbols.
    Chance: 1/n_symbols, one symbol guessed always.
    """

    n_symbols: int = 16
    """Size of the alphabet."""
    max_items: int = 512
    """Size of the positions' vocabulary; it bounds the length."""
    order: str = "shuffled"
    """"shuffled" or "sequence": the order in which the places are asked for."""
    compat: str = "none"
    """"mad": targets for a decoder head that sees the state at the marker only."""

    def __post_init__(self) -> None:
        self._require("n_symbols", 2, 2**16)
        self._require("max_items", 1, 2**20)
        self._require_choice("order", ("shuffled", "sequence"))
        self._require_choice("compat", ("none", "mad"))

    @property
    def needs_decoder(self) -> bool:
        """Whether the targets are for MAD's decoder head, not for the causal outputs."""
        return self.compat == "mad"

    @property
    def vocab_size(self) -> int:
        """Symbols, marker, positions."""
        return self.n_symbols + 1 + (0 if self.needs_decoder else self.max_items)

    @property
    def n_classes(self) -> int:
        """Symbols and marker."""
        return self.n_symbols + 1

    @property
    def min_length(self) -> int:
        """One symbol."""
        return 2 if self.needs_decoder else 3

    @property
    def length_step(self) -> int:
        """A symbol and its position token."""
        return 1 if self.needs_decoder else 2

    @property
    def max_length(self) -> int | None:
        """All positions in use."""
        return None if self.needs_decoder else 2 * self.max_items + 1

    def chance(self, length: int) -> float:
        """One symbol guessed always."""
        return 1 / self.n_symbols

    def space(self, length: int) -> int:
        """All strings."""
        return self.n_symbols ** ((length - 1) // (1 if self.needs_decoder else 2))

    def _generate(self, rows: Rows, length: int) -> Draw:
        n = (length - 1) // (1 if self.needs_decoder else 2)
        tokens = np.full((len(rows), length), self.n_symbols, np.int64)
        tokens[:, :n] = rows.below(self.n_symbols, 0, n)
        if not self.needs_decoder:
            asked = rows.order(1, n) if self.order == "shuffled" else np.arange(n)
            tokens[:, n + 1 :] = self.n_symbols + 1 + asked
        return Draw(tokens)

    def _solve(self, tokens: np.ndarray) -> np.ndarray:
        if self.needs_decoder:
            return tokens.copy()
        targets = unscored(tokens)
        n = tokens.shape[1] // 2
        targets[:, n + 1 :] = np.take_along_axis(tokens, tokens[:, n + 1 :] - self.n_symbols - 1, axis=1)
        return targets

    def token_name(self, token: int) -> str:
        """The symbol's number, `!` for the marker, `#3` for a position."""
        k = self.n_symbols
        return str(token) if token < k else "!" if token == k else f"#{token - k - 1}"

    def class_name(self, label: int) -> str:
        """As the token."""
        return self.token_name(label)


@register("selective_copy", "recall")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectiveCopy(Task):
    """Copy the symbols that stand scattered among blanks, in order.

    Definition: n_copies uniform symbols at uniformly random places among blanks, then the "copy" token,
    then n_copies blanks, where the answers are the symbols in order.
    Tokens: the symbols, then the blank n_symbols, then "copy" n_symbols + 1. Classes: the symbols.
    Example: . 4 . . 2 . ! . . -> 4 2.
    Scored: the last n_copies positions.
    Source: MAD's selective copying (baseline V 16 with blank and copy token, so n_symbols=14; length 256,
    16 copies). There every blank goes before one of the symbols, chosen uniformly, so the last symbol
    always stands directly before the copy token and even spacings are likelier; compat="mad" does that too.
    Metric: accuracy. Dials: n_copies (load), length (lag).
    Chance: 1/n_symbols.
    """

    n_symbols: int = 14
    """Size of the alphabet."""
    n_copies: int = 16
    """Symbols to copy."""
    compat: str = "none"
    """"mad": every blank goes before a uniformly chosen symbol."""

    version: ClassVar[int] = 2

    def __post_init__(self) -> None:
        self._require("n_symbols", 2, 2**16)
        self._require("n_copies", 1)
        self._require_choice("compat", ("none", "mad"))

    @property
    def vocab_size(self) -> int:
        """Symbols, blank, copy."""
        return self.n_symbols + 2

    @property
    def n_classes(self) -> int:
        """Symbols."""
        return self.n_symbols

    @property
    def min_length(self) -> int:
        """The symbols, the copy token, their copies."""
        return 2 * self.n_copies + 1

    def chance(self, length: int) -> float:
        """One symbol guessed always."""
        return 1 / self.n_symbols

    def space(self, length: int) -> int:
        """The strings to copy, and their places."""
        free = length - self.n_copies - 1 - (self.compat == "mad")
        return self.n_symbols**self.n_copies * math.comb(free, self.n_copies - (self.compat == "mad"))

    def _generate(self, rows: Rows, length: int) -> Draw:
        k = self.n_copies
        region = length - k - 1
        symbols = rows.below(self.n_symbols, 0, k)
        if self.compat == "mad":
            before = rows.below(k, 1, region - k)[:, :, None]  # the symbol that follows each blank
            place = np.arange(k) + np.stack([(before <= i).sum(axis=1)[:, 0] for i in range(k)], axis=1)
        else:
            place = np.sort(rows.distinct(region, 1, k), axis=1)
        tokens = np.full((len(rows), length), self.n_symbols, np.int64)
        np.put_along_axis(tokens, place, symbols, axis=1)
        tokens[:, region] = self.n_symbols + 1
        targets = unscored(tokens)
        targets[:, region + 1 :] = symbols
        return Draw(tokens, targets)

    def _solve(self, tokens: np.ndarray) -> np.ndarray:
        targets = unscored(tokens)
        targets[:, -self.n_copies :] = tokens[tokens < self.n_symbols].reshape(len(tokens), -1)
        return targets

    def token_name(self, token: int) -> str:
        """The symbol's number, `.`, `!`."""
        return str(token) if token < self.n_symbols else ".!"[token - self.n_symbols]

    def class_name(self, label: int) -> str:
        """The symbol's number."""
        return str(label)
