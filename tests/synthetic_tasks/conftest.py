"""The cases that every task goes through: `case` is a (task, length), at least one for every task."""

import pytest

import synthetic_tasks

CASES = [
    ("parity", {}, 24),
    ("parity", {"supervision": "running"}, 65),
    ("even_pairs", {}, 33),
    ("even_pairs", {"supervision": "running"}, 33),
    ("cycle_navigation", {}, 40),
    ("cycle_navigation", {"n_positions": 6, "supervision": "running"}, 40),
    ("state_recall", {}, 54),
    ("state_recall", {"n_swaps": 7, "n_pointers": 3}, 60),
    ("mod_arithmetic", {}, 40),
    ("mod_arithmetic", {"modulus": 7}, 24),
    ("mod_arithmetic_brackets", {}, 40),
    ("mod_arithmetic_brackets", {"product": True}, 61),
    ("solve_equation", {}, 40),
    ("s3", {}, 40),
    ("s4", {"supervision": "final"}, 33),
    ("s5", {"max_moved": 2, "tokens_per_element": 4}, 64),
    ("s5", {"max_moved": 3}, 20),
    ("a5", {"max_moved": 3}, 21),
    ("z60", {}, 20),
    ("a4xz5", {}, 20),
    ("majority", {}, 40),
    ("majority", {"ties": "first", "n_symbols": 5}, 41),
    ("majority", {"supervision": "running", "n_symbols": 4}, 33),
    ("majority", {"supervision": "running", "n_symbols": 4, "ties": "first"}, 33),
    ("majority_count", {}, 64),
    ("majority_count", {"form": "capped", "n_classes": 6}, 40),
    ("anbn", {}, 64),
    ("anbn", {"form": "membership", "gap": 2}, 64),
    ("anbncn", {}, 90),
    ("anbncn", {"form": "membership"}, 104),
    ("dyck", {}, 48),
    ("dyck", {"n_kinds": 4, "max_depth": 3}, 48),
    ("dyck", {"form": "membership"}, 40),
    ("dyck", {"form": "membership", "n_kinds": 1}, 40),
    ("palindrome", {}, 41),
    ("palindrome", {"n_symbols": 5}, 30),
    ("reverse", {}, 40),
    ("repetition", {}, 40),
    ("duplicate", {}, 63),
    ("odds_first", {}, 42),
    ("bucket_sort", {}, 40),
    ("set", {"n_symbols": 12}, 40),
    ("missing_duplicate", {}, 41),
    ("stack", {}, 41),
    ("stack", {"n_symbols": 3}, 41),
    ("binary_addition", {}, 42),
    ("mqar", {}, 64),
    ("mqar", {"n_pairs": 16, "filler": "noise", "vocab_size": 128}, 64),
    ("mqar", {"n_pairs": 4, "vocab_size": 64, "compat": "zoology"}, 40),
    ("mqar_stacked", {"vocab_size": 64, "filler": "noise"}, 40),
    ("variable_key_mqar", {}, 80),
    ("variable_key_mqar", {"n_pairs": 4, "max_key_tokens": 2}, 40),
    ("in_context_recall", {}, 63),
    ("noisy_recall", {}, 63),
    ("fuzzy_recall", {}, 64),
    ("fuzzy_recall", {"compat": "mad", "key_length": "varied", "vocab_size": 9}, 64),
    ("fuzzy_recall", {"compat": "mad", "vocab_size": 16}, 128),
    ("memorization", {}, 32),
    ("compression", {}, 33),
    ("compression", {"order": "sequence"}, 33),
    ("selective_copy", {}, 64),
    ("selective_copy", {"compat": "mad", "n_copies": 8}, 40),
    ("induction", {}, 40),
    ("induction", {"max_lag": 5}, 40),
    ("phonebook", {}, 58),
    ("niah_single_1", {}, 64),
    ("niah_single_2", {"depth_percent": 50}, 64),
    ("niah_single_3", {}, 64),
    ("niah_multikey", {}, 64),
    ("niah_multivalue", {}, 64),
    ("niah_multiquery", {"values_per_key": 2, "n_queries": 2}, 120),
    ("rebind", {}, 64),
    ("rebind", {"lag": 5, "scattered": False}, 64),
    ("erase", {}, 64),
    ("partial_update", {}, 66),
    ("partial_update", {"readout": "field", "n_fields": 3, "lag": 4}, 96),
    ("interference", {"similarity": 2}, 64),
    ("correction", {}, 64),
    ("accumulate", {}, 64),
    ("capacity", {}, 64),
]


def _label(case):
    name, params, length = case
    return f"{name}-{length}" + "".join(f"-{k}={v}" for k, v in params.items())


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", CASES, ids=map(_label, CASES), indirect=True)


@pytest.fixture
def case(request):
    """(task, length)"""
    name, params, length = request.param
    return synthetic_tasks.get(name, **params), length


@pytest.fixture
def covered():
    """The names that have a case."""
    return {name for name, _, _ in CASES}
