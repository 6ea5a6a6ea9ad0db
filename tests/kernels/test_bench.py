"""The benchmark: turns, ceilings, what it compares, and rows that can be believed."""

import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from kernels.bench import contenders, peers, timing
from kernels.bench.contenders import Comparison, Contender, comparisons
from kernels.bench.operators import FIELDS, rows
from kernels.doctor import POINTS

TINY = {"arena": ((2, 12, 1, 16),), "lm": ((2, 12, 1, 16),)}
LIMITS = {"copy_bytes_s": 1e9, "matmul_flop_s_float32": 1e9}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(contenders, "MEMORY_SHAPES", TINY)
    monkeypatch.setattr(contenders, "CONV_SHAPES", {"arena": ((2, 12, 16),), "lm": ((2, 12, 16),)})


def test_contenders_take_turns_and_medians_are_theirs():
    order = []

    def sleeper(name, seconds):
        def run():
            order.append(name)
            time.sleep(seconds)

        return run

    taken = timing.medians([sleeper("a", 0.001), sleeper("b", 0.01)], "cpu", rounds=3)
    assert order == ["a", "a", "b", "b", *("a", "b") * 3]
    assert 0.001 <= taken[0] < 0.01 <= taken[1]


def test_ceilings_are_plausible():
    found = timing.ceilings("cpu", [torch.float32])
    assert 1e8 < found["copy_bytes_s"] < 1e13 and 1e8 < found["matmul_flop_s_float32"] < 1e14


def test_every_operator_is_compared_and_ours_agrees_with_the_loop(tiny):
    found = list(rows(comparisons("cpu", ("arena",)), "cpu", LIMITS, rounds=1))
    assert {row["operator"] for row in found} == {
        "gated_memory",
        "mlstm",
        "slstm",
        "short_conv",
        "dynamic_short_conv",
    }
    assert {row["setting"] for row in found if row["operator"] == "gated_memory"} == set(POINTS)
    for row in found:
        assert list(row) == list(FIELDS)
        if row["ours"]:
            assert row["error"] < 1e-5 and row["ms"] > 0 and row["memory_mb"] > 0, row
            assert row["backend"]
            assert row["gradient_error"] < 1e-5
        if row["contender"] == "ours (auto)":
            assert row["ours_times_faster"] == 1
        if "SDPA" in row["contender"]:
            assert row["ms"] > 0 and row["error"] is None, row["note"]


def test_selected_operators_and_points(tiny):
    found = list(comparisons("cpu", ("arena",), operators=("gated_memory",), points=("GDN", "KDA")))
    assert [x.setting for x in found] == ["GDN", "KDA"]
    assert {x.dtype for x in comparisons("cpu", ("lm",), operators=("mlstm",))} == {torch.bfloat16}


def test_bytes_count_each_tensor_once(tiny):
    (gdn2,) = comparisons("cpu", ("arena",), operators=("gated_memory",), points=("GDN-2",))
    tensor = 2 * 12 * 16 * 4
    assert gdn2.bytes_forward == 7 * tensor  # q, k, v, three gates; o
    assert (
        gdn2.bytes_both == 3 * 6 * tensor + 2 * tensor
    )  # and again; the gradients; o written, its gradient read


def compared(**contender):
    x = torch.ones(2, 3, 4)
    ours = Contender(name="ours (auto)", call=lambda x: 2 * x, leaves=[x], ours=True)
    return Comparison(
        operator="twice",
        setting="",
        shape="",
        dtype=torch.float32,
        contenders=[ours, replace(ours, ours=False, **contender)],
        truth=lambda x: 2 * x,
        flop=1.0,
    )


def test_a_wrong_contender_shows_and_a_failing_one_says_why():
    wrong = list(rows([compared(name="wrong", call=lambda x: 2.2 * x)], "cpu", LIMITS, rounds=1))
    assert [round(row["error"], 3) for row in wrong] == [0, 0.1, 0, 0.1]
    assert [round(row["gradient_error"], 3) for row in wrong] == [0, 0.1, 0, 0.1]

    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 3 * grad

    wrong = list(rows([compared(name="wrong back", call=WrongGradient.apply)], "cpu", LIMITS, rounds=1))
    assert [row["error"] for row in wrong] == [0] * 4
    assert [round(row["gradient_error"], 3) for row in wrong] == [0, 0.5, 0, 0.5]

    def fail(x):
        raise RuntimeError("no such\nkernel")

    failed = [
        row for row in rows([compared(name="ill", call=fail)], "cpu", LIMITS, rounds=1) if not row["ours"]
    ]
    assert [row["ms"] for row in failed] == [None, None]
    assert failed[0]["note"] == "cannot run: RuntimeError: no such kernel"


def test_contenders_can_be_left_out_and_no_backend_is_timed_twice(tiny, monkeypatch):
    monkeypatch.setattr(contenders, "_here", lambda device, cpu, cuda: ("chunked",))
    kwargs = {"operators": ("gated_memory",), "points": ("GDN-2",)}
    found = list(rows(comparisons("cpu", ("arena",), **kwargs), "cpu", LIMITS, rounds=1, without=("SDPA",)))
    names = {row["contender"] for row in found}
    assert "ours (auto)" in names and "ours (chunked)" not in names  # chunked is what auto runs
    assert not any("SDPA" in name for name in names)


def test_first_shapes_of_all_come_before_second_ones(tiny, monkeypatch):
    shapes = {"arena": ((2, 12, 1, 16), (2, 14, 1, 16)), "lm": ((2, 13, 1, 16),)}
    monkeypatch.setattr(contenders, "MEMORY_SHAPES", shapes)
    found = comparisons("cpu", ("arena", "lm"), operators=("gated_memory",), points=("KDA", "GDN"))
    order = [(x.setting, x.shape.split()[1]) for x in found]
    assert order == [(p, t) for p in ("KDA", "GDN") for t in ("T12", "T13")] + [
        ("KDA", "T14"),
        ("GDN", "T14"),
    ]


def test_what_is_not_installed_is_left_out():
    assert peers.attribute("no_such_package.part", "name") is None
    assert peers.attribute("kernels.bench.peers", "nothing") is None
    assert peers.attribute("kernels.bench.peers", "attribute") is peers.attribute


def test_the_command_writes_what_it_prints(tmp_path):
    out = tmp_path / "rows.json"
    code = (
        "import runpy, sys\nimport kernels.bench.contenders as c\n"
        "c.CONV_SHAPES = {'arena': ((2, 12, 16),)}; c.MEMORY_SHAPES = {'arena': ((2, 12, 1, 16),)}\n"
        "sys.argv = ['bench', '--repeats', '1', 'operators', '--operators', 'short_conv',"
        f" '--out', {str(out)!r}]\n"
        "runpy.run_module('kernels.bench', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["machine"]["torch"] == torch.__version__
    assert {row["contender"] for row in found["rows"]} >= {"ours (auto)", "torch conv1d (depthwise)"}
    assert "torch conv1d (depthwise)" in done.stdout
