import pytest
import torch

import arena
import synthetic_tasks
from arena.constructions import parity_model
from arena.dynamics.classes import token_classes
from arena.dynamics.effects import sequence_accuracy
from arena.dynamics.hooks import gates_of, hooked
from arena.dynamics.intervene import Edit, check, edited, parse_edit, prepare
from arena.memory import NAMED

ARCHS = [*NAMED, "slstm", "lstm", "attention", "swa"]
B, T, D = 2, 7, 16


def build(arch, outer="common", **options):
    torch.manual_seed(3)
    block = arena.build_block(arch, d_model=D, n_heads=2, outer=outer, **options).double()
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if parameter.dim() > 1 or "bias" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return block, torch.randn(B, T, D, dtype=torch.float64)


def reference_read(trace, normaliser="none"):
    """The recurrence of section 2, token by token, from a trace."""
    q, k, v = trace["q"], trace["k"], trace["v"]
    state = k.new_zeros(B, k.shape[2], k.shape[-1], v.shape[-1])
    total = k.new_zeros(B, k.shape[2], k.shape[-1])
    reads = []
    for t in range(T):
        decay, erase, write = (trace[name][:, t] for name in ("decay", "erase", "write"))
        k_t, v_t = k[:, t], v[:, t]
        state, total = decay[..., None] * state, decay * total
        old = torch.einsum("bhkv,bhk->bhv", state, erase * k_t)
        state = state + k_t[..., None] * (write * v_t - old)[..., None, :]
        # the normaliser is the same memory of the constant 1
        total = total + k_t * (write - (total * erase * k_t).sum(-1, keepdim=True))
        read = torch.einsum("bhkv,bhk->bhv", state, q[:, t])
        if normaliser == "max_abs":
            read = read / (total * q[:, t]).sum(-1, keepdim=True).abs().clamp_min(1)
        reads.append(read)
    return torch.stack(reads, 1)


@pytest.mark.parametrize("outer", ["common", "official"])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_hook_that_changes_nothing_changes_nothing(arch, outer):
    block, x = build(arch, outer)
    before, state = block(x)
    seen = set()

    def look(layer, values, start):
        assert layer == 0 and all(value.dim() == 4 and len(value) == B for value in values.values())
        seen.update(values)
        return values

    with hooked(block, look):
        during, state_during = block(x)
    assert seen == set(gates_of(block))
    if arch in ("slstm", "lstm"):  # cells are stepped token by token
        torch.testing.assert_close(during, before)
    else:
        assert torch.equal(during, before)
    assert state.keys() == state_during.keys()
    assert torch.equal(block(x)[0], before)
    assert not {"inputs", "output_gate", "cell", "forward"} & block.__dict__.keys()  # wrapped no longer


def test_methods_are_restored_when_the_context_fails():
    block, x = build("gdn2")
    before = block(x)[0]
    with pytest.raises(RuntimeError, match="stop"), hooked(block, _stop):
        block(x)
    assert torch.equal(block(x)[0], before)


def _stop(*_):
    raise RuntimeError("stop")


@pytest.mark.parametrize("arch", [name for name in NAMED if NAMED[name].normaliser != "sum"])
@pytest.mark.parametrize(
    "text", ["erase:clamp:0.2:0.6", "decay:freeze:0.5", "write:zero", "write:clamp:0.1:0.3"]
)
def test_edits_of_matrix_memories_are_those_of_the_recurrence(arch, text):
    """Where the edit is, the gate has the new value; elsewhere its own; and the memory runs with both."""
    block, x = build(arch)
    edit = parse_edit(text + "@head=1@class=some")
    if edit.gate not in gates_of(block):
        with pytest.raises(ValueError, match=f"has no {edit.gate} gate; its gates: "):
            check(block, [edit])
        return
    some = torch.rand(B, T) < 0.5
    clean = block.trace(x)
    with edited(block, [edit], {"some": some}):
        trace = block.trace(x)
        y = block(x)[0]
    expected = clean[edit.gate].clone()
    bounds = {"zero": (0, 0), "freeze": (edit.value, edit.value), "clamp": (edit.low, edit.high)}
    new = expected.clamp(*bounds[edit.action])
    expected[:, :, 1] = torch.where(some[..., None], new[:, :, 1], expected[:, :, 1])
    torch.testing.assert_close(trace[edit.gate], expected, rtol=1e-9, atol=1e-12)
    expected = reference_read(trace, block.spec.normaliser)
    loose = 1e-4 if arch == "mlstm" else 1e-7  # mLSTM adds 1e-6 to its divisor, as its authors do
    torch.testing.assert_close(trace["read"], expected, rtol=loose, atol=loose / 10)
    assert not torch.equal(trace["read"][:, :, 1], clean["read"][:, :, 1])
    assert torch.equal(trace["read"][:, :, 0], clean["read"][:, :, 0])
    assert not torch.allclose(y, block(x)[0])


def test_a_signed_decay_can_be_given_any_sign():
    for arch in ("mamba2-neg", "gdn"):
        block, x = build(arch)
        with edited(block, [Edit(gate="decay", action="freeze", value=-0.7)], {}):
            trace = block.trace(x)
        torch.testing.assert_close(trace["decay"], torch.full_like(trace["decay"], -0.7))
        torch.testing.assert_close(trace["read"], reference_read(trace))


def test_a_decay_cannot_grow():
    block, x = build("gdn")
    with (
        pytest.raises(ValueError, match="a decay cannot leave"),
        edited(block, [Edit(gate="decay", action="freeze", value=1.2)], {}),
    ):
        block(x)


def test_swaps():
    block, x = build("gdn2")
    clean = block.trace(x)
    with edited(block, [parse_edit("erase:swap:heads")], {}):
        assert torch.equal(block.trace(x)["erase"], clean["erase"].flip(2))
    with edited(block, [parse_edit("erase:swap:write")], {}):
        trace = block.trace(x)
    assert torch.equal(trace["erase"], clean["write"]) and torch.equal(trace["write"], clean["erase"])
    torch.testing.assert_close(trace["read"], reference_read(trace))
    some = torch.zeros(B, T, dtype=torch.bool)
    some[:, [1, 3, 4]] = True
    with edited(block, [parse_edit("decay:swap:tokens@class=some")], {"some": some}):
        decay = block.trace(x)["decay"]
    assert torch.equal(decay[~some], clean["decay"][~some]) and not torch.equal(decay, clean["decay"])
    assert torch.equal(decay[some].sort(0).values, clean["decay"][some].sort(0).values)


def test_output_gates():
    for arch in ("gdn", "attention", "mamba2"):
        block, x = build(arch)
        with edited(block, [parse_edit("output:zero")], {}):
            y = block(x)[0]
        assert (y == 0).all()
        with edited(block, [parse_edit("output:zero@head=0")], {}):
            assert not torch.allclose(block(x)[0], block(x)[0] * 0)


@pytest.mark.parametrize("arch", ["slstm", "lstm"])
def test_cells_are_edited_before_their_output_feeds_back(arch):
    """Against the cell written out, with the gates' values changed."""
    block, x = build(arch)
    H, K = block.n_heads, block.head_dim
    some = torch.rand(B, T) < 0.5
    edits = [
        parse_edit("decay:freeze:0.25@class=some"),
        parse_edit("write:clamp:0.2:0.5"),
        parse_edit("output:zero@class=some"),
    ]
    pre = block.inputs(x, None)[0] + block.bias
    h, c, n = (torch.zeros(B, H, K, dtype=torch.float64) for _ in range(3))
    cells = []
    for t in range(T):
        i, f, z, o = (pre[:, t] + torch.einsum("bhk,ghkl->bghl", h, block.recurrent)).unbind(1)
        here = some[:, t, None, None]
        decay = torch.where(here, 0.25, f.sigmoid())
        write = (i.exp() if arch == "slstm" else i.sigmoid()).clamp(0.2, 0.5)
        out = torch.where(here, 0.0, o.sigmoid())
        c, n = decay * c + write * z.tanh(), decay * n + write
        h = out * (c / n if arch == "slstm" else c.tanh())
        cells.append(h)
    with edited(block, edits, {"some": some}):
        y, state = block(x)
    torch.testing.assert_close(y, block.output(x, torch.stack(cells, 1)))
    torch.testing.assert_close(state["h"], h)


def test_a_frozen_gate_has_its_mean_over_other_tokens():
    block, x = build("kda")
    some = torch.rand(B, T) < 0.5
    texts = ["decay:freeze@class=some", "erase:freeze@head=1"]
    edits = prepare(block, [parse_edit(text) for text in texts], x, {"some": some})
    clean = block.trace(x)
    other = torch.randn(B, T, D, dtype=torch.float64)
    with edited(block, edits, {"some": ~some}):
        trace = block.trace(other)
    mean = clean["decay"][some].mean(0)
    torch.testing.assert_close(trace["decay"][~some], mean.expand_as(trace["decay"][~some]))
    torch.testing.assert_close(trace["erase"][:, :, 1], clean["erase"].mean((0, 1))[1].expand(B, T, 1))
    assert torch.equal(trace["erase"][:, :, 0], block.trace(other)["erase"][:, :, 0])


@pytest.mark.parametrize(
    ("arch", "text", "message"),
    [
        ("attention", "erase:zero", "has no erase gate; its gates: output"),
        ("slstm", "erase:zero", "has no erase gate; its gates: decay, write, output"),
        ("linear_attention", "decay:zero", "has no decay gate; its gates: output"),
        ("gdn", "erase:zero@head=2", "there is no head 2, heads are 0..1"),
        ("gdn", "erase:zero@layer=1", "there is no layer 1, layers are 0..0"),
        ("slstm", "write:zero", "would be 0 / 0"),
        ("lstm", "decay:swap:tokens", "cannot be swapped over tokens"),
        ("deltanet", "erase:swap:decay", "has no decay gate"),
    ],
)
def test_what_a_block_does_not_have_is_refused(arch, text, message):
    with pytest.raises(ValueError, match=message):
        check(build(arch)[0], [parse_edit(text)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("erase", "cannot read the intervention 'erase'; write GATE:ACTION"),
        ("eraze:zero", "there is no gate 'eraze'; gates: decay, erase, write, input, angle, output"),
        ("erase:drop", "cannot 'drop' a gate; actions: zero, freeze, clamp, swap"),
        ("erase:clamp:1:0", "clamp needs low <= high"),
        ("erase:clamp:0", "clamp needs low <= high"),
        ("erase:zero:1", "zero takes 0 arguments"),
        ("erase:freeze:x", "could not convert"),
        ("erase:swap", "swap, and nothing else, needs"),
        ("erase:swap:output", "cannot swap with 'output'"),
        ("erase:swap:erase", "cannot swap erase with erase"),
        ("erase:zero@place=1", "there is no place 'place'"),
    ],
)
def test_wrong_texts_say_what_is_right(text, message):
    with pytest.raises(ValueError, match=message):
        parse_edit(text)


def test_input_is_the_write_gate_of_recurrent_cells():
    assert parse_edit("input:clamp:0:1@head=0,2@layer=1") == Edit(
        gate="write", action="clamp", low=0.0, high=1.0, layer=1, heads=(0, 2)
    )


def test_parity_by_hand_is_solved_by_the_counter_alone():
    """Clamped to [0, 1], the counter can only say that there was a one: its accuracy is known exactly."""
    task = synthetic_tasks.get("parity", supervision="running")
    batch = task.sample(32, 60, split="test")
    model = parity_model(counter=2).double()
    classes = token_classes(task, batch.tokens, batch.targets)
    assert torch.equal(classes["moves"], batch.tokens == 1)
    assert (sequence_accuracy(model, batch.tokens, batch.targets) == 1).all()
    clamp = parse_edit("erase:clamp:0:1@head=2")
    ever = (batch.tokens.cumsum(1) > 0).long()
    expected = (ever == batch.targets).double().mean(1).numpy()
    assert sequence_accuracy(model, batch.tokens, batch.targets, [clamp]) == pytest.approx(expected)
    assert 0.4 < expected.mean() < 0.6
    where = parse_edit("erase:clamp:0:1@head=2@class=moves")
    assert sequence_accuracy(model, batch.tokens, batch.targets, [where], classes) == pytest.approx(expected)
    for harmless in (
        "erase:clamp:0:1@head=0,1,3",
        "erase:clamp:0:1@head=2@class=stays",
        "erase:zero@head=0,1,3",
    ):
        edits = [parse_edit(harmless)]
        assert (sequence_accuracy(model, batch.tokens, batch.targets, edits, classes) == 1).all()


def test_a_class_that_is_not_there():
    model = parity_model().double()
    with (
        pytest.raises(ValueError, match=r"there is no class of tokens 'query'.*some"),
        edited(model, [parse_edit("erase:zero@class=query")], {"some": torch.ones(1, 3, dtype=torch.bool)}),
    ):
        pass


@pytest.mark.parametrize("arch", ["gdn-neg", "mlstm", "slstm", "lstm", "attention"])
@pytest.mark.parametrize("text", ["write:clamp:0.1:0.2@class=some", "output:zero@class=some"])
def test_a_class_means_the_same_tokens_in_pieces_and_in_steps(arch, text):
    block, x = build(arch)
    edit = parse_edit(text)
    if edit.gate not in gates_of(block):
        return
    some = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) < 0.5
    with edited(block, [edit], {"some": some}):
        whole = block(x)[0]
        first, state = block(x[:, :3])
        rest, _ = block(x[:, 3:], state)
        traced = [block.trace(x[:, :3]), block.trace(x[:, 3:], state)]
        in_one = block.trace(x)
        steps, now = [], block.initial_state(B)
        for t in range(T):
            y, now = block.step(x[:, t], now)
            steps.append(y)
    torch.testing.assert_close(torch.cat([first, rest], 1), whole)
    torch.testing.assert_close(torch.stack(steps, 1), whole)
    for name in ("read", "write", "decay", "output_gate"):
        if name in in_one:
            torch.testing.assert_close(torch.cat([trace[name] for trace in traced], 1), in_one[name])
    assert not torch.allclose(whole, block(x)[0])


@pytest.mark.parametrize("arch", ["slstm", "lstm"])
def test_the_trace_of_a_cell_shows_the_changed_gates(arch):
    """Its reads follow from its gates: read = cell (of sLSTM: / normaliser), a sum over the past."""
    block, x = build(arch)
    some = torch.rand(B, T, generator=torch.Generator().manual_seed(2)) < 0.5
    with edited(block, [parse_edit("decay:freeze:0.25@class=some")], {"some": some}):
        trace = block.trace(x)
        cell = block(x)[1]["c"]
    torch.testing.assert_close(trace["decay"][some], torch.full_like(trace["decay"][some], 0.25))
    write = trace["write"] if arch == "lstm" else trace["input_gate"].exp()
    c, n = torch.zeros_like(x[:, :1]).view(B, block.n_heads, -1), torch.zeros(B, block.n_heads, 1)
    for t in range(T):
        c = trace["decay"][:, t] * c + write[:, t] * trace["v"][:, t]
        n = trace["decay"][:, t] * n + write[:, t]
        torch.testing.assert_close(trace["read"][:, t], c.tanh() if arch == "lstm" else c / n)
    torch.testing.assert_close(trace["cell"][:, -1], cell)


def test_a_class_is_refused_where_positions_are_unknown():
    block, x = build("gdn")
    _, state = block(x[:, :3])
    classes = {"some": torch.ones(B, T, dtype=torch.bool)}
    with edited(block, [parse_edit("write:zero@class=some")], classes):
        with pytest.raises(ValueError, match="a state from outside of the context"):
            block(x[:, 3:], state)
        with pytest.raises(ValueError, match="the model reads"):
            block(torch.cat([x, x], 1))
    with edited(block, [parse_edit("write:swap:tokens")], {}):
        _, state = block(x[:, :3])
        with pytest.raises(ValueError, match="whole sequences"):
            block(x[:, 3:], state)
    with edited(block, [parse_edit("write:zero")], {}):  # every token: no position is needed
        block(x[:, 3:], state)


@pytest.mark.parametrize("arch", ["gdn2", "slstm", "attention"])
def test_contexts_can_be_nested(arch):
    block, x = build(arch)
    clean = block(x)[0]
    some = torch.rand(B, T, generator=torch.Generator().manual_seed(3)) < 0.5
    outer, inner = parse_edit("output:clamp:0:0.1@class=some"), parse_edit("output:freeze:0.3@head=0")
    with edited(block, [inner, outer], {"some": some}):
        both = block(x)[0]
    with edited(block, [outer], {"some": some}):
        alone = block(x)[0]
        prepare(block, [parse_edit("output:freeze")], x, {})
        assert torch.equal(block(x)[0], alone)
        with pytest.raises(RuntimeError, match="stop"), hooked(block, _stop):
            block(x)
        assert torch.equal(block(x)[0], alone)
        with edited(block, [inner], {}):
            nested = block(x)[0]
    assert torch.equal(block(x)[0], clean)
    assert arch != "slstm" or torch.allclose(nested, both)
    assert not torch.allclose(nested, alone)


def test_means_of_a_class_that_is_not_there():
    block, x = build("gdn")
    with pytest.raises(ValueError, match="there is no class of tokens 'sore'"):
        prepare(block, [parse_edit("decay:freeze@class=sore")], x, {"some": torch.ones(B, T).bool()})
