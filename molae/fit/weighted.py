"""Joint factorization of experts in the metric of what they read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from molae import _core
from molae.errors import ArgumentError, ShapeError
from molae.fit.arguments import (
    Array,
    Form,
    Groups,
    Side,
    Stack,
    check_choice,
    contiguous,
    ranks,
)
from molae.fit.factors import Found, Problem, SharedFactors

__all__ = ["factor_weighted", "weighted_spectrum"]

#: Share of its group's second moments that an expert borrows, in proportion to its own trace,
#: and whatever its own.
SHRINKAGE, RIDGE = 0.05, 1e-4


def factor_weighted(
    W: Stack,
    moments: npt.ArrayLike | Sequence[npt.ArrayLike],
    rank: int | Sequence[int],
    *,
    groups: Groups | None = None,
    side: Side = "input",
    form: Form = "gauge",
    row_metric: npt.ArrayLike | Sequence[npt.ArrayLike] | None = None,
    shrinkage: float = SHRINKAGE,
    ridge: float = RIDGE,
    errors: bool = True,
) -> SharedFactors:
    """Factor each group of experts through one shared factor, as a text asks for it.

    `factor_shared` takes all directions of the input for equal; this one weighs them by the
    second moments of what each expert reads. It makes
    ``Σ_i tr(S_i (W_i − A_i B) C_i (W_i − A_i B)ᵀ)`` small, the squared error of the experts'
    outputs over the tokens; on the output side ``Σ_i tr((W_i − Bᵀ A_i) H_i (W_i − Bᵀ A_i)ᵀ)``.

    Parameters
    ----------
    W : (E, rows, cols) array_like, or sequence of E (rows, cols) array_like
        Experts' matrices of one type.
    moments : (E, D, D) or (E, F, F) array_like, or sequence of E matrices
        C_i of the layer's input (input side), H_i of the intermediate (output side), as
        `second_moments` gives them; float32 or float64.
    rank : int or sequence of G int
        Rank of the groups, 0 to min(k F, D).
    groups, side, form
        As in `factor_shared`.
    row_metric : (E, F, F) array_like or sequence of E matrices, optional
        S_i, symmetric: how much errors of the rows of W_i count and add up; input side only, of
        the dtype of `moments`. Default: the identity.
    shrinkage : float
        At least 0. An expert's moments are ``C_i + (shrinkage tr C_i / tr C + ridge) C`` with
        the group's pooled C: few rows say little about many directions.
    ridge : float
        More than 0. Before that, ``ridge tr C_i / D`` is added to the diagonal of each C_i.
    errors : bool
        Measure the error of the factors as stored, in the metric.

    Returns
    -------
    SharedFactors
        `spectrum`, `energy` and the errors are in the metric: ``energy[i]`` is
        ``tr(S_i W_i C_i W_iᵀ)`` with the shrunk C_i, and 0 without `errors`.

    Raises
    ------
    NonFiniteError
        NaN or Inf in an expert or its moments, a negative trace, or a factor that overflows
        the dtype of `W`; the expert's number is in the attribute `expert`.
    NumericalError
        The moments leave a private factor open: the ridge is too small for them.
    ShapeError, ArgumentError
        An argument is not as described.

    Notes
    -----
    Input side: with ``C = Lᵀ L`` the top-R eigenvectors U of ``L (Σ ω_i W_iᵀ S_i W_i) Lᵀ`` give
    ``B = U L⁻ᵀ``, ω_i the share of the pooled trace; the optimum where the C_i are multiples of
    each other, as for a group of one. Then ``A_i = W_i C_i Bᵀ (B C_i Bᵀ)⁻¹``, the optimum for
    that B; S_i drops out of it. Output side: the eigenvectors of ``Σ W_i H_i W_iᵀ``, the optimum.
    An expert of no rows is fitted to its group's moments, a group of none as `factor_shared` would.
    Arithmetic is float64, except where `W` is narrower and `moments` are float32: then products
    whose rounding no small direction feels are float32. For k experts of F rows a group takes
    ``k F D (2 F + D)`` flops (F only with S_i), a third of D³ for L, D³ for the product with it, an
    eigenproblem of order D with R eigenvectors and 4 R D² for B; an expert
    ``2 R D (D + F) + R² (D + 3 F)``, and ``2 F² R`` for its error. Output side, where k F < D:
    ``k F D (F + k F)``, an eigenproblem of order k F, ``2 R k F D`` for B; an expert ``2 F R D``.
    The result does not depend on the number of threads.

    References
    ----------
    SVD-LLM, arXiv 2403.07378, has one matrix and its whitening. Groups: ``docs/theory.md``.

    Examples
    --------
    >>> import numpy as np, molae
    >>> rng = np.random.default_rng(0)
    >>> W = rng.standard_normal((4, 8, 16))
    >>> x = rng.standard_normal((50, 16)) * np.logspace(0, -2, 16)
    >>> index, weights = rng.integers(0, 4, (50, 1)), np.ones((50, 1))
    >>> C = molae.fit.second_moments(x, index, weights, 4).moment
    >>> f = molae.fit.factor_weighted(W, C, 6)
    >>> def lost(f):
    ...     return sum(np.trace((W[i] - f.reconstruct(i)) @ C[i] @ (W[i] - f.reconstruct(i)).T)
    ...                for i in range(4))
    >>> bool(lost(f) < lost(molae.fit.factor_shared(W, 6)) / 10)
    True
    """
    (found,) = factor_at_ranks(
        W,
        moments,
        [rank],
        groups=groups,
        side=side,
        form=form,
        row_metric=row_metric,
        shrinkage=shrinkage,
        ridge=ridge,
        errors=errors,
    )
    return found


def factor_at_ranks(
    W: Stack,
    moments: npt.ArrayLike | Sequence[npt.ArrayLike],
    several: Sequence[int | Sequence[int]],
    *,
    groups: Groups | None = None,
    side: Side = "input",
    form: Form = "gauge",
    row_metric: npt.ArrayLike | Sequence[npt.ArrayLike] | None = None,
    shrinkage: float = SHRINKAGE,
    ridge: float = RIDGE,
    errors: bool = True,
) -> list[SharedFactors]:
    """`factor_weighted` at each of `several` ranks, which share what does not depend on them."""
    problem = Problem.of(W, groups, side)
    check_choice("form", form, ("gauge", "plain"))
    given = [ranks(rank, problem.groups, *problem.shape) for rank in several]
    # Each group n times in a row, of its own copies of the experts: pointers, not matrices.
    n, at = len(given), 0
    members: list[int] = []
    repeated: list[tuple[int, ...]] = []
    for group in problem.groups:
        for _ in range(n):
            repeated.append(tuple(range(at, at + len(group))))
            members += group
            at += len(group)
    whole = Problem(
        [problem.experts[e] for e in members], tuple(repeated), side, times=n, names=members
    )
    metric, rows = _metrics(problem, moments, row_metric)
    found = _solve(
        whole,
        [metric[e] for e in members],
        None if rows is None else [rows[e] for e in members],
        [rank for each in zip(*given, strict=True) for rank in each],
        form,
        errors,
        (shrinkage, ridge),
    )
    return [
        problem.factors(
            _nth(found, problem, repeated, i, n), own, form, _gram_dtype(problem, metric)
        )
        for i, own in enumerate(given)
    ]


def _nth(
    found: Found, problem: Problem, repeated: Sequence[Sequence[int]], i: int, n: int
) -> Found:
    """What was found at the i-th of n ranks, by the experts' own numbers."""
    energy = np.zeros(len(problem.experts))
    residual = None if found.residual is None else np.zeros(len(problem.experts))
    for group, copies in zip(problem.groups, repeated[i::n], strict=True):
        energy[list(group)] = found.energy[list(copies)]
        if residual is not None and found.residual is not None:
            residual[list(group)] = found.residual[list(copies)]
    return Found(
        shared=found.shared[i::n],
        perm=found.perm[i::n],
        private=found.private[i::n],
        spectrum=found.spectrum[i::n],
        used_svd=found.used_svd[i::n],
        energy=energy,
        residual=residual,
    )


def weighted_spectrum(
    W: Stack,
    moments: npt.ArrayLike | Sequence[npt.ArrayLike],
    *,
    groups: Groups | None = None,
    side: Side = "input",
    row_metric: npt.ArrayLike | Sequence[npt.ArrayLike] | None = None,
    shrinkage: float = SHRINKAGE,
    ridge: float = RIDGE,
) -> tuple[Array, ...]:
    """Singular values of each group's stack in the metric of the moments, without factors.

    Their squares beyond a rank R sum to what `factor_weighted` loses at that rank: on the output
    side exactly, on the input side of the pooled problem.

    Parameters
    ----------
    W, moments, groups, side, row_metric, shrinkage, ridge
        As in `factor_weighted`.

    Returns
    -------
    tuple of (min(k F, D),) ndarray of float64
        Descending, one a group.

    Raises
    ------
    NonFiniteError, ShapeError, ArgumentError
        As in `factor_weighted`.

    Examples
    --------
    >>> import numpy as np, molae
    >>> W = np.stack([np.diag([3.0, 0.0]), np.diag([4.0, 2.0])])
    >>> C = np.stack([np.eye(2), np.eye(2)])
    >>> molae.fit.weighted_spectrum(W, C, ridge=1e-9, shrinkage=0.0)[0].round(6)
    array([5., 2.])
    """
    problem = Problem.of(W, groups, side)
    metric, rows = _metrics(problem, moments, row_metric)
    found = _solve(problem, metric, rows, None, "plain", False, (shrinkage, ridge))
    return tuple(found.spectrum)


def _gram_dtype(problem: Problem, moments: list[Array]) -> np.dtype[Any]:
    """The precision of a group's Gram matrix, which is that of its small eigenvalues."""
    narrow = problem.experts[0].dtype != np.float64 and moments[0].dtype == np.float32
    return np.dtype(np.float32 if narrow else np.float64)


def _metrics(
    problem: Problem,
    moments: npt.ArrayLike | Sequence[npt.ArrayLike],
    row_metric: npt.ArrayLike | Sequence[npt.ArrayLike] | None,
) -> tuple[list[Array], list[Array] | None]:
    """One matrix an expert."""
    E = len(problem.experts)
    metric = [contiguous(np.asarray(m)) for m in moments]  # type: ignore[union-attr]
    if len(metric) != E:
        raise ShapeError(f"moments: expected {E} matrices, one an expert, got {len(metric)}")
    if row_metric is None:
        return metric, None
    if problem.side == "output":
        raise ArgumentError("row_metric: for the input side only")
    rows = [contiguous(np.asarray(m)) for m in row_metric]  # type: ignore[union-attr]
    if len(rows) != E:
        raise ShapeError(f"row_metric: expected {E} matrices, one an expert, got {len(rows)}")
    return metric, rows


def _solve(
    problem: Problem,
    metric: list[Array],
    rows: list[Array] | None,
    given: Sequence[int] | None,
    form: Form,
    errors: bool,
    firmness: tuple[float, float],
) -> Found:
    return problem.solve(
        _core.factor_weighted,
        given,
        form,
        errors,
        lambda members: (
            [metric[e] for e in members],
            None if rows is None else [rows[e] for e in members],
            *map(float, firmness),
        ),
    )
