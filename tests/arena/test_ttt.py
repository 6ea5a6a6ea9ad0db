"""TTT-E2E against its reference: outputs, outer gradients, causality, controls, state, fleet."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, stack_module_state, vmap
from ttt_reference import swiglu, ttt_reference

from arena.memory import TRACE_FIELDS
from arena.model import Model, ModelConfig, build_model, model_params

V, B, T = 9, 2, 14


def make(*, seed=0, dtype=torch.float64, **changes) -> Model:
    """A model whose weights are all away from zero, so that nothing is hidden by an initialisation."""
    options = {"mini_batch": 4, "window": 5, **changes.pop("options", {})}
    sizes = {"arch": "ttt_e2e", "vocab_size": V, "n_classes": 7, "d_model": 8, "n_layers": 3}
    model = build_model(ModelConfig(**{**sizes, **changes}, options=options), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def draw(*shape, seed=0):
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(seed))


def objective(logits):
    """A smooth function of all logits, none like the other."""
    weights = torch.linspace(0.5, 1.5, logits.numel(), dtype=logits.dtype).view(logits.shape)
    return (weights * logits.sin()).sum()


CASES = {
    "common": {},
    "official": {"outer": "official"},
    "two updated": {"options": {"updated_share": 0.7}},
    "all updated, official": {"outer": "official", "options": {"updated_share": 1.0, "mini_batch": 5}},
    "not clipped": {"options": {"inner_clip": math.inf, "inner_lr": 0.5}},
    "hard clip": {"options": {"inner_clip": 0.01, "updated_share": 0.7}},
    "every token": {"options": {"mini_batch": 1, "updated_share": 0.7}},
    "window is b": {"options": {"mini_batch": 5, "window": 5, "updated_share": 0.7}},
    "task head": {"n_classes": V, "options": {"next_token_head": "task"}},
    "two tokens a position": {"tokens_per_position": 2},
    "no convolution": {"conv": "none", "options": {"updated_share": 0.7}},
    "dynamic convolution": {"conv": "dynamic-lowrank", "options": {"updated_share": 0.7}},
}
each_case = pytest.mark.parametrize("changes", CASES.values(), ids=CASES)


def tokens_for(model, *, batch=B, length=T, seed=0):
    C = model.config.tokens_per_position
    return draw(*((batch, length) if C == 1 else (batch, length, C)), seed=seed)


@each_case
def test_outputs_and_outer_gradients_are_those_of_the_reference(changes):
    model = make(**changes)
    x = tokens_for(model)
    logits, _ = model(x)
    expected = torch.stack([ttt_reference(model, row)[0] for row in x])
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    names, parameters = zip(*model.named_parameters(), strict=True)
    ours = torch.autograd.grad(objective(logits), parameters)
    theirs = torch.autograd.grad(objective(expected), parameters)
    for name, a, b in zip(names, ours, theirs, strict=True):
        assert b.abs().max() > 0, name
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_the_outer_gradient_flows_through_the_steps():
    """Updates held fixed give another gradient."""
    model = make(options={"updated_share": 0.7})
    x = tokens_for(model)
    _, middle = model(x[:, :9])
    held = [{key: y.detach() for key, y in state.items()} for state in middle]
    [fixed] = torch.autograd.grad(objective(model(x[:, 9:], held)[0]), [model.embedding.weight])
    [through] = torch.autograd.grad(objective(model(x[:, 9:], middle)[0]), [model.embedding.weight])
    assert (through - fixed).norm() > 0.01 * fixed.norm()


def test_gradcheck():
    model = make(
        d_model=4, n_heads=1, n_layers=2, options={"mini_batch": 2, "window": 3, "updated_share": 1.0}
    )
    x = tokens_for(model, length=6)
    names, parameters = zip(*model.named_parameters(), strict=True)

    def run(*values):
        return functional_call(model, dict(zip(names, values, strict=True)), (x,))[0]

    values = tuple(p.detach().requires_grad_() for p in parameters)
    assert torch.autograd.gradcheck(run, values, fast_mode=True)


@each_case
def test_no_token_sees_an_update_made_from_later_ones(changes):
    model = make(**changes)
    x = tokens_for(model)
    logits, _ = model(x)
    for t in (0, 3, 4, 5, 8, T - 1):
        changed = x.clone()
        changed[:, t:] = (changed[:, t:] + 1 + draw(*x[:, t:].shape, seed=t) % (V - 1)) % V
        torch.testing.assert_close(model(changed)[0][:, :t], logits[:, :t], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(model(changed)[0][:, t], logits[:, t])
    changed = x.clone()
    changed[1] = (x[1] + 1) % V
    torch.testing.assert_close(model(changed)[0][0], logits[0], rtol=1e-12, atol=1e-12)


def test_an_update_uses_its_last_target():
    """Token b is the target of token b - 1, so what it says about W_1 shows in token b's own logits."""
    model = make(conv="none", options={"window": 4})
    x = tokens_for(model)
    _, before = model(x[:, :4])
    updated, _ = model.step(x[:, 4], before)
    still = make(conv="none", options={"window": 4, "inner_lr": 0.0})
    plain, _ = still.step(x[:, 4], before)
    assert not torch.allclose(updated, plain)
    torch.testing.assert_close(updated, torch.stack([ttt_reference(model, row)[0][4] for row in x]))


@each_case
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_forward_is_steps_is_pieces(changes, dtype, tolerance):
    model = make(dtype=dtype, **changes)
    x = tokens_for(model)
    logits, end = model(x)
    running, outputs = model.initial_state(B), []
    for t in range(T):
        output, running = model.step(x[:, t], running)
        outputs.append(output)
    ends = [running]
    torch.testing.assert_close(torch.stack(outputs, 1), logits, rtol=tolerance, atol=tolerance)
    for cut in (1, 4, 5, 8, T - 1):
        first, middle = model(x[:, :cut])
        second, last = model(x[:, cut:], middle)
        torch.testing.assert_close(torch.cat([first, second], 1), logits, rtol=tolerance, atol=tolerance)
        ends.append(last)
    for other in ends:
        for ours, theirs in zip(end, other, strict=True):
            assert ours.keys() == theirs.keys()
            for key in ours:
                torch.testing.assert_close(theirs[key], ours[key], rtol=tolerance, atol=tolerance)


@each_case
def test_a_fleet_is_its_models_gradients_included(changes):
    models = [make(seed=seed, **changes) for seed in range(3)]
    parameters, buffers = stack_module_state(models)
    parameters = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    x = torch.stack([tokens_for(models[0], seed=seed) for seed in range(3)])

    def one(named, held, tokens):
        return functional_call(models[0], (named, held), (tokens,))[0]

    together = vmap(one)(parameters, buffers, x)
    sum(objective(logits) for logits in together).backward()
    shared = vmap(one, in_dims=(0, 0, None))(parameters, buffers, x[0])
    for index, model in enumerate(models):
        logits, _ = model(x[index])
        torch.testing.assert_close(together[index], logits, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(shared[index], model(x[0])[0], rtol=1e-9, atol=1e-9)
        objective(logits).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameters[name].grad[index], parameter.grad, rtol=1e-8, atol=1e-9)


def test_many_sequences_under_vmap_of_shared_weights():
    """A mapped axis of tokens alone: each gets fast weights of its own."""
    model = make()
    x = draw(3, B, T)
    named = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    together = vmap(lambda tokens: functional_call(model, named, (tokens,))[0])(x)
    apart = torch.stack([model(part)[0] for part in x])
    torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-9)
    objective(together).backward()
    objective(apart).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(named[name].grad, parameter.grad, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("outer", ["common", "official"])
@pytest.mark.parametrize("b", [0, T, 10 * T])
def test_without_updates_it_is_swa_with_one_more_mlp(outer, b):
    """b = 0 and b >= T against a composition of the plain model's parts."""
    window = max(b, 5)
    model = make(outer=outer, options={"mini_batch": b, "window": window})
    x = tokens_for(model)
    if b:
        twin = make(outer=outer, options={"mini_batch": 0, "window": window})
        torch.testing.assert_close(model(x)[0], twin(x)[0], rtol=1e-12, atol=1e-12)
    if outer == "common":
        plain = build_model(
            ModelConfig(
                arch="swa",
                vocab_size=V,
                n_classes=7,
                d_model=8,
                n_layers=3,
                options={"window": window},
                mlp_hidden=model.layers[0].mlp.down.in_features,
            ),
            seed=5,
        ).double()
        own = model.state_dict()
        plain.load_state_dict({name: own[name] for name in plain.state_dict()})
        last = model.layers[-1]
        feed = plain.layers[-1]._feed

        def with_updated_mlp(h):
            into = F.rms_norm(h, (8,), last.fast_norm.weight, 1e-5)
            y = swiglu(into, last.fast.gate_up.weight, last.fast.down.weight)
            return feed(h + F.rms_norm(y, (8,), last.fast_post_norm.weight, 1e-5))

        plain.layers[-1]._feed = with_updated_mlp
        torch.testing.assert_close(model(x)[0], plain(x)[0], rtol=1e-10, atol=1e-10)


def test_parameters_are_those_of_plain_attention():
    def params(arch, n_layers, **changes):
        config = ModelConfig(arch=arch, vocab_size=64, n_classes=64, n_layers=n_layers, d_model=64, **changes)
        return model_params(build_model(config, seed=0))

    for n_layers in (2, 4, 8):
        assert params("ttt_e2e", n_layers) == pytest.approx(params("swa", n_layers), rel=0.02)
    assert params("ttt_e2e", 2, mlp_hidden=96) < params("ttt_e2e", 2, mlp_hidden=97)
    assert [make(n_layers=n).n_tail for n in (1, 2, 4, 6, 8, 12)] == [1, 1, 1, 2, 2, 3]


def test_naive_trains_without_updates_and_tests_with_them():
    options = {"naive": True, "next_token_weight": 1.0}
    model, twin, static = make(options=options), make(), make(options={"mini_batch": 0})
    x = tokens_for(model)
    torch.testing.assert_close(model(x)[0], static(x)[0])
    torch.testing.assert_close(model.eval()(x)[0], twin.eval()(x)[0])
    _, state = model(x)
    with pytest.raises(ValueError, match="training mode"):
        model.train()(x, state)


def test_next_token_weight_changes_gradients_alone():
    for changes in ({}, {"options": {"mini_batch": 0}}, {"tokens_per_position": 2}):
        options = {**changes.get("options", {}), "next_token_weight": 0.3}
        model, plain = make(**{**changes, "options": options}), make(**changes)
        x = tokens_for(model)
        logits = model(x)[0]
        torch.testing.assert_close(logits, plain(x)[0])
        expected, total = [], 0.0
        for row in x:
            one, _ = ttt_reference(plain, row)
            expected.append(one)
            total = total + _next_token_loss(plain, row)
        names, parameters = zip(*model.named_parameters(), strict=True)
        ours = torch.autograd.grad(objective(logits), parameters)
        loss = objective(torch.stack(expected)) + 0.3 * total / B
        theirs = torch.autograd.grad(loss, list(plain.parameters()))
        for name, a, b in zip(names, ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=name)
        unchanged = torch.autograd.grad(objective(model.eval()(x)[0]), parameters)
        plainly = torch.autograd.grad(objective(plain(x)[0]), list(plain.parameters()))
        assert all(torch.allclose(a, b, rtol=1e-8) for a, b in zip(unchanged, plainly, strict=True))


def _next_token_loss(model, row):
    """Mean over all positions but the last: h is found by a head that passes it on."""
    head, model.head = model.head, torch.nn.Identity()
    try:
        h, _ = ttt_reference(model, row)
    finally:
        model.head = head
    C = model.config.tokens_per_position
    logits = h[:-1].unflatten(-1, (C, -1)) @ model.embedding.weight.T
    return F.cross_entropy(logits.flatten(0, 1), row[1:].flatten())


def test_inner_rate_warms_up_in_training_alone():
    model = make(options={"inner_warmup": 0.5, "inner_lr": 0.8})
    x = tokens_for(model)
    for step, rate in ((0, 0.08), (5, 0.44), (10, 0.8), (19, 0.8)):
        model.before_step(step, 20)
        expected = ttt_reference(model, x[0], lr=rate)[0]
        torch.testing.assert_close(model.train()(x)[0][0], expected)
        torch.testing.assert_close(model.eval()(x)[0][0], ttt_reference(model, x[0])[0])
    model = make(options={"inner_warmup": 0.0})
    model.before_step(0, 20)
    assert model.inner_scale == 1.0
    assert "inner_scale" not in model.state_dict()


def test_state_bytes_is_the_most_that_is_carried():
    model = make(dtype=torch.float32)

    def carried(length):
        _, state = model(tokens_for(model, batch=1, length=length))
        return sum(x.numel() * x.element_size() for held in state for x in held.values())

    fast = sum(
        layer.fast.gate_up.weight.numel() + layer.fast.down.weight.numel() for layer in model.layers[-1:]
    )
    assert model.state_bytes(0) >= 4 * fast
    for length in (1, 3, 4, 6, 7, 8, 21):
        assert model.state_bytes(length) == max(carried(n) for n in range(max(1, length - 3), length + 1))
    assert model.state_bytes(33) == model.state_bytes(66)  # it does not grow


def test_state_bytes_of_naive_updates_are_those_of_the_test():
    options = {"naive": True, "next_token_weight": 1.0}
    model, twin, static = make(options=options), make(), make(options={"mini_batch": 0})
    for length in (0, 3, 8):
        assert model.state_bytes(length) == twin.state_bytes(length) > static.state_bytes(length)
    assert model.training and all(module.training for module in model.modules())


def test_trace():
    model = make(options={"updated_share": 0.7}).eval()
    x = tokens_for(model)
    traces = model.trace(x)
    _, losses = zip(*(ttt_reference(model, row) for row in x), strict=True)
    sizes = {"B": B, "T": T, "U": 3}
    for layer, trace in enumerate(traces):
        assert ("update_norm" in trace) == (layer > 0)
        for name, value in trace.items():
            axes = TRACE_FIELDS[name].axes.split()
            assert value.dim() == len(axes), name
            assert all(sizes.get(axis, size) == size for axis, size in zip(axes, value.shape, strict=True))
    last = traces[-1]
    torch.testing.assert_close(last["inner_loss_before"], torch.stack([torch.stack(row) for row in losses]))
    assert last["update_token"].tolist() == [[4, 8, 12]] * B
    _, after = model(x)
    moved = [after[-2][name] - getattr(model.layers[-1].fast, name).weight for name in ("gate_up", "down")]
    drift = sum(w.square().sum((1, 2)) for w in moved).sqrt()
    torch.testing.assert_close(last["update_drift"][:, -1], drift)
    torch.testing.assert_close(last["update_norm"][:, 0], last["update_drift"][:, 0])
    assert (last["inner_loss_after"] < last["inner_loss_before"]).all()
    for cut in (3, 4, 6):  # a trace that continues
        first, second = model.trace(x[:, :cut]), model.trace(x[:, cut:], model(x[:, :cut])[1])
        for whole, one, two in zip(traces, first, second, strict=True):
            for name in whole.keys() - {"attention"}:
                shift = cut if name == "update_token" else 0
                torch.testing.assert_close(torch.cat([one[name], two[name] + shift], 1), whole[name])
            S = two["attention"].shape[-1]
            torch.testing.assert_close(two["attention"], whole["attention"][:, :, cut:, T - S :])
