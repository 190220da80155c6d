"""An ordinary checkpoint on its way to molae's form."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from molae import __version__
from molae.arch import Family, Model, describe, light_specs
from molae.config import ConvertConfig
from molae.convert.allocation import Allocation, complete_fused, split_numbers
from molae.convert.calibrated import Calibrated, Calibration, Trials
from molae.convert.card import convert_card
from molae.convert.estimate import calibrated_seconds, fit_seconds, memory_bytes, scratch_bytes
from molae.convert.executor import Recipe
from molae.convert.footprint import results_room
from molae.convert.jsontext import json_text
from molae.convert.layer_state import training_told
from molae.convert.methods import find_method
from molae.convert.naming import named
from molae.convert.pipeline import Data
from molae.convert.planning import Plan
from molae.convert.probe import Probe
from molae.convert.report import CompressedRow, HealRow, Rows, TypeRow
from molae.convert.shards import COMPRESSED, Job, convert_shards, finished_layers
from molae.convert.staging import StagedText, write_reading
from molae.errors import ArgumentError
from molae.factored import Factored, group_tensors
from molae.io import DTYPES, Checkpoint, LazyArrays

__all__ = ["Conversion", "ConversionRecipe", "check_divisible"]


@dataclass(frozen=True)
class ConversionRecipe:
    """How other processes do the work of a `Conversion`; `facts` are of its text, and `trials` what
    it was tried with."""

    source: str
    config: ConvertConfig
    family: Family | None
    allocation: Allocation
    facts: Mapping[str, Any] | None
    trials: Trials

    @contextlib.contextmanager
    def work(self, checkpoint: Checkpoint, staged: Path | None) -> Iterator[Conversion]:
        given = (self.source, checkpoint, self.config, self.family)
        if staged is None or self.facts is None:
            yield Conversion(*given, allocation=self.allocation)
            return
        with StagedText(self.facts, staged) as text:
            # Nothing else of a text is asked for by a fit of one layer, at once.
            calibration = cast("Calibration", text)
            yield Conversion(*given, calibration, allocation=self.allocation, trials=self.trials)


def check_divisible(config: ConvertConfig, calibrated: bool) -> None:
    """Refuse a conversion whose layers wait for each other.

    Raises
    ------
    ArgumentError
    """
    if not calibrated:
        return
    if not config.one_shot:
        raise ArgumentError(
            "scheduler: with a calibration text each layer is fitted to what the converted layers "
            "before it hand on, so one process does it all; leave the scheduler out, or take "
            "one_shot (--one-shot), whose layers do not wait for each other"
        )
    if config.compressed_experts:
        raise ArgumentError(
            "scheduler: compressed experts are judged by the whole model, which one process runs; "
            "leave the scheduler out, or compressed_experts"
        )


class Conversion:
    """The work of `molae.convert`: what each job computes and what the folder says of it.

    Making one opens nothing and writes nothing; it decides groups and ranks, unless an
    `allocation` is given.
    """

    kind = "convert"

    def __init__(
        self,
        source: str,
        checkpoint: Checkpoint,
        config: ConvertConfig,
        family: Family | None = None,
        calibration: Calibration | None = None,
        stats: Path | None = None,
        allocation: Allocation | None = None,
        trials: Trials | None = None,
    ) -> None:
        self.source_name = source
        self.checkpoint = checkpoint
        self.config = config
        self.family = family
        self.method = find_method(config.method)
        self.model: Model = describe(checkpoint, family=family)
        self.calibration = calibration
        self.calibrated: Calibrated | None = None
        if calibration is not None:
            self.calibrated = Calibrated(checkpoint, self.model, config, calibration, stats)
            if allocation is None:
                allocation = self.calibrated.allocate()
            else:
                self.calibrated.take(allocation, trials or {})
        elif allocation is not None:
            pass  # decided elsewhere
        elif (
            config.uniform
            or config.one_shot
            or config.drop_idle
            or not config.refit
            or config.heal
            or config.flops is not None
            or config.max_memory is not None
            or config.compressed_experts
            or config.light_module != "auto"
            or stats is not None
        ):
            raise ArgumentError(
                "flops, uniform, one_shot, drop_idle, refit, heal, compressed_experts, "
                "light_module, max_memory, stats: only with a calibration text"
            )
        else:
            allocation = self.method.allocate(self.model, config, Probe(checkpoint, self.model))
        self.allocation: Allocation = complete_fused(allocation, self.model)
        self.shards = convert_shards(
            checkpoint,
            self.model,
            self.allocation.layers,
            self.allocation.form,
            self.allocation.compressed,
            self.allocation.light,
        )
        self.room = results_room(self.model)

    def recipe(self) -> Recipe:
        """For other processes: all that is decided, so that they need not decide it again."""
        check_divisible(self.config, self.calibration is not None)
        facts = None if self.calibration is None else self.calibration.facts
        trials = {} if self.calibrated is None else self.calibrated.trials
        return ConversionRecipe(
            self.source_name, self.config, self.family, self.allocation, facts, trials
        )

    def stage(self, number: int, path: Path) -> bool:
        """What the experts of the shard's layer read in the text, if there is one."""
        jobs = self.shards[number].jobs
        if self.calibration is None or not jobs:
            return False
        write_reading(path, self.calibration.reading(jobs[0].layer))
        return True

    @property
    def is_mapped(self) -> bool:
        """Whether the experts' matrices are views of the files."""
        return self.model.is_mapped(self.checkpoint.encoding)

    @property
    def settings(self) -> dict[str, Any]:
        facts = {} if self.calibration is None else {"calibration": dict(self.calibration.facts)}
        return self.config.to_dict() | facts

    @property
    def digest(self) -> str:
        """What must not change for a run to go on."""
        return self.allocation.digest()

    def source(self, job: Job) -> Sequence[np.ndarray | memoryview]:
        if job.kinds == (COMPRESSED,):
            return []
        return self.model.sources(self.checkpoint, job.layer, job.kinds[0])

    def resume(
        self, finished: Mapping[str, Path], state: Path, tell: Callable[[str], None]
    ) -> None:
        """Take note of what an earlier run has left: paths by the names of shards."""
        if self.calibrated is not None:
            layers = finished_layers(self.shards, finished)
            self.calibrated.resume(layers, state, training_told(tell))

    def compute(self, job: Job) -> tuple[dict[str, Data], list[dict[str, Any]]]:
        """Factors of one layer's matrix type, or its compressed experts; a row of the report."""
        (kind,) = job.kinds
        if kind == COMPRESSED:
            return self._compute_compressed(job)
        split = self.allocation.layers[job.layer][kind]
        matrices = self.model.matrices(self.checkpoint, job.layer, kind)
        start = time.perf_counter()
        with named(self.model, job.layer, kind):
            if self.calibrated is not None:
                fitted = self.calibrated.fit(job.layer, kind, matrices, split)
            else:
                fitted = self.method.fit(matrices, split, self.model.side(kind))
        seconds = time.perf_counter() - start

        E, F, D = (self.model.letters[letter] for letter in "EFD")
        prefix, form = self.model.experts_prefix(job.layer), self.allocation.form
        tensors: dict[str, Data] = {}
        for g, (group, rank) in enumerate(zip(split.groups, split.ranks, strict=True)):
            for part in group_tensors(prefix, kind, g, len(group), rank, F=F, D=D, form=form):
                if part.role == "dense":
                    tensors[part.name] = LazyArrays(len(group), partial(_member, matrices, group))
                else:
                    tensors[part.name] = fitted.factors[g, part.role]
        trials = {} if self.calibrated is None else self.calibrated.trials[job.layer, kind]
        facts: dict[str, Any] = {**fitted.diagnostics, **trials}
        row = TypeRow(
            layer=job.layer,
            kind=kind,
            groups=[list(group) for group in split.groups],
            ranks=list(split.ranks),
            stored_numbers=split_numbers(split, F=F, D=D, form=form),
            dense_numbers=E * F * D,
            error=fitted.total_error,
            expert_error_min=float(fitted.error.min()),
            expert_error_max=float(fitted.error.max()),
            seconds=seconds,
            output_error=fitted.output_error,
            layer_error=fitted.layer_error,
            tokens=fitted.tokens,
            energy_curve=fitted.energy_curve,
            **facts,
        )
        return tensors, [dataclasses.asdict(row), *self._healed(job.layer, seconds)]

    def _healed(self, layer: int, seconds: float) -> list[dict[str, Any]]:
        found = None if self.calibrated is None else self.calibrated.healed()
        return [] if found is None else [dataclasses.asdict(HealRow.of(layer, found, seconds))]

    def _compute_compressed(self, job: Job) -> tuple[dict[str, Data], list[dict[str, Any]]]:
        assert self.calibrated is not None
        start = time.perf_counter()
        found = self.calibrated.compressed(job.layer)
        row = CompressedRow(
            layer=job.layer,
            num_compressed=self.allocation.compressed[job.layer],
            layer_error=found.error.tolist(),
            tokens=found.tokens,
            seconds=time.perf_counter() - start,
        )
        specs = light_specs(self.model, job.layer, self.allocation.light)
        tensors: dict[str, Data] = {specs[role].name: own for role, own in found.arrays.items()}
        return tensors, [dataclasses.asdict(row)]

    def factored(self) -> Factored | None:
        """The ``quantization_config`` of the result; None where nothing leaves its form."""
        if not self.allocation.layers and not self.allocation.compressed:
            return None
        return Factored(
            method=self.method.name,
            form=self.allocation.form,
            layout=self.model.layout,
            layers=self.allocation.layers,
            molae_version=__version__,
            compressed=self.allocation.compressed,
            light=self.allocation.light,
            arch=self.model.family.description,
        )

    def config_text(self) -> str:
        """The result's ``config.json``: the source's, and what molae adds at its end."""
        config = dict(self.checkpoint.config)
        if self.checkpoint.encoding is not None:  # nothing is encoded any more
            del config["quantization_config"]
        if (factored := self.factored()) is not None:
            config["quantization_config"] = factored.to_dict()
        return json_text(config)

    def card(self, plan: Plan, rows: Rows, kept: Sequence[str]) -> str:
        return convert_card(plan, rows["rows"], kept)

    def plan(self, *, timed: bool) -> Plan:
        """Facts about this conversion; `timed` measures how fast a few groups go."""
        counts, compressed = self.model.counts(), self.allocation.compressed
        others = (
            counts.total_parameters - counts.expert_parameters,
            self.checkpoint.nbytes - counts.expert_parameters * DTYPES[self.model.dtype].itemsize,
        )
        return Plan.of_conversion(
            self,
            others,
            memory_bytes=memory_bytes(self),
            seconds=self._seconds() if timed else None,
            passes=1 if self.calibrated is None else self.calibrated.footprint.passes,
            compressed=compressed,
            light=self.allocation.light.title if compressed else None,
            scratch_bytes=scratch_bytes(self),
            parallel=len(self.shards) if self._is_divisible else 1,
            encoding=self.checkpoint.encoding,
        )

    @property
    def _is_divisible(self) -> bool:
        try:
            check_divisible(self.config, self.calibration is not None)
        except ArgumentError:
            return False
        return True

    def _seconds(self) -> float:
        if self.calibrated is None or self.calibration is None:
            return fit_seconds(self)
        return calibrated_seconds(self, math.prod(self.calibration.sequences.shape))


def _member(matrices: Sequence[np.ndarray], group: Sequence[int], at: int) -> np.ndarray:
    return matrices[group[at]]
