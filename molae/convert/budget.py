"""Where a budget of stored numbers does most good: ranks from error curves."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from molae.errors import ArgumentError
from molae.fit import stored_numbers

__all__ = ["Curve", "spend"]


@dataclass(frozen=True, eq=False)
class Curve:
    """What a group of experts loses at each rank, and what the rank costs.

    Attributes
    ----------
    lost : (p + 1,) ndarray
        Squared error at rank 0 to p = min(k F, D), falling, in one unit for all curves.
    k, F, D : int
        Experts of the group and widths, from which the cost follows.
    """

    lost: np.ndarray
    k: int
    F: int
    D: int

    @classmethod
    def of(cls, singular_values: np.ndarray, weight: float, *, k: int, F: int, D: int) -> Curve:
        """From the singular values of the group's stack, whose squares count `weight` each."""
        squares = np.square(np.asarray(singular_values, dtype=np.float64))
        beyond = np.concatenate([np.cumsum(squares[::-1])[::-1], [0.0]])
        return cls(weight * beyond, k, F, D)

    def cost(self, rank: int) -> int:
        """Numbers stored in gauge form."""
        return stored_numbers(rank, self.k, self.F, self.D)

    def corners(self) -> list[int]:
        """Ranks on the lower convex hull of (cost, lost), from rank 1 on."""
        hull: list[int] = []
        for rank in range(1, len(self.lost)):
            while len(hull) > 1 and self._slope(hull[-2], hull[-1]) <= self._slope(hull[-1], rank):
                hull.pop()
            hull.append(rank)
        return hull

    def _slope(self, low: int, high: int) -> float:
        """Drop of the loss for each number spent between two ranks."""
        return float(self.lost[low] - self.lost[high]) / (self.cost(high) - self.cost(low))


def spend(curves: Sequence[Curve], budget: float) -> tuple[int, ...]:
    """The ranks that lose least for at most `budget` stored numbers in all, each at least 1.

    On the lower convex hulls of all curves, by steepest drop; what is left in the end goes, rank
    by rank, to where the next one is worth most.

    Raises
    ------
    ArgumentError
        Not even rank 1 of all is within the budget.

    Notes
    -----
    Optimal among ranks on the hulls but for the last step, as the drops of a convex curve fall.

    Source: method of Lagrange multipliers for discrete resources, Everett (1963).
    """
    ranks = [1] * len(curves)
    left = budget - sum(curve.cost(1) for curve in curves)
    if left < 0:
        raise ArgumentError(
            f"size: {budget:,.0f} numbers are too few for rank 1 of each of {len(curves)} groups"
        )
    corners = [curve.corners() for curve in curves]
    steps: list[tuple[float, int, int]] = []

    def offer(c: int, at: int) -> None:
        if at + 1 < len(corners[c]):
            slope = curves[c]._slope(corners[c][at], corners[c][at + 1])
            heapq.heappush(steps, (-slope, c, at))

    for c in range(len(curves)):
        offer(c, 0)
    while steps:
        _, c, at = heapq.heappop(steps)
        price = curves[c].cost(corners[c][at + 1]) - curves[c].cost(ranks[c])
        if price <= left:
            left -= price
            ranks[c] = corners[c][at + 1]
            offer(c, at + 1)
            continue
        top = corners[c][at + 1]  # as far into this step as the budget goes
        while ranks[c] + 1 < top:
            price = curves[c].cost(ranks[c] + 1) - curves[c].cost(ranks[c])
            if price > left:
                break
            left -= price
            ranks[c] += 1
    return tuple(ranks)
