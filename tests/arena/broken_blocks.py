"""A small block that does everything right, and blocks that each do one thing wrong."""

from __future__ import annotations

import torch
from torch import nn

from arena.blocks.base import Block


class Good(Block):
    """S_t = decay_t S_{t-1} + k_t v_t^T, read = S^T q; as slow and plain as can be."""

    def __init__(self, *, d_model=8, n_heads=2):
        super().__init__(d_model)
        self.n_heads = n_heads
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.decay = nn.Linear(d_model, n_heads)
        self.out = nn.Linear(d_model, d_model)

    def initial_state(self, batch_size, *, device=None, dtype=None):
        device, dtype = self._placement(device, dtype)
        head = self.d_model // self.n_heads
        return {"memory": torch.zeros(batch_size, self.n_heads, head, head, device=device, dtype=dtype)}

    def gates(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).unbind(-3)
        return q, k, v, self.decay(x).sigmoid()[..., None]

    def forward(self, x, state=None):
        read, memory = self.scan(x, state)
        return self.out(read.flatten(-2)), {"memory": memory}

    def scan(self, x, state):
        q, k, v, decay = self.gates(x)
        memory = (self.initial_state(x.shape[0], dtype=x.dtype) if state is None else state)["memory"]
        reads = []
        for t in range(x.shape[1]):
            memory = decay[:, t, :, :, None] * memory + k[:, t, :, :, None] * v[:, t, :, None]
            reads.append((memory * q[:, t, :, :, None]).sum(-2))
        return torch.stack(reads, 1), memory

    def trace(self, x, state=None, *, states=False):
        q, k, v, decay = self.gates(x)
        return {"q": q, "k": k, "v": v, "decay": decay, "read": self.scan(x, state)[0]}


class OtherStep(Good):
    def step(self, x_t, state):
        y, state = super().step(x_t, state)
        return 1.001 * y, state


class LosesState(Good):
    def forward(self, x, state=None):
        return super().forward(x, state if x.shape[1] == 1 else None)


class OtherStart(Good):
    def initial_state(self, batch_size, **kind):
        return {"memory": super().initial_state(batch_size, **kind)["memory"] + 1}

    def scan(self, x, state):
        return super().scan(x, state or Good.initial_state(self, x.shape[0], dtype=x.dtype))


class SeesTheFuture(Good):
    def forward(self, x, state=None):
        y, state = super().forward(x, state)
        return y + x.mean(1, keepdim=True), state


class IgnoresItsToken(Good):
    def forward(self, x, state=None):
        y, state = super().forward(x, state)
        return y.roll(1, 1) * (torch.arange(x.shape[1]) > 0)[:, None], state


class MixesRows(Good):
    def forward(self, x, state=None):
        y, state = super().forward(x, state)
        return y + x.mean(0), state


class _Double(torch.autograd.Function):
    """2 x, whose backward says 3; without a rule for vmap."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad


class NoVmap(Good):
    def forward(self, x, state=None):
        y, state = super().forward(x, state)
        return _Double.apply(y), state


class WrongGradient(NoVmap):
    pass


class NoGradient(Good):
    def gates(self, x):
        q, k, v, decay = super().gates(x)
        return q, k, v, decay.detach()


class UnusedWeight(Good):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.spare = nn.Parameter(torch.randn(3))

    def forward(self, x, state=None):
        y, state = super().forward(x, state)
        return y + 0 * self.spare.sum(), state


class CoarseInFloat32(Good):
    def forward(self, x, state=None):
        y, state = super().forward(x, state)
        return (y.bfloat16().float() if y.dtype == torch.float32 else y), state


class Dropout(Good):
    def forward(self, x, state=None):
        y, state = super().forward(x, state)
        return nn.functional.dropout(y, 0.5, self.training), state


class Counts(Good):
    calls = 0

    def forward(self, x, state=None):
        self.calls += 1
        y, state = super().forward(x, state)
        return y + 1e-3 * self.calls, state


class OwnSeed(Good):
    def __init__(self, **sizes):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            super().__init__(**sizes)


class Looks(Good):
    def forward(self, x, state=None):
        return super().forward(x * (2 if x[0, 0, 0].item() > 9 else 1), state)


class ChangesState(Good):
    def forward(self, x, state=None):
        if state is not None:
            state["memory"] *= 0.5
        return super().forward(x, state)


class Remembers(Good):
    def forward(self, x, state=None):
        self.last = x
        return super().forward(x, state)


class BatchSecond(Good):
    def initial_state(self, batch_size, **kind):
        return {"memory": super().initial_state(batch_size, **kind)["memory"].transpose(0, 1)}


class Understates(Good):
    def state_bytes(self, length=0):
        return 4


class OwnWords(Good):
    def trace(self, x, state=None, *, states=False):
        return {**super().trace(x, state), "keys": x}


class WrongAxes(Good):
    def trace(self, x, state=None, *, states=False):
        return {**super().trace(x, state), "erase": x}


class TraceForgets(Good):
    def trace(self, x, state=None, *, states=False):
        return super().trace(x, None)


class TraceLies(Good):
    def trace(self, x, state=None, *, states=False):
        trace = super().trace(x, state)
        return {**trace, "decay": trace["decay"] ** 2}


class Raises(Good):
    def forward(self, x, state=None):
        raise RuntimeError("no kernel\nfor this device")


BROKEN = [
    ("forward = steps", OtherStep),
    ("state continues", LosesState),
    ("initial state", OtherStart),
    ("causality", SeesTheFuture),
    ("causality", IgnoresItsToken),
    ("independent rows", MixesRows),
    ("vmap: fleet = singles", NoVmap),
    ("vmap: fleet = singles", Looks),
    ("gradient", WrongGradient),
    ("gradient", NoGradient),
    ("gradient", UnusedWeight),
    ("gradient in float32", CoarseInFloat32),
    ("determinism", Dropout),
    ("determinism", Counts),
    ("initial weights", OwnSeed),
    ("purity", Looks),
    ("purity", ChangesState),
    ("purity", Remembers),
    ("purity", Dropout),
    ("state", BatchSecond),
    ("state", Understates),
    ("trace vocabulary", OwnWords),
    ("trace vocabulary", WrongAxes),
    ("trace continues", TraceForgets),
    ("trace adds up", TraceLies),
    ("purity", Raises),
]
"""A check, and a block that must fail it."""
