"""Narrow experts that stand for full ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from molae.errors import ShapeError
from molae.ops.activation import Activation
from molae.ops.layers import experts_forward, latent_experts_forward
from molae.ops.projection import Projection
from molae.ops.routing import as_index, split_slots

__all__ = ["NarrowExperts", "narrow_experts_forward"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class NarrowExperts:
    """Of each expert one of m units, which answers in its place where it is compressed.

    Parameters
    ----------
    gate, up : (E, m, D) ndarray
        m may be 0: then only the bias is left, an additive vector.
    down : (E, D, m) ndarray
    bias : (E, D) ndarray
        Of down, or the additive vector.
    gate_bias, up_bias : (E, m) ndarray, optional
        Both or neither: of experts that stand for such as have biases.

    Raises
    ------
    ShapeError
        Arrays that do not belong together.

    Notes
    -----
    6 m D + D operations a row, where a full expert has 6 F D.

    Examples
    --------
    >>> import numpy as np, molae
    >>> wide, tall = np.ones((4, 3, 8)), np.ones((4, 8, 3))
    >>> narrow = molae.ops.NarrowExperts(wide, wide, tall, np.zeros((4, 8)))
    >>> narrow.num_experts, narrow.units, narrow.numbers
    (4, 3, 320)
    """

    gate: Array
    up: Array
    down: Array
    bias: Array
    gate_bias: Array | None = None
    up_bias: Array | None = None

    def __post_init__(self) -> None:
        E, m, D = self.gate.shape if self.gate.ndim == 3 else (0, 0, 0)
        want = {"gate": (E, m, D), "up": (E, m, D), "down": (E, D, m), "bias": (E, D)}
        if (self.gate_bias is None) != (self.up_bias is None):
            raise ShapeError("gate_bias, up_bias: expected both or neither")
        if self.gate_bias is not None:
            want |= {"gate_bias": (E, m), "up_bias": (E, m)}
        for name, shape in want.items():
            own = getattr(self, name)
            if own.shape != shape or own.ndim < 2:
                raise ShapeError(
                    f"{name}: expected {shape if E else '(E, m, D)'}, as of gate, got {own.shape}"
                )

    @classmethod
    def of(cls, arrays: Mapping[str, Array]) -> NarrowExperts:
        """From `arrays`."""
        E, D = arrays["bias"].shape
        nothing = np.empty((E, 0, D), arrays["bias"].dtype)
        gate, up = (arrays.get(name, nothing) for name in ("gate", "up"))
        down = arrays.get("down", nothing.reshape(E, D, 0))
        biases = arrays.get("gate_bias"), arrays.get("up_bias")
        return cls(gate, up, down, arrays["bias"], *biases)

    @property
    def num_experts(self) -> int:
        return len(self.gate)

    @property
    def units(self) -> int:
        """m."""
        return self.gate.shape[1]

    @property
    def numbers(self) -> int:
        """How many are stored."""
        return sum(array.size for array in self.arrays.values())

    @property
    def arrays(self) -> Mapping[str, Array]:
        """By name; what there is none of is left out."""
        found = {
            "gate": self.gate, "up": self.up, "down": self.down, "bias": self.bias,
            "gate_bias": self.gate_bias, "up_bias": self.up_bias,
        }  # fmt: skip
        return {name: array for name, array in found.items() if array is not None and array.size}

    @property
    def biases(self) -> dict[str, Any]:
        """As `experts_forward` takes them."""
        return {"gate_bias": self.gate_bias, "up_bias": self.up_bias, "down_bias": self.bias}

    def forward(
        self,
        x: Array,
        index: Array,
        weights: Array,
        activation: Activation = "silu",
        alpha: float = 1.702,
        limit: float = 7.0,
    ) -> Array:
        """y (N, D), their own answers summed by routing weight; arguments as of
        `experts_forward`."""
        if self.units:
            y: Array = experts_forward(
                x, index, weights, self.gate, self.up, self.down, **self.biases,
                activation=activation, alpha=alpha, limit=limit,
            )  # fmt: skip
            return y
        rows = np.concatenate([self.bias, np.zeros_like(self.bias[:1])])
        y = np.zeros_like(x)
        for k in range(index.shape[1]):
            y += (weights[:, k, None] * rows[index[:, k]]).astype(y.dtype)
        return y


def narrow_experts_forward(
    x: Array,
    top_k_index: npt.ArrayLike,
    top_k_weights: Array,
    gate: Array | Projection,
    up: Array | Projection,
    down: Array | Projection,
    narrow: NarrowExperts,
    num_compressed: int,
    *,
    gate_bias: Array | None = None,
    up_bias: Array | None = None,
    down_bias: Array | None = None,
    activation: Activation = "silu",
    alpha: float = 1.702,
    limit: float = 7.0,
    out: Array | None = None,
) -> Array:
    """One layer in which each token's least important experts are stood for by narrow ones.

    Of a token's K experts, in the order of their routing weights (equal ones by number), the first
    K − n run; of the last n their narrow experts do, with the same weights.

    Parameters
    ----------
    x, top_k_index, top_k_weights, gate, up, down, gate_bias, up_bias, down_bias
        As in `latent_experts_forward`; the biases are of the experts that run.
    narrow : NarrowExperts
        With biases of their own.
    num_compressed : int
        n, 0 to K − 1. 0: the layer as it is, to the bit.
    activation, alpha, limit, out
        As in `experts_forward`; of the narrow experts too.

    Returns
    -------
    (N, D) ndarray of x's dtype

    Raises
    ------
    ShapeError, ArgumentError
        An argument is not as described.

    Notes
    -----
    Gradients: the answer is the sum of those of two layers, on the two halves that `split_slots`
    gives, and each has its backward pass.

    Examples
    --------
    With all of their experts' units they are the experts:

    >>> import numpy as np, molae
    >>> rng = np.random.default_rng(0)
    >>> gate, up, down = (rng.standard_normal((4, *s)) for s in ((8, 16), (8, 16), (16, 8)))
    >>> x, index = rng.standard_normal((2, 16)), [[0, 1], [2, 3]]
    >>> g = np.array([[0.7, 0.3], [0.2, 0.8]])
    >>> same = molae.ops.NarrowExperts(gate, up, down, np.zeros((4, 16)))
    >>> y = molae.ops.narrow_experts_forward(x, index, g, gate, up, down, same, 1)
    >>> bool(np.allclose(y, molae.ops.experts_forward(x, index, g, gate, up, down)))
    True
    """
    index = as_index(top_k_index)
    main, aux = split_slots(index, top_k_weights, narrow.num_experts, num_compressed)
    y: Array = latent_experts_forward(
        x, main, top_k_weights, gate, up, down, gate_bias=gate_bias, up_bias=up_bias,
        down_bias=down_bias, activation=activation, alpha=alpha, limit=limit, out=out,
    )  # fmt: skip
    if num_compressed:
        y += narrow.forward(x, aux, top_k_weights, activation, alpha, limit)
    return y
