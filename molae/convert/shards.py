"""Which tensors go into which file: one shard a decoder layer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from molae.arch import Model, factored_specs, light_specs
from molae.config import TYPES
from molae.factored import VECTORS, Form, LightModule, Split
from molae.io import Checkpoint, TensorInfo, TensorSpec, plan_bytes
from molae.io.checkpoint import INDEX

__all__ = [
    "COMPRESSED",
    "INDEX",
    "Job",
    "Shard",
    "convert_shards",
    "finished_layers",
    "heal_shards",
    "index_text",
    "materialize_shards",
]


#: What a job is of that fits a layer's compressed experts.
COMPRESSED = "compressed"


@dataclass(frozen=True)
class Job:
    """One layer's matrix types that are computed at a time, and the tensors that result.

    `kinds` has one entry, or gate and up together where they end in the same tensors; `COMPRESSED`
    is no matrix type and reads nothing of the source.
    """

    layer: int
    kinds: tuple[str, ...]
    specs: tuple[TensorSpec, ...]

    @property
    def title(self) -> str:
        """Such as 'layer 3 gate_proj'."""
        return f"layer {self.layer} {'+'.join(self.kinds)}"


@dataclass(frozen=True)
class Shard:
    """One file: tensors copied from the source, and tensors that jobs compute."""

    file: str
    copied: tuple[TensorSpec, ...]
    jobs: tuple[Job, ...]

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """All tensors of the file, in the order in which they are laid out."""
        return self.copied + tuple(spec for job in self.jobs for spec in job.specs)

    @property
    def nbytes(self) -> int:
        return plan_bytes(self.specs)


class HasTensors(Protocol):
    """An open checkpoint, or what stands for one that is not there."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...


def convert_shards(
    checkpoint: HasTensors,
    model: Model,
    layers: Mapping[int, Mapping[str, Split]],
    form: Form,
    compressed: Iterable[int] = (),
    light: LightModule = VECTORS,
) -> tuple[Shard, ...]:
    """The files of a converted checkpoint.

    Parameters
    ----------
    layers : mapping of int to mapping of str to Split
        The types that leave the source's form; their tensors are replaced, all others copied.
    compressed : iterable of int
        Layers with compressed experts.
    light : LightModule
        What acts in their place.
    """
    jobs: dict[int, list[Job]] = {}
    replaced: set[str] = set()
    for layer, kinds in layers.items():
        for kind in (kind for kind in TYPES if kind in kinds):
            replaced.update(model.expert_tensors(layer, kind))
            specs = factored_specs(model, layer, kind, kinds[kind], form)
            jobs.setdefault(layer, []).append(Job(layer, (kind,), specs))
    for layer in compressed:
        specs = tuple(light_specs(model, layer, light).values())
        jobs.setdefault(layer, []).append(Job(layer, (COMPRESSED,), specs))
    return _shards(checkpoint, model, jobs, replaced)


def materialize_shards(checkpoint: Checkpoint, model: Model) -> tuple[Shard, ...]:
    """The files of an ordinary checkpoint made from the converted one `model` describes."""
    assert model.factored is not None
    jobs: dict[int, list[Job]] = {}
    replaced: set[str] = set()
    E = model.letters["E"]
    for layer, kinds in model.factored.layers.items():
        for kind in (kind for kind in TYPES if kind in kinds):
            specs = factored_specs(model, layer, kind, kinds[kind], model.factored.form)
            replaced.update(spec.name for spec in specs)
            together = model.stored_together(kind)
            if kind != together[0]:
                continue
            one = model.part_shape(kind)
            names = model.expert_tensors(layer, kind)
            shape = one if len(names) == E else (E, *one)
            made = tuple(TensorSpec(name, model.dtype, shape) for name in names)
            jobs.setdefault(layer, []).append(Job(layer, together, made))
    return _shards(checkpoint, model, jobs, replaced)


def heal_shards(checkpoint: Checkpoint, model: Model) -> tuple[Shard, ...]:
    """The files of a converted checkpoint whose factors are written anew."""
    assert model.factored is not None
    form = model.factored.form
    jobs: dict[int, list[Job]] = {}
    replaced: set[str] = set()
    for layer, kinds in model.factored.layers.items():
        for kind in (kind for kind in TYPES if kind in kinds):
            specs = factored_specs(model, layer, kind, kinds[kind], form)
            replaced.update(spec.name for spec in specs)
            jobs.setdefault(layer, []).append(Job(layer, (kind,), specs))
    return _shards(checkpoint, model, jobs, replaced)


def finished_layers(shards: Iterable[Shard], finished: Mapping[str, Path]) -> dict[int, Path]:
    """Where each layer is whose shard is whole."""
    return {
        job.layer: finished[shard.file]
        for shard in shards
        if shard.file in finished
        for job in shard.jobs
    }


def _shards(
    checkpoint: HasTensors, model: Model, jobs: Mapping[int, Sequence[Job]], replaced: set[str]
) -> tuple[Shard, ...]:
    copied: dict[int, list[TensorSpec]] = {}
    outside: list[TensorSpec] = []
    for info in checkpoint.tensors.values():
        if info.name not in replaced:
            layer = model.layer_of(info.name)
            where = outside if layer is None else copied.setdefault(layer, [])
            where.append(TensorSpec(info.name, info.dtype, info.shape))
    layers = sorted(copied.keys() | jobs.keys())
    count = len(layers)
    return tuple(
        Shard(
            file=f"model-{number:05d}-of-{count:05d}.safetensors",
            copied=tuple((outside if number == 1 else []) + copied.get(layer, [])),
            jobs=tuple(jobs.get(layer, ())),
        )
        for number, layer in enumerate(layers, 1)
    )


def index_text(shards: Iterable[Shard]) -> str:
    """The text of ``model.safetensors.index.json``."""
    files = {spec.name: shard.file for shard in shards for spec in shard.specs}
    total = sum(spec.nbytes for shard in shards for spec in shard.specs)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": files}, indent=2) + "\n"
