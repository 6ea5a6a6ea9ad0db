"""What one token, or a window of tokens, does to the memory: the matrix M_t = (I - k_t e_t^T) D_t R_t.

R_t turns channels 2 i and 2 i + 1 by the trace's ``angle``; where there is none, R_t = 1. A token of n
micro-steps does what their product does, M_t = M_{t,n} ... M_{t,1}. All functions take tensors of the trace
vocabulary with any leading axes and compute in float64.
"""

from __future__ import annotations

import cmath

import torch
from torch import Tensor

from arena.blocks.trapezoid import rotated


def transition_matrix(k: Tensor, decay: Tensor, erase: Tensor, angle: Tensor | None = None) -> Tensor:
    """M = (I - k e^T) D R with e = erase * k, D = diag(decay), R the rotation by angle.

    Args:
        k: [...,K].
        decay: [...,K] or [...,1], signed.
        erase: [...,K] or [...,1].
        angle: [...,P] or None.

    Returns:
        [...,K,K], float64.
    """
    k = k.double()
    decay = decay.double().expand_as(k)
    matrix = torch.diag_embed(decay) - k[..., :, None] * (erase.double() * k * decay)[..., None, :]
    return matrix if angle is None else rotated(matrix, -angle.double()[..., None, :])


def token_matrix(k: Tensor, decay: Tensor, erase: Tensor, angle: Tensor | None = None) -> Tensor:
    """What a token of n micro-steps does, their product, the first one on the right.

    Args:
        k: [...,n,H,K]; decay and erase: [...,n,H,K] or [...,n,H,1]; angle: [...,n,H,P] or None.

    Returns:
        [...,H,K,K], float64.
    """
    fields = [None if x is None else x.movedim(-3, 0) for x in (k, decay, erase, angle)]
    if k.shape[-3] == 1:
        return transition_matrix(*(None if x is None else x[0] for x in fields))  # type: ignore[arg-type]
    return window_product(*fields)  # type: ignore[arg-type]


def window_product(k: Tensor, decay: Tensor, erase: Tensor, angle: Tensor | None = None) -> Tensor:
    """M_w ... M_2 M_1: what a window of w tokens (or micro-steps) does, its first one first.

    Args:
        k: [w,...,K]; decay and erase: [w,...,K] or [w,...,1]; angle: [w,...,P] or None.

    Returns:
        [...,K,K], float64; the identity for an empty window.
    """
    k = k.double()
    K = k.shape[-1]
    product = torch.eye(K, dtype=torch.float64, device=k.device).expand(*k.shape[1:], K).contiguous()
    for t, (k_t, decay_t, erase_t) in enumerate(zip(k, decay.double(), erase.double(), strict=True)):
        if angle is not None:
            product = rotated(product.mT, angle[t].double()[..., None, :]).mT
        product = product * decay_t[..., None]
        product = product - k_t[..., :, None] * ((erase_t * k_t)[..., None, :] @ product)
    return product


def rayleigh_quotient(
    state: Tensor, k: Tensor, decay: Tensor, erase: Tensor, angle: Tensor | None = None
) -> Tensor:
    """<S, M S> / ||S||^2: the factor on what a memory holds, 1 kept, 0 taken out, -1 all of it flipped.

    Args:
        state: [B,H,K,V], the memory before the token.
        k: [B,n,H,K]; decay and erase: [B,n,H,K] or [B,n,H,1], of the n micro-steps of the token.
        angle: [B,n,H,P] or None.

    Returns:
        [B,H]; NaN for a memory that is zero.
    """
    kept = state
    fields = zip(*(x.double().unbind(1) for x in (k, decay, erase)), strict=True)
    for j, (k_j, decay_j, erase_j) in enumerate(fields):
        if angle is not None:
            kept = rotated(kept.mT, angle[:, j].double()[..., None, :]).mT
        kept = decay_j[..., None] * kept
        kept = kept - k_j[..., None] * ((erase_j * k_j)[..., None, :] @ kept)
    return (state * kept).sum((-2, -1)) / state.square().sum((-2, -1))


def key_eigenvalue(k: Tensor, erase: Tensor) -> Tensor:
    """1 - e^T k = 1 - sum_i erase_i k_i^2, the eigenvalue of I - k e^T that is not 1: [...]."""
    return 1 - (erase.double() * k.double().square()).sum(-1)


def eigenvalues(matrix: Tensor) -> Tensor:
    """Eigenvalues of [...,K,K], complex [...,K], by rising real part; NaN for a matrix that is not finite."""
    finite = matrix.isfinite().all(-1).all(-1)
    found = torch.linalg.eigvals(matrix.masked_fill(~finite[..., None, None], 0.0))
    order = found.real.argsort(-1)
    return found.gather(-1, order).masked_fill(~finite[..., None], torch.nan)


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values of [...,K,V], the largest first; NaN for a matrix that is not finite."""
    finite = matrix.isfinite().all(-1).all(-1)
    found = torch.linalg.svdvals(matrix.masked_fill(~finite[..., None, None], 0.0))
    return found.masked_fill(~finite[..., None], torch.nan)


def identity_distance(matrix: Tensor) -> Tensor:
    """|| M - I ||_F: [...]."""
    return torch.linalg.matrix_norm(matrix - torch.eye(matrix.shape[-1], dtype=matrix.dtype))


def reflection_distance(matrix: Tensor) -> Tensor:
    """Frobenius distance to the nearest reflection I - 2 u u^T, ||u|| = 1: [...].

    || M - I + 2 u u^T ||^2 = || M - I ||^2 + 4 u^T (M - I) u + 4 is least for the eigenvector of the smallest
    eigenvalue l of the symmetric part of M - I, where it is || M - I ||^2 + 4 l + 4.
    """
    off = matrix - torch.eye(matrix.shape[-1], dtype=matrix.dtype)
    finite = off.isfinite().all(-1).all(-1)
    safe = off.masked_fill(~finite[..., None, None], 0.0)
    least = torch.linalg.eigvalsh((safe + safe.mT) / 2)[..., 0]
    square = safe.square().sum((-2, -1)) + 4 * least + 4
    return square.clamp_min(0).sqrt().masked_fill(~finite, torch.nan)


def orthogonal_distance(singular: Tensor) -> Tensor:
    """Frobenius distance to the nearest orthogonal matrix, sqrt(sum (s_i - 1)^2), from singular values.

    Permutations and reflections, in whatever orthonormal basis the memory keeps them, are orthogonal: none
    is nearer than this.
    """
    return (singular - 1).square().sum(-1).sqrt()


def permutation_distance(eigenvalues: Tensor) -> Tensor:
    """How far a spectrum is from that of a permutation of up to 5 points: [...].

    The eigenvalues of a permutation are, for each of its cycles, the roots of unity of the cycle's length; in
    the other directions it does nothing (eigenvalue 1). The distance is sqrt(sum |l_i - m_i|^2) under the
    best matching with the best permutation. It does not depend on the basis; for a normal matrix it is the
    Frobenius distance to the nearest such permutation in any orthonormal basis (Hoffman and Wielandt 1953).

    Args:
        eigenvalues: Complex [...,K].
    """
    from_one = (eigenvalues - 1).abs().square()
    best = torch.zeros_like(from_one[..., 0])
    for roots in _CYCLE_ROOTS:
        r = len(roots)
        if r > eigenvalues.shape[-1]:
            continue
        # What it costs to match a root with an eigenvalue that is matched with 1 otherwise. In the best
        # matching every root has one of its r cheapest eigenvalues.
        root = torch.tensor(roots, dtype=eigenvalues.dtype)[:, None]
        cost = (eigenvalues[..., None, :] - root).abs().square() - from_one[..., None, :]
        cheapest = cost.topk(r, largest=False)
        choice = torch.cartesian_prod(*[torch.arange(r)] * r).reshape(-1, r)
        each = torch.arange(r)
        which, total = (x[..., each, choice] for x in (cheapest.indices, cheapest.values))  # [...,choices,r]
        ordered = which.sort(-1).values
        twice = (ordered[..., 1:] == ordered[..., :-1]).any(-1)
        best = torch.minimum(best, total.sum(-1).masked_fill(twice, torch.inf).amin(-1))
    return (from_one.sum(-1) + best).clamp_min(0).sqrt()


def _roots(*cycles: int) -> list[complex]:
    """The eigenvalues of cycles of these lengths that are not 1."""
    return [cmath.exp(2j * cmath.pi * turn / m) for m in cycles for turn in range(1, m)]


_CYCLE_ROOTS = [_roots(2), _roots(3), _roots(4), _roots(5), _roots(2, 2), _roots(3, 2)]
"""Permutations of up to 5 points by their cycles, but the identity."""
