"""Arrays that are made when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

__all__ = ["LazyArrays"]


class LazyArrays(Sequence[np.ndarray]):
    """A sequence of arrays, each made anew whenever it is asked for; none is kept.

    Parameters
    ----------
    count : int
    make : callable
        Of a number from 0 to `count` - 1.

    Examples
    --------
    >>> import numpy as np
    >>> from molae.io import LazyArrays
    >>> squares = LazyArrays(4, lambda i: np.array([i * i]))
    >>> squares[3], len(squares[1:]), [a.item() for a in squares.some([2, 0])]
    (array([9]), 3, [4, 0])
    """

    def __init__(self, count: int, make: Callable[[int], np.ndarray]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.some(range(self._count)[index])
        return self._make(range(self._count)[index])

    def some(self, numbers: Iterable[int]) -> LazyArrays:
        """Those of these numbers, in this order."""
        chosen = list(numbers)
        return LazyArrays(len(chosen), lambda i: self._make(chosen[i]))
