"""Every check passes a block that is right, and fails one that is wrong in what it checks."""

from __future__ import annotations

import pytest

from arena.blocks import registry
from arena.conformance import CHECKS, Subject, examine
from tests.arena.broken_blocks import BROKEN, Good

TINY = ""


def test_a_block_that_does_everything_right_passes():
    findings = examine(Subject(build=Good))
    assert [f.check for f in findings] == list(CHECKS)
    assert all(f.passed for f in findings), [(f.check, f.note) for f in findings if not f.passed]


def test_every_check_has_a_block_that_fails_it():
    assert {check for check, _ in BROKEN} == set(CHECKS)


@pytest.mark.parametrize(("check", "block"), BROKEN, ids=[block.__name__ for _, block in BROKEN])
def test_a_broken_block_fails(check, block):
    (finding,) = examine(Subject(build=block), {check: CHECKS[check]})
    assert not finding.passed and finding.note and "\n" not in finding.note


# what else a fault is bound to break
ALSO = {
    "NoVmap": {"gradient"},
    "WrongGradient": {"vmap: fleet = singles"},
    "TraceLies": set(),
    "Understates": set(),
    "OwnWords": {"trace continues"},
    "OtherStep": set(),
    "OtherStart": {"forward = steps"},
    "UnusedWeight": set(),
    "TraceForgets": set(),
}


@pytest.mark.parametrize("name", ALSO)
def test_a_fault_is_told_by_its_own_check(name):
    check, block = next(entry for entry in BROKEN if entry[1].__name__ == name)
    assert {f.check for f in examine(Subject(build=block)) if not f.passed} == {check} | ALSO[name]


@pytest.fixture
def named(monkeypatch):
    """Blocks by name, for the command line."""
    known = dict(registry._BUILDERS)
    for block in [Good, *(block for _, block in BROKEN)]:

        def build(*, d_model, n_heads, outer, conv, depth, block=block):
            return block(d_model=d_model, n_heads=n_heads)

        known[block.__name__] = build
    monkeypatch.setattr(registry, "_BUILDERS", known)


def test_the_command_prints_a_line_a_check(here, named):
    status, out, err = here("check-block", "Good")
    assert status == 0 and not err
    assert len(out.splitlines()) == 2 * len(CHECKS)
    status, out, err = here("check-block", "Raises", "--outer", "common")
    assert status == 1 and "Traceback" not in out + err
    assert out.count("FAILS") == len(CHECKS) - 2  # its weights and the trace are as they should be
    assert "RuntimeError: no kernel for this device" in out and "--debug shows where" in out
    status, out, err = here("check-block", "Raises", "--outer", "common", "--debug")
    assert status == 1 and "in forward" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["Goood"], "did you mean Good"),
        (["gdn", "--outer", "mine"], "--outer is common, official or both"),
        (["gdn", "--d-model", "0"], "--d-model is a number from 1 to 1024"),
        (["gdn", "--n-heads", "3"], "multiple of n_heads"),
        (["gdn", "--param", "gate=1"], "no option 'gate'"),
        ([], "Missing argument"),
    ],
)
def test_a_wrong_request_is_one_line(here, named, arguments, says):
    status, out, err = here("check-block", *arguments)
    assert status == 2 and says in err and err.count("\n") == 1 and not out
