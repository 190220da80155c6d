"""How one layer's matrix type is fitted, and what a method consists of."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from molae import fit
from molae.errors import NonFiniteError, PrecisionWarning
from molae.factored import Form, Split
from molae.fit.arguments import renumbered
from molae.threads import get_num_threads

if TYPE_CHECKING:
    from molae.arch import Model
    from molae.config import ConvertConfig
    from molae.convert.allocation import Allocation, Measure

__all__ = ["Fitted", "Groups", "Matrices", "Method", "energy_curve", "fit_shared", "fit_two_steps"]

Matrices = Sequence[np.ndarray]
Groups = list[tuple[int, ...]]

Side = Literal["input", "output"]

#: Factors of some groups, and the relative error and the energy of each of their experts.
Solution = tuple[fit.SharedFactors, np.ndarray, np.ndarray]
Solver = Callable[[Matrices, Groups, list[int], Side], Solution]


@dataclass(frozen=True)
class Fitted:
    """Factors of one layer's matrix type, and how good they are.

    Attributes
    ----------
    factors : dict of (int, str) to ndarray
        By group and role ('shared', 'perm', 'private'), in the source's type.
    error, energy : (E,) ndarray of float64
        Relative Frobenius error and squared norm of each expert.
    diagnostics : dict
        One list a fact, one entry a group: discarded_energy, effective_rank, kernel_dim,
        used_svd.
    output_error : float, optional
        Relative error of the type's outputs on the calibration text, where there was one.
    layer_error : list of float, optional
        Relative error of the layer's answers there before a refit and after each.
    tokens : list of int, optional
        Of that text, by expert.
    energy_curve : list of float, optional
        See `energy_curve`.
    """

    factors: Mapping[tuple[int, str], np.ndarray]
    error: np.ndarray
    energy: np.ndarray
    diagnostics: Mapping[str, list[Any]]
    output_error: float | None = None
    layer_error: list[float] | None = None
    tokens: list[int] | None = None
    energy_curve: list[float] | None = None

    @property
    def total_error(self) -> float:
        """Relative Frobenius error of the type as a whole."""
        total = float(self.energy.sum())
        return float(np.sqrt((self.error**2 * self.energy).sum() / total)) if total else 0.0


@dataclass(frozen=True)
class Method:
    """A way to compress, found by its name in ``METHODS``.

    `allocate` decides groups and ranks of the whole model; `fit` finds the factors of
    one layer's matrix type for them.
    """

    name: str
    form: Form
    summary: str
    allocate: Callable[[Model, ConvertConfig, Measure], Allocation]
    fit: Callable[[Matrices, Split, Side], Fitted]


def fit_shared(matrices: Matrices, split: Split, side: Side) -> Fitted:
    """Joint factorization of each group, in gauge form.

    Parameters
    ----------
    matrices : sequence of E (rows, cols) ndarray
    split : Split
    side : {'input', 'output'}
        Side of the matrices on which a factor is shared.

    Raises
    ------
    NonFiniteError
        A NaN or infinity; its `expert` is the number in the layer.
    """
    return _fit(matrices, split, side, _shared_in_gauge_form)


def fit_two_steps(matrices: Matrices, split: Split, side: Side) -> Fitted:
    """The paper's two steps: each expert to rank R, then the group together, plain form.

    The first step changes nothing where R = min(F, D) and is left out. Errors are
    against the source; the discarded energy and what else the spectrum tells are of the
    second step. Parameters and errors as in `fit_shared`.
    """
    return _fit(matrices, split, side, _two_steps)


def _shared_in_gauge_form(
    matrices: Matrices, groups: Groups, ranks: list[int], side: Side
) -> Solution:
    result = fit.factor_shared(matrices, ranks, groups=groups, side=side, form="gauge")
    assert result.error is not None
    return result, result.error, result.energy


def _two_steps(matrices: Matrices, groups: Groups, ranks: list[int], side: Side) -> Solution:
    reduced = list(matrices)
    for group, rank in zip(groups, ranks, strict=True):
        if rank < min(matrices[0].shape):
            for i in group:
                with _numbered([i]):
                    (lower,) = fit.reduce_rank([matrices[i]], rank)
                reduced[i] = lower.astype(matrices[i].dtype)
    result = fit.factor_shared(reduced, ranks, groups=groups, side=side, form="plain")
    error = [_relative_error(result.reconstruct(i), W) for i, W in enumerate(matrices)]
    # What the second step has seen has less energy than the source.
    energy = [_energy(W, i) for i, W in enumerate(matrices)]
    return result, np.array(error), np.array(energy)


def _fit(matrices: Matrices, split: Split, side: Side, solve: Solver) -> Fitted:
    """Fit the latent groups of `split`; the experts of dense groups keep their values.

    As many groups at a time as there are threads, which bounds the memory.
    """
    E, G = len(matrices), len(split.groups)
    error = np.zeros(E)
    energy = np.zeros(E)
    facts: dict[str, list[Any]] = {
        "discarded_energy": [0.0] * G,
        "effective_rank": [None] * G,
        "kernel_dim": [None] * G,
        "used_svd": [False] * G,
    }
    factors: dict[tuple[int, str], np.ndarray] = {}
    spectra: list[np.ndarray] = []
    latent = list(split.latent_groups())
    step = get_num_threads()
    for batch in (latent[at : at + step] for at in range(0, len(latent), step)):
        experts, groups = renumbered([group for _, group, _ in batch])
        with _numbered(experts), warnings.catch_warnings():
            # The report says where the direct SVD was needed; no warning for each group.
            warnings.simplefilter("ignore", PrecisionWarning)
            result, error[experts], energy[experts] = solve(
                [matrices[i] for i in experts], list(groups), [rank for _, _, rank in batch], side
            )
        spectra += result.spectrum
        for at, (g, _, rank) in enumerate(batch):
            for name, values in facts.items():
                values[g] = getattr(result, name)[at].item()
            if rank > 0:
                factors[g, "shared"] = result.shared[at]
                factors[g, "private"] = result.private[at]
                if (perm := result.perm[at]) is not None:
                    factors[g, "perm"] = perm
    for group, left in zip(split.groups, split.ranks, strict=True):
        if left is None:
            for i in group:
                energy[i] = _energy(matrices[i], i)
    return Fitted(factors, error, energy, facts, energy_curve=energy_curve(spectra))


#: Into how many steps `energy_curve` divides the ranks.
CURVE_STEPS = 32


def energy_curve(spectra: Sequence[np.ndarray]) -> list[float] | None:
    """Share of the squared singular values of all groups beyond i/32 of each one's largest rank.

    From 1 at i = 0 to 0 at i = 32, to four digits; None of no groups, or where all are zero.
    """
    beyond = np.zeros(CURVE_STEPS + 1)
    for values in spectra:
        squares = np.square(np.asarray(values, dtype=np.float64))
        tails = np.concatenate([np.cumsum(squares[::-1])[::-1], [0.0]])
        beyond += tails[np.arange(CURVE_STEPS + 1) * len(squares) // CURVE_STEPS]
    if not beyond[0] > 0:
        return None
    return [float(f"{share:.4g}") for share in beyond / beyond[0]]


@contextlib.contextmanager
def _numbered(experts: Sequence[int]) -> Iterator[None]:
    """Let an error inside name its expert by the number in `experts`, not by position."""
    try:
        yield
    except NonFiniteError as error:
        if error.expert is not None and 0 <= error.expert < len(experts):
            error.expert = experts[error.expert]
        raise


def _energy(W: np.ndarray, expert: int) -> float:
    energy = float(np.square(W.astype(np.float64)).sum())
    if not math.isfinite(energy):
        error = NonFiniteError(f"expert {expert}: NaN or Inf in the weights")
        error.expert = expert
        raise error
    return energy


def _relative_error(approximation: np.ndarray, W: np.ndarray) -> float:
    exact = W.astype(np.float32)
    norm = np.linalg.norm(exact)
    return float(np.linalg.norm(approximation.astype(np.float32) - exact) / norm) if norm else 0.0
