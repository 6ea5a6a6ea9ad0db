"""Reading config.json: a field is used, must have one value, or is known not to matter; none is skipped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from arena.blocks.registry import near
from arena.checkpoints.layout import CheckpointError

_MISSING = object()

ABOUT_THE_FILE = (
    "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "_name_or_path",
    "_attn_implementation_autoset", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id",
    "decoder_start_token_id", "use_cache", "output_hidden_states", "output_attentions", "return_dict",
    "id2label", "label2id", "problem_type", "task_specific_params", "is_encoder_decoder",
)  # fmt: skip
"""Where a model is from, which of its tokens are special, and what a call returns by default."""
ABOUT_TRAINING = (
    "initializer_range", "use_l2warp", "fuse_cross_entropy", "fuse_linear_cross_entropy", "fuse_swiglu",
    "rescale_prenorm_residual",
)  # fmt: skip
"""How weights start, and how the loss is computed."""


class Fields:
    """The fields of a config.json, each to be asked for once.

    Args:
        config: as parsed.
        source: what messages call it.
    """

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        self._config = config
        self._source = source
        self._seen: set[str] = set()

    def integer(self, name: str, *, least: int = 1, default: Any = _MISSING, most: int | None = None) -> int:
        """A whole number from ``least`` on, to ``most``."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.refusal(name, value, f"a whole number of at least {least}")
        if most is not None and value > most:
            raise self.refusal(name, value, f"a whole number of at most {most}")
        return value

    def optional_integer(self, name: str, default: Any = None) -> int | None:
        """A whole number above 0, or null."""
        return None if self._get(name, default) is None else self.integer(name, default=default)

    def number(self, name: str, *, default: Any = _MISSING) -> float:
        """A finite number above 0."""
        value = self._get(name, default)
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (good and math.isfinite(value) and value > 0):
            raise self.refusal(name, value, "a finite number above 0")
        return float(value)

    def flag(self, name: str, default: Any = _MISSING) -> bool:
        """True or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.refusal(name, value, "true or false")
        return value

    def only(self, name: str, *values: Any, default: Any = _MISSING) -> Any:
        """A field that may have these values alone.

        ``default``: what a file that lacks the field means; without it the field must be there.
        """
        value = self._get(name, default)
        if not any(type(value) is type(one) and value == one for one in values):
            raise self.refusal(name, value, " or ".join(map(repr, values)))
        return value

    def irrelevant(self, *names: str) -> None:
        """Fields that the function of the model does not depend on."""
        self._seen.update(names)

    def done(self) -> None:
        """Refuse fields that nobody asked for."""
        for name in self._config:
            if name not in self._seen:
                if name == "auto_map":
                    raise CheckpointError(
                        f"{self._source}: auto_map: the model is defined by code of its own, which is not run"
                    )
                close = near(name, sorted(self._seen)) if len(self._seen) < 200 else ""
                close = close if "did you mean" in close else ""
                value = repr(self._config[name])[:80]
                raise CheckpointError(
                    f"{self._source}: unknown field {name!r} ({value}){close}: its effect is not known"
                )

    def refusal(self, name: str, value: Any, wanted: str) -> CheckpointError:
        """That a field has a value that cannot be had here."""
        return CheckpointError(f"{self._source}: {name} is {value!r:.80}; what can be imported is {wanted}")

    def wrong(self, text: str) -> CheckpointError:
        """That fields do not go together."""
        return CheckpointError(f"{self._source}: {text}")

    def _get(self, name: str, default: Any) -> Any:
        self._seen.add(name)
        if name in self._config:
            return self._config[name]
        if default is _MISSING:
            raise CheckpointError(f"{self._source}: field {name!r} is missing")
        return default


def whole(fields: Fields, text: str, value: float) -> int:
    """A width that config.json gives as a product."""
    rounded = round(value)
    if rounded < 1 or not math.isclose(value, rounded, rel_tol=1e-6):
        raise fields.wrong(f"{text} = {value} is no whole number above 0")
    return rounded


def multiples(fields: Fields, many: str, n_many: int, few: str, n_few: int) -> int:
    """How many of ``many`` share one of ``few``."""
    if n_many % n_few:
        raise fields.wrong(f"{many} {n_many} is no multiple of {few} {n_few}")
    return n_many // n_few


MOST_LAYERS = 10_000


def names_of(*groups: Iterable[str]) -> tuple[str, ...]:
    """Several lists of fields as one."""
    return tuple(name for group in groups for name in group)
