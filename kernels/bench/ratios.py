"""CPU speed of the operators beside public alternatives, as ratios in one run: the table of docs/speed.md.

The two sides of a row take turns, so that other load on the machine meets both, and the medians are compared.
What is not installed is replaced by our own reference loop, and the table says so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import gated_memory, mlstm, slstm
from kernels.bench.peers import attribute, fla_naive
from kernels.bench.timing import medians

SHAPE = (64, 256, 2, 32)
"""B, T, H, K = V of every row that does not say otherwise: a small fleet of the arena's models."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison, forward and backward."""

    what: str
    """Our operator and its setting."""
    against: str
    """The alternative, by name."""
    goal: float
    """How many times faster ours should be."""
    ours: Callable[[], None]
    """Runs ours once."""
    peer: Callable[[], None]
    """Runs the alternative once."""


def rows() -> Iterator[Row]:
    """Yield the comparisons that can be made here."""
    inputs = gdn2_inputs(*SHAPE)
    run = trainer(lambda *x: gated_memory(*x)[0], inputs)
    naive, name = gdn2_peer()
    yield Row(
        what="gated_memory, all gates per channel (GDN-2), T 256",
        against=name,
        goal=8.0,
        ours=run,
        peer=trainer(naive, inputs),
    )
    for T, goal in ((256, 0.5), (1024, 1.0)):
        inputs = gdn2_inputs(SHAPE[0], T, *SHAPE[2:])
        heads_first = [x.transpose(1, 2).contiguous() for x in inputs[:3]]
        yield Row(
            what=f"gated_memory, all gates per channel (GDN-2), T {T}",
            against="scaled_dot_product_attention, causal",
            goal=goal,
            ours=trainer(lambda *x: gated_memory(*x)[0], inputs),
            peer=trainer(
                lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), heads_first
            ),
        )
    B, T, H, K = SHAPE
    inputs = [normal(B, T, H, K, seed=i) for i in range(3)]
    inputs += [normal(B, T, H, seed=3) - 2, normal(B, T, H, seed=4) + 4]
    peer, name, layout = mlstm_peer()
    yield Row(
        what="mlstm, with normaliser and stabiliser, T 256",
        against=name,
        goal=1.5,
        ours=trainer(lambda *x: mlstm(*x)[0], inputs),
        peer=trainer(peer, [layout(x) for x in inputs]),
    )
    for batch in (B // 4, B):
        gates, recurrent = normal(batch, T, 4, H, K, seed=5), 0.1 * normal(4, H, K, K, seed=6)
        for backend in ("numba", "fused") if importlib.util.find_spec("numba") else ("fused",):
            yield Row(
                what=f"slstm ({backend}), B {batch}, T 256",
                against="token loop (our reference)",
                goal=10.0,
                ours=trainer(partial(slstm_output, backend), [gates, recurrent]),
                peer=trainer(partial(slstm_output, "reference"), [gates, recurrent]),
            )


def slstm_output(backend: str, gates: Tensor, recurrent: Tensor) -> Tensor:
    """The sLSTM without its state."""
    return slstm(gates, recurrent, backend=backend)[0]


def normal(*size: int, seed: int) -> Tensor:
    """Standard normal draws."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def gdn2_inputs(B: int, T: int, H: int, K: int) -> list[Tensor]:
    """Inputs q, k, v, log_decay, erase, write as a GDN-2 block makes them."""
    q, k, v, decay, erase, write = (normal(B, T, H, K, seed=i) for i in range(6))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    return [q, k, v, F.logsigmoid(decay + 3), erase.sigmoid(), write.sigmoid()]


def trainer(operator: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], None]:
    """Return a function that runs the operator forward and backward to all its inputs."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    weights: list[Tensor] = []

    def run() -> None:
        o = operator(*leaves)
        if not weights:
            weights.append(torch.randn_like(o))
        torch.autograd.grad(o, leaves, weights[0])

    return run


def gdn2_peer() -> tuple[Callable[..., Tensor], str]:
    """Return fla's naive GDN-2 recurrence."""
    naive = fla_naive("gdn2")
    if naive is None:
        name = "token loop (our reference; fla's is not installed)"
        return lambda *x: gated_memory(*x, backend="reference")[0], name
    return lambda *x: naive(*x)[0], "fla's naive recurrence"


def mlstm_peer() -> tuple[Callable[..., Tensor], str, Callable[[Tensor], Tensor]]:
    """Return NX-AI's native chunkwise mLSTM with its own backward, and the layout it takes."""
    peer = attribute("mlstm_kernels.torch.chunkwise.native", "mlstm_chunkwise__native_custbw")
    if peer is None:
        name = "token loop (our reference; mlstm_kernels is not installed)"
        return lambda *x: mlstm(*x, backend="reference")[0], name, lambda x: x
    return peer, "NX-AI's native chunkwise mLSTM", lambda x: x.transpose(1, 2).contiguous()


def measure(row: Row, repeats: int) -> tuple[float, float]:
    """Return the median seconds of ours and of the alternative, taking turns after a warm-up of each."""
    ours, peer = medians([row.ours, row.peer], "cpu", rounds=repeats)
    return ours, peer


def table(repeats: int) -> Iterator[str]:
    """The table of docs/speed.md in Markdown, line by line as it is measured."""
    B, _, H, K = SHAPE
    threads = f"{torch.get_num_threads()} thread" + "s" * (torch.get_num_threads() > 1)
    yield f"torch {torch.__version__}, {threads}, float32, B {B} H {H} K = V = {K}, forward and backward\n"
    yield "| what | against | times faster | goal |\n|---|---|---|---|"
    for row in rows():
        ours, peer = measure(row, repeats)
        yield f"| {row.what} | {row.against} | {peer / ours:.2f} | {row.goal:g} |"
