"""A layer's experts trained to answer as other experts do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from molae.errors import ArgumentError, NonFiniteError
from molae.fit.arguments import Array
from molae.fit.descent import descend, parted
from molae.fit.reading import Layer, LayerInput, pieces
from molae.fit.refitting import in_dtype
from molae.fit.sums import squares
from molae.ops import (
    Gradients,
    Projection,
    latent_experts_backward,
    latent_experts_forward,
)

__all__ = ["LayerDistillation", "distill_layer"]

#: Passes over the tokens, and the rate in root mean squares of each array.
EPOCHS, RATE = 8, 0.01

KINDS = ("gate", "up", "down")


@dataclass(frozen=True, eq=False)
class LayerDistillation:
    """What `distill_layer` has found.

    Attributes
    ----------
    layer : (gate, up, down) of Projection
        Of the groups, ranks and dtypes of the student.
    error : (2,) ndarray of float64
        ``‖target − y‖ / ‖target‖`` before and after.
    """

    layer: Layer
    error: Array


def distill_layer(
    given: LayerInput,
    student: Layer,
    *,
    teacher: Layer | None = None,
    trained: Sequence[str] = KINDS,
    epochs: int = EPOCHS,
    rate: float = RATE,
    seed: int = 0,
) -> LayerDistillation:
    """Train a layer's experts to answer as a teacher's do, on what they read.

    Parameters
    ----------
    given : LayerInput
        With ``lost`` also errors of the layers before are made up for.
    student : (gate, up, down) of Projection
        Latent or dense, of any mix of groups.
    teacher : (gate, up, down) of Projection, optional
        Whose answers, and ``given.lost``, are the target; where there are ``given.answers`` these
        are theirs.
    trained : sequence of {'gate', 'up', 'down'}
        Which of the student's; their private and their shared factors.
    epochs : int
        Passes over the tokens.
    rate : float
        In root mean squares of what each array begins with.
    seed : int
        Of the order in which tokens come.

    Returns
    -------
    LayerDistillation

    Raises
    ------
    ShapeError, ArgumentError
        An argument is not as described, or neither answers nor a teacher.
    NonFiniteError
        NaN or Inf in what the experts read or answer.

    Notes
    -----
    AdamW on masters of the dtype of ``given.x``, in batches of 1,024 tokens, by the kernels of
    `molae.ops`, forward and backward. One token in 16 is held out, and what answers these best is
    kept: the layer is never worse there than it was. The identity of the gauge form stays.

    Examples
    --------
    >>> import numpy as np, molae
    >>> from molae.fit import LayerInput, distill_layer
    >>> from molae.ops import Projection
    >>> rng = np.random.default_rng(0)
    >>> W = [rng.standard_normal((4, 6, 6)) for _ in range(3)]
    >>> teacher = tuple(Projection.dense(w) for w in W)
    >>> up = Projection.from_factors(molae.fit.factor_shared(W[1], 3, groups=[[0, 1], [2, 3]]))
    >>> index = np.argsort(rng.random((600, 4)), axis=1)[:, :2]
    >>> given = LayerInput(rng.standard_normal((600, 6)), index, rng.random((600, 2)))
    >>> found = distill_layer(given, (teacher[0], up, teacher[2]), teacher=teacher, epochs=20)
    >>> bool(found.error[1] < 0.9 * found.error[0])
    True
    """
    if given.answers is None and teacher is None:
        raise ArgumentError("teacher: needed where given has no answers")
    if not trained or not set(trained) <= set(KINDS):
        raise ArgumentError(f"trained: expected some of {', '.join(KINDS)}, got {list(trained)}")
    if epochs < 0 or not rate > 0:
        raise ArgumentError(f"expected epochs >= 0 and rate > 0, got {epochs} and {rate}")
    given.check()
    return _Distilling(given, student, teacher or student, trained).solve(epochs, rate, seed)


class _Distilling:
    def __init__(
        self, given: LayerInput, student: Layer, teacher: Layer, trained: Sequence[str]
    ) -> None:
        self._student = student
        self._trained = [kind for kind in KINDS if kind in trained]
        wide = dict(zip(KINDS, (in_dtype(p, given.x.dtype) for p in student), strict=True))
        #: Masters: what is trained has copies of its own.
        self._weights: dict[str, Array] = {}
        for kind in self._trained:
            wide[kind] = self._own(kind, wide[kind])
        self._layer: Layer = (wide["gate"], wide["up"], wide["down"])
        answers = given.room("aim", given.x.shape) if given.room else np.empty_like(given.x)
        self._target = 0.0
        for some, _, aim in given.aims(teacher):
            answers[some] = aim
            self._target += squares(aim)
        if not math.isfinite(self._target):
            raise NonFiniteError("NaN or Inf in what the experts read or answer")
        #: With all that is to be answered.
        self._given = replace(given, answers=answers, lost=None)
        self._seen, self._held = parted(len(given.x))
        #: The gradients of a step: where those of the next go.
        self._room: Gradients | None = None

    def solve(self, epochs: int, rate: float, seed: int) -> LayerDistillation:
        every = np.arange(len(self._given.x))
        start = self._lost(every)
        best = descend(
            self._weights, self._slopes, lambda: self._lost(self._held), self._seen,
            epochs=epochs, rate=rate, seed=seed,
        )  # fmt: skip
        for name, array in self._weights.items():
            array[...] = best[name]
        end = self._lost(every)
        scale = self._target if self._target > 0 else 1.0
        stored = (
            in_dtype(p, old.dtype) if old.dtype is not None else p
            for p, old in zip(self._layer, self._student, strict=True)
        )
        gate, up, down = stored
        return LayerDistillation((gate, up, down), np.sqrt(np.array([start, end]) / scale))

    # ------------------------------------------------------------------ its parts

    def _own(self, kind: str, p: Projection) -> Projection:
        """The same projection on copies, which `_weights` has by name."""

        def taken(role: str, arrays: Sequence[Array | None]) -> tuple[Array | None, ...]:
            found: list[Array | None] = []
            for g, array in enumerate(arrays):
                if array is None or not array.size:
                    found.append(array)
                    continue
                own = np.array(array, order="C")
                self._weights[f"{kind}.{role}.{g}"] = own
                found.append(own)
            return tuple(found)

        return replace(p, private=taken("private", p.private), shared=taken("shared", p.shared))

    def _slopes(self, tokens: Array) -> dict[str, Array]:
        call, aim = self._given.rows(tokens)
        act = self._given.activation
        dy, saved = latent_experts_forward(*call, *self._layer, activation=act, save=True)
        dy -= aim
        dy /= self._target
        found = latent_experts_backward(
            dy, saved, *call, *self._layer, activation=act,
            wanted=None if self._room else self._trained, out=self._room, add=False,
        )  # fmt: skip
        self._room = found
        return {name: own for kind in self._trained for name, own in _named(kind, found)}

    def _lost(self, tokens: Array) -> float:
        total = 0.0
        for some in pieces(tokens):
            call, aim = self._given.rows(some)
            y = latent_experts_forward(*call, *self._layer, activation=self._given.activation)
            total += squares(y - aim)
        if not math.isfinite(total):
            raise NonFiniteError("NaN or Inf in what the experts answer")
        return total


def _named(kind: str, found: object) -> Iterator[tuple[str, Array]]:
    own = getattr(found, kind)
    for role in ("private", "shared"):
        for g, array in enumerate(getattr(own, role)):
            if array is not None and array.size:
                yield f"{kind}.{role}.{g}", array
