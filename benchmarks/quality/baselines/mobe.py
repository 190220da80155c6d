"""MoBE (arXiv 2508.05257): mixtures of basis experts, for gate and up.

``W_i = A_i f(Σ_j α_ij B_j)`` with A_i (F, F), bases B_j (F, D) shared by all experts of a layer,
α_i a softmax and f the SiLU; fitted to the weights, which are brought to variance 1 before, by
Adam. down_proj stays as it is, as in the paper.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from benchmarks.quality.layer import Array, Compressed, Layer, OutOfReach

__all__ = ["RATE", "STEPS", "compress", "fit"]

#: Steps of Adam, and its rate, which falls to zero as a cosine.
STEPS, RATE = 2000, 0.07


def compress(layer: Layer, size: float, steps: int = STEPS) -> Compressed:
    """As many bases as the size allows: E F F + m F D + E m numbers for gate and for up."""
    E, F, D = layer.weights["gate_proj"].shape
    left = (size * layer.numbers - E * F * D) / 2 - E * F * F
    m = min(int(left / (F * D + E)), E)
    if m < 1:
        least = (E * F * D + 2 * (E * F * F + F * D + E)) / layer.numbers
        raise OutOfReach(f"reaches no less than {least:.3g}")
    weights = dict(layer.weights)
    for kind in ("gate_proj", "up_proj"):
        weights[kind] = fit(layer.weights[kind], m, steps=steps, seed=layer.seed)
    stored = E * F * D + 2 * (E * F * F + m * F * D + E * m)
    return Compressed.of(weights, stored, f"{m} bases")


def fit(W: Array, m: int, *, steps: int, seed: int) -> Array:
    """What m bases make of W (E, F, D)."""
    E, F, D = W.shape
    generator = torch.Generator().manual_seed(seed)
    target = torch.from_numpy(np.array(W, dtype=np.float32))
    scale = target.std()
    target = target / scale
    A = (torch.randn(E, F, F, generator=generator) / F**0.5).requires_grad_()
    B = torch.randn(m, F, D, generator=generator).requires_grad_()
    mix = torch.randn(E, m, generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([A, B, mix], lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))

    def made() -> torch.Tensor:
        basis = (torch.softmax(mix, dim=1) @ B.view(m, F * D)).view(E, F, D)
        return A @ functional.silu(basis)

    for _ in range(steps):
        optimizer.zero_grad()
        functional.mse_loss(made(), target).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return np.asarray((made() * scale).numpy(), dtype=W.dtype)
