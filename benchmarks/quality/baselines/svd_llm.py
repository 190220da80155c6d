"""SVD-LLM (arXiv 2403.07378): each matrix alone, its singular values after whitening cut off.

Section 3.1: with S Sᵀ = X Xᵀ of what the matrix reads, the truncated W S loses exactly the
singular values that are cut off; ``W' = U_R Σ_R V_Rᵀ S⁻¹``.
"""

from __future__ import annotations

import numpy as np

from benchmarks.quality.layer import Array, Compressed, Layer, OutOfReach

__all__ = ["compress", "truncate"]


def compress(layer: Layer, size: float) -> Compressed:
    """Every matrix at one rank, R (F + D) numbers each."""
    E, F, D = layer.weights["gate_proj"].shape
    rank = min(int(size * F * D / (F + D)), F, D)
    if rank < 1:
        raise OutOfReach(f"rank 1 stores more than {size:g}")
    weights = {
        kind: np.stack([truncate(W[e], layer.moment(kind, e), rank) for e in range(E)])
        for kind, W in layer.weights.items()
    }
    return Compressed.of(weights, 3 * E * rank * (F + D), f"rank {rank}")


def truncate(W: Array, moment: Array, rank: int) -> Array:
    """The matrix of that rank nearest to W (m, n) by what it reads, second moment (n, n)."""
    root = _root(moment)
    U, s, Vt = np.linalg.svd(W.astype(np.float64) @ root, full_matrices=False)
    low = (U[:, :rank] * s[:rank]) @ Vt[:rank]
    return np.asarray(np.linalg.solve(root.T, low.T).T, dtype=W.dtype)  # low S⁻¹


def _root(moment: Array) -> Array:
    """Lower Cholesky factor, with the least ridge that makes one."""
    n = len(moment)
    level = float(np.trace(moment)) / n
    if level == 0:  # nothing was read
        return np.eye(n)
    ridge = 1e-6
    while True:
        try:
            return np.linalg.cholesky(moment + ridge * level * np.eye(n))
        except np.linalg.LinAlgError:
            ridge *= 10
