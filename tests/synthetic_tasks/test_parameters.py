"""Every parameter at its edges, and property tests over random parameters."""

import dataclasses
import inspect

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import synthetic_tasks
from synthetic_tasks.base import task_class

WRONG = [
    ("parity", {"supervision": "all"}, "supervision must be one of 'final', 'running', got 'all'"),
    ("cycle_navigation", {"n_positions": 1}, "n_positions must be an integer from 2 to"),
    ("state_recall", {"n_pointers": 1}, "n_pointers must be an integer from 2 to 64"),
    ("state_recall", {"max_bits": 4}, "max_bits must be an integer from 5 to"),
    ("state_recall", {"n_swaps": -1}, "n_swaps must be an integer >= 0"),
    ("mod_arithmetic", {"modulus": 1}, "modulus must be an integer from 2"),
    ("mod_arithmetic_brackets", {"product": 1}, "product must be true or false, got 1"),
    ("solve_equation", {"product": True}, "product must be false"),
    ("s3", {"max_moved": 1}, "max_moved must be 0 or at least 2, got 1"),
    ("a5", {"max_moved": 2}, "max_moved must be 0 or at least 3, got 2"),
    ("z60", {"max_moved": 2}, "max_moved needs a group of permutations"),
    ("s5", {"tokens_per_element": 0}, "tokens_per_element must be an integer from 1 to 64"),
    ("majority", {"n_symbols": 1}, "n_symbols must be an integer from 2"),
    ("majority", {"ties": "last"}, "ties must be one of 'avoid', 'first'"),
    ("majority_count", {"form": "x"}, "form must be one of 'capped', 'share'"),
    ("majority_count", {"n_classes": 1}, "n_classes must be"),
    ("anbn", {"form": "x"}, "form must be one of 'next', 'membership'"),
    ("anbn", {"n_segments": 0}, "n_segments must be an integer >= 1"),
    ("anbn", {"gap": 0}, "gap must be an integer >= 1"),
    ("dyck", {"n_kinds": 0}, "n_kinds must be"),
    ("dyck", {"max_depth": 0}, "max_depth must be"),
    ("palindrome", {"n_symbols": 1}, "n_symbols must be"),
    ("reverse", {"n_symbols": 1.5}, "n_symbols must be an integer"),
    ("reverse", {"n_symbols": True}, "n_symbols must be an integer"),
    ("mqar", {"n_pairs": 0}, "n_pairs must be an integer >= 1, got 0"),
    ("mqar", {"n_pairs": 4, "vocab_size": 8}, "vocab_size must be even and above 2 \\* n_pairs = 8, got 8"),
    ("mqar", {"vocab_size": 8191}, "vocab_size must be even"),
    ("mqar", {"power": 1.5}, "power must be a number from 0 to 1"),
    ("mqar", {"filler": "zero"}, "filler must be one of 'blank', 'noise'"),
    ("mqar", {"compat": "mad"}, "compat must be one of 'none', 'zoology'"),
    ("variable_key_mqar", {"n_pairs": 400}, "n_pairs=400 needs 800 keys, there are 86"),
    ("variable_key_mqar", {"max_key_tokens": 5}, "max_key_tokens must be an integer from 1 to 4"),
    ("in_context_recall", {"vocab_size": 15}, "vocab_size must be even, got 15"),
    ("noisy_recall", {"noise_fraction": 1.2}, "noise_fraction must be a number from 0 to 1"),
    ("noisy_recall", {"noise_fraction": 1.0}, "noise_fraction must be at most 0.99"),
    ("noisy_recall", {"n_noise_tokens": 30}, "n_noise_tokens must be an integer from 1 to 28"),
    ("fuzzy_recall", {"vocab_size": 4}, "vocab_size must be an integer from 5"),
    ("fuzzy_recall", {"vocab_size": 6, "max_motif": 3}, "max_motif must be an integer from 1 to 2"),
    ("fuzzy_recall", {"max_motif": 5}, "max_motif must be an integer from 1 to 4"),
    ("memorization", {"vocab_size": 5}, "vocab_size must be even"),
    ("compression", {"order": "x"}, "order must be one of 'shuffled', 'sequence'"),
    ("selective_copy", {"n_copies": 0}, "n_copies must be"),
    ("induction", {"max_lag": 1}, "max_lag must be 0 or at least 2"),
    ("phonebook", {"n_names": 1}, "n_names must be an integer from 2"),
    ("niah_multikey", {"n_queries": 5}, "n_queries must be an integer from 1 to 4"),
    ("niah_multikey", {"n_keys": 600}, "n_keys=600 needs n_key_vocab \\*\\* key_tokens >= 1200, got 1024"),
    ("niah_single_1", {"depth_percent": 101}, "depth_percent must be an integer from -1 to 100"),
    ("rebind", {"n_keys": 33}, "n_keys must be an integer from 1 to 32"),
    ("rebind", {"lag": 0}, "lag must be an integer >= 1"),
    ("rebind", {"scattered": "no"}, "scattered must be true or false"),
    ("erase", {"n_erases": -1}, "n_erases must be"),
    ("partial_update", {"n_fields": 1}, "n_fields must be"),
    ("interference", {"similarity": 3}, "similarity must be an integer from 0 to 2"),
    ("correction", {"n_corrections": 5}, "n_corrections must be an integer from 0 to 4"),
    ("capacity", {"n_queries": 0}, "n_queries must be"),
    ("accumulate", {"n_adds": -1}, "n_adds must be"),
]


@pytest.mark.parametrize(("name", "params", "message"), WRONG)
def test_impossible_parameters_are_refused_in_one_line(name, params, message):
    with pytest.raises(ValueError, match=f"^{name}: {message}") as error:
        synthetic_tasks.get(name, **params)
    assert "\n" not in str(error.value)


def test_a_draw_that_cannot_succeed_says_so():
    task = synthetic_tasks.get("variable_key_mqar", n_pairs=1)

    def never(rows, length):
        return type(task)._generate(task, rows, length)._replace(valid=np.zeros(len(rows), bool))

    object.__setattr__(task, "_generate", never)
    with pytest.raises(ValueError, match=r"no train sequence of length 7 found in \d+ draws"):
        task.sample(1, length=7)


EDGES = [
    ("cycle_navigation", {"n_positions": 2}, 20),
    ("state_recall", {"n_pointers": 2, "max_bits": 2}, 12),
    ("state_recall", {"n_pointers": 2, "n_swaps": 1, "max_bits": 30}, 38),
    ("mod_arithmetic", {"modulus": 2}, 40),
    ("mod_arithmetic_brackets", {"modulus": 2, "product": True}, 2),
    ("solve_equation", {"modulus": 2}, 3),
    ("s3", {"tokens_per_element": 64}, 64),
    ("s5", {"max_moved": 5}, 12),
    ("a5", {"max_moved": 3, "supervision": "final"}, 12),
    ("majority", {"n_symbols": 2}, 40),
    ("majority", {}, 3),
    ("majority_count", {"n_symbols": 2, "n_classes": 2}, 4),
    ("majority_count", {"n_classes": 64}, 129),
    ("anbn", {"n_segments": 1}, 20),
    ("anbn", {"n_segments": 1, "form": "membership", "gap": 100}, 21),
    ("anbncn", {"n_segments": 2, "form": "membership", "gap": 100}, 50),
    ("dyck", {"n_kinds": 1, "max_depth": 1}, 10),
    ("dyck", {"n_kinds": 30, "max_depth": 100}, 40),
    ("dyck", {"form": "membership", "max_depth": 1}, 4),
    ("palindrome", {}, 4),
    ("reverse", {"n_symbols": 2}, 2),
    ("set", {"n_symbols": 2}, 30),
    ("stack", {}, 3),
    ("mqar", {"n_pairs": 1, "vocab_size": 4}, 4),
    ("mqar", {"n_pairs": 7, "vocab_size": 16}, 28),
    ("mqar", {"n_pairs": 3, "vocab_size": 8, "filler": "noise"}, 40),
    ("mqar", {"power": 1}, 64),
    ("mqar", {"power": 0}, 64),
    ("mqar_stacked", {"n_pairs": 3, "vocab_size": 8}, 6),
    ("variable_key_mqar", {"n_pairs": 1, "max_key_tokens": 1, "n_key_tokens": 2}, 3),
    ("variable_key_mqar", {"n_pairs": 6, "max_key_tokens": 1, "n_key_tokens": 12}, 30),
    ("variable_key_mqar", {"n_pairs": 3, "max_key_tokens": 4, "n_key_tokens": 4}, 30),
    ("in_context_recall", {"vocab_size": 4}, 3),
    ("noisy_recall", {"noise_fraction": 0.99}, 63),
    ("noisy_recall", {"noise_fraction": 0, "vocab_size": 8, "n_noise_tokens": 2}, 63),
    ("fuzzy_recall", {"vocab_size": 5, "max_motif": 2}, 8),
    ("fuzzy_recall", {"max_motif": 1, "n_motifs": 1}, 4),
    ("fuzzy_recall", {"max_motif": 4, "n_motifs": 500, "compat": "mad"}, 65),
    ("fuzzy_recall", {"vocab_size": 6, "max_motif": 2, "compat": "mad"}, 9),
    ("memorization", {"vocab_size": 4}, 40),
    ("compression", {"max_items": 1}, 3),
    ("selective_copy", {"n_copies": 1, "compat": "mad"}, 3),
    ("induction", {"n_symbols": 2, "max_lag": 2}, 3),
    ("induction", {"max_lag": 1000}, 30),
    ("phonebook", {"n_digits": 1, "n_queries": 1, "n_names": 1}, 3),
    ("phonebook", {"n_names": 8, "n_queries": 8}, 72),
    ("niah_single_1", {"value_tokens": 1, "key_tokens": 1, "n_key_vocab": 2}, 7),
    ("niah_multiquery", {"values_per_key": 3, "depth_percent": 100}, 172),
    ("rebind", {"n_keys": 1, "n_rebinds": 8, "lag": 20, "n_queries": 1}, 58),
    ("rebind", {"n_keys": 32, "n_rebinds": 0}, 72),
    ("rebind", {"n_value_tokens": 2, "n_rebinds": 30, "lag": 9, "scattered": False}, 100),
    ("erase", {"n_erases": 0}, 24),
    ("erase", {"n_rebinds": 0, "n_erases": 9, "n_keys": 2}, 30),
    ("partial_update", {"n_fields": 9, "n_updates": 0}, 80),
    ("interference", {"key_tokens": 1}, 16),
    ("interference", {"key_tokens": 4, "similarity": 3, "n_keys": 32}, 180),
    ("correction", {"n_corrections": 0, "gap": 0}, 16),
    ("correction", {"n_corrections": 4, "n_keys": 4, "gap": 30}, 84),
    ("accumulate", {"n_adds": 0, "n_keys": 1, "n_queries": 1}, 4),
    ("accumulate", {"n_adds": 40, "n_value_tokens": 2}, 100),
    ("capacity", {"n_key_tokens": 64, "n_queries": 1}, 130),
]


@pytest.mark.parametrize(("name", "params", "length"), EDGES)
def test_parameters_at_their_edges(name, params, length):
    task = synthetic_tasks.get(name, **params)
    for split in synthetic_tasks.SPLITS:
        batch = task.sample(24, length=length, split=split)
        assert torch.equal(task.solve(batch.tokens), batch.targets)
        assert batch.tokens.max() < task.vocab_size and (batch.targets >= 0).any(dim=1).all()
    assert 0 < task.chance(length) <= 1


CHOICES = [
    "final",
    "running",
    "next",
    "membership",
    "avoid",
    "first",
    "capped",
    "share",
    "blank",
    "noise",
    "none",
    "zoology",
    "mad",
    "longest",
    "varied",
    "shuffled",
    "sequence",
    "all",
    "field",
    "sentence",
    "text",
]


def strategy(name):
    """Random parameters: choices and flags from what the source names, numbers around their defaults."""
    source = inspect.getsource(inspect.getmodule(task_class(name)))
    options = {}
    for field in dataclasses.fields(task_class(name)):
        if isinstance(field.default, bool):
            options[field.name] = st.booleans()
        elif isinstance(field.default, int):
            options[field.name] = st.integers(0, 2 * field.default + 3)
        elif isinstance(field.default, float):
            options[field.name] = st.floats(0, 1)
        else:
            quoted = [word for word in CHOICES if f'"{word}"' in source]
            options[field.name] = st.sampled_from([field.default, *quoted])
    return st.fixed_dictionaries({}, optional=options)


@pytest.mark.parametrize("name", synthetic_tasks.names())
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_any_legal_parameters_give_exact_pure_samples(name, data):
    params = data.draw(strategy(name))
    try:
        task = synthetic_tasks.get(name, **params)
    except ValueError as error:
        assert str(error).startswith(f"{name}: ") and "\n" not in str(error)
        return
    if task.min_length > 600:
        return
    length = task.min_length + task.length_step * data.draw(st.integers(0, 30))
    if task.max_length is not None:
        length = min(length, task.max_length)
    seed, index = data.draw(st.integers(0, 2**63)), data.draw(st.integers(0, 2**50))
    split = data.draw(st.sampled_from(synthetic_tasks.SPLITS))
    batch = task.sample(6, length=length, seed=seed, index=index, split=split)
    one = task.sample(1, length=length, seed=seed, index=index + 4, split=split)
    assert torch.equal(batch.tokens[4:5], one.tokens) and torch.equal(batch.targets[4:5], one.targets)
    assert torch.equal(task.solve(batch.tokens), batch.targets) or (
        name.startswith("mqar") and "compat" in params
    )
    assert batch.tokens.min() >= 0 and batch.tokens.max() < task.vocab_size
    scored = batch.targets[batch.targets != -100]
    assert scored.numel() and scored.min() >= 0 and scored.max() < task.n_classes
