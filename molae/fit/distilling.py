"""A layer's experts trained to answer as other experts do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from molae.errors import ArgumentError, NonFiniteError
from molae.fit.arguments import Array
from molae.fit.descent import Keeper, descend, parted, steps_of
from molae.fit.reading import Layer, LayerInput, biases_for, pieces
from molae.fit.refitting import in_dtype
from molae.fit.sums import squares
from molae.ops import (
    Gradients,
    NarrowExperts,
    Projection,
    split_slots,
)
from molae.ops.call import Call

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
    losses : list of (int, float)
        The same over the tokens held out, with the steps done before each look at them.
    steps : int
        That were done.
    """

    layer: Layer
    error: Array
    losses: list[tuple[int, float]]
    steps: int


def distill_layer(
    given: LayerInput,
    student: Layer,
    *,
    teacher: Layer | None = None,
    light: tuple[Array | NarrowExperts, int] | None = None,
    trained: Sequence[str] = KINDS,
    epochs: int = EPOCHS,
    steps: int | None = None,
    rate: float = RATE,
    weight_decay: float = 0.0,
    max_norm: float | None = None,
    seed: int = 0,
    keeper: Keeper | None = None,
    told: Callable[[int, int, float], object] | None = None,
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
    light : (ndarray or NarrowExperts, int), optional
        What acts in the place of the student's compressed experts, and how many of a token's
        these are; it stays as it is.
    trained : sequence of {'gate', 'up', 'down'}
        Which of the student's; their private and their shared factors.
    epochs : int
        Passes over the tokens, where `steps` does not say it.
    steps : int, optional
        Of at most 1,024 tokens.
    rate : float
        In root mean squares of what each array begins with; after a warm-up over a twentieth of
        the steps it falls on a cosine.
    weight_decay, max_norm
        As in `AdamW`.
    seed : int
        Of the order in which tokens come.
    keeper : Keeper, optional
        Where the state is kept from time to time; a run that was interrupted goes on from there
        to the same bytes.
    told : callable, optional
        Is told steps done, steps in all, and the last loss over the tokens held out.

    Returns
    -------
    LayerDistillation

    Raises
    ------
    ShapeError, ArgumentError
        An argument is not as described, or neither answers nor a teacher.
    NonFiniteError
        NaN or Inf in what the experts read or answer, or a step has led there; it is named.
    NumericalError
        The loss has grown out of all proportion; the step is named.

    Notes
    -----
    AdamW on masters of the dtype of ``given.x``, in batches of 1,024 tokens, by the kernels of
    `molae.ops`, forward and backward. One token in 16 is held out and looked at after each pass;
    what answers these best is kept: the layer is never worse there than it was. Four passes
    without a gain are the end. The identity of the gauge form stays.

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
    asked = epochs if steps is None else steps
    if asked < 0 or not rate > 0 or weight_decay < 0:
        raise ArgumentError(
            "expected epochs, steps, weight_decay >= 0 and rate > 0, got "
            f"{epochs}, {steps}, {weight_decay} and {rate}"
        )
    given.check()
    own = _Distilling(given, student, teacher or student, light, trained)
    return own.solve(
        steps_of(epochs, own.seen) if steps is None else steps,
        rate=rate,
        weight_decay=weight_decay,
        max_norm=max_norm,
        seed=seed,
        keeper=keeper,
        told=told,
    )


class _Distilling:
    def __init__(
        self,
        given: LayerInput,
        student: Layer,
        teacher: Layer,
        light: tuple[Array | NarrowExperts, int] | None,
        trained: Sequence[str],
    ) -> None:
        self._student = student
        self._trained = [kind for kind in KINDS if kind in trained]
        masters = dict(zip(KINDS, (in_dtype(p, given.x.dtype) for p in student), strict=True))
        #: Masters: what is trained has copies of its own.
        self._weights: dict[str, Array] = {}
        for kind in self._trained:
            masters[kind] = self._own(kind, masters[kind])
        self._layer: Layer = (masters["gate"], masters["up"], masters["down"])
        #: Vectors that act within the experts that run, and n; nothing otherwise.
        self._vectors: tuple[Array, int] | None = None
        narrow: tuple[NarrowExperts, int] | None = None
        if light is not None:
            own, n = light
            if isinstance(own, NarrowExperts):
                wide = {name: array.astype(given.x.dtype) for name, array in own.arrays.items()}
                narrow = NarrowExperts.of(wide), n
            else:
                self._vectors = own.astype(given.x.dtype, copy=False), n
        answers = given.room("aim", given.x.shape) if given.room else np.empty_like(given.x)
        index = np.array(given.index)
        self.seen, self._held = parted(len(given.x))
        held = np.zeros(len(given.x), bool)
        held[self._held] = True
        self._target = self._target_held = 0.0
        for some, call, aim in given.aims(teacher):
            self._target += squares(aim)
            self._target_held += squares(aim[held[some]])
            if narrow is not None:
                # These answer beside the others: what they answer is none of the others' concern.
                x, every, weights = call
                index[some], rest = split_slots(every, weights, narrow[0].num_experts, narrow[1])
                aim -= narrow[0].forward(x, rest, weights, **given.act)
            answers[some] = aim
        if not math.isfinite(self._target):
            raise NonFiniteError("NaN or Inf in what the experts read or answer")
        #: With all that is to be answered by the experts that run.
        self._given = replace(given, index=index, answers=answers, lost=None)
        biases = biases_for(given.biases, self._layer, given.x.dtype)
        gate, up, down = (biases.get(f"{kind}_bias") for kind in KINDS)
        self._biases = gate, up, down
        #: The gradients of a step, and by name: where those of the next go.
        self._room: Gradients | None = None
        self._found: Mapping[str, Array] = {}

    def solve(self, steps: int, **options: Any) -> LayerDistillation:
        every = np.arange(len(self._given.x))
        start = self._lost(every)
        found = descend(
            self._weights, self._slopes, lambda: self._lost(self._held), self.seen,
            steps=steps, whole=self._target_held, **options,
        )  # fmt: skip
        for name, array in self._weights.items():
            array[...] = found.weights[name]
        end = self._lost(every)
        stored = (
            in_dtype(p, old.dtype) if old.dtype is not None else p
            for p, old in zip(self._layer, self._student, strict=True)
        )
        gate, up, down = stored
        scale, scale_held = self._target or 1.0, self._target_held or 1.0
        return LayerDistillation(
            (gate, up, down),
            np.sqrt(np.array([start, end]) / scale),
            [(step, math.sqrt(loss / scale_held)) for step, loss in found.losses],
            found.steps,
        )

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

    def _slopes(self, tokens: Array) -> Mapping[str, Array]:
        rows, aim = self._given.rows(tokens)
        call = self._call(rows)
        dy, saved = call.forward(save=True)
        dy -= aim
        dy /= self._target
        if self._room is None:
            self._room = call.backward(dy, saved, wanted=self._trained)
            self._found = {n: own for kind in self._trained for n, own in _named(kind, self._room)}
        else:
            call.backward(dy, saved, out=self._room, add=False)
        return self._found

    def _call(self, rows: tuple[Array, Array, Array]) -> Call:
        """The student's layer on x, index, weights."""
        given = self._given
        act = given.activation, given.alpha, given.limit
        return Call.of(*rows, self._layer, self._biases, act, self._vectors)

    def _lost(self, tokens: Array) -> float:
        total = 0.0
        for some in pieces(tokens):
            rows, aim = self._given.rows(some)
            total += squares(self._call(rows).forward() - aim)
        if not math.isfinite(total):
            raise NonFiniteError("NaN or Inf in what the experts answer")
        return total


def _named(kind: str, found: object) -> Iterator[tuple[str, Array]]:
    own = getattr(found, kind)
    for role in ("private", "shared"):
        for g, array in enumerate(getattr(own, role)):
            if array is not None and array.size:
                yield f"{kind}.{role}.{g}", array
