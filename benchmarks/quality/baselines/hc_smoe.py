"""HC-SMoE (arXiv 2410.08589): experts merged whose mean outputs are near each other.

Hierarchical clustering with average linkage on the Euclidean distances of the experts' mean
outputs over the calibration text; each cluster becomes its experts' mean, by how often the
router chose them. The router stays.
"""

from __future__ import annotations

import numpy as np

from benchmarks.quality.layer import Array, Compressed, Layer, OutOfReach

__all__ = ["average_linkage", "clusters", "compress"]

#: Tokens, spread over the text, that every expert is run on.
TOKENS = 4096


def compress(layer: Layer, size: float) -> Compressed:
    """A whole number of clusters."""
    E = layer.num_experts
    count = int(size * E + 1e-9)
    if count < 1:
        raise OutOfReach("not one expert is left")
    label = clusters(layer, count)
    counts = layer.counts.astype(np.float64)
    weights = {kind: W.copy() for kind, W in layer.weights.items()}
    for c in np.unique(label):
        (some,) = np.nonzero(label == c)
        share = counts[some] if counts[some].sum() > 0 else np.ones(len(some))
        for kind, W in layer.weights.items():
            weights[kind][some] = np.tensordot(share / share.sum(), W[some], 1)
    stored = layer.numbers // E * len(np.unique(label))
    return Compressed.of(weights, stored, f"{len(np.unique(label))} experts")


def clusters(layer: Layer, count: int) -> Array:
    """(E,) number of each expert's cluster."""
    E = layer.num_experts
    if count >= E:
        return np.arange(E)
    x = layer.x[:: max(1, len(layer.x) // TOKENS)]
    mean = [(layer.hidden(e, x) @ layer.weights["down_proj"][e].T).mean(axis=0) for e in range(E)]
    return average_linkage(np.array(mean, dtype=np.float64), count)


def average_linkage(points: Array, count: int) -> Array:
    """(n,) cluster of each point: the two whose members are nearest on average become one, until
    `count` are left."""
    apart = np.linalg.norm(points[:, None] - points[None], axis=2)
    found = [[i] for i in range(len(points))]
    while len(found) > count:
        pairs = [(i, j) for j in range(len(found)) for i in range(j)]
        i, j = min(pairs, key=lambda pair: apart[np.ix_(found[pair[0]], found[pair[1]])].mean())
        found[i] += found.pop(j)
    label = np.zeros(len(points), dtype=np.int64)
    for number, members in enumerate(found):
        label[members] = number
    return label
