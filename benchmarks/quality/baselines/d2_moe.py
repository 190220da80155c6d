"""D2-MoE (arXiv 2502.17298): a base that all experts share, and what each differs by, whitened
and cut off.

The base is the experts' mean by their Fisher information (their equation 4): here the mean
square of the loss's gradient by the matrix. The differences go through SVD-LLM's truncation
(their equation 7). The base is kept whole; their pruning of it is another, further step.
"""

from __future__ import annotations

import numpy as np

from benchmarks.quality.baselines.svd_llm import truncate
from benchmarks.quality.layer import Compressed, Layer, OutOfReach

__all__ = ["compress"]


def compress(layer: Layer, size: float) -> Compressed:
    """Each type F D numbers for the base and R (F + D) for each expert."""
    E, F, D = layer.weights["gate_proj"].shape
    rank = min(int((size * E - 1) * F * D / (E * (F + D))), F, D)
    if rank < 1:
        raise OutOfReach(f"a base and rank 1 store more than {size:g}")
    weights = {}
    for kind, W in layer.weights.items():
        share = layer.fisher[kind].astype(np.float64)
        share = share / share.sum() if share.sum() > 0 else np.full(E, 1 / E)
        base = np.tensordot(share, W.astype(np.float64), 1)
        weights[kind] = np.stack(
            [
                (base + truncate(W[e] - base, layer.moment(kind, e), rank)).astype(W.dtype)
                for e in range(E)
            ]
        )
    return Compressed.of(weights, 3 * (F * D + E * rank * (F + D)), f"rank {rank}")
