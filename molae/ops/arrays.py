"""Arrays as C reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["contiguous"]

Array = npt.NDArray[Any]


def contiguous(a: Array) -> Array:
    """`a` itself where C can read it as it is, else a copy."""
    if not a.dtype.isnative:
        a = a.astype(a.dtype.newbyteorder("="))
    return np.require(a, requirements=["C", "A"])
