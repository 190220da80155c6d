"""The plan of a conversion by a config alone: what it would store and need."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from molae.arch import Family, Model
from molae.config import ConvertConfig
from molae.convert.allocation import Allocation, Candidate, complete_fused, gauge_ranks
from molae.convert.calibrated import Calibrated
from molae.convert.estimate import memory_bytes
from molae.convert.footprint import results_room
from molae.convert.inspection import read_promise
from molae.convert.methods import find_method
from molae.convert.planning import Plan
from molae.convert.probe import GROUP_SIZES
from molae.convert.quantized import find_packing
from molae.convert.shards import convert_shards
from molae.errors import CheckpointError
from molae.factored import index_groups
from molae.io import DTYPES, ENCODINGS, TensorInfo

__all__ = ["plan_config"]

#: Experts a group where no checkpoint is there to measure it on.
GROUP_SIZE = 8


def plan_config(
    name: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo] | None,
    settings: ConvertConfig,
    *,
    family: Family | None = None,
    unknown: str = "",
) -> Plan:
    """What `molae.convert` would do with a checkpoint of this config.

    Parameters
    ----------
    name : str
        Of the config, for messages.
    config, tensors, family, unknown
        As in `molae.convert.inspection.read_promise`.
    settings : ConvertConfig
        Without those that need a text.

    Returns
    -------
    Plan
        Group sizes that were left open are not measured but `GROUP_SIZE`; the other candidates
        are listed. There is no estimate of the time.

    Raises
    ------
    CheckpointError, UnknownFamilyError
        As in `read_promise`, or molae does not convert this family.
    ArgumentError
        As in `molae.convert`.
    """
    found = read_promise(config, tensors, family=family, unknown=unknown)
    model = found.model
    model.family.check_convertible()
    try:
        packing = find_packing(config)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; molae does not convert it") from None
    if packing is not None and packing.encoding not in ENCODINGS:
        raise CheckpointError(
            f"config.json: the files hold {packing.encoding}, which molae does not read; plan for "
            "a dequantized release, whose config has no quantization_config"
        )
    encoding = packing.encoding if packing else None
    return Sketch(name, model, settings, encoding).plan(whole=found.others is not None)


@dataclass(frozen=True)
class _Unmeasured:
    """In the place of a `Probe`: the group sizes, with no error as there are no weights."""

    model: Model

    def candidates(self, kind: str, size: float) -> tuple[Candidate, ...]:
        E, F, D = (self.model.letters[letter] for letter in "EFD")
        found = []
        for k in [k for k in GROUP_SIZES if k <= E] or [1]:
            rank = min(gauge_ranks(index_groups(E, k), size, F=F, D=D))
            if rank >= 1:
                found.append((k, rank))
        best = min((k for k, _ in found), key=lambda k: abs(k - GROUP_SIZE), default=None)
        return tuple(Candidate(kind, k, rank, None, chosen=k == best) for k, rank in found)


class Sketch:
    """As much of a `Conversion` as its plan needs."""

    kind = "convert"
    calibrated: Calibrated | None = None

    def __init__(
        self, source: str, model: Model, config: ConvertConfig, encoding: str | None
    ) -> None:
        self.source_name, self.model, self.config = source, model, config
        self.encoding = encoding
        self.is_mapped = model.is_mapped(encoding)
        self.tensors = model.tensors
        self.method = find_method(config.method)
        self.allocation: Allocation = complete_fused(
            self.method.allocate(model, config, _Unmeasured(model)), model
        )
        self.shards = convert_shards(self, model, self.allocation.layers, self.allocation.form)
        self.room = results_room(model)

    @property
    def settings(self) -> dict[str, Any]:
        return self.config.to_dict()

    def plan(self, *, whole: bool) -> Plan:
        """The plan; `whole` if more than the experts is known of the model."""
        counts = self.model.counts()
        others = counts.total_parameters - counts.expert_parameters
        plan = Plan.of_conversion(
            self,
            (others, others * DTYPES[self.model.dtype].itemsize),
            memory_bytes=memory_bytes(self),
            seconds=None,
            experts_only=not whole,
            encoding=self.encoding,
        )
        return dataclasses.replace(plan, layout="")
