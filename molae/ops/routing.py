"""Which rows of a call go to which expert, and which tokens to which group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from molae import _core
from molae.errors import ArgumentError, ShapeError

__all__ = ["Groups", "Routing", "as_index", "as_partition", "group_numbers", "route", "split_slots"]

Array = npt.NDArray[Any]
Groups = Sequence[Sequence[int]]


@dataclass(frozen=True, eq=False)
class Routing:
    """Rows of a routed call in expert order, and tokens in group order; see `route`.

    Attributes
    ----------
    expert_ptr : (E + 1,) ndarray of int64
        Expert e has the rows ``expert_ptr[e]`` to ``expert_ptr[e + 1] - 1``.
    token, slot : (rows,) ndarray of int64
        Of each row: ``top_k_index[token, slot]`` is its expert. Ascending within an expert.
    group_ptr : (G + 1,) ndarray of int64, or None
        Group g has ``group_token[group_ptr[g]:group_ptr[g + 1]]``.
    group_token : ndarray of int64, or None
        Tokens of each group, ascending, each once however many of its experts it goes to.
    """

    expert_ptr: Array
    token: Array
    slot: Array
    group_ptr: Array | None
    group_token: Array | None


def route(top_k_index: npt.ArrayLike, num_experts: int, groups: Groups | None = None) -> Routing:
    """Sort the rows of a routed call by expert, and its tokens by group.

    Parameters
    ----------
    top_k_index : (N, K) array_like of int
        Experts of each token, 0 to E; E means no expert. One expert twice gives two rows.
    num_experts : int
        E.
    groups : sequence of sequences of int, optional
        Experts of each group, every expert in exactly one.

    Returns
    -------
    Routing

    Raises
    ------
    ArgumentError
        An index outside 0 to E, or groups that are no partition.
    ShapeError
        `top_k_index` is not a matrix.

    Notes
    -----
    A stable counting sort on one thread: N K reads and writes.

    Examples
    --------
    >>> import molae
    >>> r = molae.ops.route([[2, 0], [2, 1]], 3, groups=[[0, 1], [2]])
    >>> r.token.tolist(), r.expert_ptr.tolist()
    ([0, 1, 0, 1], [0, 1, 2, 4])
    >>> r.group_token.tolist(), r.group_ptr.tolist()
    ([0, 1, 0, 1], [0, 2, 4])
    """
    index = as_index(top_k_index)
    group_of, G = None, 0
    if groups is not None:
        partition = as_partition(groups, num_experts)
        group_of, G = group_numbers(partition, num_experts), len(partition)
    ptr, rows, group_ptr, tokens = _core.route(index, num_experts, group_of, G)
    rows = rows[: ptr[-1]]
    if group_ptr is not None:
        tokens = tokens[: group_ptr[-1]]
    return Routing(ptr, rows // index.shape[1], rows % index.shape[1], group_ptr, tokens)


def split_slots(
    top_k_index: npt.ArrayLike, top_k_weights: Array, num_experts: int, num_compressed: int
) -> tuple[Array, Array]:
    """Tell a token's main experts from its least important ones.

    Parameters
    ----------
    top_k_index : (N, K) array_like of int
        Experts of each token, 0 to E; E means no expert.
    top_k_weights : (N, K) ndarray of float32 or float64
        By which they are ordered, equal ones by number.
    num_experts : int
        E.
    num_compressed : int
        n, 0 to K − 1: how many of a token's K are not main experts.

    Returns
    -------
    main, auxiliary : (N, K) ndarray of int64
        `top_k_index` twice, with E in the places of the others: either may go to
        `experts_forward`, with the same `top_k_weights`.

    Raises
    ------
    ShapeError, ArgumentError
        Arrays that do not belong together, another dtype, an index outside 0 to E, an n of K.

    References
    ----------
    Compressed experts, arXiv 2503.00634, section 3.

    Examples
    --------
    >>> import numpy as np, molae
    >>> weights = np.array([[0.7, 0.3], [0.2, 0.8]])
    >>> main, aux = molae.ops.split_slots([[0, 1], [2, 3]], weights, 4, 1)
    >>> main.tolist(), aux.tolist()
    ([[0, 4], [4, 3]], [[4, 1], [2, 4]])
    """
    weights = np.ascontiguousarray(top_k_weights)
    return _core.split_slots(as_index(top_k_index), weights, num_experts, num_compressed)


def as_index(top_k_index: npt.ArrayLike) -> Array:
    index = np.asarray(top_k_index)
    if index.ndim != 2:
        raise ShapeError(f"top_k_index: expected shape (N, K), got {index.shape}")
    if index.dtype.kind not in "iu" and index.size:
        raise ArgumentError(f"top_k_index: expected whole numbers, got {index.dtype}")
    return np.ascontiguousarray(index, dtype=np.int64)


def as_partition(groups: Groups, E: int) -> tuple[tuple[int, ...], ...]:
    partition = tuple(tuple(int(e) for e in group) for group in groups)
    if sorted(e for group in partition for e in group) != list(range(E)) or not all(partition):
        raise ArgumentError(f"groups: expected each expert of 0 to {E - 1} in exactly one group")
    return partition


def group_numbers(partition: tuple[tuple[int, ...], ...], E: int) -> Array:
    group_of = np.empty(E, dtype=np.int64)
    for g, group in enumerate(partition):
        group_of[list(group)] = g
    return group_of
