"""What the products and factorizations of a calibrated fit take at least, at the machine's pace.

Products count as flops at the best pace that a big one reached in the same run; eigenvectors, QR
and Cholesky factors take what LAPACK needs for matrices of that order, measured in the same run.
Nothing else takes time in this bound: no gathers, activations, casts, sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.contestants import limit_threads
from benchmarks.timing import seconds

__all__ = ["Entry", "Layer", "bound", "entries", "lapack_seconds", "phases"]

#: Types of the inner groups, and of all.
INNER = ("gate_proj", "up_proj")
KINDS = (*INNER, "down_proj")


@dataclass(frozen=True)
class Layer:
    """Sizes of a layer, and how many rows its experts and groups get.

    Attributes
    ----------
    F, D : int
    groups, ranks : dict of str to sequence
        By type; every rank is more than 0 and less than D.
    pairs : sequence of int
        Rows of each expert.
    met : dict of str to sequence of int
        By type: tokens of each group, each once.
    """

    F: int
    D: int
    groups: Mapping[str, Sequence[Sequence[int]]]
    ranks: Mapping[str, Sequence[int]]
    pairs: Sequence[int]
    met: Mapping[str, Sequence[int]]

    def of(self, kind: str) -> Iterator[tuple[int, int, int, int]]:
        """Of each group: experts, rank, rows of its experts, tokens."""
        for group, R, met in zip(self.groups[kind], self.ranks[kind], self.met[kind], strict=True):
            yield len(group), R, sum(self.pairs[e] for e in group), met


@dataclass(frozen=True)
class Entry:
    """Work of one sort.

    Attributes
    ----------
    phase, what : str
    count : int
    flops : float
        Of each, on average where they differ; 0 for LAPACK's.
    rate : str
        'float32' or 'float64', or LAPACK's routine.
    order : tuple of int
        Of the matrices that LAPACK is given.
    """

    phase: str
    what: str
    count: int
    flops: float
    rate: str
    order: tuple[int, ...] = ()


def phases(refits: Sequence[tuple[str, int]]) -> list[str]:
    """Names of the phases of a fit, in order."""
    names = ["moments", "factors"]
    for n, (kind, _) in enumerate(refits, 1):
        names += [f"refit {n}, {kind}: {part}" for part in ("passes", "solves")]
    return names


def entries(layer: Layer, refits: Sequence[tuple[str, int]]) -> list[Entry]:
    """All work of `molae.fit.fit_layer`, where the layer's own answers are known: the start of a
    refit has the student's made, each step what it changes of them; the last asks for no gradient.
    Nothing is counted that has been found before."""
    found = [*_moments(layer), *_factors(layer)]
    names = phases(refits)[2:]
    for (kind, steps), passes, solves in zip(refits, names[::2], names[1::2], strict=True):
        found += _passes(layer, passes, kind, steps)
        found += _solves(layer, solves, kind, steps)
    return [entry for entry in found if entry.count]


def bound(
    found: Sequence[Entry], gflops: Mapping[str, float], lapack: Mapping[tuple[Any, ...], float]
) -> dict[str, float]:
    """Seconds of each phase."""
    total: dict[str, float] = {}
    for entry in found:
        each = (
            lapack[entry.rate, entry.order]
            if entry.order
            else entry.flops / gflops[entry.rate] / 1e9
        )
        total[entry.phase] = total.get(entry.phase, 0.0) + entry.count * each
    return total


# -------------------------------------------------------------------------- the list


def _moments(layer: Layer) -> Iterator[Entry]:
    F, D, rows = layer.F, layer.D, sum(layer.pairs)
    yield Entry("moments", "gate and up of a row", rows, 4 * F * D, "float32")
    yield Entry("moments", "moments of a row, half of each", rows, D**2 + 3 * F**2, "float32")


def _factors(layer: Layer) -> Iterator[Entry]:
    F, D = layer.F, layer.D

    def of(what: str, count: int, flops: float, rate: str) -> Entry:
        return Entry("factors", what, count, flops, rate)

    def lapack(what: str, count: int, routine: str, *order: int) -> Entry:
        return Entry("factors", what, count, 0, routine, order)

    yield of("products of down's columns", len(layer.pairs), D * F**2, "float32")
    for kind in INNER:
        for k, R, _, _ in layer.of(kind):
            c = min(R, D - R)
            yield of("weighted Gram matrix", k, 2 * F**2 * D + F * D**2, "float32")
            yield lapack("whitening", 1, "Cholesky", D)
            yield of("whitened Gram matrix", 1, D**3, "float64")
            yield lapack("eigenvectors", 1, "eigenvectors", D)
            yield of("basis", 1, c * D**2 + 2 * c**2 * D, "float64")
            yield lapack("orthonormal basis", 1, "Cholesky", c)
            yield lapack("gauge form", 1, "QR", c, D)
            yield of("gauge form, solve", 1, c**2 * (D - c), "float64")
            yield of("B C B^T", k, 2 * R * (D - R) * D + R**2 * (D - R), "float64")
            yield lapack("normal equations", k, "Cholesky", R)
            yield of("W C B^T", k, 2 * F * R * D, "float32")
            yield from _private(of, k, F, R)
    for k, R, _, _ in layer.of("down_proj"):
        n = k * F
        yield lapack("moments' root", k, "Cholesky", F)
        yield of("weighted rows", k, F**2 * D, "float64")
        yield of("their Gram matrix", 1, n**2 * D, "float64")
        yield lapack("eigenvectors", 1, "eigenvectors", n)
        yield of("basis", 1, 2 * R * n * D + 2 * R**2 * D, "float64")
        yield lapack("orthonormal basis", 1, "Cholesky", R)
        yield lapack("gauge form", 1, "QR", R, D)
        yield of("gauge form, solve", 1, R**2 * (D - R), "float64")
        yield of("B B^T", 1, R**2 * (D - R), "float64")
        yield lapack("normal equations", 1, "Cholesky", R)
        yield of("B W", k, 2 * F * R * (D - R), "float64")
        yield from _private(of, k, F, R)
    for k, R, _, _ in layer.of("up_proj"):
        flops = 2 * R * (D - R) * D + R**2 * (D - R)
        yield of("metric of up's latent rows", k, flops, "float64")


def _private(
    of: Callable[[str, int, float, str], Entry], k: int, F: int, R: int
) -> Iterator[Entry]:
    yield of("private factor", k, 2 * F * R**2, "float64")
    yield of("its error", k, F * R**2, "float64")
    yield of("its error", k, 2 * F**2 * R, "float32")


def _passes(layer: Layer, phase: str, kind: str, steps: int) -> Iterator[Entry]:
    F, D, rows = layer.F, layer.D, sum(layer.pairs)
    latent = {name: sum(2 * R * (D - R) * met for _, R, _, met in layer.of(name)) for name in KINDS}
    private = {name: sum(2 * F * R * pairs for _, R, pairs, _ in layer.of(name)) for name in KINDS}
    forward = sum(latent.values()) + sum(private.values())
    # What a step changes, and what its gradient takes. down: its own latent rows, and the outer
    # products; up: those of up too.
    changed = backward = latent["down_proj"] + private["down_proj"]
    if kind == "up_proj":
        changed = backward = changed + private["up_proj"]
    if kind == "down_proj":
        yield Entry(phase, "moments of a row", rows, F**2, "float32")
    yield Entry(phase, "student forward", 1, forward, "float32")
    yield Entry(phase, "forward in a step", steps, changed, "float32")
    yield Entry(phase, "student backward", steps, backward, "float32")


def _solves(layer: Layer, phase: str, kind: str, steps: int) -> Iterator[Entry]:
    """Each metric is factored once; the direction of each step is solved for and held back."""
    F, D = layer.F, layer.D
    for k, R, _, _ in layer.of(kind):
        if kind == "down_proj":
            yield Entry(phase, "B B^T", 1, R**2 * (D - R), "float64")
        yield Entry(phase, "metric of rows", k, 0, "Cholesky", (F,))
        latent = k if kind == "up_proj" else 1
        yield Entry(phase, "metric of latent rows", latent, 0, "Cholesky", (R,))
        yield Entry(phase, "solves by rows", k * steps, 2 * R * F**2, "float32")
        yield Entry(phase, "solves by latent rows", k * steps, 2 * F * R**2, "float64")
        yield Entry(phase, "what holds", k * steps, 2 * F * R**2, "float32")


# ------------------------------------------------------------------------ LAPACK's time


def lapack_seconds(
    found: Sequence[Entry], threads: int, repeats: int = 2
) -> dict[tuple[Any, ...], float]:
    """Seconds of each routine and order that the list has: one problem a thread at once."""
    wanted = dict.fromkeys((e.rate, e.order) for e in found if e.order)
    rng = np.random.default_rng(0)
    limit_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return {
                (routine, order): _best(routine, order, rng, pool, threads, repeats)
                for routine, order in wanted
            }
    finally:
        limit_threads(threads)


def _best(
    routine: str,
    order: tuple[int, ...],
    rng: np.random.Generator,
    pool: ThreadPoolExecutor,
    threads: int,
    repeats: int,
) -> float:
    """The faster of NumPy's and torch's LAPACK."""
    A = rng.standard_normal((order[0], order[-1]))
    if routine != "QR":
        A = A @ A.T + len(A) * np.eye(len(A))
    T = torch.from_numpy(A)
    ways: dict[str, tuple[Callable[[], object], ...]] = {
        "eigenvectors": (lambda: np.linalg.eigh(A), lambda: torch.linalg.eigh(T)),
        "Cholesky": (lambda: np.linalg.cholesky(A), lambda: torch.linalg.cholesky(T)),
        "QR": (lambda: np.linalg.qr(A.T, mode="raw"), lambda: torch.geqrf(T.T)),
    }
    return min(
        seconds(lambda way=way: list(pool.map(lambda _: way(), range(threads))), 0.0) / threads
        for way in ways[routine]
        for _ in range(repeats)
    )
