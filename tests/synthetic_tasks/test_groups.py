"""The group tables against the axioms and what is known of these groups."""

import itertools

import numpy as np
import pytest

import synthetic_tasks
from synthetic_tasks.groups import alternating, cyclic, direct_product, running_product, symmetric

GROUPS = {
    "s3": (6, False),
    "s4": (24, False),
    "s5": (120, False),
    "a5": (60, False),
    "z60": (60, True),
    "a4xz5": (60, False),
}


@pytest.mark.parametrize(("name", "order", "abelian"), [(n, *facts) for n, facts in GROUPS.items()])
def test_tables_are_groups(name, order, abelian):
    table = synthetic_tasks.get(name).group.table
    number = np.arange(order)
    assert table.shape == (order, order)
    assert (table[0] == number).all() and (table[:, 0] == number).all()  # 0 is the identity
    assert (np.sort(table, axis=0) == number[:, None]).all() and (np.sort(table, axis=1) == number).all()
    assert (table[table] == table[number[:, None, None], table[None]]).all()  # (a b) c = a (b c)
    assert (table == table.T).all() == abelian


def commutators(table):
    """The subgroup that the commutators generate."""
    order = len(table)
    inverse = (table == 0).argmax(axis=1)
    found = {table[table[a, b], table[inverse[a], inverse[b]]] for a in range(order) for b in range(order)}
    while True:
        larger = found | {int(table[a, b]) for a in found for b in found}
        if larger == found:
            return found
        found = larger


def test_known_commutator_subgroups():
    assert len(commutators(symmetric(3).table)) == 3
    assert len(commutators(symmetric(4).table)) == 12
    assert len(commutators(symmetric(5).table)) == 60
    assert len(commutators(alternating(5).table)) == 60  # perfect: A5 is not solvable
    assert len(commutators(direct_product(alternating(4), cyclic(5)).table)) == 4


def test_permutations_are_lexicographic_and_compose_right_first():
    s4 = symmetric(4)
    elements = list(itertools.permutations("1234"))
    assert s4.names == tuple("".join(p) for p in elements)
    for a, b in itertools.product(range(24), repeat=2):
        composed = "".join(s4.names[a][int(i) - 1] for i in s4.names[b])
        assert s4.names[s4.table[a, b]] == composed
    assert [n for n in s4.names if n in alternating(4).names] == list(alternating(4).names)
    assert (s4.moved == [sum(x != y for x, y in zip(n, "1234", strict=True)) for n in s4.names]).all()


def test_published_generator_sets():
    assert len(synthetic_tasks.get("s5", max_moved=2).allowed) == 11  # identity and swaps
    assert len(synthetic_tasks.get("s5", max_moved=3).allowed) == 31
    assert len(synthetic_tasks.get("a5", max_moved=3).allowed) == 21


@pytest.mark.parametrize("length", [1, 2, 3, 15, 16, 17, 100])
def test_running_product_equals_a_loop(length):
    table = symmetric(5).table
    x = np.random.default_rng(length).integers(0, 120, (7, length))
    out = running_product(x, table)
    for row, products in zip(x, out, strict=True):
        state = 0
        for element, product in zip(row, products, strict=True):
            state = table[state, element]
            assert state == product
