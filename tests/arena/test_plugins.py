"""Plug-ins: what is loaded, what is refused, and that versions of one are never mixed."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys

import pytest

import synthetic_tasks
from arena import plugins
from arena.blocks import block_names, registry
from arena.grid.experiment import parse_experiment
from arena.grid.plan import plan_runs
from arena.plugins import PluginError
from synthetic_tasks import base

TINY = ""

BLOCK = """
from arena.blocks.matrix import register_memory
from arena.memory import GateSpec

register_memory("mine", GateSpec(decay="scalar"))
"""
TASK = """
import dataclasses
from synthetic_tasks.state_tracking import Parity

@dataclasses.dataclass(frozen=True, kw_only=True)
class Mine(Parity):
    '''Mine.'''
"""


@pytest.fixture
def world(monkeypatch, tmp_path):
    """Nothing is loaded yet, and whatever is gets forgotten: (module -> source) puts modules in reach."""
    for place, name in (
        (registry, "_BUILDERS"), (registry, "_FAMILIES"), (base, "_REGISTRY"),
        (plugins, "_owners"), (plugins, "_measurements"),
    ):  # fmt: skip
        monkeypatch.setattr(place, name, dict(getattr(place, name)))
    monkeypatch.setattr(plugins, "_done", set())
    monkeypatch.setattr(plugins, "_modules", [])
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda: importlib.metadata.EntryPoints(()))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    known = set(sys.modules)

    def write(**sources):
        for name, text in sources.items():
            (tmp_path / f"{name}.py").write_text(text)
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        plugins._source.cache_clear()

    yield write
    for name in set(sys.modules) - known:
        del sys.modules[name]


class _Distribution(importlib.metadata.Distribution):
    def __init__(self, name, version):
        self._metadata = {"Name": name, "Version": version}

    metadata = property(lambda self: self._metadata)
    name = property(lambda self: self._metadata["Name"])
    version = property(lambda self: self._metadata["Version"])

    def read_text(self, filename):
        return None

    def locate_file(self, path):
        return path


@pytest.fixture
def install(world, monkeypatch):
    """Make packages look installed: (distribution, version, group, name, value)..."""

    def entries(*lines):
        made = [
            importlib.metadata.EntryPoint(name, value, group)._for(_Distribution(dist, version))
            for dist, version, group, name, value in lines
        ]
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda: importlib.metadata.EntryPoints(made))

    return entries


def runs_of(arch="mine", task="parity"):
    data = {
        "name": "x",
        "archs": [arch],
        "tasks": [{"name": task, "train_lengths": 8, "eval_lengths": 16}],
        "train": {"steps": 1},
        "model": {"d_model": 8},
        "seeds": 1,
    }
    return plan_runs(parse_experiment(data))


def test_a_module_registers_and_its_source_is_in_the_run_id(world):
    world(my_block=BLOCK)
    plugins.load(["my_block"])
    assert "mine" in block_names() and plugins.explicit() == ("my_block",)
    (first,) = runs_of()
    version = first.config["versions"]["plugin:my_block"]
    assert version.startswith("0+source.") and plugins.loaded() == {"my_block": version}
    (ours,) = runs_of("gdn")
    assert not any(key.startswith("plugin") for key in ours.config["versions"])
    plugins.require(first.config["versions"])
    plugins.load(["my_block"])  # again: nothing happens

    registry._BUILDERS.pop("mine")
    plugins._owners.clear()
    plugins._modules.clear()
    world(my_block=BLOCK.replace('"scalar"', '"channel"'))
    plugins.load(["my_block"])
    (second,) = runs_of()
    assert second.id != first.id and second.config["versions"] != first.config["versions"]
    with pytest.raises(PluginError, match=r"the run has plug-in my_block .* loaded is"):
        plugins.require(first.config["versions"])


def test_a_plugin_that_is_not_loaded_is_named(world):
    with pytest.raises(PluginError, match="plug-in other 1, not loaded here: install it"):
        plugins.require({"task": 1, "plugin:other": "1"})


def test_entry_points_register_blocks_tasks_and_measurements(world, install):
    world(
        pack=BLOCK.replace('register_memory("mine"', 'MINE = register_memory("own"') + TASK
        + "\ndef build(**kind):\n    from arena.blocks import build_block\n"
        "    return build_block('own', **kind)\n"
        "def measure(model, task, length):\n    'Measured.'\n"
    )  # fmt: skip
    install(
        ("dist", "1.2", "arena.blocks", "mine", "pack:build"),
        ("dist", "1.2", "arena.tasks", "mytask", "pack:Mine"),
        ("dist", "1.2", "arena.measurements", "mymeasure", "pack:measure"),
    )
    plugins.load(measurements=False)
    assert {"mine", "own"} <= set(block_names()) and "mytask" in synthetic_tasks.names()
    assert not plugins.measurements()
    plugins.load()
    assert list(plugins.measurements()) == ["mymeasure"]
    for arch, task in (("mine", "parity"), ("own", "parity"), ("gdn", "mytask"), ("gdn+own", "parity")):
        arch, layers = arch, runs_of(arch, task)
        assert layers[0].config["versions"]["plugin:dist"].startswith("1.2+source."), (arch, task)
    assert plugins.owner("arena.tasks", "mytask").name == "dist"


def test_another_version_is_another_run(world, install):
    ids = set()
    for version in ("1.0", "1.1"):
        world(pack=BLOCK)
        install(("dist", version, "arena.blocks", "mine", "pack"))
        plugins.load()
        ids.add(runs_of()[0].id)
        for kept in (registry._BUILDERS, plugins._owners):
            kept.pop("mine", None)
        plugins._owners.clear()
        plugins._done.clear()
    assert len(ids) == 2


def test_a_family_of_blocks_belongs_to_its_plugin(world):
    world(
        family="from arena.blocks.registry import register_family\n"
        "from arena.blocks import build_block\n"
        "@register_family('twice[n]', largest=3)\n"
        "def twice(n):\n    return lambda **kind: build_block('gdn', **kind)\n"
    )
    plugins.load(["family"])
    assert "plugin:family" in runs_of("twice[3]")[0].config["versions"]


REFUSED = {
    "no such module": (None, "ModuleNotFoundError: No module named 'absent'"),
    "raises": ("1 / 0", "ZeroDivisionError: division by zero"),
    "ends": ("import sys; sys.exit('no\\nlicence')", "SystemExit: no licence"),
    "syntax": ("def", "SyntaxError"),
    "takes a block": (BLOCK.replace("mine", "gdn"), "block name 'gdn' is taken"),
    "takes a task": (
        TASK + "\nfrom synthetic_tasks import register\nregister('mqar', 'x')(Mine)",
        "'mqar' is taken",
    ),
    "no name": (BLOCK.replace("mine", "a+b"), "'a+b' is no name"),
    "no name of a measurement": (
        "from arena.plugins import measurement\nmeasurement('../up')(lambda *_: None)",
        "'../up' is no name",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_one_line_and_exit_2(case, world, here):
    source, says = REFUSED[case]
    name = "absent" if source is None else "bad_plugin"
    if source is not None:
        world(**{name: source})
    status, out, err = here("grid", "--arch", "gdn", "--task", "parity", "--plugin", name)
    assert status == 2 and err.count("\n") == 1 and not out
    assert f"--plugin {name}: " in err and says in err
    sys.modules.pop(name, None)
    _, _, err = here("list", f"--plugin={name}", "--debug")
    assert "Traceback" in err


@pytest.mark.parametrize("name", ["a b", "../up", "/etc/passwd", "a.", "x;y", "", "-x", "a\0b"])
def test_what_is_no_module_is_refused(name, world, here):
    status, _, err = here("list", "--plugin", name)
    assert status == 2 and err.count("\n") == 1 and "--plugin" in err


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([("arena.blocks", "gdn", "pack:build")], "block name 'gdn' is taken"),
        ([("arena.tasks", "parity", "pack:Mine")], "task name 'parity' is taken"),
        ([("arena.tasks", "t", "pack:build")], "a task is a class of synthetic_tasks.Task"),
        ([("arena.blocks", "b", "pack:number")], "3 cannot be called"),
        ([("arena.blocks", "b", "pack:absent")], "AttributeError"),
        ([("arena.blocks", "b", "pack")], "importing it registers no 'b'"),
        ([("arena.blocks", "gdn", "pack")], "the name 'gdn' is taken"),
        ([("arena.blocks", "a+b", "pack:build")], "'a+b' is no name"),
    ],
)
def test_an_entry_that_is_wrong_names_its_package(lines, says, world, install, here):
    world(pack=TASK + "\nnumber = 3\ndef build(**kind): ...\n")
    install(*(("some-dist", "1", *line) for line in lines))
    status, out, err = here("list")
    assert status == 2 and err.count("\n") == 1 and not out
    assert "plug-in some-dist (" in err and says in err


def test_two_packages_cannot_have_one_name(world, install, here):
    world(pack="def build(**kind): ...\n", other="from pack import build as same\ndef build(**kind): ...\n")
    for second, says in (("other:build", "is taken by"), ("other:same", "is taken by plug-in one")):
        plugins._done.clear()
        plugins._owners.clear()
        registry._BUILDERS.pop("b", None)
        install(("one", "1", "arena.blocks", "b", "pack:build"), ("two", "1", "arena.blocks", "b", second))
        status, _, err = here("list")
        assert status == 2 and err.count("\n") == 1 and "plug-in two" in err and says in err


def test_plugin_may_stand_anywhere(world, here):
    world(my_block=BLOCK)
    for words in (
        ["list", "archs", "--plugin", "my_block"],
        ["--plugin", "my_block", "list"],
        ["list", "--plugin=my_block", "archs"],
    ):
        status, out, err = here(*words)
        assert status == 0 and not err and "mine " in out and "(plug-in my_block 0+source." in out
    for words in (["list", "--plugin"], ["list", "--plugin", "--debug"]):
        status, _, err = here(*words)
        assert status == 2 and "--plugin is followed by the name of a module" in err.splitlines()[-1]
