"""What private factors are measured by in a refit: what conditions it, and what holds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from molae import _core
from molae.fit.basis import ungauge
from molae.fit.layer_moments import LayerMoments, inner_products
from molae.ops import Projection
from molae.threads import get_num_threads

__all__ = ["FactorMetric", "RowMetric", "bases", "latent_grams", "moments_product", "row_metric"]

Array = npt.NDArray[Any]

#: What `_core.moments_product` does.
ROOT, SOLVE, TIMES, PROJECT = range(4)

#: Ridge of metrics that need none but for rounding.
TINY = 1e-9


@dataclass(frozen=True, eq=False)
class RowMetric:
    """What conditions a fit of up, of each expert; see `row_metric`.

    Attributes
    ----------
    rows : dict of int to (F, F) ndarray
        By expert: how the layer's output feels errors of its rows.
    latent : dict of int to (R, R) ndarray
        By expert: ``B C Bᵀ``, the moments of what its private factor reads.
    """

    rows: Mapping[int, Array]
    latent: Mapping[int, Array | None]

    def joined(self, other: RowMetric) -> RowMetric:
        """Of the experts of both."""
        return RowMetric({**self.rows, **other.rows}, {**self.latent, **other.latent})


def row_metric(moments: LayerMoments, up: Projection) -> RowMetric:
    """What `refit` needs to fit up, from moments that may then be let go.

    Parameters
    ----------
    moments : LayerMoments
        Of some experts, or of all.
    up : Projection
        Of the whole layer; latent groups of rank 1 or more, or dense ones.

    Examples
    --------
    >>> import numpy as np
    >>> from molae.fit import LayerInput, layer_moments, row_metric
    >>> from molae.ops import Projection
    >>> rng = np.random.default_rng(0)
    >>> gate, up, down = (Projection.dense(rng.standard_normal((2, 3, 3))) for _ in range(3))
    >>> given = LayerInput(rng.standard_normal((9, 3)), np.arange(18).reshape(9, 2) % 2,
    ...                    np.full((9, 2), 0.5))
    >>> metric = row_metric(layer_moments(given, gate, up, down), up)
    >>> metric.rows[1].shape, metric.latent[0].shape
    ((3, 3), (3, 3))
    """
    C = dict(zip(moments.experts, moments.x.moment, strict=True))
    latent: dict[int, Array | None] = {}
    for group, B in zip(up.groups, bases(up), strict=True):
        some = [e for e in group if e in C]
        if B is None:
            latent.update((e, C[e]) for e in some)
        elif some:
            B = np.ascontiguousarray(B, dtype=C[some[0]].dtype)
            out = [np.empty((len(B), len(B)), B.dtype) for _ in some]
            metrics = [C[e] for e in some]
            moments_product(PROJECT, out, [B] * len(some), metrics)
            latent.update(zip(some, out, strict=True))
    return RowMetric(dict(zip(moments.experts, moments.row_metric["up_proj"], strict=True)), latent)


class FactorMetric:
    """What private factors of up (F, R), or of down (R, F), are measured by.

    Written for up, with S_i on the side of F and L_i on the other, it holds A_i by
    ``h_i tr(A_i L_i A_iᵀ)``, ``h_i = hold tr(S_i) / F``, and takes for its inverse that of
    ``A_i ↦ (S_i + h_i I) A_i L_i``. For down all is turned.

    Parameters
    ----------
    which : {'up', 'down'}
    rows : sequence of (F, F) ndarray
        S_i; an expert that no row has reached has zeros, and its inverse gives zeros. Not kept.
    latent : sequence of (R, R) ndarray or None
        L_i; None: the identity.
    hold : float

    Notes
    -----
    Cholesky factors are found once, in float64. Those of S_i, which the ridge makes tame, are kept
    and used in their own dtype, those of L_i in float64.
    """

    def __init__(
        self,
        which: Literal["up", "down"],
        rows: Sequence[Array],
        latent: Sequence[Array | None],
        hold: float,
    ) -> None:
        self._up = which == "up"
        self._levels = [hold * float(S.trace(dtype=np.float64)) / len(S) for S in rows]
        self._rows = _roots(rows, hold, rows[0].dtype) if rows else []
        self._latent = list(latent)
        distinct = {id(L): L for L in latent if L is not None}
        found: dict[int, Array] = {}
        for some in _by_size(list(distinct.values())):
            roots = _roots([L for _, L in some], TINY, np.float64)
            found.update((id(L), U) for (_, L), U in zip(some, roots, strict=True))
        self._latent_roots = [None if L is None else found[id(L)] for L in latent]

    def held(self, factors: Sequence[Array]) -> list[Array]:
        """Gradient of half of what holds the factors."""
        found = [np.array(a) for a in factors]
        self._on_latent_side(TIMES, found, factors, self._latent)
        for a, level in zip(found, self._levels, strict=True):
            a *= level
        return found

    def solved(self, gradient: Sequence[Array]) -> list[Array]:
        """The inverse's image."""
        found = [np.empty_like(g) for g in gradient]
        moments_product(SOLVE, found, list(gradient), self._rows, left=self._up)
        self._on_latent_side(SOLVE, found, found, self._latent_roots)
        return found

    def _on_latent_side(
        self, op: int, out: list[Array], factors: Sequence[Array], metrics: Sequence[Array | None]
    ) -> None:
        """Those of the identity are left as they are in `out`."""
        for some in _by_size(metrics):
            at = [n for n, _ in some]
            moments_product(
                op,
                [out[n] for n in at],
                [factors[n] for n in at],
                [m for _, m in some],
                left=not self._up,
            )


def _by_size(metrics: Sequence[Array | None]) -> list[list[tuple[int, Array]]]:
    """Places and matrices of each size, but for None."""
    found: dict[int, list[tuple[int, Array]]] = {}
    for n, m in enumerate(metrics):
        if m is not None:
            found.setdefault(len(m), []).append((n, m))
    return [found[size] for size in sorted(found)]


def _roots(metrics: Sequence[Array], ridge: float, dtype: npt.DTypeLike) -> list[Array]:
    out = [np.empty(m.shape, dtype) for m in metrics]
    moments_product(ROOT, out, [], list(metrics), ridge=ridge)
    return out


def moments_product(
    op: int,
    out: list[Array],
    factors: list[Array],
    metrics: list[Array],
    *,
    left: bool = False,
    ridge: float = 0.0,
) -> None:
    if metrics:
        _core.moments_product(op, left, out, factors, metrics, ridge, get_num_threads())


def latent_grams(p: Projection) -> dict[int, Array | None]:
    """``B Bᵀ`` by expert; None for dense ones."""
    found: dict[int, Array | None] = {}
    for group, B in zip(p.groups, bases(p), strict=True):
        gram = None if B is None else inner_products(np.ascontiguousarray(B.T))
        found.update(dict.fromkeys(group, gram))
    return found


def bases(p: Projection) -> list[Array | None]:
    """The shared factor of each latent group, written out, as stored; None for the others."""
    bases: list[Array | None] = []
    for rank, shared, perm in zip(p.ranks, p.shared, p.perm, strict=True):
        if not rank:
            bases.append(None)
            continue
        assert shared is not None
        wide = shared.astype(np.promote_types(shared.dtype, np.float32))
        if p.form == "gauge":
            assert perm is not None
            wide = ungauge(wide, perm)
        bases.append(wide)
    return bases
