"""How long a conversion may take, and how much memory: estimates, and called so."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from molae import fit
from molae.config import TYPES
from molae.convert.footprint import BASE_BYTES
from molae.convert.light import VECTOR_TOKENS
from molae.convert.measuring import TRIAL_SIZES
from molae.convert.naming import named
from molae.factored import Split
from molae.fit import LayerInput
from molae.fit.arguments import renumbered
from molae.fit.compressed import PASSES as VECTOR_PASSES
from molae.fit.layer import REFITS
from molae.fit.narrow import PASSES as NARROW_PASSES
from molae.io import DTYPES
from molae.ops import Projection, latent_experts_forward
from molae.ops.projection import latent_width
from molae.threads import get_num_threads

if TYPE_CHECKING:
    from molae.convert.conversion import Conversion
    from molae.convert.sketch import Sketch

__all__ = [
    "calibrated_seconds",
    "fit_seconds",
    "group_bytes",
    "group_flops",
    "memory_bytes",
    "scratch_bytes",
]


def fit_seconds(conversion: Conversion) -> float:
    """Estimate of the time of all factorizations.

    A few groups of each matrix type are really factored, as many as there are threads;
    the rest is taken to go at that pace, by its count of operations.
    """
    seconds = 0.0
    for kind, splits in _splits_by_kind(conversion).items():
        layer, split = splits[len(splits) // 2]
        sample = _some_groups(split, get_num_threads())
        matrices = conversion.model.matrices(conversion.checkpoint, layer, kind)
        experts, groups = renumbered(sample.groups)
        start = time.perf_counter()
        with named(conversion.model, layer, kind, experts):
            conversion.method.fit(
                [matrices[i] for i in experts],
                Split(groups, sample.ranks),
                conversion.model.side(kind),
            )
        pace = (time.perf_counter() - start) / _flops(conversion, sample)
        seconds += pace * sum(_flops(conversion, split) for _, split in splits)
    return seconds


def calibrated_seconds(conversion: Conversion, tokens: int) -> float:
    """Estimate of the time of all fits to a calibration text of so many tokens.

    A few tokens really go through the experts of a layer, and as many groups of each type as
    there are threads are really factored; the rest is taken to go at that pace.
    """
    splits, allocation = _splits_by_kind(conversion), conversion.allocation
    if not splits and not allocation.compressed:
        return 0.0
    model, calibrated = conversion.model, conversion.calibrated
    assert calibrated is not None
    E, K, F, D = (model.letters[letter] for letter in "EKFD")
    layer = max(allocation.layers or allocation.compressed)
    W = {kind: model.matrices(conversion.checkpoint, layer, kind) for kind in TYPES}
    few = max(64, -(-64 * E // K))
    rng = np.random.default_rng(0)
    given = LayerInput(
        rng.standard_normal((few, D), dtype=np.float32),
        np.arange(few * K).reshape(few, K) % E,
        np.full((few, K), 1 / K, dtype=np.float32),
    )
    own = tuple(Projection.separate(W[kind]) for kind in TYPES)
    start = time.perf_counter()
    latent_experts_forward(given.x, given.index, given.weights, own[0], own[1], own[2])
    pace = 6 * few * K * F * D / (time.perf_counter() - start)
    passes = calibrated.footprint.passes
    each = 4 * F * D + D * D + 3 * F * F + (4 * F * D if passes > 1 else 0)
    if conversion.config.refit:
        steps = sum(steps for _, steps in REFITS)  # what they do not change is kept
        size = conversion.config.target_size or 1.0
        each += int((10 * len(REFITS) + 5 * steps) * F * D * size)
    each += int(18 * conversion.config.heal * F * D * (conversion.config.target_size or 1.0))
    each += 6 * F * D * (2 if conversion.config.one_shot else 3)  # the layer itself
    seconds = len(allocation.layers) * tokens * K * each / pace
    units = allocation.light.units
    for n in allocation.compressed.values():  # forward and backward in each step
        if units is None:
            rows = min(tokens, VECTOR_TOKENS) * VECTOR_PASSES * (K - n)
        else:
            rows = tokens * NARROW_PASSES * n
        seconds += rows * 18 * (F if units is None else units) * D / pace
    for kind, of_kind in splits.items():
        sample = _some_groups(of_kind[len(of_kind) // 2][1], get_num_threads())
        start = time.perf_counter()
        _factor_like(kind, W[kind], sample)
        per_group = (time.perf_counter() - start) / len(sample.groups)
        seconds += per_group * sum(len(split.groups) for _, split in of_kind)
    return seconds


def _factor_like(kind: str, W: Sequence[np.ndarray], split: Split) -> None:
    """A factorization of these groups in the plainest metric."""
    members, groups = renumbered(split.groups)
    rows, cols = W[0].shape
    one = np.eye(cols, dtype=np.float32)
    fit.factor_weighted(
        [W[e] for e in members],
        [one] * len(members),
        [rank for rank in split.ranks if rank is not None],
        groups=groups,
        side="output" if kind == "down_proj" else "input",
        row_metric=None if kind == "down_proj" else [np.eye(rows, dtype=np.float32)] * len(members),
    )


def _splits_by_kind(conversion: Conversion | Sketch) -> dict[str, list[tuple[int, Split]]]:
    found: dict[str, list[tuple[int, Split]]] = {}
    for layer, kinds in conversion.allocation.layers.items():
        for kind, split in kinds.items():
            if split.is_latent:
                found.setdefault(kind, []).append((layer, split))
    return found


def _some_groups(split: Split, count: int) -> Split:
    chosen = list(split.latent_groups())[:count]
    return Split(tuple(group for _, group, _ in chosen), tuple(rank for _, _, rank in chosen))


def _flops(conversion: Conversion, split: Split) -> float:
    F, D = conversion.model.letters["F"], conversion.model.letters["D"]
    return sum(group_flops(len(group), rank, F=F, D=D) for _, group, rank in split.latent_groups())


def group_flops(k: int, rank: int, *, F: int, D: int) -> float:
    """Operations to factor a group of k experts, as ``csrc/molae.h`` counts them; with rank 0 to
    find its spectrum."""
    rows, least = k * F, min(k * F, D)
    return float(rows * D * least + 9 * least**3 + 4 * rows * D * rank)


def group_bytes(k: int, rank: int, *, F: int, D: int) -> int:
    """Workspace while a group of k experts is factored."""
    own = 4 * (4 * min(k * F, D) ** 2 + 3 * rank * D + rank * rank)
    return own + (4 * k * F * D if k * F < D else 0)


def scratch_bytes(conversion: Conversion) -> int:
    """Temporary files beside the result: hidden states of the calibration text, and what a refit
    keeps of one layer."""
    if conversion.calibration is None:
        return 0
    config, model, splits = conversion.config, conversion.model, _splits_by_kind(conversion)
    K, F = model.letters["K"], model.letters["F"]
    width = max((latent_width(split.ranks, K) for _, split in splits.get("up_proj", [])), default=0)
    tokens = math.prod(conversion.calibration.sequences.shape)
    return conversion.calibration.scratch_bytes(
        trials=len(model.moe_layers) * max(len(TYPES) * len(TRIAL_SIZES), K - 1),
        kept=4 * tokens * (2 * K * F + width) if config.refit else 0,
        anchored=not config.one_shot,
    )


def memory_bytes(conversion: Conversion | Sketch) -> int:
    """Estimate of the peak of anonymous memory.

    The factors of one matrix type, those of another that wait to be written, and the
    workspace of the groups that are factored at once.
    """
    model = conversion.model
    F, D = model.letters["F"], model.letters["D"]
    largest = max((sum(s.nbytes for s in job.specs) for shard in conversion.shards
                   for job in shard.jobs), default=0)  # fmt: skip
    results = max(largest, min(2 * largest, conversion.room))
    workspace = most = 0
    for splits in _splits_by_kind(conversion).values():
        for _, split in splits:
            each = [
                group_bytes(len(group), rank, F=F, D=D) for _, group, rank in split.latent_groups()
            ]
            most = max([most, *(len(group) for group in split.groups)])
            workspace = max(workspace, sum(sorted(each)[-get_num_threads() :]))
    if conversion.calibrated is not None:
        return results + conversion.calibrated.footprint.nbytes
    if not conversion.is_mapped:  # the groups at work, and one that is written
        workspace += (get_num_threads() * most + 1) * F * D * DTYPES[model.dtype].itemsize
    return BASE_BYTES + results + workspace
