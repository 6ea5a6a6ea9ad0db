"""The gate space that all matrix memories share, and the vocabulary in which every architecture is traced."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

Axis = Literal["none", "scalar", "channel"]
DecayForm = Literal["softplus_a", "sigmoid", "sigmoid_root", "bounded"]
Write = Literal["one", "scalar", "channel", "exponential"]
Coupling = Literal["free", "tied", "step"]
Normaliser = Literal["none", "max_abs", "sum"]
QKMap = Literal["l2", "none", "elu1"]


@dataclass(frozen=True, kw_only=True)
class GateSpec:
    """One point of gate space: which gates a matrix memory has, on which axis, and how they are computed.

    Per head, with state S in R^(K x V) and elementwise products,

        S_t = (I - k_t e_t^T) D_t S_{t-1} + k_t z_t^T        o_t = S_t^T q_t
        D_t = diag(decay_t)     e_t = erase_t * k_t     z_t = write_t * v_t

    A point that makes no sense is refused with a ValueError when it is built.
    """

    decay: Axis = "none"
    """``none`` (decay 1), ``scalar`` (one a head) or ``channel`` (one a key channel)."""
    decay_form: DecayForm = "softplus_a"
    """From pre-activation f to decay: ``softplus_a`` exp(-A softplus(f + dt_bias)) (Mamba-2, GDN, KDA,
    GDN-2), ``sigmoid`` (mLSTM), ``sigmoid_root`` sigmoid(f)^(1/16) (GLA), ``bounded`` exp(-5 sigmoid(A (f +
    dt_bias))) (KDA's safe gate)."""
    a_range: tuple[float, float] = (1.0, 16.0)
    """A of ``softplus_a`` is uniform in this range at initialisation."""
    signed: bool = False
    """Decay is 2 s - 1 in [-1, 1] instead of s in [0, 1] (Grazzi et al., arXiv 2411.12537)."""
    erase: Axis = "none"
    """``none`` (erase 0), ``scalar`` (one a head) or ``channel`` (one a key channel); a sigmoid."""
    erase_range: Literal[1, 2] = 1
    """Upper end of erase; 2 allows eigenvalues down to -1. Tied, it doubles write as well; free, erase
    only."""
    write: Write = "one"
    """``one`` (write 1), ``scalar``, ``channel`` (one a value channel) or ``exponential`` (mLSTM, one a
    head)."""
    coupling: Coupling = "free"
    """``free``; ``tied``: erase and write are one gate; ``step``: write is the step size softplus(f +
    dt_bias) from which the decay is computed (Mamba-2)."""
    normaliser: Normaliser = "none"
    """What a read is divided by, with n the same memory of the constant 1: ``max_abs`` max(|n^T q|, 1)
    (mLSTM), ``sum`` n^T q + 1e-6 (linear attention; needs positive features)."""
    qk_map: QKMap = "l2"
    """On queries and keys, per head: ``l2`` normalisation, ``none``, or ``elu1`` elu(x) + 1."""

    def __post_init__(self) -> None:
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} must be one of {get_args(kind)}, got {getattr(self, name)!r}")
        if not 0 <= self.a_range[0] < self.a_range[1]:
            raise ValueError(f"a_range must be 0 <= low < high, got {self.a_range}")
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


_CHOICES: dict[str, Any] = {
    "decay": Axis,
    "decay_form": DecayForm,
    "erase": Axis,
    "erase_range": Literal[1, 2],
    "write": Write,
    "coupling": Coupling,
    "normaliser": Normaliser,
    "qk_map": QKMap,
}


def _contradictions(g: GateSpec) -> list[tuple[bool, str]]:
    """Pairs (holds, reason) of settings that contradict each other."""
    exponential = g.write == "exponential"
    return [
        (g.signed and g.decay == "none", "a signed decay needs a decay"),
        (g.erase == "none" and g.erase_range != 1, "erase_range needs an erase gate"),
        (g.erase != "none" and g.qk_map != "l2", "erase needs keys of length 1 (qk_map='l2')"),
        (g.coupling == "tied" and (g.erase == "none" or g.erase != g.write), "tied gates share one axis"),
        (
            g.coupling == "step"
            and (g.decay != "scalar" or g.write != "scalar" or g.decay_form != "softplus_a"),
            "coupling='step' needs scalar decay of form 'softplus_a' and scalar write",
        ),
        (
            exponential
            and (g.decay != "scalar" or g.decay_form != "sigmoid" or g.signed or g.erase != "none"),
            "exponential write needs a positive scalar decay of form 'sigmoid' and no erase",
        ),
        (exponential and g.normaliser != "max_abs", "exponential write needs normaliser='max_abs'"),
        (g.normaliser != "none" and g.write == "channel", "a normaliser needs a write gate without channels"),
        (
            g.normaliser == "sum" and (g.qk_map != "elu1" or g.signed or g.erase != "none"),
            "normaliser='sum' needs positive features (qk_map='elu1'), no erase and a positive decay",
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
    "k": TraceField("B T H K", "1", "key as the memory writes with it"),
    "v": TraceField("B T H V", "1", "value before the write gate"),
    "decay": TraceField("B T H K|1", "1", "factor on the old memory, signed; 1 keeps all, 0 forgets all"),
    "log_decay": TraceField("B T H K|1", "nat", "ln |decay|"),
    "erase": TraceField(
        "B T H K|1", "1", "part of the old value at the key that is taken out; 1 replaces, 2 reflects"
    ),
    "write": TraceField("B T H V|1", "1", "factor on the value that is written"),
    "step": TraceField("B T H 1", "1", "step size from which decay and write both come"),
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
}
"""Name -> axes, unit, meaning. K|1 stands for a gate per channel or one per head; sizes of 1 are kept."""


def state_bytes(state: Mapping[str, Tensor]) -> int:
    """Bytes that one sequence carries in ``state``, a mapping of batch-first tensors."""
    return sum(x.element_size() * x[:1].numel() for x in state.values())
