"""The sizes of the sequence spaces, which decide what is partitioned: never larger than what there is."""

import pytest

import synthetic_tasks

FEW = {"n_key_tokens": 2, "n_value_tokens": 3}
SMALL = [
    ("parity", {}, 8),
    ("even_pairs", {}, 8),
    ("cycle_navigation", {}, 6),
    ("state_recall", {"n_pointers": 2, "max_bits": 4}, 12),
    ("state_recall", {"n_pointers": 2, "max_bits": 4, "n_swaps": 1}, 11),
    ("mod_arithmetic", {"modulus": 3}, 6),
    ("mod_arithmetic_brackets", {"modulus": 2}, 9),
    ("mod_arithmetic_brackets", {"modulus": 2, "product": True}, 10),
    ("solve_equation", {"modulus": 2}, 9),
    ("s3", {}, 3),
    ("s4", {"max_moved": 2, "tokens_per_element": 2}, 6),
    ("majority", {"n_symbols": 3}, 6),
    ("majority", {"n_symbols": 3, "ties": "first"}, 6),
    ("majority_count", {"n_symbols": 3, "n_classes": 2}, 8),
    ("majority_count", {"n_symbols": 3, "form": "capped"}, 6),
    ("anbn", {"n_segments": 3}, 24),
    ("anbn", {"n_segments": 2, "form": "membership", "gap": 2}, 22),
    ("anbncn", {"n_segments": 3}, 33),
    ("dyck", {"max_depth": 2}, 8),
    ("dyck", {"n_kinds": 1, "max_depth": 3, "form": "membership"}, 12),
    ("palindrome", {}, 13),
    ("reverse", {"n_symbols": 3}, 10),
    ("set", {"n_symbols": 3}, 10),
    ("missing_duplicate", {"n_symbols": 2}, 13),
    ("stack", {}, 9),
    ("binary_addition", {}, 14),
    ("mqar", {"n_pairs": 1, "vocab_size": 8}, 12),
    ("mqar", {"n_pairs": 2, "vocab_size": 6}, 12),
    ("mqar_stacked", {"n_pairs": 2, "vocab_size": 6}, 6),
    ("variable_key_mqar", {"n_pairs": 2, "max_key_tokens": 2, "n_key_tokens": 3, "n_value_tokens": 3}, 10),
    ("in_context_recall", {"vocab_size": 4}, 9),
    ("noisy_recall", {"vocab_size": 6, "n_noise_tokens": 2}, 7),
    ("fuzzy_recall", {"vocab_size": 9, "max_motif": 1}, 8),
    ("fuzzy_recall", {"vocab_size": 7, "max_motif": 2, "n_motifs": 1}, 90),
    ("fuzzy_recall", {"vocab_size": 6, "max_motif": 1, "compat": "mad"}, 9),
    ("memorization", {"vocab_size": 8}, 10),
    ("compression", {"n_symbols": 3, "order": "sequence"}, 9),
    ("compression", {"n_symbols": 3, "compat": "mad"}, 6),
    ("selective_copy", {"n_symbols": 2, "n_copies": 3}, 9),
    ("selective_copy", {"n_symbols": 2, "n_copies": 3, "compat": "mad"}, 9),
    ("induction", {"n_symbols": 3}, 7),
    ("phonebook", {"n_digits": 1, "n_queries": 1, "n_names": 3}, 5),
    ("niah_single_1", {"key_tokens": 1, "value_tokens": 2, "n_key_vocab": 2, "n_value_vocab": 4}, 9),
    ("rebind", {"n_keys": 1, "n_rebinds": 1, "n_queries": 1, "n_key_tokens": 3, "n_value_tokens": 3}, 8),
    ("rebind", {"n_keys": 2, "n_rebinds": 1, "n_queries": 1, "n_key_tokens": 2, "n_value_tokens": 3}, 8),
    ("erase", {"n_keys": 2, "n_rebinds": 1, "n_erases": 1, "n_queries": 1, **FEW}, 10),
    ("partial_update", {"n_keys": 1, "n_updates": 1, "n_queries": 1, **FEW}, 9),
    ("interference", {"n_keys": 2, "key_tokens": 2, "similarity": 1, **FEW}, 18),
    ("correction", {"n_keys": 2, "n_corrections": 1, "n_key_tokens": 2, "n_value_tokens": 3}, 14),
    ("accumulate", {"n_keys": 2, "n_adds": 1, "n_key_tokens": 2, "n_value_tokens": 3, "n_queries": 1}, 8),
    ("capacity", {"n_queries": 1, "n_key_tokens": 3, "n_value_tokens": 3}, 6),
]  # fmt: skip


@pytest.mark.parametrize(("name", "params", "length"), SMALL)
def test_space_is_not_larger_than_what_samples_show(name, params, length):
    task = synthetic_tasks.get(name, **params)
    space = task.space(length)
    assert 2 < space < 3000 and task.is_exhaustible(length)
    seen, index = set(), 0
    while len(seen) < space and index < 100_000:
        tokens = task.sample(4000, length=length, index=index).tokens.numpy()
        seen.update(row.tobytes() for row in tokens)
        index += 4000
    assert len(seen) >= 0.98 * space, (len(seen), space)  # the rarest may be missing


def test_every_name_is_here():
    assert {name for name, _, _ in SMALL} >= {
        name
        for name in synthetic_tasks.names()
        if not name.startswith("niah") and name not in ("s5", "a5", "z60")
    } - {"a4xz5", "repetition", "duplicate", "odds_first", "bucket_sort"}
