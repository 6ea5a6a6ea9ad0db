"""Blocks by name.

    @register("mine")
    class Mine(Block):
        def __init__(self, *, d_model, n_heads, outer, conv, depth, my_option=1): ...

Every module of the package ``arena.blocks`` is imported with it, so a new file there needs no list to be
edited; a file elsewhere registers its block when it is imported.

A name may carry a number, ``deltaproduct[2]-neg``: such a family is registered once, by
:func:`register_family`, and every number in its range is a name.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from arena.blocks.base import Block

OUTERS = ("common", "official")
CONVS = ("none", "static", "dynamic-lowrank", "dynamic-headwise", "gate")
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "None": ((type(None),), ""),
    "bool": ((bool,), "true or false"),
    "int": ((int,), "an integer"),
    "float": ((int, float), "a number"),
    "str": ((str,), "text"),
    "Mapping[str, Any]": ((Mapping,), "a table"),
}
_SHARED = ("d_model", "n_heads", "outer", "conv", "depth")

Builder = TypeVar("Builder", bound=Callable[..., Any])
_BUILDERS: dict[str, Callable[..., Block]] = {}
_FAMILIES: dict[str, tuple[Callable[[int], Callable[..., Block]], int]] = {}
"""Name with ``[n]`` in place of the number -> (number -> builder, largest number)."""
_NUMBERED = re.compile(r"([^\[\]]+)\[(0|[1-9]\d{0,8})\]((?:-[a-z]+)?)")


def register(name: str) -> Callable[[Builder], Builder]:
    """Decorator: make a class or function known as ``name``.

    It is called with the keywords ``d_model, n_heads, outer, conv, depth`` (see :func:`build_block`) and with
    its own options, which must be keyword arguments with defaults.

    Raises:
        ValueError: If the name is taken by another builder.
    """

    def add(builder: Builder) -> Builder:
        taken = _BUILDERS.get(name)
        if taken is not None and taken is not builder:
            raise ValueError(f"block name {name!r} is taken by {taken!r}")
        _BUILDERS[name] = builder
        return builder

    return add


def register_family(
    name: str, *, largest: int
) -> Callable[[Callable[[int], Callable[..., Block]]], Callable[[int], Callable[..., Block]]]:
    """Decorator: make a function from n in 1..``largest`` to a builder known as ``name``, which has ``[n]``.

    Raises:
        ValueError: If the name is taken or has no place for the number.
    """
    if name.count("[n]") != 1 or not _NUMBERED.fullmatch(name.replace("[n]", "[1]")):
        raise ValueError(f"the name of a family is such as 'mine[n]' or 'mine[n]-neg', not {name!r}")

    def add(factory: Callable[[int], Callable[..., Block]]) -> Callable[[int], Callable[..., Block]]:
        if name in _FAMILIES:
            raise ValueError(f"block name {name!r} is taken by {_FAMILIES[name]!r}")
        _FAMILIES[name] = factory, largest
        return factory

    return add


def block_names() -> list[str]:
    """All registered names of blocks, sorted; a family stands there once, with the number 2."""
    blocks = [name for name, builder in _BUILDERS.items() if not _is_model(builder)]
    return sorted([*blocks, *(name.replace("[n]", "[2]") for name in _FAMILIES)])


def name_error(name: str, *, what: str, known: Sequence[str]) -> str | None:
    """Why no block has this name, or None if one has.

    Args:
        name: as it was typed.
        what: what the message calls it, ``block 'gdm'`` say.
        known: names to suggest the near ones of.
    """
    if name in _BUILDERS:
        return None
    found = _NUMBERED.fullmatch(name)
    if found and f"{found[1]}[n]{found[3]}" in _FAMILIES:
        family = f"{found[1]}[n]{found[3]}"
        largest = _FAMILIES[family][1]
        return None if 1 <= int(found[2]) <= largest else f"{what}: n of {family} is in 1..{largest}"
    stem = re.split(r"[\[\]-]", name, maxsplit=1)[0]
    mine = sorted(family for family in _FAMILIES if family.startswith(f"{stem}[n]"))
    if mine:  # deltaproduct, deltaproduct-neg, deltaproduct-neg[2], deltaproduct[two]
        example = (mine[-1] if "-neg" in name else mine[0]).replace("[n]", "[2]")
        return f"{what}: write {' or '.join(mine)} with its number, such as {example}"
    return f"unknown {what}{near(name, known)}"


def model_names() -> list[str]:
    """Registered architectures that are a whole model rather than a block, sorted."""
    return sorted(name for name, builder in _BUILDERS.items() if _is_model(builder))


def _is_model(builder: Callable[..., Any]) -> bool:
    """Such a builder takes the options alone; ``build_model`` knows what to do with them."""
    return getattr(builder, "whole_model", False)


def block_options(name: str) -> dict[str, Any]:
    """The options of a block and their defaults, without the five arguments that all blocks share."""
    parameters = inspect.signature(_builder(name)).parameters
    return {key: value.default for key, value in parameters.items() if key not in _SHARED}


def build_block(
    name: str,
    *,
    d_model: int,
    n_heads: int,
    outer: str = "common",
    conv: str | None = None,
    depth: float = 0.0,
    **options: Any,
) -> Block:
    """Build a block with fresh weights from torch's global generator.

    Args:
        name: One of :func:`block_names`, a family with any number of its range.
        d_model: Width D of the input and output.
        n_heads: Heads H; must divide ``d_model``, unless ``layer`` gives the width of a head.
        outer: ``"common"`` (one layer shared by all architectures, only the memory differs) or ``"official"``
            (the layer of the architecture's paper).
        conv: Short convolution, one of :data:`CONVS`; None means the one that ``outer`` implies.
        depth: Position in the stack, layer index / max(layers - 1, 1), for initialisations that depend on it.
        **options: Of the architecture, see :func:`block_options`.

    Raises:
        ValueError: If a name, a value or an option is unknown, or the sizes do not fit.
    """
    builder = _builder(name)
    layer = options.get("layer")
    sized = isinstance(layer, Mapping) and {"key_dim", "value_dim"} <= layer.keys()
    if d_model < 1 or n_heads < 1 or (d_model % n_heads and not sized):
        raise ValueError(
            f"d_model must be a positive multiple of n_heads, got d_model={d_model}, n_heads={n_heads}"
        )
    if outer not in OUTERS:
        raise ValueError(f"unknown outer {outer!r}{near(outer, OUTERS)}")
    if conv is not None and conv not in CONVS:
        raise ValueError(f"unknown conv {conv!r}{near(conv, CONVS)}")
    if _is_model(builder):
        raise ValueError(
            f"{name!r} is a whole model, for it learns from the model's own loss: "
            f"build_model(ModelConfig(arch={name!r}, ...))"
        )
    check_options(name, options)
    return builder(d_model=d_model, n_heads=n_heads, outer=outer, conv=conv, depth=depth, **options)


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Refuse options that a builder does not know, or whose values are plainly of another kind.

    Raises:
        ValueError: one line that says which.
    """
    known = block_options(name)
    for key, value in options.items():
        if key not in known:
            raise ValueError(f"block {name!r} has no option {key!r}{near(key, list(known))}")
        _check_kind(name, key, value)


def _check_kind(name: str, key: str, value: Any) -> None:
    """Refuse an option that is plainly not what the builder's annotation says: files give any TOML value."""
    annotation = inspect.signature(_builder(name)).parameters[key].annotation
    kinds = str(annotation).split(" | ")
    if not all(kind in _KINDS for kind in kinds):
        return
    allowed = tuple(kind_type for kind in kinds for kind_type in _KINDS[kind][0])
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        wanted = " or ".join(_KINDS[kind][1] for kind in kinds if kind != "None")
        raise ValueError(f"option {key!r} of block {name!r} is {wanted}, not {value!r}")


def near(word: str, known: Sequence[str]) -> str:
    """The tail of an error message: names that resemble ``word``, or else all that are known."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {', '.join(close)}?"
    return f"; known: {', '.join(known) or 'none'}"


def _builder(name: str) -> Callable[..., Block]:
    wrong = name_error(name, what=f"block {name!r}", known=block_names())
    if wrong is not None:
        raise ValueError(wrong)
    if name in _BUILDERS:
        return _BUILDERS[name]
    found = _NUMBERED.fullmatch(name)
    assert found is not None
    return _FAMILIES[f"{found[1]}[n]{found[3]}"][0](int(found[2]))
