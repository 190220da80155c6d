"""AdamW over batches of tokens, which never ends worse than it began."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import index
from typing import Any, Protocol

import numpy as np

from molae.errors import NonFiniteError, NumericalError
from molae.fit.adamw import AdamW, cosine
from molae.fit.arguments import Array
from molae.fit.sums import squares

__all__ = ["HELD_OUT", "Descended", "Keeper", "descend", "parted", "steps_of"]

#: One token in so many is held out, and tells where a descent was best.
HELD_OUT = 16

#: Tokens of a step, at most, and the share of the steps in which the rate rises.
BATCH, WARMUP = 1024, 0.05

#: So many looks at the tokens held out without a gain end a descent early.
PATIENCE = 4

#: A loss so many times what there is to lose is no longer coming back.
DIVERGED = 100.0


class Keeper(Protocol):
    """Where the state of a descent is kept, so that a later run goes on from it."""

    def load(self) -> tuple[dict[str, Array], dict[str, Any]] | None:
        """What was kept of this very descent: arrays by name, and facts; None of nothing."""

    def due(self) -> bool:
        """Whether it is time to keep a state."""

    def save(self, arrays: Mapping[str, Array], facts: Mapping[str, Any]) -> None:
        """Keep this one in the place of the last."""


@dataclass(eq=False)
class Descended:
    """Where a descent has come to.

    Attributes
    ----------
    weights : dict of str to ndarray
        The best ones: those at the start, or at one of the looks at the tokens held out.
    losses : list of (int, float)
        Steps done at each look, and the loss there.
    steps : int
        That were done.
    """

    weights: dict[str, Array]
    losses: list[tuple[int, float]] = field(default_factory=list)
    steps: int = 0

    @property
    def least(self) -> float:
        return min(loss for _, loss in self.losses)

    @property
    def strikes(self) -> int:
        """Looks since the best one."""
        values = [loss for _, loss in self.losses]
        return len(values) - 1 - values.index(min(values))


def parted(N: int) -> tuple[Array, Array]:
    """Numbers of the tokens that are fitted, and of those held out."""
    held = np.arange(N) % HELD_OUT == HELD_OUT - 1
    return np.flatnonzero(~held), np.flatnonzero(held)


def steps_of(epochs: int, seen: Array) -> int:
    """Steps in so many passes over the tokens that are fitted."""
    return epochs * _per_epoch(seen)


def descend(
    weights: Mapping[str, Array],
    slopes: Callable[[Array], Mapping[str, Array]],
    lost: Callable[[], float],
    seen: Array,
    *,
    steps: int,
    rate: float,
    seed: int,
    weight_decay: float = 0.0,
    max_norm: float | None = None,
    whole: float = math.inf,
    keeper: Keeper | None = None,
    told: Callable[[int, int, float], object] | None = None,
) -> Descended:
    """The best weights that some passes over the tokens find.

    Parameters
    ----------
    weights : mapping of str to ndarray
        Where it begins; changed in place, and what `slopes` and `lost` look at.
    slopes : callable
        Of some of the tokens the loss's gradient by each array.
    lost : callable
        The loss on tokens held out; looked at after each pass, and at the end.
    seen : (n,) ndarray of int
        The others.
    steps : int
        At most; `PATIENCE` looks in a row without a gain are the end.
    rate : float
        In root mean squares of what each array begins with; it falls on a cosine.
    seed : int
        Of the order of the tokens.
    weight_decay, max_norm
        As `AdamW` has them.
    whole : float
        What `lost` would be of weights that do nothing; far more is an error.
    keeper : Keeper, optional
        With it a descent that was interrupted goes on to the same bytes.
    told : callable, optional
        Is told steps done, steps in all, and the last loss.

    Raises
    ------
    NonFiniteError, NumericalError
        The loss is NaN or Inf, or `DIVERGED` times the whole; the step is named.
    """
    rates = {n: rate * math.sqrt(squares(w) / max(w.size, 1)) for n, w in weights.items()}
    descent = AdamW(weights, weight_decay=weight_decay, max_norm=max_norm)
    kept = None if keeper is None else keeper.load()
    taken = None if kept is None else _taken_up(*kept, descent)
    found = Descended({}) if taken is None else taken
    if taken is None:
        _look(found, weights, lost, whole)
    batches = _Batches(seen, seed)
    for step in range(found.steps, steps):
        if told is not None:
            told(step, steps, found.losses[-1][1])
        share = cosine(step, steps, int(WARMUP * steps))
        try:
            slope = slopes(batches.at(step))
            descent.step(slope, {name: share * own for name, own in rates.items()})
        except NonFiniteError as error:
            raise NonFiniteError(f"step {step + 1}: {error}; take a smaller rate") from error
        found.steps = step + 1
        if found.steps % batches.per_epoch == 0 or found.steps == steps:
            _look(found, weights, lost, whole)
            if found.strikes >= PATIENCE:
                break
        if keeper is not None and keeper.due():
            keeper.save(*_set_down(found, descent))
    return found


def _look(
    found: Descended, weights: Mapping[str, Array], lost: Callable[[], float], whole: float
) -> None:
    """At the tokens held out; the best weights are remembered."""
    try:
        now = lost()
    except NonFiniteError as error:
        raise NonFiniteError(f"step {found.steps}: {error}; take a smaller rate") from error
    if found.losses and now > DIVERGED * max(whole, found.losses[0][1]):
        raise NumericalError(
            f"step {found.steps}: the loss is {now / found.losses[0][1]:.3g} times what it was at "
            "first; take a smaller rate"
        )
    if not found.losses or now < found.least:
        found.weights = {name: array.copy() for name, array in weights.items()}
    found.losses.append((found.steps, now))


class _Batches:
    """Which tokens a step sees; each pass over them has an order of its own."""

    def __init__(self, seen: Array, seed: int) -> None:
        self._seen, self._rng = seen, np.random.default_rng(seed)
        self.per_epoch = _per_epoch(seen)
        self._epoch = -1
        self._parts: list[Array] = []

    def at(self, step: int) -> Array:
        while self._epoch < step // self.per_epoch:  # orders of earlier passes are drawn too
            order = self._rng.permutation(self._seen)
            self._epoch += 1
            self._parts = np.array_split(order, self.per_epoch)
        return self._parts[step % self.per_epoch]


def _per_epoch(seen: Array) -> int:
    return max(1, -(-len(seen) // BATCH))


# ------------------------------------------------------------------ what is kept

_NOW, _BEST, _FIRST, _SECOND = "now/", "best/", "mean/", "square/"


def _set_down(found: Descended, descent: AdamW) -> tuple[dict[str, Array], dict[str, Any]]:
    arrays = {}
    for name, w in descent.weights.items():
        arrays[_NOW + name], arrays[_BEST + name] = w, found.weights[name]
        arrays[_FIRST + name], arrays[_SECOND + name] = descent.moments[name]
    return arrays, {"steps": found.steps, "losses": found.losses}


def _taken_up(
    arrays: Mapping[str, Array], facts: Mapping[str, Any], descent: AdamW
) -> Descended | None:
    """None, and nothing touched, where what was kept is damaged: then it is begun anew."""
    try:
        steps = index(facts["steps"])
        losses = [(index(step), float(loss)) for step, loss in facts["losses"]]
    except (LookupError, TypeError, ValueError):
        return None
    if steps < 0 or not losses or not np.isfinite([loss for _, loss in losses]).all():
        return None
    for name, w in descent.weights.items():
        for prefix in (_NOW, _BEST, _FIRST, _SECOND):
            own = arrays.get(prefix + name)
            if own is None or (own.shape, own.dtype) != (w.shape, w.dtype):
                return None
    for name, w in descent.weights.items():
        w[...] = arrays[_NOW + name]
        for mine, prefix in zip(descent.moments[name], (_FIRST, _SECOND), strict=True):
            mine[...] = arrays[prefix + name]
    descent.steps = steps
    best = {name: np.array(arrays[_BEST + name]) for name in descent.weights}
    return Descended(best, losses, steps)
