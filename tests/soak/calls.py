"""Every function of molae.ops and molae.fit that computes, with small inputs to call it on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from moe_layers import ROLES, layer

from molae import fit, ops
from molae.fit import LayerInput
from molae.ops import NarrowExperts, Projection

__all__ = ["Case", "arrays", "cases", "swapped"]

TYPES = {"f32": np.float32, "f64": np.float64, "bf16": ml_dtypes.bfloat16}
N, K, E, D, F = 24, 2, 4, 10, 6
KINDS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Case:
    """A call and what it is given.

    Attributes
    ----------
    name : str
    given : tuple
        Arrays, or lists, mappings and dataclasses of arrays.
    call : callable
    refuses : bool
        NaN and infinity in its inputs are an error; else they go on into the result.
    """

    name: str
    given: tuple[Any, ...]
    call: Callable[..., Any]
    refuses: bool


def arrays(value: Any) -> Iterator[np.ndarray]:
    """All arrays in a value."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, Mapping):
        for own in value.values():
            yield from arrays(own)
    elif isinstance(value, (list, tuple)):
        for own in value:
            yield from arrays(own)
    elif is_dataclass(value):
        for entry in fields(value):
            yield from arrays(getattr(value, entry.name))


def swapped(value: Any, old: np.ndarray, new: np.ndarray) -> Any:
    """The same with another array in the place of one."""
    if value is old:
        return new
    if isinstance(value, Mapping):
        return {key: swapped(own, old, new) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([swapped(own, old, new) for own in value])
    if is_dataclass(value) and any(own is old for own in arrays(value)):
        changed = {
            entry.name: swapped(getattr(value, entry.name), old, new)
            for entry in fields(value)
            if any(own is old for own in arrays(getattr(value, entry.name)))
        }
        return replace(value, **changed)
    return value


def cases() -> list[Case]:
    """Made anew; inputs are the same each time."""
    return [
        case for name, dtype in TYPES.items() for case in (*_ops(name, dtype), *_fit(name, dtype))
    ]


def _ops(name: str, dtype: Any) -> Iterator[Case]:
    rng = np.random.default_rng(1)
    dense = layer(1, N, K, E, D, F, dtype=dtype)
    weights = [np.ascontiguousarray(np.concatenate(getattr(dense, role).private)) for role in ROLES]
    factored = layer(2, N, K, E, D, F, dtype=dtype, ranks=(4, None), groups=(2, 2, 2))
    projections = [getattr(factored, role) for role in ROLES]
    work = np.float64 if dtype == np.float64 else np.float32
    x, index, mass = dense.x, dense.index, dense.weights
    dy = rng.standard_normal((N, D)).astype(dtype)
    vectors = rng.standard_normal((E, 2 * D + F)).astype(dtype)
    narrow = NarrowExperts.of(
        {
            "gate": rng.standard_normal((E, 2, D)).astype(dtype),
            "up": rng.standard_normal((E, 2, D)).astype(dtype),
            "down": rng.standard_normal((E, D, 2)).astype(dtype),
            "bias": rng.standard_normal((E, D)).astype(dtype),
        }
    )
    wide = rng.standard_normal((2, N, F)).astype(work)

    def both(forward: Any, backward: Any, *last: Any) -> Callable[..., Any]:
        def call(dy: Any, *args: Any) -> Any:
            y, saved = forward(*args, *last, save=True)
            return y, backward(dy, saved, *args, *last)

        return call

    yield Case(
        f"experts {name}", (dy, x, index, mass, *weights),
        both(ops.experts_forward, ops.experts_backward), False,
    )  # fmt: skip
    yield Case(
        f"latent_experts {name}", (dy, x, index, mass, *projections),
        both(ops.latent_experts_forward, ops.latent_experts_backward), False,
    )  # fmt: skip
    yield Case(
        f"compressed_experts {name}", (dy, x, index, mass, *projections, vectors),
        both(ops.compressed_experts_forward, ops.compressed_experts_backward, 1), False,
    )  # fmt: skip
    yield Case(
        f"narrow_experts_forward {name}", (x, index, mass, *projections, narrow),
        lambda *args: ops.narrow_experts_forward(*args, 1), False,
    )  # fmt: skip
    for kind in ("silu", "gelu_tanh", "swiglu_clamped") if name != "bf16" else ():
        yield Case(
            f"activate {kind} {name}", (wide[0], wide[1]),
            lambda g, u, kind=kind: ops.activate(g, u, activation=kind, slopes=True), False,
        )  # fmt: skip
    if name == "f32":
        yield Case("route", (index,), lambda i: ops.route(i, E, [[0, 1], [2, 3]]), True)
        yield Case("split_slots", (index, mass), lambda i, w: ops.split_slots(i, w, E, 1), False)


def _fit(name: str, dtype: Any) -> Iterator[Case]:
    rng = np.random.default_rng(3)
    W = [rng.standard_normal((F, D)).astype(dtype) for _ in range(E)]
    wide = [w.astype(np.float32) for w in W]
    groups = [[0, 1], [2, 3]]
    yield Case(
        f"factor_shared {name}", (W,), lambda W: fit.factor_shared(W, 3, groups=groups), True
    )
    yield Case(f"spectrum {name}", (W,), lambda W: fit.spectrum(W, groups=groups), True)
    yield Case(f"reduce_rank {name}", (W,), lambda W: fit.reduce_rank(W, 3), True)
    x = rng.standard_normal((200, D)).astype(dtype)
    index = rng.integers(0, E, (200, K))
    mass = rng.random((200, K)).astype(np.float64 if name == "f64" else np.float32)
    moments = fit.second_moments(x.astype(mass.dtype), index, mass, E)
    if name != "bf16":
        yield Case(
            f"second_moments {name}", (x, index, mass),
            lambda x, i, w: fit.second_moments(x, i, w, E), True,
        )  # fmt: skip
    own = [np.array(m) for m in moments.moment]
    yield Case(
        f"factor_weighted {name}", (W, own),
        lambda W, m: fit.factor_weighted(W, m, 3, groups=groups), True,
    )  # fmt: skip
    yield Case(
        f"weighted_spectrum {name}", (W, own),
        lambda W, m: fit.weighted_spectrum(W, m, groups=groups), True,
    )  # fmt: skip
    if name == "bf16":
        return
    basis = np.ascontiguousarray(wide[0][:3].astype(dtype))
    yield Case(f"gauge {name}", (basis,), fit.gauge, True)
    M, perm = fit.gauge(basis)
    yield Case(f"ungauge {name}", (M, perm), fit.ungauge, False)
    yield from _layers(name, x, index, mass)


def _layers(name: str, x: Any, index: Any, mass: Any) -> Iterator[Case]:
    rng = np.random.default_rng(4)
    given = LayerInput(x, index, mass)
    shapes = ((E, F, D), (E, F, D), (E, D, F))
    W = {k: rng.standard_normal(s).astype(x.dtype) for k, s in zip(KINDS, shapes, strict=True)}
    dense = tuple(Projection.dense(W[kind]) for kind in KINDS)
    groups = [[0, 1], [2, 3]]
    student = tuple(
        Projection.from_factors(fit.factor_shared(list(W[k]), 4, groups=groups, side=side))
        for k, side in zip(KINDS, ("input", "input", "output"), strict=True)
    )
    yield Case(
        f"layer_moments {name}", (given, *dense), lambda g, *d: fit.layer_moments(g, *d), True
    )
    yield Case(
        f"layer_energies {name}", (given, *dense[:2]), lambda g, *d: fit.layer_energies(g, *d),
        True,
    )  # fmt: skip
    # A measure: of what is NaN it is NaN.
    yield Case(
        f"answer_error {name}", (given, student, dense),
        lambda g, s, t: np.array(fit.answer_error(g, s, t)), False,
    )  # fmt: skip
    yield Case(
        f"refit down {name}", (given, student, dense),
        lambda g, s, t: fit.refit(g, s, t, "down"), True,
    )  # fmt: skip
    yield Case(
        f"refit up {name}", (given, student, dense),
        lambda g, s, t: fit.refit(
            g, s, t, "up", metric=fit.row_metric(fit.layer_moments(g, *t), s[1])
        ), True,
    )  # fmt: skip
    yield Case(
        f"fit.compressed_experts {name}", (given, student, dense),
        lambda g, s, t: fit.compressed_experts(g, s, 1, teacher=t, steps=2, linear_steps=2), True,
    )  # fmt: skip
    yield Case(
        f"fit.narrow_experts {name}", (given, student, dense),
        lambda g, s, t: fit.narrow_experts(g, s, 1, 2, teacher=t, epochs=1), True,
    )  # fmt: skip
    parts = {kind: (groups, [4, 3]) for kind in KINDS}
    yield Case(
        f"fit_layer {name}", (given, W), lambda g, W: fit.fit_layer(g, W, parts, heal=1), True
    )
    yield Case(
        f"distill_layer {name}", (given, student, dense),
        lambda g, s, t: fit.distill_layer(g, s, teacher=t, epochs=1), True,
    )  # fmt: skip
    weights = {"a": rng.standard_normal((3, 4)).astype(x.dtype)}
    slopes = {"a": rng.standard_normal((3, 4)).astype(x.dtype)}

    def step(weights: Any, slopes: Any) -> Any:
        own = {key: value.copy() for key, value in weights.items()}
        fit.AdamW(own, max_norm=1.0).step(slopes, {"a": 0.1})
        return own

    # Gradients are checked; a weight that is NaN stays it.
    yield Case(f"AdamW {name}", (weights, slopes), step, False)
