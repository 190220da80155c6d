"""Vectors that stand for a token's least important experts, fitted to what these would answer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from molae.errors import ArgumentError, NonFiniteError
from molae.fit.arguments import Array
from molae.fit.reading import Layer, LayerInput
from molae.fit.sums import row_squares, squares
from molae.ops import (
    Gradients,
    compressed_experts_backward,
    compressed_experts_forward,
    split_slots,
)
from molae.ops.call import layer_sizes

__all__ = ["CompressedFit", "compressed_experts"]

#: How firmly the vectors are held to 1: this share of their expert's mean curvature.
RIDGE = 0.01

#: The linear part is solved to this share of its first residual, or in so many steps.
RESIDUAL, LINEAR_STEPS = 1e-2, 20

#: Steps of the descent in all three vectors, and how many of them it remembers.
STEPS, MEMORY = 20, 8

#: Passes over the tokens, about: some measure, some of the steps are halved.
PASSES = LINEAR_STEPS + STEPS + 5

#: A step must gain this share of what its slope promises; else it is halved, so often at most.
GAIN, HALVINGS = 1e-4, 12


@dataclass(frozen=True, eq=False)
class CompressedFit:
    """What `compressed_experts` has found.

    Attributes
    ----------
    embeddings : (E, 2 D + F) ndarray
        Of the dtype of ``given.x``; 1 for experts that no token has compressed.
    error : (3,) ndarray of float64
        ``‖target − y‖ / ‖target‖`` with embeddings of 1, after the linear part, at the end.
    objective : ndarray of float64
        Half of ``‖target − y‖²`` and of what holds the embeddings, at the start, after the linear
        part, and after each step of the descent; it never rises.
    residual : float
        Of the linear part's equations, over that at its start.
    """

    embeddings: Array
    error: Array
    objective: Array
    residual: float


def compressed_experts(
    given: LayerInput,
    layer: Layer,
    num_compressed: int,
    *,
    teacher: Layer | None = None,
    ridge: float = RIDGE,
    linear_steps: int = LINEAR_STEPS,
    steps: int = STEPS,
) -> CompressedFit:
    """Fit the embeddings of a layer's compressed experts to what all of its experts answer.

    Parameters
    ----------
    given : LayerInput
        With ``lost`` also errors of the layers before are made up for.
    layer : (gate, up, down) of Projection
        Of which each token's first K − n experts run.
    num_compressed : int
        n, 1 to K − 1.
    teacher : (gate, up, down) of Projection, optional
        Whose answers with all K experts, and ``given.lost``, are the target; where there are
        ``given.answers`` these are theirs. Default: `layer`.
    ridge : float
        More than 0.
    linear_steps, steps : int
        At most so many for the part in which y is linear, and for the descent in all.

    Returns
    -------
    CompressedFit

    Raises
    ------
    ShapeError, ArgumentError
        An argument is not as described.
    NonFiniteError
        NaN or Inf in what the experts read or answer.

    Notes
    -----
    Minimizes ``½ Σ_t ‖target − y‖² + ½ Σ_i r_i ‖(e1, e2, e3)_i − 1‖²`` with
    ``r_i = ridge Σ share_i² ‖y‖² / (2 D + F)`` over the tokens that compress i. y is linear in
    e2, up to a constant where there are biases: first a problem of least squares, by conjugate
    gradients; then all three by a quasi-Newton descent (L-BFGS) from there. Each step is one pass
    over the tokens, forward and backward; a step that gains nothing is not taken.

    References
    ----------
    Compressed experts: arXiv 2503.00634, where they are trained.

    Examples
    --------
    >>> import numpy as np
    >>> from molae.fit import LayerInput, compressed_experts
    >>> from molae.ops import Projection
    >>> rng = np.random.default_rng(0)
    >>> gate, up, down = (Projection.dense(rng.standard_normal((4, 6, 6))) for _ in range(3))
    >>> index = np.argsort(rng.random((300, 4)), axis=1)[:, :3]
    >>> given = LayerInput(rng.standard_normal((300, 6)), index, rng.random((300, 3)))
    >>> found = compressed_experts(given, (gate, up, down), 2)
    >>> found.embeddings.shape, bool(found.error[2] < found.error[1] < found.error[0])
    ((4, 18), True)
    """
    if not ridge > 0 or linear_steps < 0 or steps < 0:
        raise ArgumentError(
            f"expected ridge > 0 and steps >= 0, got {ridge}, {linear_steps} and {steps}"
        )
    given.check()
    K = given.index.shape[1]
    if not 1 <= num_compressed < K:
        raise ArgumentError(f"num_compressed: expected 1 to K - 1 = {K - 1}, got {num_compressed}")
    if given.answers is None:  # once for all steps
        own = replace(given, lost=None).aims(teacher or layer)
        given = replace(given, answers=np.concatenate([aim for _, _, aim in own]))
    return _Problem(given, layer, num_compressed, ridge).solve(linear_steps, steps)


@dataclass(frozen=True, eq=False)
class _Point:
    """Embeddings, and there: squared error, objective, gradient."""

    v: Array
    squared: float
    objective: float
    gradient: Array


class _Problem:
    def __init__(self, given: LayerInput, layer: Layer, n: int, ridge: float) -> None:
        self._given, self._layer, self._n = given, layer, n
        (E, F), D = layer_sizes(*layer), given.x.shape[1]
        #: Activation and biases.
        self._how = given.how(layer)
        #: e2 among the numbers of an expert.
        self._middle = slice(D, D + F)
        self._one = np.ones((E, 2 * D + F), given.x.dtype)
        own, self._target = self._measured()
        #: What holds each expert's numbers, and about what the objective's curvature is.
        self._hold, self._curvature = ridge * own, (1 + ridge) * own

    def solve(self, linear_steps: int, steps: int) -> CompressedFit:
        start = self._at(self._one)
        linear, residual = self._linear(start, linear_steps)
        end, objectives = self._descent(linear, steps)
        errors = [np.sqrt(p.squared / self._target) if self._target > 0 else 0.0
                  for p in (start, linear, end)]  # fmt: skip
        return CompressedFit(
            end.v, np.array(errors), np.array([start.objective, *objectives]), residual
        )

    # ------------------------------------------------------------------- the two parts

    def _linear(self, start: _Point, steps: int) -> tuple[_Point, float]:
        """Conjugate gradients in e2: the gradient there is linear, so that its change along a
        direction is the product with the matrix."""
        scale = 1 / self._curvature
        v = start.v.astype(np.float64)
        r = -start.gradient[:, self._middle]
        first = float(np.sqrt((r * r * scale).sum()))
        if not first > 0:
            return start, 0.0
        direction = scale * r
        rz, residual = float((r * direction).sum()), 1.0
        for _ in range(steps):
            ahead = start.v.astype(np.float64)
            ahead[:, self._middle] += direction
            product = self._at(ahead).gradient - start.gradient
            product = product[:, self._middle]
            bend = float((direction * product).sum())
            if not bend > 0:
                break
            alpha = rz / bend
            v[:, self._middle] += alpha * direction
            r = r - alpha * product
            before, rz = rz, float((r * r * scale).sum())
            residual = float(np.sqrt(rz)) / first
            if residual <= RESIDUAL:
                break
            direction = scale * r + rz / before * direction
        found = self._at(v)
        return (found, residual) if found.objective < start.objective else (start, 1.0)

    def _descent(self, point: _Point, steps: int) -> tuple[_Point, list[float]]:
        """L-BFGS in all three vectors."""
        objectives = [point.objective]
        pairs: list[tuple[Array, Array]] = []
        scale = 1 / self._curvature
        for _ in range(steps):
            direction = -_inverse(pairs, point.gradient, scale)
            slope = float((direction * point.gradient).sum())
            if not slope < 0:
                break
            step = 1.0
            for _ in range(HALVINGS):
                ahead = self._at(point.v + step * direction)
                if ahead.objective <= point.objective + GAIN * step * slope:
                    break
                step /= 2
            else:
                break  # nothing is gained any more
            moved = ahead.v.astype(np.float64) - point.v
            bent = ahead.gradient - point.gradient
            if (moved * bent).sum() > 0:
                pairs = [*pairs, (moved, bent)][-MEMORY:]
            point = ahead
            objectives.append(point.objective)
        return point, objectives

    # -------------------------------------------------------------------- over the tokens

    def _measured(self) -> tuple[Array, float]:
        """``Σ share² ‖y‖²`` of each expert over the numbers that it has (E, 1), that of the others
        on average where it has none; and the target's squared length."""
        E, width = self._one.shape
        energy, target = np.zeros(E + 1), 0.0
        for _, call, aim in self._given.aims(self._layer):
            _, index, weights = call
            y = compressed_experts_forward(*call, *self._layer, self._one, self._n, **self._how)
            lengths = row_squares(y)
            if not np.isfinite(lengths).all() or not np.isfinite(aim).all():
                raise NonFiniteError("NaN or Inf in what the experts read or answer")
            _, aux = split_slots(index, weights, E, self._n)
            shares = np.where(aux < E, weights, 0).astype(np.float64)
            total = shares.sum(1, keepdims=True)
            np.divide(shares, total, out=shares, where=total != 0)
            energy += np.bincount(
                aux.ravel(), (np.square(shares) * lengths[:, None]).ravel(), minlength=E + 1
            )
            target += squares(aim)
        least = energy[:E].mean() if energy[:E].any() else 1.0
        own = np.where(energy[:E] > 0, energy[:E], least)
        return (own / width)[:, None], target

    def _at(self, v: Array) -> _Point:
        v = v.astype(self._one.dtype)
        gradient = np.zeros_like(v)
        squared = 0.0
        for _, call, aim in self._given.aims(self._layer):
            own = *call, *self._layer, v, self._n
            y, saved = compressed_experts_forward(*own, **self._how, save=True)
            y -= aim
            squared += squares(y)
            compressed_experts_backward(
                y, saved, *own, **self._how, out=Gradients(embeddings=gradient)
            )
        moved = v.astype(np.float64) - 1
        held = self._hold * moved
        objective = 0.5 * (squared + float((held * moved).sum()))
        return _Point(v, squared, objective, gradient.astype(np.float64) + held)


def _inverse(pairs: list[tuple[Array, Array]], gradient: Array, scale: Array) -> Array:
    """The two loops of L-BFGS."""
    q = gradient.copy()
    kept = []
    for s, y in reversed(pairs):
        alpha = float((s * q).sum() / (s * y).sum())
        q -= alpha * y
        kept.append(alpha)
    if pairs:
        s, y = pairs[-1]
        scale = scale * float((s * y).sum() / (y * y * scale).sum())
    q *= scale
    for (s, y), alpha in zip(pairs, reversed(kept), strict=True):
        q += (alpha - float((y * q).sum() / (s * y).sum())) * s
    return q
