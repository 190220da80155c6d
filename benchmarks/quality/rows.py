"""The rows of the comparison: a bench and a size give a model's experts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import molae
from benchmarks.quality.baselines import d2_moe, hc_smoe, mobe, reap, svd_llm
from benchmarks.quality.layer import Compressed, Layer, OutOfReach
from benchmarks.quality.model import Source, load, moe_layers, read_weights
from molae.errors import ArgumentError

__all__ = ["ROWS", "Attempt", "Bench"]

#: Group sizes that the published MoLAE is tried at; the best one on the held-out text counts.
PUBLISHED_GROUPS = (2, 4, 8, 16, 32)

#: Group size of the row with even ranks.
EVEN_GROUPS = 4


@dataclass(frozen=True, eq=False)
class Bench(Source):
    """What every row works on.

    Attributes
    ----------
    layers : list of Layer
    work : Path
        For what is kept between rows.
    """

    layers: list[Layer]
    work: Path


@dataclass(frozen=True, eq=False)
class Attempt:
    """One way to fill a row; `model` is to be scored as it is, with experts like `layers`.

    Where it is None the original is scored with the experts of `layers`.
    """

    layers: list[Compressed]
    model: Any = None
    note: str = ""


#: Of several attempts the one with the lowest perplexity is the row's.
Attempts = Callable[[Bench, float], Iterator[Attempt]]


def _layerwise(
    compress: Callable[[Layer, float], Compressed], bench: Bench, size: float
) -> Iterator[Attempt]:
    found = [compress(layer, size) for layer in bench.layers]
    yield Attempt(found, note=found[0].note)


def _published(bench: Bench, size: float) -> Iterator[Attempt]:
    E, reached = bench.layers[0].num_experts, False
    for k in (k for k in PUBLISHED_GROUPS if k <= E):
        try:
            config = molae.ConvertConfig(method="molae", size=size, group_size=k)
            yield _converted(bench, config, note=f"groups of {k}")
            reached = True
        except ArgumentError:
            continue
    if not reached:
        raise OutOfReach("gate and up alone cannot be so small; down_proj stays")


def _blind(bench: Bench, size: float) -> Iterator[Attempt]:
    yield _converted(bench, molae.ConvertConfig(size=size))


def _calibrated(
    bench: Bench, size: float, *, options: Mapping[str, Any] | None = None
) -> Iterator[Attempt]:
    config = molae.ConvertConfig(size=size, **(options or {}))
    yield _converted(bench, config, calibrated=True)


def _converted(
    bench: Bench, config: molae.ConvertConfig, *, calibrated: bool = False, note: str = ""
) -> Attempt:
    """By ``molae.convert``, read back from the disk; the experts' products by materialize."""
    dst, dense = bench.work / "converted", bench.work / "dense"
    for folder in (dst, dense):
        shutil.rmtree(folder, ignore_errors=True)
    if calibrated:
        with bench.calibration() as run:
            report = molae.convert(
                bench.path, dst, config, calibration=run, stats=bench.work / "stats"
            )
    else:
        report = molae.convert(bench.path, dst, config)
    molae.materialize(dst, dense)
    stored = int(report.plan["after"]["expert_numbers"])
    experts = [read_weights(experts) for _, experts in moe_layers(load(dense)[0])]
    layers = [
        Compressed.of(weights, stored // len(experts) + (n < stored % len(experts)))
        for n, weights in enumerate(experts)
    ]
    if not note:
        types = report.plan["types"]
        used = dict.fromkeys("/".join(str(k) for k in types[kind]["group_sizes"]) for kind in types)
        note = f"groups of {', '.join(used)}"
    return Attempt(layers, load(dst)[0], note)


#: How each row of `titles.TITLES` is made.
ROWS: dict[str, Attempts] = {
    "molae": _published,
    "blind": _blind,
    "mobe": partial(_layerwise, mobe.compress),
    "svd-llm": partial(_layerwise, svd_llm.compress),
    "d2-moe": partial(_layerwise, d2_moe.compress),
    "reap": partial(_layerwise, reap.compress),
    "hc-smoe": partial(_layerwise, hc_smoe.compress),
    "even": partial(
        _calibrated, options={"uniform": True, "group_size": EVEN_GROUPS, "refit": False}
    ),
    "one-shot": partial(_calibrated, options={"one_shot": True}),
    "calibrated": _calibrated,
}
