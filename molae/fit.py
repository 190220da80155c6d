"""Shared low-rank factors for groups of experts: the array API.

NumPy arrays in, NumPy arrays out. `W` is a stack of experts' matrices of one type,
``(E, rows, cols)``, or a sequence of E arrays ``(rows, cols)`` of one dtype: float32,
float64, float16 or `ml_dtypes.bfloat16`. Arithmetic is float64 for float64 and float32
for all others; factors come back in the dtype of `W`. Memory-mapped arrays are read
where they lie, without a copy.

Letters: E experts, F expert width, D model width, k experts of a group, R rank.
On the input side (``gate_proj``, ``up_proj``: F×D) the group shares the factor next to
the input, ``W_i ≈ A_i B``. On the output side (``down_proj``: D×F) it shares the factor
next to the output, ``W_i ≈ Bᵀ A_i``. ``B`` is (R, D) either way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from molae import _core
from molae.errors import ArgumentError, ShapeError
from molae.moments import SecondMoments, second_moments
from molae.threads import get_num_threads

__all__ = [
    "SecondMoments",
    "SharedFactors",
    "common_kernel_dim",
    "discarded_energy",
    "effective_rank",
    "factor_shared",
    "gauge",
    "reduce_rank",
    "second_moments",
    "spectrum",
    "stored_numbers",
    "ungauge",
]

Side = Literal["input", "output"]
Form = Literal["gauge", "plain"]
Array = npt.NDArray[Any]
Stack = npt.ArrayLike | Sequence[npt.ArrayLike]
Groups = Sequence[Sequence[int]]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = (np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), BFLOAT16)

#: Eigenvalues of a Gram matrix below this many eps of the largest are rounding.
GRAM_NOISE = 16.0


@dataclass(frozen=True, eq=False)
class SharedFactors:
    """Factors of a stack of experts, group by group, and how good they are.

    Attributes
    ----------
    side : {'input', 'output'}
    form : {'gauge', 'plain'}
    groups : tuple of tuple of int
        Experts of each group.
    ranks : tuple of int
        Rank of each group.
    shape : tuple of int
        (rows, cols) of one expert's matrix.
    shared : tuple of (R, D - R) or (R, D) ndarray
        Gauge form: M, with ``B[:, perm] = [I | M]``. Plain form: B itself.
    perm : tuple of (D,) ndarray of int32, or None
        Gauge form: the permutation. Plain form: None for each group.
    private : tuple of (k, F, R) or (k, R, F) ndarray
        Private factors of a group's experts, input or output side.
    spectrum : tuple of (min(k F, D),) ndarray of float64
        Singular values of the group's stack, descending.
    energy : (E,) ndarray of float64
        Squared Frobenius norm of each expert's matrix.
    error : (E,) ndarray of float64, or None
        Relative Frobenius error of each expert, with the factors as stored.
    group_error : (G,) ndarray of float64, or None
        The same for each group as a whole.
    discarded_energy : (G,) ndarray of float64
        Share of the group's energy beyond its rank: the squared relative error of the
        best factorization (Eckart–Young).
    effective_rank, kernel_dim : (G,) ndarray
        See `effective_rank` and `common_kernel_dim`.
    used_svd : (G,) ndarray of bool
        Where the Gram matrix was too coarse.
    """

    side: Side
    form: Form
    groups: tuple[tuple[int, ...], ...]
    ranks: tuple[int, ...]
    shape: tuple[int, int]
    shared: tuple[Array, ...]
    perm: tuple[Array | None, ...]
    private: tuple[Array, ...]
    spectrum: tuple[Array, ...]
    energy: Array
    error: Array | None
    group_error: Array | None
    discarded_energy: Array
    effective_rank: Array
    kernel_dim: Array
    used_svd: Array

    @property
    def stored_numbers(self) -> int:
        """Numbers in all factors; permutations, which are indices, are not counted."""
        return sum(a.size for a in (*self.shared, *self.private))

    def basis(self, group: int) -> Array:
        """The shared factor B (R, D) of a group, written out."""
        perm = self.perm[group]
        return self.shared[group] if perm is None else ungauge(self.shared[group], perm)

    def reconstruct(self, expert: int) -> Array:
        """The product of an expert's factors, (rows, cols), in working precision."""
        for g, group in enumerate(self.groups):
            if expert in group:
                work = _work_dtype(self.private[g].dtype)
                A = self.private[g][group.index(expert)].astype(work)
                B = self.basis(g).astype(work)
                return A @ B if self.side == "input" else B.T @ A
        raise ArgumentError(f"expert: expected 0 to {len(self.energy) - 1}, got {expert!r}")


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
    experts = _experts(W)
    partition = _partition(groups, len(experts))
    _check_choice("side", side, ("input", "output"))
    _check_choice("form", form, ("gauge", "plain"))
    rows, cols = experts[0].shape
    F, D = (rows, cols) if side == "input" else (cols, rows)
    ranks = _ranks(rank, partition, F, D)
    shared: list[Array] = []
    perm: list[Array | None] = []
    private: list[Array] = []
    singular: list[Array] = []
    used_svd: list[bool] = []
    energy = np.zeros(len(experts))
    residual = np.zeros(len(experts))
    for batch in _batches(partition):
        result = _factor_batch(experts, partition, ranks, batch, side, form == "gauge", errors)
        shared += result[0]
        perm += result[1]
        private += result[2]
        members = [e for g in batch for e in partition[g]]
        energy[members] = result[4]
        if errors:
            residual[members] = result[5]
        for i, g in enumerate(batch):
            singular.append(result[3][i, : min(len(partition[g]) * F, D)].copy())
            used_svd.append(bool(result[6][i]))
    eps = np.finfo(_work_dtype(experts[0].dtype)).eps
    return SharedFactors(
        side=side,
        form=form,
        groups=partition,
        ranks=ranks,
        shape=(rows, cols),
        shared=tuple(shared),
        perm=tuple(perm),
        private=tuple(private),
        spectrum=tuple(singular),
        energy=energy,
        error=_relative(residual, energy) if errors else None,
        group_error=_relative(*(_sums(a, partition) for a in (residual, energy)))
        if errors
        else None,
        discarded_energy=np.array(
            [discarded_energy(s, r) for s, r in zip(singular, ranks, strict=True)]
        ),
        effective_rank=np.array([effective_rank(s) for s in singular]),
        kernel_dim=np.array(
            [
                common_kernel_dim(s, D, tol=_resolution(len(group) * F, D, eps, by_svd))
                for s, group, by_svd in zip(singular, partition, used_svd, strict=True)
            ]
        ),
        used_svd=np.array(used_svd, dtype=bool),
    )


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
    experts = _experts(W)
    partition = _partition(groups, len(experts))
    _check_choice("side", side, ("input", "output"))
    rows, cols = experts[0].shape
    F, D = (rows, cols) if side == "input" else (cols, rows)
    values: list[Array] = []
    for batch in _batches(partition):
        found = _factor_batch(experts, partition, None, batch, side, False, False)[3]
        values += [found[i, : min(len(partition[g]) * F, D)].copy() for i, g in enumerate(batch)]
    return tuple(values)


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
    experts = _experts(W)
    _check_count("rank", rank, 0, min(experts[0].shape), "min(rows, cols)")
    approximations: Array = _core.reduce_rank(experts, int(rank), get_num_threads())[0]
    return approximations


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
    result: tuple[Array, Array] = _core.gauge(_contiguous(np.asarray(B)))
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
    _check_choice("form", form, ("gauge", "plain"))
    return rank * (k * F + D - (rank if form == "gauge" else 0))


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


# ------------------------------------------------------------------ arguments


def _contiguous(a: Array) -> Array:
    """`a` itself where C can read it as it is, else a copy."""
    if not a.dtype.isnative:
        a = a.astype(a.dtype.newbyteorder("="))
    return np.require(a, requirements=["C", "A"])


def _experts(W: Stack) -> list[Array]:
    """E contiguous matrices of one shape and dtype."""
    if isinstance(W, np.ndarray) and W.ndim != 3:
        raise ShapeError(f"W: expected shape (E, rows, cols), got {W.shape}")
    experts = [_contiguous(np.asarray(a)) for a in W]  # type: ignore[union-attr]
    if not experts:
        raise ShapeError("W: expected at least one expert")
    first = experts[0]
    for i, a in enumerate(experts):
        if a.ndim != 2 or a.shape != first.shape or a.size == 0:
            raise ShapeError(
                f"W[{i}]: expected a matrix that is not empty, of the shape of the first, "
                f"{first.shape}, got {a.shape}"
            )
        if a.dtype not in DTYPES or a.dtype != first.dtype:
            raise ArgumentError(
                f"W[{i}]: expected float32, float64, float16 or bfloat16, the same for all "
                f"experts, got {a.dtype}"
            )
    return experts


def _partition(groups: Groups | None, E: int) -> tuple[tuple[int, ...], ...]:
    if groups is None:
        return (tuple(range(E)),)
    partition = tuple(tuple(int(e) for e in group) for group in groups)
    if sorted(e for group in partition for e in group) != list(range(E)):
        raise ArgumentError(f"groups: expected each expert of 0 to {E - 1} in exactly one group")
    if not all(partition):
        raise ArgumentError("groups: expected at least one expert in each group")
    return partition


def _ranks(
    rank: int | Sequence[int], partition: tuple[tuple[int, ...], ...], F: int, D: int
) -> tuple[int, ...]:
    given = [rank] * len(partition) if isinstance(rank, (int, np.integer)) else list(rank)
    if len(given) != len(partition):
        raise ArgumentError(f"rank: expected one a group, {len(partition)}, got {len(given)}")
    for g, (R, group) in enumerate(zip(given, partition, strict=True)):
        _check_count(f"rank of group {g}", R, 0, min(len(group) * F, D), "min(k F, D)")
    return tuple(int(R) for R in given)


def _check_count(name: str, value: Any, low: int, high: int, high_name: str) -> None:
    if (
        isinstance(value, (bool, np.bool_))
        or not isinstance(value, (int, np.integer))
        or not low <= value <= high
    ):
        raise ArgumentError(f"{name}: expected {low} to {high_name} = {high}, got {value!r}")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ArgumentError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


# -------------------------------------------------------------------- the work


def _work_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(np.float64) if dtype == np.float64 else np.dtype(np.float32)


def _batches(partition: tuple[tuple[int, ...], ...]) -> Iterator[range]:
    """Groups that are worked on at once: as many as threads, which bounds the memory.

    Ctrl-C is noticed between batches.
    """
    step = get_num_threads()
    for start in range(0, len(partition), step):
        yield range(start, min(start + step, len(partition)))


def _factor_batch(
    experts: list[Array],
    partition: tuple[tuple[int, ...], ...],
    ranks: tuple[int, ...] | None,
    batch: range,
    side: Side,
    gauge_form: bool,
    errors: bool,
) -> Any:
    members = [e for g in batch for e in partition[g]]
    pointers = np.cumsum([0, *(len(partition[g]) for g in batch)])
    return _core.factor_shared(
        [experts[e] for e in members],
        members,
        pointers,
        None if ranks is None else [ranks[g] for g in batch],
        batch.start,
        side == "output",
        gauge_form,
        errors,
        get_num_threads(),
    )


def _resolution(m: int, D: int, eps: float, by_svd: bool) -> float:
    """Share of the largest singular value below which values are rounding."""
    return float(max(m, D) * eps if by_svd else np.sqrt(GRAM_NOISE * eps))


def _sums(values: Array, partition: tuple[tuple[int, ...], ...]) -> Array:
    return np.array([values[list(group)].sum() for group in partition])


def _relative(residual: Array, energy: Array) -> Array:
    """Square root of residual / energy; 0 where there is nothing to approximate."""
    share = np.divide(residual, energy, out=np.zeros_like(energy), where=energy > 0)
    return np.sqrt(share)
