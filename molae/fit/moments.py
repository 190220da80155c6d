"""Second moments of what the experts of a layer read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from molae import _core
from molae.errors import ArgumentError, ShapeError
from molae.threads import get_num_threads

__all__ = ["SecondMoments", "second_moments"]

Array = npt.NDArray[Any]

#: Type of the rows: type of the arithmetic and of the sums.
WORK: dict[np.dtype[Any], np.dtype[Any]] = {
    np.dtype(np.float32): np.dtype(np.float32),
    np.dtype(ml_dtypes.bfloat16): np.dtype(np.float32),
    np.dtype(np.float64): np.dtype(np.float64),
}


@dataclass(frozen=True, eq=False)
class SecondMoments:
    """What `second_moments` has added up for each expert.

    Attributes
    ----------
    moment : (E, W, W) ndarray of float32 or float64
        ``C_i = Σ g² x xᵀ``, symmetric.
    mass : (E,) ndarray of float64
        ``Σ g²``, the routing mass.
    count : (E,) ndarray of int64
        Rows.
    """

    moment: Array
    mass: Array
    count: Array

    @classmethod
    def nothing(cls, E: int, W: int, dtype: npt.DTypeLike) -> SecondMoments:
        """Of no row yet."""
        moment = np.zeros((E, W, W), dtype=dtype)
        return cls(moment, np.zeros(E), np.zeros(E, dtype=np.int64))


def second_moments(
    x: npt.ArrayLike,
    top_k_index: npt.ArrayLike,
    top_k_weights: npt.ArrayLike,
    num_experts: int,
    *,
    out: SecondMoments | None = None,
) -> SecondMoments:
    """Second moments of each expert's rows, weighted by the square of the routing weights.

    With C_i of the layer's input, the squared error of an expert's output over the tokens is
    ``tr((W_i - Ŵ_i) C_i (W_i - Ŵ_i)ᵀ)``; with those of the intermediate, that of
    ``down_proj``. They are all that a fit needs to know of a text.

    Parameters
    ----------
    x : (N, W) or (N, K, W) array_like of float32, float64 or bfloat16
        A row for each token, such as the layer's input (W = D), or one for each token and
        expert, such as the intermediate (W = F).
    top_k_index : (N, K) array_like of int
        Experts of each token, 0 to E; E means no expert.
    top_k_weights : (N, K) array_like
        Routing weights g.
    num_experts : int
        E.
    out : SecondMoments, optional
        Moments to add to, as an earlier call gave them. It is returned.

    Returns
    -------
    SecondMoments
        float64 for float64 `x`, else float32. E W² numbers.

    Raises
    ------
    NonFiniteError
        NaN or Inf in `x` or the weights; its `info` is the row, or the slot ``t K + k``. Nothing
        was added.
    ShapeError, ArgumentError
        Arrays that do not belong together, an index outside 0 to E, another dtype, an `out`
        that overlaps the input.

    Notes
    -----
    Rows·W² multiplications and additions, by ``syrk`` on gathered rows, float32 sums in float32.
    Results do not depend on the number of threads; cutting tokens into calls in another way
    changes the last bits.

    References
    ----------
    The weighted error: SVD-LLM, arXiv 2403.07378, with one matrix an expert.

    Examples
    --------
    >>> import numpy as np, molae
    >>> x = np.array([[1.0, 2.0], [3.0, 0.0]])
    >>> m = molae.fit.second_moments(x, [[0], [1]], [[1.0], [0.5]], 2)
    >>> m.moment.tolist(), m.mass.tolist(), m.count.tolist()
    ([[[1.0, 2.0], [2.0, 4.0]], [[2.25, 0.0], [0.0, 0.0]]], [1.0, 0.25], [1, 1])
    """
    rows = np.require(np.asarray(x), requirements=["C", "A"])
    if rows.dtype not in WORK:
        raise ArgumentError(f"x: expected float32, float64 or bfloat16, got {rows.dtype}")
    if rows.ndim not in (2, 3) or rows.shape[-1] == 0:
        raise ShapeError(f"x: expected shape (N, W) or (N, K, W), got {rows.shape}")
    if not isinstance(num_experts, (int, np.integer)) or num_experts < 1:
        raise ArgumentError(f"num_experts: expected 1 or more, got {num_experts!r}")
    work, W = WORK[rows.dtype], rows.shape[-1]
    index = np.asarray(top_k_index)
    if not np.issubdtype(index.dtype, np.integer):
        raise ArgumentError(f"top_k_index: expected integers, got {index.dtype}")
    index = np.require(index.astype(np.int64, copy=False), requirements=["C", "A"])
    weights = np.require(np.asarray(top_k_weights, dtype=work), requirements=["C", "A"])
    if out is None:
        out = SecondMoments.nothing(num_experts, W, work)
    elif out.moment.shape[:1] != (num_experts,):
        raise ShapeError(f"out: of {len(out.moment)} experts, expected {num_experts}")
    for name in ("moment", "mass", "count"):
        written = getattr(out, name)
        if any(np.may_share_memory(written, read) for read in (rows, index, weights)):
            raise ArgumentError(f"out.{name}: overlaps an input")
    _core.second_moments(out.moment, out.mass, out.count, rows, index, weights, get_num_threads())
    return out
