"""Which experts share a factor, and at which rank."""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from molae.arch import Model
from molae.config import TYPES, ConvertConfig
from molae.errors import ArgumentError
from molae.factored import VECTORS, Form, LightModule, Split
from molae.fit import stored_numbers

__all__ = [
    "Allocation",
    "Candidate",
    "Measure",
    "complete_fused",
    "gauge_ranks",
    "group_size",
    "largest_rank",
    "split_numbers",
]


@dataclass(frozen=True)
class Candidate:
    """One group size that was tried for one matrix type, and what it would cost.

    `error` is the relative Frobenius error that the spectra predict at the rank
    which the size allows, over the experts that were looked at; None where there
    were no weights to look at.
    """

    kind: str
    group_size: int
    rank: int
    error: float | None
    chosen: bool


class Measure(Protocol):
    """Says which group sizes there are to choose from, and which loses least."""

    def candidates(self, kind: str, size: float) -> tuple[Candidate, ...]: ...


@dataclass(frozen=True)
class Allocation:
    """The groups and ranks of a whole model; what a method decides before any fitting.

    `layers` maps a layer and matrix type to its `Split`; types that stay as they
    are in the source have no entry. `compressed` maps layers with compressed experts to how many
    of a token's they are; `light` is what acts in their place.
    """

    form: Form
    layers: Mapping[int, Mapping[str, Split]]
    candidates: tuple[Candidate, ...] = ()
    compressed: Mapping[int, int] = field(default_factory=dict)
    light: LightModule = VECTORS

    def split(self, layer: int, kind: str) -> Split | None:
        return self.layers.get(layer, {}).get(kind)

    def digest(self) -> str:
        """SHA-256 of the groups and ranks: two runs with the same digest store the same shapes."""
        facts: dict[str, Any] = {
            "form": self.form,
            "layers": {
                str(layer): {kind: split.to_dict() for kind, split in kinds.items()}
                for layer, kinds in self.layers.items()
            },
        }
        if self.compressed:
            facts["compressed"] = {str(layer): n for layer, n in self.compressed.items()}
            facts["light_units"] = self.light.units
            if self.light.biased:
                facts["light_biases"] = True
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def complete_fused(allocation: Allocation, model: Model) -> Allocation:
    """Where the source stores gate and up as one tensor, both leave it or neither does.

    The one that the method left alone is written as dense groups beside the other.
    """
    layers = {}
    for layer, kinds in allocation.layers.items():
        split_of = dict(kinds)
        for kind, split in kinds.items():
            for partner in model.stored_together(kind):
                split_of.setdefault(partner, Split(split.groups, (None,) * len(split.groups)))
        layers[layer] = {kind: split_of[kind] for kind in TYPES if kind in split_of}
    return replace(allocation, layers=layers)


def largest_rank(budget: float, *, k: int, F: int, D: int, form: Form, limit: int) -> int:
    """The largest rank up to `limit` whose factors store at most `budget` numbers; 0 if none."""
    return bisect.bisect_right(
        range(1, limit + 1), budget, key=lambda R: stored_numbers(R, k, F, D, form)
    )


def gauge_ranks(groups: Sequence[Sequence[int]], size: float, *, F: int, D: int) -> tuple[int, ...]:
    """For each group the largest rank whose gauge form stores at most `size` of its numbers.

    0 where no rank does.
    """
    return tuple(
        largest_rank(
            size * len(group) * F * D,
            k=len(group),
            F=F,
            D=D,
            form="gauge",
            limit=min(D, len(group) * F),
        )
        for group in groups
    )


def group_size(config: ConvertConfig, kind: str, E: int) -> int | None:
    """The group size asked for; None where it is left open.

    Raises
    ------
    ArgumentError
        It is larger than E.
    """
    k = config.group_size_of(kind)
    if k is not None and k > E:
        raise ArgumentError(f"group_size: {k} experts a group for {kind}, the model has E={E}")
    return k


def split_numbers(split: Split, *, F: int, D: int, form: Form) -> int:
    """Numbers stored for one layer's matrix type, its permutations not counted."""
    return sum(
        len(group) * F * D if rank is None else stored_numbers(rank, len(group), F, D, form)
        for group, rank in zip(split.groups, split.ranks, strict=True)
    )
