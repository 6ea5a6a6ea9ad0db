import pytest
import torch
from torch import nn

import synthetic_tasks
from arena.dynamics.fields import measure_fields, writes_of_fields
from arena.model import ModelConfig, build_model

TASK = synthetic_tasks.get("partial_update", n_keys=2, n_key_tokens=4, n_value_tokens=5, n_updates=3)


def test_writes_are_where_values_are_told():
    tokens = torch.tensor([[2, 8, 9, 1, 2, 0, 2, 12, 7, 0, 0, 0]])  # k0 v2 v3 | ? k0 . | k0 f1 v1 | blank
    here, key, field = writes_of_fields(TASK, tokens)
    assert here.int().tolist() == [[0, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0]]
    assert key[here].tolist() == [2, 2, 2] and field[here].tolist() == [0, 1, 1]


class Told(nn.Module):
    """A model whose key vectors are chosen: one a key, or one a key and field."""

    def __init__(self, with_field):
        super().__init__()
        self.with_field, self.blocks = with_field, [nn.Identity()]
        self.blocks[0].trace = lambda x, _: {"k": self.keys(x), "write": torch.ones(1)}

    def keys(self, tokens):
        _, key, field = writes_of_fields(TASK, tokens)
        number = key * 2 + field.clamp_min(0) if self.with_field else key * 2
        one = torch.nn.functional.one_hot(number, 2 * TASK.vocab_size).double()
        return torch.stack([one, torch.ones_like(one)], 2)  # a second head tells nothing apart

    def forward(self, tokens, state=None):
        return self.blocks[0](tokens), None


@pytest.mark.parametrize("with_field", [False, True])
def test_fields_in_the_key_are_told_from_fields_beside_it(with_field):
    told, blind = measure_fields(Told(with_field), TASK, 30).to_dicts()
    assert told["same_field"] == 1 and told["other_key"] == 0
    assert told["other_field"] == (0 if with_field else 1)
    assert blind["same_field"] == blind["other_field"] == blind["other_key"] == pytest.approx(1)


def test_a_real_model_and_another_task():
    config = ModelConfig(arch="gdn", vocab_size=TASK.vocab_size, n_classes=TASK.n_classes, n_layers=2)
    table = measure_fields(build_model(config, seed=0), TASK, 30)
    assert len(table) == 4 and table.null_count().sum_horizontal().item() == 0
    rebind = synthetic_tasks.get("rebind")
    assert measure_fields(build_model(config, seed=0), rebind, 32).is_empty()
