"""Private factors fitted to what the whole layer should answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from molae.errors import ArgumentError
from molae.fit.moments import SecondMoments, second_moments
from molae.fit.reading import CHUNK, Layer, LayerInput, Routed
from molae.fit.refit_metrics import FactorMetric, RowMetric, latent_grams
from molae.fit.sums import dot, squares
from molae.ops import (
    Gradients,
    Projection,
    ProjectionGradients,
    Saved,
    activate,
    latent_experts_backward,
    latent_experts_forward,
)
from molae.ops.call import layer_sizes

__all__ = ["Refit", "in_dtype", "refit"]

Array = npt.NDArray[Any]

#: How firmly factors are held to where they were: this share of their mean moments.
HOLD = 0.03

#: Steps of the conjugate gradients: more lower the error by less than a hundredth.
STEPS = 2


@dataclass(frozen=True, eq=False)
class Refit:
    """What `refit` has found.

    Attributes
    ----------
    projection : Projection
        With new private factors, rounded to their dtype.
    error : (steps + 1,) ndarray of float64
        Before, and after each step, ‖target − y‖ / ‖target‖, before that rounding.
    objective : (steps + 1,) ndarray of float64
        ``‖target − y‖²`` and what holds the factors; it never rises.
    """

    projection: Projection
    error: Array
    objective: Array


def refit(
    given: LayerInput,
    student: Layer,
    teacher: Layer,
    which: Literal["up", "down"],
    *,
    metric: RowMetric | None = None,
    steps: int = STEPS,
    hold: float = HOLD,
) -> Refit:
    """Fit the private factors of up or of down to the answers of other experts.

    `factor_weighted` looks at each expert alone, and at its output only to first order. Here all
    experts of the layer together are fitted to its answers, so that they make up for each
    other's errors and for those of the other two types. The layer's output is linear in the
    private factors of down, and in those of up but where there are biases or the activation is
    'swiglu_clamped': a problem of least squares.

    Parameters
    ----------
    given : LayerInput
    student : (gate, up, down) of Projection
        What is fitted, latent groups of rank 1 or more, or dense ones.
    teacher : (gate, up, down) of Projection
        Whose answers to the same input and routing, and ``given.lost``, are the target; where
        there are ``given.answers`` these are theirs.
    which : {'up', 'down'}
    metric : RowMetric, optional
        As `row_metric` gives it of `student`; for up, which is conditioned by it.
    steps : int
        Of preconditioned conjugate gradients; 0 measures only.
    hold : float
        More than 0. Changes are held back by that share of the mean moments of what they act on.

    Returns
    -------
    Refit

    Raises
    ------
    ShapeError, ArgumentError
        An argument is not as described, or the output is not linear in up.
    NonFiniteError
        NaN or Inf in what the experts read.

    Notes
    -----
    Minimizes ``Σ_t ‖target − y‖² + Σ_i h_i ‖ΔA_i‖²``: for down with ``h_i = hold tr(H_i) / F`` in
    the metric of the shared factor, H_i the student's intermediate; for up with the mean of the
    rows' weights and the moments of the latent rows. Preconditioned by the exact inverse of each
    expert's own block (down), or of its Kronecker form ``S_i ⊗ B C_i Bᵀ`` (up). Each step is one
    pass over the tokens, forward and, but for the last, backward in that one factor. With
    ``given.room`` what no step changes is kept: for down gate and up of each row, 2 F numbers; for
    up gate and what up reads, F numbers and R. Vectors are
    of the dtype of ``given.x``, seven times the private factors in all.

    References
    ----------
    Refit of down on compressed activations, expert by expert: MergeMoE, arXiv 2510.14436.

    Examples
    --------
    >>> import numpy as np, molae
    >>> from molae.fit import LayerInput, factor_shared, refit
    >>> from molae.ops import Projection
    >>> rng = np.random.default_rng(0)
    >>> W = [rng.standard_normal((4, 8, 8)) for _ in range(3)]
    >>> teacher = tuple(Projection.dense(w) for w in W)
    >>> alone = [[0], [1], [2], [3]]
    >>> down = Projection.from_factors(factor_shared(W[2], 5, groups=alone, side="output"))
    >>> given = LayerInput(rng.standard_normal((200, 8)), rng.integers(0, 4, (200, 2)),
    ...                    rng.random((200, 2)))
    >>> found = refit(given, (*teacher[:2], down), teacher, "down")
    >>> bool(found.error[-1] < found.error[0])
    True
    """
    if which not in ("up", "down"):
        raise ArgumentError(f"which: expected up or down, got {which!r}")
    if which == "up" and metric is None:
        raise ArgumentError("metric: needed to fit up")
    if which == "up" and not given.linear_in_up:
        raise ArgumentError(
            "which: the answers of these experts are not linear in up, for their activation or "
            "their biases; fit down"
        )
    if steps < 0 or not hold > 0:
        raise ArgumentError(f"expected steps >= 0 and hold > 0, got {steps} and {hold}")
    given.check()
    return _Problem(given, student, which, metric, hold).solve(teacher, steps)


class _Problem:
    """Normal equations in lists of private factors, one an expert; None where there is none."""

    def __init__(
        self,
        given: LayerInput,
        student: Layer,
        which: Literal["up", "down"],
        metric: RowMetric | None,
        hold: float,
    ) -> None:
        self._given, self._which, self._hold = given, which, hold
        self._at = ("gate", "up", "down").index(which)
        self._stored = student[self._at]
        self._own = in_dtype(self._stored, given.x.dtype)
        self._student = list(student)
        self._student[self._at] = self._own
        self._E = self._own.num_experts
        self._members = [
            e
            for group, rank in zip(self._own.groups, self._own.ranks, strict=True)
            for e in group
            if rank != 0
        ]
        self._row_metric = metric
        self._kept = _Kept(given, self._student, which)
        if metric is not None and which == "up":
            missing = [e for e in self._members if e not in metric.rows]
            if missing:
                raise ArgumentError(f"metric: nothing of expert {missing[0]}")

    # ------------------------------------------------------------------ the problem

    def solve(self, teacher: Layer, steps: int) -> Refit:
        gradient, squared, target, hidden = self._start(teacher)
        metric = self._metric(hidden)
        del hidden
        errors, objectives = [squared], [squared]
        change = [np.zeros_like(g) for g in gradient]
        pulled = [np.zeros_like(g) for g in gradient]  # what holds the change
        stack = self._zeros()  # of the direction, as the layer takes it
        direction = self._listed(stack)
        before = np.inf
        for step in range(steps):
            z = metric.solved(gradient)
            rz = _dot(gradient, z)
            for a, p in zip(z, direction, strict=True):
                p *= rz / before
                p += a
            del z
            if not rz > 0:
                break  # there already
            more = step + 1 < steps  # else nothing asks for the gradient
            normal, length = self._apply(stack, gradient=more)
            held = metric.held(direction)
            alpha = rz / (length + _dot(direction, held))
            for a, p in zip(change, direction, strict=True):
                a += alpha * p
            for a, h in zip(pulled, held, strict=True):
                a += alpha * h
            objectives.append(objectives[-1] - alpha * rz)
            errors.append(objectives[-1] - _dot(change, pulled))
            if more:
                for g, n, h in zip(gradient, normal, held, strict=True):
                    g -= alpha * (n + h)
            del normal, held
            before = rz
        scale = target if target > 0 else 1.0
        return Refit(
            self._changed(change),
            np.sqrt(np.maximum(errors, 0) / scale),
            np.array(objectives),
        )

    def _start(self, teacher: Layer) -> tuple[list[Array], float, float, SecondMoments | None]:
        """Gradient at the student, its squared error, the target's squared length; for down the
        moments of the student's intermediate."""
        grads = self._zeros()
        squared = target = 0.0
        hidden: SecondMoments | None = None
        if self._which == "down":
            _, F = layer_sizes(*self._student)
            hidden = SecondMoments.nothing(self._E, F, self._given.x.dtype)
        for some, call, aim in self._given.aims(teacher):
            y, saved = self._forward(some, call, self._student)
            missing = aim - y
            squared += squares(missing)
            target += squares(aim)
            self._backward(missing, saved, call, self._student, grads)
            if hidden is not None:
                routed = Routed.of(*call[1:], self._E)
                h = activate(routed.cut(saved.gate), routed.cut(saved.up), **self._given.act)
                second_moments(h, routed.expert, routed.weights, self._E, out=hidden)
        return self._listed(grads), squared, target, hidden

    def _metric(self, hidden: SecondMoments | None) -> FactorMetric:
        """On the side of F H_i or S_i, on the other ``B Bᵀ``, for up ``B C_i Bᵀ``."""
        by_expert = self._row_metric or RowMetric({}, {})
        rows: Any = by_expert.rows if hidden is None else hidden.moment
        latent = by_expert.latent if hidden is None else latent_grams(self._own)
        return FactorMetric(
            self._which,
            [rows[e] for e in self._members],
            [latent[e] for e in self._members],
            self._hold,
        )

    def _apply(
        self, direction: ProjectionGradients, *, gradient: bool
    ) -> tuple[list[Array], float]:
        """JᵀJ p, or nothing where it is not asked for, and ‖J p‖² for the layer's output J p."""
        layer = list(self._student)
        layer[self._at] = self._with(direction)
        grads = self._zeros() if gradient else ProjectionGradients((), ())
        length = 0.0
        for some, x, index, weights in self._given.chunks():
            call = (x, index, weights)
            y, saved = self._forward(some, call, layer, self._kept.known, slope=True)
            length += squares(y)
            if gradient:
                self._backward(y, saved, call, layer, grads)
        return self._listed(grads) if gradient else [], length

    def _forward(
        self,
        some: slice,
        call: tuple[Array, Array, Array],
        layer: Sequence[Projection],
        known: Sequence[str] = (),
        *,
        slope: bool = False,
    ) -> Any:
        """With `slope` of the answers' part that is linear in the factors: no bias of down."""
        gate, up, down = layer
        how = self._given.how((gate, up, down))
        if slope:
            how.pop("down_bias", None)
        return latent_experts_forward(*call, *layer, **how, save=self._kept.of(some), known=known)

    def _backward(
        self,
        dy: Array,
        saved: Any,
        call: tuple[Array, Array, Array],
        layer: Sequence[Projection],
        grads: ProjectionGradients,
    ) -> None:
        out = Gradients(up=grads) if self._which == "up" else Gradients(down=grads)
        gate, up, down = layer
        how = self._given.how((gate, up, down))
        latent_experts_backward(dy, saved, *call, *layer, **how, out=out)

    # ------------------------------------------------------------------ as projections

    def _zeros(self) -> ProjectionGradients:
        private = tuple(None if a is None else np.zeros_like(a) for a in self._own.private)
        return ProjectionGradients(private, (None,) * len(private))

    def _listed(self, grads: ProjectionGradients) -> list[Array]:
        by_expert = self._own._split(grads.private)
        found = []
        for e in self._members:
            a = by_expert[e]
            assert a is not None
            found.append(a)
        return found

    def _with(self, factors: ProjectionGradients) -> Projection:
        """The student's projection with these private factors."""
        private = tuple(
            a if rank == 0 else new
            for rank, a, new in zip(
                self._own.ranks, self._own.private, factors.private, strict=True
            )
        )
        return replace(self._own, private=private)

    def _changed(self, change: list[Array]) -> Projection:
        by_expert = dict(zip(self._members, change, strict=True))
        private = []
        for group, rank, wide, stored in zip(
            self._own.groups, self._own.ranks, self._own.private, self._stored.private, strict=True
        ):
            if rank == 0 or wide is None or stored is None:
                private.append(stored)
                continue
            new = wide + np.stack([by_expert[e] for e in group])
            private.append(new.astype(stored.dtype))
        return replace(self._stored, private=tuple(private))


class _Kept:
    """What forward saves of some tokens, and of all tokens what no step changes."""

    def __init__(
        self, given: LayerInput, layer: Sequence[Projection], which: Literal["up", "down"]
    ) -> None:
        N, K = given.index.shape
        gate, up, down = layer
        _, F = layer_sizes(gate, up, down)
        #: Of each array how many rows a token has, and how long they are.
        self._shapes = {
            "gate": (K, F),
            "up": (K, F),
            "z_gate": (1, gate.width(K)),
            "z_up": (1, up.width(K)),
            "u": (1, down.width(K)),
        }
        same = ("gate", "up") if which == "down" else ("gate", "z_up")
        self.known = [name for name in same if given.room and self._shapes[name][1]]
        self._arrays = {}
        for name, (rows, width) in self._shapes.items():
            if given.room and name in self.known:
                self._arrays[name] = given.room(name, (N * rows, width))
            else:
                self._arrays[name] = np.empty((min(N, CHUNK) * rows, width), given.x.dtype)

    def of(self, some: slice) -> Saved:
        """For a chunk."""

        def place(name: str) -> Array:
            rows, array = self._shapes[name][0], self._arrays[name]
            at = some.start if name in self.known else 0
            return array[at * rows : (at + some.stop - some.start) * rows]

        return Saved(*(place(name) for name in self._shapes))


def in_dtype(p: Projection, dtype: npt.DTypeLike) -> Projection:
    """The same factors in another type."""

    def cast(arrays: Sequence[Array | None]) -> tuple[Array | None, ...]:
        return tuple(None if a is None else a.astype(dtype, copy=False) for a in arrays)

    return replace(p, private=cast(p.private), shared=cast(p.shared))


def _dot(a: Sequence[Array], b: Sequence[Array]) -> float:
    return sum(dot(x, y) for x, y in zip(a, b, strict=True))
