"""What a checkpoint is, ordinary or converted."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from molae._version import __version__
from molae.arch import Family, Model, describe
from molae.errors import ArgumentError
from molae.factored import Factored, LightModule
from molae.io import TensorInfo, open_checkpoint

__all__ = ["Inspection", "inspect", "inspect_tensors"]


@dataclass(frozen=True)
class Inspection:
    """Facts about a checkpoint.

    Attributes
    ----------
    path : str
    family, layout, dtype : str
    letters : dict of str to int
        L layers, E experts, K experts a token, D model width, F expert width.
    moe_layers : tuple of int
    shapes : dict of str to tuple of int
        (rows, cols) of an expert's matrices.
    total_parameters, expert_parameters, active_parameters : int
        As stored; see `molae.arch.Model.counts`.
    active_compressed : int or None
        Active parameters if some of a token's experts were compressed, where that was asked.
    bytes : int
        Of all tensors as the files hold them.
    files : int
        0 where there was a config alone.
    factored : Factored or None
        Groups and ranks, where molae converted it.
    encoding : str or None
        What the files hold in the place of the BF16 numbers that are told, such as 'fp8'.
    """

    path: str
    family: str
    layout: str
    dtype: str
    letters: Mapping[str, int]
    moe_layers: tuple[int, ...]
    shapes: Mapping[str, tuple[int, int]]
    total_parameters: int
    expert_parameters: int
    active_parameters: int
    active_compressed: int | None
    bytes: int
    files: int
    factored: Factored | None
    encoding: str | None = None

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
        found = _facts(
            os.fspath(src), model, checkpoint.stored_nbytes, len(checkpoint.files),
            compressed_experts, light_module,
        )  # fmt: skip
        return dataclasses.replace(found, encoding=checkpoint.encoding)


def inspect_tensors(
    name: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    *,
    family: Family | None = None,
    compressed_experts: int = 0,
    light_module: str = "vectors",
) -> Inspection:
    """The same of a checkpoint that is not there: its config, and the tensors it would have."""
    model = describe(config, tensors, family=family, converted=True)
    nbytes = sum(info.nbytes for info in tensors.values())
    return _facts(name, model, nbytes, 0, compressed_experts, light_module)


def _facts(
    path: str, model: Model, nbytes: int, files: int, compressed: int, light: str
) -> Inspection:
    counts = model.counts()
    return Inspection(
        path=path,
        family=model.family.model_type,
        layout=model.layout,
        dtype=model.dtype,
        letters=dict(model.letters),
        moe_layers=model.moe_layers,
        shapes={kind: model.shape(kind) for kind in ("gate_proj", "up_proj", "down_proj")},
        total_parameters=counts.total_parameters,
        expert_parameters=counts.expert_parameters,
        active_parameters=counts.active_parameters,
        active_compressed=_active_compressed(model, compressed, light) if compressed else None,
        bytes=nbytes,
        files=files,
        factored=model.factored,
    )


def _active_compressed(model: Model, n: int, light: str) -> int:
    K = model.letters["K"]
    if not 0 < n < K:
        raise ArgumentError(f"compressed_experts: expected 0 to K - 1 = {K - 1}, got {n}")
    factored = model.factored or Factored("", "gauge", model.layout, {}, __version__)
    factored = dataclasses.replace(
        factored,
        compressed=dict.fromkeys(model.moe_layers, n),
        light=LightModule.parse(light, model.letters["F"]),
    )
    return dataclasses.replace(model, factored=factored).counts().active_parameters
