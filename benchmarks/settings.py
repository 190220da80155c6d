"""Sizes of the measurements, and the rank that a size asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.timing import PAUSE
from benchmarks.weights import OLMOE
from molae.fit import stored_numbers

__all__ = [
    "CALIBRATED",
    "DISTILLED",
    "SHAPES",
    "SIZE",
    "SIZES",
    "Calibrated",
    "Distilled",
    "Settings",
    "Shape",
    "largest_rank",
]

#: Share of the dense numbers that the factors store, in gauge form.
SIZE = 0.75

#: Of the layers and models that are run.
SIZES = (0.6, 0.75)


@dataclass(frozen=True)
class Shape:
    """A layer of experts: sizes, the types it is measured in, and the most tokens."""

    name: str
    E: int
    K: int
    D: int
    F: int
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    most_tokens: int = 4096

    @property
    def k(self) -> int:
        """Experts of a group."""
        return min(8, self.E)


#: From the models' config.json. A layer of Mixtral is 5.6 GB in float32, and a forward pass of
#: 4096 tokens takes seconds: bfloat16 alone, up to 1024 tokens.
SHAPES = (
    Shape("OLMoE-1B-7B", E=64, K=8, D=2048, F=1024),
    Shape("Qwen3-30B-A3B", E=128, K=8, D=2048, F=768),
    Shape("DeepSeek-V2-Lite", E=64, K=6, D=2048, F=1408),
    Shape("Mixtral-8x7B", E=8, K=2, D=4096, F=14336, dtypes=("bfloat16",), most_tokens=1024),
)


@dataclass(frozen=True)
class Calibrated:
    """A layer of experts that is fitted to a text.

    Attributes
    ----------
    name : str
    E, K, F, D : int
    N : int
        Tokens.
    k : int
        Experts of a group of gate and of up; those of down have one each.
    size : float
        Share of the dense numbers that each group may store, in gauge form.
    """

    name: str
    E: int
    K: int
    F: int
    D: int
    N: int
    k: int = 4
    size: float = 0.6


#: One layer as a conversion has them, and as many tokens as it reads by default.
CALIBRATED = Calibrated("OLMoE-1B-7B", E=64, K=8, F=1024, D=2048, N=65536)


@dataclass(frozen=True)
class Distilled:
    """A layer of latent experts that is trained to answer as others do.

    Attributes
    ----------
    name : str
    E, K, D, F : int
    steps, epochs : int
        Steps of a pass over the tokens, and passes, of a run.
    k : int
        Experts of a group of gate and of up; those of down have one each.
    size : float
        Share of the dense numbers that each group may store, in gauge form.
    """

    name: str
    E: int
    K: int
    D: int
    F: int
    steps: int
    epochs: int
    k: int = 4
    size: float = 0.4


#: The demonstration model's layers, those of `benchmarks.quality.second`, and OLMoE's, in which a
#: step takes most of a second.
DISTILLED = (
    Distilled("demo", E=32, K=4, D=128, F=64, steps=30, epochs=4),
    Distilled("second model", E=32, K=4, D=192, F=96, steps=30, epochs=4),
    Distilled("OLMoE-1B-7B", E=64, K=8, D=2048, F=1024, steps=6, epochs=1),
)


@dataclass(frozen=True)
class Settings:
    """Sizes and how often each contestant runs.

    Attributes
    ----------
    E, F, D, V : int
        Experts, widths and vocabulary, as in the model that is imitated.
    timed_groups : int
        Groups that all contestants factor; an SVD of all would take minutes.
    layers : int
        Of the checkpoint that is converted, and of the model that is run.
    repeats : int
    threads : int
    pause : float
        Seconds of rest before each run.
    shapes : tuple of Shape
        Layers that are run.
    tokens : tuple of int
        N, ascending.
    few, many : int
        Up to `few` tokens a layer is bound by memory and starts with empty caches; from `many`
        on it is bound by arithmetic.
    stream_bytes : int
        Of the buffer that is read to empty the caches; more than they hold.
    prompt, new_tokens : int
        Tokens that a model reads at once, and that it writes.
    calibrated : Calibrated
        The layer of the case 'calibration'.
    fits : int
        Rounds of that case; one takes a quarter of an hour.
    distilled : tuple of Distilled
        Layers of the case 'distill'.
    kept : callable, optional
        Is given what a long case has so far, each time there is more.
    """

    E: int = OLMOE["E"]
    F: int = OLMOE["F"]
    D: int = OLMOE["D"]
    V: int = OLMOE["V"]
    timed_groups: int = 2
    layers: int = 4
    repeats: int = 5
    threads: int = 1
    pause: float = PAUSE
    shapes: tuple[Shape, ...] = SHAPES
    tokens: tuple[int, ...] = (1, 4, 16, 128, 1024, 4096)
    few: int = 16
    many: int = 1024
    stream_bytes: int = 2**30
    prompt: int = 1024
    new_tokens: int = 64
    calibrated: Calibrated = CALIBRATED
    fits: int = 1
    distilled: tuple[Distilled, ...] = DISTILLED
    kept: Callable[[dict[str, Any]], object] | None = None

    @property
    def rank_alone(self) -> int:
        """Rank of the case 'reduce': half of what an expert can have."""
        return min(self.F, self.D) // 2


def largest_rank(k: int, F: int, D: int, size: float = SIZE) -> int:
    """The largest rank whose gauge form stores at most `size` of k F D numbers."""
    ranks = range(1, min(k * F, D) + 1)
    return max(R for R in ranks if stored_numbers(R, k, F, D) <= size * k * F * D)
