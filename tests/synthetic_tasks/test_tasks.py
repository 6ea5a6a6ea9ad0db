"""What holds for every task: shapes, ranges, purity, exact solvers, splits that never meet."""

import json
import pickle

import numpy as np
import pytest
import torch

import synthetic_tasks
from synthetic_tasks import SPLITS


def equal(a, b):
    return torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets)


def test_every_task_has_a_case(covered):
    assert covered == set(synthetic_tasks.names())


def test_samples_are_legal_and_the_solver_is_exact(case):
    task, length = case
    for split in SPLITS:
        batch = task.sample(96, length=length, seed=7, index=11, split=split)
        shape = (96, length) if task.tokens_per_position == 1 else (96, length, task.tokens_per_position)
        assert batch.tokens.shape == shape and batch.targets.shape == (96, length)
        assert batch.tokens.dtype == batch.targets.dtype == torch.int64
        assert batch.tokens.min() >= 0 and batch.tokens.max() < task.vocab_size
        scored = batch.targets[batch.targets != -100]
        assert scored.min() >= 0 and scored.max() < task.n_classes
        assert (batch.targets != -100).any(dim=1).all()
        assert torch.equal(task.solve(batch.tokens), batch.targets)


def test_row_i_is_the_sample_of_index_plus_i(case):
    task, length = case
    for split in SPLITS:
        whole = task.sample(40, length=length, seed=3, index=100, split=split)
        for i in (0, 1, 17, 39):
            one = task.sample(1, length=length, seed=3, index=100 + i, split=split)
            assert equal(one, type(one)(whole.tokens[i : i + 1], whole.targets[i : i + 1]))
        part = task.sample(23, length=length, seed=3, index=110, split=split)
        assert equal(part, type(part)(whole.tokens[10:33], whole.targets[10:33]))


def test_several_seeds_at_once_equal_one_by_one(case):
    task, length = case
    many = task.sample_seeds([4, 0, 4], 7, length=length, index=3, split="valid")
    for i, seed in enumerate((4, 0, 4)):
        assert equal(
            task.sample(7, length=length, seed=seed, index=3, split="valid"),
            type(many)(many[0][i], many[1][i]),
        )


def test_equal_tasks_have_equal_samples():
    one, other = (synthetic_tasks.get("mqar", power=power) for power in (1, 1.0))
    assert one == other and equal(one.sample(4, length=64), other.sample(4, length=64))


def test_large_batches_equal_small_ones():
    task = synthetic_tasks.get("rebind")
    whole = task.sample(1500, length=64)  # several blocks
    assert torch.equal(whole.tokens[1490:], task.sample(10, length=64, index=1490).tokens)


def test_seed_split_length_and_parameters_change_the_sample(case):
    task, length = case
    first = task.sample(16, length=length, seed=0)
    assert equal(first, task.sample(16, length=length, seed=0))
    assert not equal(first, task.sample(16, length=length, seed=1))
    assert not equal(first, task.sample(16, length=length, seed=0, split="test"))


def test_no_global_random_state_is_read_or_changed():
    task = synthetic_tasks.get("mqar")
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = task.sample(8, length=64)
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    torch.manual_seed(1)
    np.random.seed(1)
    assert equal(first, task.sample(8, length=64))


def contents(task, length, split, seeds, samples):
    found = set()
    for seed in seeds:
        tokens = task.sample(samples, length=length, seed=seed, split=split).tokens.numpy()
        found.update(row.tobytes() for row in tokens)
    return found


def test_splits_never_meet(case):
    task, length = case
    if task.is_exhaustible(length):
        pytest.fail("cases must be at partitioned lengths")
    train = contents(task, length, "train", range(4), 256)
    valid, test = (contents(task, length, split, range(4), 96) for split in ("valid", "test"))
    assert not train & test and not train & valid and not valid & test
    assert len(train) > 500 and len(test) > 150


def test_splits_never_meet_where_draws_collide():
    task = synthetic_tasks.get("parity")  # 2^20 sequences: 120,000 draws repeat thousands of them
    assert not task.is_exhaustible(20) and task.is_exhaustible(19)
    train, test = contents(task, 20, "train", range(2), 40_000), contents(task, 20, "test", range(2), 20_000)
    assert len(train) < 79_000 and not train & test
    assert contents(task, 20, "train", [5], 40_000) & train


def test_exhaustible_lengths_are_not_partitioned():
    task = synthetic_tasks.get("parity")
    assert contents(task, 6, "train", [0], 2000) == contents(task, 6, "test", [0], 2000)
    assert len(contents(task, 6, "train", [0], 2000)) == 64


def test_mqar_splits_by_the_set_of_pairs():
    task = synthetic_tasks.get("mqar", n_pairs=2, vocab_size=80)  # 1.2 million sets of pairs

    def pairs(split):
        tokens = task.sample(30_000, length=32, split=split).tokens
        return {frozenset(((a, b), (c, d))) for a, b, c, d in tokens[:, :4].tolist()}

    assert not pairs("train") & pairs("test")


def test_every_length_from_the_shortest_works(case):
    task, _ = case
    for i in range(4):
        length = task.min_length + i * task.length_step
        task.check_length(length)
        for split in SPLITS:
            batch = task.sample(8, length=length, split=split)
            assert torch.equal(task.solve(batch.tokens), batch.targets), length
        assert 0 < task.chance(length) <= 1
        assert task.legal_length(length) == length


def test_illegal_lengths_and_arguments(case):
    task, length = case
    wrong = [0, -1, task.min_length - 1]
    if task.length_step > 1:
        wrong.append(task.min_length + 1)
    if task.max_length is not None:
        wrong.append(task.max_length + task.length_step)
    for bad in wrong:
        with pytest.raises(
            ValueError, match=f"{task.name}: length {bad} is not legal .* legal: {task.min_length}"
        ):
            task.sample(1, length=bad)
    with pytest.raises(ValueError, match="split 'dev' is unknown; use one of train, valid, test"):
        task.sample(1, length=length, split="dev")
    with pytest.raises(ValueError, match="index >= 0, got 1 and -1"):
        task.sample(1, length=length, index=-1)


def test_parameters_are_complete_and_json_able_and_tasks_picklable(case):
    task, length = case
    params = json.loads(json.dumps(task.params))
    again = synthetic_tasks.get(task.name, **params)
    assert again == task == pickle.loads(pickle.dumps(task)) and hash(again) == hash(task)
    assert equal(again.sample(3, length=length), task.sample(3, length=length))


def test_names_of_tokens_and_classes_are_distinct(case):
    task, _ = case
    tokens = [task.token_name(token) for token in range(task.vocab_size)]
    classes = [task.class_name(label) for label in range(task.n_classes)]
    assert len(set(tokens)) == len(tokens) and len(set(classes)) == len(classes)


def test_documentation_has_all_sections(covered):
    for name in covered:
        text = synthetic_tasks.describe(name)
        for section in ("Definition:", "Tokens:", "Example:", "Scored:", "Source:", "Metric:", "Chance:"):
            assert section in text, (name, section)
        assert "Parameters:" in text


def test_unknown_names_list_the_near_ones():
    with pytest.raises(ValueError, match="unknown task 'partiy'; did you mean parity"):
        synthetic_tasks.get("partiy")
    with pytest.raises(ValueError, match="mqar: unknown parameter 'n_pair'; did you mean n_pairs"):
        synthetic_tasks.get("mqar", n_pair=3)
