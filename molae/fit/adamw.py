"""AdamW on NumPy arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from molae import _core
from molae.errors import ArgumentError, ShapeError
from molae.threads import get_num_threads

__all__ = ["AdamW", "cosine"]

Array = npt.NDArray[Any]


class AdamW:
    """Adam with decoupled weight decay, on arrays that it changes in place.

    Parameters
    ----------
    weights : mapping of str to ndarray
        All float32 or all float64, C-contiguous.
    betas : (float, float)
    eps : float
    weight_decay : float
        A step of rate lr takes ``lr · weight_decay`` of each weight away.
    max_norm : float, optional
        Gradients whose norm over all arrays is above it are scaled down to it.

    Attributes
    ----------
    weights : dict of str to ndarray
    steps : int
        Taken so far.
    moments : dict of str to (ndarray, ndarray)
        The two running means of each array. With `steps` they are all there is to keep.

    References
    ----------
    Loshchilov and Hutter, Decoupled weight decay regularization, arXiv 1711.05101, algorithm 2.

    Examples
    --------
    >>> import numpy as np
    >>> from molae.fit import AdamW
    >>> w = np.array([3.0, -2.0])
    >>> descent = AdamW({"w": w})
    >>> for _ in range(200):
    ...     _ = descent.step({"w": 2 * (w - 1)}, lr=0.1)
    >>> bool(np.abs(w - 1).max() < 0.01)
    True
    """

    def __init__(
        self,
        weights: Mapping[str, Array],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_norm: float | None = None,
    ) -> None:
        if max_norm is not None and not max_norm > 0:
            raise ArgumentError(f"max_norm: expected more than 0, got {max_norm}")
        self.weights = dict(weights)
        self.steps = 0
        self.moments = {n: (np.zeros_like(w), np.zeros_like(w)) for n, w in self.weights.items()}
        self._betas, self._eps, self._decay, self._max_norm = betas, eps, weight_decay, max_norm

    def step(self, gradients: Mapping[str, Array], lr: float | Mapping[str, float]) -> float:
        """Move all weights once.

        Parameters
        ----------
        gradients : mapping of str to ndarray
            Of the weights' shapes and dtypes.
        lr : float or mapping of str to float
            Of all arrays, or of each.

        Returns
        -------
        float
            The gradients' norm, before it was clipped.

        Raises
        ------
        NonFiniteError
            NaN or Inf in a gradient; nothing was moved.
        ShapeError, ArgumentError
            Other names, shapes or dtypes than the weights have, or numbers out of range.
        """
        for name, w in self.weights.items():
            if name not in gradients or gradients[name].shape != w.shape:
                raise ShapeError(f"gradients: expected one of shape {w.shape} for {name}")
        means = [self.moments[name] for name in self.weights]
        norm = _core.adamw(
            list(self.weights.values()),
            [m for m, _ in means],
            [v for _, v in means],
            [gradients[name] for name in self.weights],
            [lr if isinstance(lr, float | int) else lr[name] for name in self.weights],
            *self._betas, self._eps, self._decay, self._max_norm or 0.0, self.steps + 1,
            get_num_threads(),
        )  # fmt: skip
        self.steps += 1
        return norm


def cosine(step: int, steps: int, warmup: int = 0) -> float:
    """The share of its rate that a step of 0 to steps − 1 has: up from 0 over the first `warmup`,
    then down to 0 on half a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))
