"""The examples of the docstrings, solved: tokens by their printed names -> answers by position."""

import pytest
import torch

import synthetic_tasks

EXAMPLES = [
    ("parity", {"supervision": "running"}, "1 0 1 1", {0: "1", 1: "1", 2: "0", 3: "1"}),
    ("parity", {}, "1 0 1 1", {3: "1"}),
    ("even_pairs", {"supervision": "running"}, "1 0 0 1", {0: "0", 1: "1", 2: "1", 3: "0"}),
    ("cycle_navigation", {"supervision": "running"}, "- - . +", {0: "4", 1: "3", 2: "3", 3: "4"}),
    (
        "state_recall",
        {"n_pointers": 2, "n_swaps": 1},
        "1 0 0 1 1 p0 #3 p1 #1 p0 p1 ? p0",
        {12: "0"},
    ),
    ("mod_arithmetic", {}, "2 + 3 * 4 =", {5: "4"}),
    ("mod_arithmetic_brackets", {}, "( 2 - ( - 4 ) ) =", {8: "1"}),
    ("solve_equation", {}, "( 2 - x ) = 3", {6: "4"}),
    ("s3", {}, "213 132", {0: "213", 1: "231"}),
    ("majority", {"ties": "first"}, "2 0 2 1", {3: "2"}),
    ("majority_count", {"form": "capped"}, "2 0 2 1", {3: "2"}),
    ("majority_count", {"n_classes": 4}, "2 0 2 2", {3: "bin1"}),
    ("anbn", {"n_segments": 2}, "a a b b a b", {2: "on", 3: "over", 5: "over"}),
    ("anbn", {"n_segments": 2, "form": "membership"}, "a a b b # a b b b #", {4: "yes", 9: "no"}),
    ("anbncn", {"n_segments": 1}, "a a b b c c", {2: "on", 3: "over", 4: "on", 5: "over"}),
    ("anbncn", {"n_segments": 1, "form": "membership"}, "a a b c c c #", {6: "no"}),
    ("dyck", {"n_kinds": 3}, "( [ ] { } )", {2: "(", 4: "(", 5: "none"}),
    ("palindrome", {}, "0 1 1 0", {3: "yes"}),
    ("palindrome", {}, "0 1 0 1", {3: "no"}),
    ("reverse", {}, "3 1 4 _ _ _", {3: "4", 4: "1", 5: "3"}),
    ("repetition", {}, "3 1 4 _ _ _", {3: "3", 4: "1", 5: "4"}),
    ("duplicate", {"n_symbols": 4}, "3 1 _ _ _ _", {2: "3", 3: "1", 4: "3", 5: "1"}),
    ("odds_first", {}, "3 1 4 1 5 _ _ _ _ _", {5: "3", 6: "4", 7: "5", 8: "1", 9: "1"}),
    ("bucket_sort", {}, "3 1 4 1 _ _ _ _", {4: "1", 5: "1", 6: "3", 7: "4"}),
    ("set", {}, "3 1 3 4 _ _ _ _", {4: "3", 5: "1", 6: "4"}),
    ("missing_duplicate", {}, "3 1 4 3 ? 4 _", {6: "1"}),
    ("stack", {}, "0 1 +1 pop pop _ _ _ _ _ _", {5: "0", 6: "end"}),
    ("binary_addition", {}, "1 1 + 1 _ _ _ _", {4: "0", 5: "0", 6: "1", 7: "end"}),
    ("mqar", {"n_pairs": 2, "vocab_size": 16}, "k3 v1 k5 v4 . . k5 . k3 .", {6: "v4", 8: "v1"}),
    (
        "variable_key_mqar",
        {"n_pairs": 2, "max_key_tokens": 2},
        "k1 k5 v2 k2 v7 . k2 . k1 k5",
        {6: "v7", 9: "v2"},
    ),
    ("in_context_recall", {}, "k3 v1 k5 v4 k3 v1 k5", {4: "v1", 6: "v4"}),
    ("noisy_recall", {}, "k3 v1 n1 n0 k3 v1 k3", {4: "v1", 6: "v1"}),
    ("fuzzy_recall", {"max_motif": 2}, "k1 k4 v1 v4 k3 k0 v0 k1 k4 v1", {8: "v1", 9: "v4"}),
    ("compression", {}, "7 2 5 ! #2 #0 #1", {4: "5", 5: "7", 6: "2"}),
    ("selective_copy", {"n_copies": 2}, ". 4 . . 2 . ! . .", {7: "4", 8: "2"}),
    ("induction", {}, "4 2 ! 7 1 5 !", {6: "7"}),
    ("phonebook", {"n_digits": 2, "n_queries": 1}, "n0 4 1 n1 7 7 n0 _", {6: "4", 7: "1"}),
    (
        "niah_single_1",
        {"value_tokens": 2},
        "s0 s1 s2 ! k3 k8 is v4 v1 . s3 s4 ? k3 k8 _",
        {14: "v4", 15: "v1"},
    ),
    ("rebind", {}, "k3 v5 k1 v2 k3 v7 ? k3 . . ? k1", {7: "v7", 11: "v2"}),
    ("erase", {}, "k3 v5 k1 v2 k3 unbind ? k3 ? k1", {7: "none", 9: "v2"}),
    ("correction", {}, "k3 v5 k1 v2 . . k3 v7 . . ? k1 ? k3", {11: "v2", 13: "v7"}),
    ("partial_update", {}, "k3 v3 v5 k3 f0 v7 ? k3 .", {7: "v7", 8: "v5"}),
    ("accumulate", {}, "k3 +2 k1 +1 k3 +4 ? k3 ? k1", {7: "6", 9: "1"}),
    ("interference", {"n_keys": 2}, "k1 k7 k4 v3 k1 k2 k4 v8 ? k1 k2 k4", {11: "v8"}),
    ("capacity", {"n_queries": 1}, "k3 v5 k1 v2 k8 v5 ? k1", {7: "v2"}),
]


@pytest.mark.parametrize(("name", "params", "text", "answers"), EXAMPLES)
def test_examples_of_the_docstrings(name, params, text, answers):
    task = synthetic_tasks.get(name, **params)
    number = {task.token_name(token): token for token in range(task.vocab_size)}
    targets = task.solve(torch.tensor([[number[word] for word in text.split()]]))[0].tolist()
    assert {i: task.class_name(y) for i, y in enumerate(targets) if y != -100} == answers
