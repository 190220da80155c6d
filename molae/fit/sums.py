"""Sums over many numbers, in double and in an order that depends on their shape alone.

A BLAS adds in an order that depends on its threads, and NumPy's own loops make copies.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from molae import _core
from molae.threads import get_num_threads

__all__ = ["dot", "row_squares", "squares"]

Array = npt.NDArray[Any]


def dot(a: Array, b: Array) -> float:
    """``Σ a b`` of two arrays of one shape."""
    if a.dtype == b.dtype == np.float32 and a.flags.c_contiguous and b.flags.c_contiguous:
        return _core.dot(a, b)
    return float(np.multiply(a, b, dtype=np.float64).sum())


def squares(a: Array) -> float:
    """``Σ a²``."""
    return dot(a, a)


def row_squares(rows: Array) -> Array:
    """(R,) ``Σ a²`` of each row of a matrix (R, W)."""
    if rows.dtype == np.float32 and rows.flags.c_contiguous:
        return _core.row_lengths(rows, get_num_threads())
    return np.square(rows, dtype=np.float64).sum(axis=1)
