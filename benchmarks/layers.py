"""The case 'layers': layers of latent and of dense experts, forward and backward."""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch._dynamo.config
import torch.fx.experimental._config

from benchmarks.layer_check import agree, check_forward, check_gradients, reference, tolerance
from benchmarks.layer_forms import COMPILED, Form, Pool, Subject, dense, latent
from benchmarks.peak import Product, Stream
from benchmarks.settings import SIZES, Settings, Shape
from benchmarks.timing import alternate, ratio, summary
from molae import ops

__all__ = ["FASTER", "FASTER_THAN_F32", "OF_PEAK", "OF_PEAK_BACKWARD", "OF_READ", "layers"]

Row = dict[str, Any]
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

#: Goals for few tokens: times faster than the best torch form, and share of the read bandwidth.
FASTER, OF_READ = 2.0, 0.8
#: For many, in float32: share of what a big product reaches, forward and backward.
OF_PEAK, OF_PEAK_BACKWARD = 0.8, 0.75
#: For many, in bfloat16: times faster than molae in float32, and than torch in bfloat16.
FASTER_THAN_F32, FASTER_BF16 = 1.5, 1.0

#: Calls of few tokens are short, and their times differ much.
REPEATS_FEW, REPEATS_MANY, REPEATS_BACKWARD = 9, 3, 2

#: The contestant that shows what the machine can do.
PRODUCT = "product"

#: Seconds of rest before each run: the runs are short, and so are the spins of torch's threads.
PAUSE = 0.03

#: Tokens whose gradients are computed in float64.
SAMPLE_BACKWARD = 4


def layers(s: Settings, _: float) -> dict[str, Any]:
    """Each shape and type, with each number of tokens, by molae, torch and Transformers."""
    stream = Stream(s.threads, s.stream_bytes)
    product = Product(s.threads, min(s.D, 2048))
    rows: list[Row] = []
    with _compiling() as hindrance:
        for shape in s.shapes:
            for dtype in shape.dtypes:
                rows += _Bench(s, shape, dtype, stream, product, not hindrance).rows()
                gc.collect()
                ops.release_scratch()
                if s.kept is not None:
                    s.kept({"rows": rows})
    _compare_types(s, rows)
    return {
        "read_gbs": stream.gbs,
        "read_way": stream.name,
        "read_found": stream.found,
        "stream_bytes": s.stream_bytes,
        "not_compiled": hindrance,
        "few": s.few,
        "many": s.many,
        "rows": rows,
    }


@contextlib.contextmanager
def _compiling() -> Iterator[str]:
    """torch.compile without a cache that outlives the run, and without silent ways out.

    Gives the reason where it does not work at all (it needs a C++ compiler), else nothing.
    """
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with (
        tempfile.TemporaryDirectory(prefix="molae-benchmark-") as folder,
        torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True),
        # Else sizes that are equal by chance would be taken to be equal for ever.
        torch.fx.experimental._config.patch(use_duck_shape=False),
    ):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            yield _hindrance()
        finally:
            del os.environ["TORCHINDUCTOR_CACHE_DIR"]
            if before is not None:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


def _hindrance() -> str:
    try:
        torch.compile(lambda x: x + x.sum())(torch.ones(100))
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


@dataclass
class _Bench:
    """One shape in one type."""

    s: Settings
    shape: Shape
    dtype_name: str
    stream: Stream
    product: Product
    compiled: bool
    chosen: dict[tuple[str, float], str] = field(default_factory=dict)

    def rows(self) -> list[Row]:
        s, shape = self.s, self.shape
        self.dtype = getattr(torch, self.dtype_name)
        self.pool = Pool()
        self.subjects = _subjects(shape, self.dtype, self.pool)
        self.tokens = [N for N in s.tokens if shape.most_tokens >= N]
        most = self.tokens[-1]
        self.inputs = _inputs(shape, most, self.dtype, self.pool)
        # Before each run with empty caches a small layer wakes threads and brings the code back.
        self.small = Shape(
            "", E=min(shape.E, 2 * shape.k), K=shape.K, D=shape.D, F=max(shape.F // 8, 16)
        )
        self.wake = _subjects(self.small, self.dtype, self.pool)
        self.wake_inputs = _inputs(self.small, s.few, self.dtype, self.pool)
        self.sample = torch.tensor(sorted({*range(min(4, most)), *(N - 1 for N in self.tokens)}))
        x, index, weights = (tensor[self.sample] for tensor in self.inputs)
        with torch.no_grad():
            self.truths = [reference(sub.layer, x, index, weights) for sub in self.subjects]
        rows = []
        for N in self.tokens:
            rows += self._forward(N)
        if self.dtype == torch.float32:
            self.dy = self.pool.draw((most, shape.D), 1.0, self.dtype)
            for N in (N for N in self.tokens if s.many <= N):
                rows += self._backward(N)
        return rows

    def _forms(self, direction: str, N: int) -> list[tuple[Subject, list[Form]]]:
        """Who takes part: all, and for the greatest N only who was best before."""
        found = []
        for sub in self.subjects:
            others = [
                form
                for form in sub.others
                if form.takes(N) and (self.compiled or form.name != COMPILED)
            ]
            if direction == "backward":
                others = [form for form in others if form.leaves]
            if self.s.many < N:
                name = self.chosen.get((direction, sub.size))
                others = [form for form in others if form.name == name] or others
            found.append((sub, others))
        return found

    def _given(self, N: int) -> Inputs:
        x, index, weights = self.inputs
        return x[:N], index[:N], weights[:N]

    # ------------------------------------------------------------------ forward

    @torch.no_grad()
    def _forward(self, N: int) -> list[Row]:
        s, given = self.s, self._given(N)
        forms = self._forms("forward", N)
        tol = tolerance(self.dtype, max(self.shape.D, self.shape.F))
        known = self.sample < N
        errors: dict[float, float] = {}
        works: dict[str, Callable[[], object]] = {}
        for (sub, others), truth in zip(forms, self.truths, strict=True):
            ours = None
            for form in (sub.ours, *others):
                name = _name(sub, form)
                y = form.call(*given)
                error = check_forward(name, y, truth[known], self.sample[known], ours, tol)
                if form is sub.ours:
                    ours, errors[sub.size] = y, error
                works[name] = partial(form.call, *given)
            del ours
        repeats = s.repeats
        if s.many <= N:
            repeats, works[PRODUCT] = min(repeats, REPEATS_MANY), self.product
        elif s.few >= N and repeats > REPEATS_MANY:
            repeats = max(repeats, REPEATS_FEW)
        self.stream.times.clear()
        before = self._empty_caches(forms, N) if s.few >= N else None
        times = alternate(works, repeats, min(s.pause, PAUSE), before)
        rows = self._rows("forward", N, forms, times)
        for row in rows:
            row["error"], row["tolerance"] = errors[row["size"]], tol
        return rows

    def _empty_caches(
        self, forms: list[tuple[Subject, list[Form]]], N: int
    ) -> Callable[[str], object]:
        x, index, weights = self.wake_inputs
        small: dict[str, Callable[[], object]] = {}
        for (sub, others), wake in zip(forms, self.wake, strict=True):
            names = {form.name for form in others}
            for form in (wake.ours, *(f for f in wake.others if f.name in names)):
                small[_name(sub, form)] = partial(form.call, x[:N], index[:N], weights[:N])
                small[_name(sub, form)]()  # compiled before any clock starts

        def before(name: str) -> None:
            self.stream.read()
            time.sleep(min(self.s.pause, PAUSE) / 4)
            small[name]()

        return before

    # ----------------------------------------------------------------- backward

    def _backward(self, N: int) -> list[Row]:
        s, dy = self.s, self.dy[:N]
        x, index, weights = self._given(N)
        x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
        forms = self._forms("backward", N)
        tol = 2 * tolerance(self.dtype, max(self.shape.D, self.shape.F, N))
        works: dict[str, Callable[[], object]] = {}
        callers: dict[str, Callable[[], torch.Tensor]] = {}
        held: dict[str, torch.Tensor] = {}

        def back(name: str, form: Form) -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(held.pop(name), (x, weights, *form.leaves), dy)

        for sub, others in forms:
            truth = self._gradients(sub)
            sample = torch.arange(len(truth[0]))
            ours: dict[str, torch.Tensor] = {}
            for form in (sub.ours, *others):
                name = _name(sub, form)
                callers[name] = partial(form.call, x, index, weights)
                works[name] = partial(back, name, form)
                held[name] = callers[name]()
                dx, dweights, *rest = back(name, form)
                check_gradients(name, dx, dweights, truth, sample, tol)
                if form is sub.ours:
                    ours = form.named(tuple(rest))
                else:
                    agree(name, form.named(tuple(rest)), ours, tol)
                del dx, dweights, rest
            del ours

        def before(name: str) -> None:
            if name in callers:
                held[name] = callers[name]()
                works[name]()  # a step before this one, whose memory this one finds
                held[name] = callers[name]()

        works[PRODUCT] = self.product
        repeats = min(s.repeats, REPEATS_BACKWARD)
        times = alternate(works, repeats, min(s.pause, PAUSE), before)
        return self._rows("backward", N, forms, times)

    def _gradients(self, sub: Subject) -> tuple[torch.Tensor, torch.Tensor]:
        """Of x and weights, for the first tokens, in float64."""
        x, index, weights = self._given(SAMPLE_BACKWARD)
        x, weights = x.double().requires_grad_(), weights.double().requires_grad_()
        y = reference(sub.layer, x, index, weights)
        dx, dweights = torch.autograd.grad(y, (x, weights), self.dy[: len(x)].double())
        return dx, dweights

    # --------------------------------------------------------------------- rows

    def _rows(
        self,
        direction: str,
        N: int,
        forms: list[tuple[Subject, list[Form]]],
        times: dict[str, list[float]],
    ) -> list[Row]:
        s, index = self.s, self.inputs[1][:N]
        best = {}
        for sub, others in forms:
            median = {form.name: statistics.median(times[_name(sub, form)]) for form in others}
            best[sub.size] = min(median, key=lambda name: median[name])
            if s.many <= N:
                self.chosen.setdefault((direction, sub.size), best[sub.size])
        of_dense = times[f"1 {best[1.0]}"]
        rows = []
        for sub, others in forms:
            mine, theirs = times[_name(sub, sub.ours)], best[sub.size]
            median = statistics.median(mine)
            nbytes, flops = sub.work(index)
            flops *= 2 if direction == "backward" else 1
            row: Row = {
                "shape": self.shape.name,
                "dtype": self.dtype_name,
                "direction": direction,
                "N": N,
                "size": sub.size,
                "rank": sub.rank,
                "times": {
                    form.name: summary(times[_name(sub, form)]) for form in (sub.ours, *others)
                },
                "best": theirs,
                "against_best": ratio(times[f"{sub.size:g} {theirs}"], mine),
                "best_dense": best[1.0],
                "against_dense": ratio(of_dense, mine),
                "bytes": nbytes,
                "flops": flops,
                "gbs": nbytes / median / 1e9,
                "gflops": flops / median / 1e9,
            }
            if s.few >= N:
                row["read_gbs"] = self.stream.usual_gbs()
                row["read_share"] = row["gbs"] / row["read_gbs"]
            if s.many <= N:
                row["product_gflops"] = self.product.flops / statistics.median(times[PRODUCT]) / 1e9
                row["peak_share"] = row["gflops"] / row["product_gflops"]
            row["goals"] = _goals(row) if sub.rank is not None else {}
            rows.append(row)
        return rows


def _name(sub: Subject, form: Form) -> str:
    return f"{sub.size:g} {form.name}"


def _subjects(shape: Shape, dtype: torch.dtype, pool: Pool) -> list[Subject]:
    return [
        *(latent(shape, size, dtype, pool) for size in SIZES),
        dense(shape, dtype, pool),
    ]


def _inputs(shape: Shape, N: int, dtype: torch.dtype, pool: Pool) -> Inputs:
    """Tokens, and experts with weights by a softmax over random scores; fewer are a prefix."""
    x = pool.draw((N, shape.D), 1.0, dtype)
    scores = torch.randn(N, shape.E, generator=pool.generator)
    weights, index = torch.topk(torch.softmax(scores, 1), shape.K, dim=1)
    return x, index, weights.to(dtype)


def _goals(row: Row) -> dict[str, tuple[float, float]]:
    """Name of each goal of a latent layer: what was reached, and what should be."""
    faster, float32 = row["against_best"]["ratio"], row["dtype"] == "float32"
    if "read_share" in row:
        return {
            "few tokens: faster than torch": (faster, FASTER),
            "few tokens: of read bandwidth": (row["read_share"], OF_READ),
        }
    if "peak_share" not in row:
        return {}
    if row["direction"] == "backward":
        return {"many, float32, backward: of peak": (row["peak_share"], OF_PEAK_BACKWARD)}
    if float32:
        return {"many, float32, forward: of peak": (row["peak_share"], OF_PEAK)}
    return {"many, bfloat16: faster than torch": (faster, FASTER_BF16)}


def _compare_types(s: Settings, rows: list[Row]) -> None:
    """How many times bfloat16 is faster than float32, by molae, where both were measured."""
    wide = {
        (row["shape"], row["N"], row["size"]): row["times"]["molae"]["times_s"]
        for row in rows
        if row["dtype"] == "float32" and row["direction"] == "forward"
    }
    for row in rows:
        times = wide.get((row["shape"], row["N"], row["size"]))
        if row["dtype"] == "float32" or times is None:
            continue
        row["against_float32"] = ratio(times, row["times"]["molae"]["times_s"])
        if row["rank"] is not None and s.many <= row["N"]:
            goal = (row["against_float32"]["ratio"], FASTER_THAN_F32)
            row["goals"]["many, bfloat16: faster than float32"] = goal
