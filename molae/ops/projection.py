"""The experts' matrices of one role, dense or latent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from molae.errors import ArgumentError, ShapeError
from molae.ops.routing import as_partition, group_numbers

if TYPE_CHECKING:
    from molae.fit import SharedFactors

__all__ = ["Projection", "Weights", "latent_width"]

Array = npt.NDArray[Any]
Form = Literal["gauge", "plain"]


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
        groups = as_partition(self.groups, E)
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
        return latent_width(self.ranks, K)

    @cached_property
    def _group_of(self) -> Array:
        return group_numbers(self.groups, self.num_experts)

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


def latent_width(ranks: Iterable[int | None], K: int) -> int:
    """Latent numbers of a token that goes to K experts of groups of these ranks, at most."""
    some = [rank for rank in ranks if rank]
    return min(sum(some), K * max(some, default=0))
