"""Blocks whose gates are given, so that every measurement has an answer in closed form."""

import torch

from arena.blocks.base import Block


class Frozen(Block):
    """A matrix memory whose q, k, v and gates are tensors [T,H,*], the same for every x; y is 0.

    Written from the block interface alone, without ``arena.blocks.matrix``. With n micro-steps a token, k, v
    and the gates are [T n,H,*]; so are the fields in ``others``, by name.
    """

    def __init__(self, q, k, v, *, decay=1.0, erase=0.0, write=1.0, normaliser=None, **others):
        super().__init__(1)
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.micro_steps = len(k) // len(q)
        fields = {"q": q, "k": k, "v": v, **others}
        for name, gate in (("decay", decay), ("erase", erase), ("write", write)):
            gate = torch.as_tensor(gate, dtype=torch.float64)
            fields[name] = gate if gate.dim() == 3 else gate.expand(*k.shape[:2], 1)
        fields["log_decay"] = fields["decay"].abs().log()
        if normaliser is not None:
            fields["normaliser"] = normaliser
        self.fields = fields

    def initial_state(self, batch_size, *, device=None, dtype=None):
        return {"read_so_far": torch.zeros(batch_size, 1)}

    def forward(self, x, state=None):
        state = self.initial_state(len(x)) if state is None else state
        return torch.zeros_like(x), {"read_so_far": state["read_so_far"] + x.shape[1]}

    def trace(self, x, state=None, *, states=False):
        start = 0 if state is None else int(state["read_so_far"][0, 0])
        T = x.shape[1]
        found = {}
        for name, f in self.fields.items():
            n = self.micro_steps if len(f) == len(self.fields["k"]) else 1
            found[name] = f[n * start : n * (start + T)].expand(len(x), -1, -1, -1)
        return found | {"read": found["v"].new_zeros(*found["q"].shape[:3], found["v"].shape[-1])}


def steps(T):
    """Inputs of T tokens for a frozen block."""
    return torch.zeros(1, T, 1, dtype=torch.float64)


def unit(*shape, seed=0):
    """Random vectors of length 1 on the last axis."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x / x.norm(dim=-1, keepdim=True)
