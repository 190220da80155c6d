"""AdamW over batches of tokens, which never ends worse than it began."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from molae.fit.adamw import AdamW, cosine
from molae.fit.arguments import Array
from molae.fit.sums import squares

__all__ = ["HELD_OUT", "descend", "parted"]

#: One token in so many is held out, and tells where a descent was best.
HELD_OUT = 16

#: Tokens of a step, at most, and the share of the steps in which the rate rises.
BATCH, WARMUP = 1024, 0.05


def parted(N: int) -> tuple[Array, Array]:
    """Numbers of the tokens that are fitted, and of those held out."""
    held = np.arange(N) % HELD_OUT == HELD_OUT - 1
    return np.flatnonzero(~held), np.flatnonzero(held)


def descend(
    weights: Mapping[str, Array],
    slopes: Callable[[Array], Mapping[str, Array]],
    lost: Callable[[], float],
    seen: Array,
    *,
    epochs: int,
    rate: float,
    seed: int,
) -> dict[str, Array]:
    """The best weights that some passes over the tokens find.

    Parameters
    ----------
    weights : mapping of str to ndarray
        Where it begins; changed in place, and what `slopes` and `lost` look at.
    slopes : callable
        Of some of the tokens the loss's gradient by each array.
    lost : callable
        The loss on tokens held out.
    seen : (n,) ndarray of int
        The others.
    epochs : int
    rate : float
        In root mean squares of what each array begins with; it falls on a cosine.
    seed : int
        Of the order of the tokens.

    Returns
    -------
    dict of str to ndarray
        Copies: those at the start, or after the pass with the least loss.
    """
    rates = {n: rate * math.sqrt(squares(w) / max(w.size, 1)) for n, w in weights.items()}
    per_epoch = max(1, -(-len(seen) // BATCH))
    steps, rng = epochs * per_epoch, np.random.default_rng(seed)
    descent = AdamW(weights)
    best, least = _copied(weights), lost()
    for epoch in range(epochs):
        order = rng.permutation(seen)
        for i, tokens in enumerate(np.array_split(order, per_epoch)):
            share = cosine(epoch * per_epoch + i, steps, int(WARMUP * steps))
            descent.step(slopes(tokens), {name: share * own for name, own in rates.items()})
        if (now := lost()) < least:
            best, least = _copied(weights), now
    return best


def _copied(weights: Mapping[str, Array]) -> dict[str, Array]:
    return {name: array.copy() for name, array in weights.items()}
