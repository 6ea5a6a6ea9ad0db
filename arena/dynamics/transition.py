"""What one token, or a window of tokens, does to the memory: the matrix M_t = (I - k_t e_t^T) D_t.

All functions take tensors of the trace vocabulary with any leading axes and compute in float64.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def transition_matrix(k: Tensor, decay: Tensor, erase: Tensor) -> Tensor:
    """M = (I - k e^T) D with e = erase * k, D = diag(decay).

    Args:
        k: [...,K].
        decay: [...,K] or [...,1], signed.
        erase: [...,K] or [...,1].

    Returns:
        [...,K,K], float64.
    """
    k = k.double()
    decay = decay.double().expand_as(k)
    return torch.diag_embed(decay) - k[..., :, None] * (erase.double() * k * decay)[..., None, :]


def window_product(k: Tensor, decay: Tensor, erase: Tensor) -> Tensor:
    """M_w ... M_2 M_1: what a window of w tokens does, its first token first.

    Args:
        k: [w,...,K]; decay and erase: [w,...,K] or [w,...,1].

    Returns:
        [...,K,K], float64; the identity for an empty window.
    """
    k = k.double()
    K = k.shape[-1]
    product = torch.eye(K, dtype=torch.float64, device=k.device).expand(*k.shape[1:], K).contiguous()
    for k_t, decay_t, erase_t in zip(k, decay.double(), erase.double(), strict=True):
        product = product * decay_t[..., None]
        product = product - k_t[..., :, None] * ((erase_t * k_t)[..., None, :] @ product)
    return product


def rayleigh_quotient(state: Tensor, k: Tensor, decay: Tensor, erase: Tensor) -> Tensor:
    """<S, M S> / ||S||^2: the factor on what a memory holds, 1 kept, 0 taken out, -1 all of it flipped.

    Args:
        state: [...,K,V], the memory before the token.
        k: [...,K]; decay and erase: [...,K] or [...,1], of the token.

    Returns:
        [...]; NaN for a memory that is zero.
    """
    kept = decay.double()[..., None] * state
    kept = kept - k.double()[..., None] * ((erase.double() * k.double())[..., None, :] @ kept)
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


def permutation_distance(matrix: Tensor) -> Tensor:
    """Frobenius distance to the nearest permutation matrix in the basis of the key channels: [...].

    || M - P ||^2 = || M ||^2 + K - 2 sum_i M[i, p(i)]; the best p is a linear assignment.
    """
    K = matrix.shape[-1]
    flat = matrix.reshape(-1, K, K).double().cpu().numpy()
    best = np.array([_best_assignment(m) if np.isfinite(m).all() else np.nan for m in flat])
    square = (flat**2).sum((1, 2)) + K - 2 * best
    return torch.from_numpy(np.sqrt(np.maximum(square, 0))).reshape(matrix.shape[:-2])


def _best_assignment(gain: np.ndarray) -> float:
    """The largest sum of gain[i, p(i)] over permutations p (Hungarian method, shortest augmenting paths)."""
    n = len(gain)
    cost = -gain
    row_price, column_price = np.zeros(n), np.zeros(n + 1)
    owner = np.full(n + 1, -1)  # row that has the column; the last column is the start of every path
    for row in range(n):
        owner[n], column = row, n
        distance, origin = np.full(n, np.inf), np.full(n, n)
        done = np.zeros(n + 1, bool)
        while owner[column] >= 0:
            done[column] = True
            here = owner[column]
            open_ = ~done[:n]
            reach = cost[here] - row_price[here] - column_price[:n]
            better = open_ & (reach < distance)
            distance[better], origin[better] = reach[better], column
            nearest = int(np.where(open_, distance, np.inf).argmin())
            step = distance[nearest]
            row_price[owner[done]] += step
            column_price[done] -= step
            distance[open_] -= step
            column = nearest
        while column != n:
            owner[column] = owner[origin[column]]
            column = origin[column]
    return float(gain[owner[:n], np.arange(n)].sum())
