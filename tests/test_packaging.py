"""The light rooms import with torch and numpy alone; imports between rooms point one way."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIGHT = (
    "kernels", "synthetic_tasks",
    "arena.memory", "arena.blocks", "arena.model", "arena.training", "arena.statistics",
)  # fmt: skip

# Runs in a fresh interpreter that hides every installed distribution outside the closure of torch and numpy.
BARE_IMPORT = """
import importlib, importlib.metadata as md, pkgutil, re, sys
allowed, todo = set(), ["torch", "numpy"]
while todo:
    name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
    if name in allowed:
        continue
    allowed.add(name)
    try:
        requires = md.requires(name) or []
    except md.PackageNotFoundError:
        continue
    todo += [re.match(r"[A-Za-z0-9._-]+", r).group() for r in requires if "extra ==" not in r]
hidden = set()
for top, dists in md.packages_distributions().items():
    names = {re.sub(r"[-_.]+", "-", d).lower() for d in dists}
    if not names & allowed and "memory-arena" not in names:
        hidden.add(top)

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in hidden:
            raise ModuleNotFoundError(f"hidden: {name}", name=name)

sys.meta_path.insert(0, Hide())
for root in sys.argv[1:]:
    module = importlib.import_module(root)
    for found in pkgutil.walk_packages(getattr(module, "__path__", []), root + "."):
        if not re.search("triton|numba|gpu_", found.name.rsplit(".", 1)[-1]):
            importlib.import_module(found.name)
loaded = {m.split(".")[0] for m in sys.modules} & hidden
assert not loaded, loaded
assert "polars" in hidden and "pydantic" in hidden, "the test must hide something"
"""


def test_light_rooms_import_with_torch_and_numpy_alone():
    done = subprocess.run(
        [sys.executable, "-c", BARE_IMPORT, *LIGHT], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


FORBIDDEN = {
    "kernels": ("arena", "synthetic_tasks", "experiments"),
    "synthetic_tasks": ("arena", "kernels", "experiments"),
    "arena/memory.py": ("arena", "synthetic_tasks", "experiments"),
    "arena/blocks": (
        "arena.model",
        "arena.training",
        "arena.grid",
        "arena.report",
        "arena.cli",
        "synthetic_tasks",
    ),
    "arena/model.py": ("arena.training", "arena.grid", "arena.report", "arena.cli", "synthetic_tasks"),
    "arena/training": ("arena.grid", "arena.report", "arena.cli"),
    "arena/statistics": ("arena.training", "arena.grid", "arena.report", "arena.cli"),
    "arena/grid": ("arena.report", "arena.cli"),
    "arena/report": ("arena.cli",),
    "arena/tuning": ("arena.cli", "arena.report"),
    "arena/ablation": ("arena.cli", "arena.dynamics"),
    "arena/dynamics": ("arena.cli", "arena.ablation", "arena.tuning"),
}


@pytest.mark.parametrize("room", FORBIDDEN)
def test_imports_point_one_way(room):
    path = ROOT / room
    files = [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))
    assert files
    for file in files:
        for name in imported(file):
            for other in FORBIDDEN[room]:
                assert not (name == other or name.startswith(other + ".")), (
                    f"{file.relative_to(ROOT)} imports {name}"
                )


def test_base_dependencies_are_the_stated_ones():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[a-z0-9-]+", d).group() for d in project["dependencies"]}
    assert names == {
        "torch", "numpy", "pydantic", "typer", "rich", "polars", "optuna", "seaborn", "jinja2", "safetensors",
    }  # fmt: skip
    assert {"gpu", "cluster", "dev"} <= set(project["optional-dependencies"])


def test_no_file_grows_past_four_hundred_lines():
    for folder in ("arena", "kernels", "synthetic_tasks", "tests"):
        for file in (ROOT / folder).rglob("*.py"):
            assert len(file.read_text().splitlines()) <= 400, file
