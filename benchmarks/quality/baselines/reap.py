"""REAP (arXiv 2510.13999): experts pruned by what the router's weights make of their outputs.

Equation 9: ``S_j = mean over the tokens of expert j of g_j(x) ‖f_j(x)‖₂``; those with the least
go, and the router chooses among the rest.
"""

from __future__ import annotations

import numpy as np

from benchmarks.quality.layer import Array, Compressed, Layer, OutOfReach

__all__ = ["compress", "saliency"]


def compress(layer: Layer, size: float) -> Compressed:
    """A whole number of experts is kept."""
    E, K = layer.num_experts, layer.index.shape[1]
    count = int(size * E + 1e-9)
    if count < K:
        raise OutOfReach(f"{count} experts are fewer than the {K} of a token")
    kept = np.zeros(E, bool)
    kept[np.argsort(-saliency(layer), kind="stable")[:count]] = True
    weights = {kind: W * kept[:, None, None] for kind, W in layer.weights.items()}
    return Compressed.of(weights, layer.numbers // E * count, f"{count} experts", kept)


def saliency(layer: Layer) -> Array:
    """(E,); 0 for an expert that no token chose."""
    found = np.zeros(layer.num_experts)
    for e in range(layer.num_experts):
        x, g = layer.rows(e)
        if len(x):
            y = layer.hidden(e, x) @ layer.weights["down_proj"][e].T
            found[e] = float(np.mean(g * np.linalg.norm(y, axis=1)))
    return found
