"""What a checkpoint is, ordinary or converted."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from molae.arch import Family, describe
from molae.factored import Factored
from molae.io import open_checkpoint

__all__ = ["Inspection", "inspect"]


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
    bytes : int
        Of all tensors.
    files : int
    factored : Factored or None
        Groups and ranks, where molae converted it.
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
    bytes: int
    files: int
    factored: Factored | None

    def to_dict(self) -> dict[str, Any]:
        """The same facts for JSON."""
        out = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        out["converted"] = self.factored is not None
        out["factored"] = self.factored.to_dict() if self.factored is not None else None
        return out


def inspect(src: str | os.PathLike[str], *, family: Family | None = None) -> Inspection:
    """Read what a checkpoint is, without reading its weights.

    Parameters
    ----------
    src : str or path
        Folder, or hub id.
    family : Family, optional
        As in `molae.convert`.

    Returns
    -------
    Inspection
        Family, layout, shapes and sizes.

    Raises
    ------
    CheckpointError, UnknownFamilyError
        As in `molae.convert`.

    Examples
    --------
    >>> import molae, molae.demo
    >>> found = molae.inspect(molae.demo.CHECKPOINT)
    >>> found.family, found.active_parameters < found.total_parameters
    ('olmoe', True)
    """
    with open_checkpoint(src) as checkpoint:
        model = describe(checkpoint, family=family, converted=True)
        counts = model.counts()
        return Inspection(
            path=os.fspath(src),
            family=model.family.model_type,
            layout=model.layout,
            dtype=model.dtype,
            letters=dict(model.letters),
            moe_layers=model.moe_layers,
            shapes={kind: model.shape(kind) for kind in ("gate_proj", "up_proj", "down_proj")},
            total_parameters=counts.total_parameters,
            expert_parameters=counts.expert_parameters,
            active_parameters=counts.active_parameters,
            bytes=checkpoint.nbytes,
            files=len(checkpoint.files),
            factored=model.factored,
        )
