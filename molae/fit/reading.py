"""What the experts of a layer read in a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from molae import _core
from molae.errors import ShapeError
from molae.fit.sums import squares
from molae.ops import Activation, Projection, latent_experts_forward, route
from molae.ops.call import ROLES
from molae.threads import get_num_threads

__all__ = [
    "CHUNK",
    "Biases",
    "Layer",
    "LayerInput",
    "Routed",
    "answer_error",
    "biases_for",
    "pieces",
]

Array = npt.NDArray[Any]

#: Gate, up and down.
Layer = tuple[Projection, Projection, Projection]

#: Of gate (E, F), up (E, F) and down (E, D).
Biases = tuple[Array, Array, Array]

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
    answers : (N, D) ndarray, optional
        What its own experts answer, where that is known already; may be mapped.
    left_out : (N,) ndarray of bool, optional
        Tokens that reach no expert here and ask for no answer.
    room : callable, optional
        Given a name and a shape, an array of the dtype of `x` in which a fit may keep what it
        needs several times, such as one in a mapped file; a name that is asked for again may have
        the same array again. Without it such things are made again each time.
    alpha, limit : float
        Of the activation 'swiglu_clamped'.
    biases : tuple of (E, F), (E, F) and (E, D) ndarray, optional
        Of gate, up and down: of its own experts, and of those that are fitted, which keep them.
    """

    x: Array
    index: Array
    weights: Array
    activation: Activation = "silu"
    lost: Array | None = None
    answers: Array | None = None
    left_out: Array | None = None
    room: Callable[[str, tuple[int, ...]], Array] | None = None
    alpha: float = 1.702
    limit: float = 7.0
    biases: Biases | None = None

    @property
    def act(self) -> dict[str, Any]:
        """The activation as `molae.ops.activate` takes it."""
        return {"activation": self.activation, "alpha": self.alpha, "limit": self.limit}

    def how(self, layer: Layer) -> dict[str, Any]:
        """The activation and the biases as a layer of `molae.ops` with these factors takes them."""
        return self.act | biases_for(self.biases, layer, self.x.dtype)

    @property
    def linear_in_up(self) -> bool:
        """Whether a layer's answers are linear in the factors of up."""
        return self.activation != "swiglu_clamped" and self.biases is None

    def first(self, tokens: int) -> LayerInput:
        """The first tokens alone."""

        def cut(rows: Array | None) -> Any:
            return None if rows is None else rows[:tokens]

        return replace(
            self,
            x=cut(self.x),
            index=cut(self.index),
            weights=cut(self.weights),
            lost=cut(self.lost),
            answers=cut(self.answers),
            left_out=cut(self.left_out),
        )

    def without(self, tokens: Array, num_experts: int) -> LayerInput:
        """As if tokens of these numbers were not there."""
        left_out, index = np.zeros(len(self.x), bool), np.array(self.index)
        left_out[tokens] = True
        index[tokens] = num_experts
        return replace(self, index=index, left_out=left_out)

    def chunks(self) -> Iterator[tuple[slice, Array, Array, Array]]:
        """Where in N, x, index, weights: a few tokens at a time, in memory."""
        for at in range(0, len(self.x), CHUNK):
            some = slice(at, min(at + CHUNK, len(self.x)))
            yield some, np.array(self.x[some]), self.index[some], self.weights[some]

    def aims(self, teacher: Layer) -> Iterator[tuple[slice, tuple[Array, Array, Array], Array]]:
        """The same, and what should be answered: `answers`, or what the teacher's experts answer,
        and `lost`."""
        for some, *call in self.chunks():
            x, index, weights = call
            if self.answers is None:
                aim = latent_experts_forward(x, index, weights, *teacher, **self.how(teacher))
            else:
                aim = np.array(self.answers[some])
            if self.lost is not None:
                aim += self.lost[some]
            if self.left_out is not None:
                aim[self.left_out[some]] = 0
            yield some, (x, index, weights), aim

    def rows(self, tokens: Array) -> tuple[tuple[Array, Array, Array], Array]:
        """(x, index, weights) of tokens of these numbers, and their `answers`, in memory."""
        assert self.answers is not None
        call = _taken(self.x, tokens), self.index[tokens], self.weights[tokens]
        return call, _taken(self.answers, tokens)

    def check(self) -> None:
        """Raises ShapeError where `lost` or `answers` are not of the shape of `x`."""
        for name in ("lost", "answers"):
            rows = getattr(self, name)
            if rows is not None and rows.shape != self.x.shape:
                raise ShapeError(
                    f"{name}: expected the shape of x, {self.x.shape}, got {rows.shape}"
                )


def _taken(rows: Array, tokens: Array) -> Array:
    """``rows[tokens]``, in memory."""
    if rows.flags.c_contiguous and rows.flags.aligned:
        return _core.take_rows(np.asarray(rows), tokens, get_num_threads())
    return np.asarray(rows[tokens])


def biases_for(
    biases: Biases | None, layer: Sequence[Projection], dtype: npt.DTypeLike
) -> dict[str, Array]:
    """Biases in the types of the factors that they go with; `dtype` is theirs that have none."""
    if biases is None:
        return {}
    return {
        f"{role}_bias": bias.astype(p.dtype or dtype, copy=False)
        for role, bias, p in zip(ROLES, biases, layer, strict=True)
    }


def pieces(tokens: Array) -> Iterator[Array]:
    """Numbers of tokens, so many at a time as are worked on at once."""
    for at in range(0, len(tokens), CHUNK):
        yield tokens[at : at + CHUNK]


def answer_error(
    given: LayerInput,
    student: Layer,
    teacher: Layer,
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
            latent_experts_forward(rows, index, weights, *layer, **given.how(layer))
            for layer in (student, teacher)
        )
        lost += squares(one - other)
        total += squares(other)
    return math.sqrt(lost / total) if total > 0 else 0.0


@dataclass(frozen=True, eq=False)
class Routed:
    """Rows in expert order, as `Saved` has them of one chunk."""

    token: Array
    expert: Array
    weights: Array

    @classmethod
    def of(cls, index: Array, weights: Array, num_experts: int) -> Routed:
        routing = route(index, num_experts)
        expert = np.repeat(np.arange(num_experts), np.diff(routing.expert_ptr))
        own = weights[routing.token, routing.slot]
        return cls(routing.token, expert[:, None], own[:, None])

    def cut(self, rows: Array) -> Array:
        return rows[: len(self.expert)]
