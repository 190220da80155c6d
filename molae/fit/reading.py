"""What the experts of a layer read in a text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from molae.fit.moments import LayerMoments, SecondMoments, second_moments
from molae.ops import Activation, Projection, activate, latent_experts_forward, route

__all__ = ["LayerInput", "Routed", "answer_error", "layer_moments"]

Array = npt.NDArray[Any]

#: Tokens that are worked on at once.
CHUNK = 2048


@dataclass(frozen=True, eq=False)
class LayerInput:
    """A layer's input over all tokens of a text, and where the router sends it.

    Attributes
    ----------
    x : (N, D) ndarray of float32 or float64
        May be mapped.
    index : (N, K) ndarray of int64
        Experts of each token; E for none.
    weights : (N, K) ndarray
        Routing weights, of the dtype of `x`.
    activation : str
        As in `molae.ops.experts_forward`.
    lost : (N, D) ndarray, optional
        What the layer's answer should have besides, to make up for what the layers before it
        have lost.
    """

    x: Array
    index: Array
    weights: Array
    activation: Activation = "silu"
    lost: Array | None = None

    def first(self, tokens: int) -> LayerInput:
        """The first tokens alone."""
        lost = None if self.lost is None else self.lost[:tokens]
        return LayerInput(
            self.x[:tokens], self.index[:tokens], self.weights[:tokens], self.activation, lost
        )

    def chunks(self) -> Iterator[tuple[slice, Array, Array, Array]]:
        """Where in N, x, index, weights: a few tokens at a time, in memory."""
        for at in range(0, len(self.x), CHUNK):
            some = slice(at, at + CHUNK)
            yield some, np.array(self.x[some]), self.index[some], self.weights[some]


def layer_moments(
    given: LayerInput, gate: Projection, up: Projection, down: Projection
) -> LayerMoments:
    """Second moments of a layer's input and intermediate, and what its output feels.

    Parameters
    ----------
    given : LayerInput
    gate, up, down : Projection
        The experts that read it.

    Returns
    -------
    LayerMoments
        Of the dtype of `given`: E (D² + 3 F²) numbers.

    Raises
    ------
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
    x = SecondMoments.nothing(E, D, given.x.dtype)
    hidden: SecondMoments | None = None
    felt: dict[str, SecondMoments] = {}
    for _, rows, index, weights in given.chunks():
        second_moments(rows, index, weights, E, out=x)
        routed = Routed.of(index, weights, E)
        saved = latent_experts_forward(
            rows, index, weights, gate, up, _nowhere(E), activation=given.activation, save=True
        )[1]
        h, dgate, dup = activate(
            routed.cut(saved.gate), routed.cut(saved.up), activation=given.activation, slopes=True
        )
        if hidden is None:
            F = h.shape[1]
            hidden = SecondMoments.nothing(E, F, h.dtype)
            felt = {kind: SecondMoments.nothing(E, F, h.dtype) for kind in ("gate_proj", "up_proj")}
        routed.add(h, hidden)
        routed.add(dgate, felt["gate_proj"])
        routed.add(dup, felt["up_proj"])
    assert hidden is not None
    metric = {kind: own.moment for kind, own in felt.items()}
    for slopes in metric.values():
        slopes /= np.where(x.mass > 0, x.mass, 1)[:, None, None].astype(slopes.dtype)
        reached = slopes[x.mass > 0]
        usual = reached.trace(axis1=1, axis2=2).mean() / F if len(reached) else 1.0
        slopes[x.mass == 0] = slopes.dtype.type(usual)
    for e, W in enumerate(down._by_expert):
        assert W is not None
        outer = second_moments(
            W.astype(np.promote_types(W.dtype, np.float32)),
            np.zeros((len(W), 1), dtype=np.int64),
            np.ones((len(W), 1)),
            1,
        ).moment[0]
        for slopes in metric.values():
            slopes[e] *= outer
    return LayerMoments(x, hidden, metric)


def answer_error(
    given: LayerInput,
    student: tuple[Projection, Projection, Projection],
    teacher: tuple[Projection, Projection, Projection],
) -> float:
    """How far a layer's answers are from those of other experts.

    Parameters
    ----------
    given : LayerInput
    student, teacher : (gate, up, down) of Projection

    Returns
    -------
    float
        ``‖y_student − y_teacher‖ / ‖y_teacher‖`` over all tokens, their experts' outputs summed
        by routing weight; 0 where the teacher answers nothing.

    Examples
    --------
    >>> import numpy as np
    >>> from molae.fit import LayerInput, answer_error
    >>> from molae.ops import Projection
    >>> rng = np.random.default_rng(0)
    >>> gate, up, down = (Projection.dense(rng.standard_normal((2, 3, 3))) for _ in range(3))
    >>> given = LayerInput(rng.standard_normal((9, 3)), np.arange(18).reshape(9, 2) % 2,
    ...                    np.full((9, 2), 0.5))
    >>> half = Projection.dense(np.stack(down.private).reshape(2, 3, 3) / 2)
    >>> round(answer_error(given, (gate, up, half), (gate, up, down)), 6)
    0.5
    """
    lost = total = 0.0
    for _, rows, index, weights in given.chunks():
        one, other = (
            latent_experts_forward(rows, index, weights, *layer, activation=given.activation)
            for layer in (student, teacher)
        )
        lost += float(np.square(one - other, dtype=np.float64).sum())
        total += float(np.square(other, dtype=np.float64).sum())
    return math.sqrt(lost / total) if total > 0 else 0.0


@dataclass(frozen=True, eq=False)
class Routed:
    """Rows in expert order, as `Saved` has them of one chunk."""

    num_experts: int
    expert: Array
    weights: Array

    @classmethod
    def of(cls, index: Array, weights: Array, num_experts: int) -> Routed:
        routing = route(index, num_experts)
        expert = np.repeat(np.arange(num_experts), np.diff(routing.expert_ptr))
        return cls(
            num_experts, expert[:, None], weights[routing.token, routing.slot].reshape(-1, 1)
        )

    def cut(self, rows: Array) -> Array:
        return rows[: len(self.expert)]

    def add(self, rows: Array, to: SecondMoments) -> None:
        second_moments(rows, self.expert, self.weights, self.num_experts, out=to)


def _nowhere(E: int) -> Projection:
    """A down of rank 0, which costs nothing."""
    return Projection((tuple(range(E)),), (0,), (None,), (None,))
