"""Equality before timing: every contestant must reach the optimum, within rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "Truth",
    "WrongAnswer",
    "approximation_slack",
    "check_approximation",
    "check_factors",
    "factors_slack",
]

Array = npt.NDArray[Any]

#: Slack for the evaluation of errors themselves, which is in float64.
FLOAT64_SLACK = 1e-12


class WrongAnswer(Exception):
    """A contestant's error is not the least possible one."""


@dataclass(frozen=True)
class Truth:
    """Eigenvalues of XᵀX in float64, descending, for a stack X (m, D)."""

    eigenvalues: Array

    @classmethod
    def of(cls, X: Array) -> Truth:
        X = X.astype(np.float64)
        gram = X.T @ X if X.shape[0] >= X.shape[1] else X @ X.T
        return cls(np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0))

    @property
    def energy(self) -> float:
        return float(self.eigenvalues.sum())

    @property
    def top_share(self) -> float:
        """The largest eigenvalue over the sum of all."""
        return float(self.eigenvalues[0]) / self.energy

    def discarded(self, rank: int) -> float:
        """Least squared relative error of any factorization of this rank (Eckart–Young)."""
        return float(self.eigenvalues[rank:].sum()) / self.energy


def check_factors(
    name: str,
    X: Array,
    A: Array,
    B: Array,
    truth: Truth,
    *,
    eps: float,
    unit: float | None = None,
) -> float:
    """Squared relative error of ``X ≈ A B``; raises unless it is the least possible one.

    Parameters
    ----------
    X, A, B : (m, D), (m, R), (R, D) ndarray
    eps : float
        Machine epsilon of the arithmetic.
    unit : float, optional
        Unit roundoff of the type the factors are stored in; default ``eps / 2``.

    Returns
    -------
    float

    Raises
    ------
    WrongAnswer

    Notes
    -----
    No factorization has less than ``truth.discarded(R)``. More is allowed for two reasons.
    Eigenvectors of a matrix that is off by ``eps λ_1`` cost up to ``2 R eps λ_1``
    (docs/theory.md, theorem 4). Factors whose entries are rounded independently cost
    ``unit² (Σ_j |a_j|² |b_j|² + |B|² λ_1)``: the first sum for A, the second for the turn of
    the row space of B. With errors that are even between -unit and unit the mean is a third
    of that.
    """
    A, B = A.astype(np.float64), B.astype(np.float64)
    error = float(np.square(X - A @ B).sum()) / truth.energy
    slack = factors_slack(A, B, truth, eps=eps, unit=unit)
    _judge(name, error, truth.discarded(A.shape[1]), above=slack)
    return error


def factors_slack(
    A: Array, B: Array, truth: Truth, *, eps: float, unit: float | None = None
) -> float:
    """How much more than the least squared relative error rounding may cost."""
    unit = eps / 2 if unit is None else unit
    rank, lam = A.shape[1], truth.top_share
    rounded_A = float((np.square(A).sum(0) * np.square(B).sum(1)).sum()) / truth.energy
    rounded_B = float(np.square(B).sum()) * lam
    return 2 * rank * eps * lam + unit**2 * (rounded_A + rounded_B)


def check_approximation(
    name: str, W: Array, approximation: Array, truth: Truth, rank: int, *, eps: float
) -> float:
    """The same for an approximation (rows, cols) that is written out.

    Its entries carry rounding errors of their own, of up to ``eps sqrt(rank)`` relative to
    the matrix. They add to the error linearly, and with either sign.
    """
    error = float(np.square(W - approximation.astype(np.float64)).sum()) / truth.energy
    own = approximation_slack(truth, rank, eps=eps)
    above = own + 2 * rank * eps * truth.top_share
    _judge(name, error, truth.discarded(rank), above=above, below=own)
    return error


def approximation_slack(truth: Truth, rank: int, *, eps: float) -> float:
    """How far the rounding of the entries may move the squared relative error."""
    own = eps * np.sqrt(rank)
    return float(2 * own * np.sqrt(truth.discarded(rank)) + own**2)


def _judge(name: str, error: float, least: float, *, above: float, below: float = 0.0) -> None:
    if not -below - FLOAT64_SLACK <= error - least <= above + FLOAT64_SLACK:
        raise WrongAnswer(
            f"{name}: squared relative error {error:.9g}, expected {least - below:.9g} to "
            f"{least + above:.9g}"
        )
