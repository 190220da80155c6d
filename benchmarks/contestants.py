"""The same factorization by other means, written as well as NumPy and PyTorch allow.

Each takes one stack (m, D) in float32 that is ready in memory, and gives A (m, R), B (R, D).
`transposed` hands the library Xᵀ instead of X, which can be several times faster or slower.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["SVDS", "gram_numpy", "limit_threads", "svd_numpy", "svd_torch"]

Array = npt.NDArray[Any]
Factors = tuple[Array, Array]


def svd_numpy(X: Array, rank: int, transposed: bool) -> Factors:
    U, s, V = np.linalg.svd(X.T if transposed else X, full_matrices=False)
    return _top(U, s, V, rank, transposed)


def svd_torch(X: Array, rank: int, transposed: bool) -> Factors:
    import torch

    tensor = torch.from_numpy(X)
    U, s, V = torch.linalg.svd(tensor.T if transposed else tensor, full_matrices=False)
    return _top(U.numpy(), s.numpy(), V.numpy(), rank, transposed)


def gram_numpy(X: Array, rank: int) -> Factors:
    """What molae does, composed in NumPy: Gram matrix, eigenvectors, product. Plain form."""
    B = np.linalg.eigh(X.T @ X)[1][:, : -rank - 1 : -1].T
    return X @ B.T, B


def _top(U: Array, s: Array, V: Array, rank: int, transposed: bool) -> Factors:
    if transposed:
        return V[:rank].T * s[:rank], U[:, :rank].T
    return U[:, :rank] * s[:rank], V[:rank]


SVDS = {"NumPy": svd_numpy}
if importlib.util.find_spec("torch"):
    SVDS["PyTorch"] = svd_torch


def limit_threads(n: int) -> None:
    """As many threads for NumPy's BLAS and PyTorch as for molae, where that can be set."""
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(n)
    if importlib.util.find_spec("threadpoolctl"):
        from threadpoolctl import ThreadpoolController

        controller = ThreadpoolController()
        for pool in controller.lib_controllers:
            if pool.filepath and "molae" not in pool.filepath:
                pool.set_num_threads(n)
