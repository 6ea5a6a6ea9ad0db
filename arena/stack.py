"""Architectures by name: which block stands in which layer of a stack."""

from __future__ import annotations

import re

from arena.blocks import block_names
from arena.blocks.registry import model_names, name_error, near

_XLSTM = re.compile(r"xlstm\[(\d+):(\d+)\]")
_HYBRID = re.compile(r"(.+?)(?:\[(?:(\d+):(\d+)|([^\d\[\]][^\[\]]*))\])?")
PLACES = ("first", "last")
"""Where ``a+b[first]`` and ``a+b[last]`` have their one layer of b."""


def arch_names() -> list[str]:
    """Architectures by name: every block, and the stack ``xlstm[1:1]``; ``a+b`` combines any two blocks.

    A family of blocks is there once: ``deltaproduct[2]`` for ``deltaproduct[n]``.
    """
    return sorted([*block_names(), *model_names(), "xlstm[1:1]"])


def parse_arch(arch: str, n_layers: int) -> list[str]:
    """Block names of a stack, one a layer.

    - A plain name: that block in every layer; or a whole model, ``ttt_e2e``, in all of them.
    - ``a+b[m:n]``: each period of m + n layers is m blocks a, then n blocks b; a last period may be cut.
      ``gdn2+swa[3:1]`` is the 3:1 hybrid of Kimi Linear and others. ``a+b`` is ``a+b[1:1]``.
    - ``a+b[first]``, ``a+b[last]``: one layer of b, the first or the last one, all others are a.
    - ``xlstm[m:n]``: the same with m mLSTM and n sLSTM blocks, as in the xLSTM authors' small models (their
      xlstm[1:1] of two blocks has its sLSTM second; their language models put a few sLSTM blocks at
      hand-picked layers instead). ``xlstm[1:0]`` is all mLSTM, ``xlstm[0:1]`` all sLSTM.

    What stands in brackets without a colon belongs to the block before it: ``deltaproduct[2]+swa[3:1]``.

    Raises:
        ValueError: unknown name (the near ones are listed), a ratio or a place that means nothing, or a stack
            shorter than one period.
    """
    if arch in model_names():
        return [arch] * n_layers
    stack = _XLSTM.fullmatch(arch)
    if stack:
        m, n = int(stack[1]), int(stack[2])
        if m + n == 0:
            raise ValueError(f"{arch!r} has no block: give a ratio such as xlstm[1:1]")
        if m == 0 or n == 0:
            m, n = min(m, 1), min(n, 1)
        return _periods(arch, "mlstm", m, "slstm", n, n_layers)
    if arch.startswith("xlstm"):
        raise ValueError(f"{arch!r}: write xlstm[a:b] for a mLSTM to b sLSTM blocks, such as xlstm[1:1]")
    if "+" not in arch:
        if re.search(r"\[\d*:\d*\]$", arch):
            raise ValueError(
                f"{arch!r}: a ratio is of two blocks, such as {arch[: arch.rindex('[')]}+swa[3:1]"
            )
        _check_block(arch, arch)
        return [arch] * n_layers
    a, _, rest = arch.partition("+")
    if "+" in rest:
        raise ValueError(f"{arch!r}: a stack alternates two blocks (a+b), not {arch.count('+') + 1}")
    found = _HYBRID.fullmatch(rest)
    b, m_text, n_text, place = found.groups() if found else (rest, None, None, None)
    for name in (a, b):
        _check_block(name, arch)
    if place is not None:
        if place not in PLACES:
            raise ValueError(
                f"{arch!r}: {place!r} is no place{near(place, PLACES)}; or give a ratio such as {a}+{b}[3:1]"
            )
        if n_layers < 2:
            raise ValueError(f"{arch!r} needs at least 2 layers, not {n_layers}")
        return [b, *[a] * (n_layers - 1)] if place == "first" else [*[a] * (n_layers - 1), b]
    m, n = (int(text or 1) for text in (m_text, n_text))
    if m == 0 or n == 0:
        raise ValueError(
            f"{arch!r}: both parts of a ratio are at least 1; write {(a if n == 0 else b)!r} alone"
        )
    return _periods(arch, a, m, b, n, n_layers)


def _periods(arch: str, a: str, m: int, b: str, n: int, n_layers: int) -> list[str]:
    if n_layers < m + n:
        raise ValueError(f"{arch!r} needs at least {m + n} layers (one period), not {n_layers}")
    period = [a] * m + [b] * n
    return [period[layer % len(period)] for layer in range(n_layers)]


def _check_block(name: str, arch: str) -> None:
    if name in model_names():
        raise ValueError(f"{name!r} is a whole model, which can't be part of {arch!r}")
    what = f"architecture {arch!r}" if name == arch else f"block {name!r} in architecture {arch!r}"
    wrong = name_error(name, what=what, known=arch_names())
    if wrong is not None:
        raise ValueError(wrong)
