"""Traces: the vocabulary, and whether they tell the truth."""

from __future__ import annotations

import torch
from torch import Tensor

from arena.conformance.subject import BATCH, SHORT, Subject, close, must, tokens
from arena.memory import TRACE_FIELDS


def trace_speaks_the_vocabulary(subject: Subject) -> str:
    """``trace`` uses the names, axes and units of ``arena.memory.TRACE_FIELDS``."""
    block = subject.make()
    x = tokens(block)
    fields: set[str] = set()
    before = block(tokens(block, seed=3))[1]
    for trace in (block.trace(x), block.trace(x, before, states=True)):
        sizes = {"B": BATCH, "T": SHORT, "M": SHORT * block.micro_steps}
        for field, value in trace.items():
            must(field in TRACE_FIELDS, f"trace names {field!r}, which is not of the vocabulary")
            axes = TRACE_FIELDS[field].axes.split()
            must(value.dim() == len(axes), f"{field} has {value.dim()} axes, not {' '.join(axes)}")
            for axis, size in zip(axes, value.shape, strict=True):
                if not (axis.endswith("|1") and size == 1):
                    known = sizes.setdefault(axis.removesuffix("|1"), size)
                    must(known == size, f"{field} has {size} along {axis} of {' '.join(axes)}, not {known}")
        fields |= trace.keys()
        if {"decay", "log_decay"} <= trace.keys():
            close(trace["log_decay"].exp(), trace["decay"].abs(), 1e-9, "exp(log_decay) and |decay|")
    return f"{len(fields)} names: {', '.join(sorted(fields))}"


def trace_continues(subject: Subject) -> str:
    """A trace from a state on is the rest of the trace of the whole."""
    block = subject.make()
    x = tokens(block)
    whole = block.trace(x)
    second = block.trace(x[:, 4:], block(x[:, :4])[1])
    for field, value in whole.items():
        if field != "attention":
            cut = 4 * (block.micro_steps if TRACE_FIELDS[field].axes.split()[1] == "M" else 1)
            close(second[field], value[:, cut:], 1e-9, f"{field} from token 4 on")
    return ""


def trace_adds_up(subject: Subject) -> str:
    """What is traced as read is what the traced gates, keys and values make of an empty memory, in a plain
    loop: S_t = (I - k_t e_t^T) D_t R_t S_{t-1} + k_t z_t^T, read_t = S_t^T q_t / normaliser_t.

    Of attention: the traced weights on the traced values.
    """
    block = subject.make()
    trace = block.trace(tokens(block))
    if {"attention", "v", "read"} <= trace.keys():
        found = torch.einsum("bhts,bshv->bthv", trace["attention"], trace["v"])
        return f"{close(found, trace['read'], 1e-9, 'attention times v, and read'):.0e} apart"
    if not {"q", "k", "v", "read"} <= trace.keys():
        return "no memory with q, k, v and read"
    q, k, v, read = (trace[name] for name in ("q", "k", "v", "read"))
    decay, erase, write, angle = (trace.get(name) for name in ("decay", "erase", "write", "angle"))
    steps = block.micro_steps
    memory = torch.zeros(*k[:, 0].shape, v.shape[-1], dtype=v.dtype)
    reads = []
    for m in range(k.shape[1]):
        memory = memory if angle is None else _turned(memory, angle[:, m])
        memory = memory if decay is None else decay[:, m, :, :, None] * memory
        old = 0.0 if erase is None else torch.einsum("bhk,bhkv->bhv", erase[:, m] * k[:, m], memory)
        new = v[:, m] if write is None else write[:, m] * v[:, m]
        memory = memory + torch.einsum("bhk,bhv->bhkv", k[:, m], new - old)
        if (m + 1) % steps == 0:
            reads.append(torch.einsum("bhkv,bhk->bhv", memory, q[:, m // steps]))
    found = torch.stack(reads, 1)
    found = found / trace["normaliser"] if "normaliser" in trace else found
    return f"{close(found, read, 1e-9, 'the read of the loop over the trace'):.0e} apart"


def _turned(memory: Tensor, angle: Tensor) -> Tensor:
    """Memory [B,H,K,V] with its key channels 2 i turned towards 2 i + 1 by angle [B,H,P], i < P <= K/2."""
    pairs = 2 * angle.shape[-1]
    even, odd = memory[..., :pairs, :].unflatten(-2, (-1, 2)).unbind(-2)
    cos, sin = angle.cos()[..., None], angle.sin()[..., None]
    turned = torch.stack([cos * even - sin * odd, sin * even + cos * odd], -2).flatten(-3, -2)
    return torch.cat([turned, memory[..., pairs:, :]], -2)
