"""What singular values say."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["common_kernel_dim", "discarded_energy", "effective_rank"]


def discarded_energy(singular_values: npt.ArrayLike, rank: int) -> float:
    """Share of ``Σ σ²`` beyond a rank: the best squared relative error (Eckart–Young).

    Examples
    --------
    >>> import molae
    >>> molae.fit.discarded_energy([3.0, 1.0], 1)
    0.1
    """
    energy = np.square(np.asarray(singular_values, dtype=np.float64))
    total = energy.sum()
    return float(energy[rank:].sum() / total) if total > 0 else 0.0


def effective_rank(singular_values: npt.ArrayLike) -> float:
    """Exponential of the entropy of ``σ / Σσ``: how many directions really count.

    Between 1 and the number of values; 0 where all are zero.

    References
    ----------
    Roy and Vetterli, The effective rank (2007).

    Examples
    --------
    >>> import molae
    >>> molae.fit.effective_rank([1.0, 1.0, 0.0])
    2.0
    """
    values = np.asarray(singular_values, dtype=np.float64)
    values = values[values > 0]
    if values.size == 0:
        return 0.0
    p = values / values.sum()
    return float(np.exp(max(-(p * np.log(p)).sum(), 0.0)))


def common_kernel_dim(singular_values: npt.ArrayLike, D: int, *, tol: float = 1e-3) -> int:
    """Dimension of the intersection of the experts' kernels: D less the stack's rank.

    A group has an exact factorization of rank R if and only if this is at least D − R.

    Parameters
    ----------
    singular_values : array_like
        Of the group's stack, descending.
    D : int
        Width of the shared side.
    tol : float
        Values up to this share of the largest count as zero.

    Examples
    --------
    >>> import molae
    >>> molae.fit.common_kernel_dim([2.0, 1.0, 0.0], 3)
    1
    """
    values = np.asarray(singular_values, dtype=np.float64)
    if values.size == 0 or values[0] == 0:
        return D
    return D - int(np.count_nonzero(values > tol * values[0]))
