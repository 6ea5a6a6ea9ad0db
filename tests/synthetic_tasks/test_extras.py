"""What single tasks offer beside targets: stale values, field states, decoder targets."""

import pytest

import synthetic_tasks


def test_compression_for_a_decoder_head_gives_the_tokens():
    task = synthetic_tasks.get("compression", compat="mad")
    batch = task.sample(4, length=32)
    assert task.needs_decoder and (batch.tokens == batch.targets).all()
    assert (batch.tokens[:, -1] == task.n_symbols).all() and (batch.tokens[:, :-1] < task.n_symbols).all()
    assert not synthetic_tasks.get("compression").needs_decoder


def test_mqar_in_compatibility_mode_with_noise_answers_all_that_is_scored():
    task = synthetic_tasks.get("mqar", compat="zoology", filler="noise", vocab_size=64)
    batch = task.sample(200, length=128)
    answers = task.solve(batch.tokens)
    scored = batch.targets != -100
    assert (answers[scored] == batch.targets[scored]).all()
    assert (answers[~scored] != -100).any()  # fillers that equal a key: the published defect


@pytest.mark.parametrize("name", ["rebind", "erase", "correction"])
def test_stale_values_are_the_previous_ones(name):
    task = synthetic_tasks.get(name)
    tokens = task.sample(50, length=64).tokens
    stale = task.stale(tokens)
    for row, old in zip(tokens.tolist(), stale.tolist(), strict=True):
        history = {}
        for i in range(0, 64, 2):
            if row[i] == 1:
                writes = history[row[i + 1]]
                assert old[i + 1] == (writes[-2] if len(writes) > 1 else -100)
            else:
                assert old[i + 1] == -100
                if row[i] > 1:
                    history.setdefault(row[i], []).append(row[i + 1])


def test_partial_update_tells_protected_fields_apart():
    task = synthetic_tasks.get("partial_update", n_keys=2)
    batch = task.sample(100, length=60)
    state = task.field_state(batch.tokens)
    assert ((state == -100) == (batch.targets == -100)).all()
    for row, states in zip(batch.tokens.tolist(), state.tolist(), strict=True):
        touched = {}
        for i in range(0, 60, 3):
            name = task.token_name(row[i + 1])
            if row[i] == 1:
                fields = touched.get(row[i + 1], set())
                want = [1 if f in fields else 2 if fields else 0 for f in ("f0", "f1")]
                assert states[i + 1 : i + 3] == want
            elif name[0] == "f":
                touched.setdefault(row[i], set()).add(name)
