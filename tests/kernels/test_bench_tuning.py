"""Other packages' autotuning, limited: what is tried, what is kept, and that Triton's own way comes back."""

from types import SimpleNamespace

import pytest
import torch

from kernels.bench import tuning
from tests.kernels.triton_interpreter import compiled, interpreted, run_in_a_fresh_process, triton

tl = triton.language
CONFIGS = [
    triton.Config({"BLOCK": block}, num_warps=warps, num_stages=stages)
    for block in (16, 32)
    for warps in (2, 4, 8)
    for stages in (2, 3)
]


@compiled
def test_in_a_fresh_process():
    run_in_a_fresh_process(__file__)


def test_few_are_unlike_and_begin_in_the_middle():
    chosen = tuning.few(CONFIGS, 3)
    assert (chosen[0].kwargs, chosen[0].num_warps, chosen[0].num_stages) == ({"BLOCK": 32}, 4, 3)
    second = chosen[1]
    assert second.kwargs["BLOCK"] == 16 and second.num_warps != 4 and second.num_stages == 2
    assert len({(c.num_warps, c.num_stages, c.kwargs["BLOCK"]) for c in chosen}) == 3
    assert {id(c) for c in tuning.few(CONFIGS, 99)} == {id(c) for c in CONFIGS}


def test_without_a_limit_triton_is_left_alone():
    from triton.runtime.autotuner import Autotuner

    before = Autotuner.prune_configs, Autotuner._bench, Autotuner.check_disk_cache
    with tuning.tuning(None) as found:
        assert (Autotuner.prune_configs, Autotuner._bench, Autotuner.check_disk_cache) == before
    assert found == []
    with pytest.raises(KeyError), tuning.tuning(2):
        assert Autotuner.prune_configs is not before[0]
        raise KeyError
    assert (Autotuner.prune_configs, Autotuner._bench, Autotuner.check_disk_cache) == before


@triton.jit
def add_one(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n) + 1, mask=i < n)


@interpreted
def test_a_kernel_is_tuned_once_and_the_fastest_is_told(monkeypatch):
    compiled_together = []
    monkeypatch.setattr(
        tuning, "compile_all", lambda kernel, args, meta, configs: compiled_together.append(configs)
    )
    times = iter([3.0, 1.0, 2.0])

    def brief(call, quantiles):
        call()
        return [next(times)] * 3

    monkeypatch.setattr(tuning, "brief", brief)
    kernel = triton.autotune(configs=CONFIGS, key=["n"])(add_one)
    x, y = torch.zeros(50), torch.full((50,), torch.nan)
    with tuning.tuning(3) as found:
        for _ in range(2):
            kernel[lambda meta: (triton.cdiv(50, meta["BLOCK"]),)](x, y, 50)
    assert (y == 1).all()
    assert len(compiled_together) == 1
    best = tuning.few(CONFIGS, 3)[1]
    assert found == [
        {"kernel": "add_one", "key": "n=50 float32", "tried": 3, "of": 12, "best": tuning.words(best)}
    ]


def test_words_of_a_setting():
    config = SimpleNamespace(kwargs={"BK": 64}, num_warps=8, num_stages=2)
    assert tuning.words(config) == "BK 64, 8 warps, 2 stages"
