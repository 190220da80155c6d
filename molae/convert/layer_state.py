"""The state of a layer that is being trained, kept beside the journal."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from molae.errors import CheckpointError
from molae.io import ShardWriter, TensorSpec, dtype_name, map_file, parse_json

__all__ = ["STATE", "LayerState", "training_told"]

STATE = ".molae-layer-state.safetensors"

#: Seconds between states, at least, and in shares of what it takes to write one: a large layer's
#: are written less often, so that they never take more than a twentieth of the time.
EVERY, SHARE = 60.0, 20.0

#: The tensor that holds the facts, as JSON.
_FACTS = "facts"


class LayerState:
    """Keeps the descent of one layer, a `molae.fit.descent.Keeper`.

    Parameters
    ----------
    path : Path
        The file; it belongs to one run, whose journal says which.
    layer : int
        Another layer's state is none of this one's.
    """

    def __init__(self, path: Path, layer: int) -> None:
        self._path, self._layer = path, layer
        self._wait, self._last = EVERY, time.monotonic()

    def load(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        if not self._path.is_file():
            return None
        try:
            arrays = dict(map_file(self._path))
            facts = parse_json(arrays.pop(_FACTS).tobytes())
            layer = facts.pop("layer")
        except (CheckpointError, LookupError, ValueError, TypeError, AttributeError):
            return None  # cut short; the layer is begun anew, and comes to the same
        return (arrays, facts) if layer == self._layer else None

    def due(self) -> bool:
        return time.monotonic() - self._last >= self._wait

    def save(self, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        start = time.monotonic()
        text = json.dumps({**facts, "layer": self._layer}).encode()
        everything = {**arrays, _FACTS: np.frombuffer(text, np.uint8)}
        specs = [TensorSpec(n, dtype_name(a.dtype), a.shape) for n, a in everything.items()]
        with ShardWriter(self._path, specs) as out:
            for name, array in everything.items():
                out.write(name, array)
            out.finish()
        self._last = time.monotonic()
        self._wait = max(EVERY, SHARE * (self._last - start))


def training_told(tell: Callable[[str], None]) -> Callable[[int, int, int, float], None]:
    """Says a layer's steps and loss in words."""

    def told(layer: int, done: int, steps: int, loss: float) -> None:
        tell(f"layer {layer}: step {done} of {steps}, loss {loss:.4g}")

    return told
