"""What a layer's experts read in a text, in a file for another process."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from molae.errors import CheckpointError
from molae.fit import LayerInput
from molae.io import ShardWriter, TensorSpec, dtype_name, map_file

__all__ = ["StagedText", "write_reading"]

#: The tensor that names the activation.
_ACTIVATION = "activation"

#: Alpha and limit of the activation.
_CLAMP = "clamp"

#: Of a `LayerInput`.
_ARRAYS = ("x", "index", "weights", "answers")

#: Of gate, up and down, where experts have them.
_BIASES = ("gate_bias", "up_bias", "down_bias")


def write_reading(path: Path, given: LayerInput) -> None:
    """Keep a layer's input, without what a fit that follows converted layers has besides."""
    arrays = {name: getattr(given, name) for name in _ARRAYS}
    arrays[_ACTIVATION] = np.frombuffer(given.activation.encode(), np.uint8)
    arrays[_CLAMP] = np.array([given.alpha, given.limit])
    if given.biases is not None:
        arrays |= zip(_BIASES, given.biases, strict=True)
    specs = [TensorSpec(name, dtype_name(a.dtype), a.shape) for name, a in arrays.items()]
    with ShardWriter(path, specs) as out:
        for name, array in arrays.items():
            out.write(name, array)
        out.finish()


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
        self._place = tempfile.TemporaryDirectory(prefix="molae-worker-")

    def __enter__(self) -> StagedText:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._place.cleanup()

    def reading(self, layer: int, *, anchored: bool = False) -> LayerInput:
        """The one that is in the file."""
        if anchored:
            raise CheckpointError(f"{self._path.name}: was read without the layers before it")
        arrays = map_file(self._path)
        activation: Any = arrays[_ACTIVATION].tobytes().decode()
        alpha, limit = arrays[_CLAMP].tolist()
        gate, up, down = (arrays.get(name) for name in _BIASES)
        biases = None if gate is None or up is None or down is None else (gate, up, down)
        x, index, weights, answers = (arrays[name] for name in _ARRAYS)
        return LayerInput(
            x, index, weights, activation, answers=answers, room=self._room,
            alpha=alpha, limit=limit, biases=biases,
        )  # fmt: skip

    def advance(self, layer: int, *changed: object) -> None:
        """Nothing comes behind it here."""

    def _room(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        path = Path(self._place.name, name.replace("/", "-"))
        path.unlink(missing_ok=True)
        if math.prod(shape) == 0:
            return np.empty(shape, np.float32)
        return np.memmap(path, np.float32, "w+", shape=shape)
