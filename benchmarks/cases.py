"""What is measured. Each case is a function from settings to JSON-ready rows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from benchmarks.check import Truth, check_approximation, check_factors
from benchmarks.contestants import SVDS, gram_numpy
from benchmarks.conversion import conversion
from benchmarks.memory import Peak
from benchmarks.settings import SIZE, Settings, largest_rank
from benchmarks.timing import alternate, ratio, seconds, summary
from benchmarks.weights import experts
from molae.fit import SharedFactors, factor_shared, reduce_rank, spectrum

__all__ = ["CASES", "FILES", "GOALS", "NEED_HF", "Settings", "largest_rank"]

Array = npt.NDArray[Any]
Row = dict[str, Any]
Work = Callable[[], Any]

#: Times that molae must be faster than the better SVD, by group size.
GOALS = {8: 4.0, 4: 3.0}

FLOAT32_EPS = float(np.finfo(np.float32).eps)
UNIT = {"float32": FLOAT32_EPS / 2, "bfloat16": float(ml_dtypes.finfo(ml_dtypes.bfloat16).eps) / 2}


# ------------------------------------------------------------- joint factorization


def factor(s: Settings, peak: float) -> dict[str, Any]:
    """Shared factors in float32 against SVDs of the same stacks at the same error."""
    rows = []
    for k in GOALS:
        for kind in ("gaussian", "decaying"):
            W = experts(kind, s.timed_groups * k, s.F, s.D)
            rows += _factor_rows(s, peak, W, k, kind, forms=("gauge", "plain"))
    return {
        "rows": rows,
        "whole": [_whole(s, k, peak) for k in GOALS],
        "phases": _phases(s, peak),
    }


def bf16(s: Settings, peak: float) -> dict[str, Any]:
    """The same for weights stored in bfloat16, which the others must convert first."""
    k = max(GOALS)
    W = experts("decaying", s.timed_groups * k, s.F, s.D).astype(ml_dtypes.bfloat16)
    rows = _factor_rows(s, peak, W, k, "decaying", forms=("gauge",))
    Wt = np.ascontiguousarray(W.transpose(0, 2, 1))
    return {"rows": rows + _factor_rows(s, peak, Wt, k, "decaying", ("gauge",), side="output")}


def _factor_rows(
    s: Settings,
    peak: float,
    W: Array,
    k: int,
    kind: str,
    forms: tuple[Any, ...],
    side: Any = "input",
) -> list[Row]:
    rank = largest_rank(k, s.F, s.D)
    groups = [list(range(g * k, (g + 1) * k)) for g in range(s.timed_groups)]
    stacks = [_stack(W, group, side) for group in groups]
    # The others get their stacks ready made, but for the type they compute in.
    given = stacks if W.dtype == np.float32 else [X.astype(W.dtype) for X in stacks]
    turned = {
        name: _faster_orientation(svd, stacks[0], rank, s.pause) for name, svd in SVDS.items()
    }

    def ours(form: Any) -> Work:
        return lambda: factor_shared(W, rank, groups=groups, side=side, form=form, errors=False)

    def theirs(fit: Callable[[Array], Any]) -> Work:
        return lambda: [fit(X.astype(np.float32, copy=False)) for X in given]

    works = {f"molae {form}": ours(form) for form in forms}
    for name, svd in SVDS.items():
        works[f"{name} SVD"] = theirs(partial(svd, rank=rank, transposed=turned[name]))
    works["NumPy Gram + eigh"] = theirs(partial(gram_numpy, rank=rank))

    errors, memory = _checked(works, stacks, rank, UNIT[W.dtype.name])
    times = alternate(works, s.repeats, s.pause)
    svds = {name: times[name] for name in works if name.endswith("SVD")}
    rows = []
    for form in forms:
        flops = len(groups) * _flops(k, s.F, s.D, rank, form)
        mine = times[f"molae {form}"]
        against = {
            name: ratio(theirs, mine) for name, theirs in times.items() if "molae" not in name
        }
        best = min(svds, key=lambda name: statistics.median(svds[name]))
        rows.append(
            {
                "weights": kind,
                "dtype": W.dtype.name,
                "side": side,
                "form": form,
                "k": k,
                "groups": len(groups),
                "F": s.F,
                "D": s.D,
                "rank": rank,
                "error": errors[f"molae {form}"],
                "svd_error": errors[best],
                "times": {"molae": summary(mine)}
                | {name: summary(t) for name, t in times.items() if "molae" not in name},
                "memory_bytes": {"molae": memory[f"molae {form}"]}
                | {name: m for name, m in memory.items() if "molae" not in name},
                "transposed": {f"{name} SVD": bool(t) for name, t in turned.items()},
                "against": against,
                "better_svd": best,
                "goal": GOALS[k],
                "gflops": flops / statistics.median(mine) / 1e9,
                "peak_share": flops / statistics.median(mine) / 1e9 / peak,
            }
        )
    return rows


def _stack(W: Array, group: list[int], side: str) -> Array:
    """The experts of a group one under the other, as a float32 matrix (k F, D)."""
    parts = [W[i] if side == "input" else W[i].T for i in group]
    return np.ascontiguousarray(np.concatenate(parts).astype(np.float32))


def _faster_orientation(svd: Callable[..., Any], X: Array, rank: int, pause: float) -> bool:
    """Whether the library is faster with the stack transposed."""
    plain, turned = (seconds(partial(svd, X, rank, t), pause) for t in (False, True))
    return turned < plain


def _checked(
    works: dict[str, Work], stacks: list[Array], rank: int, unit: float
) -> tuple[dict[str, float], dict[str, int]]:
    """Relative error of each contestant's first group, once all groups are found right.

    The first run of each is also where its memory is measured.
    """
    truths = [Truth.of(X) for X in stacks]
    errors, memory = {}, {}
    for name, work in works.items():
        with Peak() as peak:
            result = work()
        memory[name] = peak.rise
        rounded = unit if isinstance(result, SharedFactors) else FLOAT32_EPS / 2
        found = [
            check_factors(f"{name}, group {g}", X, A, B, truths[g], eps=FLOAT32_EPS, unit=rounded)
            for g, (X, (A, B)) in enumerate(zip(stacks, _factors(result), strict=True))
        ]
        errors[name] = float(np.sqrt(found[0]))
    return errors, memory


def _factors(result: Any) -> Iterator[tuple[Array, Array]]:
    """Stacked A (k F, R) and B (R, D) of each group."""
    if not isinstance(result, SharedFactors):
        yield from result
        return
    for g, private in enumerate(result.private):
        A = private if result.side == "input" else private.transpose(0, 2, 1)
        yield A.reshape(-1, result.ranks[g]), result.basis(g)


def _flops(k: int, F: int, D: int, rank: int, form: str) -> float:
    """Operations of the factorization of one group, as ``csrc/molae.h`` counts them."""
    short = form == "gauge" and 2 * rank > D
    vectors = D - rank if short else rank
    private = 4 * k * F * rank * (D - rank) if short else 2 * k * F * D * rank
    return float(k * F * D**2 + 5 / 3 * D**3 + 3 * D**2 * vectors + private)


def _whole(s: Settings, k: int, peak: float) -> Row:
    """All groups of one matrix type, by molae alone."""
    W = experts("decaying", s.E, s.F, s.D)
    rank = largest_rank(k, s.F, s.D)
    groups = [list(range(e, e + k)) for e in range(0, s.E, k)]

    def work() -> SharedFactors:
        return factor_shared(W, rank, groups=groups, errors=False)

    with Peak() as memory:
        work()
    times = [seconds(work, s.pause) for _ in range(min(s.repeats, 3))]
    flops = len(groups) * _flops(k, s.F, s.D, rank, "gauge")
    return {
        "k": k,
        "groups": len(groups),
        "rank": rank,
        "stack_bytes": W.nbytes,
        "memory_bytes": memory.rise,
        **summary(times),
        "gflops": flops / statistics.median(times) / 1e9,
        "peak_share": flops / statistics.median(times) / 1e9 / peak,
    }


def _phases(s: Settings, peak: float) -> list[Row]:
    """Where the time of a group goes, by differences between calls that do more or less.

    Work on the experts grows with k at a fixed D and rank, work on the D×D matrix does not:
    a stack of half the experts tells the two apart.
    """
    k = max(GOALS)
    half = k // 2
    G, rank = s.timed_groups, largest_rank(k, s.F, s.D)
    if half * s.F < s.D:
        return []
    W = experts("decaying", G * k, s.F, s.D)

    def groups(size: int) -> list[list[int]]:
        return [list(range(g * size, (g + 1) * size)) for g in range(G)]

    def fit(size: int, form: Any = "plain", errors: bool = False) -> Work:
        return lambda: factor_shared(
            W[: G * size], rank, groups=groups(size), form=form, errors=errors
        )

    works: dict[str, Work] = {
        "values": lambda: spectrum(W, groups=groups(k)),
        "values_half": lambda: spectrum(W[: G * half], groups=groups(half)),
        "plain": fit(k),
        "plain_half": fit(half),
        "gauge": fit(k, "gauge"),
        "errors": fit(k, "gauge", errors=True),
    }
    times = alternate(works, s.repeats, s.pause)
    t = {name: statistics.median(found) / G for name, found in times.items()}
    share = k / (k - half)
    gram = share * (t["values"] - t["values_half"])
    private = share * (t["plain"] - t["plain_half"]) - gram
    products = 2.0 * k * s.F * s.D * rank
    rows: list[tuple[str, float, float | None]] = [
        ("Gram matrix", gram, float(k * s.F * s.D**2)),
        ("eigenvalues", t["values"] - gram, 4 / 3 * s.D**3),
        ("eigenvectors", t["plain"] - t["values"] - private, None),
        ("private factors", private, products),
        ("gauge form", t["gauge"] - t["plain"], None),
        ("errors, where wanted", t["errors"] - t["gauge"], products * (s.D - rank) / s.D),
    ]
    return [
        {
            "phase": name,
            "seconds_a_group": value,
            "gflops": flops / value / 1e9 if flops and value > 0 else None,
            "peak_share": flops / value / 1e9 / peak if flops and value > 0 else None,
        }
        for name, value, flops in rows
    ]


# -------------------------------------------------------------------- rank reduction


def reduce(s: Settings, peak: float) -> dict[str, Any]:
    """Best approximation of each expert on its own, against an SVD of each."""
    n = 2 * s.timed_groups
    W, rank = experts("decaying", n, s.F, s.D), s.rank_alone
    turned = {name: _faster_orientation(svd, W[0], rank, s.pause) for name, svd in SVDS.items()}

    def each(svd: Callable[[Array], Any]) -> Work:
        return lambda: [A @ B for A, B in map(svd, W)]

    works: dict[str, Work] = {"molae": lambda: reduce_rank(W, rank)}
    for name, svd in SVDS.items():
        works[f"{name} SVD"] = each(partial(svd, rank=rank, transposed=turned[name]))
    truths = [Truth.of(X) for X in W]
    errors, memory = {}, {}
    for name, work in works.items():
        with Peak() as watched:
            result = work()
        memory[name] = watched.rise
        found = [
            check_approximation(
                f"{name}, expert {i}", W[i], result[i], truths[i], rank, eps=FLOAT32_EPS
            )
            for i in range(n)
        ]
        errors[name] = float(np.sqrt(found[0]))
    times = alternate(works, s.repeats, s.pause)
    svds = [name for name in works if name != "molae"]
    return {
        "rows": [
            {
                "weights": "decaying",
                "dtype": "float32",
                "experts": n,
                "F": s.F,
                "D": s.D,
                "rank": rank,
                "error": errors["molae"],
                "times": {name: summary(t) for name, t in times.items()},
                "memory_bytes": memory,
                "against": {name: ratio(times[name], times["molae"]) for name in svds},
                "better_svd": min(svds, key=lambda name: statistics.median(times[name])),
            }
        ]
    }


# ------------------------------------------------------------------------ conversion


def convert(s: Settings, peak: float) -> dict[str, Any]:
    """A whole conversion of a generated checkpoint, in a process of its own."""
    row = conversion(size=SIZE, layers=s.layers, E=s.E, F=s.F, D=s.D, V=s.V, threads=s.threads)
    return {"rows": [row]}


# ----------------------------------------------------------- what needs molae.hf


def layers(s: Settings, peak: float) -> dict[str, Any]:
    """Layers of experts, forward and backward, against torch and Transformers."""
    from benchmarks.layers import layers

    return layers(s, peak)


def models(s: Settings, peak: float) -> dict[str, Any]:
    """Tokens a second of whole models, original and converted."""
    from benchmarks.models import models

    return models(s)


def calibration(s: Settings, peak: float) -> dict[str, Any]:
    """One layer fitted to a text, against the same in torch and what its products take."""
    from benchmarks.calibration import calibration

    return calibration(s, peak)


def active(s: Settings, peak: float) -> dict[str, Any]:
    """Layers in which half of a token's experts are compressed, beside those with all."""
    from benchmarks.active import active

    return active(s, peak)


def distill(s: Settings, peak: float) -> dict[str, Any]:
    """Steps a second of a layer's distillation, against the same loop in torch."""
    from benchmarks.distill import distill

    return distill(s, peak)


CASES: dict[str, Callable[[Settings, float], dict[str, Any]]] = {
    "factor": factor,
    "bf16": bf16,
    "reduce": reduce,
    "convert": convert,
    "layers": layers,
    "models": models,
    "active": active,
    "distill": distill,
    "calibration": calibration,
}

#: Cases that need torch and transformers.
NEED_HF = ("layers", "models", "calibration", "active", "distill")

#: Files in benchmarks/results, and the cases of each.
FILES = {
    "benchmarks.json": ("factor", "bf16", "reduce", "convert"),
    "layers.json": ("layers",),
    "models.json": ("models",),
    "calibration.json": ("calibration",),
    "active.json": ("active",),
    "distill.json": ("distill",),
}
