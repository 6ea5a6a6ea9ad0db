import numpy as np
import polars as pl
import pytest
import torch

import synthetic_tasks
from arena.constructions import parity_model
from arena.dynamics import effects
from arena.dynamics.classes import token_classes
from arena.dynamics.intervene import Edit, parse_edit
from arena.model import ModelConfig, build_model

TASK = synthetic_tasks.get("parity", supervision="running")
LENGTH = 40


def measured(model, length=LENGTH, **options):
    return effects.measure_effects(model, TASK, length, n_sequences=64, **options)


def test_the_counter_is_found_and_confirmed():
    """Known answer: without reflection the counter can only tell whether there was a one."""
    table = measured(parity_model(counter=2).double())
    batch = TASK.sample(64, LENGTH, split="test")
    stuck = ((batch.tokens.cumsum(1) > 0) == batch.targets.bool()).double().mean().item()
    clamped = table.filter(pl.col("change") == "erase clamped to [0, 1]")
    (found,) = clamped.filter(role="identified").to_dicts()
    assert found["heads"] == "0.2" and found["baseline"] == 1
    assert found["accuracy"] == pytest.approx(stuck) and found["effect"] == pytest.approx(stuck - 1)
    assert found["low"] < found["effect"] < found["high"] < -0.4
    assert found["accuracy_low"] < 0.5 < found["accuracy_high"]
    (elsewhere,) = clamped.filter(role="elsewhere").to_dicts()
    assert (elsewhere["heads"], elsewhere["tokens"], elsewhere["effect"]) == ("0.2", "stays", 0)
    (control,) = clamped.filter(role="control").to_dicts()
    assert control["heads"] == "3 sets" and control["n_heads"] == 1
    assert control["effect"] == 0 == control["worst"] and control["low"] < 0 < control["high"]
    (contrast,) = clamped.filter(role="contrast").to_dicts()
    assert contrast["effect"] == pytest.approx(stuck - 1) and contrast["high"] < -0.4
    # where it clamps at all: at the ones for the counter; the idle heads have erase below 1, as the page says
    ones = TASK.sample(effects.LOOKED_AT, LENGTH, split="valid").tokens.double().mean().item()
    assert found["changed"] == pytest.approx(ones) and control["changed"] == 0 and contrast["changed"] is None
    single = clamped.filter(role="head").select("heads", "effect").rows()
    assert [heads for heads, effect in single if effect != 0] == ["0.2"]


def test_gates_of_the_counter_matter_and_others_do_not():
    table = measured(parity_model(counter=1).double())
    frozen = table.filter(pl.col("change").str.ends_with("its mean"), role="head")
    dropped = frozen.filter(pl.col("effect") < -0.3).select("gate", "heads").rows()
    # Written or erased by a constant, the counter's memory no longer tells the tokens apart. The output gate
    # is constant anyway, and this model has no decay.
    assert set(dropped) == {("erase", "0.1"), ("write", "0.1")}
    assert set(frozen["gate"]) == {"erase", "write", "output"}
    assert (frozen.filter(gate="output")["effect"] == 0).all()


def test_a_model_without_negative_eigenvalues_has_no_heads_to_identify():
    config = ModelConfig(arch="gdn", vocab_size=2, n_classes=2, d_model=16, n_layers=2, n_heads=2)
    table = measured(build_model(config, seed=0))
    assert set(table["role"]) == {"all", "head"} and set(table["gate"]) == {
        "decay",
        "erase",
        "write",
        "output",
    }
    assert not table["change"].str.contains("clamped").any()
    assert set(table.filter(role="head")["heads"]) == {"0.0", "0.1", "1.0", "1.1"}


@pytest.mark.parametrize("arch", ["attention", "slstm", "lstm", "mlstm"])
def test_other_architectures_have_the_gates_that_they_have(arch):
    config = ModelConfig(arch=arch, vocab_size=2, n_classes=2, d_model=16, n_layers=1, n_heads=2)
    table = effects.measure_effects(build_model(config, seed=0), TASK, 8, n_sequences=16)
    gates = {"attention": {"output"}}.get(arch, {"decay", "write", "output"})
    assert set(table["gate"]) == gates
    assert table["accuracy"].is_between(0, 1).all()


def test_interventions_that_are_asked_for():
    edit = parse_edit("erase:clamp:0:1@head=2@class=stays")
    table = measured(parity_model().double(), interventions=[effects.Intervention(edits=(edit,))])
    (row,) = table.to_dicts()
    assert (row["role"], row["heads"], row["tokens"], row["effect"]) == (
        "chosen",
        "2 of every layer",
        "stays",
        0,
    )
    wrong = effects.Intervention(edits=(Edit(gate="decay", action="zero"),))
    with pytest.raises(ValueError, match="has no decay gate; its gates: erase, write, output"):
        measured(parity_model().double(), interventions=[wrong])


def test_few_sequences_have_no_interval():
    table = effects.measure_effects(parity_model().double(), TASK, 20, n_sequences=9)
    assert table["effect"].null_count() == 0 and table["low"].null_count() == len(table)


def test_classes_follow_the_automaton():
    task = synthetic_tasks.get("s3")
    batch = task.sample(3, 12)
    classes = token_classes(task, batch.tokens, batch.targets)
    before = torch.cat([torch.zeros(3, 1, dtype=torch.int64), batch.targets[:, :-1]], 1)
    assert torch.equal(classes["moves"], batch.targets != before)
    assert torch.equal(classes["moves"], batch.tokens != 0)  # element 0 is the identity
    final = synthetic_tasks.get("parity")
    batch = final.sample(3, 12)
    assert torch.equal(token_classes(final, batch.tokens, batch.targets)["moves"], batch.tokens == 1)
    rebind = synthetic_tasks.get("rebind")
    batch = rebind.sample(3, 64)
    assert set(token_classes(rebind, batch.tokens, batch.targets)) == set(synthetic_tasks.ROLES)


@pytest.mark.parametrize("channels", [1, 5])
def test_least_eigenvalue(channels):
    rng = np.random.default_rng(0)
    k = rng.normal(size=(20, 5))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    decay, erase = rng.uniform(-1, 1, (20, channels)), rng.uniform(0, 2, (20, channels))
    expected = [
        np.linalg.eigvals(
            (np.eye(5) - np.outer(k_t, e_t * k_t)) @ np.diag(np.broadcast_to(d_t, 5))
        ).real.min()
        for k_t, d_t, e_t in zip(k, decay, erase, strict=True)
    ]
    found = effects.least_eigenvalue(*(torch.from_numpy(x)[:, None, None] for x in (k, decay, erase)))
    assert found[:, 0].numpy() == pytest.approx(expected)


def test_eigenvalues_of_the_counter():
    batch = TASK.sample(8, 20)
    classes = token_classes(TASK, batch.tokens, batch.targets)
    table = effects.head_eigenvalues(parity_model(counter=2).double(), batch.tokens, classes)
    counter = table.filter(head=2)
    found = dict(counter.select("tokens", "least_eigenvalue").iter_rows())
    assert found["moves"] == pytest.approx(-1) and found["stays"] == pytest.approx(1)
    assert effects.flipping_heads(table) == [(0, 2)]


def test_interval_of_a_mean():
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(200):
        low, high = effects.mean_interval(rng.random(40) < 0.3, least=0, seed=seed)
        covered += low <= 0.3 <= high
    assert 0.88 <= covered / 200 <= 0.99  # the percentile bootstrap covers a little less than its 95 %
    assert effects.mean_interval(np.zeros(9), least=0) is None
    low, high = effects.mean_interval(np.zeros(100), least=-1)
    assert high == -low == pytest.approx(1 - 0.025 ** (1 / 100))  # none of 100 differed
    one = np.zeros(100)
    one[3] = -0.01
    low, high = effects.mean_interval(one, least=-1)  # one differed, by little; another might by all
    assert high == -low == pytest.approx(0.0545, abs=1e-4)  # Clopper-Pearson for 1 of 100
    low, high = effects.mean_interval(np.ones(100), least=0)
    assert high == 1 and 0.96 < low < 0.97


def test_the_counter_of_a_signed_decay_is_found_and_confirmed():
    """mamba2-neg has no erase: what reflects its memory is the decay."""
    table = measured(parity_model(counter=1, arch="mamba2-neg").double())
    batch = TASK.sample(64, LENGTH, split="test")
    seen_one = batch.tokens.cumsum(1) > 0
    stuck = (seen_one == batch.targets.bool()).double().mean().item()
    clamped = table.filter(pl.col("change") == "decay clamped to [0, 1]")
    (found,) = clamped.filter(role="identified").to_dicts()
    assert found["heads"] == "0.1" and found["baseline"] == 1
    assert found["accuracy"] == pytest.approx(stuck)
    (elsewhere,) = clamped.filter(role="elsewhere").to_dicts()
    assert elsewhere["effect"] == 0
    (control,) = clamped.filter(role="control").to_dicts()
    assert control["heads"] == "3 sets" and control["effect"] == 0
    (contrast,) = clamped.filter(role="contrast").to_dicts()
    assert contrast["high"] < -0.4
    assert not table["change"].str.contains("erase").any()
