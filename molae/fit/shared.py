"""Joint factorization of experts as they are, without data."""

from __future__ import annotations

from collections.abc import Sequence

from molae import _core
from molae.fit.arguments import (
    Array,
    Form,
    Groups,
    Side,
    Stack,
    check_choice,
    check_count,
    experts,
    ranks,
    work_dtype,
)
from molae.fit.factors import Problem, SharedFactors
from molae.threads import get_num_threads

__all__ = ["factor_shared", "reduce_rank", "spectrum"]


def factor_shared(
    W: Stack,
    rank: int | Sequence[int],
    *,
    groups: Groups | None = None,
    side: Side = "input",
    form: Form = "gauge",
    errors: bool = True,
) -> SharedFactors:
    """Factor each group of experts through one shared factor of rank R.

    Minimizes ``Σ_i ‖W_i − A_i B‖²`` (input side; output side ``‖W_i − Bᵀ A_i‖²``) over the
    shared B (R, D) and the private A_i. The optimum is the truncated SVD of the stacked
    group; it is found from the eigenvectors of ``Σ_i W_iᵀ W_i``. B is brought to `form` and
    rounded to the dtype of `W`; then each A_i is the least-squares answer to the rounded B.

    Parameters
    ----------
    W : (E, rows, cols) array_like, or sequence of E (rows, cols) array_like
        Experts' matrices of one type.
    rank : int or sequence of G int
        Rank of the groups, 0 to min(k F, D).
    groups : sequence of sequences of int, optional
        Experts of each group, every expert in exactly one. Default: one group of all.
    side : {'input', 'output'}
        Side of the matrices on which the group shares.
    form : {'gauge', 'plain'}
        'gauge' stores R² numbers fewer a group, for the same product.
    errors : bool
        Measure the error of the factors as stored. Costs a matrix product an expert.

    Returns
    -------
    SharedFactors

    Raises
    ------
    NonFiniteError
        NaN or Inf in an expert, whose number is in the attribute `expert`; or a factor
        that overflows float16.
    ShapeError, ArgumentError
        An argument is not as described.

    Warns
    -----
    PrecisionWarning
        The energy beyond the rank is so small that the Gram matrix, in working precision,
        could not find the best subspace. A direct SVD was used, which is slower.

    Notes
    -----
    For a group: k F D² flops for the Gram matrix, about 9 D³ for its eigenvectors, 2 k F D R
    for the private factors and as much again for `errors`. Threads over groups and experts;
    the result does not depend on their number. Errors are relative Frobenius norms.

    References
    ----------
    MoLAE, arXiv 2503.23100 (joint factorization). Gauge form and precision rule:
    ``docs/theory.md``.

    Examples
    --------
    >>> import numpy as np, molae
    >>> rng = np.random.default_rng(0)
    >>> B = rng.standard_normal((3, 16))
    >>> W = rng.standard_normal((4, 8, 3)) @ B      # four experts, one common row space
    >>> f = molae.fit.factor_shared(W, 2)
    >>> f.shared[0].shape, f.private[0].shape
    ((2, 14), (4, 8, 2))
    >>> bool(abs(f.group_error[0] ** 2 - f.discarded_energy[0]) < 1e-12)
    True
    """
    problem = Problem.of(W, groups, side)
    check_choice("form", form, ("gauge", "plain"))
    given = ranks(rank, problem.groups, *problem.shape)
    found = problem.solve(_core.factor_shared, given, form, errors)
    return problem.factors(found, given, form, work_dtype(problem.experts[0].dtype))


def spectrum(W: Stack, *, groups: Groups | None = None, side: Side = "input") -> tuple[Array, ...]:
    """Singular values of each group's stack, without factors.

    From the eigenvalues of the Gram matrix, so that values below about ``4 sqrt(eps)`` of
    the largest are rounding (1e-3 in float32, 6e-8 in float64).

    Parameters
    ----------
    W, groups, side
        As in `factor_shared`.

    Returns
    -------
    tuple of (min(k F, D),) ndarray of float64
        Descending, one a group.

    Raises
    ------
    NonFiniteError, ShapeError, ArgumentError
        As in `factor_shared`.

    Examples
    --------
    >>> import numpy as np, molae
    >>> W = np.stack([np.diag([3.0, 0.0]), np.diag([4.0, 2.0])])
    >>> molae.fit.spectrum(W)[0]
    array([5., 2.])
    """
    found = Problem.of(W, groups, side).solve(_core.factor_shared, None, "plain", False)
    return tuple(found.spectrum)


def reduce_rank(W: Stack, rank: int) -> Array:
    """Best approximation of rank R of each expert on its own.

    Parameters
    ----------
    W : (E, rows, cols) array_like, or sequence of E (rows, cols) array_like
    rank : int
        0 to min(rows, cols).

    Returns
    -------
    (E, rows, cols) ndarray
        float64 for float64 input, else float32.

    Raises
    ------
    NonFiniteError, ShapeError, ArgumentError
        As in `factor_shared`.

    Warns
    -----
    PrecisionWarning
        As in `factor_shared`.

    References
    ----------
    Eckart and Young (1936); step 1 of MoLAE, arXiv 2503.23100.

    Examples
    --------
    >>> import numpy as np, molae
    >>> molae.fit.reduce_rank(np.diag([3.0, 2.0])[None], 1)[0]
    array([[3., 0.],
           [0., 0.]])
    """
    matrices = experts(W)
    check_count("rank", rank, 0, min(matrices[0].shape), "min(rows, cols)")
    approximations: Array = _core.reduce_rank(matrices, int(rank), get_num_threads())[0]
    return approximations
