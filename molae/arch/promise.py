"""A model of which only the config is there: what its checkpoint would hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from molae.arch.factors import factored_specs, light_specs
from molae.arch.family import Family
from molae.arch.model import Model, _expected, _wanted_shape
from molae.config import TYPES
from molae.factored import Factored
from molae.io import TensorInfo, TensorSpec

__all__ = ["promise"]


def promise(
    config: Mapping[str, Any], family: Family, others: Mapping[str, TensorInfo], *, dtype: str
) -> Model:
    """A model as the family describes it, without a checkpoint.

    Parameters
    ----------
    config : mapping
        As in ``config.json``, of an ordinary or of a converted model.
    family : Family
    others : mapping of str to TensorInfo
        What there is besides the experts, under whatever names; may be empty.
    dtype : str
        Of the experts, unquantized, in the format's words.

    Returns
    -------
    Model
        Its experts in the layout of the family with the fewest tensors, as a config does not say
        in which they are; or in the one that a conversion names.

    Raises
    ------
    CheckpointError
        A size is missing or makes no sense, or no layer has experts.
    """
    letters = family.read_letters(config)
    layers = family.read_moe_layers(config)
    quant = config.get("quantization_config")
    converted = isinstance(quant, Mapping) and quant.get("quant_method") == "molae"
    factored = Factored.from_dict(quant, letters) if converted and quant else None
    if factored is not None:
        layout = family.find_layout(factored)
    else:
        layout = min(family.layouts, key=lambda own: sum(t.per_expert for t in own.tensors))
    tensors = dict(others)
    model = Model(
        family, letters, layers, layout.name, dtype, factored, family.blocks[0], layout, tensors,
        family.is_tied(config),
    )  # fmt: skip
    for spec in _specs(model):
        tensors[spec.name] = TensorInfo(spec.name, spec.dtype, spec.shape, "", 0, spec.nbytes)
    return model


def _specs(model: Model) -> Iterator[TensorSpec]:
    for name, (tensor, _, _) in _expected(model).items():
        yield TensorSpec(name, model.dtype, _wanted_shape(model, tensor))
    if model.factored is None:
        return
    for layer in model.moe_layers:
        kinds = model.factored.layers.get(layer, {})
        for kind in (kind for kind in TYPES if kind in kinds):
            yield from factored_specs(model, layer, kind, kinds[kind], model.factored.form)
        if layer in model.factored.compressed:
            yield from light_specs(model, layer, model.factored.light).values()
