"""Roles of positions and writes of keys, against small sequences read by eye and against the solver."""

import pytest
import torch

import synthetic_tasks
from synthetic_tasks import ROLES, roles, writes


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


def test_last_write_decides_the_answer():
    """With rebinds, the value at the last write of the asked key is the target."""
    task = synthetic_tasks.get("rebind")
    tokens, targets = task.sample(8, 64)
    wrote = writes(task, tokens)
    for row, place in (targets != -100).nonzero().tolist():
        mine = (wrote.sequence == row) & (wrote.position < place) & (wrote.key == tokens[row, place])
        last = wrote.position[mine][-1]
        assert tokens[row, last] == targets[row, place]
