"""One layer of experts fitted as a whole: moments, factors, and what makes up for their errors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from molae.config import TYPES
from molae.errors import ArgumentError, NonFiniteError, PrecisionWarning
from molae.fit.arguments import Groups, Stack, experts, partition, renumbered
from molae.fit.descent import Keeper, parted
from molae.fit.distilling import LayerDistillation, distill_layer
from molae.fit.factors import SharedFactors, joined
from molae.fit.layer_moments import Energies, LayerMoments, layer_energies, layer_moments
from molae.fit.reading import LayerInput
from molae.fit.refit_metrics import RowMetric, row_metric
from molae.fit.refitting import in_dtype, refit
from molae.fit.weighted import factor_at_ranks
from molae.ops import Projection

__all__ = [
    "FLOOR",
    "REFITS",
    "Gathered",
    "LayerFit",
    "Part",
    "factor_parts",
    "fit_layer",
    "runnable",
]

Array = npt.NDArray[Any]

#: Share of the mean expert's moments, spread evenly over all directions, that each expert has
#: besides its own: a text of another kind may send rows where this one sends none.
FLOOR = 0.02

#: Private factors are fitted to the layer's answers: which, in turn, and in how many steps.
REFITS = (("down_proj", 2), ("up_proj", 4), ("down_proj", 2))


class Part(NamedTuple):
    """Groups of one matrix type that are to be factored, and their ranks."""

    kind: str
    groups: Groups
    ranks: Sequence[int]


@dataclass(frozen=True, eq=False)
class LayerFit:
    """What `fit_layer` has found.

    Attributes
    ----------
    projections : dict of str to Projection
        All three types, for `molae.ops`; those that were not to be fitted as they were.
    factors : dict of str to SharedFactors
        Of the types that were fitted; errors in the metric of the moments, before any refit.
    layer_error : dict of str to list of float
        By type that was refitted: ``‖target − y‖ / ‖target‖`` of the layer's answers before and
        after each.
    energies : Energies
        Of what the experts read.
    healed : LayerDistillation, optional
        How a training in the end went.
    """

    projections: Mapping[str, Projection]
    factors: Mapping[str, SharedFactors]
    layer_error: Mapping[str, list[float]]
    energies: Energies
    healed: LayerDistillation | None = None


def fit_layer(
    given: LayerInput,
    W: Mapping[str, Stack],
    parts: Mapping[str, tuple[Groups, Sequence[int]]],
    *,
    floor: float = FLOOR,
    refits: Sequence[tuple[str, int]] = REFITS,
    heal: int = 0,
    experts_at_once: int | None = None,
    keeper: Keeper | None = None,
    told: Callable[[int, int, float], object] | None = None,
) -> LayerFit:
    """Fit latent experts to what a layer's own experts answer to a text.

    Moments of what the experts read, factors of each type in their metric, then up and down
    fitted to the answers of the layer as a whole: what ``molae convert --calibration`` does to
    each layer.

    Parameters
    ----------
    given : LayerInput
        With ``lost`` also errors of the layers before are made up for.
    W : dict of str to (E, rows, cols) array_like, or sequence of E (rows, cols) array_like
        'gate_proj', 'up_proj' (F, D) and 'down_proj' (D, F).
    parts : dict of str to (groups, ranks)
        For each type that is to be fitted its groups and the rank of each.
    floor : float
        At least 0: share of the mean expert's moments that each expert has in all directions.
    refits : sequence of (str, int)
        'up_proj' or 'down_proj', and steps of `refit`, in turn. Types not in `parts` are left out.
    heal : int
        Passes over the tokens in which, in the end, all factors are trained together; see
        `distill_layer`. The refits then leave out the tokens that this looks at to see how it
        goes.
    experts_at_once : int, optional
        Moments of so many experts at a time, in as many passes over the tokens; the result has
        the same bits. Default: of all.
    keeper, told
        Of the training, as in `distill_layer`.

    Returns
    -------
    LayerFit

    Raises
    ------
    ArgumentError, ShapeError
        An argument is not as described, or groups tie more than `experts_at_once` together.
    NonFiniteError, NumericalError
        As in `second_moments`, `factor_weighted` and `refit`.

    Notes
    -----
    Products of a layer of N tokens: ``N K (4 F D + D² + 3 F²)`` flops for the moments, those of
    `factor_weighted` for each type, and a forward and part of a backward pass for each step and
    start of a refit.

    Examples
    --------
    >>> import numpy as np, molae
    >>> from molae.fit import LayerInput, answer_error, fit_layer
    >>> rng = np.random.default_rng(0)
    >>> W = {kind: rng.standard_normal(shape) for kind, shape in {
    ...     "gate_proj": (4, 6, 8), "up_proj": (4, 6, 8), "down_proj": (4, 8, 6)}.items()}
    >>> given = LayerInput(rng.standard_normal((200, 8)), rng.integers(0, 4, (200, 2)),
    ...                    rng.random((200, 2)))
    >>> pairs = [[0, 1], [2, 3]]
    >>> found = fit_layer(given, W, {kind: (pairs, [5, 5]) for kind in W})
    >>> found.factors["up_proj"].private[0].shape, list(found.layer_error)
    ((2, 6, 5), ['down_proj', 'up_proj'])
    >>> own = tuple(molae.ops.Projection.dense(w) for w in W.values())
    >>> error = answer_error(given, tuple(found.projections.values()), own)
    >>> bool(abs(error - found.layer_error["down_proj"][-1]) < 1e-9)
    True
    """
    if set(W) != set(TYPES) or not parts or not set(parts) <= set(TYPES):
        raise ArgumentError(
            f"W, parts: expected all and some of {TYPES}, got {sorted(W)} and {sorted(parts)}"
        )
    own = {kind: Projection.separate(experts(W[kind])) for kind in TYPES}
    gathered = Gathered(given, own, floor=floor, experts_at_once=experts_at_once)
    refits = [own for own in refits if own[0] == "down_proj" or given.linear_in_up]
    wanted = [kind for kind, _ in refits if kind in parts]
    factors, metric = factor_parts(
        gathered,
        W,
        {kind: Part(kind, *part) for kind, part in parts.items()},
        metric_of="up_proj" if "up_proj" in wanted else None,
    )
    energies = gathered.energies
    del gathered  # and with it the moments
    student = {
        **own,
        **{kind: runnable(Projection.from_factors(f)) for kind, f in factors.items()},
    }
    teacher = own["gate_proj"], own["up_proj"], own["down_proj"]
    errors: dict[str, list[float]] = {}
    felt = given
    if heal and refits:
        felt = given.without(parted(len(given.x))[1], own["gate_proj"].num_experts)
    for kind, steps in refits:
        if kind not in factors:
            continue
        which: Literal["up", "down"] = "up" if kind == "up_proj" else "down"
        layer = student["gate_proj"], student["up_proj"], student["down_proj"]
        found = refit(felt, layer, teacher, which, metric=metric, steps=steps)
        stored = factors[kind].shared[0].dtype
        student[kind] = runnable(in_dtype(found.projection, stored))
        errors.setdefault(kind, [float(found.error[0])]).append(float(found.error[-1]))
    healed: LayerDistillation | None = None
    if heal:
        layer = student["gate_proj"], student["up_proj"], student["down_proj"]
        trained = [kind.removesuffix("_proj") for kind in factors]
        # The refits make up for what earlier layers have lost; to train that too is mostly worse.
        healed = distill_layer(
            replace(given, lost=None),
            layer,
            teacher=teacher,
            trained=trained,
            epochs=heal,
            keeper=keeper,
            told=told,
        )
        for kind, projection in zip(TYPES, healed.layer, strict=True):
            if kind in factors:
                stored = factors[kind].shared[0].dtype
                student[kind] = runnable(in_dtype(projection, stored))
    fitted = {
        kind: replace(
            f,
            shared=_stored(student[kind].shared, f.shared),
            private=_stored(student[kind].private, f.private),
        )
        for kind, f in factors.items()
    }
    return LayerFit(student, fitted, errors, energies, healed)


class Gathered:
    """Moments of a layer: of all experts, found once and kept, or of a few at a time.

    Parameters
    ----------
    given : LayerInput
    own : dict of str to Projection
        The experts that read it.
    floor : float
        As in `fit_layer`.
    experts_at_once : int, optional
        Of all where this is None.
    """

    def __init__(
        self,
        given: LayerInput,
        own: Mapping[str, Projection],
        *,
        floor: float = FLOOR,
        experts_at_once: int | None = None,
    ) -> None:
        self._layer = own["gate_proj"], own["up_proj"], own["down_proj"]
        self._given, self._floor = given, floor
        E = own["gate_proj"].num_experts
        self._at_once = E if experts_at_once is None else min(experts_at_once, E)
        self._whole: LayerMoments | None = None
        if self._at_once < E:
            self.energies = layer_energies(given, *self._layer[:2])
        else:
            self._whole = layer_moments(given, *self._layer).raise_floor(floor)
            self.energies = self._whole.energies

    def blocks(self, *groupings: Groups) -> Iterator[LayerMoments]:
        """Of all experts of these groups; each comes with all members of its groups."""
        if self._whole is not None:
            yield self._whole
            return
        for some in _blocks(groupings, self._at_once):
            moments = layer_moments(self._given, *self._layer, experts=some, energies=self.energies)
            yield moments.raise_floor(self._floor)


def factor_parts(
    gathered: Gathered,
    W: Mapping[str, Stack],
    parts: Mapping[str, Part],
    *,
    metric_of: str | None = None,
    errors: bool = True,
) -> tuple[dict[str, SharedFactors], RowMetric | None]:
    """Factors in the metric of a layer's moments. Parts of one type in the same groups share
    what does not depend on their ranks.

    Parameters
    ----------
    gathered : Gathered
    W
        As in `fit_layer`.
    parts : dict of str to Part
        By any name.
    metric_of : str, optional
        The name of that part of up for which what `refit` needs is to be given too.
    errors : bool
        As in `factor_weighted`.
    """
    pieces: dict[str, list[SharedFactors]] = {name: [] for name in parts}
    places: dict[str, list[list[int]]] = {name: [] for name in parts}
    felt: RowMetric | None = None
    alike: dict[tuple[str, tuple[tuple[int, ...], ...]], list[str]] = {}
    for name, part in parts.items():
        alike.setdefault((part.kind, tuple(map(tuple, part.groups))), []).append(name)
    for moments in gathered.blocks(*(part.groups for part in parts.values())):
        here = set(moments.experts)
        for (kind, groups), names in alike.items():
            some = [g for g, group in enumerate(groups) if group[0] in here]
            own = [groups[g] for g in some]
            ranks = [[parts[name].ranks[g] for g in some] for name in names]
            for name, piece in zip(
                names, _factor(W[kind], kind, moments, own, ranks, errors), strict=True
            ):
                pieces[name].append(piece)
                places[name].append(some)
                if name == metric_of:
                    more = row_metric(moments, _among(piece, groups, some))
                    felt = more if felt is None else felt.joined(more)
    found = {name: joined(pieces[name], places[name], part.groups) for name, part in parts.items()}
    return found, felt


def _factor(
    W: Stack,
    kind: str,
    moments: LayerMoments,
    groups: Groups,
    several: Sequence[Sequence[int]],
    errors: bool,
) -> list[SharedFactors]:
    """Of some experts, at several ranks; they are numbered in the order of the groups."""
    members, own = renumbered(groups)
    place = {e: at for at, e in enumerate(moments.experts)}
    metric = moments.x if kind != "down_proj" else moments.hidden
    rows = moments.row_metric.get(kind)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PrecisionWarning)
            return factor_at_ranks(
                [W[e] for e in members],  # type: ignore[index]
                [metric.moment[place[e]] for e in members],
                several,
                groups=own,
                side="output" if kind == "down_proj" else "input",
                row_metric=None if rows is None else [rows[place[e]] for e in members],
                errors=errors,
            )
    except NonFiniteError as error:
        if error.expert is not None and 0 <= error.expert < len(members):
            error.expert = members[error.expert]
        error.kind = kind  # type: ignore[attr-defined]
        raise


def runnable(p: Projection) -> Projection:
    """What `molae.ops` takes: float16 is widened."""
    return in_dtype(p, np.float32) if p.dtype == np.float16 else p


def _stored(arrays: Sequence[Array | None], like: Sequence[Array]) -> tuple[Array, ...]:
    """As factors have them."""
    found = []
    for array, old in zip(arrays, like, strict=True):
        assert array is not None
        found.append(array.astype(old.dtype, copy=False))
    return tuple(found)


def _among(piece: SharedFactors, groups: Groups, some: Sequence[int]) -> Projection:
    """The layer's projection with these groups; the others have no rank."""
    at = {g: n for n, g in enumerate(some)}

    def of(arrays: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(arrays[at[g]] if g in at else None for g in range(len(groups)))

    return Projection(
        groups=tuple(tuple(group) for group in groups),
        ranks=tuple(piece.ranks[at[g]] if g in at else 0 for g in range(len(groups))),
        private=of(piece.private),
        shared=of(piece.shared),
        perm=of(piece.perm),
    )


def _blocks(groupings: Sequence[Groups], at_once: int) -> list[tuple[int, ...]]:
    """Experts in blocks of at most so many, so that no group is cut."""
    E = sum(len(group) for group in groupings[0])
    root = list(range(E))

    def find(e: int) -> int:
        while root[e] != e:
            e = root[e]
        return e

    for grouping in groupings:
        for own in partition(grouping, E):
            for e in own[1:]:
                root[find(e)] = find(own[0])
    tied: dict[int, list[int]] = {}
    for group in groupings[0]:
        for e in group:
            tied.setdefault(find(int(e)), []).append(int(e))
    largest = max(len(some) for some in tied.values())
    if largest > at_once:
        raise ArgumentError(
            f"groups tie {largest} experts together, and there is room for {at_once} at once; "
            "take smaller groups or more memory"
        )
    blocks: list[list[int]] = [[]]
    for together in tied.values():
        if len(blocks[-1]) + len(together) > at_once:
            blocks.append([])
        blocks[-1] += together
    return [tuple(block) for block in blocks]
