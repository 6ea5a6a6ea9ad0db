"""The doctor: what it examines, what it finds wrong, and the verdict that rows carry."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tomllib
from types import SimpleNamespace

import pytest
import torch

import kernels.doctor
from arena.grid import verdict as verdicts
from arena.grid.doctor import examine, experiment_cases
from arena.grid.experiment import parse_experiment
from kernels.doctor import Case, default_cases, findings
from kernels.gated_memory import gated_memory

SMALL = """
name = "small"
title = "A small grid"
archs = ["gdn", "gla", "mlstm", "slstm", "mamba2-neg"]
seeds = 1
[model]
d_model = 8
n_layers = 1
n_heads = 1
[train]
steps = 2
batch_size = 4
eval_examples = 8
[[tasks]]
name = "parity"
train_lengths = [3, 8]
eval_lengths = [12, 24]
"""
EXPERTS = SMALL.replace("n_layers = 1", "n_layers = 1\nexperts = 4\nexperts_per_token = 2")
ONE = SMALL.replace('"gdn", "gla", "mlstm", "slstm", "mamba2-neg"', '"gla"')


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("ARENA_BACKEND", raising=False)
    return tmp_path / "cache" / "memory-arena" / "doctor"


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.001 * grad


def broken(x, *, backend):
    if backend == "numba":
        raise ValueError("lstm: backend 'numba' is away; use 'fused'")
    return WrongGradient.apply(x) if backend == "fused" else x.clone()


def case(run=broken, label="broken", **inputs):
    given = inputs or {"x": torch.ones(3, dtype=torch.float64)}
    return Case(operator="lstm", label=label, run=run, inputs=given)


def test_nothing_is_wrong_here(capsys):
    assert examine() == 0
    output = capsys.readouterr().out
    assert "WRONG" not in output and "cannot run" not in output and output.count(" ok ") >= 45
    assert re.search(r"gated_memory: GDN-2, T 512, K 32 +chunked +cpu +float32 +ok", output)
    assert "gated_memory        cpu       chunked" in output  # the table
    assert verdicts.verdict() in output and verdicts.verdict().startswith("ok-")


def test_the_default_list_has_the_traps():
    cases = [x for x in default_cases() if x.operator == "gated_memory"]
    sizes = {tuple(x.inputs["k"].shape[i] for i in (1, 3)) for x in cases}
    assert {1, 512} <= {T for T, _ in sizes} and {16, 32, 64, 128} <= {K for _, K in sizes}
    decays = torch.cat([x.inputs["log_decay"].flatten() for x in cases if x.inputs["log_decay"] is not None])
    erases = torch.cat([x.inputs["erase"].flatten() for x in cases if x.inputs["erase"] is not None])
    assert (decays == 0).any() and (decays < -25).any() and (decays == -torch.inf).any()
    assert (erases == 2).any() and (erases < 1e-3).any()
    distinct = {len(x.inputs["k"][0, :, 0].unique(dim=0)) for x in cases if x.inputs["k"].shape[1] > 2}
    assert {1, 2} <= distinct
    assert {x.operator for x in default_cases()} == set(kernels.doctor.BACKENDS)


def test_a_wrong_gradient_is_seen_and_kept(monkeypatch, capsys, cache):
    monkeypatch.setattr(kernels.doctor, "default_cases", lambda: [case()])
    monkeypatch.setitem(kernels.doctor.BACKENDS, "lstm", ("fused", "numba"))
    assert verdicts.verdict() is None
    assert examine() == 1
    output = capsys.readouterr().out
    assert re.search(r"lstm: broken +fused +cpu +float32 +WRONG 1.0e-03 \(gradient of x\)", output)
    assert "not examined: lstm: backend 'numba' is away" in output
    first = verdicts.verdict()
    assert first.startswith("wrong-") and first in output
    monkeypatch.setattr(
        kernels.doctor, "default_cases", lambda: [case(lambda x, backend: x.clone(), label="fine")]
    )
    assert examine() == 0  # of this list; what was found wrong before stays so
    assert verdicts.verdict().startswith("wrong-") and verdicts.verdict() != first
    (file,) = cache.glob("*.json")
    assert json.loads(file.read_text())["verdicts"] == {
        "lstm: broken fused cpu float32": "WRONG",
        "lstm: fine fused cpu float32": "ok",
        "lstm: fine numba cpu float32": "ok",
    }


def test_a_verdict_is_of_the_findings_not_of_the_digits_and_of_these_kernels(monkeypatch):
    assert verdicts.keep({"a": "ok"}) == verdicts.keep({"a": "ok"}) == verdicts.verdict()
    assert verdicts.keep({"b": "ok"}) != verdicts.keep({"a": "ok", "b": "cannot run"})
    monkeypatch.setattr(verdicts, "_kernels_text", lambda: "other kernels")
    assert verdicts.verdict() is None


def test_a_damaged_or_unwritable_cache_is_no_verdict(monkeypatch, cache, capsys):
    verdicts.keep({"a": "ok"})
    (file,) = cache.glob("*.json")
    for text in ("", "{", "[]", '{"verdicts": 3}'):
        file.write_text(text)
        assert verdicts.verdict() is None
    monkeypatch.setattr(kernels.doctor, "default_cases", lambda: [case(lambda x, backend: x.clone())])

    def full(*arguments, **options):
        raise OSError(28, "No space left on device", "a file")

    monkeypatch.setattr(verdicts.tempfile, "mkstemp", full)
    assert examine() == 0
    assert "the verdict could not be kept (No space left on device: a file)" in capsys.readouterr().out


def test_what_raises_cannot_run_and_what_is_not_covered_is_refused():
    def run(x, *, backend):
        if backend == "fused":
            raise RuntimeError("the compiler\nfell over")
        return x.clone()

    (found,) = findings(case(run), ["cpu"])
    assert (found.verdict, found.detail) == ("cannot run", "RuntimeError: the compiler fell over")


def test_a_path_without_a_backward_is_held_to_the_outputs():
    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise NotImplementedError("forward only")

    def run(x, *, backend, factor):
        return Forward.apply(x) * factor if backend == "fused" else x.clone()

    for factor, verdict in ((1.0, "ok"), (1.01, "WRONG")):
        (found,) = findings(case(functools.partial(run, factor=factor)), ["cpu"])
        assert found.verdict == verdict and found.detail.endswith("(output 0); forward only")


def test_unwritten_and_infinite_outputs_are_wrong():
    def run(x, *, backend):
        return x * (float("nan") if backend == "fused" else 1.0)

    (found,) = findings(case(run), ["cpu"])
    assert found.verdict == "WRONG" and "inf" in found.detail


def test_an_experiment_says_which_calls(capsys):
    cases = list(experiment_cases(parse_experiment(tomllib.loads(SMALL))))
    found = {(x.operator, x.inputs[next(iter(x.inputs))].shape[1]) for x in cases}
    assert {(name, T) for name in ("gated_memory", "mlstm", "slstm") for T in (8, 24)} <= found
    (gdn,) = (x for x in cases if "gdn on parity, q [2, 24" in x.label)
    assert "write" not in gdn.inputs  # one tensor with the erase gate, as the block has it
    (signed,) = (x for x in cases if "mamba2-neg on parity, q [2, 24" in x.label)
    assert signed.inputs["decay_sign"].dtype == torch.int8
    for each in cases:
        for finding in findings(each, ["cpu"]):
            assert finding.verdict in ("ok", "refused"), str(finding)


def test_inputs_of_an_experiment_are_those_that_the_block_computed(monkeypatch):
    seen = []
    real = gated_memory

    @functools.wraps(real)
    def spy(*arguments, **options):
        seen.append(arguments)
        return real(*arguments, **options)

    monkeypatch.setattr("kernels.gated_memory", spy)
    cases = [
        x for x in experiment_cases(parse_experiment(tomllib.loads(ONE))) if x.operator == "gated_memory"
    ]
    assert [x.inputs["q"].shape[1] for x in cases] == [8, 24]
    torch.testing.assert_close(cases[-1].inputs["log_decay"], seen[-1][3].double())


def test_rows_carry_the_verdict(tmp_path):
    (tmp_path / "small.toml").write_text(ONE)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def arena(*arguments):
        command = [sys.executable, "-c", "from arena.cli import main; main()", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)

    from arena.grid import load_results

    assert arena("grid", "small.toml", "--out", "before", "--workers", "1").code == 0
    assert load_results(tmp_path / "before")["verdict"].to_list() == [None] * len(
        load_results(tmp_path / "before")
    )
    assert "Kernels not examined in 1 of 1 runs" in arena("report", "before").out
    assert arena("doctor", "small.toml").code == 0
    assert arena("grid", "small.toml", "--out", "after", "--workers", "1").code == 0
    (kept,) = set(load_results(tmp_path / "after")["verdict"])
    assert re.fullmatch(r"ok-[0-9a-f]{16}", kept)
    assert "Kernels" not in arena("report", "after").out
    wrong = arena("doctor", "nosuch")
    assert (
        wrong.code == 2
        and wrong.err.startswith("arena: no experiment 'nosuch'")
        and "\n" not in wrong.err[:-1]
    )


def test_the_experts_of_an_experiment_are_examined():
    cases = [x for x in experiment_cases(parse_experiment(tomllib.loads(EXPERTS))) if x.operator == "experts"]
    assert len(cases) == 2, "the longest training and the longest evaluation length"
    assert not cases[0].inputs["chosen"].is_floating_point()
    for case in cases:
        found = [x for x in findings(case, ["cpu"]) if x.backend == "fused"]
        assert [x.verdict for x in found] == ["ok"], found
