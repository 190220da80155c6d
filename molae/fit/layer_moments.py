"""Second moments of a whole layer: of what its experts read, and of what its answers feel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from molae.errors import ArgumentError, NonFiniteError
from molae.fit.moments import SecondMoments, second_moments
from molae.fit.reading import LayerInput, Routed
from molae.fit.sums import row_squares
from molae.ops import Projection, activate, latent_experts_forward

__all__ = ["Energies", "LayerMoments", "inner_products", "layer_energies", "layer_moments"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Energies:
    """Of each expert of a layer, what takes no matrix to say.

    Attributes
    ----------
    count : (E,) ndarray of int64
        Rows that reach it.
    mass : (E,) ndarray of float64
        ``Σ g²`` of their routing weights.
    x, hidden, gate, up : (E,) ndarray of float64
        ``Σ g² ‖·‖²`` of the input, of the intermediate, and of the slopes of the intermediate by
        gate and by up.
    """

    count: Array
    mass: Array
    x: Array
    hidden: Array
    gate: Array
    up: Array

    def usual_slope(self, kind: str, F: int) -> float:
        """Mean square of a slope over the experts that something reached; 1 for none."""
        sums = self.gate if kind == "gate_proj" else self.up
        some = self.mass > 0
        return float((sums[some] / self.mass[some]).mean() / F) if some.any() else 1.0


@dataclass(frozen=True, eq=False)
class LayerMoments:
    """What a fit needs to know of a text, for some experts of one layer.

    Attributes
    ----------
    experts : tuple of n int
        Which they are; all below are in this order.
    x : SecondMoments
        Of the layer's input: the metric of gate and up.
    hidden : SecondMoments
        Of the intermediate: the metric of down.
    row_metric : dict of str to (n, F, F) ndarray
        For 'gate_proj' and 'up_proj': how the layer's output feels errors of their rows, to
        first order. With it the squared errors of all three types are in one unit.
    energies : Energies
        Of all experts of the layer.
    """

    experts: tuple[int, ...]
    x: SecondMoments
    hidden: SecondMoments
    row_metric: Mapping[str, Array]
    energies: Energies

    def raise_floor(self, share: float) -> LayerMoments:
        """Spread that share of the mean expert's moments evenly over all directions of each.

        In place; then no expert and no direction counts for nothing.
        """
        for own, sums in ((self.x, self.energies.x), (self.hidden, self.energies.hidden)):
            W = own.moment.shape[1]
            level = own.moment.dtype.type(share * sums.sum() / len(sums) / W)
            own.moment[:, np.arange(W), np.arange(W)] += level
        return self


def layer_moments(
    given: LayerInput,
    gate: Projection,
    up: Projection,
    down: Projection,
    *,
    experts: Sequence[int] | None = None,
    energies: Energies | None = None,
) -> LayerMoments:
    """Second moments of a layer's input and intermediate, and what its output feels.

    Parameters
    ----------
    given : LayerInput
    gate, up, down : Projection
        The experts that read it.
    experts : sequence of int, optional
        Only of these, where there is no room for all: each has the same bits as among all.
    energies : Energies, optional
        As `layer_energies` gives them, where that was done already.

    Returns
    -------
    LayerMoments
        Of the dtype of `given`: D² + 3 F² numbers an expert.

    Raises
    ------
    ArgumentError
        An expert that there is not, or one twice.
    NonFiniteError
        NaN or Inf in what the experts read.

    Notes
    -----
    For each token and expert D² + 3 F² multiplications and additions, and the products of gate
    and up. The row metric of gate is ``(Σ g² s sᵀ / Σ g²) ∘ (W_downᵀ W_down)`` with the slope
    s of the intermediate by gate; of up likewise: to first order, and without what experts of one
    token have in common, how errors of rows come out at the end of the layer. An expert that
    nothing reached has the mean slopes of the others.

    Examples
    --------
    >>> import numpy as np, molae
    >>> from molae.fit import LayerInput, layer_moments
    >>> from molae.ops import Projection
    >>> rng = np.random.default_rng(0)
    >>> gate, up, down = (Projection.dense(rng.standard_normal((2, 3, 3))) for _ in range(3))
    >>> given = LayerInput(rng.standard_normal((9, 3)), np.arange(18).reshape(9, 2) % 2,
    ...                    np.full((9, 2), 0.5))
    >>> moments = layer_moments(given, gate, up, down)
    >>> moments.x.count.tolist(), moments.hidden.moment.shape, list(moments.row_metric)
    ([9, 9], (2, 3, 3), ['gate_proj', 'up_proj'])
    """
    E, D = gate.num_experts, given.x.shape[1]
    some = tuple(range(E)) if experts is None else tuple(int(e) for e in experts)
    if len(set(some)) != len(some) or not set(some) <= set(range(E)) or not some:
        raise ArgumentError(f"experts: expected some of 0 to {E - 1}, each once, got {some}")
    if energies is None and len(some) < E:
        energies = layer_energies(given, gate, up)
    sums = _Sums.nothing(E) if energies is None else None
    n, place = len(some), np.full(E + 1, len(some))
    place[list(some)] = np.arange(n)
    x = SecondMoments.nothing(n, D, given.x.dtype)
    parts: dict[str, SecondMoments] = {}
    for seen in _seen(given, gate, up, place < n):
        if sums is not None:
            sums.add(seen)
        second_moments(seen.rows, place[seen.index], seen.weights, n, out=x)
        for kind, values in seen.intermediate.items():
            F = values.shape[1]
            own = parts.setdefault(kind, SecondMoments.nothing(n, F, values.dtype))
            second_moments(values, place[seen.routed.expert], seen.routed.weights, n, out=own)
    if energies is None:
        assert sums is not None
        energies = sums.energies()
    hidden = parts.pop("hidden")
    metric = {kind: own.moment for kind, own in parts.items()}
    for kind, slopes in metric.items():
        slopes /= np.where(x.mass > 0, x.mass, 1)[:, None, None].astype(slopes.dtype)
        slopes[x.mass == 0] = energies.usual_slope(kind, F)
    for at, e in enumerate(some):
        W = down._by_expert[e]
        assert W is not None
        outer = inner_products(W)
        for slopes in metric.values():
            slopes[at] *= outer
    return LayerMoments(some, x, hidden, metric, energies)


def layer_energies(given: LayerInput, gate: Projection, up: Projection) -> Energies:
    """What `LayerMoments.energies` is, without any moments: memory for a few tokens only.

    Parameters
    ----------
    given : LayerInput
    gate, up : Projection
        The experts that read it.

    Raises
    ------
    NonFiniteError
        NaN or Inf in what the experts read.

    Examples
    --------
    >>> import numpy as np
    >>> from molae.fit import LayerInput, layer_energies
    >>> from molae.ops import Projection
    >>> given = LayerInput(np.ones((4, 3)), np.array([[0], [1], [0], [0]]), np.full((4, 1), 0.5))
    >>> energies = layer_energies(given, *(Projection.dense(np.ones((2, 2, 3))) for _ in "gu"))
    >>> energies.count.tolist(), energies.x.tolist()
    ([3, 1], [2.25, 0.75])
    """
    E = gate.num_experts
    sums = _Sums.nothing(E)
    for seen in _seen(given, gate, up, np.arange(E + 1) < E):
        sums.add(seen)
    return sums.energies()


def inner_products(W: Array) -> Array:
    """``Wᵀ W`` of rows W (n, m), in float32 for narrower types."""
    rows = np.ascontiguousarray(W, dtype=np.promote_types(W.dtype, np.float32))
    nowhere = np.zeros((len(rows), 1), dtype=np.int64)
    return second_moments(rows, nowhere, np.ones((len(rows), 1)), 1).moment[0]


@dataclass(frozen=True, eq=False)
class _Seen:
    """A few tokens: what they are, and one row a slot in expert order of the intermediate."""

    rows: Array
    index: Array
    weights: Array
    routed: Routed
    intermediate: dict[str, Array]


def _seen(given: LayerInput, gate: Projection, up: Projection, some: Array) -> Iterator[_Seen]:
    """All tokens, as the experts of which `some` (E + 1,) is true see them."""
    E = gate.num_experts
    for _, rows, index, weights in given.chunks():
        masked = np.where(some[index], index, E)
        layer = gate, up, _nowhere(E)
        saved = latent_experts_forward(
            rows, masked, weights, *layer, **given.how(layer), save=True
        )[1]
        routed = Routed.of(masked, weights, E)
        h, dgate, dup = activate(
            routed.cut(saved.gate), routed.cut(saved.up), **given.act, slopes=True
        )
        yield _Seen(
            rows, masked, weights, routed, {"hidden": h, "gate_proj": dgate, "up_proj": dup}
        )


@dataclass(frozen=True, eq=False)
class _Sums:
    """Energies while they are added up, always in the same order."""

    count: Array
    sums: dict[str, Array]

    @classmethod
    def nothing(cls, E: int) -> _Sums:
        names = ("mass", "x", "hidden", "gate_proj", "up_proj")
        return cls(np.zeros(E, dtype=np.int64), {name: np.zeros(E) for name in names})

    def add(self, seen: _Seen) -> None:
        E = len(self.count)
        expert = seen.routed.expert[:, 0]
        squared = np.square(seen.routed.weights[:, 0], dtype=np.float64)
        self.count[:] += np.bincount(expert, minlength=E)
        rows = {"x": row_squares(seen.rows)[seen.routed.token]}
        rows |= {kind: row_squares(values) for kind, values in seen.intermediate.items()}
        self.sums["mass"][:] += np.bincount(expert, squared, minlength=E)
        for name, lengths in rows.items():
            self.sums[name][:] += np.bincount(expert, squared * lengths, minlength=E)

    def energies(self) -> Energies:
        sums = self.sums
        if not all(np.isfinite(values).all() for values in sums.values()):
            raise NonFiniteError("NaN or Inf in what the experts read or answer")
        return Energies(
            self.count,
            sums["mass"],
            sums["x"],
            sums["hidden"],
            sums["gate_proj"],
            sums["up_proj"],
        )


def _nowhere(E: int) -> Projection:
    """A down of rank 0, which costs nothing."""
    return Projection((tuple(range(E)),), (0,), (None,), (None,))
