"""A converted checkpoint on its way back to an ordinary one of its family."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from molae import fit
from molae.arch import Family, Model, check_factors, describe, factored_specs
from molae.convert.card import materialize_card
from molae.convert.executor import Recipe
from molae.convert.footprint import BASE_BYTES
from molae.convert.jsontext import json_text
from molae.convert.pipeline import Data
from molae.convert.planning import Plan, storage, summarize
from molae.convert.report import Rows
from molae.convert.shards import Job, materialize_shards
from molae.errors import CheckpointError, NonFiniteError, ShapeError
from molae.factored import Factored, group_tensors
from molae.io import DTYPES, Checkpoint, LazyArrays, numpy_dtype

__all__ = ["Materialization", "MaterializationRecipe"]


@dataclass(frozen=True)
class MaterializationRecipe:
    """How other processes do the work of a `Materialization`."""

    source: str
    family: Family | None

    @contextlib.contextmanager
    def work(self, checkpoint: Checkpoint, staged: Path | None) -> Iterator[Materialization]:
        yield Materialization(self.source, checkpoint, self.family)


class Materialization:
    """The work of `molae.materialize`: every matrix is multiplied out where it is written."""

    kind = "materialize"

    def __init__(self, source: str, checkpoint: Checkpoint, family: Family | None = None) -> None:
        self.source_name = source
        self.checkpoint = checkpoint
        self.family = family
        self.model: Model = describe(checkpoint, family=family, converted=True)
        if self.model.factored is None:
            raise CheckpointError(
                f"{source}: an ordinary checkpoint, not one that molae converted; "
                "there is nothing to multiply out"
            )
        self.factored: Factored = self.model.factored
        if self.factored.compressed:
            raise CheckpointError(
                f"{source}: has compressed experts, which an ordinary checkpoint has no place for; "
                "its model runs in Transformers with molae"
            )
        check_factors(self.model, checkpoint.tensors)
        self.shards = materialize_shards(checkpoint, self.model)
        E, F, D = (self.model.letters[letter] for letter in "EFD")
        self.room = E * F * D * DTYPES["F32"].itemsize
        self.settings: dict[str, Any] = {}
        self.digest = ""

    def recipe(self) -> Recipe:
        return MaterializationRecipe(self.source_name, self.family)

    def stage(self, number: int, path: Path) -> bool:
        return False

    def resume(
        self, finished: Mapping[str, Path], state: Path, tell: Callable[[str], None]
    ) -> None:
        """Jobs do not depend on each other: nothing to take note of."""

    def source(self, job: Job) -> Sequence[np.ndarray]:
        return [
            self.checkpoint.array(spec.name)
            for kind in job.kinds
            for spec in factored_specs(
                self.model, job.layer, kind, self.factored.layers[job.layer][kind],
                self.factored.form,
            )
        ]  # fmt: skip

    def compute(self, job: Job) -> tuple[dict[str, Data], list[dict[str, Any]]]:
        """The job's tensors, each expert's still to be computed when it is to be written."""
        products = [_Products(self, job.layer, kind) for kind in job.kinds]
        E, put = self.model.letters["E"], partial(self.model.put, job.kinds[0])
        if len(job.specs) == 1 and E > 1:
            return {job.specs[0].name: LazyArrays(E, partial(_one, products, put))}, []
        return {spec.name: partial(_one, products, put, e) for e, spec in enumerate(job.specs)}, []

    def config_text(self) -> str:
        config = dict(self.checkpoint.config)
        del config["quantization_config"]
        return json_text(config)

    def card(self, plan: Plan, rows: Rows, kept: Sequence[str]) -> str:
        return materialize_card(plan, kept)

    def plan(self, *, timed: bool) -> Plan:
        """Facts about this run; its time is that of reading and writing and is not estimated."""
        model, form = self.model, self.factored.form
        counts = model.counts()
        others = counts.total_parameters - counts.expert_parameters
        factored = storage(model, self.factored.layers, form, (others, 0))
        bytes_of_others = self.checkpoint.nbytes - factored.expert_bytes
        before = storage(model, self.factored.layers, form, (others, bytes_of_others))
        after = storage(model, {}, form, (others, bytes_of_others))
        rows, cols = model.shape("gate_proj")
        return Plan.of(
            self,
            self.factored.method,
            form,
            size_asked=None,
            size_reached=before.expert_numbers / after.expert_numbers,
            before=before,
            after=after,
            types=summarize(self.factored.layers),
            spread={},
            candidates=(),
            memory_bytes=BASE_BYTES + 6 * 4 * rows * cols + 2 * 4 * cols * cols,
            seconds=None,
            parallel=len(self.shards),
        )


class _Products:
    """The matrices of one layer's type, multiplied out one at a time."""

    def __init__(self, work: Materialization, layer: int, kind: str) -> None:
        self._checkpoint, self._model = work.checkpoint, work.model
        self._kind, self._form = kind, work.factored.form
        self._prefix = work.model.experts_prefix(layer)
        self._split = work.factored.layers[layer][kind]
        self._where = {
            i: (g, at) for g, group in enumerate(self._split.groups) for at, i in enumerate(group)
        }
        self._basis: tuple[int, np.ndarray] | None = None

    def __call__(self, expert: int) -> np.ndarray:
        """(rows, cols) in the checkpoint's type."""
        g, at = self._where[expert]
        names = {part.role: part.name for part in self._parts(g)}
        dtype = numpy_dtype(self._model.dtype)
        if "dense" in names:
            return self._checkpoint.array(names["dense"])[at]
        if not names:
            return np.zeros(self._model.shape(self._kind), dtype)
        A = self._checkpoint.array(names["private"])[at].astype(np.float32)
        B = self._basis_of(g, names)
        product = A @ B if self._model.side(self._kind) == "input" else B.T @ A
        with np.errstate(over="ignore"):
            matrix = product.astype(dtype)
        if not np.isfinite(matrix.astype(np.float32)).all():
            raise NonFiniteError(
                f"{names['private']}: expert {expert} multiplies out to NaN or Inf in "
                f"{self._model.dtype}; check the converted checkpoint"
            )
        return matrix

    def _parts(self, g: int) -> Sequence[Any]:
        F, D = self._model.letters["F"], self._model.letters["D"]
        return group_tensors(
            self._prefix, self._kind, g, len(self._split.groups[g]), self._split.ranks[g],
            F=F, D=D, form=self._form,
        )  # fmt: skip

    def _basis_of(self, g: int, names: dict[str, str]) -> np.ndarray:
        if self._basis is None or self._basis[0] != g:
            shared = self._checkpoint.array(names["shared"]).astype(np.float32)
            if self._form == "gauge":
                try:
                    shared = fit.ungauge(shared, self._checkpoint.array(names["perm"]))
                except ShapeError as error:
                    raise CheckpointError(
                        f"{names['perm']}: {error}; convert the original again"
                    ) from error
            self._basis = (g, shared)
        return self._basis[1]


def _one(
    products: Sequence[_Products], put: Callable[[list[np.ndarray]], np.ndarray], expert: int
) -> np.ndarray:
    """One expert's part of a tensor, as the source has it."""
    return put([product(expert) for product in products])
