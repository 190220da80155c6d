"""How long a conversion may take, and how much memory: estimates, and called so."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from molae.convert.naming import named
from molae.factored import Split
from molae.threads import get_num_threads

if TYPE_CHECKING:
    from molae.convert.conversion import Conversion

__all__ = ["fit_seconds", "memory_bytes"]

#: Python, NumPy and the libraries, before any work.
BASE_BYTES = 60_000_000

#: What torch and transformers take besides.
TORCH_BYTES = 500_000_000


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
        experts = [i for group in sample.groups for i in group]
        position = {i: at for at, i in enumerate(experts)}
        groups = tuple(tuple(position[i] for i in group) for group in sample.groups)
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


def _splits_by_kind(conversion: Conversion) -> dict[str, list[tuple[int, Split]]]:
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
    """Operations to factor one layer's matrix type, as ``csrc/molae.h`` counts them."""
    F, D = conversion.model.letters["F"], conversion.model.letters["D"]
    total = 0.0
    for _, group, rank in split.latent_groups():
        rows = len(group) * F
        total += rows * D * min(rows, D) + 9 * min(rows, D) ** 3 + 4 * rows * D * rank
    return total


def memory_bytes(conversion: Conversion) -> int:
    """Estimate of the peak of anonymous memory.

    The factors of one matrix type, those of another that wait to be written, and the
    workspace of the groups that are factored at once.
    """
    model = conversion.model
    F, D = model.letters["F"], model.letters["D"]
    largest = max((sum(s.nbytes for s in job.specs) for shard in conversion.shards
                   for job in shard.jobs), default=0)  # fmt: skip
    results = max(largest, min(2 * largest, conversion.room))
    workspace = 0
    for splits in _splits_by_kind(conversion).values():
        for _, split in splits:
            each = [
                4 * (4 * min(len(group) * F, D) ** 2 + 3 * rank * D + rank * rank)
                + (4 * len(group) * F * D if len(group) * F < D else 0)
                for _, group, rank in split.latent_groups()
            ]
            workspace = max(workspace, sum(sorted(each)[-get_num_threads() :]))
    return BASE_BYTES + results + workspace + _calibration_bytes(conversion)


def _calibration_bytes(conversion: Conversion) -> int:
    """torch, one layer's moments and their float64 fits; hidden states are mapped."""
    if conversion.calibrated is None:
        return 0
    E, F, D = (conversion.model.letters[letter] for letter in "EFD")
    moments = 4 * E * (D * D + 3 * F * F)
    a_thread = 8 * (7 * D * D + max(D, F) ** 2 + F * F + 5 * F * D)
    return TORCH_BYTES + moments + get_num_threads() * a_thread
