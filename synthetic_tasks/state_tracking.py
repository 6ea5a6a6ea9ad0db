"""State tracking: automata over bits, moves and digits."""

from __future__ import annotations

import dataclasses

import numpy as np

from synthetic_tasks.base import Draw, Task, register, unscored
from synthetic_tasks.rng import Rows

SUPERVISION = ("final", "running")


def supervise(answers: np.ndarray, supervision: str) -> np.ndarray:
    """Targets from the answers at every position [N,T]: all of them, or the last one only."""
    if supervision == "running":
        return answers
    targets = unscored(answers)
    targets[:, -1] = answers[:, -1]
    return targets


@register("parity", "state tracking")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Parity(Task):
    """Is the number of ones odd?

    Definition: T independent fair bits; the answer is their sum modulo 2.
    Tokens: 0 and 1. Classes: 0 even, 1 odd.
    Example: tokens 1 0 1 1 -> running answers 1 1 0 1, final answer 1.
    Scored: the last position (the published form), or with supervision="running" every position.
    Source: the regular task "parity" of Deletang et al. 2023 and of the xLSTM paper (2405.04517, App.
    B.1.1), in the language-model form of NX-AI/xlstm and with the same distribution: their bits are 1 and
    2, 0 is padding, and their sequence size counts the answer too, so their size n is our length n - 1.
    Zoology's cumulative parity is supervision="running".
    Metric: accuracy at scored positions, and whole-sequence accuracy.
    Chance: 1/2; no proper subset of the bits says anything about the answer.
    Shortcuts: the bag of all tokens tells the answer (order does not matter); nothing else does.
    """

    supervision: str = "final"
    """Which positions are scored: "final" or "running"."""

    def __post_init__(self) -> None:
        self._require_choice("supervision", SUPERVISION)

    @property
    def vocab_size(self) -> int:
        """The two bits."""
        return 2

    @property
    def n_classes(self) -> int:
        """Even, odd."""
        return 2

    def chance(self, length: int) -> float:
        """One half."""
        return 0.5

    def space(self, length: int) -> int:
        """All bit strings."""
        return 2**length

    def _generate(self, rows: Rows, length: int) -> Draw:
        return Draw(rows.below(2, 0, length))

    def _solve(self, tokens: np.ndarray) -> np.ndarray:
        return supervise(np.cumsum(tokens, axis=1) & 1, self.supervision)


@register("even_pairs", "state tracking")
@dataclasses.dataclass(frozen=True, kw_only=True)
class EvenPairs(Task):
    """Is the number of places where neighbouring bits differ even?

    Definition: T independent fair bits; the answer is the parity of the number of 01 and 10 pairs, which is
    whether the first and the last bit differ.
    Tokens: 0 and 1. Classes: 0 even, 1 odd.
    Example: tokens 1 0 0 1 -> running answers 0 1 1 0, final answer 0.
    Scored: the last position, or with supervision="running" every position.
    Source: the regular task of Deletang et al. 2023; xLSTM paper (2405.04517, App. B.1.1). Same
    distribution as NX-AI/xlstm's generator (their bits are 1 and 2, their size n is our length n - 1).
    Metric: accuracy at scored positions.
    Chance: 1/2; the first bit or the last bit alone say nothing, both together say all.
    """

    supervision: str = "final"
    """Which positions are scored: "final" or "running"."""

    def __post_init__(self) -> None:
        self._require_choice("supervision", SUPERVISION)

    @property
    def vocab_size(self) -> int:
        """The two bits."""
        return 2

    @property
    def n_classes(self) -> int:
        """Even, odd."""
        return 2

    @property
    def min_length(self) -> int:
        """One pair."""
        return 2

    def chance(self, length: int) -> float:
        """One half for the final answer; running, the first position is always even."""
        return 0.5 if self.supervision == "final" else (1 + 0.5 * (length - 1)) / length

    def space(self, length: int) -> int:
        """All bit strings."""
        return 2**length

    def _generate(self, rows: Rows, length: int) -> Draw:
        return Draw(rows.below(2, 0, length))

    def _solve(self, tokens: np.ndarray) -> np.ndarray:
        return supervise(tokens ^ tokens[:, :1], self.supervision)


@register("cycle_navigation", "state tracking")
@dataclasses.dataclass(frozen=True, kw_only=True)
class CycleNavigation(Task):
    """Where on a cycle do the moves lead?

    Definition: T independent uniform moves, stay, one step forward or one step back, on a cycle of
    n_positions, from position 0; the answer is the position.
    Tokens: 0 stay, 1 forward, 2 back. Classes: the positions.
    Example: n_positions=5, tokens 2 2 0 1 -> running answers 4 3 3 4, final answer 4.
    Scored: the last position, or with supervision="running" every position.
    Source: the regular task of Deletang et al. 2023, 5 positions. NX-AI/xlstm's default vocabulary gives a
    cycle of 6, although the paper says 5: use n_positions=6 to compare with runs of that code.
    Metric: accuracy at scored positions. Dials: n_positions, length.
    Chance: the best guess from the position in the sequence alone, computed exactly; it falls to
    1/n_positions (odd cycles) as the walk spreads out.
    Shortcuts: the bag of all moves tells the answer (order does not matter); nothing else does.
    """

    n_positions: int = 5
    """Length of the cycle."""
    supervision: str = "final"
    """Which positions are scored: "final" or "running"."""

    def __post_init__(self) -> None:
        self._require("n_positions", 2, 2**16)
        self._require_choice("supervision", SUPERVISION)

    @property
    def vocab_size(self) -> int:
        """The three moves."""
        return 3

    @property
    def n_classes(self) -> int:
        """The positions."""
        return self.n_positions

    def chance(self, length: int) -> float:
        """Mean over the scored positions of the likeliest place's probability."""
        now, best = np.eye(self.n_positions)[0], []
        for _ in range(length):
            now = (now + np.roll(now, 1) + np.roll(now, -1)) / 3
            best.append(now.max())
        return float(best[-1] if self.supervision == "final" else np.mean(best))

    def space(self, length: int) -> int:
        """All sequences of moves."""
        return 3**length

    def _generate(self, rows: Rows, length: int) -> Draw:
        return Draw(rows.below(3, 0, length))

    def _solve(self, tokens: np.ndarray) -> np.ndarray:
        steps = np.array([0, 1, -1])[tokens]
        return supervise(np.cumsum(steps, axis=1) % self.n_positions, self.supervision)

    def token_name(self, token: int) -> str:
        """`.`, `+`, `-`."""
        return ".+-"[token]

    def class_name(self, label: int) -> str:
        """The position."""
        return str(label)


@register("state_recall", "state tracking")
@dataclasses.dataclass(frozen=True, kw_only=True)
class StateRecall(Task):
    """Follow pointers through swaps, then look up a bit.

    Definition: m random bits; then n_pointers named pointers with different random indices into them (name
    index); then swaps (name name) that exchange the indices of two different pointers; then "?" and a name:
    the answer is the bit that this pointer points to. The number of swaps is n_swaps, or m for n_swaps=0; m
    is what the length leaves: m = (T - 2 n_pointers - 2) / 3, or T - 2 n_pointers - 2 n_swaps - 2.
    Tokens: 0 and 1 the bits, 2 "?", then the names, then the indices 0 .. max_bits-1. Classes: 0, 1.
    Example: bits 1 0 0 1 1, a 3 b 1 ..., a b, ? a -> a now points to index 1: answer 0.
    Scored: the last position.
    Source: the state-based recall of Olmo Hybrid (2604.03444), as described by a third-party
    re-implementation: five pointers, as many swaps as bits; the original text was not available to us.
    Metric: accuracy. Dials: length (bits and swaps), n_swaps, n_pointers.
    Chance: 1/2.
    Shortcuts: the more frequent bit of few (0.59 at length 66, 18 bits).
    """

    n_pointers: int = 5
    """Named pointers."""
    n_swaps: int = 0
    """Swaps; 0 means as many as there are bits."""
    max_bits: int = 256
    """Size of the index vocabulary: the most bits that a sequence can have."""

    def __post_init__(self) -> None:
        self._require("n_pointers", 2, 64)
        self._require("n_swaps", 0)
        self._require("max_bits", self.n_pointers, 2**20)

    @property
    def vocab_size(self) -> int:
        """Bits, "?", names, indices."""
        return 3 + self.n_pointers + self.max_bits

    @property
    def n_classes(self) -> int:
        """A bit."""
        return 2

    @property
    def _fixed(self) -> int:
        return 2 * self.n_pointers + 2 + 2 * self.n_swaps

    @property
    def min_length(self) -> int:
        """One bit for each pointer."""
        return self._fixed + self.n_pointers * self.length_step

    @property
    def max_length(self) -> int:
        """All indices in use."""
        return self._fixed + self.max_bits * self.length_step

    @property
    def length_step(self) -> int:
        """A bit, and its swap if there is one for each."""
        return 1 if self.n_swaps else 3

    def chance(self, length: int) -> float:
        """One half."""
        return 0.5

    def space(self, length: int) -> int:
        """Bits and swaps."""
        bits, swaps = self._shape(length)
        return 2**bits * (self.n_pointers * (self.n_pointers - 1)) ** swaps

    def _shape(self, length: int) -> tuple[int, int]:
        bits = (length - self._fixed) // self.length_step
        return bits, self.n_swaps or bits

    def _generate(self, rows: Rows, length: int) -> Draw:
        n, p = len(rows), self.n_pointers
        bits, swaps = self._shape(length)
        tokens = np.empty((n, length), np.int64)
        tokens[:, :bits] = rows.below(2, 0, bits)
        tokens[:, bits : bits + 2 * p : 2] = 3 + np.arange(p)
        tokens[:, bits + 1 : bits + 2 * p : 2] = 3 + p + rows.distinct(bits, 1, p)
        left = rows.below(p, 2, swaps)
        right = (left + 1 + rows.below(p - 1, 3, swaps)) % p
        tokens[:, bits + 2 * p : -2 : 2] = 3 + left
        tokens[:, bits + 2 * p + 1 : -2 : 2] = 3 + right
        tokens[:, -2] = 2
        tokens[:, -1:] = 3 + rows.below(p, 4, 1)
        return Draw(tokens)

    def _solve(self, tokens: np.ndarray) -> np.ndarray:
        p, row = self.n_pointers, np.arange(len(tokens))
        bits, swaps = self._shape(tokens.shape[1])
        pointer = tokens[:, bits + 1 : bits + 2 * p : 2] - 3 - p
        moves = tokens[:, bits + 2 * p : -2] - 3
        for s in range(swaps):
            left, right = moves[:, 2 * s], moves[:, 2 * s + 1]
            pointer[row, left], pointer[row, right] = pointer[row, right], pointer[row, left]
        targets = unscored(tokens)
        targets[:, -1] = tokens[row, pointer[row, tokens[:, -1] - 3]]
        return targets

    def token_name(self, token: int) -> str:
        """Bits, `?`, names `p0`, indices `#7`."""
        if token < 3:
            return "01?"[token]
        token -= 3
        return f"p{token}" if token < self.n_pointers else f"#{token - self.n_pointers}"
