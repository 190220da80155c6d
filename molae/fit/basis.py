"""The gauge form of a basis, and what factors cost to store."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from molae import _core
from molae.errors import ShapeError
from molae.fit.arguments import Array, Form, check_choice, contiguous

__all__ = ["gauge", "stored_numbers", "ungauge"]


def gauge(B: npt.ArrayLike) -> tuple[Array, Array]:
    """Gauge form of a basis: ``[I | M]`` and a permutation that span the rows of B.

    ``A B`` and ``(A T)(T⁻¹ B)`` are one map, so B may be replaced by any basis of its row
    space. Column-pivoted QR picks R columns to become the identity, which keeps ``|M|``
    small. R² numbers need not be stored.

    Parameters
    ----------
    B : (R, D) array_like of float32 or float64
        Rows linearly independent.

    Returns
    -------
    M : (R, D - R) ndarray
    perm : (D,) ndarray of int32
        ``ungauge(M, perm)`` spans the rows of B.

    Raises
    ------
    ShapeError
        Not a matrix, or more rows than columns.
    ArgumentError
        The rows are linearly dependent, or another dtype.
    NonFiniteError
        NaN or Inf.

    Examples
    --------
    >>> import numpy as np, molae
    >>> M, perm = molae.fit.gauge(np.array([[0.0, 2.0, 1.0]]))
    >>> M, int(perm[0])
    (array([[0. , 0.5]]), 1)
    """
    result: tuple[Array, Array] = _core.gauge(contiguous(np.asarray(B)))
    return result


def ungauge(M: npt.ArrayLike, perm: npt.ArrayLike) -> Array:
    """The basis B (R, D) of a gauge form: ``B[:, perm] = [I | M]``.

    Parameters
    ----------
    M : (R, D - R) array_like
    perm : (D,) array_like of int

    Returns
    -------
    (R, D) ndarray of M's dtype

    Raises
    ------
    ShapeError
        `perm` is not a permutation of the D columns.

    Examples
    --------
    >>> import numpy as np, molae
    >>> molae.fit.ungauge(np.array([[0.5]]), [1, 0])
    array([[0.5, 1. ]])
    """
    M, perm = np.asarray(M), np.asarray(perm)
    if M.ndim != 2:
        raise ShapeError(f"M: expected shape (R, D - R), got {M.shape}")
    R, D = M.shape[0], M.shape[0] + M.shape[1]
    if perm.shape != (D,) or not np.array_equal(np.sort(perm), np.arange(D)):
        raise ShapeError(f"perm: expected a permutation of 0 to D - 1 = {D - 1}")
    B = np.zeros((R, D), dtype=M.dtype)
    B[np.arange(R), perm[:R]] = 1
    B[:, perm[R:]] = M
    return B


def stored_numbers(rank: int, k: int, F: int, D: int, form: Form = "gauge") -> int:
    """Numbers that a group of k experts stores at a rank: R(kF + D − R), plain R(kF + D).

    Left dense it stores k F D. The permutation of the gauge form, D indices, is not counted.

    Examples
    --------
    >>> import molae
    >>> molae.fit.stored_numbers(512, 8, 1024, 2048) / (8 * 1024 * 2048)
    0.296875
    """
    check_choice("form", form, ("gauge", "plain"))
    return rank * (k * F + D - (rank if form == "gauge" else 0))
