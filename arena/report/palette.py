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
    "gla": ("#d9a514", ">"),
    "mamba2": ("#2ca02c", "d"),
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
# Far from each other and from the colours above (OKLab distance), for names that nobody has thought of yet.
_SPARE = (
    "#1d5e70", "#a14174", "#047d51", "#a06cc4", "#752870", "#cb5e73", "#119b89", "#116bb5", "#774545",
    "#184998", "#94ab39", "#6d6e01", "#37b880", "#7d98f5", "#e87a69", "#025c3b", "#5b4c76", "#7c9217",
    "#905c08", "#0c777c",
)  # fmt: skip
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h")


COLOURS = frozenset([*(colour for colour, _ in _BASE.values()), *_SPARE])
"""Every colour that an architecture can have."""


def look(arch: str) -> Look:
    """Colour, marker and line of an architecture: a function of its name alone.

    ``-neg`` is the colour of its base, dashed; ``xlstm[a:b]`` and ``deltaproduct[n]`` look like their name
    without the numbers. A name that is not in the list (a stack ``a+b``, an arm, a plug-in) gets a spare
    colour and marker from a hash of the name, dashed.
    """
    return _look(arch, 0)


def looks(names: Iterable[str]) -> dict[str, Look]:
    """The looks of all arms of a report, told apart.

    Each is :func:`look`'s where it is free. Of two names that would look the same, the later in the alphabet
    takes the next free marker; its colour stays, so that it is the same in every figure.
    """
    found: dict[str, Look] = {}
    for name in sorted(set(names), key=lambda name: (_base(name) not in _BASE, name)):
        taken = set(found.values())
        turns = (_look(name, turn) for turn in range(len(_MARKERS)))
        found[name] = next((mine for mine in turns if mine not in taken), _look(name, 0))
    return found


def _look(arch: str, turn: int) -> Look:
    """The look of an architecture, or with the ``turn``-th marker after its own."""
    base = _base(arch)
    if base in _BASE:
        colour, marker = _BASE[base]
        dashed = re.sub(r"\[.*?\]", "", arch).endswith("-neg")
    else:
        number = int.from_bytes(hashlib.sha256(base.encode()).digest()[:8], "big")
        colour = _SPARE[number % len(_SPARE)]
        marker = _MARKERS[number // len(_SPARE) % len(_MARKERS)]
        dashed = True
    if turn:
        others = [other for other in _MARKERS if other != marker]
        start = _MARKERS.index(marker) if marker in _MARKERS else 0
        marker = others[(start + turn - 1) % len(others)]
    return Look(colour, marker, dashed)


def _base(name: str) -> str:
    return re.sub(r"\[.*?\]", "", name).removesuffix("-neg")


def family_order(arch: str) -> tuple[int, str]:
    """Sort key that puts relatives side by side, the base before its ``-neg``."""
    name = _base(arch)
    order = list(_BASE)
    return (order.index(name) if name in order else len(order), arch)
