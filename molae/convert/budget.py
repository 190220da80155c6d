"""Where a budget of stored numbers does most good: ranks from error curves."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from molae.arch import hit_probabilities
from molae.errors import ArgumentError
from molae.fit import stored_numbers

__all__ = ["Curve", "Flops", "spend"]


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

    def flops(self, E: int, K: int) -> np.ndarray:
        """Operations a token at each rank, where the router picks K of E experts evenly; as
        `molae.arch.latent_flops` counts them."""
        hit = hit_probabilities([self.k, *([1] * (E - self.k))], K)[0]
        rank = np.arange(len(self.lost), dtype=np.float64)
        return 2 * (hit * rank * (self.D - rank) + K * self.k * self.F * rank / E)

    def corners(self, prices: np.ndarray | None = None) -> list[int]:
        """Ranks on the lower convex hull of (price, lost), from rank 1 on; by default of cost."""
        if prices is None:
            prices = self._costs()
        hull: list[int] = []

        def slope(low: int, high: int) -> float:
            return float(self.lost[low] - self.lost[high]) / float(prices[high] - prices[low])

        for rank in range(1, len(self.lost)):
            while len(hull) > 1 and slope(hull[-2], hull[-1]) <= slope(hull[-1], rank):
                hull.pop()
            hull.append(rank)
        return hull

    def _costs(self) -> np.ndarray:
        return np.array([self.cost(rank) for rank in range(len(self.lost))], dtype=np.float64)


@dataclass(frozen=True)
class Flops:
    """A budget of operations a token, beside that of numbers."""

    budget: float
    E: int
    K: int


#: How much of a rank's price is operations; of these the mixture that loses least is taken.
MIXTURES = (0.0, 0.25, 0.5, 0.75, 1.0)


def spend(curves: Sequence[Curve], budget: float, *, flops: Flops | None = None) -> tuple[int, ...]:
    """The ranks that lose least for at most `budget` stored numbers in all, each at least 1.

    On the lower convex hulls of all curves, by steepest drop; what is left in the end goes, rank
    by rank, to where the next one is worth most.

    Parameters
    ----------
    curves : sequence of Curve
    budget : float
        Stored numbers.
    flops : Flops, optional
        A second budget that must hold too.

    Raises
    ------
    ArgumentError
        Not even rank 1 of all is within a budget.

    Notes
    -----
    Optimal among ranks on the hulls but for the last step, as the drops of a convex curve fall.
    With two budgets a rank's price is a mixture of both, each as a share of its budget (their
    Lagrange multipliers); a few mixtures are tried.

    Source: method of Lagrange multipliers for discrete resources, Everett (1963).
    """
    numbers = [curve._costs() for curve in curves]
    if flops is None:
        return tuple(_steepest(curves, numbers, [(numbers, budget, "size", "numbers")]))
    operations = [curve.flops(flops.E, flops.K) for curve in curves]
    limits = [
        (numbers, budget, "size", "numbers"),
        (operations, flops.budget, "flops", "operations a token"),
    ]
    found: list[tuple[float, list[int]]] = []
    for part in MIXTURES:
        prices = [
            (1 - part) * n / budget + part * o / flops.budget
            for n, o in zip(numbers, operations, strict=True)
        ]
        ranks = _steepest(curves, prices, limits)
        lost = sum(float(c.lost[rank]) for c, rank in zip(curves, ranks, strict=True))
        found.append((lost, ranks))
    return tuple(min(found)[1])


#: What each curve's ranks take of a budget, the budget, its setting, and what it counts.
Limit = tuple[list[np.ndarray], float, str, str]


def _steepest(
    curves: Sequence[Curve], prices: Sequence[np.ndarray], limits: Sequence[Limit]
) -> list[int]:
    """Ranks bought by steepest drop per price until no limit allows another."""
    ranks = [1] * len(curves)
    left = []
    for taken, budget, setting, unit in limits:
        left.append(budget - sum(float(own[1]) for own in taken))
        if left[-1] < 0:
            raise ArgumentError(
                f"{setting}: {budget:,.0f} {unit} are too few for rank 1 of each of "
                f"{len(curves)} groups"
            )
    corners = [curve.corners(own) for curve, own in zip(curves, prices, strict=True)]
    steps: list[tuple[float, int, int]] = []

    def offer(c: int, at: int) -> None:
        if at + 1 < len(corners[c]):
            low, high = corners[c][at], corners[c][at + 1]
            drop = float(curves[c].lost[low] - curves[c].lost[high])
            heapq.heappush(steps, (-drop / float(prices[c][high] - prices[c][low]), c, at))

    def buy(c: int, rank: int) -> bool:
        more = [float(taken[c][rank] - taken[c][ranks[c]]) for taken, *_ in limits]
        if any(m > rest for m, rest in zip(more, left, strict=True)):
            return False
        left[:] = [rest - m for m, rest in zip(more, left, strict=True)]
        ranks[c] = rank
        return True

    for c in range(len(curves)):
        offer(c, 0)
    while steps:
        _, c, at = heapq.heappop(steps)
        top = corners[c][at + 1]
        if buy(c, top):
            offer(c, at + 1)
            continue
        while ranks[c] + 1 < top and buy(c, ranks[c] + 1):  # as far as the budget goes
            pass
    return ranks
