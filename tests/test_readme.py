"""What the README says is what happens."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
PYTHON = [code for language, code in BLOCKS if language == "python" and "register_memory" not in code]
COMMANDS = [
    line.split("#")[0].strip()
    for language, code in BLOCKS
    if language == "sh"
    for line in code.splitlines()
    if line.startswith("arena ")
]


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_blocks_run(code, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_example_architecture_is_the_tested_file():
    shown = [code for language, code in BLOCKS if language == "python" and "register_memory" in code]
    assert [code.strip() for code in shown] == [(ROOT / "tests/arena/retnet.py").read_text().strip()]
    assert len(shown[0].splitlines()) < 60


def test_the_tuning_section_is_one():
    from arena.grid import parse_experiment

    (text,) = [code for language, code in BLOCKS if language == "toml" and "[tuning]" in code]
    task = {"name": "parity", "train_lengths": 30, "eval_lengths": 90}
    rest = {"name": "x", "archs": ["gdn2", "gdn", "swa"], "tasks": [task], "train": {"steps": 1}}
    assert parse_experiment({**rest, **tomllib.loads(text)}).tuning.points == 8


def test_commands_run(tmp_path):
    """Every command of the README in order, the grids cut to two steps and one small corner."""
    folders = {}
    assert {command.split()[1] for command in COMMANDS} >= {"list", "show", "grid", "report", "doctor"}
    for command in COMMANDS:
        words = shlex.split(command)[1:]
        words = [folders.setdefault(w, str(tmp_path / w)) if w.startswith("results/") else w for w in words]
        if words[0] == "ablate":
            words += ["--steps", "2", "--trials", "2", "--seeds", "1"]
        if words[0] == "tune":
            words += ["--steps", "2", "--trials", "2", "--seeds", "1"]
            if "--arch" not in words:
                words += ["--arch", "gdn,mamba2", "--task", "mqar"]
        if words[0] == "grid":
            words += ["--steps", "2"]
            if "--arch" not in words:
                words += ["--arch", "gdn,slstm", "--task", "parity", "--seeds", "1"]
        done = subprocess.run(
            [sys.executable, "-c", "from arena.cli import main; main()", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{command}: {done.stdout[-1500:]}{done.stderr[-1500:]}"


def test_every_path_named_exists():
    for path in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:tests|arena|kernels|experiments|synthetic_tasks)/[\w/.]+)`", README):
        assert (ROOT / path).exists(), path
