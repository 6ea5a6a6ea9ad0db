"""One look for each architecture, always the same, whatever else is in a figure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import NamedTuple


class Look(NamedTuple):
    """How an architecture is drawn."""

    colour: str
    marker: str
    dashed: bool


# Families share a region of the colour wheel; markers tell the members apart without colour.
_BASE = {
    "attention": ("#1a1a1a", "s"),
    "swa": ("#7f7f7f", "D"),
    "linear_attention": ("#a6761d", "v"),
    "gla": ("#d9a514", "^"),
    "mamba2": ("#2ca02c", "o"),
    "mamba3": ("#8fd14f", "P"),
    "deltanet": ("#9ecae1", "<"),
    "gdn": ("#4292c6", "o"),
    "kda": ("#17becf", "D"),
    "gdn2": ("#08306b", "s"),
    "deltaproduct": ("#6a51a3", "p"),
    "gdnproduct": ("#b39ddb", "h"),
    "rwkv7": ("#e377c2", "X"),
    "mlstm": ("#fd8d3c", "^"),
    "xlstm": ("#a63603", "*"),
    "slstm": ("#e31a1c", "v"),
    "lstm": ("#800026", "P"),
    "ttt_e2e": ("#525200", "8"),
}
_SPARE = (
    "#1b9e77", "#7570b3", "#e7298a", "#66a61e", "#b3b300", "#c49c6b", "#01857f", "#d95f02", "#8da0cb",
    "#ad494a", "#637939", "#a55194",
)  # fmt: skip
_SPARE_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h")


def look(arch: str) -> Look:
    """Colour, marker and line of an architecture.

    ``-neg`` is the colour of its base, dashed; ``xlstm[a:b]`` and ``deltaproduct[n]`` look like their name
    without the numbers. A name that is not in the list (a stack ``a+b``, an arm, a plug-in) gets spare ones
    from a hash of the name.
    """
    return _look(arch, 0)


def looks(names: Iterable[str]) -> dict[str, Look]:
    """The looks of all arms of a report, told apart.

    Each is :func:`look`'s where it is free. Of two names that would look the same, the later in the alphabet
    takes the next spare colour or, in a family (``xlstm[1:1]``, ``xlstm[7:1]``), the family's colour with
    another marker.
    """
    found: dict[str, Look] = {}
    for name in sorted(set(names), key=lambda name: (_base(name) not in _BASE, name)):
        for turn in range(len(_SPARE) ** 2):
            mine = _look(name, turn)
            if mine not in found.values():
                break
        found[name] = mine
    return found


def _look(arch: str, turn: int) -> Look:
    """The look of an architecture, or the ``turn``-th alternative to it."""
    base = _base(arch)
    if base in _BASE:
        colour, marker = _BASE[base]
        if turn:
            others = [other for other in _SPARE_MARKERS if other != marker]
            marker = others[(turn - 1) % len(others)]
        return Look(colour, marker, re.sub(r"\[.*?\]", "", arch).endswith("-neg"))
    number = int.from_bytes(hashlib.sha256(base.encode()).digest()[:4], "big") + turn
    place = number + turn // len(_SPARE)  # every colour taken: the same ones with other markers
    return Look(_SPARE[number % len(_SPARE)], _SPARE_MARKERS[place % len(_SPARE_MARKERS)], True)


def _base(name: str) -> str:
    return re.sub(r"\[.*?\]", "", name).removesuffix("-neg")


def family_order(arch: str) -> tuple[int, str]:
    """Sort key that puts relatives side by side, the base before its ``-neg``."""
    name = _base(arch)
    order = list(_BASE)
    return (order.index(name) if name in order else len(order), arch)
