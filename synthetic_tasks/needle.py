"""Needle in a haystack: the structure of RULER's NIAH tasks (Hsieh et al. 2024), in tokens."""

from __future__ import annotations

import dataclasses

import numpy as np

from synthetic_tasks.base import Draw, Task, register, unscored
from synthetic_tasks.recall import keep_distinct
from synthetic_tasks.rng import Rows

BLANK, NEEDLE, IS, STOP, ASK = range(5)
SENTENCE = 8
"""Tokens of the sentence that the repeated haystack is made of."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needle(Task):
    """Find facts that are hidden in a long text.

    Definition: a needle is "!" key "is" value ".", where a key has key_tokens tokens and a value
    value_tokens. n_keys different keys with values_per_key values each (every value a needle of its own)
    are spread in random order over a haystack: one sentence of 8 fixed tokens over and over ("sentence"),
    or uniform random text tokens ("text"). At the end n_queries of the keys are asked for, different ones:
    "?" key, then placeholders. The answers are the values, one token a position, the first at the key's
    last token; a key with several values is answered with all of them in the order of the text.
    Tokens: 0 placeholder, 1 "!", 2 "is", 3 ".", 4 "?", then the 8 sentence tokens, n_text text tokens,
    n_key_vocab key tokens, n_value_vocab value tokens. Classes: the value tokens, from 0.
    Example: s0 s1 s2 ! k3 k8 is v4 v1 . s3 s4 ... ? k3 k8 _ -> v4 at k8, v1 at the placeholder.
    Scored: from the key's last token on, values_per_key * value_tokens positions for each query.
    Source: RULER (Hsieh et al. 2024, 2404.06654); its words, numbers and essays become tokens here: four
    value tokens stand for its seven-digit numbers, sixteen for its UUIDs.
    Metric: accuracy, and whole-sequence accuracy. Dials: length (to 32k and beyond), depth_percent (where
    the first asked needle stands), n_keys (distractors), value_tokens.
    Chance: a value token of the text picked blindly: 1/m + (1 - 1/m)/n_value_vocab for m value tokens in
    the text; one value token guessed always where m = 1.
    """

    haystack: str = "sentence"
    """"sentence" (one sentence repeated) or "text" (random tokens)."""
    n_keys: int = 1
    """Different keys in the text; those that are not asked for are distractors."""
    values_per_key: int = 1
    """Values of every key."""
    n_queries: int = 1
    """Keys asked for, at most n_keys."""
    key_tokens: int = 2
    """Tokens of a key."""
    value_tokens: int = 4
    """Tokens of a value."""
    depth_percent: int = -1
    """Where the asked key's first needle stands, 0 first .. 100 last in the text; -1: anywhere."""
    n_text: int = 64
    """Size of the text's vocabulary."""
    n_key_vocab: int = 32
    """Size of the keys' vocabulary."""
    n_value_vocab: int = 32
    """Size of the values' vocabulary."""

    def __post_init__(self) -> None:
        self._require_choice("haystack", ("sentence", "text"))
        for parameter in ("n_keys", "values_per_key"):
            self._require(parameter, 1, 1024)
        self._require("n_queries", 1, self.n_keys)
        self._require("key_tokens", 1, 3)
        self._require("value_tokens", 1, 1024)
        self._require("depth_percent", -1, 100)
        self._require("n_text", 1, 2**20)
        self._require("n_key_vocab", 2, 2**14)
        self._require("n_value_vocab", 2, 2**20)
        if 2 * self.n_keys > self.n_key_vocab**self.key_tokens:
            raise ValueError(
                f"{self.name}: n_keys={self.n_keys} needs n_key_vocab ** key_tokens >= {2 * self.n_keys}, "
                f"got {self.n_key_vocab**self.key_tokens}"
            )

    @property
    def _text(self) -> int:
        return 5 + SENTENCE

    @property
    def _keys(self) -> int:
        return self._text + self.n_text

    @property
    def _values(self) -> int:
        return self._keys + self.n_key_vocab

    @property
    def vocab_size(self) -> int:
        """All tokens."""
        return self._values + self.n_value_vocab

    @property
    def n_classes(self) -> int:
        """Value tokens."""
        return self.n_value_vocab

    @property
    def _needle_size(self) -> int:
        return 3 + self.key_tokens + self.value_tokens

    @property
    def _answer_size(self) -> int:
        return self.values_per_key * self.value_tokens

    @property
    def _query_size(self) -> int:
        return (
            self.key_tokens + self._answer_size
        )  # "?", the key, and placeholders for all answers but the first

    @property
    def min_length(self) -> int:
        """The needles and the queries."""
        return self.n_keys * self.values_per_key * self._needle_size + self.n_queries * self._query_size

    def chance(self, length: int) -> float:
        """A value token of the text, picked blindly; with one token, one guessed always."""
        m = self.n_keys * self._answer_size
        if m == 1:
            return 1 / self.n_value_vocab
        return 1 / m + (1 - 1 / m) / self.n_value_vocab

    def space(self, length: int) -> int:
        """Values, and one key."""
        values = self.n_value_vocab ** (self.n_keys * self._answer_size)
        return values * self.n_key_vocab**self.key_tokens

    def _haystack(self, rows: Rows, length: int) -> np.ndarray:
        if self.haystack == "text":
            return self._text + rows.below(self.n_text, 0, length)
        return np.tile(5 + np.arange(length) % SENTENCE, (len(rows), 1))

    def _draw_keys(self, rows: Rows) -> np.ndarray:
        key = np.zeros((len(rows), self.n_keys, self.key_tokens), np.int64)
        fresh = np.ones(key.shape[:2], bool)
        attempt = 0
        while fresh.any():
            token = rows.below(self.n_key_vocab, 1 + (attempt << 12), key[0].size).reshape(key.shape)
            key[fresh] = token[fresh]
            fresh = ~keep_distinct(key @ self.n_key_vocab ** np.arange(self.key_tokens))
            attempt += 1
        return key

    def _places(self, rows: Rows, text: int, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For the needles in order of the text: which one it is, and where it starts, [N,K*values] each.

        Args:
            text: length of the text.
            owner: int64 [K*values], the key of each needle. Key 0 is the first that is asked for.
        """
        n, count = len(rows), len(owner)
        free = text - count * self._needle_size
        gaps = np.sort(rows.below(free + 1, 3, count), axis=1)
        order = rows.order(4, count)
        if self.depth_percent >= 0:
            # Needle 0 moves to the wanted depth; the others keep their order around it.
            wanted = free * self.depth_percent // 100
            others = np.sort(rows.below(free + 1, 3, count)[:, 1:], axis=1)
            rank = (others < wanted + (self.depth_percent >= 50)).sum(axis=1)  # 100 % is behind its equals
            column = np.arange(count)
            rest = np.take_along_axis(order, np.argsort(order == 0, axis=1, kind="stable"), axis=1)[:, :-1]
            source = np.clip(column - (column > rank[:, None]), 0, max(count - 2, 0))
            here = column == rank[:, None]
            if count > 1:
                gaps = np.where(here, wanted, np.take_along_axis(others, source, axis=1))
                order = np.where(here, 0, np.take_along_axis(rest, source, axis=1))
            else:
                gaps = np.full((n, 1), wanted)
        return order, gaps + np.arange(count) * self._needle_size

    def _generate(self, rows: Rows, length: int) -> Draw:
        n, kt, vt, per = len(rows), self.key_tokens, self.value_tokens, self.values_per_key
        row = np.arange(n)[:, None, None]
        text = length - self.n_queries * self._query_size
        owner = np.repeat(np.arange(self.n_keys), per)
        key = self._keys + self._draw_keys(rows)
        value = rows.below(self.n_value_vocab, 2, len(owner) * vt).reshape(n, len(owner), vt)
        order, start = self._places(rows, text, owner)
        in_text = owner[order]

        needle = np.empty((n, len(owner), self._needle_size), np.int64)
        needle[:, :, 0], needle[:, :, 1 + kt], needle[:, :, -1] = NEEDLE, IS, STOP
        needle[:, :, 1 : 1 + kt] = np.take_along_axis(key, in_text[:, :, None], axis=1)
        needle[:, :, 2 + kt : 2 + kt + vt] = self._values + np.take_along_axis(
            value, order[:, :, None], axis=1
        )
        tokens = np.full((n, length), BLANK, np.int64)
        tokens[:, :text] = self._haystack(rows, text)
        tokens[row, start[:, :, None] + np.arange(self._needle_size)] = needle

        query = np.full((n, self.n_queries, self._query_size), BLANK)
        query[:, :, 0] = ASK
        query[:, :, 1 : 1 + kt] = key[:, : self.n_queries]
        tokens[:, text:] = query.reshape(n, -1)
        # The needles of one key, in the order of the text.
        by_key = np.argsort(in_text * len(owner) + np.arange(len(owner)), axis=1)
        told = np.take_along_axis(order, by_key, axis=1)[:, : self.n_queries * per]
        answer = np.take_along_axis(value, told[:, :, None], axis=1).reshape(n, self.n_queries, -1)
        targets = unscored(tokens)
        places = (
            text + np.arange(self.n_queries)[:, None] * self._query_size + kt + np.arange(self._answer_size)
        )
        targets[:, places] = answer
        return Draw(tokens, targets)

    def _solve(self, tokens: np.ndarray) -> np.ndarray:
        targets = unscored(tokens)
        kt, vt = self.key_tokens, self.value_tokens
        for r, sequence in enumerate(tokens):
            values: dict[tuple[int, ...], list[int]] = {}
            for t in np.flatnonzero(sequence == NEEDLE):
                key = tuple(sequence[t + 1 : t + 1 + kt].tolist())
                told = sequence[t + 2 + kt : t + 2 + kt + vt] - self._values
                values.setdefault(key, []).extend(told.tolist())
            for t in np.flatnonzero(sequence == ASK):
                answer = values[tuple(sequence[t + 1 : t + 1 + kt].tolist())]
                targets[r, t + kt : t + kt + len(answer)] = answer
        return targets

    def token_name(self, token: int) -> str:
        """`_`, `!`, `is`, `.`, `?`, `s0`, `t5`, `k3`, `v4`."""
        if token < 5:
            return ("_", "!", "is", ".", "?")[token]
        for letter, first in (("v", self._values), ("k", self._keys), ("t", self._text), ("s", 5)):
            if token >= first:
                return f"{letter}{token - first}"
        raise ValueError(token)

    def class_name(self, label: int) -> str:
        """The value token."""
        return f"v{label}"


def _needle(class_name: str, name: str, title: str, **defaults: str | int) -> type[Needle]:
    doc = f"{title}\n{(Needle.__doc__ or '').split(chr(10), 1)[1]}"
    fields: dict[str, object] = {"__doc__": doc, "__module__": __name__, **defaults}
    fields["__annotations__"] = {field: type(value).__name__ for field, value in defaults.items()}
    cls: type[Needle] = dataclasses.dataclass(frozen=True, kw_only=True)(type(class_name, (Needle,), fields))
    return register(name, "needle")(cls)


NIAHSingle1 = _needle(
    "NIAHSingle1",
    "niah_single_1",
    "One needle in a repeated sentence (RULER's niah_single_1).",
    haystack="sentence",
)
NIAHSingle2 = _needle(
    "NIAHSingle2", "niah_single_2", "One needle in random text (RULER's niah_single_2).", haystack="text"
)
NIAHSingle3 = _needle(
    "NIAHSingle3",
    "niah_single_3",
    "One needle with a long value in random text (RULER's niah_single_3).",
    haystack="text",
    value_tokens=16,
)
NIAHMultiKey = _needle(
    "NIAHMultiKey",
    "niah_multikey",
    "One needle among distractors with other keys (RULER's niah_multikey_1).",
    haystack="text",
    n_keys=4,
)
NIAHMultiValue = _needle(
    "NIAHMultiValue",
    "niah_multivalue",
    "A key with several values, all asked for (RULER's niah_multivalue).",
    haystack="text",
    values_per_key=4,
)
NIAHMultiQuery = _needle(
    "NIAHMultiQuery",
    "niah_multiquery",
    "Several keys, all asked for (RULER's niah_multiquery).",
    haystack="text",
    n_keys=4,
    n_queries=4,
)
