"""What acts in the place of compressed experts: how many there are of it, and how it is fitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from molae import fit
from molae.factored import LightModule
from molae.fit import LayerInput
from molae.fit.reading import Layer
from molae.ops import NarrowExperts

__all__ = ["VECTOR_TOKENS", "FittedLight", "Light", "fit_light", "nothing", "spread_counts"]

#: Tokens to which vectors are fitted, and those behind them that are left for a look at what the
#: fit has brought; narrow experts are fitted to all.
VECTOR_TOKENS, LEFT_TOKENS = 8192, 2048

#: What acts in the place of compressed experts, and how many of a token's they are.
Light = tuple[np.ndarray | NarrowExperts, int]


@dataclass(frozen=True, eq=False)
class FittedLight:
    """What acts in the place of one layer's compressed experts.

    Attributes
    ----------
    arrays : dict of str to ndarray
        By role, as stored.
    count : int
        n, how many of a token's experts are compressed.
    error : (3,) ndarray of float64
        As `molae.fit.CompressedFit` or `molae.fit.NarrowFit` has it.
    tokens : int
        To which it was fitted.
    """

    arrays: Mapping[str, np.ndarray]
    count: int
    error: np.ndarray
    tokens: int

    @classmethod
    def stored(cls, arrays: Mapping[str, np.ndarray], count: int) -> FittedLight:
        """What an earlier run has written; how it was fitted the report knows."""
        return cls(arrays, count, np.zeros(3), 0)

    def runnable(self) -> Light:
        """As `molae.ops` takes it: float16 is widened."""
        wide = {role: _readable(array) for role, array in self.arrays.items()}
        own = wide["compressed"] if "compressed" in wide else NarrowExperts.of(wide)
        return own, self.count

    def at_one(self) -> FittedLight:
        """Vectors that change nothing."""
        ones = {role: np.ones_like(array) for role, array in self.arrays.items()}
        return replace(self, arrays=ones, error=np.full(3, self.error[0]))


def fit_light(
    given: LayerInput,
    student: Layer,
    teacher: Layer,
    n: int,
    light: LightModule,
    dtype: npt.DTypeLike,
) -> FittedLight:
    """Fitted to what all of the teacher's experts answer, where of the student's the first K − n
    run; rounded to what is stored."""
    if light.units is None:
        N = len(given.x)
        given = given.first(min(VECTOR_TOKENS, max(N - LEFT_TOKENS, N // 2)))
        vectors = fit.compressed_experts(given, student, n, teacher=teacher)
        arrays, error = {"compressed": vectors.embeddings}, vectors.error
    else:
        narrow = fit.narrow_experts(given, student, n, light.units, teacher=teacher)
        arrays, error = dict(narrow.experts.arrays), narrow.error
    stored = {role: array.astype(dtype) for role, array in arrays.items()}
    return FittedLight(stored, n, error, len(given.x))


def nothing(num_experts: int, hidden_size: int) -> NarrowExperts:
    """Narrow experts that answer 0."""
    return NarrowExperts.of({"bias": np.zeros((num_experts, hidden_size), np.float32)})


def spread_counts(effects: Sequence[Sequence[float]], total: int) -> list[int]:
    """How many experts to compress in each layer, so many in all, at the least sum of effects.

    Parameters
    ----------
    effects : sequence of L sequences of K floats
        Of each layer how far the model's answers move with 0, 1, ... K − 1 of them.
    total : int
        At most L (K − 1).

    Notes
    -----
    The exact minimum, by dynamic programming; of equal ones that which takes more from later
    layers.

    Examples
    --------
    >>> from molae.convert.light import spread_counts
    >>> spread_counts([[0, 1, 5], [0, 2, 3], [0, 9, 9]], 3)
    [1, 2, 0]
    """
    least = np.full(total + 1, np.inf)
    least[0] = 0
    chosen: list[np.ndarray] = []
    for own in effects:
        # (n, sum): with n of this layer's.
        tried = np.full((len(own), total + 1), np.inf)
        for n, effect in enumerate(own[: total + 1]):
            tried[n, n:] = least[: total + 1 - n] + effect
        chosen.append(tried.argmin(axis=0))
        least = tried.min(axis=0)
    counts: list[int] = []
    for best in reversed(chosen):
        counts.append(int(best[total]))
        total -= counts[-1]
    return counts[::-1]


def _readable(array: np.ndarray) -> np.ndarray:
    array = np.require(array, requirements=["C", "A"])
    return array.astype(np.float32) if array.dtype == np.float16 else array
