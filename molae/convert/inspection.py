"""What a checkpoint is, ordinary or converted, or only promised by a config."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from molae._version import __version__
from molae.arch import Family, Model, describe, find_family, promise
from molae.convert.quantized import find_packing
from molae.errors import ArgumentError, CheckpointError
from molae.factored import Factored, LightModule
from molae.io import DTYPES, ENCODINGS, TensorInfo, open_checkpoint
from molae.io.dtypes import FLOATING, config_dtype

__all__ = ["Inspection", "Promised", "inspect", "inspect_config", "read_promise"]

_SHARED = {"shared_expert", "shared_experts", "shared_mlp", "share_expert"}
_NEXT_TOKEN = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")
_OTHERS = ("vision_config", "audio_config")


@dataclass(frozen=True)
class Inspection:
    """Facts about a checkpoint.

    Attributes
    ----------
    path : str
    family, dtype : str
    layout : str or None
        In which the files hold the experts; None where there was a config alone.
    letters : dict of str to int
        L layers, E experts, K experts a token, D model width, F expert width.
    moe_layers : tuple of int
    shapes : dict of str to tuple of int
        (rows, cols) of an expert's matrices.
    total_parameters : int or None
        As stored; see `molae.arch.Model.counts`. Of a config: those of the language model,
        unquantized; None where the config does not determine them, `notes` say why.
    expert_parameters : int
        Of the routed experts.
    active_experts : int
        Those of them that a token meets; see `molae.arch.Model.active_experts`.
    active_parameters : int or None
        All that a token of a text meets; None as above.
    shared_parameters : int or None
        Of experts that run for each token; None as above.
    active_compressed : int or None
        Active parameters if some of a token's experts were compressed, where that was asked.
    bytes : int or None
        As the files hold them; of a config of what is counted. None where it is not known.
    decoded_bytes : int
        The same as the numbers that are told.
    encoding : str or None
        What the files hold in the place of the numbers that are told, such as 'fp8'.
    files : int
        0 where there was a config alone.
    factored : Factored or None
        Groups and ranks, where molae converted it.
    unsupported : str or None
        Why molae does not convert this family, where it does not.
    notes : tuple of str
        What is not counted, or was taken for granted.
    """

    path: str
    family: str
    layout: str | None
    dtype: str
    letters: Mapping[str, int]
    moe_layers: tuple[int, ...]
    shapes: Mapping[str, tuple[int, int]]
    total_parameters: int | None
    expert_parameters: int
    active_experts: int
    active_parameters: int | None
    shared_parameters: int | None
    active_compressed: int | None
    bytes: int | None
    decoded_bytes: int
    encoding: str | None
    files: int
    factored: Factored | None
    unsupported: str | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The same facts for JSON."""
        out = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        out["converted"] = self.factored is not None
        out["factored"] = self.factored.to_dict() if self.factored is not None else None
        return out


def inspect(
    src: str | os.PathLike[str],
    *,
    family: Family | None = None,
    compressed_experts: int = 0,
    light_module: str = "vectors",
) -> Inspection:
    """Read what a checkpoint is, without reading its weights.

    Parameters
    ----------
    src : str or path
        Folder, or hub id.
    family : Family, optional
        As in `molae.convert`.
    compressed_experts : int
        Count also what would be active if so many of a token's experts did not run.
    light_module : str
        What would act in their place; as in `molae.ConvertConfig`.

    Returns
    -------
    Inspection
        Family, layout, shapes and sizes.

    Raises
    ------
    CheckpointError, UnknownFamilyError
        As in `molae.convert`.
    ArgumentError
        More compressed experts than a token can have, or no such light module.

    Examples
    --------
    >>> import molae, molae.demo
    >>> found = molae.inspect(molae.demo.CHECKPOINT, compressed_experts=2)
    >>> found.family, found.active_compressed < found.active_parameters < found.total_parameters
    ('olmoe', True)
    """
    with open_checkpoint(src) as checkpoint:
        model = describe(checkpoint, family=family, converted=True)
        found = _facts(os.fspath(src), model, checkpoint.nbytes, compressed_experts, light_module)
        aside, notes = _aside(model)
        assert found.active_parameters is not None
        compressed = found.active_compressed
        return dataclasses.replace(
            found,
            active_parameters=found.active_parameters - aside,
            active_compressed=None if compressed is None else compressed - aside,
            bytes=checkpoint.stored_nbytes,
            encoding=checkpoint.encoding,
            files=len(checkpoint.files),
            notes=notes,
        )


@dataclass(frozen=True)
class Promised:
    """What a config promises: a model, and whether more than its experts is known of it."""

    model: Model
    others: Mapping[str, TensorInfo] | None
    notes: tuple[str, ...]


def read_promise(
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo] | None,
    *,
    family: Family | None = None,
    unknown: str = "",
) -> Promised:
    """What a config promises.

    Parameters
    ----------
    config : mapping
        As in ``config.json``.
    tensors : mapping of str to TensorInfo, optional
        What Transformers builds of it; see `molae.hf.shapes.tensors_of`.
    family : Family, optional
        As in `molae.convert`.
    unknown : str
        Why there are no `tensors`.

    Raises
    ------
    CheckpointError, UnknownFamilyError
        No family, a size is missing or makes no sense, no layer has experts, or Transformers
        builds other experts than the family's description says.
    """
    family = family or find_family(config)
    notes = []
    dtype = config_dtype(config)
    if dtype is None:
        dtype = "BF16"  # as which molae reads encoded files
        if "quantization_config" not in config:
            notes.append("config.json names no type; bfloat16 is taken for it.")
    others = None
    if tensors is None:
        notes.append(f"Only the experts are counted: {unknown}.")
    else:
        language = _language(tensors)
        others = {n: _as_type(info, dtype) for n, info in language.items() if not _is_expert(n)}
    model = promise(config, family, others or {}, dtype=dtype)
    if tensors is not None:
        built = sum(info.size for name, info in tensors.items() if _is_expert(name))
        own = promise(_plain(config), family, {}, dtype=dtype).counts().expert_parameters
        if built != own:
            raise CheckpointError(
                f"config.json: {own:,} numbers of experts by the description of family "
                f"{family.model_type}, Transformers builds {built:,}; one of the two does not fit "
                "this model"
            )
    notes += _left_out(config)
    return Promised(model, others, tuple(notes))


def inspect_config(
    name: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo] | None = None,
    *,
    family: Family | None = None,
    unknown: str = "",
    compressed_experts: int = 0,
    light_module: str = "vectors",
) -> Inspection:
    """The same of a checkpoint that is not there: its config, and what Transformers builds of it.

    Parameters
    ----------
    name : str
        Of the config, for messages.
    config, tensors, family, unknown
        As in `read_promise`.
    compressed_experts, light_module
        As in `inspect`.

    Returns
    -------
    Inspection
        Of the language model.
    """
    found = read_promise(config, tensors, family=family, unknown=unknown)
    model, others = found.model, found.others
    decoded = sum(info.nbytes for info in model.tensors.values())
    facts = _facts(name, model, decoded, compressed_experts, light_module)
    nbytes: int | None = decoded
    packing, notes = None, list(found.notes)
    try:
        packing = find_packing(config)
    except CheckpointError as error:
        nbytes = None
        notes.append(f"{error}.")
    if packing is not None:
        each = sum(packing.matrix_bytes(*model.shape(kind)) for kind in facts.shapes)
        nbytes = len(model.moe_layers) * model.letters["E"] * each
        nbytes += packing.other_bytes(others or {})
        if packing.encoding not in ENCODINGS and facts.unsupported is None:
            notes.append(
                f"molae does not read files of {packing.encoding}; dequantize them to BF16 first."
            )
    return dataclasses.replace(
        facts,
        layout=None,
        total_parameters=facts.total_parameters if others is not None else None,
        active_parameters=facts.active_parameters if others is not None else None,
        active_compressed=facts.active_compressed if others is not None else None,
        shared_parameters=facts.shared_parameters if others is not None else None,
        bytes=nbytes,
        encoding=packing.encoding if packing else None,
        notes=tuple(notes),
    )


def _facts(path: str, model: Model, decoded: int, compressed: int, light: str) -> Inspection:
    counts = model.counts()
    return Inspection(
        path=path,
        family=model.family.model_type,
        layout=model.layout,
        dtype=model.dtype,
        letters=dict(model.letters),
        moe_layers=model.moe_layers,
        shapes={kind: model.shape(kind) for kind in model.kinds},
        total_parameters=counts.total_parameters,
        expert_parameters=counts.expert_parameters,
        active_experts=model.active_experts(),
        active_parameters=counts.active_parameters,
        shared_parameters=_numbers(
            info for name, info in model.tensors.items() if _SHARED & set(name.split("."))
        ),
        active_compressed=_active_compressed(model, compressed, light) if compressed else None,
        bytes=decoded,
        decoded_bytes=decoded,
        encoding=None,
        files=0,
        factored=model.factored,
        unsupported=model.family.unsupported,
        notes=(),
    )


def _aside(model: Model) -> tuple[int, tuple[str, ...]]:
    """Numbers of a checkpoint that no token of a text meets, and what they are."""
    language = _language(model.tensors)
    L = model.letters["L"]
    heads = _numbers(
        info
        for name, info in model.tensors.items()
        if "mtp" in name.split(".") or (model.layer_of(name) or 0) >= L
    )
    others = _numbers(
        info
        for name, info in model.tensors.items()
        if name not in language and "mtp" not in name.split(".")
    )
    told = (
        (heads, "next-token layers"),
        (others, "parts beside the language model"),
    )
    notes = tuple(
        f"{count:,} numbers of {what} are in the total, and not among the active."
        for count, what in told
        if count
    )
    return heads + others, notes


def _numbers(tensors: Iterable[TensorInfo]) -> int:
    return sum(info.size for info in tensors if info.dtype in FLOATING)


def _as_type(info: TensorInfo, dtype: str) -> TensorInfo:
    nbytes = DTYPES[dtype].nbytes(prod(info.shape))
    return dataclasses.replace(info, dtype=dtype, nbytes=nbytes)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "quantization_config"}


def _is_expert(name: str) -> bool:
    """Whether a parameter of a model that Transformers built is a matrix of routed experts."""
    parts = name.removesuffix(".weight").split(".")
    return "experts" in parts[:-1] and parts[-1].endswith("_proj")


def _language(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Those of the language model, where a model has other parts beside it."""
    inner = {n: info for n, info in tensors.items() if "language_model" in n.split(".")}
    if not inner:
        return dict(tensors)
    return inner | {n: info for n, info in tensors.items() if "lm_head" in n.split(".")}


def _left_out(config: Mapping[str, Any]) -> list[str]:
    """What a config names beyond its language model."""
    text = config.get("text_config")
    notes = []
    for key in _NEXT_TOKEN:
        for own in (config, text if isinstance(text, Mapping) else {}):
            count = own.get(key)
            if isinstance(count, int) and count > 0:
                notes.append(f"Next-token layers ({key} {count}) are not counted.")
                break
        if notes:
            break
    parts = [key for key in _OTHERS if config.get(key)]
    if parts:
        notes.append(f"Only the language model is counted, without {' and '.join(parts)}.")
    return notes


def _active_compressed(model: Model, n: int, light: str) -> int:
    K = model.letters["K"]
    if not 0 < n < K:
        raise ArgumentError(f"compressed_experts: expected 0 to K - 1 = {K - 1}, got {n}")
    factored = model.factored or Factored("", "gauge", model.layout, {}, __version__)
    factored = dataclasses.replace(
        factored,
        compressed=dict.fromkeys(model.moe_layers, n),
        light=LightModule.parse(light, model.letters["F"], biased=model.has_biases),
    )
    return dataclasses.replace(model, factored=factored).counts().active_parameters
