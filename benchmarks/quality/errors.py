"""What a method does to the weights and, to first order, to what they answer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from benchmarks.quality.layer import Array, Compressed, Layer

__all__ = ["output_error", "weight_error"]


def weight_error(layers: Sequence[Layer], found: Sequence[Compressed]) -> float:
    """Relative Frobenius error, root mean square over layers and matrix types."""
    squares = []
    for layer, other in zip(layers, found, strict=True):
        for kind, W in layer.weights.items():
            gap = W.astype(np.float64) - other.weights[kind]
            squares.append(np.square(gap).sum() / np.square(W, dtype=np.float64).sum())
    return math.sqrt(float(np.mean(squares)))


def output_error(layers: Sequence[Layer], found: Sequence[Compressed]) -> float:
    """The same of what each matrix answers to what its expert reads, by routing weight.

    ``Σ_i tr((W_i − Ŵ_i) C_i (W_i − Ŵ_i)ᵀ)`` over ``Σ_i tr(W_i C_i W_iᵀ)`` with
    ``C_i = Σ g² x xᵀ`` over the calibration text's tokens of expert i.
    """
    squares = []
    for layer, other in zip(layers, found, strict=True):
        for kind, W in layer.weights.items():
            lost = total = 0.0
            for e in range(layer.num_experts):
                C = layer.moment(kind, e, weighted=True)
                lost += _energy(W[e] - other.weights[kind][e], C)
                total += _energy(W[e], C)
            squares.append(lost / total)
    return math.sqrt(float(np.mean(squares)))


def _energy(W: Array, C: Array) -> float:
    W = W.astype(np.float64)
    return float(np.sum((W @ C) * W))
