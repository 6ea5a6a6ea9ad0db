"""The models themselves: weights set by hand; see :mod:`arena.constructions`."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

import synthetic_tasks
from arena.model import Model, ModelConfig, build_model

BIG = 30.0
"""A pre-activation whose sigmoid is 1 in float32, and whose SiLU is itself."""

D, HEADS = 16, 4
ONE, ZERO, ALWAYS, ANSWER = 0, 1, 2, 3
"""Features of the residual stream of the parity model."""


def parity_model(counter: int = 2, arch: str = "deltanet-neg") -> Model:
    """Parity of the running sum of bits, by one head that reflects its memory at every one.

    Head ``counter``: key fixed, value fixed, erase = write = 2 at token 1 and 0 at token 0, so that what is
    read along the key goes 0, 2 v, 0, 2 v, ... with the ones. Every other head writes a little at every token
    and is read by nothing. With ``mamba2-neg`` the counter's step is about 50 at token 1 and 0 at token 0,
    and so its decay -1 and 1.

    Args:
        counter: the head that counts.
        arch: ``deltanet-neg`` or ``mamba2-neg``.
    """
    model = _blank(arch, vocab_size=2, n_classes=2, d_model=D, n_heads=HEADS)
    block: Any = model.blocks[0]
    with torch.no_grad():
        model.embedding.weight[1, [ONE, ALWAYS]] = 1.0
        model.embedding.weight[0, [ZERO, ALWAYS]] = 1.0
        K = D // HEADS
        qkv = block.qkv.weight.view(3, HEADS, K, D)
        qkv[:2, :, 0, ALWAYS] = 10 * BIG  # q and k along their first channel, whatever the token
        qkv[2, :, 0, ALWAYS] = 1.0
        gate = block.gate.erase if arch == "deltanet-neg" else block.gate.decay_in
        gate.weight[:, ALWAYS] = -0.2  # the idle heads: erase a little below 1, or a small step
        gate.weight[counter] = 0.0
        gate.weight[counter, ONE] = 20.0  # 2 sigmoid(+-56): 2 or 0; softplus(+-56): 56 or 0
        gate.weight[counter, ZERO] = -20.0
        block.gate_out.linear.weight[:, ALWAYS] = 1.0
        block.out.weight[ANSWER, counter * K] = 1.0
        _head(model)[1, ANSWER] = 1.0
        _head(model)[1, ALWAYS] = -0.1  # above a tenth of the constant: odd
    return model


def s3_model(arch: str = "deltaproduct[2]-neg") -> Model:
    """The running product of S3 in one layer, by one head.

    S3 acts on a plane; every element is a product of at most two reflections, so of two micro-steps with
    erase 2 or 0. Memories start at 0 and erase writes as much as it erases, so a micro-step reflects about a
    line beside the origin: with value v = k.c every such line passes through c, and the group turns the
    memory about c. Two value channels with centres c e1 and c e2 let one query q read c (q - g q), g the
    group element: a vertex of a hexagon, seen from another one, so that six elements give the origin and five
    directions 30 degrees apart.

    Args:
        arch: ``deltaproduct[2]-neg``, or ``gdnproduct[2]-neg`` with decay 1.
    """
    task = synthetic_tasks.get("s3")
    K, C = 32, 0.3
    model = _blank(arch, vocab_size=6, n_classes=6, d_model=K, n_heads=1)
    block: Any = model.blocks[0]
    u, w = torch.zeros(K, dtype=torch.float64), torch.zeros(K, dtype=torch.float64)
    u[: K // 2], w[K // 2 :] = (K // 2) ** -0.5, (K // 2) ** -0.5
    plane = torch.stack([u, w])  # an orthonormal pair of which keys have to have few negative channels
    angles = [0.0, math.pi / 3, 2 * math.pi / 3]
    normals = torch.tensor([[math.cos(a), math.sin(a)] for a in angles], dtype=torch.float64)
    reflections = [torch.eye(2, dtype=torch.float64) - 2 * torch.outer(n, n) for n in normals]
    elements = _representation(task, reflections)
    query = torch.tensor([math.cos(math.pi / 3), math.sin(math.pi / 3)], dtype=torch.float64)
    unit = math.sqrt(K / 2)  # what a token's feature and the constant are after the norm of two ones
    ALL, READ = 6, 7  # features after those of the six tokens: the constant, and the two that are read
    with torch.no_grad():
        for token in range(6):
            model.embedding.weight[token, [token, ALL]] = 1.0
        q, k1, k2, v1, v2 = block.qkv.weight.view(5, K, K)
        q[:, ALL] = before_silu(query @ plane) / unit
        for token in range(6):
            factors = _factors(elements[token].T, reflections)
            for step, (number, k, v) in enumerate(zip(factors, (k1, k2), (v1, v2), strict=True)):
                block.gate.erase.weight[step, token] = (-BIG if number is None else BIG) / unit
                normal = normals[0 if number is None else number]
                key = normal @ plane
                least = float(key.min())
                # as long as SiLU lets the negative channels be: the norm's epsilon counts the less
                key = key * (0.27 / -least if least < 0 else BIG)
                k[:, token] = before_silu(key) / unit
                v[:2, token] = before_silu(C * normal) / unit
        if hasattr(block.gate, "decay"):
            block.gate.decay.dt_bias.fill_(-60.0)  # decay exp(-A e^-60)
        block.gate_out.linear.weight[:, ALL] = 1.0
        block.out.weight[[READ, READ + 1], [0, 1]] = 1.0
        for index in range(6):
            seen = query - elements[index] @ query
            if float(seen.norm()) > 1e-6:
                _head(model)[index, [READ, READ + 1]] = (seen / seen.norm()).float()
            else:
                _head(model)[index, ALL] = 1.0
    return model


def _representation(task: Any, reflections: list[Tensor]) -> list[Tensor]:
    """The 2 x 2 matrix of every element of S3: transpositions are the reflections, in some order that makes
    the map a homomorphism.
    """
    pairs = torch.tensor(list(itertools.product(range(6), range(6))))
    table = {(int(a), int(b)): int(c) for (a, b), c in zip(pairs, task.solve(pairs)[:, 1], strict=True)}
    swaps = [x for x in range(1, 6) if table[x, x] == 0]
    for order in itertools.permutations(reflections):
        found = {0: torch.eye(2, dtype=torch.float64), **dict(zip(swaps, order, strict=True))}
        for a, b in itertools.product(swaps, swaps):
            found.setdefault(table[a, b], found[a] @ found[b])
        if all(torch.allclose(found[a] @ found[b], found[table[a, b]]) for a, b in table):
            return [found[x] for x in range(6)]
    raise AssertionError("S3 acts on the plane")


def _factors(wanted: Tensor, reflections: list[Tensor]) -> tuple[int | None, int | None]:
    """Numbers of the reflections that are made first and second; None: none is."""
    identity = torch.eye(2, dtype=torch.float64)
    choices: list[int | None] = [None, 0, 1, 2]
    for first, second in itertools.product(choices, choices):
        a, b = (identity if number is None else reflections[number] for number in (first, second))
        if torch.allclose(b @ a, wanted):
            return first, second
    raise AssertionError("two reflections make every element of S3")


def counting_model(arch: str = "gla", n_symbols: int = 8) -> Model:
    """Which symbol is the most frequent: one head that adds 1 to the symbol's own value channel.

    Decay 1, so that the first token counts as much as the last, and nothing erased. What is read is the
    vector of the counts over their root mean square, and the largest is the answer.

    Args:
        arch: ``gla``, ``mlstm`` or ``gdn2``; the last with erase 0 and write 1, which tied gates cannot have.
        n_symbols: of the task ``majority``.
    """
    width = 4 * n_symbols
    model = _blank(arch, vocab_size=n_symbols, n_classes=n_symbols, d_model=width, n_heads=1)
    block: Any = model.blocks[0]
    ALL, READ = n_symbols, n_symbols + 1
    with torch.no_grad():
        for symbol in range(n_symbols):
            model.embedding.weight[symbol, [symbol, ALL]] = 1.0
        q, k, v = block.qkv.weight.view(3, width, width)
        q[0, ALL] = k[0, ALL] = BIG
        unit = math.sqrt(width / 2)
        for symbol in range(n_symbols):
            v[symbol, symbol] = before_silu(torch.tensor(1.0, dtype=torch.float64)) / unit
        if arch == "gla":
            block.gate.decay_in[-1].bias.fill_(200.0)  # sigmoid^(1/16): log decay 0
        elif arch == "mlstm":
            block.gate.decay.bias.fill_(200.0)
        else:
            block.gate.decay.A_log.fill_(-40.0)
            block.gate.decay.dt_bias.fill_(-40.0)
            block.gate.erase.weight[:, ALL] = -100.0
            block.gate.write.weight[:, ALL] = 100.0
        block.gate_out.linear.weight[:, ALL] = 1.0
        for symbol in range(n_symbols):
            block.out.weight[READ + symbol, symbol] = 1.0
            _head(model)[symbol, READ + symbol] = 1.0
    return model


def recall_model(pairs: int = 32) -> Model:
    """Recall of as many pairs as the memory has key channels: one head with orthogonal keys.

    For the task ``mqar_stacked``, where a position holds a key and its value: erase and write are 1 where
    there is a value, and 0 at queries and blanks.

    Args:
        pairs: K, the width of a head.
    """
    K, width, tokens = pairs, 4 * pairs, 2 * (pairs + 1)
    model = _blank(
        "deltanet", vocab_size=tokens, n_classes=tokens, d_model=width, n_heads=4, tokens_per_position=2
    )
    block: Any = model.blocks[0]
    # A position is the embedding of its key, then that of its value; keys use the first K features of theirs,
    # values the last K.
    keys, values, read = slice(0, K), slice(3 * K, 4 * K), slice(K, 2 * K)
    codes = torch.cat([torch.eye(K), torch.full((1, K), K**-0.5)])  # one value more than there are channels
    with torch.no_grad():
        model.embedding.weight[1 : K + 1, :K] = torch.eye(K)
        model.embedding.weight[K + 1 :, K:] = codes
        q, k, v = (rows[:K] for rows in block.qkv.weight.view(3, width, width))  # of the first head
        q[:, keys] = k[:, keys] = BIG * torch.eye(K)
        v[:, values] = torch.eye(K)
        block.gate.erase.weight[0, keys] = -BIG
        block.gate.erase.weight[0, values] = 2 * BIG
        block.gate_out.linear.weight[:, keys] = 1.0
        block.out.weight[read, :K] = torch.eye(K)
        _head(model)[K + 1 :, read] = codes
    return model


def _blank(arch: str, **fields: Any) -> Model:
    """A model of one layer without convolution in which every weight is 0, norms apart."""
    model = build_model(ModelConfig(arch=arch, n_layers=1, conv="none", **fields), seed=0)
    block: Any = model.blocks[0]
    layer: Any = model.layers[0]
    with torch.no_grad():
        for part in (block, layer.mlp, model.head, model.embedding):
            for parameter in part.parameters():
                parameter.zero_()
        block.norm.weight.fill_(1.0)
    return model.eval()


def _head(model: Model) -> Tensor:
    """[classes, D], to be written to."""
    head: Any = model.head
    return head.weight


def before_silu(y: Tensor) -> Tensor:
    """The x >= -1.278 with SiLU(x) = y, by bisection in float64; y >= -0.278."""
    y = y.double()
    low, high = torch.full_like(y, -1.278464542761074), y.clamp_min(0) + 2
    for _ in range(100):
        middle = (low + high) / 2
        below = torch.nn.functional.silu(middle) < y
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2
