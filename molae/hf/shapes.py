"""The tensors that a config promises, without a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from molae.errors import CheckpointError, UnknownFamilyError
from molae.hf.opening import check_harmless, first_line
from molae.io import DTYPES, TensorInfo
from molae.io.dtypes import config_dtype

__all__ = ["tensors_of"]


def tensors_of(config: Mapping[str, Any], *, known_as: str | None = None) -> dict[str, TensorInfo]:
    """Names and shapes of what Transformers builds of a config, on the meta device.

    Parameters
    ----------
    config : mapping
        As in ``config.json``. Of one with ``text_config`` the language model is built alone
        where Transformers can do that.
    known_as : str, optional
        The model type under which Transformers builds the same language model.

    Returns
    -------
    dict of str to TensorInfo
        Tied tensors once, all in the type that the config names, quantized ones as if they were
        not.

    Raises
    ------
    molae.errors.UnknownFamilyError
        Transformers does not know the model.
    molae.errors.CheckpointError
        It cannot be built, or is built with other sizes than the config's.
    """
    text = config.get("text_config")
    nested = isinstance(text, Mapping)
    own: Mapping[str, Any] = text if isinstance(text, Mapping) else config
    kind = known_as or own.get("model_type")
    for part in (config, own):
        check_harmless(part)
    try:
        if _is_language(kind):
            net = _build(AutoModelForCausalLM, str(kind), own)
        elif config.get("model_type") in CONFIG_MAPPING:
            whole = config if nested or not _is_nested(config) else {"text_config": dict(config)}
            made = str(config["model_type"])
            auto = AutoModelForCausalLM if _is_language(made) else AutoModelForImageTextToText
            net = _build(auto, made, whole)
        else:
            raise UnknownFamilyError(
                f"config.json: Transformers {_version()} knows no model_type "
                f"{config.get('model_type')!r}"
            )
    except UnknownFamilyError:
        raise
    except Exception as error:  # each model's own code may fail in its own way
        raise CheckpointError(
            f"config.json: Transformers cannot build this model ({first_line(error)})"
        ) from error
    _check(net, own)
    dtype = config_dtype(config) or "F32"
    size = DTYPES[dtype].itemsize
    return {
        name: TensorInfo(name, dtype, tuple(t.shape), "", 0, t.numel() * size)
        for name, t in _once(net.state_dict(keep_vars=True)).items()
        if t.is_floating_point()
    }


def _once(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tied tensors under the first of their names."""
    names: dict[int, str] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), name)
    return {name: tensors[name] for name in names.values()}


def _is_language(kind: object) -> bool:
    return (
        kind in CONFIG_MAPPING and CONFIG_MAPPING[str(kind)] in AutoModelForCausalLM._model_mapping
    )


def _is_nested(config: Mapping[str, Any]) -> bool:
    """Whether Transformers keeps in ``text_config`` what this config has at its top."""
    made = CONFIG_MAPPING[str(config["model_type"])]
    return "hidden_size" in config and "text_config" in getattr(made, "sub_configs", {})


def _build(auto: Any, kind: str, config: Mapping[str, Any]) -> Any:
    # Nothing quantized, and no code of the checkpoint's own: only shapes are asked for.
    left_out = ("model_type", "quantization_config", "auto_map")
    told = logging.get_verbosity()
    logging.set_verbosity_error()  # its advice is for those who would run the model
    try:
        made = CONFIG_MAPPING[kind].from_dict(_without(config, left_out))
        with torch.device("meta"):
            return auto.from_config(made, trust_remote_code=False)
    finally:
        logging.set_verbosity(told)


def _without(config: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    inner = ("", *keys[1:])  # a nested config keeps its model type
    return {key: _value(value, inner) for key, value in config.items() if key not in keys}


def _value(value: Any, keys: tuple[str, ...]) -> Any:
    if isinstance(value, list):
        return [_value(own, keys) for own in value]
    if not isinstance(value, Mapping):
        return value
    if set(value) == {"__float__"}:  # so Transformers writes infinity
        return float(value["__float__"])
    return _without(value, keys)


def _check(net: Any, config: Mapping[str, Any]) -> None:
    """Keys that Transformers reads under another name must not become its defaults."""
    size = tuple(net.get_input_embeddings().weight.shape)
    wanted = config.get("vocab_size", size[0]), config.get("hidden_size", size[1])
    if size != wanted:
        raise CheckpointError(
            f"config.json: promises embeddings of {wanted}, Transformers {_version()} builds "
            f"{size}; it reads this config in another way"
        )


def _version() -> str:
    import transformers

    return str(transformers.__version__)
