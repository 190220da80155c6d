"""One mixture-of-experts layer, as every method of the comparison is given it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from molae.config import TYPES

__all__ = ["Compressed", "Layer", "OutOfReach", "silu"]

Array = npt.NDArray[Any]


class OutOfReach(Exception):
    """The method's form cannot be so small; says why."""


@dataclass(frozen=True, eq=False)
class Layer:
    """Experts, and what a calibration text sends them.

    Attributes
    ----------
    weights : dict of str to ndarray
        ``gate_proj`` and ``up_proj`` (E, F, D), ``down_proj`` (E, D, F), float32.
    x : (N, D) ndarray of float32
    index : (N, K) ndarray of int64
        Experts of each token.
    routing : (N, K) ndarray of float32
        Their routing weights g.
    fisher : dict of str to (E,) ndarray
        For each matrix the mean square of the loss's gradient over the calibration text.
    seed : int
    """

    weights: Mapping[str, Array]
    x: Array
    index: Array
    routing: Array
    fisher: Mapping[str, Array] = field(default_factory=dict)
    seed: int = 0

    @property
    def num_experts(self) -> int:
        return len(self.weights["gate_proj"])

    @property
    def numbers(self) -> int:
        """Of all experts."""
        return sum(int(W.size) for W in self.weights.values())

    @cached_property
    def counts(self) -> Array:
        """(E,) tokens of each expert."""
        return np.bincount(self.index.ravel(), minlength=self.num_experts)[: self.num_experts]

    def rows(self, e: int) -> tuple[Array, Array]:
        """What expert `e` reads: (n, D), and the routing weights (n,)."""
        token, slot = np.nonzero(self.index == e)
        return self.x[token], self.routing[token, slot]

    def hidden(self, e: int, x: Array) -> Array:
        """Intermediate of expert `e` for x (n, D): (n, F)."""
        gate, up = (x @ self.weights[kind][e].T for kind in TYPES[:2])
        return np.asarray(silu(gate) * up)

    def moment(self, kind: str, e: int, *, weighted: bool = False) -> Array:
        """Second moment of what matrix `kind` of expert `e` reads, float64.

        ``Σ x xᵀ`` of the input for gate and up, ``Σ h hᵀ`` of the intermediate for down;
        `weighted` has each token count with the square of its routing weight.
        """
        return self._moments[kind == "down_proj", weighted][e]

    @cached_property
    def _moments(self) -> dict[tuple[bool, bool], list[Array]]:
        found: dict[tuple[bool, bool], list[Array]] = {}
        for e in range(self.num_experts):
            x, g = self.rows(e)
            for is_hidden, rows in ((False, x), (True, self.hidden(e, x))):
                own = rows.astype(np.float64)
                found.setdefault((is_hidden, False), []).append(own.T @ own)
                own *= g[:, None]
                found.setdefault((is_hidden, True), []).append(own.T @ own)
        return found


@dataclass(frozen=True, eq=False)
class Compressed:
    """A layer's experts after a method, multiplied out.

    Attributes
    ----------
    weights : dict of str to ndarray
        As in `Layer`.
    stored : int
        Numbers that the method's form stores.
    kept : (E,) ndarray of bool
        Experts that the router may still choose.
    note : str
        The form's size, such as a rank.
    """

    weights: Mapping[str, Array]
    stored: int
    kept: Array
    note: str = ""

    @classmethod
    def of(
        cls, weights: Mapping[str, Array], stored: int, note: str = "", kept: Array | None = None
    ) -> Compressed:
        E = len(weights["gate_proj"])
        return cls(weights, stored, np.ones(E, bool) if kept is None else kept, note)


def silu(x: Array) -> Array:
    """x / (1 + e^-x)."""
    return np.asarray(x / (1 + np.exp(-np.clip(x, -80, None))))
