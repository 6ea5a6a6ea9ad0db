"""Finite groups as multiplication tables, computed, not stored.

Permutations of 0..n-1 are listed in lexicographic order and compose as (a b)(i) = a(b(i)). A_n keeps that
order. Element 0 is the identity everywhere.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import numpy as np


class Group(NamedTuple):
    """A finite group of order n."""

    table: np.ndarray
    """int64 [n,n]; table[a, b] is the number of the product a b."""
    names: tuple[str, ...]
    """How an element is printed."""
    moved: np.ndarray | None
    """int64 [n]: how many points each permutation moves; None where the elements are not permutations."""


@functools.cache
def symmetric(n: int) -> Group:
    """All n! permutations of n points."""
    return _permutation_group(list(itertools.permutations(range(n))))


@functools.cache
def alternating(n: int) -> Group:
    """The even permutations of n points."""
    return _permutation_group([p for p in itertools.permutations(range(n)) if _inversions(p) % 2 == 0])


@functools.cache
def cyclic(n: int) -> Group:
    """Addition modulo n."""
    number = np.arange(n)
    return Group((number[:, None] + number) % n, tuple(map(str, range(n))), None)


def direct_product(left: Group, right: Group) -> Group:
    """Pairs (a, b), numbered a * |right| + b, multiplied component by component."""
    n, m = len(left.names), len(right.names)
    a, b = np.divmod(np.arange(n * m), m)
    table = left.table[a[:, None], a] * m + right.table[b[:, None], b]
    return Group(table, tuple(f"{x}+{y}" for x in left.names for y in right.names), None)


def _inversions(p: tuple[int, ...]) -> int:
    return sum(p[i] > p[j] for i in range(len(p)) for j in range(i + 1, len(p)))


def _permutation_group(elements: list[tuple[int, ...]]) -> Group:
    array = np.array(elements)
    number = {p: i for i, p in enumerate(elements)}
    composed = array[:, array]  # [a, b, point] = a(b(point))
    table = np.array([[number[tuple(p)] for p in row] for row in composed.tolist()], np.int64)
    moved = (array != np.arange(array.shape[1])).sum(axis=1)
    return Group(table, tuple("".join(str(x + 1) for x in p) for p in elements), moved)


def running_product(elements: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Products x_0 x_1 ... x_t of each row, for int64 [N,T].

    Two levels of blocks, each of about sqrt(T) steps: products inside the blocks, then the blocks' carries.
    """
    rows, length = elements.shape
    width = max(int(length**0.5), 1)
    blocks = -(-length // width)
    order = len(table)
    flat = table.reshape(-1)
    x = np.zeros((rows, blocks * width), np.int64)  # padded with the identity
    x[:, :length] = elements
    x = np.ascontiguousarray(x.reshape(rows, blocks, width).transpose(2, 1, 0))  # [width, blocks, rows]
    for j in range(1, width):
        x[j] = flat[x[j - 1] * order + x[j]]
    carry = x[-1, 0]
    for b in range(1, blocks):
        x[:, b] = flat[carry * order + x[:, b]]
        carry = x[-1, b]
    return np.ascontiguousarray(x.transpose(2, 1, 0).reshape(rows, -1)[:, :length])
