"""Chunked traces are those of the whole sequence."""

import pytest
import torch

import arena
from arena.dynamics import blocks_of, measure, record
from arena.dynamics.hooks import hooked
from arena.dynamics.probe import memories
from arena.model import ModelConfig, build_model

ARCHS = ["gdn2-neg", "mamba2-neg", "mlstm", "linear_attention", "attention", "swa", "slstm", "lstm"]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_add_up_to_the_whole(arch, chunk):
    torch.manual_seed(0)
    options = {"window": 5} if arch == "swa" else {}
    block = arena.build_block(arch, d_model=16, n_heads=1 if arch == "lstm" else 2, **options).double()
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    whole = block.trace(x)
    pieces = list(record(block, x, chunk=chunk))
    assert [piece.start for piece in pieces] == list(range(0, 20, chunk))
    torch.testing.assert_close(torch.cat([piece.output for piece in pieces], 1), block(x)[0])
    for name, value in whole.items():
        if name != "attention":
            parts = torch.cat([piece.traces[0][name] for piece in pieces], 1)
            torch.testing.assert_close(parts, value, rtol=1e-6, atol=1e-9)


def test_model_gives_every_layer_and_is_left_as_it_was():
    config = ModelConfig(arch="xlstm[1:1]", vocab_size=5, n_classes=5, d_model=16)
    model = build_model(config, seed=0).train()
    tokens = torch.randint(5, (2, 11), generator=torch.Generator().manual_seed(0))
    pieces = list(record(model, tokens, chunk=4))
    assert [set(trace) >= {"read", "normaliser"} for trace in pieces[0].traces] == [True, True]
    assert "k" in pieces[0].traces[0] and "cell" in pieces[0].traces[1]
    torch.testing.assert_close(torch.cat([piece.output for piece in pieces], 1), model(tokens)[0])
    assert model.training and not model.blocks[0]._forward_pre_hooks


@pytest.mark.parametrize("changes", [{"conv": "dynamic-lowrank", "conv_on": "all"}, {"experts": 3}])
def test_layers_with_convolutions_and_experts(changes):
    """Pieces join, hooks know the position, and probes see the memory without the rows of convolutions."""
    sizes = {"vocab_size": 5, "n_classes": 5, "d_model": 16, "n_layers": 3}
    model = build_model(ModelConfig(arch="gdn2+slstm[2:1]", **sizes, **changes), seed=0)
    tokens = torch.randint(5, (2, 11), generator=torch.Generator().manual_seed(0))
    starts: dict[int, list[int | None]] = {}

    def look(layer, gates, start):
        starts.setdefault(layer, []).append(start)
        return gates

    with hooked(model, look):
        pieces = list(record(model, tokens, chunk=4))
    torch.testing.assert_close(torch.cat([piece.output for piece in pieces], 1), model(tokens)[0])
    assert None not in starts[0] and {0, 4, 8} <= set(starts[0])
    frame = measure(model, tokens, quantities=["decay"])
    assert set(frame["block"]) == {"gdn2", "slstm"} and frame["value"].is_not_null().any()
    found = memories(model, tokens)
    for block, memory in zip(model.blocks, found, strict=True):
        state = block.initial_state(1)
        beside = ("conv", "m")
        assert memory.shape == (2, sum(x.numel() for name, x in state.items() if name not in beside))


def test_bad_input_is_named():
    block = arena.build_block("gdn", d_model=8, n_heads=1)
    with pytest.raises(ValueError, match="neither a model"):
        blocks_of(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="need a token"):
        list(record(block, torch.zeros(1, 0, 8)))
    with pytest.raises(ValueError, match="floating point"):
        list(record(block, torch.zeros(1, 3, dtype=torch.int64)))
