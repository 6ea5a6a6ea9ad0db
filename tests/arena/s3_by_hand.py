"""Real ``deltaproduct[2]-neg`` and ``gdnproduct[2]-neg`` models, weights set by hand: one layer solves S3.

S3 moves the corners of a triangle, a linear map R(a) of the plane for each element a: the identity, three
reflections and two rotations, each of which is two reflections. So every token is at most two Householder
matrices with beta = 2. Head ``SOLVER`` keeps the plane in its keys. What it writes is tied to what it erases,
and v = C^T k makes that harmless: S_t - C = M_t (S_{t-1} - C), where the transition M_t is R(a_t)^T. From
S_0 = 0 a fixed query q therefore reads C^T (q - R(a_1 ... a_t) q): a chord from one corner of a regular
hexagon to another, whose direction tells the five elements that are not the identity, which reads 0.

Keys pass through SiLU, which is never below -0.278, and are then normalised with 1e-6 under the root: each
coordinate of the plane is spread over K / 2 channels, so that the vectors before the norm are long.
"""

import itertools
import math

import torch
from torch import Tensor

from arena.model import Model, ModelConfig, build_model

D, HEADS, SOLVER = 16, 2, 0
K = D // HEADS
ALWAYS, ANSWER = 6, 7  # features of the residual stream, after those of the six tokens
WRITTEN = 0.2  # length of C
PERMUTATIONS = list(itertools.permutations(range(3)))  # as synthetic_tasks numbers the elements of s3


def silu_inverse(y: Tensor) -> Tensor:
    """z with z sigmoid(z) = y, elementwise, for y > -0.278, on the branch that rises."""
    low, high = torch.full_like(y, -1.278), torch.full_like(y, 100.0)
    for _ in range(200):
        middle = (low + high) / 2
        below = middle * torch.sigmoid(middle) < y
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def reflection(n: Tensor) -> Tensor:
    """I - 2 n n^T."""
    return torch.eye(len(n), dtype=n.dtype) - 2 * torch.outer(n, n)


def plane() -> tuple[list[Tensor], list[Tensor]]:
    """R(a) of the six elements, and the unit normals of the three reflections, in one basis of the plane.

    In this basis no normal has a coordinate below -0.26: they lie at -15, 45 and 105 degrees.
    """
    u = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64) / math.sqrt(2)
    w = torch.tensor([1.0, 1.0, -2.0], dtype=torch.float64) / math.sqrt(6)
    turn = math.radians(15)
    basis = torch.stack(
        [math.cos(turn) * u + math.sin(turn) * w, -math.sin(turn) * u + math.cos(turn) * w], 1
    )
    maps = []
    for p in PERMUTATIONS:
        matrix = torch.zeros(3, 3, dtype=torch.float64)
        matrix[list(p), range(3)] = 1.0  # corner i goes to p(i)
        maps.append(basis.T @ matrix @ basis)
    normals = []
    for i, j in ((0, 1), (0, 2), (1, 2)):
        edge = torch.zeros(3, dtype=torch.float64)
        edge[i], edge[j] = 1.0, -1.0
        n = basis.T @ edge / math.sqrt(2)
        normals.append(n if n.min() >= (-n).min() else -n)
    return maps, normals


def factors(a: int) -> tuple[list[Tensor], list[bool]]:
    """The two normals of a token and which of them it reflects along, first micro-step first.

    The transition is H_2 H_1 = R(a)^T, so R(a) = H_1 H_2.
    """
    maps, normals = plane()
    eye = torch.eye(2, dtype=torch.float64)
    for first, second in itertools.product(normals, normals):
        for on in ((False, False), (True, False), (True, True)):
            product = (reflection(first) if on[0] else eye) @ (reflection(second) if on[1] else eye)
            if torch.allclose(product, maps[a]):
                return [first, second], list(on)
    raise AssertionError(f"element {a} is no product of two reflections")


def s3_model(arch: str = "deltaproduct[2]-neg") -> Model:
    """The model, in float64; tokens and classes as of the task ``s3``."""
    config = ModelConfig(
        arch=arch, vocab_size=6, n_classes=6, d_model=D, n_layers=1, n_heads=HEADS, conv="none"
    )
    model = build_model(config, seed=0).double()
    block, layer = model.blocks[0], model.layers[0]
    copies = K // 2
    maps, _ = plane()
    query = torch.full((2,), math.sqrt(0.5), dtype=torch.float64)
    with torch.no_grad():
        for parameter in (*block.parameters(), *layer.mlp.parameters(), *model.head.parameters()):
            parameter.zero_()
        block.norm.weight.fill_(1.0)
        model.embedding.weight.zero_()
        model.embedding.weight[:, ALWAYS] = 1.0
        model.embedding.weight[range(6), range(6)] = 1.0
        size = layer.norm(model.embedding.weight)[0, ALWAYS]  # of a feature that is there, for the block

        def spread(x: Tensor, length: float) -> Tensor:
            """Weights that give a vector along x over the channels of a head, SiLU undone."""
            return silu_inverse(length * x.repeat_interleave(copies) / math.sqrt(copies)) / size

        q, k, v = block.qkv.weight.split(block.widths)
        q.view(HEADS, K, D)[SOLVER, :, ALWAYS] = spread(query, 1.0)
        k, v = k.view(2, HEADS, K, D), v.view(2, HEADS, K, D)
        erase = block.gate.erase.weight.view(2, HEADS, D)
        for a in range(6):
            for j, (n, on) in enumerate(zip(*factors(a), strict=True)):
                k[j, SOLVER, :, a] = spread(n, 1.0)
                v[j, SOLVER, :2, a] = silu_inverse(WRITTEN * n) / size
                erase[j, SOLVER, a] = 40.0 if on else -40.0  # 2 sigmoid(+-40 size): 2 or 0
        if "gate.decay.dt_bias" in block.state_dict():
            block.gate.decay.dt_bias.fill_(-60.0)  # decay exp(-e^-60)
        block.gate_out.linear.weight[:, ALWAYS] = 1.0 / size
        for i in range(2):
            block.out.weight[ANSWER + i, SOLVER * K + i] = 1.0
            for a in range(1, 6):
                chord = query - maps[a] @ query
                model.head.weight[a, ANSWER + i] = chord[i] / chord.norm()
        # the answer is of length sqrt(K) silu(1) = 2.07 or 0; two chords are at least 30 degrees apart
        model.head.weight[0, ALWAYS] = 1.0
    return model.eval()
