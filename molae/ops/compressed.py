"""Layers in which some of a token's experts act through light vectors alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from molae.errors import ShapeError
from molae.ops.activation import Activation
from molae.ops.call import Call
from molae.ops.projection import Weights
from molae.ops.results import Gradients, Saved

__all__ = [
    "compressed_experts_backward",
    "compressed_experts_forward",
    "from_authors_layout",
    "to_authors_layout",
]

Array = npt.NDArray[Any]


def compressed_experts_forward(
    x: Array,
    top_k_index: npt.ArrayLike,
    top_k_weights: Array,
    gate: Weights,
    up: Weights,
    down: Weights,
    embeddings: Array,
    num_compressed: int,
    *,
    gate_bias: Array | None = None,
    up_bias: Array | None = None,
    down_bias: Array | None = None,
    activation: Activation = "silu",
    alpha: float = 1.702,
    limit: float = 7.0,
    save: bool = False,
    out: Array | None = None,
) -> Any:
    """One layer in which each token's least important experts do not run.

    Of a token's K experts, in the order of their routing weights (equal ones by number), the first
    K − n run, with their weights as they are. The last n act through their embeddings
    ``(e1, e2, e3)_i`` alone, added up with the shares that they have of their own weights' sum:

    ``θ = Σ share_i (e1, e2, e3)_i``, and an expert that runs gives
    ``W_down (act(W_gate (x ∘ θ1), W_up (x ∘ θ3)) ∘ θ2)``.

    Parameters
    ----------
    x, top_k_index, top_k_weights, gate, up, down, gate_bias, up_bias, down_bias
        As in `latent_experts_forward`.
    embeddings : (E, 3, D) or (E, 2 D + F) ndarray
        e1, e2 and e3 of each expert, of D, F and D numbers. The first layout is that of the
        authors' code, for F ≤ D: of its second row the first F numbers count. The second has no
        gaps. float64 for float64 `x`, else float32 or bfloat16.
    num_compressed : int
        n, 0 to K − 1. 0: the layer as it is, to the bit.
    activation, alpha, limit, save, out
        As in `experts_forward`.

    Returns
    -------
    y : (N, D) ndarray of x's dtype
    saved : Saved
        Only with `save`.

    Raises
    ------
    ShapeError, ArgumentError
        An argument is not as described.

    Notes
    -----
    Flops: those of `latent_experts_forward` for K − n experts a token, and 2 n (2 D + F). Where the
    compressed experts' weights add up to 0 their shares are equal; where all of them are sentinels
    (number E) θ is 1.

    References
    ----------
    Compressed experts, arXiv 2503.00634.

    Examples
    --------
    With embeddings of ones it is the same experts without the compressed ones:

    >>> import numpy as np, molae
    >>> rng = np.random.default_rng(0)
    >>> gate, up, down = (rng.standard_normal((4, *s)) for s in ((8, 16), (8, 16), (16, 8)))
    >>> x, index = rng.standard_normal((2, 16)), [[0, 1], [2, 3]]
    >>> g = np.array([[0.7, 0.3], [0.2, 0.8]])
    >>> y = molae.ops.compressed_experts_forward(
    ...     x, index, g, gate, up, down, np.ones((4, 3, 16)), 1)
    >>> main = molae.ops.experts_forward(
    ...     x, [[0], [3]], np.array([[0.7], [0.8]]), gate, up, down)
    >>> bool(np.allclose(y, main))
    True
    """
    layer, biases = (gate, up, down), (gate_bias, up_bias, down_bias)
    act, compressed = (activation, alpha, limit), (embeddings, num_compressed)
    call = Call.of(x, top_k_index, top_k_weights, layer, biases, act, compressed)
    return call.forward(save=save, out=out)


def compressed_experts_backward(
    dy: Array,
    saved: Saved,
    x: Array,
    top_k_index: npt.ArrayLike,
    top_k_weights: Array,
    gate: Weights,
    up: Weights,
    down: Weights,
    embeddings: Array,
    num_compressed: int,
    *,
    gate_bias: Array | None = None,
    up_bias: Array | None = None,
    down_bias: Array | None = None,
    activation: Activation = "silu",
    alpha: float = 1.702,
    limit: float = 7.0,
    wanted: Sequence[str] | None = None,
    out: Gradients | None = None,
    add: bool = True,
) -> Gradients:
    """Gradients of ``Σ dy · y`` of `compressed_experts_forward`.

    Parameters
    ----------
    dy, saved, wanted, out, add
        As in `latent_experts_backward`; 'embeddings' is one more of what may be wanted.
    x, top_k_index, top_k_weights, gate, up, down, embeddings, num_compressed
        As forward had them.
    gate_bias, up_bias, down_bias, activation, alpha, limit
        As forward had them.

    Returns
    -------
    Gradients
        Weights of compressed experts have theirs by way of their shares. That of numbers that do
        not count is 0.

    Raises
    ------
    ShapeError, ArgumentError
        An argument is not as described.

    Examples
    --------
    >>> import numpy as np, molae
    >>> rng = np.random.default_rng(0)
    >>> gate, up, down = (rng.standard_normal((4, *s)) for s in ((8, 16), (8, 16), (16, 8)))
    >>> args = (rng.standard_normal((2, 16)), [[0, 1], [2, 3]], np.array([[0.7, 0.3], [0.2, 0.8]]),
    ...         gate, up, down, np.ones((4, 3, 16)), 1)
    >>> y, saved = molae.ops.compressed_experts_forward(*args, save=True)
    >>> d = molae.ops.compressed_experts_backward(y, saved, *args)
    >>> d.embeddings.shape, bool(d.embeddings[0].any()), bool(d.embeddings[1].any())
    ((4, 3, 16), False, True)
    """
    layer, biases = (gate, up, down), (gate_bias, up_bias, down_bias)
    act, compressed = (activation, alpha, limit), (embeddings, num_compressed)
    call = Call.of(x, top_k_index, top_k_weights, layer, biases, act, compressed)
    return call.backward(dy, saved, wanted=wanted, out=out, add=add)


def to_authors_layout(embeddings: Array, hidden_size: int) -> Array:
    """Embeddings (E, 2 D + F) as (E, 3, D), for F ≤ D.

    Parameters
    ----------
    embeddings : (E, 2 D + F) ndarray
    hidden_size : int
        D.

    Returns
    -------
    (E, 3, D) ndarray
        Numbers that do not count are 1, as they are before any training.

    Raises
    ------
    ShapeError
        F is less than 1 or above D.

    Examples
    --------
    >>> import numpy as np, molae
    >>> wide = molae.ops.to_authors_layout(np.arange(8.0)[None], 3)
    >>> wide.tolist()
    [[[0.0, 1.0, 2.0], [3.0, 4.0, 1.0], [5.0, 6.0, 7.0]]]
    >>> molae.ops.from_authors_layout(wide, 2).tolist()
    [[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]]
    """
    D, F = hidden_size, embeddings.shape[-1] - 2 * hidden_size
    if embeddings.ndim != 2 or not 1 <= F <= D:
        raise ShapeError(
            f"embeddings: expected (E, 2 D + F) with 1 <= F <= D={D}, got {embeddings.shape}"
        )
    wide = np.ones((len(embeddings), 3, D), embeddings.dtype)
    wide[:, 0], wide[:, 1, :F], wide[:, 2] = np.split(embeddings, [D, D + F], axis=1)
    return wide


def from_authors_layout(embeddings: Array, intermediate_size: int) -> Array:
    """Embeddings (E, 3, D) as (E, 2 D + F), without the numbers that do not count.

    Parameters
    ----------
    embeddings : (E, 3, D) ndarray
    intermediate_size : int
        F.

    Returns
    -------
    (E, 2 D + F) ndarray

    Raises
    ------
    ShapeError
        Another shape, or F above D.

    Examples
    --------
    See `to_authors_layout`.
    """
    F = intermediate_size
    if embeddings.ndim != 3 or embeddings.shape[1] != 3 or not 1 <= F <= embeddings.shape[2]:
        raise ShapeError(f"embeddings: expected (E, 3, D) with D >= F={F}, got {embeddings.shape}")
    e1, e2, e3 = embeddings[:, 0], embeddings[:, 1, :F], embeddings[:, 2]
    return np.concatenate([e1, e2, e3], axis=1)
