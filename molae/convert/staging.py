"""What a layer's experts read in a text, in a file for another process."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from molae.errors import CheckpointError
from molae.fit import LayerInput
from molae.io import ShardWriter, TensorSpec, dtype_name, map_file
from molae.io.scratch import scratch_array, scratch_folder

__all__ = ["StagedText", "read_reading", "write_reading"]

#: The tensor that holds what is no array, as JSON.
_FACTS = "facts"


def write_reading(path: Path, given: LayerInput) -> None:
    """Keep a layer's input, all but the `room`, which the reader has of its own."""
    arrays: dict[str, np.ndarray] = {}
    facts: dict[str, Any] = {}
    for name, value in _parts(given).items():
        if isinstance(value, np.ndarray):
            arrays[name] = value
        elif isinstance(value, tuple):
            arrays |= {f"{name}.{i}": array for i, array in enumerate(value)}
            facts[name] = len(value)
        else:
            facts[name] = value
    arrays[_FACTS] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    specs = [TensorSpec(name, dtype_name(a.dtype), a.shape) for name, a in arrays.items()]
    with ShardWriter(path, specs) as out:
        for name, array in arrays.items():
            out.write(name, array)
        out.finish()


def read_reading(path: Path, room: Callable[[str, tuple[int, ...]], np.ndarray]) -> LayerInput:
    """What `write_reading` has kept, in mapped arrays."""
    arrays: dict[str, Any] = dict(map_file(path))
    facts = json.loads(arrays.pop(_FACTS).tobytes())
    for name, value in facts.items():
        if name in _TUPLES and value is not None:
            facts[name] = tuple(arrays.pop(f"{name}.{i}") for i in range(value))
    return LayerInput(**arrays, **facts, room=room)


#: Fields of a `LayerInput` that are several arrays.
_TUPLES = ("biases",)


def _parts(given: LayerInput) -> dict[str, Any]:
    return {f.name: getattr(given, f.name) for f in fields(given) if f.name != "room"}


class StagedText:
    """Stands for a `Calibration` where a single layer is fitted to what is in a file.

    Parameters
    ----------
    facts : mapping
        Of the calibration that was run.
    path : Path
    """

    def __init__(self, facts: Mapping[str, Any], path: Path) -> None:
        self.facts = dict(facts)
        self._path = path
        self._held = contextlib.ExitStack()
        self._place = self._held.enter_context(scratch_folder("molae-worker-"))

    def __enter__(self) -> StagedText:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._held.close()

    def reading(self, layer: int, *, anchored: bool = False) -> LayerInput:
        """The one that is in the file."""
        if anchored:
            raise CheckpointError(f"{self._path.name}: was read without the layers before it")
        return read_reading(self._path, self._room)

    def advance(self, layer: int, *changed: object) -> None:
        """Nothing comes behind it here."""

    def _room(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if math.prod(shape) == 0:
            return np.empty(shape, np.float32)
        return scratch_array(self._place / name.replace("/", "-"), shape)
