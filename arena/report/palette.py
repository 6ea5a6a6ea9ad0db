"""One look for each architecture, always the same, whatever else is in a figure."""

from __future__ import annotations

import hashlib
import re
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
_SPARE = ("#66c2a5", "#8da0cb", "#e78ac3", "#a6d854", "#b3b300", "#e5c494", "#5e3c99", "#018571")
_SPARE_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def look(arch: str) -> Look:
    """Colour, marker and line of an architecture.

    ``-neg`` is the colour of its base, dashed; ``xlstm[a:b]`` and ``deltaproduct[n]`` look like their name
    without the numbers. A name that is not in the list (a stack ``a+b``, a plug-in) gets spare ones from a
    hash of the name.
    """
    name = re.sub(r"\[.*?\]", "", arch)
    dashed = name.endswith("-neg")
    base = name.removesuffix("-neg")
    if base in _BASE:
        colour, marker = _BASE[base]
        return Look(colour, marker, dashed)
    number = int.from_bytes(hashlib.sha256(base.encode()).digest()[:4], "big")
    return Look(_SPARE[number % len(_SPARE)], _SPARE_MARKERS[number // 8 % len(_SPARE_MARKERS)], True)


def family_order(arch: str) -> tuple[int, str]:
    """Sort key that puts relatives side by side, the base before its ``-neg``."""
    name = re.sub(r"\[.*?\]", "", arch).removesuffix("-neg")
    order = list(_BASE)
    return (order.index(name) if name in order else len(order), arch)
