"""What README.md and the pages of docs/ say is what happens."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).parents[1]
PAGES = {path.relative_to(ROOT).as_posix(): path for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
WRITTEN = [name for name in TEXTS if not name.startswith("docs/tasks/")]
BLOCKS = {
    name: re.findall(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE) for name, text in TEXTS.items()
}
TESTED_FILES = (
    "tests/arena/retnet.py",
    "examples/leaky-arena/leaky_arena/task.py",
    "examples/leaky-arena/leaky_arena/measure.py",
)
FILES = [(ROOT / path).read_text(encoding="utf-8").strip() for path in TESTED_FILES]
PYTHON = [
    pytest.param(code, id=f"{name}:{number}")
    for name, blocks in BLOCKS.items()
    for number, (language, code) in enumerate(blocks)
    if language == "python" and code.strip() not in FILES
]
TOML = [code for name in WRITTEN for language, code in BLOCKS[name] if language == "toml"]

SHORTER = {
    "grid": ["--steps", "2"],
    "tune": ["--steps", "2", "--trials", "2", "--seeds", "1"],
    "ablate": ["--steps", "2", "--trials", "2", "--seeds", "1"],
}
"""What is added to a command of the pages when it is tested: the same, but short."""
SMALL = {
    "grid": ["--arch", "gdn,slstm", "--task", "parity", "--seeds", "1"],
    "tune": ["--arch", "gdn,mamba2", "--task", "mqar"],
}
"""And to one that names no architecture: a corner of its experiment."""
NOT_RUN = {
    "make demo": "trains the whole quickstart, and makes an environment",
    "make test": "is these tests",
    "arena grid quickstart --executor ray --address auto --cpus 2 "
    "--out results/quickstart": "needs a cluster",
    "arena grid quickstart --executor slurm --slurm time=60 --slurm partition=short "
    "--out results/quickstart": "needs a cluster",
}
"""Commands of the pages that are not run here, with the reason; their options are checked as all others'."""


def commands(name):
    """The lines of a page's shell blocks; what README.md has too is its."""
    lines = [line for language, code in BLOCKS[name] if language == "sh" for line in code.splitlines()]
    found = [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]
    return [line for line in found if name == "README.md" or line not in commands("README.md")]


@pytest.mark.parametrize("code", PYTHON)
def test_python_blocks_run(code, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_examples_are_the_tested_files():
    """The architecture (test_blocks_gate_space.py), the task and the measurement (test_example_plugin.py)."""
    shown = [code.strip() for language, code in BLOCKS["README.md"] if language == "python"]
    for path, text in zip(TESTED_FILES, FILES, strict=True):
        assert shown.count(text) == 1, f"python tools/readme.py examples: README.md does not show {path}"
        assert len(text.splitlines()) < 60


def test_toml_blocks_are_accepted():
    """Sections of an experiment, each in one that has what it refers to."""
    from arena.grid import parse_experiment

    task = {"name": "parity", "train_lengths": 30, "eval_lengths": 90}
    rest = {"name": "x", "archs": ["gdn2", "gdn", "swa"], "tasks": [task], "train": {"steps": 1}}
    sections = [tomllib.loads(text) for text in TOML]
    experiments = [section for section in sections if "project" not in section]
    assert len(experiments) >= 3 and any("tuning" in section for section in experiments)
    for section in experiments:
        parse_experiment({**rest, **section})
    for section in sections:
        if "project" in section:
            made = tomllib.loads((ROOT / "examples/leaky-arena/pyproject.toml").read_text(encoding="utf-8"))
            assert section["project"]["entry-points"] == made["project"]["entry-points"]


@pytest.mark.parametrize("name", [name for name in WRITTEN if commands(name)])
def test_commands_run(name, tmp_path):
    """Every command of a page in order: grids are cut to two steps and one corner, see SHORTER and SMALL."""
    around = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    folders = {}

    def run(words):
        words = [folders.setdefault(w, str(tmp_path / w)) if w.startswith("results/") else w for w in words]
        done = subprocess.run(
            [sys.executable, "-c", "from arena.cli import main; main()", *words],
            cwd=ROOT,
            env=around,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{words}: {done.stdout[-1500:]}{done.stderr[-1500:]}"

    for command in commands(name):
        if command in NOT_RUN:
            continue
        assert command.startswith("arena "), f"{name}: {command!r} is neither run nor in NOT_RUN"
        words = shlex.split(command)[1:]
        for folder in [w for w in words if w.startswith("results/") and words[0] not in ("grid", "tune")]:
            if words[0] in ("report", "dynamics", "compare") and folder not in folders:
                run(["grid", "quickstart", "--out", folder, *SHORTER["grid"], *SMALL["grid"]])
        words += SHORTER.get(words[0], [])
        if "--arch" not in words:
            words += SMALL.get(words[0], [])
        run(words)


def test_what_is_not_run_is_on_a_page():
    everything = {command for name in WRITTEN for command in commands(name)}
    assert set(NOT_RUN) <= everything


def test_commands_and_options_that_are_named_exist():
    """Also those in the middle of a sentence, and those that are not run."""
    from arena.cli.app import app

    group = typer.main.get_command(app)
    for name, text in TEXTS.items():
        inline = re.findall(
            r"`arena ([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        )
        whole = [command.removeprefix("arena ") for command in commands(name) if command.startswith("arena ")]
        for line in [*inline, *whole]:
            words = line.split()
            command = group.commands.get(words[0])
            assert command is not None, f"{name}: there is no command arena {line}"
            known = {"--plugin"}
            for part in [command, *getattr(command, "commands", {}).values()]:
                known |= {option for parameter in part.params for option in parameter.opts}
            for word in words[1:]:
                if word.startswith("--"):
                    assert word.split("=")[0] in known, f"{name}: arena {line}: no option {word}"


def test_every_path_named_exists():
    for name, text in TEXTS.items():
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            if not link.startswith("http"):
                assert (PAGES[name].parent / link).exists(), f"{name}: {link}"
        for path in re.findall(r"`((?:tests|arena|kernels|experiments|synthetic_tasks)/[\w/.]+)`", text):
            assert (ROOT / path).exists(), f"{name}: {path}"


def test_every_page_is_in_the_index():
    index = TEXTS["docs/README.md"]
    for path in ROOT.glob("docs/*.md"):
        assert path.name == "README.md" or f"]({path.name})" in index, path.name


def _tool(name):
    """A module of tools/."""
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_of_the_tasks_are_what_the_code_says():
    wanted = _tool("tasks").pages()
    stored = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs/tasks").glob("*.md")}
    assert stored.keys() == wanted.keys(), "python tools/tasks.py"
    for name, text in wanted.items():
        assert stored[name] == text, f"docs/tasks/{name} is old: python tools/tasks.py"


def test_the_table_of_all_architectures_has_all():
    """Names of the page on gate space, against those that can be built."""
    from arena.blocks.registry import block_names, model_names

    text = TEXTS["docs/gate-space.md"]
    for name in [*block_names(), *model_names()]:
        assert f"`{name.removesuffix('-neg').replace('[2]', '[n]')}`" in text, name
