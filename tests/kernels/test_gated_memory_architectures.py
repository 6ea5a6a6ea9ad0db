"""gated_memory against recurrences written from the papers, a function an architecture; with gradients."""

from __future__ import annotations

import itertools

import pytest
import torch

from kernels import gated_memory
from kernels.check import errors, gated_memory_inputs, outputs_and_gradients

BACKENDS = ("reference", "chunked")
FAST = "chunked"


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs_of(**options):
    return gated_memory_inputs(**options)


def run(inputs, backend, dtype=torch.float64, **more):
    return outputs_and_gradients(
        lambda **x: gated_memory(**x, backend=backend, **more), inputs, dtype=dtype, seed=1
    )


def loop(step, q, k, v, state, scale):
    """o [B,T,H,V] of a recurrence given as matrices: step(t, b, h, S) is the next S [K,V]."""
    B, T, H, _ = k.shape
    states = [[state[b, h] for h in range(H)] for b in range(B)]
    out = []
    for t in range(T):
        for b, h in itertools.product(range(B), range(H)):
            states[b][h] = step(t, b, h, states[b][h])
        rows = [torch.stack([states[b][h].T @ (scale * q[b, t, h]) for h in range(H)]) for b in range(B)]
        out.append(torch.stack(rows))
    final = torch.stack([torch.stack(row) for row in states])
    return torch.stack(out, 1), final


def gdn2(q, k, v, log_decay, erase, write, initial_state):
    """GDN-2, equations 8 to 10: residual form."""

    def step(t, b, h, S):
        S = torch.diag(log_decay[b, t, h].exp()) @ S
        residual = write[b, t, h] * v[b, t, h] - S.T @ (erase[b, t, h] * k[b, t, h])
        return S + torch.outer(k[b, t, h], residual)

    return loop(step, q, k, v, initial_state, k.shape[-1] ** -0.5)


def kda(q, k, v, log_decay, erase, write, initial_state):
    """KDA: S_t = (I - beta k k^T) Diag(alpha) S + beta k v^T; ``erase`` is beta, ``write`` is not read."""
    eye = torch.eye(k.shape[-1], dtype=k.dtype)

    def step(t, b, h, S):
        beta, key = erase[b, t, h], k[b, t, h]
        transition = (eye - beta * torch.outer(key, key)) @ torch.diag(log_decay[b, t, h].exp())
        return transition @ S + beta * torch.outer(key, v[b, t, h])

    return loop(step, q, k, v, initial_state, k.shape[-1] ** -0.5)


def gdn(q, k, v, log_decay, erase, write, initial_state):
    """Gated DeltaNet: S_t = alpha (I - beta k k^T) S + beta k v^T with a scalar alpha."""
    eye = torch.eye(k.shape[-1], dtype=k.dtype)

    def step(t, b, h, S):
        beta, key = erase[b, t, h], k[b, t, h]
        kept = log_decay[b, t, h].exp() * (eye - beta * torch.outer(key, key)) @ S
        return kept + beta * torch.outer(key, v[b, t, h])

    return loop(step, q, k, v, initial_state, k.shape[-1] ** -0.5)


def deltanet(q, k, v, log_decay, erase, write, initial_state):
    """DeltaNet: the value read at k moves towards v by beta."""

    def step(t, b, h, S):
        return S + erase[b, t, h] * torch.outer(k[b, t, h], v[b, t, h] - S.T @ k[b, t, h])

    return loop(step, q, k, v, initial_state, k.shape[-1] ** -0.5)


def gla(q, k, v, log_decay, erase, write, initial_state):
    """Gated linear attention: S_t = Diag(alpha) S + k v^T."""

    def step(t, b, h, S):
        return log_decay[b, t, h].exp()[:, None] * S + torch.outer(k[b, t, h], v[b, t, h])

    return loop(step, q, k, v, initial_state, k.shape[-1] ** -0.5)


def mamba2(q, k, v, log_decay, erase, write, initial_state):
    """Mamba-2: h_t = a_t h_{t-1} + Delta_t B_t x_t^T, scalar a and Delta."""

    def step(t, b, h, S):
        return log_decay[b, t, h].exp() * S + write[b, t, h] * torch.outer(k[b, t, h], v[b, t, h])

    return loop(step, q, k, v, initial_state, k.shape[-1] ** -0.5)


# name: the paper's loop, kinds of decay, erase and write, is write tied to erase
ARCHITECTURES = {
    "gdn2": (gdn2, "channel", "channel", "channel", False),
    "kda": (kda, "channel", "scalar", None, True),
    "gdn": (gdn, "scalar", "scalar", None, True),
    "deltanet": (deltanet, None, "scalar", None, True),
    "gla": (gla, "channel", None, None, False),
    "mamba2": (mamba2, "scalar", None, "scalar", False),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("T", (1, 21))
def test_architectures(name, backend, T):
    naive, log_decay, erase, write, tied = ARCHITECTURES[name]
    inputs = inputs_of(shape=(2, T, 2, 5, 4), log_decay=log_decay, erase=erase, write=write, seed=T)

    def ours(**x):
        x["write"] = x["erase"] if tied else x["write"]
        return gated_memory(**x, backend=backend)

    truth = outputs_and_gradients(naive, inputs, seed=2)
    found = outputs_and_gradients(ours, inputs, seed=2)
    assert max(errors(found, truth).values()) < 1e-12


def test_reductions_in_gate_space():
    """A gate that is present but neutral, or constant along the channels, changes nothing."""
    x = inputs_of(shape=(2, 37, 2, 6, 5), log_decay="scalar", erase="scalar", write="scalar")
    x = {name: None if y is None else y for name, y in x.items()}
    wide = dict(x)
    wide["log_decay"] = x["log_decay"][..., None].expand(-1, -1, -1, 6)
    wide["erase"] = x["erase"][..., None].expand(-1, -1, -1, 6)
    wide["write"] = x["write"][..., None].expand(-1, -1, -1, 5)
    for gates in itertools.product((False, True), repeat=3):
        mixed = dict(x)
        for name, use in zip(("log_decay", "erase", "write"), gates, strict=True):
            mixed[name] = wide[name] if use else x[name]
        for a, b in zip(gated_memory(**mixed), gated_memory(**x), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    for name, neutral in (("log_decay", 0.0), ("erase", 0.0), ("write", 1.0)):
        absent = gated_memory(**(x | {name: None}))
        present = gated_memory(**(x | {name: torch.full_like(x[name], neutral)}))
        for a, b in zip(absent, present, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ("scalar", "channel"))
@pytest.mark.parametrize("T", (1, 35))
def test_signed_decay(backend, kind, T):
    """Against the loop with the signed decay written out; gradients finite where the decay is 0."""
    inputs = inputs_of(shape=(2, T, 2, 5, 4), log_decay=kind, extreme=True, seed=8)
    sign = torch.where(rand(*inputs["log_decay"].shape, seed=3) < 0, -1.0, 1.0).double()

    def naive(q, k, v, log_decay, erase, write, initial_state):
        decay = sign * log_decay.exp()
        decay = decay[..., None].expand_as(k) if decay.dim() == 3 else decay

        def step(t, b, h, S):
            S = decay[b, t, h][:, None] * S
            residual = write[b, t, h] * v[b, t, h] - S.T @ (erase[b, t, h] * k[b, t, h])
            return S + torch.outer(k[b, t, h], residual)

        return loop(step, q, k, v, initial_state, k.shape[-1] ** -0.5)

    truth = outputs_and_gradients(naive, inputs, seed=4)
    for signs in (sign, sign.float(), sign.long()):
        found = outputs_and_gradients(
            lambda signs=signs, **x: gated_memory(**x, decay_sign=signs, backend=backend), inputs, seed=4
        )
        assert max(errors(found, truth).values()) < 1e-12
