"""One call of a layer: its arguments as C takes them, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from molae import _core
from molae.errors import ArgumentError, ShapeError
from molae.ops.activation import activation_number
from molae.ops.arrays import contiguous
from molae.ops.projection import Projection, Weights
from molae.ops.results import Gradients, ProjectionGradients, Saved
from molae.ops.routing import as_index
from molae.threads import get_num_threads

__all__ = ["ROLES", "Call", "layer_sizes"]

Array = npt.NDArray[Any]

ROLES = ("gate", "up", "down")

#: What of `Saved` a call may find there, with its number in ``molae_experts_known``.
KNOWN = {"gate": 1, "up": 2, "z_up": 4}


@dataclass(frozen=True, eq=False)
class Call:
    """A layer and its input.

    Attributes
    ----------
    core : tuple
        As ``_core`` takes them.
    weights, biases : dict
        By role.
    F, K : int
    embeddings : ndarray or None
        Of compressed experts.
    """

    core: tuple[Any, ...]
    weights: Mapping[str, Weights]
    biases: Mapping[str, Array | None]
    F: int
    K: int
    embeddings: Array | None = None

    @classmethod
    def of(
        cls,
        x: Array,
        top_k_index: npt.ArrayLike,
        top_k_weights: Array,
        layer: tuple[Weights, Weights, Weights],
        layer_biases: tuple[Array | None, Array | None, Array | None],
        act: tuple[str, float, float],
        compressed: tuple[Array, int] | None = None,
    ) -> Call:
        """Of gate, up and down, their biases, (activation, alpha, limit), and of compressed
        experts the embeddings and how many they are."""
        weights = dict(zip(ROLES, layer, strict=True))
        biases = dict(zip(ROLES, layer_biases, strict=True))
        activation, alpha, limit = act
        number = activation_number(activation)
        x = contiguous(np.asarray(x))
        index = as_index(top_k_index)
        E, F = layer_sizes(*layer)
        if compressed is not None:
            compressed = contiguous(np.asarray(compressed[0])), int(compressed[1])
        core = (
            x,
            index,
            contiguous(np.asarray(top_k_weights)),
            *(
                W._core(biases[role], x)
                if isinstance(W, Projection)
                else _dense_core(W, biases[role])
                for role, W in weights.items()
            ),
            E,
            F,
            number,
            float(alpha),
            float(limit),
            compressed,
        )
        embeddings = None if compressed is None else compressed[0]
        return cls(core, weights, biases, F, index.shape[1], embeddings)

    @property
    def x(self) -> Array:
        x: Array = self.core[0]
        return x

    @property
    def work(self) -> np.dtype[Any]:
        """The type that is computed in."""
        return np.dtype(np.float64) if self.x.dtype == np.float64 else np.dtype(np.float32)

    def forward(
        self, *, save: bool | Saved = False, known: Sequence[str] = (), out: Array | None = None
    ) -> Any:
        """y, or y and what is saved."""
        saved = save if isinstance(save, Saved) else self._room() if save else None
        if not set(known) <= set(KNOWN) or (known and not isinstance(save, Saved)):
            raise ArgumentError(f"known: expected some of {', '.join(KNOWN)}, and save with them")
        y = np.empty(self.x.shape, self.x.dtype) if out is None else out
        flags = sum(KNOWN[name] for name in set(known))
        kept = saved._core() if saved else None
        _core.experts_forward(y, kept, flags, self.core, get_num_threads(), False)
        return (y, saved) if saved else y

    def _room(self) -> Saved:
        N, work = len(self.x), self.work
        widths = (
            W.width(self.K) if isinstance(W, Projection) else 0 for W in self.weights.values()
        )
        return Saved(
            _core.empty((N * self.K, self.F), work),
            _core.empty((N * self.K, self.F), work),
            *(_core.empty((N, width), work) for width in widths),
        )

    def backward(
        self,
        dy: Array,
        saved: Saved,
        *,
        wanted: Sequence[str] | None = None,
        out: Gradients | None = None,
        add: bool = True,
    ) -> Gradients:
        """What is wanted, or what is not None in `out`, which is added to or overwritten."""
        if out is not None and wanted is not None:
            raise ArgumentError("wanted: what is not None in out is computed; give one of the two")
        d = self._unset(wanted) if out is None else out
        for role in ROLES:
            if getattr(d, f"{role}_bias") is not None and self.biases[role] is None:
                raise ArgumentError(f"d{role}_bias: there is no {role}_bias")
        grads = (
            d.x,
            d.top_k_weights,
            *(
                (*_grads_of(role, W, getattr(d, role)), getattr(d, f"{role}_bias"))
                for role, W in self.weights.items()
            ),
            d.embeddings,
        )
        _core.experts_backward(
            grads,
            out is None or not add,
            contiguous(np.asarray(dy)),
            saved._core(),
            self.core,
            get_num_threads(),
            False,
        )
        return d

    def _unset(self, wanted: Sequence[str] | None) -> Gradients:
        """Arrays for the gradients that are wanted."""
        names = [f.name for f in fields(Gradients)]
        here = {
            **dict.fromkeys(names, True),
            "embeddings": self.embeddings is not None,
            **{f"{role}_bias": bias is not None for role, bias in self.biases.items()},
        }
        if wanted is None:
            wanted = [name for name in names if here[name]]
        for name in wanted:
            if name not in names:
                raise ArgumentError(f"wanted: expected among {', '.join(names)}, got {name!r}")

        def empty(a: Array | None) -> Array | None:
            return None if a is None else _core.empty(a.shape, self.work)

        made: dict[str, Any] = {}
        for name in wanted:
            if name in ROLES:
                W = self.weights[name]
                made[name] = (
                    ProjectionGradients(
                        private=tuple(empty(a) for a in W.private),
                        shared=tuple(empty(a) for a in W.shared),
                    )
                    if isinstance(W, Projection)
                    else empty(W)
                )
            elif name.endswith("_bias"):
                made[name] = empty(self.biases[name[:-5]])
            elif name == "embeddings":
                made[name] = empty(self.embeddings)
            else:
                made[name] = empty(self.x if name == "x" else self.core[2])
        return Gradients(**made)


def layer_sizes(gate: Weights, up: Weights, down: Weights) -> tuple[int, int]:
    """E and F; where all ranks are 0 and nothing tells, F is 1."""
    inner: list[int] = []
    counts: list[int] = []
    for role, W in zip(ROLES, (gate, up, down), strict=True):
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
    return counts[0], inner[0] if inner else 1


def _dense_core(W: Array, bias: Array | None) -> tuple[Any, ...]:
    E = len(W)
    group_of, rank = np.zeros(E, dtype=np.int64), np.array([-1], dtype=np.int64)
    return (list(W), group_of, rank, (None,), (None,), False, W, bias)


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
