"""Private factors fitted to what the whole layer should answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from molae import _core
from molae.errors import ArgumentError, ShapeError
from molae.fit.basis import ungauge
from molae.fit.layer_moments import LayerMoments, inner_products
from molae.fit.moments import SecondMoments, second_moments
from molae.fit.reading import LayerInput, Routed
from molae.ops import (
    Gradients,
    Projection,
    ProjectionGradients,
    activate,
    latent_experts_backward,
    latent_experts_forward,
)
from molae.threads import get_num_threads

__all__ = ["Refit", "RowMetric", "refit", "row_metric"]

Array = npt.NDArray[Any]
Layer = tuple[Projection, Projection, Projection]

#: How firmly factors are held to where they were: this share of their mean moments.
HOLD = 0.03

#: Steps of the conjugate gradients: more lower the error by less than a hundredth.
STEPS = 2

#: What `_core.moments_product` does, and the ridge where none is meant.
SOLVE, TIMES, PROJECT = range(3)
TINY = 1e-9


@dataclass(frozen=True, eq=False)
class RowMetric:
    """What conditions a fit of up, of each expert; see `row_metric`.

    Attributes
    ----------
    rows : dict of int to (F, F) ndarray
        By expert: how the layer's output feels errors of its rows.
    latent : dict of int to (R, R) ndarray
        By expert: ``B C Bᵀ``, the moments of what its private factor reads.
    """

    rows: Mapping[int, Array]
    latent: Mapping[int, Array]

    def joined(self, other: RowMetric) -> RowMetric:
        """Of the experts of both."""
        return RowMetric({**self.rows, **other.rows}, {**self.latent, **other.latent})


def row_metric(moments: LayerMoments, up: Projection) -> RowMetric:
    """What `refit` needs to fit up, from moments that may then be let go.

    Parameters
    ----------
    moments : LayerMoments
        Of some experts, or of all.
    up : Projection
        Of the whole layer; latent groups of rank 1 or more, or dense ones.

    Examples
    --------
    >>> import numpy as np
    >>> from molae.fit import LayerInput, layer_moments, row_metric
    >>> from molae.ops import Projection
    >>> rng = np.random.default_rng(0)
    >>> gate, up, down = (Projection.dense(rng.standard_normal((2, 3, 3))) for _ in range(3))
    >>> given = LayerInput(rng.standard_normal((9, 3)), np.arange(18).reshape(9, 2) % 2,
    ...                    np.full((9, 2), 0.5))
    >>> metric = row_metric(layer_moments(given, gate, up, down), up)
    >>> metric.rows[1].shape, metric.latent[0].shape
    ((3, 3), (3, 3))
    """
    C = dict(zip(moments.experts, moments.x.moment, strict=True))
    latent: dict[int, Array] = {}
    for group, B in zip(up.groups, _bases(up), strict=True):
        some = [e for e in group if e in C]
        if B is None:
            latent.update((e, C[e]) for e in some)
        elif some:
            B = np.ascontiguousarray(B, dtype=C[some[0]].dtype)
            out = [np.empty((len(B), len(B)), B.dtype) for _ in some]
            metrics = [C[e] for e in some]
            _core.moments_product(PROJECT, out, [B] * len(some), metrics, 0.0, get_num_threads())
            latent.update(zip(some, out, strict=True))
    return RowMetric(dict(zip(moments.experts, moments.row_metric["up_proj"], strict=True)), latent)


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
    private factors of up, and in those of down: a problem of least squares.

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
        An argument is not as described.
    NonFiniteError
        NaN or Inf in what the experts read.

    Notes
    -----
    Minimizes ``Σ_t ‖target − y‖² + Σ_i h_i ‖ΔA_i‖²``: for down with ``h_i = hold tr(H_i) / F`` in
    the metric of the shared factor, H_i the student's intermediate; for up with the mean of the
    rows' weights and the moments of the latent rows. Preconditioned by the exact inverse of each
    expert's own block (down), or of its Kronecker form ``S_i ⊗ B C_i Bᵀ`` (up). Each step is one
    pass over the tokens, forward and, but for the last, backward in that one factor. Vectors are
    of the dtype of ``given.x``, seven times the private factors in all; metrics are inverted in
    float64.

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
    if steps < 0 or not hold > 0:
        raise ArgumentError(f"expected steps >= 0 and hold > 0, got {steps} and {hold}")
    for name in ("lost", "answers"):
        rows = getattr(given, name)
        if rows is not None and rows.shape != given.x.shape:
            raise ShapeError(f"{name}: expected the shape of x, {given.x.shape}, got {rows.shape}")
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
        #: Of each member, what its factor is measured by: on the side of F H_i or S_i, on the
        #: other B Bᵀ, or for up B C_i Bᵀ; None: the identity.
        self._rows: list[Array] = []
        self._latent: list[Array | None] = []
        if metric is not None and which == "up":
            missing = [e for e in self._members if e not in metric.rows]
            if missing:
                raise ArgumentError(f"metric: nothing of expert {missing[0]}")
            self._rows = [metric.rows[e] for e in self._members]
            self._latent = [metric.latent[e] for e in self._members]
        else:
            self._latent = self._shared_grams()

    # ------------------------------------------------------------------ the problem

    def solve(self, teacher: Layer, steps: int) -> Refit:
        gradient, squared, target = self._start(teacher)
        errors, objectives = [squared], [squared]
        change = [np.zeros_like(g) for g in gradient]
        pulled = [np.zeros_like(g) for g in gradient]  # what holds the change
        direction = self._precondition(gradient)
        rz = _dot(gradient, direction)
        for step in range(steps):
            if not rz > 0:
                break  # there already
            more = step + 1 < steps  # else nothing asks for the gradient
            normal, length = self._apply(direction, gradient=more)
            held = self._held(direction)
            alpha = rz / (length + _dot(direction, held))
            for a, p in zip(change, direction, strict=True):
                a += alpha * p
            for a, h in zip(pulled, held, strict=True):
                a += alpha * h
            objectives.append(objectives[-1] - alpha * rz)
            errors.append(objectives[-1] - _dot(change, pulled))
            if not more:
                break
            for g, n, h in zip(gradient, normal, held, strict=True):
                g -= alpha * (n + h)
            z = self._precondition(gradient)
            before, rz = rz, _dot(gradient, z)
            for a, p in zip(z, direction, strict=True):
                p *= rz / before
                p += a
        scale = target if target > 0 else 1.0
        return Refit(
            self._changed(change),
            np.sqrt(np.maximum(errors, 0) / scale),
            np.array(objectives),
        )

    def _start(self, teacher: Layer) -> tuple[list[Array], float, float]:
        """Gradient at the student, its squared error, the target's squared length."""
        grads = self._zeros()
        squared = target = 0.0
        hidden: SecondMoments | None = None
        for some, x, index, weights in self._given.chunks():
            call = (x, index, weights)
            if self._given.answers is None:
                aim = latent_experts_forward(*call, *teacher, activation=self._given.activation)
            else:
                aim = np.array(self._given.answers[some])
            if self._given.lost is not None:
                aim += self._given.lost[some]
            y, saved = self._forward(call, self._student)
            missing = aim - y
            squared += float(np.square(missing, dtype=np.float64).sum())
            target += float(np.square(aim, dtype=np.float64).sum())
            self._backward(missing, saved, call, self._student, grads)
            if self._which == "down":
                routed = Routed.of(index, weights, self._E)
                h = activate(
                    routed.cut(saved.gate),
                    routed.cut(saved.up),
                    activation=self._given.activation,
                )
                if hidden is None:
                    hidden = SecondMoments.nothing(self._E, h.shape[1], h.dtype)
                second_moments(h, routed.expert, routed.weights, self._E, out=hidden)
        if hidden is not None:
            self._rows = [hidden.moment[e] for e in self._members]
        return self._listed(grads), squared, target

    def _apply(self, direction: list[Array], *, gradient: bool) -> tuple[list[Array], float]:
        """JᵀJ p where it is asked for, and ‖J p‖² for the layer's output J p."""
        layer = list(self._student)
        layer[self._at] = self._with(direction)
        grads = self._zeros()
        length = 0.0
        for _, x, index, weights in self._given.chunks():
            call = (x, index, weights)
            y, saved = self._forward(call, layer)
            length += float(np.square(y, dtype=np.float64).sum())
            if gradient:
                self._backward(y, saved, call, layer, grads)
        return self._listed(grads), length

    def _forward(self, call: tuple[Array, Array, Array], layer: Sequence[Projection]) -> Any:
        return latent_experts_forward(*call, *layer, activation=self._given.activation, save=True)

    def _backward(
        self,
        dy: Array,
        saved: Any,
        call: tuple[Array, Array, Array],
        layer: Sequence[Projection],
        grads: ProjectionGradients,
    ) -> None:
        out = Gradients(up=grads) if self._which == "up" else Gradients(down=grads)
        latent_experts_backward(
            dy, saved, *call, *layer, activation=self._given.activation, out=out
        )

    # ------------------------------------------------------------- metrics of a factor

    def _held(self, factors: list[Array]) -> list[Array]:
        """Gradient of half of what holds the factors."""
        found = self._on_latent_side(TIMES, factors)
        for a, rows in zip(found, self._rows, strict=True):
            a *= self._hold * float(rows.trace(dtype=np.float64)) / len(rows)
        return found

    def _precondition(self, gradient: list[Array]) -> list[Array]:
        side = self._which == "down"
        found = [np.array(g if side else g.T, order="C") for g in gradient]
        _core.moments_product(SOLVE, found, found, self._rows, self._hold, get_num_threads())
        return self._on_latent_side(SOLVE, [f if side else f.T for f in found])

    def _on_latent_side(self, op: int, factors: list[Array]) -> list[Array]:
        """Each factor times its latent metric, or the inverse of that."""
        turned = [np.array(a.T if self._which == "down" else a, order="C") for a in factors]
        for size in sorted({len(m) for m in self._latent if m is not None}):
            some = [n for n, m in enumerate(self._latent) if m is not None and len(m) == size]
            of_size, metrics = [turned[n] for n in some], [self._latent[n] for n in some]
            _core.moments_product(op, of_size, of_size, metrics, TINY, get_num_threads())
        return [np.ascontiguousarray(a.T) for a in turned] if self._which == "down" else turned

    def _shared_grams(self) -> list[Array | None]:
        """B Bᵀ for each member."""
        found: dict[int, Array | None] = {}
        for group, B in zip(self._own.groups, _bases(self._own), strict=True):
            gram = None if B is None else inner_products(np.ascontiguousarray(B.T))
            found.update(dict.fromkeys(group, gram))
        return [found[e] for e in self._members]

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

    def _with(self, factors: list[Array]) -> Projection:
        """The student's projection with these private factors."""
        by_expert = dict(zip(self._members, factors, strict=True))
        private = tuple(
            None
            if a is None
            else np.stack([by_expert[e] for e in group]).astype(a.dtype)
            if rank != 0
            else a
            for group, rank, a in zip(
                self._own.groups, self._own.ranks, self._own.private, strict=True
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


def in_dtype(p: Projection, dtype: npt.DTypeLike) -> Projection:
    """The same factors in another type."""

    def cast(arrays: Sequence[Array | None]) -> tuple[Array | None, ...]:
        return tuple(None if a is None else a.astype(dtype, copy=False) for a in arrays)

    return replace(p, private=cast(p.private), shared=cast(p.shared))


def _bases(p: Projection) -> list[Array | None]:
    """The shared factor of each latent group, written out, as stored; None for the others."""
    bases: list[Array | None] = []
    for rank, shared, perm in zip(p.ranks, p.shared, p.perm, strict=True):
        if not rank:
            bases.append(None)
            continue
        assert shared is not None
        wide = shared.astype(np.promote_types(shared.dtype, np.float32))
        if p.form == "gauge":
            assert perm is not None
            wide = ungauge(wide, perm)
        bases.append(wide)
    return bases


def _dot(a: Sequence[Array], b: Sequence[Array]) -> float:
    """In NumPy's own loops: a BLAS adds in an order that depends on its threads."""
    return float(sum(np.multiply(x, y, dtype=np.float64).sum() for x, y in zip(a, b, strict=True)))
