"""New models with latent experts, for training from scratch."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from molae import __version__
from molae.arch import Family, find_family
from molae.config import TYPES
from molae.errors import ArgumentError
from molae.factored import Factored, Form, LightModule, Split, index_groups
from molae.hf.experts import DEFAULT_STD, LatentExperts
from molae.hf.loading import MolaeConfig, place_experts

__all__ = ["latent_model"]


def latent_model(
    config: Any,
    *,
    group_size: int | Mapping[str, int] | None = None,
    rank: int | Mapping[str, int] | None = None,
    form: Form = "gauge",
    num_compressed: int = 0,
    light_module: str = "vectors",
    dtype: torch.dtype | None = None,
    device: Any = "cpu",
) -> Any:
    """Build a causal language model with latent experts and random weights.

    ``from_config`` of Transformers calls no loading hook, so it would build dense experts.
    The dense experts never exist here, not even for a moment: the model is put together on
    the meta device.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        Of a family that molae knows. It is copied. One with a molae ``quantization_config``
        gives groups and ranks, where `group_size` and `rank` are left out.
    group_size : int or mapping of str to int
        Experts that share a factor, in index order: one number, or one a matrix type
        (``{"gate_proj": 8, "up_proj": 8}``). A type left out stays dense.
    rank : int or mapping of str to int
        R, likewise, for the same types.
    form : {'gauge', 'plain'}
    num_compressed : int
        How many of a token's experts do not run, in every layer. With it `group_size` and `rank`
        may be left out: then all experts are dense.
    light_module : str
        What acts in their place: 'vectors' (`molae.ops.compressed_experts_forward`), 'additive',
        or 'narrow:UNITS' or 'narrow:1/N' (`molae.ops.narrow_experts_forward`).
    dtype : torch.dtype, optional
        Of the weights; by default the config's, or float32.
    device : str or torch.device

    Returns
    -------
    transformers.PreTrainedModel
        In training mode. Experts start as `LatentExperts.reset_parameters` says, with the
        config's ``initializer_range``; all else as Transformers does it. ``save_pretrained``
        writes molae's format, with the types left dense in the layout ``fused``.

    Raises
    ------
    molae.errors.UnknownFamilyError, molae.errors.ArgumentError

    Examples
    --------
    >>> from transformers import OlmoeConfig
    >>> from molae.hf import latent_model
    >>> config = OlmoeConfig(
    ...     hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    ...     num_experts=8, num_experts_per_tok=2, vocab_size=100,
    ... )
    >>> model = latent_model(config, group_size=4, rank=8)
    >>> tuple(model.model.layers[0].mlp.experts.up_proj[1].private.shape)
    (4, 16, 8)
    """
    config = copy.deepcopy(config)
    raw = config.to_dict()
    family = find_family(raw)
    letters = family.read_letters(raw)
    if not 0 <= num_compressed < letters["K"]:
        raise ArgumentError(
            f"num_compressed: expected 0 to K - 1 = {letters['K'] - 1}, got {num_compressed}"
        )
    moe_layers = family.read_moe_layers(raw)
    quant = raw.get("quantization_config")
    factored = Factored("scratch", form, "", {}, __version__)
    if group_size is not None or rank is not None:
        kinds = _splits(group_size, rank, letters["E"], letters["D"])
        factored = dataclasses.replace(factored, layers=dict.fromkeys(moe_layers, kinds))
    elif quant:
        factored = Factored.from_dict(quant, letters)
    elif not num_compressed:
        raise ArgumentError("group_size and rank: needed, the config says nothing of groups")
    if num_compressed:
        compressed = dict.fromkeys(moe_layers, num_compressed)
        light = LightModule.parse(light_module, letters["F"], biased=family.has_biases)
        factored = dataclasses.replace(factored, compressed=compressed, light=light)
    factored = _fused(factored, family)
    config.quantization_config = MolaeConfig(**factored.to_dict())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    place_experts(model, family, factored, raw)
    model.to_empty(device=device)
    text = config.get_text_config()
    _initialize(model, getattr(text, "initializer_range", None) or DEFAULT_STD)
    # Nothing to undo on the way to the disk: the module's names are the format's.
    model._weight_conversions = []
    return model.train()


def _splits(group_size: Any, rank: Any, E: int, D: int) -> dict[str, Split]:
    sizes, ranks = _by_type("group_size", group_size), _by_type("rank", rank)
    if sizes.keys() != ranks.keys():
        raise ArgumentError(
            f"group_size and rank: expected the same types, got {sorted(sizes)} and {sorted(ranks)}"
        )
    for kind in sizes:
        if not 1 <= sizes[kind] <= E:
            raise ArgumentError(f"group_size: expected 1 to E={E} for {kind}, got {sizes[kind]}")
        if not 1 <= ranks[kind] <= D:
            raise ArgumentError(f"rank: expected 1 to D={D} for {kind}, got {ranks[kind]}")
    groups = {kind: index_groups(E, size) for kind, size in sizes.items()}
    return {kind: Split(g, (ranks[kind],) * len(g)) for kind, g in groups.items()}


def _by_type(name: str, value: Any) -> dict[str, int]:
    given = dict(value) if isinstance(value, Mapping) else dict.fromkeys(TYPES, value)
    if not given or not set(given) <= set(TYPES):
        raise ArgumentError(f"{name}: expected keys among {TYPES}, got {sorted(given)}")
    if not all(isinstance(x, int) and not isinstance(x, bool) for x in given.values()):
        raise ArgumentError(f"{name}: expected whole numbers, got {value!r}")
    return given


def _fused(factored: Factored, family: Family) -> Factored:
    """The same factors in the layout of the modules, which keeps gate and up together."""
    layout = next(
        (x for x in family.layouts if all(t.name == f"${{experts}}.{t.role}" for t in x.tensors)),
        None,
    )
    if layout is None:
        raise ArgumentError(
            f"config: family {family.model_type} has no layout 'fused', "
            "in which new models are saved"
        )
    layers = {}
    for layer, kinds in factored.layers.items():
        complete = dict(kinds)
        for kind, split in kinds.items():
            for partner in layout.of_type(kind).types:
                dense = (None,) * len(split.groups)
                complete.setdefault(partner, Split(split.groups, dense))
        layers[layer] = complete
    return dataclasses.replace(factored, layout=layout.name, layers=layers)


@torch.no_grad()
def _initialize(model: Any, std: float) -> None:
    # What was initialized on the meta device is marked as done, and is not.
    for part in (*model.modules(), *model.parameters(), *model.buffers()):
        if hasattr(part, "_is_hf_initialized"):
            part._is_hf_initialized = False
    model.initialize_weights()
    model.tie_weights()
    for module in model.modules():
        if isinstance(module, LatentExperts):
            module.reset_parameters(std)
