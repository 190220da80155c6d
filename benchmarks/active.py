"""The case 'active': a layer with fewer active experts beside the layer with all of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from benchmarks.peak import Product, Stream
from benchmarks.settings import Settings, Shape
from benchmarks.timing import alternate, ratio, summary
from molae import ops

__all__ = ["NARROW", "OVERHEAD", "SAVED", "active"]

Array = npt.NDArray[Any]
Row = dict[str, Any]

#: Goals: time of vectors over that of plain top-(K − n), and of this over what the bytes or the
#: operations that are left would take of the whole layer's time.
OVERHEAD, SAVED = 1.05, 1.10

#: Share of an expert's units that a narrow one has.
NARROW = 8

#: Rounds of calls of few tokens, which differ much, over those of others.
MORE = 4

#: Of the layers that others run these are left out: one is as the first, one has two experts.
LEFT_OUT = ("DeepSeek-V2-Lite", "Mixtral-8x7B")

DTYPES: dict[str, npt.DTypeLike] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def active(s: Settings, _: float) -> dict[str, Any]:
    """Half of a token's experts compressed: vectors, narrow experts, nothing, and all of them."""
    stream, product = Stream(s.threads, s.stream_bytes), Product(s.threads, min(s.D, 2048))
    rows: list[Row] = []
    for shape in s.shapes:
        for dtype in shape.dtypes if shape.name not in LEFT_OUT else ():
            rows += _layer(s, shape, dtype, stream, product)
            ops.release_scratch()
    return {"rows": rows, "narrow": NARROW, "read_gbs": stream.gbs}


@dataclass(frozen=True, eq=False)
class _Layer:
    """Weights and the input of one shape in one type."""

    gate: Array
    up: Array
    down: Array
    vectors: Array
    narrow: ops.NarrowExperts
    x: Array
    index: Array
    weights: Array

    @classmethod
    def of(cls, shape: Shape, dtype: npt.DTypeLike, tokens: int) -> _Layer:
        E, K, D, F = shape.E, shape.K, shape.D, shape.F
        rng = np.random.default_rng(0)

        def draw(*size: int) -> Array:
            values = rng.standard_normal(size, dtype=np.float32)
            return (values / np.float32(size[-1] ** 0.5)).astype(dtype)

        m = max(1, F // NARROW)
        narrow = ops.NarrowExperts(draw(E, m, D), draw(E, m, D), draw(E, D, m), draw(E, D))
        vectors = (1 + 0.1 * rng.standard_normal((E, 2 * D + F), dtype=np.float32)).astype(dtype)
        index = np.argsort(rng.random((tokens, E)), axis=1)[:, :K].astype(np.int64)
        weights = np.sort(rng.random((tokens, K), dtype=np.float32), axis=1)[:, ::-1].copy()
        x = rng.standard_normal((tokens, D), dtype=np.float32).astype(dtype)
        return cls(draw(E, F, D), draw(E, F, D), draw(E, D, F), vectors, narrow, x, index, weights)

    def calls(self, N: int, n: int) -> dict[str, Callable[[], Array]]:
        x, index, weights = self.x[:N], self.index[:N], self.weights[:N]
        layer = self.gate, self.up, self.down
        main = ops.split_slots(index, weights, len(self.gate), n)[0]
        return {
            "all K": lambda: ops.experts_forward(x, index, weights, *layer),
            "plain": lambda: ops.experts_forward(x, main, weights, *layer),
            "vectors": lambda: ops.compressed_experts_forward(
                x, index, weights, *layer, self.vectors, n
            ),
            "narrow": lambda: ops.narrow_experts_forward(x, index, weights, *layer, self.narrow, n),
        }


def _layer(s: Settings, shape: Shape, dtype: str, stream: Stream, product: Product) -> list[Row]:
    n = shape.K // 2
    tokens = [N for N in (s.tokens[0], *(N for N in s.tokens if s.many <= N))
              if shape.most_tokens >= N]  # fmt: skip
    layer = _Layer.of(shape, DTYPES[dtype], tokens[-1])
    rows = []
    for N in tokens:
        calls = layer.calls(N, n)
        error = _check(layer, N, n, calls)
        works: dict[str, Callable[[], object]] = {**calls}
        few = s.few >= N
        before = (lambda name: stream.read()) if few else None
        if not few:
            works["product"] = product
        times = alternate(works, s.repeats * (MORE if few else 1), s.pause / 5, before)
        counts, work = _work(layer, N, n), {}
        for name in calls:
            nbytes, flops = counts[name]
            work[name] = {"bytes": nbytes, "flops": flops, **summary(times[name])}
        # What bounds a call of few tokens is the bytes that it reads; of many its operations.
        what = "bytes" if few else "flops"
        left = work["plain"][what] / work["all K"][what]
        overhead = ratio(times["vectors"], times["plain"])
        took = ratio(times["vectors"], times["all K"])
        row: Row = {
            "shape": shape.name, "dtype": dtype, "N": N, "n": n, "error": error, "bound": what,
            "left": left, "overhead": overhead, "took": took,
            "narrow_overhead": ratio(times["narrow"], times["plain"]),
            "work": work,
            "goals": {"overhead": overhead["ratio"] <= OVERHEAD,
                      "saved": took["ratio"] / left <= SAVED},
        }  # fmt: skip
        if not few:
            median = statistics.median(times["product"])
            pace = work["plain"]["flops"] / statistics.median(times["plain"])
            row["peak_share"] = pace / (product.flops / median)
        rows.append(row)
    return rows


def _check(layer: _Layer, N: int, n: int, calls: dict[str, Callable[[], Array]]) -> float:
    """The largest error of the first tokens, over their scale, against plain float64."""
    some = range(min(N, 3))
    found = {name: call() for name, call in calls.items()}
    worst = 0.0
    eps = float(ml_dtypes.finfo(layer.x.dtype).eps)
    for name, y in found.items():
        for t in some:
            want = _by_definition(layer, t, n, name)
            error = float(np.abs(y[t].astype(np.float64) - want).max() / np.abs(want).max())
            worst = max(worst, error)
            if not error <= 4 * eps + 1e-4:
                raise ArithmeticError(
                    f"{name}, token {t}: off by {error:.2g} of its largest number"
                )
    return worst


def _by_definition(layer: _Layer, t: int, n: int, name: str) -> Array:
    wide = {key: getattr(layer, key) for key in ("gate", "up", "down")}
    x, slots = layer.x[t].astype(np.float64), range(layer.index.shape[1])  # by weight already
    D, F, K = len(x), layer.gate.shape[1], layer.index.shape[1]
    y, main = np.zeros(D), [k for k in slots if name == "all K" or k < K - n]
    one, two, three = np.ones(D), np.ones(F), np.ones(D)
    rest = [k for k in slots if k >= K - n]
    if name == "vectors":
        own = layer.vectors[layer.index[t, rest]].astype(np.float64)
        g = layer.weights[t, rest].astype(np.float64)
        one, two, three = np.split((g / g.sum()) @ own, [D, D + F])
    for k in main:
        e = layer.index[t, k]
        gate, up, down = (wide[key][e].astype(np.float64) for key in ("gate", "up", "down"))
        a = gate @ (x * one)
        y += layer.weights[t, k] * (down @ (a / (1 + np.exp(-a)) * (up @ (x * three)) * two))
    if name == "narrow":
        own_experts = layer.narrow
        for k in rest:
            e = layer.index[t, k]
            a = own_experts.gate[e].astype(np.float64) @ x
            h = a / (1 + np.exp(-a)) * (own_experts.up[e].astype(np.float64) @ x)
            y += layer.weights[t, k] * (
                own_experts.down[e].astype(np.float64) @ h + own_experts.bias[e].astype(np.float64)
            )
    return y


def _work(layer: _Layer, N: int, n: int) -> dict[str, tuple[int, int]]:
    """Bytes of the weights that a call reads, and its operations in products."""
    index, size = layer.index[:N], layer.gate.itemsize
    K, F, D = index.shape[1], layer.gate.shape[1], layer.gate.shape[2]
    main, rest = index[:, : K - n], index[:, K - n :]

    def reads(some: Array, numbers: int) -> int:
        return len(np.unique(some)) * numbers * size

    m = layer.narrow.units
    one = 3 * F * D
    plain = reads(main, one), 2 * main.size * one
    return {
        "all K": (reads(index, one), 2 * index.size * one),
        "plain": plain,
        "vectors": (plain[0] + reads(rest, 2 * D + F), plain[1]),
        "narrow": (
            plain[0] + reads(rest, 3 * m * D + D),
            plain[1] + 2 * rest.size * 3 * m * D,
        ),
    }
