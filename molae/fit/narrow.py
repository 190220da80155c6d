"""Narrow experts fitted to what the experts that they stand for would answer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from molae.errors import ArgumentError, NonFiniteError
from molae.fit.arguments import Array
from molae.fit.descent import descend, parted, steps_of
from molae.fit.moments import SecondMoments, second_moments
from molae.fit.reading import Layer, LayerInput, Routed, pieces
from molae.fit.refit_metrics import ROOT, SOLVE, bases, moments_product
from molae.fit.sums import squares
from molae.ops import (
    NarrowExperts,
    Projection,
    activate,
    experts_backward,
    experts_forward,
    latent_experts_forward,
    route,
    split_slots,
)
from molae.ops.call import layer_sizes

__all__ = ["NarrowFit", "narrow_experts"]

#: How firmly the linear part is held to where it began: this share of an expert's mean curvature.
RIDGE = 0.05

#: The linear part is solved to this share of its first residual, or in so many steps.
RESIDUAL, LINEAR_STEPS = 1e-2, 20

#: Passes of the descent over all tokens, and its rate in root mean squares of each array.
EPOCHS, RATE = 10, 0.02

#: Passes over the tokens, about: some measure.
PASSES = LINEAR_STEPS + EPOCHS + 3


@dataclass(frozen=True, eq=False)
class NarrowFit:
    """What `narrow_experts` has found.

    Attributes
    ----------
    experts : NarrowExperts
        Of the dtype of ``given.x``.
    error : (3,) ndarray of float64
        ``‖target − y‖ / ‖target‖`` without the compressed experts, after the linear part, at the
        end.
    residual : float
        Of the linear part's equations, over that at its start.
    """

    experts: NarrowExperts
    error: Array
    residual: float


def narrow_experts(
    given: LayerInput,
    layer: Layer,
    num_compressed: int,
    units: int,
    *,
    teacher: Layer | None = None,
    ridge: float = RIDGE,
    linear_steps: int = LINEAR_STEPS,
    epochs: int = EPOCHS,
    rate: float = RATE,
    seed: int = 0,
) -> NarrowFit:
    """Fit narrow experts that answer where a layer's experts are compressed.

    Parameters
    ----------
    given : LayerInput
        With ``lost`` also errors of the layers before are made up for.
    layer : (gate, up, down) of Projection
        Of which each token's first K − n experts run.
    num_compressed : int
        n, 1 to K − 1.
    units : int
        m, 0 to F; 0 leaves an additive vector an expert.
    teacher : (gate, up, down) of Projection, optional
        Whose answers with all K experts, and ``given.lost``, are the target; where there are
        ``given.answers`` these are theirs. Default: `layer`.
    ridge : float
        More than 0.
    linear_steps, epochs : int
        At most so many steps for the part in which y is linear, and passes of the descent in all.
    rate : float
        Of the descent, in root mean squares of what each array begins with.
    seed : int
        Of the order in which tokens come.

    Returns
    -------
    NarrowFit

    Raises
    ------
    ShapeError, ArgumentError
        An argument is not as described.
    NonFiniteError
        NaN or Inf in what the experts read or answer.

    Notes
    -----
    Each begins as the m units of its expert that matter most in the text, by
    ``Σ g² h² ‖W_down‖²`` of the unit over the tokens that compress the expert. Where the experts
    have biases (``given.biases``) it has those of its units for gate and up, and begins with all
    of its expert's for down; so does an additive vector. Then down and the bias, in which the
    answer is linear, are found together by conjugate gradients, with each expert's own second
    moments for a preconditioner; then all by AdamW on batches of tokens. A few tokens are held
    out, and what answers these best is what is kept: the descent is never worse there than the
    linear part.

    Examples
    --------
    >>> import numpy as np
    >>> from molae.fit import LayerInput, narrow_experts
    >>> from molae.ops import Projection
    >>> rng = np.random.default_rng(0)
    >>> gate, up, down = (Projection.dense(rng.standard_normal((4, 6, 6))) for _ in range(3))
    >>> index = np.argsort(rng.random((300, 4)), axis=1)[:, :3]
    >>> given = LayerInput(rng.standard_normal((300, 6)), index, rng.random((300, 3)))
    >>> found = narrow_experts(given, (gate, up, down), 2, 3)
    >>> found.experts.units, bool(found.error[1] < 0.8 * found.error[0])
    (3, True)
    """
    F, K = layer_sizes(*layer)[1], given.index.shape[1]
    if not 0 <= units <= F:
        raise ArgumentError(f"units: expected 0 to F = {F}, got {units}")
    if not 1 <= num_compressed < K:
        raise ArgumentError(f"num_compressed: expected 1 to K - 1 = {K - 1}, got {num_compressed}")
    if not ridge > 0 or linear_steps < 0 or epochs < 0 or not rate > 0:
        raise ArgumentError(
            f"expected ridge, rate > 0 and steps, epochs >= 0, got {ridge}, {rate}, "
            f"{linear_steps} and {epochs}"
        )
    given.check()
    left = _Left.of(given, layer, teacher or layer, num_compressed)
    fit = _Fit(left, _chosen_units(left.given, teacher or layer, units))
    linear, residual = fit.linear(ridge, linear_steps)
    end = fit.descent(linear, epochs, rate, seed)
    every = np.arange(len(given.x))
    errors = [math.sqrt(e) for e in (left.nothing, fit.lost(linear, every), fit.lost(end, every))]
    size = math.sqrt(left.target)
    return NarrowFit(
        end, np.array([error / size if size > 0 else 0.0 for error in errors]), residual
    )


@dataclass(frozen=True, eq=False)
class _Left:
    """What the experts that run leave to the narrow ones: where these are called, and for what.

    Attributes
    ----------
    given : LayerInput
        With the compressed slots alone, and what is left to answer.
    nothing, target : float
        Squared lengths of what is left, and of the layer's whole target.
    """

    given: LayerInput
    nothing: float
    target: float

    @classmethod
    def of(cls, given: LayerInput, layer: Layer, teacher: Layer, n: int) -> _Left:
        E = layer_sizes(*layer)[0]
        rest = np.empty_like(given.x) if given.room is None else given.room("rest", given.x.shape)
        every = np.empty(given.index.shape, np.int64)
        nothing = target = 0.0
        for some, call, aim in given.aims(teacher):
            x, index, weights = call
            main, every[some] = split_slots(index, weights, E, n)
            y = latent_experts_forward(x, main, weights, *layer, **given.how(layer))
            target += squares(aim)
            aim -= y
            squared = squares(aim)
            if not math.isfinite(squared):
                raise NonFiniteError("NaN or Inf in what the experts read or answer")
            nothing += squared
            rest[some] = aim
        own = replace(given, index=every, lost=None, answers=rest)
        return cls(own, nothing, target)


def _chosen_units(given: LayerInput, layer: Layer, m: int) -> NarrowExperts:
    """Of each expert the m units that matter most in the slots of `given`."""
    E, F = layer_sizes(*layer)
    D = given.x.shape[1]
    energy = np.zeros((E, F))
    if 0 < m < F:
        for _, x, index, weights in given.chunks():
            _, saved = latent_experts_forward(
                x, index, weights, *layer, **given.how(layer), save=True
            )
            routed = Routed.of(index, weights, E)
            h = activate(routed.cut(saved.gate), routed.cut(saved.up), **given.act)
            h *= routed.weights
            np.square(h, out=h)
            for e, rows in _by_expert(routed, E):
                energy[e] += h[rows].sum(0, dtype=np.float64)
    dtype = given.x.dtype
    found = {"gate": np.empty((E, m, D), dtype), "down": np.empty((E, D, m), dtype)}
    found |= {"up": np.empty_like(found["gate"]), "bias": np.zeros((E, D), dtype)}
    biases: dict[str, Array] = {}
    if given.biases is not None:
        biases = dict(zip(("gate_bias", "up_bias"), given.biases[:2], strict=True))
        found["bias"] = given.biases[2].astype(dtype)
    if m:
        found |= {name: np.empty((E, m), dtype) for name in biases}
    gate, up, down = (_matrices(p, is_down) for p, is_down in zip(layer, (0, 0, 1), strict=True))
    for e, *matrices in zip(range(E), gate, up, down, strict=True):
        wide = dict(zip(("gate", "up", "down"), matrices, strict=True))
        weight = energy[e] if energy[e].any() else np.ones(F)
        columns = np.square(wide["down"], dtype=np.float64).sum(0)
        order = np.argsort(-weight * columns, kind="stable")[:m]
        order.sort()
        for name in ("gate", "up"):
            found[name][e] = wide[name][order]
        for name in biases if m else ():
            found[name][e] = biases[name][e, order]
        found["down"][e] = wide["down"][:, order]
    return NarrowExperts(**found)


def _matrices(p: Projection, is_down: int) -> Iterator[Array]:
    """Each expert's matrix, in order."""
    shared = bases(p)
    for e in range(p.num_experts):
        (g,) = (g for g, group in enumerate(p.groups) if e in group)
        stack, B = p.private[g], shared[g]
        assert stack is not None
        own = stack[p.groups[g].index(e)]
        if B is None:
            yield own
        else:  # in double: what is rounded does not depend on who adds
            A, wide = own.astype(np.float64), B.astype(np.float64)
            yield wide.T @ A if is_down else A @ wide


def _by_expert(routed: Routed, E: int) -> Iterator[tuple[int, slice]]:
    ends = np.searchsorted(routed.expert[:, 0], np.arange(E + 1))
    for e in range(E):
        if ends[e] < ends[e + 1]:
            yield e, slice(int(ends[e]), int(ends[e + 1]))


class _Fit:
    def __init__(self, left: _Left, begun: NarrowExperts) -> None:
        self._left, self._begun = left, begun
        self._seen, self._held = parted(len(left.given.x))

    def linear(self, ridge: float, steps: int) -> tuple[NarrowExperts, float]:
        """Conjugate gradients in V = [down | bias]: the slope there is linear, so that its change
        along a direction is the product with the matrix."""
        start = _joined(self._begun)
        roots, hold = self._curvature(ridge)
        first = self._slope(start)
        V, r = start.copy(), -first
        direction = _solved(roots, r)
        rz = begun = float((r * direction).sum())
        residual = 1.0
        for _ in range(steps if begun > 0 else 0):
            product = self._slope(start + direction) - first + hold * direction
            bend = float((direction * product).sum())
            if not bend > 0:
                break
            alpha = rz / bend
            V += alpha * direction
            r -= alpha * product
            z = _solved(roots, r)
            before, rz = rz, float((r * z).sum())
            residual = math.sqrt(max(rz, 0.0) / begun)
            if residual <= RESIDUAL:
                break
            direction = z + rz / before * direction
        return self._with(V), residual if begun > 0 else 0.0

    def descent(self, start: NarrowExperts, epochs: int, rate: float, seed: int) -> NarrowExperts:
        """In all of them; what is best on the tokens held out."""
        weights = {name: array.copy() for name, array in start.arrays.items()}
        now = replace(start, **weights)
        found = descend(
            weights,
            lambda tokens: self._slopes(now, tokens, self._left.target),
            lambda: self.lost(now, self._held),
            self._seen,
            steps=steps_of(epochs, self._seen),
            rate=rate,
            seed=seed,
        )
        return replace(start, **found.weights)

    def lost(self, experts: NarrowExperts, tokens: Array) -> float:
        """Squared error over some tokens."""
        total = 0.0
        for some in pieces(tokens):
            call, rest = self._left.given.rows(some)
            total += squares(experts.forward(*call, **self._left.given.act) - rest)
        return total

    # ---------------------------------------------------------------- its parts

    def _with(self, V: Array) -> NarrowExperts:
        down, bias = V[:, :, :-1], V[:, :, -1]
        dtype = self._begun.bias.dtype
        return replace(
            self._begun,
            down=np.ascontiguousarray(down, dtype=dtype),
            bias=np.ascontiguousarray(bias, dtype=dtype),
        )

    def _slope(self, V: Array) -> Array:
        """By V, of half the squared error over all tokens that are seen."""
        experts, total = self._with(V), np.zeros_like(V)
        for tokens in pieces(self._seen):
            own = self._slopes(experts, tokens, 1.0, ("down", "bias"))
            total[:, :, -1] += own["bias"]
            if "down" in own:
                total[:, :, :-1] += own["down"]
        return total

    def _slopes(
        self,
        experts: NarrowExperts,
        tokens: Array,
        unit: float,
        names: Sequence[str] | None = None,
    ) -> dict[str, Array]:
        """By each array, or some, of half the squared error over some tokens in this unit."""
        call, rest = self._left.given.rows(tokens)
        act = self._left.given.act
        if not experts.units:
            dy = (experts.forward(*call, **act) - rest) / unit
            return {"bias": _bias_slope(dy, *call[1:], experts.num_experts)}
        own = *call, experts.gate, experts.up, experts.down
        how = experts.biases | act
        dy, saved = experts_forward(*own, **how, save=True)
        dy -= rest
        dy /= unit
        names = tuple(experts.arrays) if names is None else names
        wanted = ["down_bias" if name == "bias" else name for name in names]
        d = experts_backward(dy, saved, *own, **how, wanted=wanted)
        return {n: getattr(d, full) for n, full in zip(names, wanted, strict=True)}

    def _curvature(self, ridge: float) -> tuple[Array, Array]:
        """Of each expert the root of ``Σ g² (h, 1)(h, 1)ᵀ + r I`` over the tokens that are seen,
        and its r (E, 1, 1)."""
        E, m = self._begun.num_experts, self._begun.units
        found = SecondMoments.nothing(E, m + 1, np.float64)
        layer = self._begun.gate, self._begun.up, self._begun.down
        act = self._left.given.act
        for tokens in pieces(self._seen):
            (x, index, weights), _ = self._left.given.rows(tokens)
            h = np.ones((*index.shape, m + 1))
            if m:
                how = self._begun.biases | act
                _, saved = experts_forward(x, index, weights, *layer, **how, save=True)
                routing = route(index, E)
                rows = slice(0, len(routing.token))
                h[routing.token, routing.slot, :m] = activate(
                    saved.gate[rows], saved.up[rows], **act
                )
            second_moments(h, index, weights.astype(np.float64), E, out=found)
        roots = np.zeros_like(found.moment)
        moments_product(ROOT, list(roots), [], list(found.moment), ridge=ridge)
        trace = np.trace(found.moment, axis1=1, axis2=2)
        return roots, (ridge * trace / (m + 1))[:, None, None]


def _solved(roots: Array, r: Array) -> Array:
    out = np.zeros_like(r)
    moments_product(SOLVE, list(out), list(r), list(roots))
    return out


def _joined(experts: NarrowExperts) -> Array:
    """(E, D, m + 1) [down | bias]."""
    return np.concatenate([experts.down, experts.bias[:, :, None]], axis=2).astype(np.float64)


def _bias_slope(dy: Array, index: Array, weights: Array, E: int) -> Array:
    routed = Routed.of(index, weights, E)
    rows = dy[routed.token] * routed.weights
    found = np.zeros((E, dy.shape[1]), dy.dtype)
    for e, own in _by_expert(routed, E):
        found[e] = rows[own].sum(0)
    return found
