"""Layers of routed experts, forward and backward: the array API.

NumPy arrays in, NumPy arrays out. One layer is

``y_t = Σ_k g_tk (W_down,i act(W_gate,i x_t + b_gate,i, W_up,i x_t + b_up,i) + b_down,i)``

with the experts ``i = top_k_index[t, k]`` and the weights ``g = top_k_weights``. Each of gate,
up and down is either dense, an array of all experts' matrices, or a `Projection`, whose groups
of experts share a latent factor (see `molae.fit`). A latent layer never rebuilds a matrix: a
token is projected once per group, experts work on the latent rows, and what they give is added
up in latent space before one shared factor lifts it.

Letters: N tokens, K experts of a token, E experts, F expert width, D model width, k experts of
a group, G groups, R rank. An entry E of `top_k_index` is a sentinel: "not here", nothing added.

Arithmetic is float64 for float64 `x`, and float32 for `x` of float32 or
`ml_dtypes.bfloat16`. With float32 arithmetic each projection may be float32 or bfloat16;
gradients of bfloat16 weights are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from molae import _core
from molae.errors import ArgumentError, ShapeError
from molae.threads import get_num_threads

if TYPE_CHECKING:
    from molae.fit import SharedFactors

__all__ = [
    "ACTIVATIONS",
    "Gradients",
    "Projection",
    "ProjectionGradients",
    "Routing",
    "Saved",
    "activate",
    "experts_backward",
    "experts_forward",
    "latent_experts_backward",
    "latent_experts_forward",
    "release_scratch",
    "route",
]

Array = npt.NDArray[Any]
Form = Literal["gauge", "plain"]
Groups = Sequence[Sequence[int]]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "swiglu_clamped"]

#: Activations by name, in the order of ``molae_activation`` in ``csrc/molae.h``.
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "swiglu_clamped")

ROLES = ("gate", "up", "down")

#: What of `Saved` a call may find there, with its number in ``molae_experts_known``.
KNOWN = {"gate": 1, "up": 2, "z_up": 4}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


# -------------------------------------------------------------------- routing


@dataclass(frozen=True, eq=False)
class Routing:
    """Rows of a routed call in expert order, and tokens in group order; see `route`.

    Attributes
    ----------
    expert_ptr : (E + 1,) ndarray of int64
        Expert e has the rows ``expert_ptr[e]`` to ``expert_ptr[e + 1] - 1``.
    token, slot : (rows,) ndarray of int64
        Of each row: ``top_k_index[token, slot]`` is its expert. Ascending within an expert.
    group_ptr : (G + 1,) ndarray of int64, or None
        Group g has ``group_token[group_ptr[g]:group_ptr[g + 1]]``.
    group_token : ndarray of int64, or None
        Tokens of each group, ascending, each once however many of its experts it goes to.
    """

    expert_ptr: Array
    token: Array
    slot: Array
    group_ptr: Array | None
    group_token: Array | None


def route(top_k_index: npt.ArrayLike, num_experts: int, groups: Groups | None = None) -> Routing:
    """Sort the rows of a routed call by expert, and its tokens by group.

    Parameters
    ----------
    top_k_index : (N, K) array_like of int
        Experts of each token, 0 to E; E means no expert. One expert twice gives two rows.
    num_experts : int
        E.
    groups : sequence of sequences of int, optional
        Experts of each group, every expert in exactly one.

    Returns
    -------
    Routing

    Raises
    ------
    ArgumentError
        An index outside 0 to E, or groups that are no partition.
    ShapeError
        `top_k_index` is not a matrix.

    Notes
    -----
    A stable counting sort on one thread: N K reads and writes.

    Examples
    --------
    >>> import molae
    >>> r = molae.ops.route([[2, 0], [2, 1]], 3, groups=[[0, 1], [2]])
    >>> r.token.tolist(), r.expert_ptr.tolist()
    ([0, 1, 0, 1], [0, 1, 2, 4])
    >>> r.group_token.tolist(), r.group_ptr.tolist()
    ([0, 1, 0, 1], [0, 2, 4])
    """
    index = _index(top_k_index)
    group_of, G = None, 0
    if groups is not None:
        partition = _partition(groups, num_experts)
        group_of, G = _group_of(partition, num_experts), len(partition)
    ptr, rows, group_ptr, tokens = _core.route(index, num_experts, group_of, G)
    rows = rows[: ptr[-1]]
    if group_ptr is not None:
        tokens = tokens[: group_ptr[-1]]
    return Routing(ptr, rows // index.shape[1], rows % index.shape[1], group_ptr, tokens)


# ---------------------------------------------------------------- projections


@dataclass(frozen=True, eq=False)
class Projection:
    """The experts' matrices of one role, by groups that are latent or dense.

    For gate and up a latent group has ``W_i = A_i B``, for down ``W_i = Bᵀ A_i``, with its own
    A_i an expert and one B (R, D). Which role it plays is where it is passed.

    Parameters
    ----------
    groups : sequence of sequences of int
        Experts of each group; every expert of 0 to E − 1 in exactly one.
    ranks : sequence of int or None
        Rank of each group; 0: its matrices are zero; None: dense.
    private : sequence of ndarray or None
        Gate and up (k, F, R), down (k, R, F), in the group's order; of a dense group (k, F, D)
        or (k, D, F). Rank 0 may have None. The last two axes contiguous.
    shared : sequence of ndarray or None
        B (R, D), gauge form M (R, D − R) with ``B[:, perm] = [I | M]``. None where there is none.
    perm : sequence of (D,) ndarray of int32 or None
        Gauge form only.
    form : {'gauge', 'plain'}

    Raises
    ------
    ArgumentError, ShapeError
        Not a partition, lists of unequal length, or a `perm` that is no permutation.

    Notes
    -----
    Arrays are kept, not copied.

    Examples
    --------
    >>> import numpy as np, molae
    >>> W = np.random.default_rng(0).standard_normal((4, 8, 16))
    >>> f = molae.fit.factor_shared(W, 3, groups=[[0, 1], [2, 3]])
    >>> p = molae.ops.Projection.from_factors(f)
    >>> p.ranks, p.private[0].shape, p.shared[0].shape
    ((3, 3), (2, 8, 3), (3, 13))
    """

    groups: tuple[tuple[int, ...], ...]
    ranks: tuple[int | None, ...]
    private: tuple[Array | None, ...]
    shared: tuple[Array | None, ...]
    perm: tuple[Array | None, ...] = ()
    form: Form = "gauge"
    dtype: np.dtype[Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        E = sum(len(group) for group in self.groups)
        groups = _partition(self.groups, E)
        G = len(groups)
        values: dict[str, Any] = {
            "groups": groups,
            "ranks": tuple(None if r is None else int(r) for r in self.ranks),
            "private": tuple(self.private),
            "shared": tuple(self.shared),
            "perm": tuple(self.perm) or (None,) * G,
        }
        if self.form not in ("gauge", "plain"):
            raise ArgumentError(f"form: expected gauge or plain, got {self.form!r}")
        for name in ("ranks", "private", "shared", "perm"):
            if len(values[name]) != G:
                raise ShapeError(f"{name}: expected one a group, {G}, got {len(values[name])}")
        for g, (rank, perm) in enumerate(zip(values["ranks"], values["perm"], strict=True)):
            private, k = values["private"][g], len(groups[g])
            if rank is not None and rank < 0:
                raise ArgumentError(f"ranks[{g}]: expected None or 0 and more, got {rank}")
            if private is None and rank != 0:
                raise ArgumentError(f"private[{g}]: missing")
            if private is not None and (private.ndim != 3 or len(private) != k):
                raise ShapeError(
                    f"private[{g}]: expected three axes, the first k={k}, got {private.shape}"
                )
            if perm is not None and not np.array_equal(np.sort(perm), np.arange(len(perm))):
                raise ShapeError(f"perm[{g}]: expected a permutation of 0 to D - 1")
        arrays = [a for a in (*values["private"], *values["shared"]) if a is not None]
        values["dtype"] = arrays[0].dtype if arrays else None
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_factors(cls, factors: SharedFactors) -> Projection:
        """What `molae.fit.factor_shared` found; its arrays are kept, not copied."""
        return cls(
            groups=factors.groups,
            ranks=factors.ranks,
            private=factors.private,
            shared=factors.shared,
            perm=factors.perm,
            form=factors.form,
        )

    @classmethod
    def dense(cls, W: Array) -> Projection:
        """One dense group of all experts: W (E, F, D), for down (E, D, F)."""
        return cls(
            groups=(tuple(range(len(W))),),
            ranks=(None,),
            private=(W,),
            shared=(None,),
            form="plain",
        )

    @classmethod
    def separate(cls, W: Sequence[Array]) -> Projection:
        """Each of E matrices (F, D), for down (D, F), a dense group of its own, where they lie;
        float16 is widened to float32."""
        wide = [np.asarray(w) for w in W]
        if wide[0].dtype == np.float16:
            wide = [w.astype(np.float32) for w in wide]
        E = len(wide)
        return cls(
            groups=tuple((e,) for e in range(E)),
            ranks=(None,) * E,
            private=tuple(np.require(w, requirements=["C", "A"])[None] for w in wide),
            shared=(None,) * E,
        )

    @property
    def num_experts(self) -> int:
        """E."""
        return sum(len(group) for group in self.groups)

    def width(self, K: int) -> int:
        """Latent numbers of a token that goes to K experts, at most: ``min(Σ R, K max R)``."""
        ranks = [rank for rank in self.ranks if rank]
        return min(sum(ranks), K * max(ranks, default=0))

    @cached_property
    def _group_of(self) -> Array:
        return _group_of(self.groups, self.num_experts)

    @cached_property
    def _rank(self) -> Array:
        return np.array([-1 if r is None else r for r in self.ranks], dtype=np.int64)

    @cached_property
    def _by_expert(self) -> list[Array | None]:
        return self._split(self.private)

    def _split(self, per_group: Sequence[Array | None]) -> list[Array | None]:
        """Arrays of each expert out of arrays (k, ...) of each group."""
        found: list[Array | None] = [None] * self.num_experts
        for group, rank, stack in zip(self.groups, self.ranks, per_group, strict=True):
            if stack is not None and rank != 0:
                for e, matrix in zip(group, stack, strict=True):
                    found[e] = matrix
        return found

    def _inner(self, role: str) -> int | None:
        """F, or None where every group has rank 0."""
        axis = 2 if role == "down" else 1
        return next((a.shape[axis] for a in self.private if a is not None), None)

    def _core(self, bias: Array | None, like: Array) -> tuple[Any, ...]:
        return (
            self._by_expert,
            self._group_of,
            self._rank,
            self.shared,
            self.perm,
            self.form == "gauge",
            like if self.dtype is None else np.empty(0, self.dtype),
            bias,
        )


Weights = Array | Projection


# -------------------------------------------------------------------- results


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
    `ProjectionGradients`.
    """

    x: Array | None = None
    top_k_weights: Array | None = None
    gate: Array | ProjectionGradients | None = None
    up: Array | ProjectionGradients | None = None
    down: Array | ProjectionGradients | None = None
    gate_bias: Array | None = None
    up_bias: Array | None = None
    down_bias: Array | None = None


# ----------------------------------------------------------------- activation


def activate(
    gate: Array,
    up: Array,
    *,
    activation: Activation = "silu",
    alpha: float = 1.702,
    limit: float = 7.0,
    slopes: bool = False,
) -> Any:
    """The intermediate of an expert, ``h = act(gate) · up``, number by number.

    Parameters
    ----------
    gate, up : ndarray of float32 or float64
        Of one shape, such as `Saved` has them.
    activation, alpha, limit
        As in `experts_forward`.
    slopes : bool
        Give the derivatives of h by gate and by up too.

    Returns
    -------
    ndarray, or three
        h; with `slopes` (h, dgate, dup).

    Raises
    ------
    ShapeError, ArgumentError
        Arrays of different shapes or dtypes, or an activation that there is not.

    Examples
    --------
    >>> import numpy as np, molae
    >>> h, dgate, dup = molae.ops.activate(
    ...     np.array([1.0, -1.0]), np.array([2.0, 3.0]), activation="relu", slopes=True)
    >>> h.tolist(), dgate.tolist(), dup.tolist()
    ([2.0, 0.0], [2.0, 0.0], [1.0, 0.0])
    """
    if activation not in ACTIVATIONS:
        raise ArgumentError(
            f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )
    gate, up = _contiguous(np.asarray(gate)), _contiguous(np.asarray(up))
    outs = tuple(_core.empty(gate.shape, gate.dtype) for _ in range(3 if slopes else 1))
    kind = ACTIVATIONS.index(activation)
    _core.activate(outs, gate, up, kind, float(alpha), float(limit), get_num_threads())
    return outs if slopes else outs[0]


# -------------------------------------------------------------------- forward


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
    call, (F, K) = _call(
        x,
        top_k_index,
        top_k_weights,
        {"gate": gate, "up": up, "down": down},
        {"gate": gate_bias, "up": up_bias, "down": down_bias},
        (activation, alpha, limit),
    )
    x = call[0]
    saved = None
    if isinstance(save, Saved):
        saved = save
    elif save:
        work, N = _work(x), len(x)
        widths = (_width(W, K) for W in (gate, up, down))
        saved = Saved(
            _core.empty((N * K, F), work),
            _core.empty((N * K, F), work),
            *(_core.empty((N, width), work) for width in widths),
        )
    y = np.empty(x.shape, x.dtype) if out is None else out
    if not set(known) <= set(KNOWN) or (known and not isinstance(save, Saved)):
        raise ArgumentError(f"known: expected some of {', '.join(KNOWN)}, and save with them")
    flags = sum(KNOWN[name] for name in set(known))
    kept = saved._core() if saved else None
    _core.experts_forward(y, kept, flags, call, get_num_threads(), False)
    return (y, saved) if save else y


# ------------------------------------------------------------------- backward


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
) -> Gradients:
    """Gradients of ``Σ dy · y`` of `latent_experts_forward`.

    Parameters
    ----------
    dy, saved, wanted, out
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
    weights = {"gate": gate, "up": up, "down": down}
    biases = {"gate": gate_bias, "up": up_bias, "down": down_bias}
    call, _ = _call(x, top_k_index, top_k_weights, weights, biases, (activation, alpha, limit))
    if out is not None and wanted is not None:
        raise ArgumentError("wanted: what is not None in out is computed; give one of the two")
    d = _unset(call, weights, biases, wanted) if out is None else out
    for role in ROLES:
        if getattr(d, f"{role}_bias") is not None and biases[role] is None:
            raise ArgumentError(f"d{role}_bias: there is no {role}_bias")
    grads = (
        d.x,
        d.top_k_weights,
        *(
            (*_grads_of(role, weights[role], getattr(d, role)), getattr(d, f"{role}_bias"))
            for role in ROLES
        ),
    )
    _core.experts_backward(
        grads,
        out is None,
        _contiguous(np.asarray(dy)),
        saved._core(),
        call,
        get_num_threads(),
        False,
    )
    return d


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


# ------------------------------------------------------------------ arguments


def _index(top_k_index: npt.ArrayLike) -> Array:
    index = np.asarray(top_k_index)
    if index.ndim != 2:
        raise ShapeError(f"top_k_index: expected shape (N, K), got {index.shape}")
    if index.dtype.kind not in "iu" and index.size:
        raise ArgumentError(f"top_k_index: expected whole numbers, got {index.dtype}")
    return np.ascontiguousarray(index, dtype=np.int64)


def _partition(groups: Groups, E: int) -> tuple[tuple[int, ...], ...]:
    partition = tuple(tuple(int(e) for e in group) for group in groups)
    if sorted(e for group in partition for e in group) != list(range(E)) or not all(partition):
        raise ArgumentError(f"groups: expected each expert of 0 to {E - 1} in exactly one group")
    return partition


def _group_of(partition: tuple[tuple[int, ...], ...], E: int) -> Array:
    group_of = np.empty(E, dtype=np.int64)
    for g, group in enumerate(partition):
        group_of[list(group)] = g
    return group_of


def _contiguous(a: Array) -> Array:
    """`a` itself where C can read it as it is, else a copy."""
    if not a.dtype.isnative:
        a = a.astype(a.dtype.newbyteorder("="))
    return np.require(a, requirements=["C", "A"])


def _work(x: Array) -> np.dtype[Any]:
    return np.dtype(np.float64) if x.dtype == np.float64 else np.dtype(np.float32)


def _width(W: Weights, K: int) -> int:
    return W.width(K) if isinstance(W, Projection) else 0


def _dense_core(W: Array, bias: Array | None) -> tuple[Any, ...]:
    E = len(W)
    group_of, rank = np.zeros(E, dtype=np.int64), np.array([-1], dtype=np.int64)
    return (list(W), group_of, rank, (None,), (None,), False, W, bias)


def _call(
    x: Array,
    top_k_index: npt.ArrayLike,
    top_k_weights: Array,
    weights: dict[str, Weights],
    biases: dict[str, Array | None],
    act: tuple[str, float, float],
) -> tuple[tuple[Any, ...], tuple[int, int]]:
    """The tuple that _core takes, and F and K."""
    activation, alpha, limit = act
    if activation not in ACTIVATIONS:
        raise ArgumentError(
            f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )
    x = _contiguous(np.asarray(x))
    index = _index(top_k_index)
    inner: list[int] = []
    counts: list[int] = []
    for role, W in weights.items():
        if isinstance(W, Projection):
            counts.append(W.num_experts)
            F = W._inner(role)
        elif isinstance(W, np.ndarray) and W.ndim == 3:
            counts.append(len(W))
            F = W.shape[2 if role == "down" else 1]
        else:
            want = "(E, D, F)" if role == "down" else "(E, F, D)"
            raise ShapeError(
                f"{role}: expected a Projection or an array {want}, "
                f"got {getattr(W, 'shape', type(W).__name__)}"
            )
        if F is not None:
            inner.append(F)
    if len(set(counts)) != 1:
        raise ShapeError(f"gate, up, down: expected the same number of experts, got {counts}")
    E, F = counts[0], inner[0] if inner else 1
    call = (
        x,
        index,
        _contiguous(np.asarray(top_k_weights)),
        *(
            W._core(biases[role], x) if isinstance(W, Projection) else _dense_core(W, biases[role])
            for role, W in weights.items()
        ),
        E,
        F,
        ACTIVATIONS.index(activation),
        float(alpha),
        float(limit),
    )
    return call, (F, index.shape[1])


def _unset(
    call: tuple[Any, ...],
    weights: dict[str, Weights],
    biases: dict[str, Array | None],
    wanted: Sequence[str] | None,
) -> Gradients:
    """Arrays for the gradients that are wanted."""
    names = [f.name for f in fields(Gradients)]
    if wanted is None:
        wanted = [n for n in names if not n.endswith("_bias") or biases[n[:-5]] is not None]
    for name in wanted:
        if name not in names:
            raise ArgumentError(f"wanted: expected among {', '.join(names)}, got {name!r}")
    work = _work(call[0])

    def empty(a: Array | None) -> Array | None:
        return None if a is None else _core.empty(a.shape, work)

    made: dict[str, Any] = {}
    for name in wanted:
        if name in ROLES:
            W = weights[name]
            made[name] = (
                ProjectionGradients(
                    private=tuple(empty(a) for a in W.private),
                    shared=tuple(empty(a) for a in W.shared),
                )
                if isinstance(W, Projection)
                else empty(W)
            )
        elif name.endswith("_bias"):
            made[name] = empty(biases[name[:-5]])
        else:
            made[name] = empty(call[0] if name == "x" else call[2])
    return Gradients(**made)


def _grads_of(role: str, W: Weights, d: Any) -> tuple[Any, Any]:
    """Per expert and per group, as _core takes them."""
    if d is None:
        return None, None
    if isinstance(W, Projection):
        if not isinstance(d, ProjectionGradients):
            raise ArgumentError(f"d{role}: expected ProjectionGradients for a Projection")
        return W._split(d.private), d.shared
    if not isinstance(d, np.ndarray) or d.shape != W.shape:
        raise ShapeError(f"d{role}: expected an array of the shape of {role}, {W.shape}")
    return list(d), None
