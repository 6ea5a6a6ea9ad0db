"""Plug-ins: other packages' architectures, tasks and measurements.

A package names what it adds in its ``pyproject.toml``; once it is installed, every command knows it:

    [project.entry-points."arena.blocks"]
    leaky = "my_package.leaky:Leaky"                  # a Block class, or a function that builds one

    [project.entry-points."arena.tasks"]
    last_seen = "my_package.last_seen:LastSeen"       # a class of synthetic_tasks.Task

    [project.entry-points."arena.measurements"]
    weight_norm = "my_package.weights:weight_norm"    # (model, task, length) -> polars.DataFrame

The entry's name is the name that people type. An entry without ``:object`` is imported, and has to register
the name by itself (``arena.blocks.register``, ``arena.blocks.matrix.register_memory``,
``synthetic_tasks.register``, :func:`measurement`). A module of any place is loaded by ``--plugin MODULE``,
and registers in the same way. Nothing is ever imported because of what an experiment or a result says.

What can change a result is part of a run's identity: the version of the plug-in behind a block or a task, and
a digest of its source, are in the run id, so that results of two versions are never taken for one another.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

GROUPS = ("arena.blocks", "arena.tasks", "arena.measurements")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,59}(\[n\](-[a-z]+)?)?")
_RULE = "letters, digits, _ . and -, the first one a letter"
_NUMBER = re.compile(r"\[\d+\]")  # a family of blocks is registered once
_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_SOURCE = (".py", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h")

Measurement = Callable[[Any, Any, int], Any]
"""(model, task, length) -> polars.DataFrame, see :func:`measurement`."""


class PluginError(ValueError):
    """A plug-in cannot be used; the message is one line that names it."""


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """Who added a name."""

    name: str
    """Its distribution, or the module of ``--plugin`` where it belongs to none."""
    version: str
    """``0.1.0+source.0123456789ab``: of the distribution (``0`` without one), and a digest of the source."""


_owners: dict[tuple[str, str], Plugin] = {}  # (group, name) -> plug-in
_measurements: dict[str, Measurement] = {}
_done: set[tuple[str, ...]] = set()  # (group, name, distribution) of the entries that are loaded
_modules: list[str] = []


def measurement(name: str) -> Callable[[Measurement], Measurement]:
    """Decorator: make a function known to ``arena dynamics`` as ``name``.

    It is called with a trained model (``arena.model.Model``, in evaluation mode, on the CPU), the task it was
    trained on and a sequence length, and returns a polars frame, a row a number: ``quantity`` (text) and
    ``value`` (number), and whatever says where: ``layer``, ``head``, ``token``... Its docstring explains it
    on the page and in the data dictionary.

    Raises:
        ValueError: the name is taken by another function, or is none.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name: {_RULE}")

    def add(function: Measurement) -> Measurement:
        taken = _measurements.get(name)
        if taken is not None and taken is not function:
            raise ValueError(f"measurement {name!r} is taken by {taken.__module__}.{taken.__qualname__}")
        _measurements[name] = function
        return function

    return add


def measurements() -> dict[str, Measurement]:
    """The measurements that plug-ins have added, by name."""
    return dict(sorted(_measurements.items()))


def load(modules: Sequence[str] = (), *, measurements: bool = True) -> None:
    """Load the installed plug-ins and those of ``--plugin``; what is loaded already stays as it is.

    Every process that plans, trains or measures calls it: the driver with the modules of the command line,
    its workers with :func:`explicit` of the driver.

    Args:
        modules: names of modules, looked for in the current folder last.
        measurements: also those; workers that only train leave them out.

    Raises:
        PluginError: one cannot be imported, is not what its group asks for, or takes a name that is taken.
    """
    groups = GROUPS if measurements else GROUPS[:2]
    found = importlib.metadata.entry_points()
    entries = sorted((entry for group in groups for entry in found.select(group=group)), key=_order)
    for entry in entries:
        if _order(entry) not in _done:
            _load_entry(entry)
            _done.add(_order(entry))
    for module in modules:
        if module not in _modules:
            _load_module(module)
            _modules.append(module)


def explicit() -> tuple[str, ...]:
    """The modules of ``--plugin`` that are loaded: what workers are to be given."""
    return tuple(_modules)


def loaded() -> dict[str, str]:
    """Name and version of every plug-in whose blocks, tasks or measurements are registered."""
    return {plugin.name: plugin.version for plugin in sorted(_owners.values(), key=lambda p: p.name)}


def owner(group: str, name: str) -> Plugin | None:
    """Who added a name; None for what comes with the toolkit."""
    return _owners.get((group, _NUMBER.sub("[n]", name)))


def used(blocks: Iterable[str], task: str) -> dict[str, str]:
    """Name and version of the plug-ins behind blocks and a task: what belongs into a run's id."""
    found = {owner("arena.blocks", name) for name in blocks} | {owner("arena.tasks", task)}
    return {plugin.name: plugin.version for plugin in found if plugin is not None}


def require(versions: Mapping[str, Any]) -> None:
    """Refuse to go on with other plug-ins than a run was planned or trained with.

    Args:
        versions: ``config["versions"]`` of the run; its plug-ins have keys ``plugin:NAME``.

    Raises:
        PluginError: one is missing here, or has another version or source.
    """
    have = loaded()
    for key, version in versions.items():
        prefix, _, name = key.partition(":")
        if prefix != "plugin" or have.get(name) == version:
            continue
        if name in have:
            raise PluginError(f"the run has plug-in {name} {version}; loaded is {have[name]}")
        raise PluginError(f"the run has plug-in {name} {version}, not loaded here: install it, or --plugin")


def _order(entry: importlib.metadata.EntryPoint) -> tuple[str, ...]:
    return entry.group, entry.name, _distribution(entry)


def _distribution(entry: importlib.metadata.EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.value.partition(":")[0]


def _load_entry(entry: importlib.metadata.EntryPoint) -> None:
    module, _, _ = entry.value.partition(":")
    who = f"plug-in {_distribution(entry)} ({entry.group}: {entry.name} = {entry.value})"
    imported, before = module in sys.modules, _registered()
    with _said(who):
        found = entry.load()
        if not isinstance(found, ModuleType):
            _register(entry.group, entry.name, found)
        elif entry.name not in _registered()[entry.group]:
            raise ValueError(f"importing it registers no {entry.name!r}; name an object: module:object")
        elif entry.name in before[entry.group] and not imported and not owner(entry.group, entry.name):
            raise ValueError(f"the name {entry.name!r} is taken")
    version = entry.dist.version if entry.dist is not None else "0"
    plugin = Plugin(name=_distribution(entry), version=_version(version, module))
    taken = owner(entry.group, entry.name)
    if taken is not None and taken.name != plugin.name:
        raise PluginError(f"{who}: the name {entry.name!r} is taken by plug-in {taken.name}")
    _own(before, plugin, who)
    _owners[entry.group, entry.name] = plugin


def _load_module(module: str) -> None:
    who = f"--plugin {module}"
    if not _MODULE.fullmatch(module):
        raise PluginError(f"{who}: give the name of a module, as in an import")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # last, so that nothing there takes the place of what is installed
    before = _registered()
    with _said(who):
        importlib.import_module(module)
    top = module.partition(".")[0]
    found = importlib.metadata.packages_distributions().get(top, [])
    if found:
        plugin = Plugin(name=found[0], version=_version(importlib.metadata.version(found[0]), top))
    else:
        plugin = Plugin(name=module, version=_version("0", top))
    _own(before, plugin, who)


@contextlib.contextmanager
def _said(who: str) -> Iterator[None]:
    """Turn whatever a plug-in raises into one line that names it."""
    try:
        yield
    except (Exception, SystemExit) as error:
        text = " ".join(str(error).split())[:300]
        raise PluginError(f"{who}: {type(error).__name__}: {text}") from error


def _registered() -> dict[str, set[str]]:
    """Group -> all names that are known now."""
    import synthetic_tasks
    from arena.blocks import block_names

    return dict(
        zip(GROUPS, (set(block_names()), set(synthetic_tasks.names()), set(_measurements)), strict=True)
    )


def _register(group: str, name: str, found: Any) -> None:
    """Make an entry's object known by the entry's name, where its own decorator has not."""
    import synthetic_tasks
    from arena.blocks import register

    if group == "arena.tasks":
        if not (isinstance(found, type) and issubclass(found, synthetic_tasks.Task)):
            raise ValueError(f"a task is a class of synthetic_tasks.Task, not {found!r}")
        synthetic_tasks.register(name, getattr(found, "family", "plug-in"))(found)
    elif not callable(found):
        raise ValueError(f"{found!r} cannot be called")
    else:
        (register if group == "arena.blocks" else measurement)(name)(found)


def _own(before: Mapping[str, set[str]], plugin: Plugin, who: str) -> None:
    """Note what importing a plug-in has added."""
    for group, names in _registered().items():
        for name in sorted(names - before[group]):
            name = _NUMBER.sub("[n]", name)
            if not _NAME.fullmatch(name):
                raise PluginError(f"{who}: {name!r} is no name: {_RULE}")
            _owners[group, name] = plugin


def _version(version: str, module: str) -> str:
    return f"{version}+source.{_source(module.partition('.')[0])}"


@functools.cache
def _source(top: str) -> str:
    """A digest of the source of a top-level module or package: 12 hex digits."""
    spec = importlib.util.find_spec(top)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = [(path, Path(folder)) for folder in folders for path in Path(folder).rglob("*")]
    if not folders and spec is not None and spec.origin is not None:
        files = [(Path(spec.origin), Path(spec.origin).parent)]
    found = hashlib.sha256()
    for path, root in sorted(files):
        if path.suffix in _SOURCE and path.is_file():
            found.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:12]
