"""What forward saves, and the gradients that backward gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

__all__ = ["Gradients", "ProjectionGradients", "Saved"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Saved:
    """What backward needs of a forward call, in the working type.

    Rows are in expert order within each 2,048 tokens; rows of sentinels hold anything.

    Attributes
    ----------
    gate, up : (N K, F) ndarray
        Before the activation, biases included.
    z_gate, z_up : (N, width) ndarray
        Latent rows of the inputs. Width: `Projection.width`.
    u : (N, width) ndarray
        Latent rows of the outputs.
    """

    gate: Array
    up: Array
    z_gate: Array
    z_up: Array
    u: Array

    def _core(self) -> tuple[Array, ...]:
        return (self.gate, self.up, self.z_gate, self.z_up, self.u)


@dataclass(frozen=True, eq=False)
class ProjectionGradients:
    """Gradients of a `Projection`, shaped as its `private` and `shared`; None: not wanted."""

    private: tuple[Array | None, ...]
    shared: tuple[Array | None, ...]


@dataclass(frozen=True, eq=False)
class Gradients:
    """Gradients of a layer in the working type; None: not wanted.

    `gate`, `up` and `down` are arrays for dense weights given as arrays, else
    `ProjectionGradients`. `embeddings` are those of compressed experts.
    """

    x: Array | None = None
    top_k_weights: Array | None = None
    gate: Array | ProjectionGradients | None = None
    up: Array | ProjectionGradients | None = None
    down: Array | ProjectionGradients | None = None
    gate_bias: Array | None = None
    up_bias: Array | None = None
    down_bias: Array | None = None
    embeddings: Array | None = None
