"""The families that are known: those that molae ships, and a user's own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from molae.arch.description import parse_family, read_family
from molae.arch.family import Family
from molae.errors import CheckpointError, UnknownFamilyError, shorten
from molae.factored import QUANT_METHOD
from molae.io import parse_json

__all__ = ["families", "find_family", "known_families", "load_family", "own_family"]


@cache
def families() -> Mapping[str, Family]:
    """The families that molae ships, by model type."""
    found: dict[str, Family] = {}
    for entry in sorted(resources.files("molae.arch").iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".json") and entry.name != "family.schema.json":
            family = parse_family(entry.read_text("utf-8"), entry.name)
            found |= dict.fromkeys(family.model_types, family)
    return found


def find_family(config: Mapping[str, Any]) -> Family:
    """The family of a config: the one that a converted checkpoint describes itself, else by
    ``model_type``.

    Raises
    ------
    UnknownFamilyError
        molae has none for its ``model_type``; those that it converts are listed.
    CheckpointError
        A converted checkpoint's description makes no sense.
    """
    if (own := own_family(config)) is not None:
        return own
    model_type = config.get("model_type")
    known = families()
    if not isinstance(model_type, str) or model_type not in known:
        raise UnknownFamilyError(
            f"config.json: model_type {shorten(model_type)} is unknown; "
            f"known are {known_families()}; "
            f"describe the family in a JSON file and give it with --arch FILE "
            f"('molae inspect CHECKPOINT --draft FILE' drafts one, see docs/formats.md)"
        )
    return known[model_type]


def known_families() -> str:
    """The model types that molae converts, for messages."""
    return ", ".join(name for name, family in families().items() if family.unsupported is None)


def own_family(config: Mapping[str, Any]) -> Family | None:
    """The family that a converted checkpoint describes itself; None where it does not.

    Raises
    ------
    CheckpointError
        The description makes no sense.
    """
    quant = config.get("quantization_config")
    if not isinstance(quant, Mapping) or quant.get("quant_method") != QUANT_METHOD:
        return None
    data = quant.get("arch")
    if data is None:
        return None
    return replace(read_family(data, "quantization_config.arch"), description=data)


def load_family(path: str | os.PathLike[str]) -> Family:
    """Read a family's description from a JSON file.

    Parameters
    ----------
    path : path
        A file as described in ``family.schema.json`` and docs/formats.md.

    Returns
    -------
    Family

    Raises
    ------
    CheckpointError
        The file cannot be read, is no JSON, or holds an unknown key, a missing one, a name
        twice, or a shape that is not supported.
    """
    path = Path(path)
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise CheckpointError(f"{path}: cannot be read: {e}") from e
    family = parse_family(text, path.name)
    data = {key: value for key, value in parse_json(text).items() if key != "$schema"}
    return replace(family, description=data)
