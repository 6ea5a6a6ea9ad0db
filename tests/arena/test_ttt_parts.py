"""What ttt_e2e refuses, and the parts that it is made of."""

import math

import pytest
import torch

import synthetic_tasks
from arena.blocks import build_block
from arena.blocks.outer import ShortConv
from arena.dynamics.hooks import gates_of, hooked
from arena.inner_loop import inner_step
from arena.model import ModelConfig, build_model, parse_arch
from arena.training import Replica, TrainConfig, train_fleet


@pytest.mark.parametrize("kind", ["static", "dynamic-lowrank", "dynamic-headwise", "gate", "none"])
def test_composed_convolution(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        conv = ShortConv(kind, 8, [8, 16, 8], bias=True).double()
        for parameter in conv.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
        x, h = torch.randn(2, 5, 32).double().requires_grad_(), torch.randn(2, 5, 8).double().requires_grad_()
        state = torch.randn(2, conv.rows, 32).double().requires_grad_() if conv.rows else None
    inputs = [x, h, *([] if state is None else [state])]
    expected, rows = conv(x, h, state)
    conv.composed = True
    for start in (state, None):
        conv.composed = False
        expected, rows = conv(x, h, start)
        conv.composed = True
        y, new = conv(x, h, start)
        torch.testing.assert_close(y, expected)
        assert rows is None if new is None else torch.equal(new, rows)
    assert torch.autograd.gradgradcheck(lambda *given: conv(*given[:2], *(given[2:] or [None]))[0], inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 3}, "window must be at least mini_batch"),
        ({"mini_batch": -1}, "mini_batch"),
        ({"mini_batch": 2.5}, "mini_batch.*an integer"),
        ({"window": 0, "mini_batch": 0}, "window"),
        ({"updated_share": 0.0}, "updated_share"),
        ({"updated_share": 1.5}, "updated_share"),
        ({"inner_lr": -1.0}, "inner_lr"),
        ({"inner_lr": math.nan}, "inner_lr"),
        ({"inner_warmup": 2.0}, "inner_warmup"),
        ({"inner_clip": 0.0}, "inner_clip"),
        ({"next_token_head": "other"}, "next_token_head"),
        ({"next_token_head": "task"}, "classes are its tokens"),
        ({"next_token_weight": -1.0}, "next_token_weight"),
        ({"naive": True}, "untrained head"),
        ({"naive": True, "mini_batch": 0}, "naive updates at test"),
        ({"rope_theta": 1.0}, "rope_theta"),
        ({"windoww": 3}, "did you mean window"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build_model(
            ModelConfig(arch="ttt_e2e", vocab_size=9, n_classes=7, d_model=8, options=options), seed=0
        )


@pytest.mark.parametrize("fields", [{"experts": 4}, {"conv_on": "all", "conv": "static"}])
def test_what_it_has_not(fields):
    with pytest.raises(ValueError, match="neither experts nor conv_on"):
        build_model(ModelConfig(arch="ttt_e2e", vocab_size=9, n_classes=7, **fields), seed=0)


def test_it_is_a_model_and_no_block():
    assert parse_arch("ttt_e2e", 3) == ["ttt_e2e"] * 3
    with pytest.raises(ValueError, match=r"whole model.*build_model"):
        build_block("ttt_e2e", d_model=8, n_heads=2)
    with pytest.raises(ValueError, match=r"can't be part of 'ttt_e2e\+gdn'"):
        parse_arch("ttt_e2e+gdn", 2)


def test_inner_step_has_first_derivatives_only():
    w, x = torch.ones(1, 1, requires_grad=True), torch.ones(1, 1, requires_grad=True)
    losses, (new,), outputs = inner_step(
        lambda fast, x: (((fast[0] * x - 3) ** 2).sum(1), (fast[0] + x,)),
        (w,),
        torch.tensor(0.25),
        math.inf,
        x,
    )
    assert (losses.item(), new.item(), outputs[0].item()) == (4.0, 2.0, 2.0)
    # w' = w - lr 2 x (w x - 3): its slope in w is 1 - 2 lr x^2, in x -2 lr (2 w x - 3)
    assert [g.item() for g in torch.autograd.grad(new.sum(), [w, x], retain_graph=True)] == [0.5, 0.5]
    with pytest.raises(NotImplementedError, match="first derivatives"):
        torch.autograd.grad(new.sum(), w, create_graph=True)


def test_interventions_do_not_reach_into_the_inner_loop():
    config = ModelConfig(arch="ttt_e2e", vocab_size=9, n_classes=7, d_model=8, options={"mini_batch": 4})
    model = build_model(config, seed=0)
    assert [gates_of(block) for block in model.blocks] == [["output"], []]
    x = torch.randint(0, 9, (2, 11), generator=torch.Generator().manual_seed(0))
    seen = []

    def shut(layer, values, start):
        seen.append((layer, start))
        return {name: torch.zeros_like(value) for name, value in values.items()}

    with hooked(model, shut):
        first, state = model(x[:, :6])
        second, _ = model(x[:, 6:], state)
        assert seen == [(0, 0), (0, 6)]
        torch.testing.assert_close(torch.cat([first, second], 1), model(x)[0])
    assert not torch.allclose(first, model(x)[0][:, :6])


def test_updates_make_a_lookup_table_of_what_attention_cannot_see():
    """Recall beyond the window, which the same model does not learn without updates or meta-learning."""
    task = synthetic_tasks.get("in_context_recall", vocab_size=8)
    lengths = {"train_lengths": (31, 31), "valid_lengths": (31,), "eval_lengths": (63,)}
    config = TrainConfig(steps=50, batch_size=16, eval_examples=64, **lengths)

    def trained(**options):
        options = {"mini_batch": 4, "window": 4, "next_token_head": "task", **options}
        sizes = {"vocab_size": task.vocab_size, "n_classes": task.n_classes, "d_model": 16, "n_layers": 1}
        model = ModelConfig(arch="ttt_e2e", **sizes, options=options)
        [result] = train_fleet(model, task, config, [Replica(seed=0, lr=1e-2)])
        found = build_model(model, seed=0)
        found.load_state_dict(result.state_dict)
        scores = {row["metric"]: row["value"] for row in result.final if row["split"] == "test"}
        return scores["accuracy"], found.eval()

    (off, _), (naive, _), (best, model) = trained(mini_batch=0), trained(naive=True), trained()
    assert best > max(off, naive) + 0.2
    trace = model.trace(task.sample(64, 63).tokens)[-1]
    before, after = (trace[f"inner_loss_{when}"].mean(0) for when in ("before", "after"))
    assert (after < before).all()  # a step gains on its own mini-batch
    assert before[-4:].mean() < before[:2].mean() - 0.1  # and on those to come
