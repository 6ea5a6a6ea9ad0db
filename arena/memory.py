"""The gate space that all matrix memories share, and the vocabulary in which every architecture is traced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


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
