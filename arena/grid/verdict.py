"""What ``arena doctor`` found in this environment, kept in the user's cache folder, so that every result row
can say whether the kernels that made it had been examined.

The file's name is a digest of all that the findings depend on: versions, devices, the text of the kernels.
Its contents are the verdict of each path in each case, without the digits of the errors, which differ between
runs.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arena.grid.environment import ROOT, environment
from arena.grid.plan import digest


def cache_folder() -> Path:
    """``memory-arena/doctor`` in the user's cache folder (XDG_CACHE_HOME, or ~/.cache)."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "memory-arena" / "doctor"


@functools.cache
def _kernels_text() -> str:
    """A digest of every file of ``kernels``."""
    found = hashlib.sha256()
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def _key() -> str:
    around = {name: value for name, value in environment().items() if name != "commit"}
    return digest({**around, "kernels": _kernels_text()})


def _read(path: Path) -> dict[str, str]:
    try:
        lines = json.loads(path.read_text(encoding="utf-8"))["verdicts"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return lines if isinstance(lines, dict) else {}


def keep(verdicts: Mapping[str, str]) -> str:
    """Add verdicts (path and case -> ``ok``, ``WRONG`` or ``cannot run``) to those of this environment.

    Returns:
        The verdict as rows carry it.

    Raises:
        OSError: The folder cannot be written.
    """
    path = cache_folder() / f"{_key()}.json"
    merged = {**_read(path), **verdicts}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"environment": environment(), "verdicts": merged}, indent=1, sort_keys=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(name, path)
    return _summary(path.stem, merged)


def verdict() -> str | None:
    """The verdict as rows carry it: ``ok-`` or ``wrong-`` and a hash.

    None: the doctor never ran in this environment, or with other kernels.
    """
    key = _key()
    found = _read(cache_folder() / f"{key}.json")
    return _summary(key, found) if found else None


def _summary(key: str, verdicts: Mapping[str, Any]) -> str:
    word = "wrong" if "WRONG" in verdicts.values() else "ok"
    return f"{word}-{digest({'environment': key, 'verdicts': dict(verdicts)})}"
