"""Roles of positions and writes of keys, against small sequences read by eye and against the solver."""

import pytest
import torch

import synthetic_tasks
from synthetic_tasks import ROLES, asks, roles, writes


def read(name, text, targets, **params):
    """Roles of a sequence given by token names; `targets` is a string with x where something is scored."""
    task = synthetic_tasks.get(name, **params)
    number = {task.token_name(token): token for token in range(task.vocab_size)}
    tokens = torch.tensor([[number[word] for word in text.split()]])
    scored = torch.tensor([[0 if mark == "x" else -100 for mark in targets]])
    found = roles(task, tokens, scored)[0].tolist()
    return "".join(ROLES[role][0] for role in found), task, tokens


def test_memory_editing():
    found, task, tokens = read("rebind", "k3 v5 k1 v2 k3 v7 ? k3 . . ? k1", "-------x---x")
    assert found == "ccccccqsddqs"
    found = writes(task, tokens)
    assert found.position.tolist() == [1, 3, 5]
    assert found.key[0] == found.key[2] != found.key[1]


def test_multi_token_keys():
    text = "k1 k7 v3 k1 k2 v8 . . . ? k1 k7"
    found, task, tokens = read("interference", text, "-----------x", key_tokens=2)
    assert found == "ccccccdddqqs"
    found = writes(task, tokens)
    assert found.position.tolist() == [2, 5] and found.key[0] != found.key[1]
    targets = torch.full_like(tokens, -100)
    targets[0, 11] = 0
    asked = asks(task, tokens, targets)
    assert asked.position.tolist() == [11] and asked.key[0] == found.key[0]


@pytest.mark.parametrize(
    ("name", "params", "length"),
    [("mqar", {"n_pairs": 4, "filler": "noise", "vocab_size": 64}, 40), ("mqar_stacked", {"n_pairs": 4}, 20)],
)
def test_mqar_everything_after_the_context_is_query_or_filler(name, params, length):
    task = synthetic_tasks.get(name, **params)
    batch = task.sample(4, length)
    found = roles(task, *batch)
    context = 8 if name == "mqar" else 4
    assert (found[:, :context] == ROLES.index("content")).all()
    assert ((found[:, context:] == ROLES.index("scored")).sum(1) == 4).all()
    assert ((found[:, context:] == ROLES.index("distractor")).sum(1) == length - context - 4).all()
    wrote = writes(task, batch.tokens)
    assert wrote.position.view(4, 4)[0].tolist() == ([1, 3, 5, 7] if name == "mqar" else [0, 1, 2, 3])


def test_needle_and_state_tracking():
    task = synthetic_tasks.get("niah_single_1")
    batch = task.sample(2, 60)
    names = [[task.token_name(token) for token in row] for row in batch.tokens.tolist()]
    for row, line in zip(roles(task, *batch).tolist(), names, strict=True):
        for role, name in zip(row, line, strict=True):
            assert (ROLES[role] == "distractor") == (name[0] == "s")
        assert ROLES[row[line.index("?")]] == "query"
    found, _, _ = read("cycle_navigation", ". + - .", "---x")
    assert found == "cccs"
    assert writes(task, batch.tokens) is None


def test_every_task_has_roles(case):
    task, length = case
    batch = task.sample(3, length)
    found = roles(task, *batch)
    assert ((found == ROLES.index("scored")) == (batch.targets != -100)).all()
    wrote = writes(task, batch.tokens)
    if wrote is not None:
        assert (wrote.position < length).all() and len(wrote.key) > 0


@pytest.mark.parametrize("name", ["rebind", "correction", "interference", "capacity", "mqar", "mqar_stacked"])
def test_last_write_of_the_asked_key_holds_the_answer(name):
    task = synthetic_tasks.get(name)
    tokens, targets = task.sample(8, task.legal_length(64))
    values = tokens if tokens.dim() == 2 else tokens[..., 1]
    wrote, asked = writes(task, tokens), asks(task, tokens, targets)
    assert len(asked.key) == (targets != -100).sum()
    for row, place, key in zip(*(x.tolist() for x in asked), strict=True):
        mine = (wrote.sequence == row) & (wrote.position < place) & (wrote.key == key)
        assert values[row, wrote.position[mine][-1]] == targets[row, place]


def test_every_field_of_partial_update_asks_for_the_key():
    task = synthetic_tasks.get("partial_update", n_fields=3)
    tokens, targets = task.sample(4, task.legal_length(64))
    asked = asks(task, tokens, targets)
    for row, place, key in zip(*(x.tolist() for x in asked), strict=True):
        assert tokens[row, place - place % 4 + 1] == key
