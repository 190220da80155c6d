"""Arguments that the functions of `molae.fit` share: what they may be, and checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from molae.errors import ArgumentError, ShapeError

__all__ = [
    "Array",
    "Form",
    "Groups",
    "Side",
    "Stack",
    "check_choice",
    "check_count",
    "contiguous",
    "experts",
    "partition",
    "ranks",
    "renumbered",
    "work_dtype",
]

Side = Literal["input", "output"]
Form = Literal["gauge", "plain"]
Array = npt.NDArray[Any]
Stack = npt.ArrayLike | Sequence[npt.ArrayLike]
Groups = Sequence[Sequence[int]]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = (np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), BFLOAT16)


def work_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type that matrices of `dtype` are computed in."""
    return np.dtype(np.float64) if dtype == np.float64 else np.dtype(np.float32)


def contiguous(a: Array) -> Array:
    """`a` itself where C can read it as it is, else a copy."""
    if not a.dtype.isnative:
        a = a.astype(a.dtype.newbyteorder("="))
    return np.require(a, requirements=["C", "A"])


def experts(W: Stack) -> list[Array]:
    """E contiguous matrices of one shape and dtype."""
    if isinstance(W, np.ndarray) and W.ndim != 3:
        raise ShapeError(f"W: expected shape (E, rows, cols), got {W.shape}")
    found = [contiguous(np.asarray(a)) for a in W]  # type: ignore[union-attr]
    if not found:
        raise ShapeError("W: expected at least one expert")
    first = found[0]
    for i, a in enumerate(found):
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
    return found


def partition(groups: Groups | None, E: int) -> tuple[tuple[int, ...], ...]:
    if groups is None:
        return (tuple(range(E)),)
    found = tuple(tuple(int(e) for e in group) for group in groups)
    if sorted(e for group in found for e in group) != list(range(E)):
        raise ArgumentError(f"groups: expected each expert of 0 to {E - 1} in exactly one group")
    if not all(found):
        raise ArgumentError("groups: expected at least one expert in each group")
    return found


def renumbered(groups: Groups) -> tuple[list[int], tuple[tuple[int, ...], ...]]:
    """Experts of some groups, in order, and the groups with numbers in that order."""
    members = [int(e) for group in groups for e in group]
    numbers = iter(range(len(members)))
    return members, tuple(tuple(next(numbers) for _ in group) for group in groups)


def ranks(
    rank: int | Sequence[int], partition: tuple[tuple[int, ...], ...], F: int, D: int
) -> tuple[int, ...]:
    given = [rank] * len(partition) if isinstance(rank, (int, np.integer)) else list(rank)
    if len(given) != len(partition):
        raise ArgumentError(f"rank: expected one a group, {len(partition)}, got {len(given)}")
    for g, (R, group) in enumerate(zip(given, partition, strict=True)):
        check_count(f"rank of group {g}", R, 0, min(len(group) * F, D), "min(k F, D)")
    return tuple(int(R) for R in given)


def check_count(name: str, value: Any, low: int, high: int, high_name: str) -> None:
    if (
        isinstance(value, (bool, np.bool_))
        or not isinstance(value, (int, np.integer))
        or not low <= value <= high
    ):
        raise ArgumentError(f"{name}: expected {low} to {high_name} = {high}, got {value!r}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ArgumentError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
