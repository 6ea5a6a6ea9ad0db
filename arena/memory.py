"""The gate space that all matrix memories share, and the vocabulary in which every architecture is traced."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

Axis = Literal["none", "scalar", "mean", "channel"]
DecayForm = Literal["softplus_a", "sigmoid", "sigmoid_root", "bounded"]
Write = Literal["one", "scalar", "mean", "channel", "exponential"]
WriteOn = Literal["value", "correction"]
Coupling = Literal["free", "tied", "complement", "step", "dial"]
Normaliser = Literal["none", "max_abs", "sum"]
QKMap = Literal["l2", "none", "elu1"]

MOST_MICRO_STEPS = 64
"""Of a token: a product of K reflections can be any orthogonal map of K key channels."""


@dataclass(frozen=True, kw_only=True)
class GateSpec:
    """One point of gate space: which gates a matrix memory has, on which axis, and how they are computed.

    Per head, with state S in R^(K x V) and elementwise products,

        S_t = (I - k_t e_t^T) D_t S_{t-1} + k_t z_t^T        o_t = S_t^T q_t
        D_t = diag(decay_t)     e_t = erase_t * k_t     z_t = write_t * v_t

    A point that makes no sense is refused with a ValueError when it is built.
    """

    decay: Axis = "none"
    """``none`` (decay 1), ``scalar`` (one a head), ``channel`` (one a key channel) or ``mean``: the channel
    gates of a token averaged over a head's channels, so that there is one a head and no parameter less
    (GDN-2's ablation, arXiv 2605.22791, table 5)."""
    decay_form: DecayForm = "softplus_a"
    """From pre-activation f to decay: ``softplus_a`` exp(-A softplus(f + dt_bias)) (Mamba-2, GDN, KDA,
    GDN-2), ``sigmoid`` (mLSTM), ``sigmoid_root`` sigmoid(f)^(1/16) (GLA), ``bounded`` exp(-5 sigmoid(A (f +
    dt_bias))) (KDA's safe gate)."""
    a_range: tuple[float, float] = (1.0, 16.0)
    """A of ``softplus_a`` is uniform in this range at initialisation."""
    signed: bool = False
    """Decay is 2 s - 1 in [-1, 1] instead of s in [0, 1] (Grazzi et al., arXiv 2411.12537)."""
    erase: Axis = "none"
    """``none`` (erase 0), ``scalar``, ``mean`` or ``channel`` as for decay; a sigmoid."""
    erase_range: Literal[1, 2] = 1
    """Upper end of erase; 2 allows eigenvalues down to -1. Tied, it doubles write as well; free, erase
    only; see :attr:`write_interval`."""
    erase_value: float | None = None
    """Freeze a ``scalar`` erase at this number in [0, 2]: it is not computed, and has no parameters."""
    write: Write = "one"
    """``one`` (write 1), ``scalar``, ``mean``, ``channel`` (one a value channel) or ``exponential`` (mLSTM,
    one a head)."""
    write_value: float | None = None
    """Freeze a ``scalar`` write at this number above 0."""
    write_on: WriteOn = "value"
    """What write multiplies: the ``value``, or the whole ``correction`` of the memory, S_t = D_t S_{t-1} +
    k_t (write_t * (v_t - r_t))^T with r_t = (D_t S_{t-1})^T e_t. The latter is exploratory (no architecture
    has it) and runs on the reference backend only."""
    coupling: Coupling = "free"
    """``free``; ``tied``: erase and write are one gate (channel-wise only where K = V); ``complement``: write
    = 1 - decay (a channel-wise decay is on K, so that it scales k, which only a memory without erase allows);
    ``step``: write is the step size softplus(f + dt_bias) from which the decay is computed (Mamba-2);
    ``dial``: from tied to free, see ``dial``."""
    dial: float | None = None
    """l in [0, 1] of coupling ``dial``: with s a scalar gate that erase and write share, and b and w gates of
    their own, erase = range ((1 - l) s + l b) and write = (1 - l) range s + l w. 0 is ``tied`` scalar gates,
    1 is ``free``, in every range."""
    normaliser: Normaliser = "none"
    """What a read is divided by, with n the same memory of the constant 1: ``max_abs`` max(|n^T q|, 1)
    (mLSTM), ``sum`` n^T q + 1e-6 (linear attention; needs positive features)."""
    qk_map: QKMap = "l2"
    """On queries and keys, per head: ``l2`` normalisation, ``none``, or ``elu1`` elu(x) + 1."""
    micro_steps: int = 1
    """n of DeltaProduct (arXiv 2502.10297): a token decays the memory once and then updates it n times, each
    with a key, a value, an erase and a write of its own; its read comes after the last of them."""

    def __post_init__(self) -> None:
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} must be one of {get_args(kind)}, got {getattr(self, name)!r}")
        n = self.micro_steps
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MOST_MICRO_STEPS:
            raise ValueError(f"micro_steps must be an integer in 1..{MOST_MICRO_STEPS}, got {n!r}")
        if not 0 <= self.a_range[0] < self.a_range[1]:
            raise ValueError(f"a_range must be 0 <= low < high, got {self.a_range}")
        for name in ("erase_value", "write_value", "dial"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise ValueError(f"{name} must be a number, got {value!r}")
        for wrong, why in _contradictions(self):
            if wrong:
                raise ValueError(f"{why}: {self}")

    def replace(self, **changes: Any) -> GateSpec:
        """The same point with some fields changed; ValueError for an unknown field."""
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise ValueError(f"gate space has no axis {name!r}; known: {', '.join(known)}")
        return dataclasses.replace(self, **changes)

    @property
    def erase_interval(self) -> tuple[float, float]:
        """The values that erase can take."""
        if self.erase_value is not None:
            return (float(self.erase_value),) * 2
        return (0.0, 0.0) if self.erase == "none" else (0.0, float(self.erase_range))

    @property
    def write_interval(self) -> tuple[float, float]:
        """The values that write can take: with tied gates, ``erase_range`` holds for write too."""
        if self.write_value is not None:
            return (float(self.write_value),) * 2
        if self.coupling == "dial":
            assert self.dial is not None
            return 0.0, (1 - self.dial) * self.erase_range + self.dial
        high = {"tied": self.erase_range, "complement": 1 + self.signed, "step": math.inf, "free": 1}
        if self.write == "one":
            return 1.0, 1.0
        return 0.0, math.inf if self.write == "exponential" else float(high[self.coupling])


_CHOICES: dict[str, Any] = {
    "decay": Axis,
    "decay_form": DecayForm,
    "erase": Axis,
    "erase_range": Literal[1, 2],
    "write": Write,
    "write_on": WriteOn,
    "coupling": Coupling,
    "normaliser": Normaliser,
    "qk_map": QKMap,
}


def _contradictions(g: GateSpec) -> list[tuple[bool, str]]:
    """Pairs (holds, reason) of settings that contradict each other."""
    exponential = g.write == "exponential"
    gated_write = g.write in ("scalar", "mean", "channel")
    return [
        (g.signed and g.decay == "none", "a signed decay needs a decay"),
        (g.erase == "none" and g.erase_range != 1, "erase_range needs an erase gate"),
        (g.erase != "none" and g.qk_map != "l2", "erase needs keys of length 1 (qk_map='l2')"),
        *_frozen_contradictions(g),
        (g.coupling == "tied" and (g.erase == "none" or g.erase != g.write), "tied gates share one axis"),
        (g.coupling == "complement" and g.decay == "none", "coupling='complement' needs a decay"),
        (
            g.coupling == "complement" and g.write != g.decay,
            "coupling='complement' gives write the axis of decay",
        ),
        (
            g.coupling == "complement" and g.decay == "channel" and g.erase != "none",
            "a channel-wise complement scales k, which erase uses too: erase must be 'none'",
        ),
        (
            g.coupling == "step"
            and (g.decay != "scalar" or g.write != "scalar" or g.decay_form != "softplus_a"),
            "coupling='step' needs scalar decay of form 'softplus_a' and scalar write",
        ),
        ((g.coupling == "dial") != (g.dial is not None), "coupling='dial' and a dial need each other"),
        (g.dial is not None and not 0 <= g.dial <= 1, "a dial is in [0, 1]"),
        (
            g.coupling == "dial" and (g.erase == "none" or not gated_write),
            "coupling='dial' needs an erase gate and a write gate of a sigmoid",
        ),
        (
            g.write_on == "correction" and (g.erase == "none" or not gated_write or g.coupling != "free"),
            "write_on='correction' needs an erase gate, a write gate of a sigmoid and coupling='free'",
        ),
        (
            exponential
            and (g.decay != "scalar" or g.decay_form != "sigmoid" or g.signed or g.erase != "none"),
            "exponential write needs a positive scalar decay of form 'sigmoid' and no erase",
        ),
        (exponential and g.coupling != "free", "exponential write needs coupling='free'"),
        (exponential and g.normaliser != "max_abs", "exponential write needs normaliser='max_abs'"),
        (
            g.normaliser != "none"
            and (g.write_on == "correction" or (g.write == "channel" and g.coupling != "complement")),
            "a normaliser needs a write gate without channels, on the value",
        ),
        (
            g.normaliser == "sum" and (g.qk_map != "elu1" or g.signed or g.erase != "none"),
            "normaliser='sum' needs positive features (qk_map='elu1'), no erase and a positive decay",
        ),
        (g.micro_steps > 1 and exponential, "exponential write has one micro-step"),
        (
            g.micro_steps > 1 and g.coupling in ("complement", "step"),
            f"coupling={g.coupling!r} computes write from a token's one decay: it takes one micro-step",
        ),
    ]


def _frozen_contradictions(g: GateSpec) -> list[tuple[bool, str]]:
    """As :func:`_contradictions`, for gates that are frozen at a value."""
    erase, write = g.erase_value, g.write_value
    return [
        (erase is not None and g.erase != "scalar", "a frozen erase is one number: erase='scalar'"),
        (erase is not None and not 0 <= erase <= 2, "erase is frozen at a value in [0, 2]"),
        (erase is not None and g.erase_range != 1, "a frozen erase has no range"),
        (write is not None and g.write != "scalar", "a frozen write is one number: write='scalar'"),
        (write is not None and not 0 < write < math.inf, "write is frozen at a value above 0"),
        (
            write is not None and g.coupling != "free",
            f"coupling={g.coupling!r} computes write, which can't be frozen then",
        ),
        (
            erase is not None and g.coupling in ("tied", "dial"),
            f"coupling={g.coupling!r} computes erase, which can't be frozen then",
        ),
    ]


_DELTA = GateSpec(erase="scalar", write="scalar", coupling="tied")
_GDN = _DELTA.replace(decay="scalar", a_range=(0.0, 16.0))
_KDA = _DELTA.replace(decay="channel")
_GDN2 = GateSpec(decay="channel", erase="channel", write="channel")
_MAMBA2 = GateSpec(decay="scalar", write="scalar", coupling="step")

NAMED: dict[str, GateSpec] = {
    "linear_attention": GateSpec(),
    "gla": GateSpec(decay="channel", decay_form="sigmoid_root"),
    "mamba2": _MAMBA2,
    "mamba2-neg": _MAMBA2.replace(signed=True),
    "deltanet": _DELTA,
    "deltanet-neg": _DELTA.replace(erase_range=2),
    "gdn": _GDN,
    "gdn-neg": _GDN.replace(erase_range=2),
    "kda": _KDA,
    "kda-neg": _KDA.replace(erase_range=2),
    "gdn2": _GDN2,
    "gdn2-neg": _GDN2.replace(erase_range=2),
    "mlstm": GateSpec(decay="scalar", decay_form="sigmoid", write="exponential", normaliser="max_abs"),
}
"""The architectures as points of gate space, as they are under ``outer="common"``."""


class TraceField(NamedTuple):
    """One name of the trace vocabulary."""

    axes: str
    unit: str
    meaning: str


TRACE_FIELDS: dict[str, TraceField] = {
    "q": TraceField("B T H K", "1", "query as the memory reads with it, scale included: read = state^T q"),
    "k": TraceField("B M H K", "1", "key as the memory writes with it"),
    "v": TraceField("B M H V", "1", "value before the write gate"),
    "decay": TraceField("B M H K|1", "1", "factor on the old memory, signed; 1 keeps all, 0 forgets all"),
    "log_decay": TraceField("B M H K|1", "nat", "ln |decay|"),
    "erase": TraceField(
        "B M H K|1", "1", "part of the old value at the key that is taken out; 1 replaces, 2 reflects"
    ),
    "write": TraceField("B M H V|1", "1", "factor on the value that is written"),
    "angle": TraceField(
        "B M H P", "rad", "by how much the memory turns, with its decay, in key channels 2 i and 2 i + 1"
    ),
    "lag": TraceField("B M H 1", "token", "how long before its token the value was read; where absent, 0"),
    "step": TraceField("B M H 1", "1", "step size from which decay and write both come"),
    "input_gate": TraceField(
        "B T H V|1", "1", "pre-activation of the input gate (ln of an exponential write)"
    ),
    "forget_gate": TraceField("B T H V|1", "1", "pre-activation of the forget gate"),
    "normaliser": TraceField("B T H V|1", "1", "what the read is divided by"),
    "read": TraceField("B T H V", "1", "what the memory returns, before norm and output gate"),
    "output_gate": TraceField("B T H V", "1", "factor on the (normed) read, after its non-linearity"),
    "cell": TraceField("B T H V", "1", "cell of a scalar memory after the token"),
    "attention": TraceField("B H T S", "1", "weight of token S in the read of token T; rows sum to 1"),
    "state": TraceField("B T H K V", "1", "matrix memory after the token"),
    "update_token": TraceField("B U", "1", "first token that is read with an update of weights (TTT-E2E)"),
    "update_norm": TraceField("B U", "1", "Frobenius norm of an update of a layer's weights"),
    "update_drift": TraceField("B U", "1", "distance of a layer's weights after it from their start"),
    "inner_loss_before": TraceField("B U", "nat", "next-token loss of the mini-batch before its update"),
    "inner_loss_after": TraceField("B U", "nat", "the same after the update of all layers"),
}
"""Name -> axes, unit, meaning. K|1 stands for a gate per channel or one per head; sizes of 1 are kept.

M = T * ``Block.micro_steps``: the updates of the memory, those of a token one after the other. M is T for a
block with one micro-step a token, as are all but DeltaProduct, RWKV-7 and Mamba-3. A decay stands at a
token's first micro-step; at the others it is 1. An angle stands with the decay, P <= K/2 of them: D_t R_t is
in the place of D_t, R_t the rotation that takes channel 2 i towards 2 i + 1.

U: the updates that the tokens set off."""


def state_bytes(state: Mapping[str, Tensor]) -> int:
    """Bytes that one sequence carries in ``state``, a mapping of batch-first tensors."""
    return sum(x.element_size() * x[:1].numel() for x in state.values())
