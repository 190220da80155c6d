"""The tensors of a checkpoint that is not there, by its config alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from molae.errors import CheckpointError, UnknownFamilyError
from molae.hf.opening import check_harmless, first_line
from molae.io import DTYPES, TensorInfo, parse_json

__all__ = ["read_config", "tensors_of"]

NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A ``config.json``.

    Raises
    ------
    molae.errors.CheckpointError
        It cannot be read, or is no JSON object.
    """
    try:
        found = parse_json(Path(path).read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: no JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: no JSON object")
    return found


def tensors_of(config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Names and shapes of what Transformers builds of a config, on the meta device.

    Parameters
    ----------
    config : mapping
        As in ``config.json``.

    Returns
    -------
    dict of str to TensorInfo

    Raises
    ------
    molae.errors.UnknownFamilyError
        Transformers does not know the model.
    molae.errors.CheckpointError
        It cannot be built.
    """
    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise UnknownFamilyError(f"config.json: Transformers knows no model_type {kind!r}")
    rest = {key: value for key, value in config.items() if key != "model_type"}
    check_harmless(config)
    try:
        made = CONFIG_MAPPING[str(kind)].from_dict(rest)
        with torch.device("meta"):
            net = AutoModelForCausalLM.from_config(made, trust_remote_code=False)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"config.json: Transformers cannot build this model ({first_line(error)})"
        ) from error
    written = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    dtype = NAMES.get(written, "F32")
    return {
        name: TensorInfo(
            name, dtype, tuple(p.shape), "", 0, p.numel() * DTYPES[dtype].itemsize
        )
        for name, p in net.named_parameters()
    }  # fmt: skip
