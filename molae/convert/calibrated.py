"""Method ``latent`` with a calibration text: fits, groups and ranks that know what is read.

Experts are grouped by their routing mass. One pass over the original gives the error curve of
every group and how the model takes an error in each layer; the size is spent where it does most
good. Then layer after layer is fitted to what the layers before it, already converted, hand on.
See ``docs/theory.md``, sections 7 and 8.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from molae import fit
from molae.arch import Model, dense_flops
from molae.config import TYPES, ConvertConfig
from molae.convert.allocation import Allocation, Candidate, gauge_ranks, group_size
from molae.convert.budget import Curve, Flops, spend
from molae.convert.fitting import Fitted, Groups, Matrices, energy_curve
from molae.convert.footprint import Footprint
from molae.convert.layer_state import LayerState
from molae.convert.light import FittedLight, Light, fit_light, nothing, spread_counts
from molae.convert.measuring import TRIAL_SIZES, Look, Measurements
from molae.convert.naming import named
from molae.convert.stored import stored_light, stored_projection
from molae.errors import ArgumentError, CalibrationWarning
from molae.factored import LightModule, Split, index_groups
from molae.fit import Energies, LayerDistillation, LayerInput
from molae.fit.factors import SharedFactors
from molae.fit.layer import REFITS, Gathered, Part, factor_parts, runnable
from molae.io import Checkpoint, map_file, numpy_dtype
from molae.ops import Projection

__all__ = ["Calibrated", "Calibration", "Trials", "in_order"]

#: Group sizes that are tried where the settings leave them open; those above E are left out.
GROUP_SIZES = (1, 2, 4, 8, 16, 32)

#: Tokens on which group sizes are compared.
TRIED_TOKENS = 8192


#: By layer and matrix type.
Trials = Mapping[tuple[int, str], dict[str, Any]]

#: Is told a layer's number, steps done, steps in all, and the last loss.
Told = Callable[[int, int, int, float], object]


class Calibration(Protocol):
    """A text on its way through a model's layers; `molae.hf.calibrate.Calibration` is one."""

    facts: dict[str, Any]

    @property
    def sequences(self) -> np.ndarray:
        """(S, T) the tokens."""

    def measure(
        self,
        trials: Callable[
            [int, LayerInput, Mapping[str, Projection]],
            Iterable[tuple[str, Mapping[str, Projection], Light | None]],
        ],
    ) -> dict[tuple[int, str], float]:
        """Run the original; by layer and name how far its answers move with a trial's experts."""

    def compare(
        self, layer: int, variants: Sequence[tuple[Mapping[str, Projection], Light | None]]
    ) -> list[float]:
        """After all that was advanced, how far the answers are from the original's with each of
        several sets of experts in a layer, and the original's own behind it."""

    def experts(self, layer: int) -> Mapping[str, Projection]:
        """A layer's own experts."""

    def reading(self, layer: int, *, anchored: bool = False) -> LayerInput:
        """What a layer's experts read after all that was advanced."""

    def advance(
        self,
        layer: int,
        projections: Mapping[str, Projection] | None = None,
        light: Light | None = None,
    ) -> None:
        """Go on behind a layer, with other experts in it, the last ones compressed."""

    def scratch_bytes(self, *, trials: int, kept: int, anchored: bool) -> int:
        """Temporary files, with so many trials in all and so much that a fit keeps."""


class Calibrated:
    """What a conversion asks of a calibration.

    Parameters
    ----------
    checkpoint : Checkpoint
    model : Model
    config : ConvertConfig
    calibration : Calibration
    stats : Path, optional
        Where measurements are kept: taken from there where they are, added where they are not.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: Model,
        config: ConvertConfig,
        calibration: Calibration,
        stats: Path | None = None,
    ) -> None:
        if config.method != "latent":
            raise ArgumentError(
                f"calibration: method {config.method!r} knows no data; take method 'latent'"
            )
        self._checkpoint, self._model, self._config = checkpoint, model, config
        self._calibration, self._stats = calibration, stats
        if config.compressed_experts >= model.letters["K"]:
            raise ArgumentError(
                f"compressed_experts: expected 0 to K - 1 = {model.letters['K'] - 1}, got "
                f"{config.compressed_experts}"
            )
        self.footprint = Footprint.of(checkpoint, model, config)
        facts = {
            "checkpoint": checkpoint.fingerprint(),
            "drop_idle": config.drop_idle,
            **_lasting(calibration.facts),
        }
        self._measurements = (
            Measurements(facts)
            if stats is None
            else Measurements.load(stats, facts, model.letters["E"])
        )
        self._layers: Mapping[int, Mapping[str, Split]] = {}
        #: What was tried of a layer's type, and what was foreseen from it, as in a report's row.
        self.trials: Trials = {}
        self._finished: dict[int, Path] = {}
        self._state: Path | None = None
        self._told: Told = lambda layer, done, steps, loss: None
        self._fitted: dict[tuple[int, str], Fitted] = {}
        self._light = LightModule.parse(
            config.light_form, model.letters["F"], biased=model.has_biases
        )
        self._counts: Mapping[int, int] = {}
        self._compressed: dict[int, FittedLight] = {}
        self._healed: LayerDistillation | None = None
        self._warned = False

    # --------------------------------------------------------------- allocation

    def allocate(self) -> Allocation:
        """Groups and ranks, from a pass over the original."""
        size = self._config.target_size
        if self._config.rank is not None or size is None:
            raise ArgumentError(
                f"rank: method 'latent' finds its ranks from the size, got {self._config.rank}"
            )
        flops = self._config.flops
        compressed = self._counts = self._compressed_counts(self._config.compressed_experts)
        if size == 1.0 and flops in (None, 1.0):
            return Allocation("gauge", {}, compressed=compressed, light=self._light)
        if compressed:  # what the light modules take
            F, D = self._model.letters["F"], self._model.letters["D"]
            share = len(compressed) / len(self._model.moe_layers)
            size -= share * self._light.numbers(F=F, D=D) / (3 * F * D)
            if not size > 0:
                raise ArgumentError("size: leaves nothing beside compressed experts; take more")
        sizes, candidates = self._group_sizes(min(size, flops or 1.0))
        looks = self._measured(sizes)
        curves = self._curves(looks)
        if self._config.uniform:
            ranks = {
                (layer, kind): self._even_ranks(kind, look.groups, size, look.idle)
                for (layer, kind), look in looks.items()
            }
        else:
            ranks = self._spend(size, looks, curves)
        self.trials = {
            place: {
                "effects": [list(own) for own in zip(TRIAL_SIZES, look.effects, strict=True)],
                "foreseen": sum(
                    float(curve.lost[rank])
                    for curve, rank in zip(curves[place], ranks[place], strict=False)
                ),
            }
            for place, look in looks.items()
        }
        layers: dict[int, dict[str, Split]] = {}
        for (layer, kind), look in looks.items():
            layers.setdefault(layer, {})[kind] = Split(tuple(look.groups), ranks[layer, kind])
        self._layers = layers
        return Allocation("gauge", layers, candidates, compressed, self._light)

    def take(self, allocation: Allocation, trials: Trials) -> None:
        """Groups and ranks that were decided elsewhere, and what was tried for them."""
        self._layers, self._counts = allocation.layers, allocation.compressed
        self.trials = trials

    def _measured(self, sizes: Mapping[str, int]) -> dict[tuple[int, str], Look]:
        """Of every layer and type in groups of these sizes; what is not known yet is measured."""
        known = self._measurements.looks
        missing = [k for k in TYPES if (self._model.moe_layers[0], k, sizes[k]) not in known]

        def trials(
            layer: int, given: LayerInput, own: Mapping[str, Projection]
        ) -> Iterator[tuple[str, dict[str, Projection], Light | None]]:
            gathered, W = self._gathered(given, own), self._stacks(layer)
            for kind in missing:
                groups, idle = self._grouped(gathered.energies, sizes[kind])
                ranks = [self._even_ranks(kind, groups, share, idle) for share in TRIAL_SIZES]
                parts = {
                    f"{kind} {share:g}": Part(kind, groups, some)
                    for share, some in zip(TRIAL_SIZES, ranks, strict=True)
                }
                with named(self._model, layer, kind):
                    tried, _ = factor_parts(gathered, W, parts, errors=False)
                spectra = next(iter(tried.values())).spectrum
                known[layer, kind, sizes[kind]] = Look(groups, spectra, ranks)
                for name, factors in tried.items():
                    yield name, {kind: runnable(Projection.from_factors(factors))}, None

        if missing:
            for (layer, name), effect in self._calibration.measure(trials).items():
                kind = name.partition(" ")[0]
                known[layer, kind, sizes[kind]].effects.append(effect)
            self._keep()
        return {
            (layer, kind): known[layer, kind, sizes[kind]]
            for layer in self._model.moe_layers
            for kind in TYPES
        }

    def _compressed_counts(self, n: int) -> dict[int, int]:
        """By layer how many of a token's experts are compressed, n on average: where the model
        takes it best. Layers with none are left out."""
        layers, (E, K, D) = self._model.moe_layers, (self._model.letters[x] for x in "EKD")
        if self._config.uniform or len(layers) == 1 or n in (0, K - 1):
            return dict.fromkeys(layers, n) if n else {}
        known = self._measurements.compressed

        def trials(
            layer: int, given: LayerInput, own: Mapping[str, Projection]
        ) -> Iterator[tuple[str, dict[str, Projection], Light | None]]:
            for count in range(1, K):
                yield str(count), {}, (nothing(E, D), count)

        if not known:
            for (layer, name), effect in self._calibration.measure(trials).items():
                known[layer, int(name)] = effect
            self._keep()
        effects = [[0.0, *(known[layer, count] for count in range(1, K))] for layer in layers]
        counts = spread_counts(effects, n * len(layers))
        return {layer: count for layer, count in zip(layers, counts, strict=True) if count}

    def _keep(self) -> None:
        if self._stats is not None:
            self._measurements.save(self._stats)

    def _group_sizes(self, size: float) -> tuple[dict[str, int], tuple[Candidate, ...]]:
        """For each type as asked for, or what moves a layer's answers least."""
        E, F, D = (self._model.letters[x] for x in "EFD")
        asked = {kind: group_size(self._config, kind, E) for kind in TYPES}
        chosen = {kind: k for kind, k in asked.items() if k is not None}
        if len(chosen) == len(TYPES):
            return chosen, ()
        missing = [kind for kind in TYPES if kind not in chosen]
        errors = self._tried(size, missing)
        candidates: list[Candidate] = []
        for kind in missing:
            tried = []
            for k in (k for k in GROUP_SIZES if k <= self.footprint.experts_at_once):
                error = errors[kind, k, size]
                if error is not None:
                    (rank,) = gauge_ranks([range(k)], size, F=F, D=D)
                    tried.append((error, k, rank))
            if not tried:
                raise ArgumentError(
                    f"size: {size:g} leaves no rank for {kind} in groups of any size; take a "
                    "larger size"
                )
            best = min(tried)
            chosen[kind] = best[1]
            candidates += [Candidate(kind, k, r, e, (e, k, r) == best) for e, k, r in tried]
        return chosen, tuple(candidates)

    def _tried(
        self, size: float, kinds: Sequence[str]
    ) -> dict[tuple[str, int, float], float | None]:
        """Relative error of a layer's answers with one type alone in groups of k, at even ranks;
        root mean square over two layers. None where there is no rank."""
        F, D = self._model.letters["F"], self._model.letters["D"]
        known = self._measurements.tried
        wanted = [
            (kind, k, size)
            for kind in kinds
            for k in GROUP_SIZES
            if k <= self.footprint.experts_at_once and (kind, k, size) not in known
        ]
        if not wanted:
            return known
        layers = self._model.moe_layers
        squares: dict[tuple[str, int, float], list[float]] = {place: [] for place in wanted}
        for layer in sorted({layers[len(layers) // 4], layers[3 * len(layers) // 4]}):
            given, own = self._calibration.reading(layer), self._calibration.experts(layer)
            gathered, W = self._gathered(given, own), self._stacks(layer)
            some = given.first(TRIED_TOKENS)
            for kind, k, _ in wanted:
                groups, idle = self._grouped(gathered.energies, k)
                ranks = gauge_ranks(groups[: len(groups) - idle], size, F=F, D=D)
                if min(ranks, default=1) < 1:
                    continue
                ranks += (0,) * idle
                with named(self._model, layer, kind):
                    part = Part(kind, groups, ranks)
                    found, _ = factor_parts(gathered, W, {kind: part}, errors=False)
                other = {**own, kind: runnable(Projection.from_factors(found[kind]))}
                error = fit.answer_error(some, in_order(other), in_order(own))
                squares[kind, k, size].append(error**2)
        for place, own_squares in squares.items():
            mean = sum(own_squares) / len(own_squares) if own_squares else None
            known[place] = None if mean is None else math.sqrt(mean)
        self._keep()
        return known

    def _gathered(self, given: LayerInput, own: Mapping[str, Projection]) -> Gathered:
        return Gathered(given, own, experts_at_once=self.footprint.experts_at_once)

    def _stacks(self, layer: int) -> dict[str, list[np.ndarray]]:
        """A layer's matrices by type, as stored."""
        # Those that are no views are made once, not each time that one is looked at.
        return {kind: list(self._model.matrices(self._checkpoint, layer, kind)) for kind in TYPES}

    def _grouped(self, energies: Energies, k: int) -> tuple[Groups, int]:
        """Groups of k, and how many at their end are to have no rank."""
        reached = energies.count > 0
        if not self._config.drop_idle or reached.all():
            return by_mass(energies, k), 0
        rest = tuple(int(i) for i in np.flatnonzero(~reached))
        return [*by_mass(energies, k, reached), rest], 1

    def _even_ranks(self, kind: str, groups: Groups, size: float, idle: int) -> tuple[int, ...]:
        F, D = self._model.letters["F"], self._model.letters["D"]
        busy = groups[: len(groups) - idle]
        ranks = gauge_ranks(busy, size, F=F, D=D)
        if size == self._config.target_size and min(ranks) < 1:
            raise ArgumentError(
                f"size: {size:g} leaves no rank for {kind} in groups of {len(busy[0])}; "
                "take a larger size or larger groups"
            )
        return tuple(max(rank, 1) for rank in ranks) + (0,) * idle

    def _curves(self, looks: Mapping[tuple[int, str], Look]) -> dict[tuple[int, str], list[Curve]]:
        """Of the groups that are to have a rank, in nats a token: from what the trials did."""
        usual = {
            share: float(np.median([look.effects[n] for look in looks.values()]))
            for n, share in enumerate(TRIAL_SIZES)
        }
        F, D = self._model.letters["F"], self._model.letters["D"]
        return {place: look.curves(F, D, usual) for place, look in looks.items()}

    def _spend(
        self,
        size: float,
        looks: Mapping[tuple[int, str], Look],
        of_looks: Mapping[tuple[int, str], Sequence[Curve]],
    ) -> dict[tuple[int, str], tuple[int, ...]]:
        """Ranks that cost the model's answers least, by these curves."""
        E, F, D = (self._model.letters[x] for x in "EFD")
        curves = [curve for place in looks for curve in of_looks[place]]
        flops = None
        if self._config.flops is not None:
            K = self._model.letters["K"]
            whole = len(looks) * dense_flops(K, F, D)
            flops = Flops(self._config.flops * whole, E, K)
        ranks = iter(spend(curves, size * len(looks) * E * F * D, flops=flops))
        return {
            place: tuple(next(ranks) for _ in look.groups[: len(look.groups) - look.idle])
            + (0,) * look.idle
            for place, look in looks.items()
        }

    # --------------------------------------------------------------------- fits

    def resume(self, finished: Mapping[int, Path], state: Path, told: Told) -> None:
        """Layers whose factors an earlier run has left in these files; where the state of one
        that is being trained is kept, and who is told how that goes."""
        self._finished = {number: finished[number] for number in sorted(finished)}
        self._state, self._told = state, told

    def fit(self, layer: int, kind: str, matrices: Matrices, split: Split) -> Fitted:
        """Factors of one layer's matrix type; layers come in order."""
        if (layer, kind) not in self._fitted:
            self._fit_layer(layer)
        return self._fitted.pop((layer, kind))

    def healed(self) -> LayerDistillation | None:
        """How the layer that was fitted last was trained in the end; told once."""
        found, self._healed = self._healed, None
        return found

    def compressed(self, layer: int) -> FittedLight:
        """What acts in the place of a layer's compressed experts. After what else there is of
        that layer."""
        if layer not in self._compressed:
            self._fit_layer(layer)
        return self._compressed.pop(layer)

    def _fit_layer(self, layer: int) -> None:
        for earlier in [number for number in self._finished if number < layer]:
            stored = self._stored(earlier)
            del self._finished[earlier]  # once: to go back is to start from the embedding
            self._advance(earlier, *stored)
        given = self._calibration.reading(layer, anchored=not self._config.one_shot)
        projections: dict[str, Projection] = {}
        if layer in self._layers:
            projections = self._fit_factors(layer, given)
        light = None
        if layer in self._counts:
            light = self._fit_compressed(layer, given, projections)
        self._advance(layer, projections, light)

    def _advance(
        self,
        layer: int,
        projections: Mapping[str, Projection],
        light: Light | None,
    ) -> None:
        """With what is stored now, or with the original's own."""
        if self._config.one_shot:
            self._calibration.advance(layer)
        else:
            self._calibration.advance(layer, projections, light)

    def _fit_compressed(
        self, layer: int, given: LayerInput, projections: Mapping[str, Projection]
    ) -> Light:
        """On top of the factors. Vectors that do not bring the model's answers nearer than those
        of 1 are not taken: a layer's own error does not always tell."""
        own = self._calibration.experts(layer)
        student, teacher = in_order({**own, **projections}), in_order(own)
        dtype = numpy_dtype(self._model.dtype)
        found = fit_light(given, student, teacher, self._counts[layer], self._light, dtype)
        if self._light.units is None:
            one = found.at_one()
            both = [(projections, other.runnable()) for other in (found, one)]
            fitted, plain = self._calibration.compare(layer, both)
            if plain < fitted:
                found = one
        self._compressed = {layer: found}
        return found.runnable()

    def _fit_factors(self, layer: int, given: LayerInput) -> dict[str, Projection]:
        """Leaves what is to be stored; gives what a layer is run with."""
        W = self._stacks(layer)
        parts = {
            kind: (list(split.groups), [rank for rank in split.ranks if rank is not None])
            for kind, split in self._layers[layer].items()
        }
        found = fit.fit_layer(
            given,
            W,
            parts,
            refits=REFITS if self._config.refit else (),
            heal=self._config.heal,
            experts_at_once=self.footprint.experts_at_once,
            keeper=None if self._state is None else LayerState(self._state, layer),
            told=lambda *steps: self._told(layer, *steps),
        )
        self._warn(layer, found.energies.count)
        self._healed = found.healed
        self._fitted = {
            (layer, kind): _fitted(
                f, W[kind], found.layer_error.get(kind), found.energies.count.tolist()
            )
            for kind, f in found.factors.items()
        }
        return {kind: found.projections[kind] for kind in parts}

    def _warn(self, layer: int, tokens: np.ndarray) -> None:
        """Once, of experts with too few tokens; the report has them all."""
        width = self._model.letters["D"]
        few = int((tokens < width).sum())
        if few and not self._warned:
            self._warned = True
            warnings.warn(
                f"layer {layer}: {few} of {len(tokens)} experts read fewer tokens of the "
                f"calibration text than hidden_size={width}, the least {tokens.min()}; their fit "
                "leans on their group's moments. A longer text is better; later layers: see "
                "`tokens` in the report",
                CalibrationWarning,
                stacklevel=2,
            )

    def _stored(self, layer: int) -> tuple[dict[str, Projection], Light | None]:
        """Factors that an earlier run has written, and what acts for compressed experts."""
        tensors = map_file(self._finished[layer]).__getitem__
        projections = {
            kind: stored_projection(tensors, self._model, layer, kind, split, "gauge")
            for kind, split in self._layers.get(layer, {}).items()
        }
        return projections, stored_light(tensors, self._model, layer, self._counts, self._light)


def _lasting(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What measurements depend on: not what the text is called."""
    return {key: value for key, value in facts.items() if key != "text"}


def by_mass(energies: Energies, k: int, some: np.ndarray | None = None) -> Groups:
    """Groups of k experts, the busiest first, by the energy of what they read; of all, or of
    `some` (E,)."""
    order = np.argsort(-energies.x, kind="stable")
    if some is not None:
        order = order[some[order]]
    return [tuple(int(order[i]) for i in part) for part in index_groups(len(order), k)]


def in_order(experts: Mapping[str, Projection]) -> tuple[Projection, Projection, Projection]:
    """Gate, up and down, as `molae.fit` takes a layer."""
    return experts["gate_proj"], experts["up_proj"], experts["down_proj"]


def _fitted(
    factors: SharedFactors,
    matrices: Matrices,
    layer_error: list[float] | None,
    tokens: list[int],
) -> Fitted:
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
    return Fitted(
        stored,
        error,
        energy,
        facts,
        output_error=float(np.sqrt(output)),
        layer_error=layer_error,
        tokens=tokens,
        energy_curve=energy_curve(factors.spectrum),
    )
