"""Activations of gated experts."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from molae import _core
from molae.errors import ArgumentError
from molae.ops.arrays import contiguous
from molae.threads import get_num_threads

__all__ = ["ACTIVATIONS", "Activation", "activate", "activation_number"]

Array = npt.NDArray[Any]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "swiglu_clamped"]

#: Activations by name, in the order of ``molae_activation`` in ``csrc/molae.h``.
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "swiglu_clamped")


def activate(
    gate: Array,
    up: Array,
    *,
    activation: Activation = "silu",
    alpha: float = 1.702,
    limit: float = 7.0,
    slopes: bool = False,
) -> Any:
    """The intermediate of an expert, ``h = act(gate) · up``, number by number.

    Parameters
    ----------
    gate, up : ndarray of float32 or float64
        Of one shape, such as `Saved` has them.
    activation, alpha, limit
        As in `experts_forward`.
    slopes : bool
        Give the derivatives of h by gate and by up too.

    Returns
    -------
    ndarray, or three
        h; with `slopes` (h, dgate, dup).

    Raises
    ------
    ShapeError, ArgumentError
        Arrays of different shapes or dtypes, or an activation that there is not.

    Examples
    --------
    >>> import numpy as np, molae
    >>> h, dgate, dup = molae.ops.activate(
    ...     np.array([1.0, -1.0]), np.array([2.0, 3.0]), activation="relu", slopes=True)
    >>> h.tolist(), dgate.tolist(), dup.tolist()
    ([2.0, 0.0], [2.0, 0.0], [1.0, 0.0])
    """
    kind = activation_number(activation)
    gate, up = contiguous(np.asarray(gate)), contiguous(np.asarray(up))
    outs = tuple(_core.empty(gate.shape, gate.dtype) for _ in range(3 if slopes else 1))
    _core.activate(outs, gate, up, kind, float(alpha), float(limit), get_num_threads())
    return outs if slopes else outs[0]


def activation_number(name: str) -> int:
    """As ``csrc/molae.h`` counts them."""
    if name not in ACTIVATIONS:
        raise ArgumentError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS.index(name)
