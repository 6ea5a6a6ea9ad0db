"""What is timed: each operator at its settings and shapes, ours beside the public alternatives installed.

Inputs are random and as the blocks make them: unit keys, mild decays, erase and write from a sigmoid.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import dynamic_short_conv, gated_memory, mlstm, short_conv, slstm
from kernels.bench.peers import attribute, fla_kernel, fla_naive, untrusted
from kernels.doctor import POINTS

Operator = Callable[..., Tensor]
Maker = Callable[[tuple[int, ...], torch.dtype, str], "Comparison"]
ARENA, LM = "arena", "lm"
SIZES = {ARENA: torch.float32, LM: torch.bfloat16}
"""Kinds of shapes, and the dtype that they are measured in."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MEMORY_SHAPES = {
    ARENA: ((64, 256, 2, 32), (64, 512, 2, 64)),
    LM: ((4, 4096, 16, 128),),
}
"""B, T, H, K = V."""
FLEET = (1024, 256, 2, 32)
"""A fleet of 16 of the arena's first shape: on a GPU only."""
CONV_SHAPES = {ARENA: ((64, 256, 192),), LM: ((4, 4096, 2048),)}
"""B, T, D."""
TURNS = 3
"""Most shapes of an operator."""
TAPS, RANK = 4, 16
SAFE_GATE = "right for log-decays of at least -5 only, as these are"
OTHER = "another operator, for scale"
"""The note of a contender whose output is not checked."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One implementation, with its inputs in its own layout."""

    name: str
    call: Operator
    """Called with the leaves; returns the output."""
    leaves: list[Tensor]
    """Differentiated, all of them."""
    ours: bool = False
    """Ours; ``auto`` is what runs by default."""
    note: str = ""
    """What a reader must know of its result."""
    layout: Callable[[Tensor], Tensor] = field(default=lambda x: x)
    """An input of ours in its layout."""
    back: Callable[[Tensor], Tensor] = field(default=lambda o: o)
    """Its output in our layout."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One operator at one setting and shape."""

    operator: str
    setting: str
    shape: str
    dtype: torch.dtype
    contenders: list[Contender]
    truth: Operator
    """The token loop; called with inputs like those of the first contender."""
    flop: float
    """Floating-point operations of the recurrence itself, forward, whatever an algorithm spends."""

    @property
    def bytes_forward(self) -> float:
        """Each input read once, the output (as large as the third input, or the first) written once."""
        leaves = self.contenders[0].leaves
        return float(sum(x.nbytes for x in leaves) + leaves[min(2, len(leaves) - 1)].nbytes)

    @property
    def bytes_both(self) -> float:
        """Forward, then inputs and the output's gradient read and the inputs' gradients written."""
        leaves = self.contenders[0].leaves
        return 3.0 * sum(x.nbytes for x in leaves) + 2.0 * leaves[min(2, len(leaves) - 1)].nbytes


def comparisons(
    device: str,
    sizes: Sequence[str],
    *,
    dtype: torch.dtype | None = None,
    operators: tuple[str, ...] = (),
    points: tuple[str, ...] = (),
    first: int | None = None,
) -> Iterator[Comparison]:
    """Yield what can be compared here, one after the other: the inputs of one may need much memory.

    The first shapes of every operator come before the second ones, so that a run that is cut off has them.

    Args:
        device: ``cpu`` or ``cuda``.
        sizes: Keys of :data:`SIZES`.
        dtype: Of the inputs; None: that of :data:`SIZES`.
        operators: Only these; empty: all.
        points: Of the gated memory only these, in this order; empty: all.
        first: Only so many of the shapes; None: all.
    """
    wanted = operators or ("gated_memory", "mlstm", "slstm", "short_conv", "dynamic_short_conv")
    makers: list[tuple[str, Maker, Mapping[str, tuple[tuple[int, ...], ...]]]] = [
        ("gated_memory", partial(memory, point), MEMORY_SHAPES) for point in points or tuple(POINTS)
    ]
    makers += [
        ("mlstm", matrix_lstm, MEMORY_SHAPES),
        ("slstm", scalar_lstm, {ARENA: MEMORY_SHAPES[ARENA]}),
        ("short_conv", convolution, CONV_SHAPES),
        ("dynamic_short_conv", dynamic_convolution, CONV_SHAPES),
    ]
    for turn in range(TURNS if first is None else first):
        for (operator, maker, table), size in product(makers, sizes):
            shapes = table.get(size, ())
            if device == "cuda" and size == ARENA and table is not CONV_SHAPES:
                shapes = (*shapes, FLEET)
            if operator in wanted and turn < len(shapes):
                yield maker(shapes[turn], dtype or SIZES[size], device)


class Draws:
    """Random leaves from one stream."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.dtype, self.device = dtype, device

    def normal(self, *size: int, dtype: torch.dtype | None = None, unit: bool = False) -> Tensor:
        """Standard normal draws; ``unit``: of length 1 along the last axis."""
        x = torch.randn(size, generator=self.generator)
        return (F.normalize(x, dim=-1) if unit else x).to(self.device, dtype or self.dtype)


def own(backends: tuple[str, ...], call: Callable[..., Any], leaves: list[Tensor]) -> list[Contender]:
    """Ours by default, and each backend by name."""
    names = ("auto", *backends)
    return [
        Contender(name=f"ours ({name})", call=partial(_first, call, name), leaves=leaves, ours=True)
        for name in names
    ]


def _first(call: Callable[..., Any], backend: str, *leaves: Tensor) -> Tensor:
    return call(*leaves, backend=backend)[0]


def _here(device: str, cpu: tuple[str, ...], cuda: tuple[str, ...]) -> tuple[str, ...]:
    return cpu if device == "cpu" else cuda


def memory(point: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Comparison:
    """The gated memory at a named point."""
    B, T, H, K = shape
    draw = Draws(dtype, device)
    decay, erase, write = POINTS[point]
    q, k, v = draw.normal(B, T, H, K, unit=True), draw.normal(B, T, H, K, unit=True), draw.normal(B, T, H, K)
    gates: dict[str, Tensor] = {}
    for name, kind in (("log_decay", decay), ("erase", erase), ("write", write)):
        if kind in ("scalar", "channel"):
            size = (B, T, H) if kind == "scalar" else (B, T, H, K)
            raw = draw.normal(*size, dtype=torch.float32)
            gates[name] = F.logsigmoid(raw + 3) if name == "log_decay" else raw.sigmoid().to(dtype)
    if point == "Mamba-2":
        gates["write"] = -gates["log_decay"]  # one step for both
        gates.pop("log_decay")
    leaves = [q, k, v, *gates.values()]

    def call(q: Tensor, k: Tensor, v: Tensor, *given: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        named: dict[str, Any] = dict(zip(gates, given, strict=True))
        if write == "tied":
            named["write"] = named["erase"]
        if point == "Mamba-2":
            named["log_decay"] = -named["write"]
        return gated_memory(q, k, v, **named, scale=_scale(point), backend=backend)

    contenders = own(_here(device, (), ("chunked", "triton")), call, leaves)
    contenders += _memory_peers(point, leaves, device)
    inner = (1 if decay else 0) + (2 if erase else 0) + 4
    return Comparison(
        operator="gated_memory",
        setting=point,
        shape=f"B{B} T{T} H{H} K{K} V{K}",
        dtype=dtype,
        contenders=contenders,
        truth=partial(_first, call, "reference"),
        flop=float(B * T * H * K * K * inner),
    )


def _memory_peers(point: str, leaves: list[Tensor], device: str) -> Iterator[Contender]:
    kernel = {
        "linear attention": "simple_gla",
        "GLA": "gla",
        "Mamba-2": "simple_gla",
        "DeltaNet": "delta_rule" if leaves[0].dtype != torch.float32 else "kda",
        "GDN": "gated_delta_rule",
        "KDA": "kda",
        "GDN-2": "gdn2",
    }[point]
    if device == "cpu":
        naive = None if point in ("linear attention", "DeltaNet") else fla_naive(kernel)  # another layout
        if naive is not None:
            yield Contender(name="fla (naive recurrence)", call=partial(_naive, naive, point), leaves=leaves)
    elif (theirs := fla_kernel(kernel)) is not None:
        note = untrusted(kernel, has_decay=point not in ("linear attention", "DeltaNet"))
        yield Contender(name=f"fla ({kernel})", call=partial(_fla, theirs, point), leaves=leaves, note=note)
        if point in ("KDA", "GDN-2"):
            call = partial(_fla, partial(theirs, safe_gate=True), point)
            yield Contender(name=f"fla ({kernel}, safe_gate)", call=call, leaves=leaves, note=SAFE_GATE)
    if point == "Mamba-2" and device == "cuda":
        scan = attribute("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
        if scan is not None:
            minus_one = -torch.ones(leaves[1].shape[2], device=device)
            yield Contender(name="mamba_ssm (SSD)", call=partial(_mamba, scan, minus_one), leaves=leaves)
    if point == "GDN-2":
        heads_first = [_heads_first(x) for x in leaves[:3]]
        yield Contender(
            name="torch attention (SDPA, causal)",
            call=partial(F.scaled_dot_product_attention, is_causal=True),
            leaves=heads_first,
            note=OTHER,
        )


def _naive(naive: Callable[..., Any], point: str, q: Tensor, k: Tensor, v: Tensor, *gates: Tensor) -> Tensor:
    if point == "Mamba-2":
        return naive(q, k, v * gates[0][..., None], -gates[0])[0]
    if point == "GDN":
        return naive(q, k, v, g=gates[0], beta=gates[1])[0]
    return naive(q, k, v, *gates)[0]


def _fla(kernel: Callable[..., Any], point: str, q: Tensor, k: Tensor, v: Tensor, *gates: Tensor) -> Tensor:
    if point == "Mamba-2":
        (step,) = gates
        return kernel(q, k, (v * step[..., None]).to(v.dtype), g=-step, scale=_scale(point))[0]
    if point == "DeltaNet" and q.dtype == torch.float32:
        return kernel(q, k, v, g=torch.zeros_like(k), beta=gates[0])[0]
    names = {
        "linear attention": (),
        "GLA": ("g",),
        "DeltaNet": ("beta",),
        "GDN": ("g", "beta"),
        "KDA": ("g", "beta"),
        "GDN-2": ("g", "b", "w"),
    }[point]
    return kernel(q, k, v, **dict(zip(names, gates, strict=True)))[0]


def _mamba(
    scan: Callable[..., Any], minus_one: Tensor, q: Tensor, k: Tensor, v: Tensor, step: Tensor
) -> Tensor:
    return scan(v, step, minus_one, k, q, min(256, k.shape[1]))


def _scale(point: str) -> float | None:
    """Of q; SSD has none."""
    return 1.0 if point == "Mamba-2" else None


def matrix_lstm(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Comparison:
    """The mLSTM with its normaliser and stabiliser."""
    B, T, H, K = shape
    draw = Draws(dtype, device)
    leaves = [draw.normal(B, T, H, K) for _ in range(3)]
    leaves += [draw.normal(B, T, H, dtype=torch.float32) - 2, draw.normal(B, T, H, dtype=torch.float32) + 4]
    contenders = own(_here(device, (), ("chunked", "triton")), mlstm, leaves)
    kinds = (
        (("native", "mlstm_chunkwise__native_custbw", 64),)
        if device == "cpu"
        else (
            ("triton_limit_chunk", "mlstm_chunkwise__limit_chunk", 64),
            ("triton_xl_chunk", "mlstm_chunkwise__xl_chunk", 64),
            ("triton_xl_chunk", "mlstm_chunkwise__xl_chunk", 128),
        )
    )
    for kind, name, chunk in kinds:
        theirs = attribute(f"mlstm_kernels.torch.chunkwise.{kind}", name)
        if theirs is not None:
            contenders.append(
                Contender(
                    name=f"mlstm_kernels ({kind}, chunks of {chunk})",
                    call=partial(theirs, chunk_size=chunk, autocast_kernel_dtype=dtype),
                    leaves=[_heads_first(x) for x in leaves],
                    note="its backward leaves the normaliser out",
                    layout=_heads_first,
                    back=_heads_first,
                )
            )
    return Comparison(
        operator="mlstm",
        setting="normaliser, stabiliser",
        shape=f"B{B} T{T} H{H} K{K} V{K}",
        dtype=dtype,
        contenders=contenders,
        truth=partial(_first, mlstm, "reference"),
        flop=5.0 * B * T * H * K * (K + 1),
    )


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous()


def scalar_lstm(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Comparison:
    """The sLSTM; no public package runs it without compiling CUDA, so the token loop stands beside it."""
    B, T, H, K = shape
    draw = Draws(dtype, device)
    leaves = [draw.normal(B, T, 4, H, K), 0.1 * draw.normal(4, H, K, K)]
    compiled = ("numba", "fused") if importlib.util.find_spec("numba") else ("fused",)
    contenders = own(_here(device, compiled, ("fused", "triton")), slstm, leaves)
    loop = partial(_first, slstm, "reference")
    contenders.append(Contender(name="token loop (torch)", call=loop, leaves=leaves))
    return Comparison(
        operator="slstm",
        setting="block-diagonal recurrence",
        shape=f"B{B} T{T} H{H} K{K}",
        dtype=dtype,
        contenders=contenders,
        truth=partial(_first, slstm, "reference"),
        flop=8.0 * B * T * H * K * K,
    )


def convolution(size: tuple[int, ...], dtype: torch.dtype, device: str) -> Comparison:
    """The static short convolution with SiLU."""
    B, T, D = size
    draw = Draws(dtype, device)
    leaves = [draw.normal(B, T, D), draw.normal(TAPS, D)]
    contenders = own(_here(device, (), ("fused", "triton")), partial(short_conv, activation="silu"), leaves)
    contenders.append(Contender(name="torch conv1d (depthwise)", call=_conv1d, leaves=leaves))
    theirs = attribute("fla.modules.causal_conv1d", "causal_conv1d") if device == "cuda" else None
    if theirs is not None:
        contenders.append(
            Contender(name="fla (causal_conv1d)", call=partial(_fla_conv, theirs), leaves=leaves)
        )
    theirs = attribute("causal_conv1d", "causal_conv1d_fn") if device == "cuda" else None
    if theirs is not None:
        contenders.append(
            Contender(name="causal-conv1d", call=partial(_causal_conv1d, theirs), leaves=leaves)
        )
    return Comparison(
        operator="short_conv",
        setting=f"width {TAPS}, SiLU",
        shape=f"B{B} T{T} D{D}",
        dtype=dtype,
        contenders=contenders,
        truth=partial(_first, partial(short_conv, activation="silu"), "reference"),
        flop=2.0 * B * T * D * TAPS,
    )


def _conv1d(x: Tensor, weight: Tensor) -> Tensor:
    padded = F.pad(x.transpose(1, 2), (weight.shape[0] - 1, 0))
    return F.silu(F.conv1d(padded, weight.flip(0).t()[:, None], groups=x.shape[2])).transpose(1, 2)


def _fla_conv(theirs: Callable[..., Any], x: Tensor, weight: Tensor) -> Tensor:
    return theirs(x, weight.flip(0).t().contiguous(), activation="silu")[0]


def _causal_conv1d(theirs: Callable[..., Any], x: Tensor, weight: Tensor) -> Tensor:
    return theirs(x.transpose(1, 2), weight.flip(0).t().contiguous(), activation="silu").transpose(1, 2)


def dynamic_convolution(size: tuple[int, ...], dtype: torch.dtype, device: str) -> Comparison:
    """The low-rank dynamic convolution; its authors' kernel is in no package: see the torch path."""
    B, T, D = size
    draw = Draws(dtype, device)
    leaves = [
        draw.normal(B, T, D),
        draw.normal(B, T, RANK) / 4,
        draw.normal(RANK, TAPS, D),
        draw.normal(TAPS, D),
    ]

    def call(x: Tensor, z: Tensor, u: Tensor, bias: Tensor, *, backend: str) -> tuple[Tensor, Tensor]:
        return dynamic_short_conv(x, z=z, u=u, bias=bias, backend=backend)

    return Comparison(
        operator="dynamic_short_conv",
        setting=f"low rank {RANK}, width {TAPS}",
        shape=f"B{B} T{T} D{D}",
        dtype=dtype,
        contenders=own(_here(device, (), ("fused", "triton")), call, leaves),
        truth=partial(_first, call, "reference"),
        flop=2.0 * B * T * D * TAPS * (RANK + 1),
    )
