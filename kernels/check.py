"""Compare a fast path of an operator with its reference: every output and every gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def outputs_and_gradients(
    operator: Callable[..., Any],
    inputs: Mapping[str, Tensor | None],
    *,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Run an operator on leaf copies of its inputs and differentiate a random weighting of all its outputs.

    Args:
        operator: Called with the inputs by name; returns tensors, nested in tuples or lists.
        inputs: Float tensors are differentiated; None and integer tensors are passed on.
        dtype: Cast the float inputs to it; None: as they are.
        seed: Of the weights of the outputs; they do not depend on the dtype.

    Returns:
        "output 0", "output 1", ... and "gradient of NAME" for each float input (0 where it has no effect).
    """
    leaves = dict(inputs)
    for name, x in inputs.items():
        if x is not None and x.is_floating_point():
            leaves[name] = x.detach().to(dtype or x.dtype).requires_grad_()
    outputs = list(flat(operator(**leaves)))
    generator = torch.Generator().manual_seed(seed)
    weighted = [
        (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)).sum() for x in outputs
    ]
    wanted = {name: x for name, x in leaves.items() if x is not None and x.requires_grad}
    grads = torch.autograd.grad(
        torch.stack([x.double() for x in weighted]).sum(),
        list(wanted.values()),
        allow_unused=True,
        materialize_grads=True,
    )
    result = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    return result | {f"gradient of {name}": x for name, x in zip(wanted, grads, strict=True)}


def flat(outputs: Any) -> Iterator[Tensor]:
    """The tensors of nested tuples and lists, in order."""
    if isinstance(outputs, Tensor):
        yield outputs
    else:
        for part in outputs:
            yield from flat(part)


def errors(found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the largest difference of each tensor, relative to its largest true entry (or to 1, if below).

    A NaN or infinity that the truth does not have counts as an infinite error.
    """
    result = {}
    for name, x in truth.items():
        y = found[name].to(x)
        if x.numel() == 0:
            result[name] = 0.0
            continue
        gap = torch.where(x == y, 0.0, (x - y).abs()).max() / x.abs().max().clamp(min=1.0)
        result[name] = float(gap) if torch.isfinite(gap) else float("inf")
    return result


def gated_memory_inputs(
    *,
    shape: tuple[int, int, int, int, int] = (2, 40, 2, 8, 8),
    log_decay: str | None = "channel",
    erase: str | None = "channel",
    write: str | None = "channel",
    n_keys: int | None = None,
    extreme: bool = False,
    regime: str | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor | None]:
    """Return random float64 inputs (rounded to float32) for :func:`kernels.gated_memory`, by argument name.

    Args:
        shape: B, T, H, K, V.
        log_decay: ``"scalar"``, ``"channel"`` or None; so for the other gates. Erase is drawn from [0, 2].
        erase: See above.
        write: See above.
        n_keys: Every key is one of so many (1 or 2: the numerical trap that parity is); None: all differ.
        extreme: A fifth each of the decays is 0 (log -inf), 1, and e^-30; a third of the erase gates 2.
        regime: All gates of one kind: ``"double"`` (decay exactly 1, erase 2), ``"strong"`` (log-decay -5 to
            -30), ``"closed"`` (decay exactly 1, erase and write near 0), or None.
        seed: Of all draws.
        device: Where the tensors go; the draws are the same everywhere.
    """
    B, T, H, K, V = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    def gate(kind: str | None, width: int) -> Tensor | None:
        return None if kind is None else normal(B, T, H, *([width] if kind == "channel" else []))

    keys = normal(B, T, H, K) if n_keys is None else normal(B, n_keys, H, K)
    if n_keys is not None:
        keys = keys[:, torch.randint(n_keys, (T,), generator=generator)]
    decays, erases, writes = gate(log_decay, K), gate(erase, K), gate(write, V)
    if decays is not None:
        kind, decays = (
            torch.rand(decays.shape, generator=generator),
            torch.nn.functional.logsigmoid(decays + 1),
        )
        if extreme:
            decays = decays.masked_fill(kind < 0.2, -torch.inf).masked_fill(kind > 0.8, 0.0)
            decays = decays.masked_fill((kind > 0.4) & (kind < 0.6), -30.0)
    if erases is not None:
        kind, erases = torch.rand(erases.shape, generator=generator), 2 * erases.sigmoid()
        erases = erases.masked_fill(kind < 0.3, 2.0) if extreme else erases
    if writes is not None:
        writes = writes.sigmoid()
    if decays is not None and regime is not None:
        strong = -5 - 25 * torch.rand(decays.shape, generator=generator, dtype=torch.float64)
        decays = strong if regime == "strong" else torch.zeros_like(decays)
    if erases is not None and regime is not None:
        erases = {"double": torch.full_like(erases, 2.0), "closed": 1e-4 * erases}.get(regime, erases)
    if writes is not None and regime == "closed":
        writes = 1e-4 * writes
    inputs = {
        "q": normal(B, T, H, K),
        "k": keys / keys.norm(dim=-1, keepdim=True),
        "v": normal(B, T, H, V),
        "log_decay": decays,
        "erase": erases,
        "write": writes,
        "initial_state": normal(B, H, K, V),
    }
    return {name: None if x is None else x.float().double().to(device) for name, x in inputs.items()}
