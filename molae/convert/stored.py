"""Experts of a converted checkpoint as `molae.ops` runs them, and as they are stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from molae.arch import Model, light_specs
from molae.convert.light import FittedLight, Light
from molae.factored import Form, LightModule, Split, group_tensors
from molae.fit.layer import runnable
from molae.ops import Projection

__all__ = ["projection_tensors", "stored_light", "stored_projection"]

#: A tensor by its name; may be mapped.
Tensors = Callable[[str], np.ndarray]


def stored_projection(
    tensors: Tensors, model: Model, layer: int, kind: str, split: Split, form: Form
) -> Projection:
    """One layer's matrix type; where the arrays are aligned they are used as they lie."""
    F, D, prefix = model.letters["F"], model.letters["D"], model.experts_prefix(layer)
    by_role: dict[str, list[np.ndarray | None]] = {"shared": [], "perm": [], "private": []}
    for g, (group, rank) in enumerate(zip(split.groups, split.ranks, strict=True)):
        parts = group_tensors(prefix, kind, g, len(group), rank, F=F, D=D, form=form)
        own = {
            "private" if part.role == "dense" else part.role: np.require(
                tensors(part.name), requirements=["C", "A"]
            )
            for part in parts
        }
        for role, found in by_role.items():
            found.append(own.get(role))
    arrays = {role: tuple(found) for role, found in by_role.items()}
    return runnable(Projection(groups=split.groups, ranks=split.ranks, form=form, **arrays))


def projection_tensors(p: Projection, model: Model, layer: int, kind: str) -> dict[str, np.ndarray]:
    """By its name each tensor that `stored_projection` reads."""
    F, D, prefix = model.letters["F"], model.letters["D"], model.experts_prefix(layer)
    found: dict[str, np.ndarray] = {}
    for g, (group, rank) in enumerate(zip(p.groups, p.ranks, strict=True)):
        own = {"shared": p.shared[g], "perm": p.perm[g]}
        own["private"] = own["dense"] = p.private[g]
        for part in group_tensors(prefix, kind, g, len(group), rank, F=F, D=D, form=p.form):
            array = own[part.role]
            assert array is not None
            found[part.name] = array
    return found


def stored_light(
    tensors: Tensors, model: Model, layer: int, counts: Mapping[int, int], light: LightModule
) -> Light | None:
    """What acts in the place of a layer's compressed experts, where it has any."""
    if layer not in counts:
        return None
    specs = light_specs(model, layer, light)
    arrays = {role: tensors(spec.name) for role, spec in specs.items()}
    return FittedLight.stored(arrays, counts[layer]).runnable()
