"""A checkpoint as the layers that the methods are given, and as a model that is scored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.quality.layer import Array, Compressed, Layer
from molae.config import TYPES
from molae.hf.calibrate import Calibration
from molae.hf.evaluate import evaluation_mode
from molae.hf.opening import open_model
from molae.hf.windows import Windows, ratio, tokenize, windows

__all__ = [
    "Scores",
    "Source",
    "Text",
    "layers_of",
    "load",
    "moe_layers",
    "read_weights",
    "replaced",
    "rises",
    "score",
]


@dataclass(frozen=True, eq=False)
class Source:
    """A checkpoint, and the text to calibrate with.

    Attributes
    ----------
    path : Path
    tokens : (count,) ndarray of int
        Of the text.
    sequences, length : int
    """

    path: Path
    tokens: Array
    sequences: int
    length: int

    def calibration(self) -> Calibration:
        return Calibration(self.path, self.tokens, sequences=self.sequences, length=self.length)


@dataclass(frozen=True, eq=False)
class Scores:
    """Losses of a text, window by window.

    Attributes
    ----------
    sums : (W,) ndarray
        Of the negative log-likelihoods of a window's scored tokens, in nats.
    sizes : (W,) ndarray
        How many they are.
    """

    sums: Array
    sizes: Array


class Text:
    """Held-out text of at most `limit` tokens, cut into windows."""

    def __init__(self, tokenizer: Any, text: str, limit: int, longest: int | None) -> None:
        self.plan: Windows = windows(tokenize(tokenizer, text)[:limit], limit=longest)


def score(model: Any, text: Text) -> Scores:
    """Each token but the first once, as ``molae eval`` does it."""
    sums, sizes = [], []
    with evaluation_mode(model):
        for rows, begins in text.plan.batches("cpu"):
            logits = model(input_ids=rows, use_cache=False).logits
            for begin, row, scores in zip(begins, rows, logits, strict=True):
                losses = nn.functional.cross_entropy(
                    scores[begin - 1 : -1].float(), row[begin:], reduction="sum"
                )
                sums.append(losses.double().item())
                sizes.append(text.plan.window - begin)
    return Scores(np.array(sums), np.array(sizes))


def rises(own: Scores, base: Scores) -> dict[str, float]:
    """Loss and perplexity, and the rise of this over that of `base`, by paired windows."""
    sizes = [int(n) for n in own.sizes]
    loss = ratio(list(own.sums), sizes)
    rise = ratio(list(own.sums - base.sums), sizes)
    return {
        "loss": loss.mean,
        "perplexity": math.exp(loss.mean),
        "perplexity_se": math.exp(loss.mean) * loss.se,
        "rise": math.expm1(rise.mean),
        "rise_se": math.exp(rise.mean) * rise.se,
    }


def moe_layers(model: Any) -> list[tuple[nn.Module, nn.Module]]:
    """Router and experts of each MoE layer, in order."""
    found = []
    for block in model.modules():
        experts = getattr(block, "experts", None)
        if experts is not None and hasattr(experts, "gate_up_proj"):
            found.append((block.gate, experts))
    return found


def read_weights(experts: Any) -> dict[str, Array]:
    """Gate, up and down of a layer, float32."""
    both = experts.gate_up_proj.detach().float().numpy()
    F = both.shape[1] // 2
    down = experts.down_proj.detach().float().numpy()
    return {"gate_proj": both[:, :F], "up_proj": both[:, F:], "down_proj": down}


def layers_of(
    model: Any, calibration: Calibration, *, seed: int = 0, fisher: bool = True
) -> list[Layer]:
    """Each MoE layer of the original, with what the text sends it."""
    gradients = _fisher(model, calibration.sequences) if fisher else None
    found = []
    for place, (number, (_, experts)) in enumerate(
        zip(calibration.moe_layers, moe_layers(model), strict=True)
    ):
        given = calibration.reading(number)
        if given.activation != "silu":
            raise ValueError(f"layer {number}: expected silu, got {given.activation}")
        found.append(
            Layer(
                weights={k: np.array(w) for k, w in read_weights(experts).items()},
                x=np.array(given.x),
                index=given.index,
                routing=given.weights,
                fisher={} if gradients is None else gradients[place],
                seed=seed,
            )
        )
    return found


def _fisher(model: Any, sequences: Array) -> list[dict[str, Array]]:
    """Mean square of the loss's gradient by each expert's matrices, a sequence at a time."""
    parts = moe_layers(model)
    sums = [
        {kind: np.zeros(len(experts.gate_up_proj)) for kind in TYPES}  # type: ignore[arg-type]
        for _, experts in parts
    ]
    for row in torch.from_numpy(sequences):
        model.zero_grad()
        logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
        nn.functional.cross_entropy(logits, row[1:]).backward()  # type: ignore[no-untyped-call]
        for found, (_, experts) in zip(sums, parts, strict=True):
            both, down = experts.gate_up_proj.grad, experts.down_proj.grad
            gate, up = both.chunk(2, dim=1)  # type: ignore[union-attr,operator]
            for kind, gradient in zip(TYPES, (gate, up, down), strict=True):
                found[kind] += gradient.double().square().mean(dim=(1, 2)).numpy()
    model.zero_grad()
    return sums


class replaced:
    """A model with other experts meanwhile: ``with replaced(model, compressed): ...``."""

    def __init__(self, model: Any, layers: Sequence[Compressed]) -> None:
        self._parts, self._layers = moe_layers(model), layers
        self._before: list[tuple[nn.Module, Mapping[str, Any]]] = []

    def __enter__(self) -> None:
        for (router, experts), layer in zip(self._parts, self._layers, strict=True):
            kept = np.flatnonzero(layer.kept)
            both = np.concatenate([layer.weights["gate_proj"], layer.weights["up_proj"]], axis=1)
            self._set(
                experts,
                num_experts=len(kept),
                gate_up_proj=_parameter(both[kept]),
                down_proj=_parameter(layer.weights["down_proj"][kept]),
            )
            weight = router.weight.detach().numpy()[kept]  # type: ignore[union-attr,operator]
            self._set(router, num_experts=len(kept), weight=_parameter(weight))

    def __exit__(self, *error: object) -> None:
        for module, values in self._before:
            for name, value in values.items():
                setattr(module, name, value)

    def _set(self, module: nn.Module, **values: Any) -> None:
        self._before.append((module, {name: getattr(module, name) for name in values}))
        for name, value in values.items():
            setattr(module, name, value)


def _parameter(array: Array) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)))


def load(path: Path) -> tuple[Any, Any]:
    """Model in float32, and tokenizer."""
    return open_model(path, dtype="float32", device="cpu")
