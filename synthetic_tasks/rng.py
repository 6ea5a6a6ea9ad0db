"""Counter-based random integers.

Every draw is a pure function of (key, sample index, attempt, stream, position).

A word is SplitMix64's output function (Steele, Lea and Flood 2014) applied to a row key plus a Weyl step
for (stream, position). Nothing is carried from one draw to the next, so any row can be made alone, on any
machine. Only 64-bit integer arithmetic decides a draw. An integer below n is (32 random bits * n) >> 32,
whose bias is below n / 2^32.
"""

from __future__ import annotations

import decimal
import functools
import hashlib
import json

import numpy as np

_GAMMA = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_U = np.uint64


def mix64(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function, in place on a uint64 array (a bijection of 64-bit words)."""
    x ^= x >> _U(30)
    x *= _U(0xBF58476D1CE4E5B9)
    x ^= x >> _U(27)
    x *= _U(0x94D049BB133111EB)
    x ^= x >> _U(31)
    return x


def hash_key(*parts: object) -> int:
    """A 64-bit key from JSON-able parts (names, numbers, dictionaries)."""
    text = json.dumps(parts, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@functools.lru_cache(maxsize=256)
def _steps(stream: int, n: int) -> np.ndarray:
    start = (stream << 32) + 1
    return (np.arange(start, start + n, dtype=np.uint64) * _U(_GAMMA))[None]


def pack_bits(n: int) -> int:
    """The number of bits that hold every integer below n."""
    return max(int(n - 1).bit_length(), 1)


class Rows:
    """The random words of some rows. `stream` names the purpose of a draw; a stream is used once in a task.

    Args:
        keys: uint64 [N], one key a row.
    """

    def __init__(self, keys: np.ndarray):
        self.keys = keys

    @classmethod
    def of(cls, key: np.ndarray, index: np.ndarray, attempt: np.ndarray) -> Rows:
        """The rows of samples `index` under their keys (uint64 [N]) at redraw `attempt` (int64 [N])."""
        rows = mix64(index.astype(np.uint64) * _U(_GAMMA) + key)
        rows += (attempt.astype(np.uint64) + _U(1)) * _U(0xD1B54A32D192ED03)
        return cls(mix64(rows))

    def __len__(self) -> int:
        return len(self.keys)

    def words(self, stream: int, n: int) -> np.ndarray:
        """64-bit words, uint64 [N,n]."""
        return mix64(self.keys[:, None] + _steps(stream, n))

    def words32(self, stream: int, n: int) -> np.ndarray:
        """32-bit words in uint64, [N,n]; half the mixing of `words`."""
        half = (n + 1) // 2
        both = self.words(stream, half)
        out = np.empty((len(self), 2 * half), np.uint64)
        np.right_shift(both, _U(32), out=out[:, :half])
        np.bitwise_and(both, _U(0xFFFFFFFF), out=out[:, half:])
        return out[:, :n]

    def below(self, bound: int | np.ndarray, stream: int, n: int) -> np.ndarray:
        """Integers in 0..bound-1, int64 [N,n]; `bound` (< 2^32) is a number or broadcasts to [N,n]."""
        x = self.words32(stream, n)
        x = x * (_U(bound) if isinstance(bound, int) else bound.astype(np.uint64))
        x >>= _U(32)
        return x.view(np.int64)

    def chance(self, probability: float, stream: int, n: int) -> np.ndarray:
        """Booleans [N,n], true with the given probability (rounded to a multiple of 2^-32)."""
        return self.words32(stream, n) < _U(round(probability * 2**32))

    def order(self, stream: int, n: int, last: np.ndarray | None = None) -> np.ndarray:
        """A uniform permutation of 0..n-1 in each row, int64 [N,n].

        Args:
            last: bool [N,n]; the marked numbers come after all others.
        """
        bits = pack_bits(n)
        x = self.words(stream, n)
        x >>= _U(1)
        x &= _U(_MASK ^ ((1 << bits) - 1))
        x |= np.arange(n, dtype=np.uint64)
        if last is not None:
            x |= last.astype(np.uint64) << _U(63)
        x.sort(axis=1)
        x &= _U((1 << bits) - 1)
        return x.view(np.int64)

    def distinct(self, bound: int, stream: int, n: int) -> np.ndarray:
        """N different integers below bound in each row, uniform over ordered selections, int64 [N,n].

        Of equal numbers one keeps its place, the others are drawn again until none is left. Which one keeps
        it depends on places alone, so all numbers are treated alike and every ordered selection is equally
        likely. Dense selections are cut from a permutation.
        """
        if n > bound:
            raise ValueError(f"cannot draw {n} different numbers below {bound}")
        if 4 * n > bound:
            return self.order(stream, bound)[:, :n]
        out = self.below(bound, stream, n)
        if n <= 1:
            return out
        if 64 * n < bound:
            return self._redraw_by_sorting(out, bound, stream)
        return self._redraw_by_owner(out, bound, stream)

    def _redraw_by_sorting(self, out: np.ndarray, bound: int, stream: int) -> np.ndarray:
        bits = pack_bits(out.shape[1])
        pending = np.arange(len(self))
        attempt = 0
        while pending.size:
            attempt += 1
            packed = (out[pending] << bits) | np.arange(out.shape[1])
            packed.sort(axis=1)
            row, column = np.nonzero((packed[:, 1:] >> bits) == (packed[:, :-1] >> bits))
            place = packed[row, column + 1] & ((1 << bits) - 1)
            row = pending[row]
            out[row, place] = Rows(self.keys[row]).at(bound, stream + (attempt << 12), place)
            pending = np.unique(row)
        return out

    def _redraw_by_owner(self, out: np.ndarray, bound: int, stream: int) -> np.ndarray:
        # owner[row, number] is the place that holds it. The table is not cleared: an entry counts only if
        # that place does hold the number. Of equal indices in one assignment the last wins (NumPy's rule).
        rows, n = out.shape
        owner = np.empty(rows * bound, np.int32)
        where = (out + (np.arange(rows) * bound)[:, None]).reshape(-1)
        own = np.tile(np.arange(n, dtype=np.int32), rows)
        owner[where] = own
        row, place = np.divmod(np.flatnonzero(owner[where] != own), n)
        attempt = 0
        while row.size:
            attempt += 1
            fresh = Rows(self.keys[row]).at(bound, stream + (attempt << 12), place)
            where = row * bound + fresh
            held = owner[where]
            known = (held >= 0) & (held < n)
            lost = known & (out[row, np.where(known, held, 0)] == fresh)
            free = ~lost
            out[row[free], place[free]] = fresh[free]
            owner[where[free]] = place[free]
            lost |= owner[where] != place
            row, place = row[lost], place[lost]
        return out

    def at(self, bound: int, stream: int, position: np.ndarray) -> np.ndarray:
        """One integer below bound for each row, at a position of its own, int64 [N]."""
        x = (position.astype(np.uint64) + _U((stream << 32) + 1)) * _U(_GAMMA)
        x = mix64(x + self.keys) >> _U(32)
        return ((x * _U(bound)) >> _U(32)).view(np.int64)

    def race(self, slowness: np.ndarray, stream: int, n: int) -> np.ndarray:
        """N different slots, drawn one after the other with probability proportional to 1 / slowness.

        Successive weighted sampling without replacement equals the order of arrival of independent
        exponential clocks (Efraimidis and Spirakis 2006), here in fixed-point integers.

        Args:
            slowness: int64 [S], inverse weights, 1 <= slowness < 2^30.

        Returns:
            int64 [N,n] in order of arrival.
        """
        size = len(slowness)
        bits = pack_bits(size)
        time = _minus_log2(self.words32(stream, size)) * slowness.astype(np.uint64)
        spare = int(slowness.max()).bit_length() + 31 + bits - 64
        if spare > 0:
            time >>= _U(spare)
        time <<= _U(bits)
        time |= np.arange(size, dtype=np.uint64)
        time.sort(axis=1)
        return (time[:, :n] & _U((1 << bits) - 1)).view(np.int64)


@functools.lru_cache(maxsize=1)
def _log_table() -> np.ndarray:
    """-log2((1024 + j) / 2048) for j = 0..1024 in units of 2^-26, by software decimals."""
    context = decimal.Context(prec=30)
    ln2 = context.ln(decimal.Decimal(2))
    values = [context.ln(decimal.Decimal(1024 + j) / 2048) / ln2 for j in range(1025)]
    return np.array([int((-v * 2**26).to_integral_value()) for v in values], np.uint64)


def _minus_log2(words32: np.ndarray) -> np.ndarray:
    """-log2((w + 1) / 2^32) of 32-bit words in units of 2^-26; the interpolation's error is below 2^-22."""
    # frexp of an integer below 2^53 is exact: no rounding can differ between machines.
    mantissa, exponent = np.frexp((words32 + _U(1)).astype(np.float64))
    fixed = (mantissa * 2.0**26).astype(np.uint64) - _U(1 << 25)
    cell = (fixed >> _U(15)).astype(np.int64)
    rest = fixed & _U((1 << 15) - 1)
    table = _log_table()
    low, high = table[cell], table[np.minimum(cell + 1, 1024)]
    value = low - (((low - high) * rest) >> _U(15))
    return value + ((32 - exponent).astype(np.uint64) << _U(26))


@functools.lru_cache(maxsize=64)
def power_slowness(size: int, exponent: str) -> np.ndarray:
    """Inverse weights slot ** exponent, slot = 1..size, in fixed point by software decimals: int64 [size]."""
    context = decimal.Context(prec=30)
    power = decimal.Decimal(exponent)
    unit = 2 ** min(16, 29 - pack_bits(size))
    values = [context.power(decimal.Decimal(slot), power) * unit for slot in range(1, size + 1)]
    return np.array([int(value.to_integral_value()) for value in values], np.int64)


@functools.lru_cache(maxsize=64)
def _coefficients(n: int) -> np.ndarray:
    return mix64(np.arange(1, n + 1, dtype=np.uint64) * _U(_GAMMA) + _U(0x5851F42D4C957F2D))


def fingerprint(content: np.ndarray) -> np.ndarray:
    """A hash of each row of non-negative integers [N,...], uint64 [N]; independent of any seed."""
    flat = content.reshape(len(content), -1).astype(np.uint64)
    return mix64(((flat + _U(1)) * _coefficients(flat.shape[1])).sum(axis=1, dtype=np.uint64))


def set_fingerprint(content: np.ndarray) -> np.ndarray:
    """As `fingerprint`, but of the multiset of the entries of each row: their order does not count."""
    return mix64(mix64((content.astype(np.uint64) + _U(1)) * _U(_GAMMA)).sum(axis=1, dtype=np.uint64))
