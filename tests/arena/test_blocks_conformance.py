"""What every registered block must do, in both outer layers."""

from __future__ import annotations

import pytest

from arena.blocks import Block, block_names, build_block
from arena.conformance import CHECKS, Failed, Subject

POINTS = {
    "gates averaged": dict(decay="mean", erase="mean", write="mean"),
    "gates averaged, signed": dict(decay="mean", erase="mean", write="channel", signed=True),
    "frozen erase": dict(erase="scalar", erase_value=1.5),
    "frozen write": dict(write="scalar", write_value=0.5),
    "tied channels": dict(coupling="tied", erase_range=2),
    "complement": dict(decay="scalar", write="scalar", coupling="complement", erase_range=2),
    "complement of averages": dict(decay="mean", write="mean", coupling="complement", signed=True),
    "complement on k": dict(erase="none", coupling="complement", signed=True),
    "complement on k, normaliser": dict(erase="none", coupling="complement", normaliser="max_abs"),
    "dial": dict(coupling="dial", dial=0.25, erase_range=2),
    "dial of scalars": dict(coupling="dial", dial=0.75, erase="scalar", write="mean"),
    "correction": dict(erase="scalar", erase_value=1.0, write_on="correction"),
    "correction, all gates": dict(erase_range=2, write_on="correction", signed=True),
    "correction, scalar": dict(decay="scalar", erase="scalar", write="scalar", write_on="correction"),
}
"""Points of gate space that no architecture has, as changes to gdn2."""

OPTIONS = {"mamba3, MIMO": ("mamba3", dict(rank=2))}
"""Blocks whose options change what they carry."""

CASES = [(name, outer) for name in [*block_names(), *POINTS, *OPTIONS] for outer in ("common", "official")]


def build(name, **arguments) -> Block:
    if name in POINTS:
        return build_block("gdn2", d_model=8, n_heads=2, gates=POINTS[name], **arguments)
    name, options = OPTIONS.get(name, (name, {}))
    return build_block(name, d_model=8, n_heads=2, **options, **arguments)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(("name", "outer"), CASES, ids=[f"{n}-{o}" for n, o in CASES])
def test_every_block_does_what_it_must(name, outer, check, request):
    if name.startswith("correction") and check == "trace adds up":
        reason = "the vocabulary of traces has no word for a gate on the whole correction"
        request.applymarker(pytest.mark.xfail(raises=Failed, strict=True, reason=reason))
    CHECKS[check](Subject(build=lambda: build(name, outer=outer, depth=0.5)))
