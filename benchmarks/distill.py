"""The case 'distill': steps a second of a layer's distillation, by molae and by torch."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks import distill_torch
from benchmarks.check import WrongAnswer
from benchmarks.peak import Product
from benchmarks.settings import Distilled, Settings
from benchmarks.timing import alternate, ratio, summary
from molae import ops
from molae.config import TYPES
from molae.convert.allocation import gauge_ranks
from molae.fit import LayerInput, distill_layer
from molae.fit.descent import BATCH, HELD_OUT, parted
from molae.fit.reading import Layer
from molae.fit.sums import squares
from molae.ops import Projection, latent_experts_forward

__all__ = ["APART", "FASTER", "Run", "Task", "check", "distill", "flops"]

Array = npt.NDArray[Any]

#: The goal: times torch's steps a second.
FASTER = 2.0

#: Largest distance of the factors of the two after a run, over the way that they have gone. AdamW
#: moves by the gradient's sign at first, and where a gradient is nothing but rounding the signs
#: differ. float64 is compared on a small layer.
APART = {"float32": 2e-3, "float64": 1e-6}

#: Where every form is compared before anything is timed; in float64 but for grouped_mm.
SMALL = Distilled("small", E=8, K=2, D=40, F=24, steps=3, epochs=2, size=0.6)

#: Rate and order of the tokens.
OPTIONS: dict[str, Any] = {"rate": 0.01, "seed": 5}

#: How far the teacher's factors are from the student's, in standard deviations.
DISTURBED = 0.3


@dataclass(frozen=True, eq=False)
class Watched(LayerInput):
    """Notes when tokens are asked for, and how many: once a step."""

    asked: list[tuple[float, int]] = field(default_factory=list)

    def rows(self, tokens: Array) -> tuple[tuple[Array, Array, Array], Array]:
        self.asked.append((perf_counter(), len(tokens)))
        return super().rows(tokens)

    @property
    def steps(self) -> list[float]:
        """Seconds from each batch to what comes after it."""
        pairs = zip(self.asked, self.asked[1:], strict=False)
        return [after - start for (start, n), (after, _) in pairs if n == BATCH]


@dataclass(frozen=True, eq=False)
class Run:
    """Factors after a run, in the order of `Task.layer`, and the seconds of each step."""

    factors: list[Array]
    steps: list[float]


@dataclass(frozen=True, eq=False)
class Task:
    """A student, a text that it reads, and a teacher's answers.

    Attributes
    ----------
    sizes : Distilled
    x, answers : (N, D) ndarray
    index, weights : (N, K) ndarray
    layer : list of ndarray
        Of each type A (E, F, R), for down (E, R, F), and M (G, R, D − R).
    perm : list of (G, D) ndarray of int32
    """

    sizes: Distilled
    x: Array
    answers: Array
    index: Array
    weights: Array
    layer: list[Array]
    perm: list[Array]

    @classmethod
    def drawn(cls, s: Distilled, dtype: npt.DTypeLike = np.float32) -> Task:
        """Seeded; the arrays of a type and role have one root mean square."""
        rng = np.random.default_rng(0)
        seen = s.steps * BATCH
        N = seen + (seen - 1) // (HELD_OUT - 1)
        layer, perm = [], []
        for kind, k in zip(TYPES, (s.k, s.k, 1), strict=True):
            groups = [list(range(e, e + k)) for e in range(0, s.E, k)]
            R = gauge_ranks(groups, s.size, F=s.F, D=s.D)[0]
            # The norm of a dense matrix with entries of variance 1/D, for down 1/F.
            std = (s.D / s.F if kind == "down_proj" else 1) ** 0.5 * (R * (2 - R / s.D)) ** -0.5
            own = (s.E, R, s.F) if kind == "down_proj" else (s.E, s.F, R)
            layer += [
                _even(rng, own, k, std, dtype),
                _even(rng, (len(groups), R, s.D - R), 1, s.D**-0.5, dtype),
            ]
            perm.append(np.stack([rng.permutation(s.D) for _ in groups]).astype(np.int32))
        x = rng.standard_normal((N, s.D), dtype=np.float32).astype(dtype)
        scores = rng.standard_normal((N, s.E), dtype=np.float32)
        index = np.argsort(-scores, axis=1, kind="stable")[:, : s.K].astype(np.int64)
        shares = np.exp(np.take_along_axis(scores, index, 1))
        weights = (shares / shares.sum(1, keepdims=True)).astype(dtype)
        teacher = [
            a + DISTURBED * a.std() * rng.standard_normal(a.shape, dtype=np.float32).astype(dtype)
            for a in layer
        ]
        answers = latent_experts_forward(x, index, weights, *_projections(teacher, perm))
        return cls(s, x, answers, index, weights, layer, perm)

    def by_molae(self) -> Run:
        given = Watched(self.x, self.index, self.weights, answers=self.answers)
        student = _projections(self.layer, self.perm)
        found = distill_layer(given, student, epochs=self.sizes.epochs, **OPTIONS)
        factors = []
        for p in found.layer:
            private, shared = (
                [a for a in arrays if a is not None] for arrays in (p.private, p.shared)
            )
            factors += [np.concatenate(private), np.stack(shared)]
        return Run(factors, given.steps)

    def by_torch(self, kind: Callable[[Sequence[distill_torch.Stack]], Any]) -> Run:
        pairs = zip(self.layer[::2], self.layer[1::2], self.perm, strict=True)
        form = kind(
            [
                distill_torch.Stack(
                    torch.from_numpy(A), torch.from_numpy(M), torch.from_numpy(perm).long()
                )
                for A, M, perm in pairs
            ]
        )
        names = ("x", "answers", "index", "weights")
        text = {name: torch.from_numpy(getattr(self, name)) for name in names}
        seen, target = parted(len(self.x))[0], squares(self.answers)
        found = distill_torch.distill(form, text, seen, target, epochs=self.sizes.epochs, **OPTIONS)
        return Run([t.numpy() for t in found.factors], found.steps)


def _even(
    rng: np.random.Generator, shape: tuple[int, ...], k: int, std: float, dtype: npt.DTypeLike
) -> Array:
    """Normal numbers of which each k matrices together have the root mean square `std`."""
    found = rng.standard_normal(shape, dtype=np.float32).astype(dtype)
    for at in range(0, len(found), k):
        own = found[at : at + k]
        own *= std / np.sqrt(np.square(own, dtype=np.float64).mean())
    return found


def _projections(layer: list[Array], perm: list[Array]) -> Layer:
    found = []
    for A, M, own in zip(layer[::2], layer[1::2], perm, strict=True):
        G, k = len(M), len(A) // len(M)
        found.append(
            Projection(
                groups=tuple(tuple(range(g * k, (g + 1) * k)) for g in range(G)),
                ranks=(M.shape[1],) * G,
                private=tuple(A[g * k : (g + 1) * k] for g in range(G)),
                shared=tuple(M),
                perm=tuple(own),
            )
        )
    gate, up, down = found
    return gate, up, down


# ------------------------------------------------------------------------- equality


def check(name: str, task: Task, ours: Run, theirs: Run) -> float:
    """How far the two have come apart, over the way that molae's factors have gone.

    Raises
    ------
    WrongAnswer
        Of one of the six stacks of factors more than `APART`, or other numbers of steps.
    """
    if len(ours.steps) != len(theirs.steps):
        raise WrongAnswer(f"{name}: {len(theirs.steps)} steps, molae's are {len(ours.steps)}")
    worst, most = 0.0, APART[task.x.dtype.name]
    names = [f"{kind}, {role}" for kind in TYPES for role in ("private", "shared")]
    for what, start, one, other in zip(
        names, task.layer, ours.factors, theirs.factors, strict=True
    ):
        way = np.linalg.norm(one - start)
        apart = float(np.linalg.norm(other - one) / way) if way > 0 else float("inf")
        if not apart <= most:
            raise WrongAnswer(
                f"{name}: {what} is {apart:.3g} of its way from molae's, expected {most:.3g}"
            )
        worst = max(worst, apart)
    return worst


def _check_small() -> None:
    for form in distill_torch.FORMS:
        dtype = np.float32 if form is distill_torch.Grouped else np.float64
        task = Task.drawn(SMALL, dtype)
        check(f"{form.name}, {np.dtype(dtype).name}", task, task.by_molae(), task.by_torch(form))


# ---------------------------------------------------------------------- measurement


def flops(task: Task) -> float:
    """Operations of a step's products, forward and backward, mean of all tokens.

    A token is projected once a group that it meets. Gate and up need no gradient of their input.
    """
    s, index, total = task.sizes, task.index, 0.0
    for at, M in enumerate(task.layer[1::2]):
        G, R, rest = M.shape
        groups = index // (s.E // G) + np.arange(len(index))[:, None] * G
        met = len(np.unique(groups)) / len(index)
        passes = 3 if TYPES[at] == "down_proj" else 2
        total += 2 * (3 * s.K * s.F * R + passes * met * R * rest)
    return BATCH * total


def distill(s: Settings, _: float) -> dict[str, Any]:
    """Each layer, by molae and by all forms in torch; the fastest of these counts."""
    _check_small()
    product = Product(s.threads, min(s.D, 2048))
    rows: list[dict[str, Any]] = []
    for sizes in s.distilled:
        rows.append(_row(s, Task.drawn(sizes), product))
        ops.release_scratch()
        if s.kept is not None:
            s.kept({"rows": rows})
    return {"rows": rows, "goal": FASTER, "batch": BATCH}


def _row(s: Settings, task: Task, product: Product) -> dict[str, Any]:
    forms = {form.name: form for form in distill_torch.FORMS}
    #: Medians of the steps of each run.
    usual: dict[str, list[float]] = {name: [] for name in ("molae", *forms)}

    def ours() -> Run:
        found = task.by_molae()
        usual["molae"].append(statistics.median(found.steps))
        return found

    def other(name: str) -> Run:
        found = task.by_torch(forms[name])
        usual[name].append(statistics.median(found.steps))
        return found

    first = ours()
    apart = {name: check(name, task, first, other(name)) for name in forms}
    del first
    for times in usual.values():
        times.clear()
    works: dict[str, Callable[[], object]] = {"molae": ours}
    works |= {name: (lambda name=name: other(name)) for name in forms}  # type: ignore[misc]
    works["product"] = product
    whole = alternate(works, s.repeats, s.pause)
    best = min(forms, key=lambda name: statistics.median(usual[name]))
    work, pace = flops(task), product.flops / statistics.median(whole["product"])
    against = ratio(usual[best], usual["molae"])
    return {
        **{key: getattr(task.sizes, key) for key in ("E", "K", "D", "F", "k", "size")},
        "shape": task.sizes.name,
        "dtype": task.x.dtype.name,
        "ranks": {kind: M.shape[1] for kind, M in zip(TYPES, task.layer[1::2], strict=True)},
        "steps": task.sizes.steps * task.sizes.epochs,
        "apart": apart,
        "times": {name: summary(times) for name, times in usual.items()},
        "best": best,
        "against": against,
        "flops": work,
        "product_gflops": pace / 1e9,
        "peak_share": {
            name: work / statistics.median(times) / pace for name, times in usual.items()
        },
        "reached": against["ratio"] >= FASTER,
    }
