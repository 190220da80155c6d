"""A converted checkpoint whose layers are trained to answer as the original's do."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from molae import fit
from molae.arch import Family, Model, check_factors, describe, factored_specs
from molae.config import TYPES, HealConfig
from molae.convert.calibrated import Calibration, in_order
from molae.convert.card import heal_card
from molae.convert.executor import Recipe
from molae.convert.footprint import healing_bytes, results_room
from molae.convert.jsontext import json_text
from molae.convert.layer_state import LayerState, training_told
from molae.convert.light import Light
from molae.convert.pipeline import Data
from molae.convert.planning import Plan, spread, storage, summarize
from molae.convert.report import HealRow, Rows
from molae.convert.shards import Job, finished_layers, heal_shards
from molae.convert.stored import projection_tensors, stored_light, stored_projection
from molae.errors import ArgumentError, CheckpointError, NonFiniteError, NumericalError
from molae.factored import Factored
from molae.fit.layer import runnable
from molae.fit.refitting import in_dtype
from molae.io import Checkpoint, TensorSpec, map_file, numpy_dtype, parse_json
from molae.ops import Projection

__all__ = ["Healing"]

TOKENIZER = "tokenizer.json"


class Healing:
    """The work of `molae.heal`: layer after layer, each on what the trained ones before hand on.

    Parameters
    ----------
    source : str
        What the converted checkpoint is called.
    checkpoint, teacher : Checkpoint
        The converted one, and the original.
    calibration : Calibration
        A text on its way through the original.
    config : HealConfig
    family : Family, optional
    """

    kind = "heal"

    def __init__(
        self,
        source: str,
        checkpoint: Checkpoint,
        teacher: Checkpoint,
        calibration: Calibration,
        config: HealConfig,
        family: Family | None = None,
    ) -> None:
        self.source_name = source
        self.checkpoint, self._teacher = checkpoint, teacher
        self.calibration, self.config = calibration, config
        self.model: Model = describe(checkpoint, family=family, converted=True)
        if self.model.factored is None or not self.model.factored.layers:
            raise CheckpointError(
                f"{source}: has no factors that could be trained; give a checkpoint that "
                "molae converted"
            )
        self.factored: Factored = self.model.factored
        check_factors(self.model, checkpoint.tensors)
        if self.model.family.description is not None:  # which the original does not hold
            family = self.model.family
        _check_pair(self.model, checkpoint, describe(teacher, family=family), teacher)
        self.shards = heal_shards(checkpoint, self.model)
        self.room = results_room(self.model)
        self.digest = ""
        self._finished: dict[int, Path] = {}
        self._state: Path | None = None
        self._told: Callable[..., object] = lambda *facts: None
        #: Of the layer at work, what is to be written of each type.
        self._trained: dict[str, Projection] = {}
        #: The last layer that the text has passed.
        self._behind = -1

    def recipe(self) -> Recipe:
        """None: each layer is trained on what the trained ones before it hand on."""
        raise ArgumentError("heal: its layers wait for each other, so one process does it all")

    def stage(self, number: int, path: Path) -> bool:
        return False

    @property
    def settings(self) -> dict[str, Any]:
        return self.config.to_dict() | {
            "teacher": self._teacher.fingerprint(),
            "calibration": dict(self.calibration.facts),
        }

    def resume(
        self, finished: Mapping[str, Path], state: Path, tell: Callable[[str], None]
    ) -> None:
        self._finished = finished_layers(self.shards, finished)
        self._state, self._told = state, training_told(tell)

    def source(self, job: Job) -> Sequence[np.ndarray]:
        return [self.checkpoint.array(spec.name) for spec in self._specs(job)]

    def compute(self, job: Job) -> tuple[dict[str, Data], list[dict[str, Any]]]:
        """Trained factors of one matrix type; with a layer's first one a row of the report."""
        (kind,) = job.kinds
        rows = [] if self._trained else [dataclasses.asdict(self._train(job.layer))]
        own = projection_tensors(self._trained.pop(kind), self.model, job.layer, kind)
        return dict(own), rows

    def config_text(self) -> str:
        return json_text(dict(self.checkpoint.config))

    def card(self, plan: Plan, rows: Rows, kept: Sequence[str]) -> str:
        return heal_card(plan, rows["healed"], kept)

    def plan(self, *, timed: bool) -> Plan:
        """Facts about this run; how long it takes depends on the steps, and is not foreseen."""
        model, layers, form = self.model, self.factored.layers, self.factored.form
        light = self.factored.compressed, self.factored.light
        counts = model.counts()
        others = counts.total_parameters - counts.expert_parameters
        experts = storage(model, layers, form, (others, 0), *light).expert_bytes
        after = storage(model, layers, form, (others, self.checkpoint.nbytes - experts), *light)
        F, D = model.letters["F"], model.letters["D"]
        tokens = math.prod(self.calibration.sequences.shape)
        return Plan.of(
            self,
            self.factored.method,
            form,
            size_asked=None,
            size_reached=after.expert_numbers / storage(model, {}, form, (0, 0)).expert_numbers,
            before=after,
            after=after,
            types=summarize(layers),
            spread=spread(layers, form, F=F, D=D),
            candidates=(),
            memory_bytes=healing_bytes(self.checkpoint, model),
            seconds=None,
            compressed=self.factored.compressed,
            light=self.factored.light.title if self.factored.compressed else None,
            scratch_bytes=self.calibration.scratch_bytes(
                trials=0, kept=4 * tokens * D, anchored=self.config.anchored
            ),
        )

    # ------------------------------------------------------------------ a layer

    def _train(self, layer: int) -> HealRow:
        start = time.perf_counter()
        self._advance_to(layer)
        given = self.calibration.reading(layer, anchored=self.config.anchored)
        projections, light = self._experts(layer, self.checkpoint.array)
        own = self.calibration.experts(layer)
        options = dataclasses.asdict(self.config)
        del options["anchored"]
        try:
            found = fit.distill_layer(
                given,
                in_order({**own, **projections}),
                teacher=in_order(own),
                light=light,
                trained=[kind.removesuffix("_proj") for kind in projections],
                epochs=options.pop("passes"),
                keeper=None if self._state is None else LayerState(self._state, layer),
                told=lambda *steps: self._told(layer, *steps),
                **options,
            )
        except (NonFiniteError, NumericalError) as error:
            raise type(error)(
                f"layer {layer}: {error}; the layers before it are kept, and the same command with "
                "other settings needs --overwrite"
            ) from error
        dtype = numpy_dtype(self.model.dtype)
        healed = dict(zip(TYPES, found.layer, strict=True))
        self._trained = {kind: in_dtype(healed[kind], dtype) for kind in projections}
        run = {kind: runnable(p) for kind, p in self._trained.items()}
        self.calibration.advance(layer, run, light)
        self._behind = layer
        return HealRow.of(layer, found, time.perf_counter() - start)

    def _advance_to(self, layer: int) -> None:
        """Over what lies between: layers that an earlier run has trained, or that have nothing to
        train but are not the original's."""
        for number in self.model.moe_layers:
            if not self._behind < number < layer:
                continue
            file = self._finished.get(number)
            tensors = self.checkpoint.array if file is None else map_file(file).__getitem__
            self.calibration.advance(number, *self._experts(number, tensors))
        self._behind = layer - 1

    def _specs(self, job: Job) -> Sequence[TensorSpec]:
        (kind,) = job.kinds
        split = self.factored.layers[job.layer][kind]
        return factored_specs(self.model, job.layer, kind, split, self.factored.form)

    def _experts(
        self, layer: int, tensors: Callable[[str], np.ndarray]
    ) -> tuple[dict[str, Projection], Light | None]:
        """What of a layer is in molae's form, and what acts in the place of compressed experts."""
        factored = self.factored
        projections = {
            kind: stored_projection(tensors, self.model, layer, kind, split, factored.form)
            for kind, split in factored.layers.get(layer, {}).items()
        }
        light = stored_light(tensors, self.model, layer, factored.compressed, factored.light)
        return projections, light


def _check_pair(model: Model, checkpoint: Checkpoint, original: Model, teacher: Checkpoint) -> None:
    """Refuse a teacher that the checkpoint was not made from."""
    where = f"{teacher.path}: is not what {checkpoint.path} was converted from"
    mine, theirs = (m.family.model_type for m in (model, original))
    if mine != theirs:
        raise ArgumentError(f"{where}: a {theirs} model, and that is a {mine} one")
    for letter, size in model.letters.items():
        if original.letters[letter] != size:
            raise ArgumentError(f"{where}: {letter} is {original.letters[letter]}, there {size}")
    if model.moe_layers != original.moe_layers:
        raise ArgumentError(f"{where}: other layers have experts")
    if _vocabulary(checkpoint) != _vocabulary(teacher):
        raise ArgumentError(f"{where}: another tokenizer")
    experts = {
        name
        for layer in original.moe_layers
        for kind in TYPES
        for name in original.expert_tensors(layer, kind)
    }
    for name, info in teacher.tensors.items():
        if name in experts:
            continue
        same = name in checkpoint.tensors and checkpoint.tensors[name].shape == info.shape
        if not same or not _same_bytes(checkpoint.raw(name), teacher.raw(name)):
            raise ArgumentError(
                f"{where}, or was trained since: {name} differs; heal first, then train routers "
                "or all of the model"
            )


def _same_bytes(one: Any, other: Any) -> bool:
    return bool(np.array_equal(np.frombuffer(one, np.uint8), np.frombuffer(other, np.uint8)))


def _vocabulary(checkpoint: Checkpoint) -> Any:
    """Of the tokenizer's file, where there is one: other entries are written anew by programs."""
    try:
        return parse_json((checkpoint.path / TOKENIZER).read_bytes())["model"]["vocab"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
