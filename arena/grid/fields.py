"""Field types and small helpers that the sections of an experiment file share."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeFloat, PositiveFloat


class ExperimentError(ValueError):
    """The request is wrong. The message is one line that says what and what would be right."""

    def __init__(self, line: str) -> None:
        """Say it; names of a hostile file can be as long as the file, and hold line breaks."""
        text = " ".join(line.split())
        super().__init__(text if len(text) <= 2000 else text[:1997] + "...")


def listed(value: Any) -> Any:
    """Let a file write ``lr = 1e-3`` for ``lr = [1e-3]``."""
    return value if isinstance(value, list) else [value]


def _counted(value: Any) -> Any:
    """Let a file write ``seeds = 3`` for ``seeds = [0, 1, 2]``."""
    if isinstance(value, int) and not isinstance(value, bool):
        if not 1 <= value <= 10_000:
            raise ValueError("a number of seeds is between 1 and 10000")
        return list(range(value))
    return value


def _ranged(value: Any) -> Any:
    """Let a file write ``train_lengths = 64`` for ``train_lengths = [64, 64]``."""
    return [value, value] if isinstance(value, int) and not isinstance(value, bool) else value


ARM_NAME = r"^[A-Za-z0-9]([^,/\x00-\x1f]{0,158}[^\s,/\x00-\x1f])?$"
"""What may name an arm: text without commas and slashes, as the command line and reports separate by
those; words in it, such as ``gdn2 erase=mean``, are separated by spaces."""

# Bounds far above what trains, so that a slip of the keyboard is refused before it fills the memory.
Count = Annotated[int, Field(ge=1, le=10_000_000)]
Length = Annotated[int, Field(ge=1, le=1_000_000)]
Width = Annotated[int, Field(ge=1, le=16_384)]
Layers = Annotated[int, Field(ge=1, le=1_000)]
Experts = Annotated[int, Field(ge=1, le=1_024)]
Ratio = Annotated[float, Field(gt=0, le=100)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Seeds = Annotated[list[Seed], BeforeValidator(_counted), Field(min_length=1)]
Rates = Annotated[list[PositiveFloat], BeforeValidator(listed), Field(min_length=1)]
Decays = Annotated[list[NonNegativeFloat], BeforeValidator(listed), Field(min_length=1)]
Lengths = Annotated[list[Length], BeforeValidator(listed), Field(min_length=1)]
LengthRange = Annotated[list[Length], BeforeValidator(_ranged), Field(min_length=2, max_length=2)]


class Strict(BaseModel):
    """A section that refuses unknown keys and values of another type, and never changes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def distinct(field: str, values: Sequence[Any]) -> None:
    """ValueError where a value occurs twice."""
    repeated = sorted(str(value) for value, times in Counter(values).items() if times > 1)
    if repeated:
        raise ValueError(f"{field} repeats {', '.join(repeated)}")


def near(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'a' or 'b'?"``, or what there is when nothing is near."""
    known = sorted(known)
    close = difflib.get_close_matches(word[:100], known, n=3, cutoff=0.6)  # its time grows with the square
    if close:
        return "; did you mean " + " or ".join(repr(c) for c in close) + "?"
    return f"; known: {', '.join(known)}" if known else ""
