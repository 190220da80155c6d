"""Layers of routed experts, dense and latent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from molae import _core
from molae.errors import ArgumentError
from molae.ops.activation import Activation
from molae.ops.call import Call
from molae.ops.projection import Weights
from molae.ops.results import Gradients, Saved

__all__ = [
    "experts_backward",
    "experts_forward",
    "latent_experts_backward",
    "latent_experts_forward",
    "release_scratch",
]

Array = npt.NDArray[Any]


def experts_forward(
    x: Array,
    top_k_index: npt.ArrayLike,
    top_k_weights: Array,
    gate: Array,
    up: Array,
    down: Array,
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
    """One layer of dense experts.

    Parameters
    ----------
    x : (N, D) ndarray
    top_k_index : (N, K) array_like of int
        Experts of each token; E means none.
    top_k_weights : (N, K) ndarray of the working type
    gate, up : (E, F, D) ndarray
        Views whose last two axes are contiguous are read where they lie: of a fused
        ``gate_up`` (E, 2F, D) pass ``gate_up[:, :F]`` and ``gate_up[:, F:]``.
    down : (E, D, F) ndarray
    gate_bias, up_bias, down_bias : (E, F), (E, F), (E, D) ndarray, optional
        Of the dtype of their weights.
    activation : {'silu', 'gelu', 'gelu_tanh', 'relu', 'relu2', 'swiglu_clamped'}
        ``act(gate) · up``; for the last, gpt-oss's, ``(up + 1) · gate · sigmoid(alpha · gate)``
        with gate cut at `limit` and up at ±`limit`.
    alpha, limit : float
        Of 'swiglu_clamped'.
    save : bool
        Also give what backward needs.
    out : (N, D) ndarray, optional
        To write into: contiguous, of x's dtype, overlapping no other array.

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
    6 F D flops a row; the weights of experts that have rows are read once for each 2,048 tokens.
    `save` keeps 2 N K F numbers: 268 MB at N=4096, K=8, F=1024 in float32. Results do not depend
    on the number of threads.

    Examples
    --------
    >>> import numpy as np, molae
    >>> x = np.array([[1.0, 2.0]])
    >>> one = np.ones((3, 1, 2))                    # E=3, F=1, D=2
    >>> molae.ops.experts_forward(x, [[2]], np.array([[0.5]]), one, one,
    ...                           np.ones((3, 2, 1)), activation="relu")
    array([[4.5, 4.5]])
    """
    for name, W in (("gate", gate), ("up", up), ("down", down)):
        if not isinstance(W, np.ndarray):
            raise ArgumentError(f"{name}: expected an array; latent_experts_forward takes others")
    return latent_experts_forward(
        x,
        top_k_index,
        top_k_weights,
        gate,
        up,
        down,
        gate_bias=gate_bias,
        up_bias=up_bias,
        down_bias=down_bias,
        activation=activation,
        alpha=alpha,
        limit=limit,
        save=save,
        out=out,
    )


def latent_experts_forward(
    x: Array,
    top_k_index: npt.ArrayLike,
    top_k_weights: Array,
    gate: Weights,
    up: Weights,
    down: Weights,
    *,
    gate_bias: Array | None = None,
    up_bias: Array | None = None,
    down_bias: Array | None = None,
    activation: Activation = "silu",
    alpha: float = 1.702,
    limit: float = 7.0,
    save: bool | Saved = False,
    known: Sequence[str] = (),
    out: Array | None = None,
) -> Any:
    """One layer of experts with shared latent factors, dense ones among them at will.

    Parameters
    ----------
    gate, up, down : Projection or ndarray
        An array is dense, as in `experts_forward`. Partitions may differ.
    x, top_k_index, top_k_weights, gate_bias, up_bias, down_bias
        As in `experts_forward`.
    activation, alpha, limit, out
        As in `experts_forward`.
    save : bool or Saved
        Give what backward needs too, or leave it in these arrays.
    known : sequence of str
        Which of 'gate', 'up' and 'z_up' the arrays in `save` have already, from a call with the
        same `x`, `top_k_index` and factors behind them: they are taken as they are. With 'gate'
        z_gate is left as it was, with 'up' z_up.

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
    Flops: 2 F R a row and latent projection, and once a token and group 2 R D, in gauge form
    2 R (D − R). Experts' outputs are added in latent space, in expert order.

    References
    ----------
    MoLAE, arXiv 2503.23100. Gauge form: ``docs/theory.md``.

    Examples
    --------
    >>> import numpy as np, molae
    >>> rng = np.random.default_rng(0)
    >>> gate, up = rng.standard_normal((2, 4, 8, 16))
    >>> down = rng.standard_normal((4, 16, 8))
    >>> p = molae.ops.Projection.from_factors(molae.fit.factor_shared(gate, 16))
    >>> x, index = rng.standard_normal((3, 16)), [[0, 1], [2, 3], [1, 3]]
    >>> g = np.full((3, 2), 0.5)
    >>> y = molae.ops.latent_experts_forward(x, index, g, p, up, down)
    >>> bool(np.allclose(y, molae.ops.experts_forward(x, index, g, gate, up, down)))
    True
    """
    layer, biases = (gate, up, down), (gate_bias, up_bias, down_bias)
    act = activation, alpha, limit
    call = Call.of(x, top_k_index, top_k_weights, layer, biases, act)
    return call.forward(save=save, known=known, out=out)


def experts_backward(
    dy: Array,
    saved: Saved,
    x: Array,
    top_k_index: npt.ArrayLike,
    top_k_weights: Array,
    gate: Array,
    up: Array,
    down: Array,
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
    """Gradients of ``Σ dy · y`` of `experts_forward`.

    Parameters
    ----------
    dy : (N, D) ndarray of x's dtype
    saved : Saved
        From `experts_forward` with the same arguments.
    wanted : sequence of str, optional
        Fields of `Gradients` to compute. Default: all that there are.
    out : Gradients, optional
        Arrays to add to, in place of new ones; its fields that are None are not computed.
    add : bool
        False: what is in `out` is overwritten.
    x, top_k_index, top_k_weights, gate, up, down, gate_bias, up_bias, down_bias
        As forward had them.
    activation, alpha, limit
        As forward had them.

    Returns
    -------
    Gradients
        In the working type: float32 for bfloat16.

    Raises
    ------
    ShapeError, ArgumentError
        An argument is not as described.

    Notes
    -----
    At most twice forward's flops. Scratch of 3 F numbers a row, for 2,048 tokens at a time. Each
    gradient is summed in one order, whatever the number of threads.

    Examples
    --------
    >>> import numpy as np, molae
    >>> x, one, two = np.array([[1.0, 2.0]]), np.ones((3, 1, 2)), np.ones((3, 2, 1))
    >>> g = np.array([[0.5]])
    >>> y, saved = molae.ops.experts_forward(x, [[2]], g, one, one, two,
    ...                                      activation="relu", save=True)
    >>> d = molae.ops.experts_backward(np.ones_like(y), saved, x, [[2]], g, one, one, two,
    ...                                activation="relu", wanted=["x", "top_k_weights"])
    >>> d.x, d.top_k_weights
    (array([[6., 6.]]), array([[18.]]))
    """
    for name, W in (("gate", gate), ("up", up), ("down", down)):
        if not isinstance(W, np.ndarray):
            raise ArgumentError(f"{name}: expected an array; latent_experts_backward takes others")
    return latent_experts_backward(
        dy,
        saved,
        x,
        top_k_index,
        top_k_weights,
        gate,
        up,
        down,
        gate_bias=gate_bias,
        up_bias=up_bias,
        down_bias=down_bias,
        activation=activation,
        alpha=alpha,
        limit=limit,
        wanted=wanted,
        out=out,
        add=add,
    )


def latent_experts_backward(
    dy: Array,
    saved: Saved,
    x: Array,
    top_k_index: npt.ArrayLike,
    top_k_weights: Array,
    gate: Weights,
    up: Weights,
    down: Weights,
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
    """Gradients of ``Σ dy · y`` of `latent_experts_forward`.

    Parameters
    ----------
    dy, saved, wanted, out, add
        As in `experts_backward`. In `out` single arrays of a `ProjectionGradients` may be None.
    x, top_k_index, top_k_weights, gate, up, down, gate_bias, up_bias, down_bias
        As forward had them.
    activation, alpha, limit
        As forward had them.

    Returns
    -------
    Gradients
        In gauge form ``shared`` is the gradient of M; the identity has none.

    Raises
    ------
    ShapeError, ArgumentError
        An argument is not as described.

    Examples
    --------
    >>> import numpy as np, molae
    >>> rng = np.random.default_rng(0)
    >>> gate, up = rng.standard_normal((2, 4, 8, 16))
    >>> down = rng.standard_normal((4, 16, 8))
    >>> p = molae.ops.Projection.from_factors(molae.fit.factor_shared(gate, 5))
    >>> args = rng.standard_normal((3, 16)), [[0, 1], [2, 3], [1, 3]], np.full((3, 2), 0.5)
    >>> y, saved = molae.ops.latent_experts_forward(*args, p, up, down, save=True)
    >>> d = molae.ops.latent_experts_backward(y, saved, *args, p, up, down)
    >>> d.x.shape, d.gate.private[0].shape, d.gate.shared[0].shape, d.down.shape
    ((3, 16), (4, 8, 5), (5, 11), (4, 16, 8))
    """
    layer, biases = (gate, up, down), (gate_bias, up_bias, down_bias)
    act = activation, alpha, limit
    call = Call.of(x, top_k_index, top_k_weights, layer, biases, act)
    return call.backward(dy, saved, wanted=wanted, out=out, add=add)


def release_scratch() -> None:
    """Give back the memory that layers and factorizations keep from one call to the next.

    Scratch and large results that are gone are kept, up to an eighth of the machine's memory and
    4 GiB, since fresh memory costs time on each call. The next call takes what it needs again.

    Examples
    --------
    >>> import molae
    >>> molae.ops.release_scratch()
    """
    _core.release_scratch()
