"""The tensors of a converted checkpoint's factors: which there must be, and whether they are."""

from __future__ import annotations

from collections.abc import Mapping

from molae.arch.model import Model
from molae.config import TYPES
from molae.errors import CheckpointError
from molae.factored import Form, LightModule, Split, group_tensors
from molae.io import TensorInfo, TensorSpec

__all__ = ["check_factors", "factored_specs", "light_specs"]


def factored_specs(
    model: Model, layer: int, kind: str, split: Split, form: Form
) -> tuple[TensorSpec, ...]:
    """The tensors that hold one layer's matrix type in molae's form."""
    F, D = model.letters["F"], model.letters["D"]
    prefix = model.experts_prefix(layer)
    return tuple(
        TensorSpec(part.name, "I32" if part.integer else model.dtype, part.shape)
        for g, (group, rank) in enumerate(zip(split.groups, split.ranks, strict=True))
        for part in group_tensors(prefix, kind, g, len(group), rank, F=F, D=D, form=form)
    )


def light_specs(model: Model, layer: int, light: LightModule) -> dict[str, TensorSpec]:
    """The tensors that hold what acts in the place of one layer's compressed experts, by role."""
    sizes = {letter: model.letters[letter] for letter in "EFD"}
    parts = light.tensors(model.experts_prefix(layer), **sizes)
    return {part.role: TensorSpec(part.name, model.dtype, part.shape) for part in parts}


def check_factors(model: Model, tensors: Mapping[str, TensorInfo]) -> None:
    """Every factor that ``quantization_config`` promises is there, and no others are.

    Parameters
    ----------
    model : Model
        Of a converted checkpoint.
    tensors : mapping of str to TensorInfo
        What the checkpoint holds.

    Raises
    ------
    CheckpointError
        A layer without experts has factors, gate or up alone leave a tensor that holds both,
        a factor is absent, of another shape or type, or one that nobody promised; the
        message names the entry or the tensor.
    """
    factored = model.factored
    assert factored is not None
    for layer, kinds in factored.layers.items():
        where = f"quantization_config.layers.{layer}"
        if layer not in model.moe_layers:
            raise CheckpointError(f"{where}: this layer has no experts; convert the original again")
        for kind in (kind for kind in TYPES if kind in kinds):
            if missing := [other for other in model.stored_together(kind) if other not in kinds]:
                raise CheckpointError(
                    f"{where}: has {kind} but not {missing[0]}, which layout {model.layout!r} "
                    "keeps in the same tensor; convert the original again"
                )
            specs = factored_specs(model, layer, kind, kinds[kind], factored.form)
            for spec in specs:
                _check(spec, f"{where}.{kind}", tensors)
            prefix = f"{model.experts_prefix(layer)}.{kind}."
            names = {spec.name for spec in specs}
            for name in tensors:
                if name.startswith(prefix) and name not in names:
                    raise CheckpointError(
                        f"{name}: quantization_config does not know it; convert the original again"
                    )
    for layer in factored.compressed:
        where = f"quantization_config.compressed_experts.{layer}"
        if layer not in model.moe_layers:
            raise CheckpointError(f"{where}: this layer has no experts; convert the original again")
        for spec in light_specs(model, layer, factored.light).values():
            _check(spec, where, tensors)


def _check(spec: TensorSpec, promised_by: str, tensors: Mapping[str, TensorInfo]) -> None:
    info = tensors.get(spec.name)
    if info is None:
        raise CheckpointError(
            f"{spec.name}: absent, though {promised_by} promises it; convert the original again"
        )
    if (info.shape, info.dtype) != (spec.shape, spec.dtype):
        raise CheckpointError(
            f"{spec.name}: expected {spec.dtype} of shape {spec.shape} by "
            f"quantization_config, got {info.dtype} of shape {info.shape}; "
            "convert the original again"
        )
