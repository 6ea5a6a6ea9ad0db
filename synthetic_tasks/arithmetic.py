"""State tracking: arithmetic modulo a small number, with and without brackets."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from synthetic_tasks.base import Draw, Task, register, unscored
from synthetic_tasks.rng import Rows

PLUS, MINUS, TIMES, EQUALS, OPEN, CLOSE = range(6)
SIGNS = "+-*=()"


def apply(op: np.ndarray, left: np.ndarray, right: np.ndarray, modulus: int) -> np.ndarray:
    """Left op right modulo the modulus, elementwise."""
    return np.where(op == PLUS, left + right, np.where(op == MINUS, left - right, left * right)) % modulus


@register("mod_arithmetic", "state tracking")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ModArithmetic(Task):
    """The value of an expression of digits with +, - and *, modulo 5, without brackets.

    Definition: (T - 1) uniform tokens that alternate digit, operator, digit, ..., then "="; the answer is
    the value modulo `modulus`, multiplication before addition and subtraction.
    Tokens: 0 "+", 1 "-", 2 "*", 3 "=", then the digits. Classes: the digits' values.
    Example: 2 + 3 * 4 = -> 4.
    Scored: the last position, the "=".
    Source: the regular task of Deletang et al. 2023; xLSTM paper (2405.04517, App. B.1.1). Same
    distribution as NX-AI/xlstm's generator, whose size n (odd) is our length n - 1. The DeepMind generator
    breaks at its second length; here any even length is legal.
    Metric: accuracy. Dials: length, modulus.
    Chance: the likeliest value's probability, computed exactly (0 is likelier than 1/modulus where products
    are).
    """

    modulus: int = 5
    """The modulus; digits are 0 .. modulus-1."""

    def __post_init__(self) -> None:
        self._require("modulus", 2, 1000)

    @property
    def vocab_size(self) -> int:
        """Signs and digits."""
        return 4 + self.modulus

    @property
    def n_classes(self) -> int:
        """Values."""
        return self.modulus

    @property
    def min_length(self) -> int:
        """A digit and "="."""
        return 2

    @property
    def length_step(self) -> int:
        """An operator and a digit."""
        return 2

    def chance(self, length: int) -> float:
        """The likeliest value's probability."""
        m = self.modulus
        digits = np.arange(m)
        sums = ((digits[:, None] + digits) % m).ravel()
        times = np.zeros((m, m))
        np.add.at(times, (np.repeat(digits, m), (digits[:, None] * digits % m).ravel()), 1 / m)
        # The joint law [sum of the finished terms, open term]; a sign is folded into a uniform new term.
        joint = np.zeros((m, m))
        joint[0] = 1 / m
        for _ in range(length // 2 - 1):
            finished = np.bincount(sums, joint.ravel(), m)
            joint = joint @ times / 3 + 2 / 3 * finished[:, None] / m
        return float(np.bincount(sums, joint.ravel(), m).max())

    def space(self, length: int) -> int:
        """All expressions."""
        return self.modulus ** (length // 2) * 3 ** (length // 2 - 1)

    def _generate(self, rows: Rows, length: int) -> Draw:
        tokens = np.full((len(rows), length), EQUALS, np.int64)
        tokens[:, 0:-1:2] = 4 + rows.below(self.modulus, 0, length // 2)
        tokens[:, 1:-1:2] = rows.below(3, 1, length // 2 - 1)
        return Draw(tokens)

    def _solve(self, tokens: np.ndarray) -> np.ndarray:
        total = np.zeros(len(tokens), np.int64)
        term = tokens[:, 0] - 4
        for t in range(1, tokens.shape[1] - 1, 2):
            op, digit = tokens[:, t], tokens[:, t + 1] - 4
            times = op == TIMES
            total = np.where(times, total, total + term)
            term = np.where(times, term * digit % self.modulus, np.where(op == MINUS, -digit, digit))
        targets = unscored(tokens)
        targets[:, -1] = (total + term) % self.modulus
        return targets

    def token_name(self, token: int) -> str:
        """The sign or the digit."""
        return SIGNS[token] if token < 4 else str(token - 4)

    def class_name(self, label: int) -> str:
        """The value."""
        return str(label)


def bracketed(rows: Rows, length: int, modulus: int, n_ops: int) -> tuple[np.ndarray, np.ndarray]:
    """Random bracketed expressions: tokens [N,length] (signs, then digits from 6 on) and values [N].

    The grammar of Deletang et al.: 1 token is a digit, 2 "-" digit, 3 "(" digit ")", 4 "(-" digit ")"; a
    longer one is "(" left op right ")" with the left part's length uniform over 1 .. length - 4. All parts
    of one nesting depth, of all rows, are handled together.
    """
    n = len(rows)
    digit = rows.below(modulus, 0, length)
    op_at = rows.below(n_ops, 1, length)
    split_at = rows.words32(2, length).view(np.int64)
    tokens = np.empty((n, length), np.int64)
    value = np.empty((n, length), np.int64)  # the value of the part that starts here
    row, start, size = np.arange(n), np.zeros(n, np.int64), np.full(n, length, np.int64)
    levels = []
    while row.size:
        for leaf, text in ((1, ""), (2, "-"), (3, "("), (4, "(-")):
            r, s = row[size == leaf], start[size == leaf]
            for offset, sign in enumerate(text):
                tokens[r, s + offset] = SIGNS.index(sign)
            chosen = digit[r, s]
            tokens[r, s + len(text)] = 6 + chosen
            if leaf > 2:
                tokens[r, s + leaf - 1] = CLOSE
            value[r, s] = -chosen % modulus if "-" in text else chosen
        deep = size > 4
        row, start, size = row[deep], start[deep], size[deep]
        left = 1 + ((split_at[row, start] * (size - 4)) >> 32)
        op = op_at[row, start]
        middle = start + 1 + left
        tokens[row, start], tokens[row, start + size - 1], tokens[row, middle] = OPEN, CLOSE, op
        levels.append((row, start, middle, op))
        row = np.concatenate([row, row])
        start, size = np.concatenate([start + 1, middle + 1]), np.concatenate([left, size - left - 3])
    for row, start, middle, op in reversed(levels):
        value[row, start] = apply(op, value[row, start + 1], value[row, middle + 1], modulus)
    return tokens, value[:, 0]


def evaluate(tokens: np.ndarray, modulus: int) -> np.ndarray:
    """The values of bracketed expressions [N,L] by a stack machine, int64 [N]."""
    n, length = tokens.shape
    row = np.arange(n)
    value = np.zeros((n, length + 2), np.int64)
    pending = np.full((n, length + 2), PLUS, np.int64)  # the operator that waits at each depth
    depth = np.zeros(n, np.int64)
    operand_next, negated = (
        np.ones(n, bool),
        np.zeros(n, bool),
    )  # a minus before an operand belongs to its digit
    for t in range(length):
        token = tokens[:, t]
        opened = token == OPEN
        deeper = depth[opened] + 1
        depth[opened] = deeper
        value[row[opened], deeper], pending[row[opened], deeper] = 0, PLUS
        sign = token < EQUALS
        unary = sign & operand_next
        binary = sign & ~operand_next
        pending[row[binary], depth[binary]] = token[binary]
        closed = token == CLOSE
        operand = np.where(closed, value[row, depth], np.where(negated, 6 - token, token - 6))
        depth[closed] -= 1
        has = closed | (token >= 6)
        r, d = row[has], depth[has]
        value[r, d] = apply(pending[r, d], value[r, d], operand[has], modulus)
        negated, operand_next = unary, opened | sign
    return value[:, 0]


@functools.lru_cache(maxsize=256)
def _expressions(length: int, modulus: int, n_ops: int) -> int:
    """The number of bracketed expressions: the grammar is unambiguous."""
    count = [0] + [modulus] * 4
    for size in range(5, length + 1):
        count.append(n_ops * sum(count[left] * count[size - 3 - left] for left in range(1, size - 3)))
    return count[length]


@functools.lru_cache(maxsize=16)
def _value_law(length: int, modulus: int, product: bool) -> np.ndarray:
    digits = np.arange(modulus)
    law = np.full((length + 1, modulus), 1 / modulus)
    outcomes = [(digits[:, None] + digits) % modulus, (digits[:, None] - digits) % modulus]
    if product:
        outcomes.append((digits[:, None] * digits) % modulus)
    for size in range(5, length + 1):
        joint = law[1 : size - 3].T @ law[1 : size - 3][::-1] / (size - 4)
        law[size] = sum(np.bincount(o.ravel(), joint.ravel(), modulus) for o in outcomes) / len(outcomes)
    return law[length]


@register("mod_arithmetic_brackets", "state tracking")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ModArithmeticBrackets(Task):
    """The value of a bracketed expression modulo 5.

    Definition: an expression of T - 1 tokens from a recursive grammar, then "="; the answer is its value
    modulo `modulus`. Grammar: digit, -digit, (digit), (-digit), or (left op right) with the left part's
    length uniform.
    Tokens: 0 "+", 1 "-", 2 "*", 3 "=", 4 "(", 5 ")", then the digits. Classes: the digits' values.
    Example: ( 2 - ( - 4 ) ) = -> 1.
    Scored: the last position, the "=".
    Source: Deletang et al. 2023 (with the product), NX-AI/xlstm (without it, the default here); their size
    n is our length n - 1 and starts at 4.
    Metric: accuracy. Dials: length, modulus, product.
    Chance: the likeliest value's probability, computed exactly: 1/modulus without the product.
    """

    modulus: int = 5
    """The modulus; digits are 0 .. modulus-1."""
    product: bool = False
    """Whether "*" is among the operators."""

    def __post_init__(self) -> None:
        self._require("modulus", 2, 1000)
        self._require_flag("product")

    @property
    def vocab_size(self) -> int:
        """Signs and digits."""
        return 6 + self.modulus

    @property
    def n_classes(self) -> int:
        """Values."""
        return self.modulus

    @property
    def min_length(self) -> int:
        """A digit and "="."""
        return 2

    def chance(self, length: int) -> float:
        """The likeliest value's probability."""
        return float(_value_law(length - 1, self.modulus, self.product).max())

    def space(self, length: int) -> int:
        """All expressions (from 60 tokens on, those of 60)."""
        return _expressions(min(length - 1, 60), self.modulus, 3 if self.product else 2)

    def _generate(self, rows: Rows, length: int) -> Draw:
        body, value = bracketed(rows, length - 1, self.modulus, 3 if self.product else 2)
        tokens = np.full((len(rows), length), EQUALS, np.int64)
        tokens[:, :-1] = body
        targets = unscored(tokens)
        targets[:, -1] = value
        return Draw(tokens, targets)

    def _solve(self, tokens: np.ndarray) -> np.ndarray:
        targets = unscored(tokens)
        targets[:, -1] = evaluate(tokens[:, :-1], self.modulus)
        return targets

    def token_name(self, token: int) -> str:
        """The sign or the digit."""
        return SIGNS[token] if token < 6 else str(token - 6)

    def class_name(self, label: int) -> str:
        """The value."""
        return str(label)


@register("solve_equation", "counting and stacks")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SolveEquation(ModArithmeticBrackets):
    """Which digit is hidden in this equation?

    Definition: a bracketed expression without product in which one digit is replaced by "x", then "=", then
    its value modulo `modulus`; the answer is the hidden digit. It is unique, as x enters with factor 1 or
    -1.
    Tokens: 0 "+", 1 "-", 2 "x", 3 "=", 4 "(", 5 ")", then the digits. Classes: the digits' values.
    Example: ( 2 - x ) = 3 -> 4.
    Scored: the last position, the equation's value.
    Source: the task of Deletang et al. 2023 and the xLSTM paper (2405.04517, App. B.1.1); the expression has
    T - 2 tokens. Here the hidden digit is uniform among its digits; the public generator hides the first
    digit from a uniform place on, so that digits after long runs of brackets are likelier.
    Metric: accuracy. Dials: length, modulus.
    Chance: 1/modulus.
    """

    product: bool = False
    """Must be false: with a product the hidden digit need not be unique."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.product:
            raise ValueError(f"{self.name}: product must be false, or the hidden digit is not unique")

    @property
    def min_length(self) -> int:
        """x, "=" and a digit."""
        return 3

    def chance(self, length: int) -> float:
        """One digit guessed always."""
        return 1 / self.modulus

    def space(self, length: int) -> int:
        """As for the expression."""
        return super().space(length - 1)

    def _generate(self, rows: Rows, length: int) -> Draw:
        body, value = bracketed(rows, length - 2, self.modulus, 2)
        is_digit = body >= 6
        rank = rows.below(is_digit.sum(axis=1, keepdims=True), 3, 1)
        hidden = (np.cumsum(is_digit, axis=1) > rank).argmax(axis=1)
        row = np.arange(len(rows))
        targets = np.full((len(rows), length), -100, np.int64)
        targets[:, -1] = body[row, hidden] - 6
        body[row, hidden] = TIMES
        tokens = np.concatenate([body, np.full((len(rows), 1), EQUALS), 6 + value[:, None]], axis=1)
        return Draw(tokens, targets)

    def _solve(self, tokens: np.ndarray) -> np.ndarray:
        body, wanted = tokens[:, :-2].copy(), tokens[:, -1] - 6
        hidden = (body == TIMES).argmax(axis=1)
        row = np.arange(len(tokens))
        body[row, hidden] = 6
        at_zero = evaluate(body, self.modulus)
        body[row, hidden] = 7
        slope = evaluate(body, self.modulus) - at_zero  # 1 or -1 modulo the modulus, its own inverse
        targets = unscored(tokens)
        targets[:, -1] = slope * (wanted - at_zero) % self.modulus
        return targets

    def token_name(self, token: int) -> str:
        """The sign, `x` or the digit."""
        return "x" if token == TIMES else super().token_name(token)
