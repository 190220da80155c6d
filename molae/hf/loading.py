"""Converted checkpoints in Transformers: `from_pretrained` puts the factors where they belong.

Importing this module makes Transformers know the method ``"molae"``. See
``docs/transformers.md`` for why this hook and no other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import MergeModulelist, WeightConverter, WeightRenaming
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from molae.arch import Family, check_factors, describe, find_family
from molae.arch.family import FUSED, Layout
from molae.errors import ArgumentError, CheckpointError
from molae.factored import QUANT_METHOD, Factored, Split
from molae.hf.activation import activation_of
from molae.hf.aliases import register_aliases
from molae.hf.experts import LatentExperts
from molae.io import TensorInfo
from molae.io.header import read_header

__all__ = ["MolaeConfig", "MolaeQuantizer", "place_experts"]


register_aliases()


@register_quantization_config(QUANT_METHOD)
class MolaeConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a converted checkpoint, as Transformers carries it.

    It is kept as it was read and written back the same; `molae.factored.Factored` reads it.
    """

    def __init__(self, **entries: Any) -> None:
        self.__dict__.update(entries)
        self.__dict__["quant_method"] = QUANT_METHOD


@register_quantizer(QUANT_METHOD)
class MolaeQuantizer(HfQuantizer):
    """Puts `LatentExperts` into a model before its weights are read.

    Nothing is quantized: after the load the model is an ordinary one again, which may be
    cast, trained and saved.
    """

    requires_calibration = False

    def __init__(self, quantization_config: Any, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        if not self.pre_quantized:
            raise ArgumentError(
                "quantization_config: molae converts checkpoints on the disk, not while they are "
                "loaded; run 'molae convert SRC DST' and load DST"
            )
        self._converters: list[WeightConverter] = []

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **options: Any
    ) -> None:
        _refuse_parallel(getattr(model.config, "distributed_config", None))
        config = _raw_config(model, self.quantization_config.to_dict())
        family, factored = _read(config)
        if checkpoint_files and all(str(f).endswith(".safetensors") for f in checkpoint_files):
            _check_files(config, checkpoint_files, f"{model.base_model_prefix}.")
        layout = place_experts(model, family, factored, config)
        self._converters = _converters(layout)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """The family's own renamings, and molae's way to experts that kept their form.

        The family's converters are left out: they end in tensors that hold gate and up
        together, and on the way back to the disk their patterns would take factors for experts.
        """
        kept = [
            _of_the_whole_name(entry)
            for entry in weight_conversions
            if not isinstance(entry, WeightConverter)
            or not any("experts." in name for name in entry.target_patterns)
        ]
        return kept + self._converters

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> None:
        for name, module in model.named_modules():
            if isinstance(module, LatentExperts):
                _check_loaded(name, module)
        # The factors are plain numbers, so nothing of a quantized model's limits applies.
        del model.hf_quantizer, model.quantization_method
        model.is_quantized = False
        for module in model.modules():
            config = getattr(module, "config", None)
            if config is not None and hasattr(config, "_is_quantized"):
                del config._is_quantized

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def place_experts(
    model: nn.Module, family: Family, factored: Factored, config: Mapping[str, Any]
) -> Layout:
    """Replace the experts of a model by those that a conversion left; on the meta device.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With or without a head.
    family : Family
    factored : Factored
    config : dict
        The model's config, raw.

    Returns
    -------
    Layout
        How the source holds the types that were not touched.

    Raises
    ------
    CheckpointError
        `factored` does not fit the family or the model.
    """
    layout = next((x for x in family.layouts if x.name == factored.layout), None)
    if layout is None:
        raise CheckpointError(
            f"quantization_config.layout: {factored.layout!r} is unknown for family "
            f"{family.model_type}; known are {', '.join(x.name for x in family.layouts)}"
        )
    letters, moe_layers = family.read_letters(config), family.read_moe_layers(config)
    for layer in (*factored.layers, *factored.compressed):
        if layer not in moe_layers:
            raise CheckpointError(
                f"quantization_config.layers.{layer}: this layer has no experts; "
                "convert the original again"
            )
    for layer in moe_layers:
        kinds, n = factored.layers.get(layer, {}), factored.compressed.get(layer, 0)
        if kinds or n or any(t.per_expert or not t.as_matrices for t in layout.tensors):
            path = _experts_path(model, family, layer)
            _replace(model, path, kinds, n, layout, factored, letters)
    return layout


def _replace(
    model: nn.Module,
    path: str,
    kinds: Mapping[str, Split],
    num_compressed: int,
    layout: Layout,
    factored: Factored,
    letters: Mapping[str, int],
) -> None:
    old: Any = model.get_submodule(path)
    first = next(old.parameters())
    stored = layout.of_type("gate_proj")
    fused = stored.role == FUSED and "gate_proj" not in kinds
    new = LatentExperts(
        letters["E"],
        letters["D"],
        letters["F"],
        gate=kinds.get("gate_proj"),
        up=kinds.get("up_proj"),
        down=kinds.get("down_proj"),
        form=factored.form,
        activation=activation_of(old),
        fused=fused,
        transposed=stored.transposed,
        interleaved=stored.interleaved,
        bias=isinstance(getattr(old, "down_proj_bias", None), nn.Parameter),
        num_compressed=num_compressed,
        light=factored.light,
        device="meta",
        dtype=first.dtype,
    )
    model.set_submodule(path, new.train(old.training))


def _experts_path(model: nn.Module, family: Family, layer: int) -> str:
    """Name of a layer's experts in the model, which may be one without a head."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for block in family.blocks:
        name = family.experts.replace("${block}", block).replace("${layer}", str(layer))
        for path in (name, name.removeprefix(prefix)):
            try:
                module = model.get_submodule(path)
            except AttributeError:
                continue
            if isinstance(getattr(module, "down_proj", None), nn.Parameter):
                return path
    raise CheckpointError(
        f"{type(model).__name__}: no experts in layer {layer} under a name that family "
        f"{family.model_type} has; this version of Transformers builds them in another way"
    )


def _converters(layout: Layout) -> list[WeightConverter]:
    """From one tensor an expert to one of all, for the types that molae did not touch.

    The lookahead, which Transformers drops from a target and keeps in a source, is for the way
    back: it tells ``experts.down_proj`` from the factors ``experts.down_proj.0.shared``.
    """
    return [
        WeightConverter(
            source_patterns=_suffix(tensor.name).replace("${expert}", "*"),
            target_patterns=f".experts.{tensor.role}(?!\\.)",
            operations=[MergeModulelist(dim=0)],
        )
        for tensor in layout.tensors
        if tensor.per_expert
    ]


def _of_the_whole_name(entry: Any) -> Any:
    """A renaming to an experts' tensor, which on the way back leaves ``down_proj.0.shared``."""
    target = entry.target_patterns[0]
    if type(entry) is not WeightRenaming or not target.endswith((FUSED, "experts.down_proj")):
        return entry
    copied: Any = entry.copy(list(entry.source_patterns), [target + r"(?!\.)"])
    return copied


def _suffix(template: str) -> str:
    return template.replace("${experts}", ".experts")


def _refuse_parallel(distributed: Any) -> None:
    """The plans of Transformers name the dense tensors; with factors they would not act."""
    for name in ("tp_size", "ep_size", "pp_size"):
        if (getattr(distributed, name, None) or 1) > 1 or getattr(distributed, "tp_plan", None):
            raise ArgumentError(
                "distributed_config: tensor, expert and pipeline parallelism are not supported "
                "for converted checkpoints; 'molae materialize' makes an ordinary one"
            )


def _raw_config(model: Any, quant: Mapping[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = model.config.to_dict()
    config["quantization_config"] = dict(quant)
    return config


def _read(config: Mapping[str, Any]) -> tuple[Family, Factored]:
    family = find_family(config)
    letters = family.read_letters(config)
    quant = config["quantization_config"]
    return family, Factored.from_dict(quant, letters)


def _check_files(config: Mapping[str, Any], files: Iterable[str], prefix: str) -> None:
    """Refuse, by name and before anything is read, what the config does not promise."""
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for info in read_header(Path(file), Path(file).name).tensors:
            tensors[info.name] = info
    if not any(name.startswith(prefix) for name in tensors):  # saved from a model without a head
        tensors = {prefix + name: info for name, info in tensors.items()}
    check_factors(describe(config, tensors, converted=True), tensors)


def _check_loaded(name: str, module: nn.Module) -> None:
    """Refuse a tensor that no checkpoint gave (a state dict has no header), and a bad index."""
    for key, tensor in module.state_dict(keep_vars=True).items():
        if tensor.is_meta:  # kept on the disk, where `_check_files` saw it
            continue
        if not getattr(tensor, "_is_hf_initialized", False):
            raise CheckpointError(f"{name}.{key}: absent from what was loaded")
        if key.endswith(".perm"):
            every = torch.arange(len(tensor), dtype=tensor.dtype, device=tensor.device)
            if not torch.equal(tensor.sort().values, every):
                raise CheckpointError(
                    f"{name}.{key}: not a permutation of 0 to {len(tensor) - 1}; "
                    "convert the original again"
                )
