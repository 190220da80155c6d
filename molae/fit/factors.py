"""Factors of groups of experts, and the run that both factorizations share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from molae.errors import ArgumentError
from molae.fit.arguments import (
    Array,
    Form,
    Groups,
    Side,
    Stack,
    check_choice,
    experts,
    partition,
    work_dtype,
)
from molae.fit.basis import ungauge
from molae.fit.spectra import common_kernel_dim, discarded_energy, effective_rank
from molae.threads import get_num_threads

__all__ = ["Found", "Problem", "SharedFactors", "joined"]

#: Eigenvalues of a Gram matrix below this many eps of the largest are rounding.
GRAM_NOISE = 16.0


@dataclass(frozen=True, eq=False)
class SharedFactors:
    """Factors of a stack of experts, group by group, and how good they are.

    Attributes
    ----------
    side : {'input', 'output'}
    form : {'gauge', 'plain'}
    groups : tuple of tuple of int
        Experts of each group.
    ranks : tuple of int
        Rank of each group.
    shape : tuple of int
        (rows, cols) of one expert's matrix.
    shared : tuple of (R, D - R) or (R, D) ndarray
        Gauge form: M, with ``B[:, perm] = [I | M]``. Plain form: B itself.
    perm : tuple of (D,) ndarray of int32, or None
        Gauge form: the permutation. Plain form: None for each group.
    private : tuple of (k, F, R) or (k, R, F) ndarray
        Private factors of a group's experts, input or output side.
    spectrum : tuple of (min(k F, D),) ndarray of float64
        Singular values of the group's stack, descending.
    energy : (E,) ndarray of float64
        Squared Frobenius norm of each expert's matrix.
    error : (E,) ndarray of float64, or None
        Relative Frobenius error of each expert, with the factors as stored.
    group_error : (G,) ndarray of float64, or None
        The same for each group as a whole.
    discarded_energy : (G,) ndarray of float64
        Share of the group's energy beyond its rank: the squared relative error of the
        best factorization (Eckart–Young).
    effective_rank, kernel_dim : (G,) ndarray
        See `effective_rank` and `common_kernel_dim`.
    used_svd : (G,) ndarray of bool
        Where the Gram matrix was too coarse.
    """

    side: Side
    form: Form
    groups: tuple[tuple[int, ...], ...]
    ranks: tuple[int, ...]
    shape: tuple[int, int]
    shared: tuple[Array, ...]
    perm: tuple[Array | None, ...]
    private: tuple[Array, ...]
    spectrum: tuple[Array, ...]
    energy: Array
    error: Array | None
    group_error: Array | None
    discarded_energy: Array
    effective_rank: Array
    kernel_dim: Array
    used_svd: Array

    @property
    def stored_numbers(self) -> int:
        """Numbers in all factors; permutations, which are indices, are not counted."""
        return sum(a.size for a in (*self.shared, *self.private))

    def basis(self, group: int) -> Array:
        """The shared factor B (R, D) of a group, written out."""
        perm = self.perm[group]
        return self.shared[group] if perm is None else ungauge(self.shared[group], perm)

    def reconstruct(self, expert: int) -> Array:
        """The product of an expert's factors, (rows, cols), in working precision."""
        for g, group in enumerate(self.groups):
            if expert in group:
                work = work_dtype(self.private[g].dtype)
                A = self.private[g][group.index(expert)].astype(work)
                B = self.basis(g).astype(work)
                return A @ B if self.side == "input" else B.T @ A
        raise ArgumentError(f"expert: expected 0 to {len(self.energy) - 1}, got {expert!r}")


@dataclass
class Found:
    """What the native functions gave, group by group and expert by expert."""

    shared: list[Array] = field(default_factory=list)
    perm: list[Array | None] = field(default_factory=list)
    private: list[Array] = field(default_factory=list)
    spectrum: list[Array] = field(default_factory=list)
    used_svd: list[bool] = field(default_factory=list)
    energy: Array = field(default_factory=lambda: np.zeros(0))
    residual: Array | None = None


@dataclass(frozen=True)
class Problem:
    """Experts in groups, to be factored.

    Attributes
    ----------
    experts : list of E (rows, cols) ndarray
    groups : tuple of tuple of int
    side : {'input', 'output'}
    times : int
        So many groups in a row are of the same matrices, and are worked on together.
    names : sequence of int, optional
        What errors call the experts; by default their numbers.
    """

    experts: list[Array]
    groups: tuple[tuple[int, ...], ...]
    side: Side
    times: int = 1
    names: Sequence[int] | None = None

    @classmethod
    def of(cls, W: Stack, groups: Groups | None, side: Side) -> Problem:
        matrices = experts(W)
        check_choice("side", side, ("input", "output"))
        return cls(matrices, partition(groups, len(matrices)), side)

    @property
    def shape(self) -> tuple[int, int]:
        """(F, D)."""
        rows, cols = self.experts[0].shape
        return (rows, cols) if self.side == "input" else (cols, rows)

    def solve(
        self,
        native: Callable[..., Any],
        ranks: Sequence[int] | None,
        form: Form,
        errors: bool,
        more: Callable[[list[int]], tuple[Any, ...]] = lambda members: (),
    ) -> Found:
        """Run a native factorization; `more` gives its last arguments for some experts."""
        F, D = self.shape
        found = Found(energy=np.zeros(len(self.experts)))
        residual = np.zeros(len(self.experts))
        for batch in self._batches():
            members = [e for g in batch for e in self.groups[g]]
            shared, perm, private, spectrum, energy, lost, used_svd = native(
                [self.experts[e] for e in members],
                members if self.names is None else [self.names[e] for e in members],
                np.cumsum([0, *(len(self.groups[g]) for g in batch)]),
                None if ranks is None else [ranks[g] for g in batch],
                batch.start,
                self.side == "output",
                form == "gauge",
                errors,
                get_num_threads(),
                *more(members),
            )
            found.energy[members] = energy
            for at, g in enumerate(batch):
                found.spectrum.append(spectrum[at, : min(len(self.groups[g]) * F, D)].copy())
                found.used_svd.append(bool(used_svd[at]))
            if ranks is not None:
                found.shared += shared
                found.perm += perm
                found.private += private
                if errors:
                    residual[members] = lost
        found.residual = residual if errors else None
        return found

    def _batches(self) -> Iterator[range]:
        """Groups that are worked on at once: as many as threads, which bounds the memory.

        Ctrl-C is noticed between batches.
        """
        step = get_num_threads() * self.times
        for start in range(0, len(self.groups), step):
            yield range(start, min(start + step, len(self.groups)))

    def factors(
        self, found: Found, ranks: tuple[int, ...], form: Form, work: np.dtype[Any]
    ) -> SharedFactors:
        """What was found, in public form; `work` is the type that it was computed in."""
        F, D = self.shape
        eps = float(np.finfo(work).eps)
        error = group_error = None
        if found.residual is not None:
            error = _relative(found.residual, found.energy)
            sums = [
                np.array([values[list(group)].sum() for group in self.groups])
                for values in (found.residual, found.energy)
            ]
            group_error = _relative(*sums)
        return SharedFactors(
            side=self.side,
            form=form,
            groups=self.groups,
            ranks=ranks,
            shape=self.experts[0].shape,
            shared=tuple(found.shared),
            perm=tuple(found.perm),
            private=tuple(found.private),
            spectrum=tuple(found.spectrum),
            energy=found.energy,
            error=error,
            group_error=group_error,
            discarded_energy=np.array(
                [discarded_energy(s, r) for s, r in zip(found.spectrum, ranks, strict=True)]
            ),
            effective_rank=np.array([effective_rank(s) for s in found.spectrum]),
            kernel_dim=np.array(
                [
                    common_kernel_dim(s, D, tol=_resolution(len(group) * F, D, eps, by_svd))
                    for s, group, by_svd in zip(
                        found.spectrum, self.groups, found.used_svd, strict=True
                    )
                ]
            ),
            used_svd=np.array(found.used_svd, dtype=bool),
        )


def joined(
    pieces: Sequence[SharedFactors], places: Sequence[Sequence[int]], groups: Groups
) -> SharedFactors:
    """Factors of all groups out of those of some each.

    Parameters
    ----------
    pieces : sequence of SharedFactors
        Their experts are numbered in the order of their groups.
    places : sequence of sequence of int
        Which of all groups those of each piece are.
    groups : sequence of sequences of int
        All of them, every expert in exactly one.
    """
    E = sum(len(group) for group in groups)
    own = partition(groups, E)
    order = [(piece, n) for piece in pieces for n in range(len(piece.groups))]
    at = np.argsort([g for some in places for g in some])
    ordered = [order[i] for i in at]

    def per_group(name: str) -> Any:
        values = [getattr(piece, name) for piece, _ in ordered]
        return tuple(v[n] for v, (_, n) in zip(values, ordered, strict=True))

    def per_expert(name: str) -> Array:
        found = np.zeros(E)
        for piece, some in zip(pieces, places, strict=True):
            found[[e for g in some for e in own[g]]] = getattr(piece, name)
        return found

    first = pieces[0]
    return SharedFactors(
        side=first.side,
        form=first.form,
        groups=own,
        ranks=per_group("ranks"),
        shape=first.shape,
        shared=per_group("shared"),
        perm=per_group("perm"),
        private=per_group("private"),
        spectrum=per_group("spectrum"),
        energy=per_expert("energy"),
        error=None if first.error is None else per_expert("error"),
        group_error=None if first.group_error is None else np.array(per_group("group_error")),
        discarded_energy=np.array(per_group("discarded_energy")),
        effective_rank=np.array(per_group("effective_rank")),
        kernel_dim=np.array(per_group("kernel_dim")),
        used_svd=np.array(per_group("used_svd"), dtype=bool),
    )


def _resolution(m: int, D: int, eps: float, by_svd: bool) -> float:
    """Share of the largest singular value below which values are rounding."""
    return float(max(m, D) * eps if by_svd else np.sqrt(GRAM_NOISE * eps))


def _relative(residual: Array, energy: Array) -> Array:
    """Square root of residual / energy; 0 where there is nothing to approximate."""
    share = np.divide(residual, energy, out=np.zeros_like(energy), where=energy > 0)
    return np.sqrt(np.maximum(share, 0))
