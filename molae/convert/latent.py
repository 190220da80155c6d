"""Method ``latent``: gate, up and down share their budget, factors in gauge form.

Experts are grouped in index order. Each group takes the largest rank whose numbers
fit its share of the size; which group size loses least is measured on one layer.
Needs no data. See ``docs/theory.md``.
"""

from __future__ import annotations

from molae.arch import Model
from molae.config import TYPES, ConvertConfig
from molae.convert.allocation import (
    Allocation,
    Candidate,
    Measure,
    gauge_ranks,
    group_size,
)
from molae.convert.fitting import Method, fit_shared
from molae.convert.probe import GROUP_SIZES
from molae.errors import ArgumentError
from molae.factored import Form, Split, index_groups
from molae.fit import stored_numbers

__all__ = ["METHOD"]

FORM: Form = "gauge"


def allocate(model: Model, config: ConvertConfig, probe: Measure) -> Allocation:
    """Groups and ranks for every layer and type.

    Raises
    ------
    ArgumentError
        A rank was given, a group is larger than E, or the size is out of reach.
    """
    size = config.target_size
    if config.rank is not None or size is None:
        raise ArgumentError(
            f"rank: method 'latent' finds its ranks from the size, got rank={config.rank}; "
            "leave it out, or take method 'molae'"
        )
    if size == 1.0:
        return Allocation(FORM, {})
    kinds: dict[str, Split] = {}
    candidates: tuple[Candidate, ...] = ()
    for kind in TYPES:
        k = group_size(config, kind, model.letters["E"])
        if k is None:
            tried = probe.candidates(kind, size)
            candidates += tried
            k = next((c.group_size for c in tried if c.chosen), None)
        kinds[kind] = _split(model, kind, k, size)
    return Allocation(FORM, dict.fromkeys(model.moe_layers, kinds), candidates)


def _split(model: Model, kind: str, k: int | None, size: float) -> Split:
    E, F, D = (model.letters[letter] for letter in "EFD")
    groups = index_groups(E, k or min(E, GROUP_SIZES[-1]))
    ranks = gauge_ranks(groups, size, F=F, D=D)
    if min(ranks) < 1:
        smallest = max(stored_numbers(1, len(g), F, D, FORM) / (len(g) * F * D) for g in groups)
        raise ArgumentError(
            f"size: {size:g} leaves no rank for {kind} in groups of {len(groups[0])}; "
            f"the smallest size that can be reached is {smallest:.4g}"
        )
    return Split(groups=groups, ranks=ranks)


METHOD = Method(
    name="latent",
    form=FORM,
    summary="gate, up and down share their budget; gauge-fixed factors, no data needed",
    allocate=allocate,
    fit=fit_shared,
)
