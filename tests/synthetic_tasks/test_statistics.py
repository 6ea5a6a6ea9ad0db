"""Distributions: the random numbers, and the compatibility modes against plain generators.

All samples are fixed, so a test either always passes or always fails; p-values below 1e-4 fail.
"""

import math
import random
import re
from collections import Counter

import numpy as np
import pytest
import torch

import synthetic_tasks
from synthetic_tasks.recall import keep_distinct
from synthetic_tasks.rng import Rows, power_slowness

LEVEL = 1e-4


def p_value(observed, expected):
    """Chi-square goodness of fit; cells expected below 5 are pooled."""
    observed, expected = np.asarray(observed, float), np.asarray(expected, float)
    order = np.argsort(expected)
    small = order[np.cumsum(expected[order]) < 5]
    if small.size:
        small = order[: small.size + 1]
        keep = np.setdiff1d(np.arange(len(expected)), small)
        observed = np.append(observed[keep], observed[small].sum())
        expected = np.append(expected[keep], expected[small].sum())
    statistic = ((observed - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2), torch.tensor(statistic / 2)).item()


def same_law(left, right):
    """p-value of two samples (sequences of hashables) having one law."""
    a, b = Counter(left), Counter(right)
    cells = [c for c in a | b if a[c] + b[c] >= 10]
    n, m = sum(a[c] for c in cells), sum(b[c] for c in cells)
    statistic = sum((a[c] * (m / n) ** 0.5 - b[c] * (n / m) ** 0.5) ** 2 / (a[c] + b[c]) for c in cells)
    return torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2), torch.tensor(statistic / 2)).item()


def rows(n, key=1):
    return Rows.of(np.full(n, key, np.uint64), np.arange(n), np.zeros(n, np.int64))


def test_the_chi_square_itself_can_fail():
    assert p_value([1000, 1000, 1300], [1100] * 3) < LEVEL < p_value([1090, 1120, 1090], [1100] * 3)
    assert same_law([0] * 500 + [1] * 500, [0] * 600 + [1] * 400) < LEVEL


@pytest.mark.parametrize("bound", [2, 3, 10, 63])
def test_below_is_uniform_along_positions_rows_and_pairs(bound):
    draws = rows(2000).below(bound, 0, 60)
    flat = draws.size / bound
    assert p_value(np.bincount(draws.ravel(), minlength=bound), np.full(bound, flat)) > LEVEL
    for left, right in (
        (draws[:, :-1], draws[:, 1:]),
        (draws[:-1], draws[1:]),
        (draws[:, :30], draws[:, 30:]),
    ):
        pairs = np.bincount((left * bound + right).ravel(), minlength=bound**2)
        assert p_value(pairs, np.full(bound**2, left.size / bound**2)) > LEVEL
    streams = draws * bound + rows(2000).below(bound, 1, 60)
    assert p_value(np.bincount(streams.ravel(), minlength=bound**2), np.full(bound**2, flat / bound)) > LEVEL


def test_every_bit_of_the_words_is_fair():
    words = rows(4000).words(0, 8).ravel()
    for bit in range(64):
        ones = int(((words >> np.uint64(bit)) & np.uint64(1)).sum())
        assert abs(ones - len(words) / 2) < 4.5 * (len(words) / 4) ** 0.5


@pytest.mark.parametrize(("bound", "n"), [(5, 3), (20, 2), (200, 2), (13, 3)])
def test_distinct_draws_are_uniform_over_ordered_selections(bound, n):
    draws = np.concatenate([rows(30_000, key).distinct(bound, 0, n) for key in range(4)])
    assert keep_distinct(draws).all() and draws.min() >= 0 and draws.max() < bound
    codes = (draws * bound ** np.arange(n)).sum(axis=1)
    legal = np.prod([bound - i for i in range(n)])
    observed = np.unique(codes, return_counts=True)[1]
    assert p_value(np.pad(observed, (0, legal - len(observed))), np.full(legal, len(draws) / legal)) > LEVEL


@pytest.mark.parametrize(("bound", "n"), [(4095, 256), (4096, 300), (4095, 4), (300, 40)])
def test_distinct_draws_of_many(bound, n):
    """Both ways of drawing again, by sorting and by owner, leave no duplicate and prefer no number."""
    draws = rows(1500).distinct(bound, 0, n)
    assert keep_distinct(draws).all() and draws.min() >= 0 and draws.max() < bound
    assert p_value(np.bincount(draws.ravel(), minlength=bound), np.full(bound, draws.size / bound)) > LEVEL
    halves = np.bincount((draws * 16 // bound + 16 * (np.arange(n) >= n // 2)).ravel(), minlength=32)
    share = np.bincount(np.arange(bound) * 16 // bound, minlength=16) / bound
    expected = np.concatenate([share * 1500 * (n // 2), share * 1500 * (n - n // 2)])
    assert p_value(halves, expected) > LEVEL


def test_order_is_a_uniform_permutation():
    orders = np.concatenate([rows(20_000, key).order(0, 4) for key in range(3)])
    codes = Counter(map(tuple, orders.tolist()))
    assert len(codes) == 24 and p_value(list(codes.values()), [len(orders) / 24] * 24) > LEVEL


def test_race_is_successive_weighted_sampling():
    """Exact probabilities of every ordered triple of 6 slots with weights 1/slot^0.99."""
    weight = np.arange(1, 7) ** -0.99
    draws = np.concatenate([rows(40_000, key).race(power_slowness(6, "0.99"), 0, 3) for key in range(4)])
    counts = Counter(map(tuple, draws.tolist()))
    expected, observed = [], []
    for a in range(6):
        for b in set(range(6)) - {a}:
            for c in set(range(6)) - {a, b}:
                rest = weight.sum()
                p = weight[a] / rest * weight[b] / (rest - weight[a])
                p *= weight[c] / (rest - weight[a] - weight[b])
                expected.append(p * len(draws))
                observed.append(counts[a, b, c])
    assert sum(observed) == len(draws) and p_value(observed, expected) > LEVEL


def zoology(rng, length, pairs, vocab, power=0.01):
    """One plain MQAR example after the public definition, fillers off; slots in the order drawn."""
    half = vocab // 2
    keys = rng.choice(np.arange(1, half), pairs, replace=False)
    values = rng.choice(np.arange(half, vocab), pairs, replace=False)
    space = (length - 2 * pairs) // 2
    weight = np.arange(1, space + 1) ** (power - 1.0)
    slots = rng.choice(space, pairs, replace=False, p=weight / weight.sum())
    tokens, targets = np.zeros(length, np.int64), np.full(length, -100)
    tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2] = keys, values
    tokens[2 * pairs + 2 * slots], targets[2 * pairs + 2 * slots] = keys, values
    return tokens, targets, slots


def slots_of_keys(tokens, pairs):
    """The slot in which each key, in context order, is asked: int64 [N,pairs]."""
    keys, region = tokens[:, : 2 * pairs : 2], tokens[:, 2 * pairs :: 2]
    return (region[:, None] == keys[:, :, None]).argmax(axis=2)


@pytest.mark.parametrize(("length", "pairs"), [(64, 4), (32, 6)])
def test_mqar_compatibility_mode_has_the_public_slot_law(length, pairs):
    rng = np.random.default_rng(0)
    plain = np.array([zoology(rng, length, pairs, 64)[2] for _ in range(6000)])
    task = synthetic_tasks.get("mqar", n_pairs=pairs, vocab_size=64, compat="zoology")
    ours = slots_of_keys(task.sample(12_000, length=length).tokens.numpy(), pairs)
    for key in range(pairs):  # the i-th key takes the i-th slot drawn: the order leak is part of the law
        assert same_law(plain[:, key].tolist(), ours[:, key].tolist()) > LEVEL
    assert (
        same_law(map(tuple, np.sort(plain)[:, :2].tolist()), map(tuple, np.sort(ours)[:, :2].tolist()))
        > LEVEL
    )


def test_mqar_first_slot_probability_is_the_published_one():
    task = synthetic_tasks.get("mqar", n_pairs=1, vocab_size=64, compat="zoology")
    weight = np.arange(1, 29) ** -0.99  # 28 slots, as at 64/4
    slots = slots_of_keys(task.sample(20_000, length=58).tokens.numpy(), 1)[:, 0]
    assert p_value(np.bincount(slots, minlength=28), weight / weight.sum() * len(slots)) > LEVEL
    assert abs((slots == 0).mean() - 0.25) < 0.012


@pytest.mark.parametrize("length", [64, 80])  # all slots filled; some left over
@pytest.mark.parametrize(("compat", "leaks"), [("zoology", True), ("none", False)])
def test_mqar_order_leak_is_off_by_default(compat, leaks, length):
    task = synthetic_tasks.get("mqar", n_pairs=16, vocab_size=128, compat=compat)
    slots = slots_of_keys(task.sample(4000, length=length).tokens.numpy(), 16)
    right = (np.argsort(slots, axis=1) == np.arange(16)).mean()  # the n-th query asks for the n-th pair
    assert (right > 1.3 / 16) if leaks else abs(right - 1 / 16) < 0.004


def test_mqar_noise_never_equals_a_key_unless_asked():
    for compat, clean in (("none", True), ("zoology", False)):
        task = synthetic_tasks.get("mqar", n_pairs=16, vocab_size=256, filler="noise", compat=compat)
        tokens, targets = (x.numpy() for x in task.sample(300, length=256))
        keys = np.zeros((300, 256), bool)
        np.put_along_axis(keys, tokens[:, :32:2], True, axis=1)
        collides = np.take_along_axis(keys, tokens, axis=1)[:, 32:] & (targets[:, 32:] == -100)
        assert collides.any() != clean
        if clean:
            filler = tokens[:, 32:][targets[:, 32:] == -100]
            assert (
                p_value(np.bincount(filler, minlength=256)[128:], np.full(128, (filler > 127).sum() / 128))
                > LEVEL
            )


def test_mqar_keys_and_values_are_uniform():
    tokens = synthetic_tasks.get("mqar", n_pairs=4, vocab_size=32).sample(8000, length=32).tokens.numpy()
    assert p_value(np.bincount(tokens[:, :8:2].ravel(), minlength=16)[1:16], np.full(15, 32_000 / 15)) > LEVEL
    assert p_value(np.bincount(tokens[:, 1:8:2].ravel())[16:], np.full(16, 2000)) > LEVEL


def expression(rng, length, ops):
    """A plain recursive form of the bracketed grammar of Deletang et al."""
    digit = str(rng.randrange(5))
    if length <= 4:
        return ["", digit, "-" + digit, f"({digit})", f"(-{digit})"][length]
    left = rng.randint(1, length - 4)
    return f"({expression(rng, left, ops)}{rng.choice(ops)}{expression(rng, length - left - 3, ops)})"


@pytest.mark.parametrize("product", [False, True])
@pytest.mark.parametrize("length", [6, 8, 11])
def test_bracketed_expressions_have_the_public_law(product, length):
    rng = random.Random(0)
    plain = [expression(rng, length, "+-*" if product else "+-") for _ in range(8000)]
    task = synthetic_tasks.get("mod_arithmetic_brackets", product=product)
    batch = task.sample(8000, length=length + 1)
    ours = ["".join(task.token_name(x) for x in row[:-1]) for row in batch.tokens.tolist()]

    def shape(text):
        return "".join("d" if c.isdigit() else "o" if c in "+*" else c for c in text)

    assert same_law(map(shape, plain), map(shape, ours)) > LEVEL
    values = Counter(eval(text) % 5 for text in plain)
    labels = Counter(batch.targets[:, -1].tolist())
    assert same_law(values.elements(), labels.elements()) > LEVEL
    assert abs(task.chance(length + 1) - max(values.values()) / 8000) < 0.02


def dyck_walk(rng, length, depth_limit):
    depth, text = 0, ""
    for t in range(length):
        if depth == 0:
            up = True
        elif depth in (depth_limit, length - t):
            up = False
        else:
            up = rng.random() < 0.5
        depth, text = depth + (1 if up else -1), text + ("(" if up else ")")
    return text


def test_dyck_walks_have_the_stated_law():
    rng = random.Random(0)
    task = synthetic_tasks.get("dyck", n_kinds=1, max_depth=3)
    ours = ["".join(map(task.token_name, row)) for row in task.sample(8000, length=10).tokens.tolist()]
    assert same_law([dyck_walk(rng, 10, 3) for _ in range(8000)], ours) > LEVEL


def test_mad_recall_scores_as_many_positions_as_published():
    for name, want in (("in_context_recall", 56), ("noisy_recall", 43)):
        scored = (synthetic_tasks.get(name).sample(4000, length=127).targets != -100).sum().item() / 4000
        assert abs(scored - want) < 1.0, (name, scored)


def test_mad_fuzzy_recall_scores_and_pads_as_published():
    task = synthetic_tasks.get("fuzzy_recall", vocab_size=16, compat="mad")  # 7 keys, 8 values, padding 15
    tokens, targets = task.sample(4000, length=128)
    assert abs((targets != -100).sum().item() / 4000 - 4.4) < 0.15
    assert abs((tokens == 15).sum().item() / 4000 - 5) < 0.2
    begin = (tokens == 15).sum(1, keepdim=True)
    assert (tokens.gather(1, begin + torch.arange(3)) < 7).all() and task.chance(128) == 1 / 8


def test_binary_addition_draws_each_number_uniformly_over_those_that_are_not_zero():
    task = synthetic_tasks.get("binary_addition")
    read = task.sample(9000, length=10).tokens[:, :5].tolist()
    seen = Counter(map(tuple, read))
    pairs = {1: 7, 2: 9, 3: 7}  # place of the plus -> pairs of numbers
    assert len(seen) == 23
    want = [9000 / 3 / pairs[row.index(2)] for row in seen]
    assert p_value(list(seen.values()), want) > LEVEL


def test_stack_begins_with_one_to_all_but_one_of_the_tokens():
    read = synthetic_tasks.get("stack").sample(6000, length=21).tokens.numpy()[:, :10]
    filled = (np.cumsum(read >= 2, axis=1) == 0).sum(axis=1)
    assert p_value(np.bincount(filled, minlength=11)[1:10], [6000 / 9] * 9) > LEVEL
    assert filled.max() == 9


def test_mad_noise_slots_and_keys():
    task = synthetic_tasks.get("noisy_recall", noise_fraction=0.4)
    tokens = task.sample(2000, length=65).tokens.numpy()[:, :-1].reshape(2000, 32, 2)
    noisy = tokens[:, :, 0] >= 16
    assert (noisy == (tokens[:, :, 1] >= 16)).all()
    share = 0.4 * 32 / 33  # one of the 32 slots and the probe's is never noise
    assert p_value([noisy.sum(), (~noisy).sum()], [share * noisy.size, (1 - share) * noisy.size]) > LEVEL
    keys = tokens[:, :, 0][~noisy]
    assert p_value(np.bincount(keys, minlength=8), np.full(8, keys.size / 8)) > LEVEL
    noise = tokens[noisy].ravel() - 16
    assert p_value(np.bincount(noise, minlength=16), np.full(16, noise.size / 16)) > LEVEL


def test_mad_motifs_are_uniform_ordered_selections_and_lengths_uniform():
    task = synthetic_tasks.get("fuzzy_recall", vocab_size=9, compat="mad", key_length="varied")
    keys, sizes = Counter(), Counter()
    for row in task.sample(1500, length=64).tokens.tolist():
        text = "".join(map(str, row)).replace("8", "")
        for motif in re.findall("([0-3]+)[4-7]+", text)[
            :4
        ]:  # a fixed number of pairs: no bias by their length
            keys[motif] += 1
            sizes[len(motif)] += 1
    assert p_value([sizes[i] for i in (1, 2, 3)], [sizes.total() / 3] * 3) > LEVEL
    for size, count in ((1, 4), (2, 12), (3, 24)):
        seen = [n for motif, n in keys.items() if len(motif) == size]
        assert len(seen) == count and p_value(seen, [sum(seen) / count] * count) > LEVEL


def test_selective_copy_places():
    task = synthetic_tasks.get("selective_copy", n_copies=2)
    place = (task.sample(6000, length=13).tokens.numpy()[:, :10] < 14).nonzero()[1].reshape(-1, 2)
    codes = Counter(map(tuple, place.tolist()))
    assert len(codes) == 45 and p_value(list(codes.values()), [6000 / 45] * 45) > LEVEL
    mad = synthetic_tasks.get("selective_copy", n_copies=2, compat="mad").sample(500, length=13).tokens
    assert (mad[:, 9] < 14).all() and (task.sample(500, length=13).tokens[:, 9] >= 14).any()
    # Each of the 8 blanks goes before one of the two symbols: a binomial number before the first.
    mad = synthetic_tasks.get("selective_copy", n_copies=2, compat="mad").sample(6000, length=13).tokens
    first = (mad[:, :10] < 14).numpy().argmax(axis=1)
    assert p_value(np.bincount(first, minlength=9), [6000 * math.comb(8, i) / 2**8 for i in range(9)]) > LEVEL


def test_variable_keys_have_uniform_lengths_where_there_is_room():
    task = synthetic_tasks.get("variable_key_mqar", n_pairs=1, n_key_tokens=300)
    first = task.sample(6000, length=16).tokens.numpy()[:, 0] - 1
    assert p_value(np.bincount(first % 3), [2000] * 3) > LEVEL


def test_bits_moves_digits_and_elements_are_uniform():
    for name, params, length, tokens in (
        ("parity", {}, 40, 2),
        ("even_pairs", {}, 40, 2),
        ("cycle_navigation", {}, 40, 3),
        ("s3", {}, 40, 6),
        ("s5", {}, 40, 120),
        ("majority", {"ties": "first"}, 40, 63),
    ):
        sample = synthetic_tasks.get(name, **params).sample(3000, length=length).tokens.numpy()
        assert (
            p_value(np.bincount(sample.ravel(), minlength=tokens), np.full(tokens, sample.size / tokens))
            > LEVEL
        )
    sample = synthetic_tasks.get("mod_arithmetic").sample(3000, length=40).tokens.numpy()
    assert p_value(np.bincount(sample[:, 1:-1:2].ravel(), minlength=3), [19_000] * 3) > LEVEL
    assert p_value(np.bincount(sample[:, :-1:2].ravel())[4:], [12_000] * 5) > LEVEL


def test_splits_hold_six_one_and_one_eighth_of_the_sequences():
    task = synthetic_tasks.get("parity")
    draw = task._generate(rows(24_000), 40)
    counts = [int(task._belongs(draw, split).sum()) for split in synthetic_tasks.SPLITS]
    assert p_value(counts, [18_000, 3000, 3000]) > LEVEL


def test_needles_stand_anywhere_or_at_the_wanted_depth():
    task = synthetic_tasks.get("niah_single_2")
    start = (task.sample(4000, length=40).tokens.numpy() == 1).argmax(axis=1)
    last = 40 - 6 - 9
    assert p_value(np.bincount(start, minlength=last + 1), [4000 / (last + 1)] * (last + 1)) > LEVEL
    for percent, place in ((0, 0), (100, last), (40, 10)):
        deep = synthetic_tasks.get("niah_single_2", depth_percent=percent).sample(50, length=40)
        assert ((deep.tokens == 1).int().argmax(dim=1) == place).all()


def test_queries_keep_their_lag():
    task = synthetic_tasks.get("rebind", lag=6, n_rebinds=6, n_queries=6)
    for row in task.sample(300, length=80).tokens.tolist():
        written = {}
        for slot in range(40):
            left, right = row[2 * slot], row[2 * slot + 1]
            if left == 1:
                assert slot - written[right] >= 6
            elif left:
                written[left] = slot
