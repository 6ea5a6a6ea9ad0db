"""Which implementation runs: the caller, ARENA_BACKEND, the table, the operator's order; nothing silent."""

import sys
import warnings
from pathlib import Path

import pytest
import torch

from kernels.backends import CHOICES, NAMES, OPERATORS, Choice, override, recording, resolve_backend

backends = sys.modules["kernels.backends"]
X = torch.zeros(2, 8, 1, 16)
OWN = ("chunked", "reference")


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.delenv("ARENA_BACKEND", raising=False)
    backends._warn_once.cache_clear()


def line(**fields):
    given = {"operator": "gated_memory", "device": "cpu", "backends": ("triton",), "evidence": "a file"}
    return Choice(**{**given, **fields})


@pytest.mark.parametrize(
    ("fields", "fits"),
    [
        ({}, True),
        ({"device": "cuda"}, False),
        ({"operator": "slstm"}, False),
        ({"dtypes": (torch.bfloat16,)}, False),
        ({"dtypes": (torch.float32,)}, True),
        ({"widest": 15}, False),
        ({"widest": 16}, True),
        ({"longest": 7}, False),
        ({"longest": 8}, True),
    ],
)
def test_the_first_line_that_fits_decides(monkeypatch, fields, fits):
    monkeypatch.setattr(backends, "CHOICES", (line(**fields),))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = resolve_backend("gated_memory", "auto", OWN, x=X, others={"triton": lambda: None})
    assert chosen == ("triton" if fits else "chunked")


def test_a_line_that_cannot_be_followed_is_announced(monkeypatch):
    monkeypatch.setattr(backends, "CHOICES", (line(),))
    with pytest.warns(
        RuntimeWarning, match="gated_memory: backend 'triton' is ill; 'chunked' runs in its place"
    ):
        assert (
            resolve_backend("gated_memory", "auto", OWN, x=X, others={"triton": lambda: "is ill"})
            == "chunked"
        )


def test_who_is_asked_first(monkeypatch):
    monkeypatch.setattr(backends, "CHOICES", (line(backends=("reference",)),))
    others = {"triton": lambda: None}
    assert resolve_backend("gated_memory", "auto", OWN, x=X) == "reference"
    monkeypatch.setenv("ARENA_BACKEND", "triton")
    assert resolve_backend("gated_memory", "auto", OWN, x=X, others=others) == "triton"
    assert resolve_backend("gated_memory", "chunked", OWN, x=X, others=others) == "chunked"
    assert resolve_backend("lstm", "auto", ("fused", "reference")) == "fused"  # has none of that name
    monkeypatch.setenv("ARENA_BACKEND", "auto")
    assert resolve_backend("gated_memory", "auto", OWN, x=X) == "reference"


def test_one_operator_alone_may_be_overridden(monkeypatch):
    monkeypatch.setenv("ARENA_BACKEND", "gated_memory=reference, slstm = fused")
    assert override() == {"gated_memory": "reference", "slstm": "fused"}
    assert resolve_backend("gated_memory", "auto", OWN) == "reference"
    assert resolve_backend("slstm", "auto", ("numba", "fused")) == "fused"
    assert resolve_backend("short_conv", "auto", ("fused", "reference")) == "fused"
    monkeypatch.setenv("ARENA_BACKEND", "reference,gated_memory=chunked")
    assert resolve_backend("gated_memory", "auto", OWN) == "chunked"
    assert resolve_backend("short_conv", "auto", ("fused", "reference")) == "reference"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chunky", "is 'chunky'; known: auto"),
        ("attn=fla", "operator 'attn'"),
        ("slstm=", "is ''"),
        ("", "is ''"),
    ],
)
def test_overrides_that_mean_nothing_are_refused(monkeypatch, text, message):
    monkeypatch.setenv("ARENA_BACKEND", text)
    with pytest.raises(ValueError, match=message):
        resolve_backend("gated_memory", "auto", OWN)


def test_what_the_caller_names_runs_or_is_refused():
    with recording() as used:
        assert resolve_backend("gated_memory", "reference", OWN) == "reference"
    assert used == {"gated_memory": "reference"}
    with pytest.raises(ValueError, match="no backend 'numba' here; known: auto, chunked, reference, fla"):
        resolve_backend("gated_memory", "numba", OWN, others={"fla": lambda: None})
    with pytest.raises(ValueError, match="gated_memory: backend 'fla' is away; use 'chunked'"):
        resolve_backend("gated_memory", "fla", OWN, others={"fla": lambda: "is away"})


def test_the_table_names_what_there_is_and_its_evidence():
    root = Path(__file__).resolve().parents[2]
    for choice in CHOICES:
        assert choice.operator in OPERATORS and set(choice.backends) <= set(NAMES)
        assert (root / choice.evidence).is_file(), choice
        assert choice.device in str(choice) and choice.evidence in str(choice)
