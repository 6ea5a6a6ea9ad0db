"""What interventions do to the answers: effects with intervals, and the heads that an effect is claimed for.

Heads are chosen on one set of sequences (split valid) and the effect is measured on another (split test), so
that no head is chosen for the effect that is then reported. An effect is the accuracy with the intervention
less that without, on the same sequences; a sequence is one unit: the answers in it are not independent.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from arena.dynamics.classes import token_classes
from arena.dynamics.hooks import gates_of, hooked
from arena.dynamics.intervene import GATES, Edit, changed_share, check, edited, prepare
from arena.dynamics.record import blocks_of, record
from arena.dynamics.state import transition_fields
from arena.dynamics.transition import eigenvalues, key_eigenvalue, token_matrix
from arena.statistics import MIN_UNITS, clopper_pearson

IGNORED = -100
NEAR_MINUS_ONE = -0.9
"""A head counts as one that flips where its least eigenvalue is below this, on average over the tokens that
change the answer: a memory multiplied 16 times by 0.9 keeps 0.19 of itself."""
LOOKED_AT = 64
"""Sequences of split valid that heads are identified and gates averaged on."""
CLAMPS = {"erase": (0.0, 1.0), "decay": (0.0, 1.0), "angle": (-math.pi / 2, math.pi / 2)}
"""Gate -> the values with which it makes no eigenvalue of a negative real part."""
MOST_TOKENS = 2048
"""Of a class, evenly spaced, whose eigenvalues are computed."""
MOST_CONTROLS = 12
"""So many sets of control heads at most; where there are more, a fixed draw of them."""
REPLICATES = 4_000
_PIECE = 16_384  # tokens a forward pass


@dataclass(frozen=True, kw_only=True)
class Intervention:
    """Edits that are made together, and the part they play in an argument."""

    edits: tuple[Edit, ...]
    role: str = "chosen"
    """``chosen`` (asked for), ``all`` heads, one ``head``, ``identified`` heads, the same ``elsewhere``,
    ``control`` heads."""


EIGENVALUE_COLUMNS: dict[str, tuple[Any, str]] = {
    "layer": (pl.Int64, "block in the stack, from 0"),
    "head": (pl.Int64, "head, from 0"),
    "tokens": (pl.String, "class of tokens"),
    "least_eigenvalue": (
        pl.Float64,
        "least real part of an eigenvalue of the token's (I - k e^T) D (the product over its micro-steps), "
        "mean over the tokens of the class",
    ),
    "n_tokens": (pl.Int64, "how many tokens that is"),
}
"""Columns of the table of eigenvalues: type and meaning."""

EFFECT_COLUMNS: dict[str, tuple[Any, str]] = {
    "gate": (pl.String, "gate that is changed"),
    "change": (pl.String, "what is done to it"),
    "role": (
        pl.String,
        "all heads; one head; the identified heads (least eigenvalue near -1 where the answer moves); "
        "elsewhere: the same heads, only at tokens that leave the answer; control: as many other heads, the "
        "mean over such sets; contrast: identified less control; chosen: by the user",
    ),
    "heads": (pl.String, "layer.head of the changed heads, or how many sets of control heads"),
    "n_heads": (pl.Int64, "number of changed heads"),
    "tokens": (pl.String, "class of the changed tokens; all: every token"),
    "accuracy": (pl.Float64, "accuracy with the intervention, mean over sequences"),
    "accuracy_low": (pl.Float64, "95 % interval of it over sequences"),
    "accuracy_high": (pl.Float64, "95 % interval of it over sequences"),
    "baseline": (pl.Float64, "accuracy of the same model on the same sequences without intervention"),
    "chance": (pl.Float64, "accuracy of an uninformed guess"),
    "effect": (pl.Float64, "accuracy less baseline, paired over sequences"),
    "low": (
        pl.Float64,
        "95 % interval of the effect over sequences: percentile bootstrap, or a bound for rare changes where "
        "fewer than 10 sequences differ; null below 10 sequences",
    ),
    "high": (pl.Float64, "upper end of it"),
    "worst": (pl.Float64, "of control heads: the effect of the set with the largest drop"),
    "changed": (
        pl.Float64,
        "of identified and control heads: share of the gate's values there that is altered, split valid",
    ),
    "n_sequences": (pl.Int64, "sequences, the units of the intervals"),
}
"""Columns of the table of effects: type and meaning."""


@torch.no_grad()
def sequence_accuracy(
    model: nn.Module,
    tokens: Tensor,
    targets: Tensor,
    edits: Sequence[Edit] = (),
    classes: Mapping[str, Tensor] | None = None,
) -> np.ndarray:
    """Share of each sequence's scored answers that are right: float64 [B], NaN where nothing is scored.

    Args:
        model: tokens -> (logits, state).
        tokens: [B,T] (or [B,T,C]).
        targets: [B,T], -100 is not scored.
        edits: prepared.
        classes: class of tokens -> bool [B,T].
    """
    found = []
    piece = max(1, _PIECE // tokens.shape[1])
    for start in range(0, len(tokens), piece):
        part = slice(start, start + piece)
        here = {name: mask[part] for name, mask in (classes or {}).items()}
        with edited(model, edits, here):
            logits = model(tokens[part])[0]
        scored = targets[part] != IGNORED
        right = scored & (logits.argmax(-1) == targets[part]) & logits.isfinite().all(-1)
        found.append(right.sum(-1).double() / scored.sum(-1))
    return torch.cat(found).numpy()


def mean_interval(
    values: np.ndarray, *, least: float, level: float = 0.95, seed: int = 0
) -> tuple[float, float] | None:
    """Interval of the mean of values in [least, 1] over independent units; None below 10 units.

    The percentile bootstrap over units, where at least 10 of them differ from the most common value c. With
    fewer it would claim too much (nothing at all where none differs), for what is rare may be large: then the
    mean differs from c by no more than the Clopper-Pearson bound on the share of units that differ, times the
    largest difference there can be.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) < MIN_UNITS:
        return None
    found, counts = np.unique(values, return_counts=True)
    common, differing = float(found[counts.argmax()]), len(values) - int(counts.max())
    if differing < MIN_UNITS:
        share = clopper_pearson(differing, len(values), level)[1]
        return common - share * (common - least), common + share * (1 - common)
    means = _draws(len(values), seed) @ values
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@functools.lru_cache(maxsize=4)
def _draws(count: int, seed: int) -> np.ndarray:
    """[replicates,count]: how often each unit is drawn, over their number."""
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=REPLICATES)
    return draws / count


def least_eigenvalue(k: Tensor, decay: Tensor, erase: Tensor, angle: Tensor | None = None) -> Tensor:
    """Least real part of the eigenvalues of (I - k e^T) D R, e = erase * k, D = diag(decay), R the rotation.

    Args:
        k: [...,n,H,K], of the n micro-steps of a token, whose product counts.
        decay: [...,n,H,K] or [...,n,H,1], signed.
        erase: [...,n,H,K] or [...,n,H,1].
        angle: [...,n,H,P] or None.

    Returns:
        [...,H]. Of one step with a decay a that is one a head the eigenvalues are a (K - 1 times) and a (1 -
        e . k); others are computed.
    """
    if k.shape[-3] == 1 and decay.shape[-1] == 1 and angle is None:
        k, decay, erase = (x[..., 0, :, :] for x in (k, decay, erase))
        a = decay[..., 0].double()
        along = a * key_eigenvalue(k, erase)
        return torch.minimum(along, a) if k.shape[-1] > 1 else along
    return eigenvalues(token_matrix(k, decay, erase, angle))[..., 0].real


def head_eigenvalues(model: nn.Module, tokens: Tensor, classes: Mapping[str, Tensor]) -> pl.DataFrame:
    """Least eigenvalue of each matrix memory's transition, mean over the tokens of each class.

    Returns:
        Columns as in :data:`EIGENVALUE_COLUMNS`. Classes without a token and blocks without a matrix memory
        are left out.
    """
    rows = []
    (chunk,) = record(model, tokens, chunk=tokens.shape[1])
    for layer, trace in enumerate(chunk.traces):
        if not {"k", "decay", "erase"} <= trace.keys():
            continue
        for name, mask in classes.items():
            places = mask.nonzero()
            places = places[:: -(-len(places) // MOST_TOKENS) or 1]
            if len(places):
                fields = transition_fields(trace)
                at = {field: x[places[:, 0], places[:, 1]] for field, x in fields.items()}
                means = least_eigenvalue(**at).mean(0).tolist()
                rows += [
                    {"layer": layer, "head": head, "tokens": name, "least_eigenvalue": mean}
                    | {"n_tokens": len(places)}
                    for head, mean in enumerate(means)
                ]
    return pl.DataFrame(rows, schema={name: kind for name, (kind, _) in EIGENVALUE_COLUMNS.items()})


def flipping_heads(table: pl.DataFrame) -> list[tuple[int, int]]:
    """(layer, head) of the heads whose memory is reflected where the answer moves; see
    :data:`NEAR_MINUS_ONE`.
    """
    found = table.filter(pl.col("tokens") == "moves", pl.col("least_eigenvalue") <= NEAR_MINUS_ONE)
    return sorted(found.select("layer", "head").iter_rows())


def standard_interventions(
    model: nn.Module, tokens: Tensor, classes: Mapping[str, Tensor]
) -> list[Intervention]:
    """Which gate matters where: the interventions that are made where none are asked for.

    - every gate frozen at its mean, in all heads and in each head alone: what the gate's dependence on the
      token is worth;
    - erase set to zero in all heads;
    - where a gate leaves its interval in :data:`CLAMPS`, clamped to it: in all heads, in each, in the heads
      that flip, in these only at tokens that leave the answer, and in as many of the others
      (:data:`MOST_CONTROLS` sets at most; all others, where they are fewer).

    Args:
        model: a model.
        tokens: [B,T], on which gates and eigenvalues are looked at; not those of the effects.
        classes: of these tokens.
    """
    blocks = blocks_of(model)
    gates = {layer: gates_of(block) for layer, block in enumerate(blocks)}
    places = [(layer, head) for layer, block in enumerate(blocks) for head in range(int(block.n_heads))]  # type: ignore[arg-type]
    found: list[Intervention] = []

    def add(places: Sequence[tuple[int, int]], role: str, gate: str, action: Any, **fields: Any) -> None:
        layers = {layer: tuple(head for at, head in places if at == layer) for layer, _ in places}
        edits = [
            Edit(gate=gate, action=action, layer=layer, heads=heads, **fields)
            for layer, heads in layers.items()
            if gate in gates[layer]
        ]
        if edits:
            found.append(Intervention(edits=tuple(edits), role=role))

    for gate in GATES:
        add(places, "all", gate, "freeze")
        for place in places:
            add([place], "head", gate, "freeze")
    add(places, "all", "erase", "zero")
    for gate in _leave_their_interval(model, tokens):
        clamp: Any = {"gate": gate, "action": "clamp", "low": CLAMPS[gate][0], "high": CLAMPS[gate][1]}
        add(places, "all", **clamp)
        for place in places:
            add([place], "head", **clamp)
        flipping = flipping_heads(head_eigenvalues(model, tokens, classes))
        flipping = [place for place in flipping if gate in gates[place[0]]]
        if flipping:
            add(flipping, "identified", **clamp)
            add(flipping, "elsewhere", **clamp, tokens="stays")
            others = [place for place in places if place not in flipping and gate in gates[place[0]]]
            for chosen in _control_sets(others, len(flipping)):
                add(chosen, "control", **clamp)
    return found


def _control_sets(others: list[tuple[int, int]], size: int) -> list[tuple[tuple[int, int], ...]]:
    if not others:
        return []
    sets = list(itertools.combinations(others, min(size, len(others))))
    if len(sets) > MOST_CONTROLS:
        rng = np.random.default_rng(0)
        sets = [sets[index] for index in sorted(rng.choice(len(sets), MOST_CONTROLS, replace=False))]
    return sets


@torch.no_grad()
def _leave_their_interval(model: nn.Module, tokens: Tensor) -> list[str]:
    """The gates of :data:`CLAMPS` that have values outside."""
    found: set[str] = set()

    def look(layer: int, values: dict[str, Tensor], start: int | None) -> dict[str, Tensor]:
        inside = {gate: values[gate].clamp(*CLAMPS[gate]) for gate in CLAMPS.keys() & values}
        found.update(gate for gate, value in inside.items() if not torch.equal(value, values[gate]))
        return values

    with hooked(model, look):
        model(tokens)
    return sorted(found, reverse=True)


def measure_effects(
    model: nn.Module,
    task: Any,
    length: int,
    *,
    interventions: Sequence[Intervention] | None = None,
    n_sequences: int = 256,
    seed: int = 0,
) -> pl.DataFrame:
    """The effect of interventions on a model's accuracy at a task.

    Heads are identified and means measured on the split valid, effects on the split test.

    Args:
        model: a trained model of the task.
        task: from ``synthetic_tasks``.
        length: of the sequences.
        interventions: None: :func:`standard_interventions`.
        n_sequences: on which effects are measured; :data:`LOOKED_AT` others to look at gates beforehand.
        seed: of the sequences.

    Returns:
        A row an intervention; columns as in :data:`EFFECT_COLUMNS`. Sets of control heads share a row, and
        where heads were identified and controls exist, a row ``contrast`` has the difference of the two.

    Raises:
        ValueError: the model cannot take an edit, or the task has no such class of tokens.
    """
    look = task.sample(LOOKED_AT, length, seed=seed, split="valid")
    seen = token_classes(task, look.tokens, look.targets)
    if interventions is None:
        interventions = standard_interventions(model, look.tokens, seen)
    for intervention in interventions:
        check(model, intervention.edits)
    batch = task.sample(n_sequences, length, seed=seed, split="test")
    classes = token_classes(task, batch.tokens, batch.targets)
    before = sequence_accuracy(model, batch.tokens, batch.targets)
    kept = ~np.isnan(before)
    before = before[kept]
    rows: list[dict[str, Any]] = []
    controls: dict[str, list[tuple[Intervention, np.ndarray, float]]] = {}
    identified: dict[str, tuple[dict[str, Any], np.ndarray]] = {}
    for intervention in interventions:
        edits = prepare(model, intervention.edits, look.tokens, seen)
        after = sequence_accuracy(model, batch.tokens, batch.targets, edits, classes)[kept]
        what = edits[0].what
        if intervention.role == "control":
            share = changed_share(model, edits, look.tokens, seen)
            controls.setdefault(what, []).append((intervention, after, share))
            continue
        rows.append(_row(intervention, after, before, task.chance(length)))
        if intervention.role == "identified":
            rows[-1]["changed"] = changed_share(model, edits, look.tokens, seen)
            identified[what] = rows[-1], after
    for what, members in controls.items():
        mean = np.mean([after for _, after, _ in members], axis=0)
        row = _row(members[0][0], mean, before, task.chance(length))
        count = len(members)
        row["heads"] = f"{count} sets" if count > 1 else row["heads"]
        row["worst"] = min(float((after - before).mean()) for _, after, _ in members)
        row["changed"] = float(np.mean([share for *_, share in members]))
        rows.append(row)
        if what in identified:
            claimed, difference = identified[what][0], identified[what][1] - mean
            interval = mean_interval(difference, least=-1) or (None, None)
            rows.append(
                {**claimed, "role": "contrast", "effect": float(difference.mean())}
                | {"low": interval[0], "high": interval[1]}
                | dict.fromkeys(("accuracy", "accuracy_low", "accuracy_high", "changed"))
            )
    return pl.DataFrame(rows, schema={name: kind for name, (kind, _) in EFFECT_COLUMNS.items()})


def _row(intervention: Intervention, after: np.ndarray, before: np.ndarray, chance: float) -> dict[str, Any]:
    edits = intervention.edits
    named = [f"{edit.layer}.{head}" for edit in edits for head in edit.heads or () if edit.layer is not None]
    heads = " ".join(named)
    if intervention.role in ("all", "chosen") and not named:
        of_layer = "all" if edits[0].layer is None else f"all of layer {edits[0].layer}"
        chosen = edits[0].heads
        heads = of_layer if chosen is None else " ".join(map(str, chosen)) + " of every layer"
    if intervention.role == "all":
        heads = "all"
    accuracy = mean_interval(after, least=0) or (None, None)
    effect = mean_interval(after - before, least=-1) or (None, None)
    return {
        "gate": edits[0].gate,
        "change": edits[0].what,
        "role": intervention.role,
        "heads": heads,
        "n_heads": len(named) or None,
        "tokens": edits[0].tokens or "all",
        "accuracy": float(after.mean()),
        "accuracy_low": accuracy[0],
        "accuracy_high": accuracy[1],
        "baseline": float(before.mean()),
        "chance": chance,
        "effect": float((after - before).mean()),
        "low": effect[0],
        "high": effect[1],
        "worst": None,
        "changed": None,
        "n_sequences": len(after),
    }
