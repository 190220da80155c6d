"""Method ``latent`` with a calibration text: fits, groups and ranks that know what is read.

Experts are grouped by their routing mass. One pass over the original gives the error curve of
every group and how the model takes an error in each layer; the size is spent where it does most
good. Then layer after layer is fitted to what the layers before it, already converted, hand on.
See ``docs/theory.md``, sections 7 and 8.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from molae import fit
from molae.arch import Model
from molae.config import TYPES, ConvertConfig
from molae.convert.allocation import Allocation, Candidate, gauge_ranks, group_size
from molae.convert.budget import Curve, spend
from molae.convert.fitting import Fitted, Groups, Matrices
from molae.convert.naming import named
from molae.errors import ArgumentError, PrecisionWarning
from molae.factored import Split, group_tensors, index_groups
from molae.fit import LayerMoments, SecondMoments
from molae.fit.factors import SharedFactors
from molae.io import Checkpoint, map_file
from molae.ops import Projection

__all__ = ["Calibrated", "Calibration"]

#: Group sizes that are tried where the settings leave them open; those above E are left out.
GROUP_SIZES = (1, 2, 4, 8, 16, 32)

#: A second trial of each layer and type keeps this share of the size of the first.
DEEPER = 0.6

#: The effect of an error grows at most as this power of its square.
STEEPEST = 3.0

#: Share of the mean expert's moments, spread evenly over all directions, that each expert has
#: besides its own: a text of another kind may send rows where this one sends none.
FLOOR = 0.02

#: A trial counts as at least this share of the median effect of all, whatever was measured.
LEAST_EFFECT = 0.02


class Calibration(Protocol):
    """A text on its way through a model's layers; `molae.hf.calibrate.Calibration` is one."""

    facts: dict[str, Any]

    def measure(
        self, trials: Callable[[int, LayerMoments], Mapping[str, Mapping[str, Projection]]]
    ) -> dict[tuple[int, str], float]:
        """Run the original; by layer and name how far its answers move with a trial's experts."""

    def moments(self, layer: int) -> LayerMoments:
        """What a layer's experts read after all that was advanced."""

    def advance(self, layer: int, projections: Mapping[str, Projection] | None = None) -> None:
        """Go on behind a layer, with other experts in it."""


class Calibrated:
    """What a conversion asks of a calibration.

    Parameters
    ----------
    checkpoint : Checkpoint
    model : Model
    config : ConvertConfig
    calibration : Calibration
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: Model,
        config: ConvertConfig,
        calibration: Calibration,
    ) -> None:
        if config.method != "latent":
            raise ArgumentError(
                f"calibration: method {config.method!r} knows no data; take method 'latent'"
            )
        self._checkpoint, self._model, self._config = checkpoint, model, config
        self._calibration = calibration
        self._layers: Mapping[int, Mapping[str, Split]] = {}
        self._finished: dict[int, Path] = {}
        self._at: int | None = None
        self._moments: LayerMoments | None = None
        self._fitted: dict[str, Projection] = {}

    # --------------------------------------------------------------- allocation

    def allocate(self) -> Allocation:
        """Groups and ranks, from a pass over the original."""
        size = self._config.target_size
        if self._config.rank is not None or size is None:
            raise ArgumentError(
                f"rank: method 'latent' finds its ranks from the size, got {self._config.rank}"
            )
        if size == 1.0:
            return Allocation("gauge", {})
        sizes, candidates = self._group_sizes(size)
        looks: dict[tuple[int, str], _Look] = {}

        def trials(layer: int, moments: LayerMoments) -> dict[str, dict[str, Projection]]:
            firm, found = with_floor(moments), {}
            for kind in TYPES:
                look = looks[layer, kind] = _Look(by_mass(firm.x, sizes[kind]))
                for share in (1.0, DEEPER):
                    ranks = self._even_ranks(kind, look.groups, share * size)
                    factors = self._factor(layer, kind, firm, look.groups, ranks, errors=False)
                    look.spectra = factors.spectrum
                    look.ranks.append(ranks)
                    found[f"{kind} {share:g}"] = {kind: Projection.from_factors(factors)}
            return found

        moved = self._calibration.measure(trials)
        if self._config.uniform:
            ranks = {place: look.ranks[0] for place, look in looks.items()}
        else:
            ranks = self._spend(size, looks, moved)
        layers: dict[int, dict[str, Split]] = {}
        for (layer, kind), look in looks.items():
            layers.setdefault(layer, {})[kind] = Split(tuple(look.groups), ranks[layer, kind])
        self._layers = layers
        return Allocation("gauge", layers, candidates)

    def _group_sizes(self, size: float) -> tuple[dict[str, int], tuple[Candidate, ...]]:
        """For each type as asked for, or what loses least in the middle layer."""
        E, F, D = (self._model.letters[x] for x in "EFD")
        asked = {kind: group_size(self._config, kind, E) for kind in TYPES}
        chosen = {kind: k for kind, k in asked.items() if k is not None}
        if len(chosen) == len(TYPES):
            return chosen, ()
        layer = self._model.moe_layers[len(self._model.moe_layers) // 2]
        moments = with_floor(self._calibration.moments(layer))
        candidates: list[Candidate] = []
        for kind in (kind for kind in TYPES if kind not in chosen):
            tried = []
            for k in (k for k in GROUP_SIZES if k <= E):
                groups = by_mass(moments.x, k)
                ranks = gauge_ranks(groups, size, F=F, D=D)
                if min(ranks) < 1:
                    continue
                spectra = self._spectra(layer, kind, moments, groups)
                lost = sum(_beyond(s, rank) for s, rank in zip(spectra, ranks, strict=True))
                total = sum(_beyond(s, 0) for s in spectra)
                tried.append((math.sqrt(lost / total) if total > 0 else 0.0, k, ranks[0]))
            if not tried:
                raise ArgumentError(
                    f"size: {size:g} leaves no rank for {kind} in groups of any size; take a "
                    "larger size"
                )
            best = min(tried)
            chosen[kind] = best[1]
            candidates += [Candidate(kind, k, r, e, (e, k, r) == best) for e, k, r in tried]
        return chosen, tuple(candidates)

    def _even_ranks(self, kind: str, groups: Groups, size: float) -> tuple[int, ...]:
        F, D = self._model.letters["F"], self._model.letters["D"]
        ranks = gauge_ranks(groups, size, F=F, D=D)
        if size == self._config.target_size and min(ranks) < 1:
            raise ArgumentError(
                f"size: {size:g} leaves no rank for {kind} in groups of {len(groups[0])}; "
                "take a larger size or larger groups"
            )
        return tuple(max(rank, 1) for rank in ranks)

    def _spend(
        self,
        size: float,
        looks: Mapping[tuple[int, str], _Look],
        moved: Mapping[tuple[int, str], float],
    ) -> dict[tuple[int, str], tuple[int, ...]]:
        """Ranks that cost the model's answers least, by the curves and what the trials did."""
        E, F, D = (self._model.letters[x] for x in "EFD")
        effects = {
            (layer, kind): tuple(moved[layer, f"{kind} {share:g}"] for share in (1.0, DEEPER))
            for layer, kind in looks
        }
        usual = float(np.median([there for there, _ in effects.values()]))
        curves: list[Curve] = []
        for place, look in looks.items():
            there, deeper = (max(x, LEAST_EFFECT * usual) for x in effects[place])
            before, after = (
                sum(_beyond(s, rank) for s, rank in zip(look.spectra, ranks, strict=True))
                for ranks in look.ranks
            )
            # The effect grows as a power of the squared error, faster than in proportion.
            power = 1.0
            if 0 < before < after and deeper > there:
                power = math.log(deeper / there) / math.log(after / before)
                power = min(max(power, 1.0), STEEPEST)
            for s, rank, own in zip(look.spectra, look.ranks[0], look.groups, strict=True):
                lost = Curve.of(s, 1.0, k=len(own), F=F, D=D).lost
                at = float(lost[rank])
                effect = there * at / before if before > 0 else 0.0
                scaled = effect * (lost / at) ** power if at > 0 else np.zeros_like(lost)
                curves.append(Curve(scaled, len(own), F, D))
        ranks = iter(spend(curves, size * len(looks) * E * F * D))
        return {place: tuple(next(ranks) for _ in look.groups) for place, look in looks.items()}

    # --------------------------------------------------------------------- fits

    def resume(self, finished: Mapping[int, Path]) -> None:
        """Layers whose factors an earlier run has left in these files."""
        self._finished = {number: finished[number] for number in sorted(finished)}

    def fit(self, layer: int, kind: str, matrices: Matrices, split: Split) -> Fitted:
        """Factors of one layer's matrix type; layers and types come in order."""
        if layer != self._at:
            for earlier in [number for number in self._finished if number < layer]:
                stored = self._stored(earlier)
                del self._finished[earlier]  # once: to go back is to start from the embedding
                self._calibration.advance(earlier, None if self._config.one_shot else stored)
            self._at, self._fitted = layer, {}
            self._moments = with_floor(self._calibration.moments(layer))
        assert self._moments is not None
        ranks = [rank for rank in split.ranks if rank is not None]
        factors = self._factor(layer, kind, self._moments, list(split.groups), ranks, errors=True)
        self._fitted[kind] = Projection.from_factors(factors)
        if len(self._fitted) == len(self._layers[layer]):
            self._moments = None
            self._calibration.advance(layer, None if self._config.one_shot else self._fitted)
            self._fitted = {}
        return _fitted(factors, matrices)

    def _factor(
        self,
        layer: int,
        kind: str,
        moments: LayerMoments,
        groups: Groups,
        ranks: Sequence[int],
        *,
        errors: bool,
    ) -> SharedFactors:
        matrices = self._model.matrices(self._checkpoint, layer, kind)
        side = self._model.side(kind)
        metric = moments.x if side == "input" else moments.hidden
        with named(self._model, layer, kind), warnings.catch_warnings():
            warnings.simplefilter("ignore", PrecisionWarning)
            return fit.factor_weighted(
                matrices,
                metric.moment,
                ranks,
                groups=groups,
                side=side,
                row_metric=moments.row_metric.get(kind),
                errors=errors,
            )

    def _spectra(
        self, layer: int, kind: str, moments: LayerMoments, groups: Groups
    ) -> tuple[np.ndarray, ...]:
        matrices = self._model.matrices(self._checkpoint, layer, kind)
        side = self._model.side(kind)
        with named(self._model, layer, kind):
            return fit.weighted_spectrum(
                matrices,
                (moments.x if side == "input" else moments.hidden).moment,
                groups=groups,
                side=side,
                row_metric=moments.row_metric.get(kind),
            )

    def _stored(self, layer: int) -> dict[str, Projection]:
        """Factors that an earlier run has written."""
        tensors = map_file(self._finished[layer])
        prefix, found = self._model.experts_prefix(layer), {}
        for kind, split in self._layers[layer].items():
            shared, perm, private = (
                tuple(
                    np.require(tensors[name], requirements=["C", "A"]) if name else None
                    for name in self._names(prefix, kind, split, role)
                )
                for role in ("shared", "perm", "private")
            )
            found[kind] = Projection(
                groups=split.groups, ranks=split.ranks, shared=shared, perm=perm, private=private
            )
        return found

    def _names(self, prefix: str, kind: str, split: Split, role: str) -> list[str | None]:
        """Of each group's tensor of this role, where it has one."""
        F, D = self._model.letters["F"], self._model.letters["D"]
        names: list[str | None] = []
        for g, (group, rank) in enumerate(zip(split.groups, split.ranks, strict=True)):
            parts = group_tensors(prefix, kind, g, len(group), rank, F=F, D=D, form="gauge")
            names.append(next((part.name for part in parts if part.role == role), None))
        return names


@dataclass
class _Look:
    """What the measuring pass has seen of one layer's matrix type."""

    groups: Groups
    spectra: tuple[np.ndarray, ...] = ()
    ranks: list[tuple[int, ...]] = field(default_factory=list)


def _beyond(singular_values: np.ndarray, rank: int) -> float:
    return float(np.square(singular_values[rank:]).sum())


def by_mass(moments: SecondMoments, k: int) -> Groups:
    """Groups of k experts, the busiest first, by the energy of what they read."""
    traces = moments.moment.trace(axis1=1, axis2=2)
    order = np.argsort(-traces, kind="stable")
    return [tuple(int(order[i]) for i in part) for part in index_groups(len(order), k)]


def with_floor(moments: LayerMoments, share: float = FLOOR) -> LayerMoments:
    """Moments in which no expert and no direction counts for nothing."""

    def raised(own: SecondMoments) -> SecondMoments:
        E, W = own.moment.shape[:2]
        level = share * float(own.moment.trace(axis1=1, axis2=2).sum()) / E / W
        own.moment[:, np.arange(W), np.arange(W)] += level
        return own

    return LayerMoments(raised(moments.x), raised(moments.hidden), moments.row_metric)


def _fitted(factors: SharedFactors, matrices: Matrices) -> Fitted:
    """With errors of the weights, as for every other method; those of the outputs besides."""
    assert factors.error is not None
    E = len(matrices)
    error, energy = np.zeros(E), np.zeros(E)
    stored: dict[tuple[int, str], np.ndarray] = {}
    for g, (group, rank) in enumerate(zip(factors.groups, factors.ranks, strict=True)):
        for i in group:
            exact = matrices[i].astype(np.float32)
            energy[i] = float(np.square(exact, dtype=np.float64).sum())
            gap = exact - factors.reconstruct(i).astype(np.float32)
            lost = float(np.square(gap, dtype=np.float64).sum())
            error[i] = np.sqrt(lost / energy[i]) if energy[i] > 0 else 0.0
        if rank > 0:
            stored[g, "shared"], stored[g, "private"] = factors.shared[g], factors.private[g]
            if (perm := factors.perm[g]) is not None:
                stored[g, "perm"] = perm
    total = float(factors.energy.sum())
    output = float((factors.error**2 * factors.energy).sum()) / total if total > 0 else 0.0
    facts = {
        name: getattr(factors, name).tolist()
        for name in ("discarded_energy", "effective_rank", "kernel_dim", "used_svd")
    }
    return Fitted(stored, error, energy, facts, output_error=float(np.sqrt(output)))
