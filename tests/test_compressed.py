"""Layers with compressed experts: against the paper's formula, by hand, and by differences."""

from __future__ import annotations

from dataclasses import fields

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_layers import ROLES, layer
from ref import compressed as ref
from test_ops_forward import KINDS, fitting

import molae
from molae import ops
from molae.errors import ArgumentError, ShapeError
from molae.ops import Gradients, ProjectionGradients

pytestmark = pytest.mark.usefixtures("unset_is_nan")

F32, F64, BF16 = np.float32, np.float64, ml_dtypes.bfloat16


def embeddings_of(seed, E, D, F, dtype=F64, wide=True):
    """Around 1; what does not count of the authors' layout is NaN."""
    rng = np.random.default_rng(seed)
    flat = (1 + 0.3 * rng.standard_normal((E, 2 * D + F))).astype(dtype)
    if not wide:
        return flat
    found = ops.to_authors_layout(flat, D)
    found[:, 1, F:] = np.nan
    return found


def parts(embeddings, D, F):
    a = embeddings.astype(F64)
    if a.ndim == 3:
        return a[:, 0], a[:, 1, :F], a[:, 2]
    return a[:, :D], a[:, D : D + F], a[:, D + F :]


def forward(made, embeddings, n, **options):
    return ops.compressed_experts_forward(*made.args, embeddings, n, **made.options, **options)


def reference(made, embeddings, n):
    D = made.x.shape[1]
    return ref.forward(*made.reference_args(), parts(embeddings, D, made.F), n)


def test_by_hand():
    """One token; experts 2, 0, 1 by weight: 2 runs, 0 and 1 do not, with shares 3/4 and 1/4.

    θ1 = (2, 3) 3/4 + (6, 1) 1/4 = (3, 5/2), θ2 = 2 3/4 + 4 1/4 = 5/2,
    θ3 = (1, 0) 3/4 + (1, 4) 1/4 = (1, 1); gate = (1, 1) · (3, 5) = 8, up = (2, -1) · (1, 2) + 3,
    h = 8 · 3 · 5/2 = 60, y = 1/2 · 60 · (1, -1).
    """
    x = np.array([[1.0, 2.0]])
    gate = np.array([[[9.0, 9]], [[9, 9]], [[1, 1]]])
    up = np.array([[[9.0, 9]], [[9, 9]], [[2, -1]]])
    down = np.array([[[9.0], [9]], [[9], [9]], [[1], [-1]]])
    e = np.array([[2.0, 3, 2, 1, 0], [6, 1, 4, 1, 4], [7, 7, 7, 7, 7]])
    y = ops.compressed_experts_forward(
        x, [[0, 2, 1]], np.array([[0.3, 0.5, 0.1]]), gate, up, down, e, 2,
        up_bias=np.array([[0.0], [0], [3]]), activation="relu",
    )  # fmt: skip
    np.testing.assert_allclose(y, [[30.0, -30.0]], rtol=1e-15)


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_the_papers(kind, dtype, wide):
    E, D, F, K = 6, 40, 24, 4
    made = layer(3, 70, K, E, D, F, dtype=dtype, bias=True, **fitting(kind, E, D))
    e = embeddings_of(4, E, D, F, dtype, wide)
    for n in (1, 3):
        y, want = forward(made, e, n), reference(made, e, n)
        loose = {F64: 1e-13, F32: 1e-5, BF16: 0.02}[dtype]
        assert y.dtype == dtype
        np.testing.assert_allclose(y.astype(F64), want, atol=loose * np.abs(want).max())
        other = reference(made, np.where(e == e[2], e, 1.01 * e), n)
        if dtype != BF16:  # the check sees a hundredth
            assert np.abs(y.astype(F64) - other).max() > loose * np.abs(want).max()


def test_an_intermediate_wider_than_the_input():
    E, D, F = 5, 12, 30
    made = layer(5, 20, 3, E, D, F, **KINDS["mixed"])
    e = embeddings_of(6, E, D, F, wide=False)
    np.testing.assert_allclose(forward(made, e, 2), reference(made, e, 2), rtol=1e-9, atol=1e-10)
    with pytest.raises(ShapeError, match=r"no room for F=30 above D=12; expected \(E, 2 D \+ F\)"):
        forward(made, np.ones((E, 3, D)), 2)
    with pytest.raises(ShapeError, match="F <= D"):
        ops.to_authors_layout(e, D)
    with pytest.raises(ShapeError, match="D >= F=30"):
        ops.from_authors_layout(np.ones((E, 3, D)), F)


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
def test_none_compressed_is_the_layer_to_the_bit(dtype):
    made = layer(7, 80, 3, 5, 30, 18, dtype=dtype, bias=True, **KINDS["mixed"])
    e = embeddings_of(8, 5, 30, 18, dtype)
    y = ops.latent_experts_forward(*made.args, **made.options)
    assert forward(made, e, 0).tobytes() == y.tobytes()


@pytest.mark.parametrize("n", [1, 2])
def test_ones_leave_the_experts_that_run(n):
    """With the weights that they had; ties are broken by the expert's number."""
    E, K = 5, 3
    made = layer(9, 60, K, E, 20, 12, bias=True, **KINDS["gauge"])
    made.weights = np.round(made.weights * 3) / 3  # many ties
    kept = np.full(made.index.shape, E)
    for t in range(len(kept)):
        for k in ref.split(made.weights[t], made.index[t], n)[0]:
            kept[t, k] = made.index[t, k]
    y = forward(made, np.ones((E, 3, 20)), n)
    plain = ops.latent_experts_forward(made.x, kept, made.weights, *made.args[3:], **made.options)
    assert y.tobytes() == plain.tobytes()


def test_tokens_without_weight_or_without_experts():
    E, D, F = 4, 8, 6
    made = layer(10, 3, 3, E, D, F)
    made.index = np.array([[0, 1, 2], [3, E, E], [E, E, E]])
    made.weights = np.array([[0.5, 0.0, 0.0], [0.7, 0.2, 0.1], [0.3, 0.2, 0.1]])
    e = embeddings_of(11, E, D, F)
    y = forward(made, e, 2)
    np.testing.assert_allclose(y, reference(made, e, 2), rtol=1e-12, atol=1e-13)
    assert y[0].any() and not y[2].any()  # noqa: PT018
    _, saved = forward(made, e, 2, save=True)
    d = ops.compressed_experts_backward(y, saved, *made.args, e, 2, **made.options)
    assert all(np.isfinite(a).all() for a in (d.x, d.top_k_weights, d.gate.private[0]))


# ------------------------------------------------------------------------- gradients


def arrays(d):
    """All arrays of gradients, or of what they are by, in one order."""
    found = []
    for field in fields(Gradients):
        value = getattr(d, field.name)
        if isinstance(value, ProjectionGradients):
            found += [a for a in (*value.private, *value.shared) if a is not None]
        elif value is not None:
            found.append(value)
    return found


def inputs(made, e):
    weights = {role: getattr(made, role) for role in ROLES}
    return Gradients(
        x=made.x,
        top_k_weights=made.weights,
        embeddings=e,
        **{role: ProjectionGradients(p.private, p.shared) for role, p in weights.items()},
        **{name: b for name, b in made.biases.items() if b is not None},
    )


@pytest.mark.parametrize("activation", ["silu", "relu2", "swiglu_clamped"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2])
def test_gradients_are_slopes(kind, n, activation):
    """Of every argument alone, along a random direction, by central differences."""
    E, D, F, K, N = 5, 14, 9, 3, 17
    made = layer(12, N, K, E, D, F, bias=True, activation=activation, **fitting(kind, E, D))
    made.weights += np.arange(K)  # no order changes
    e = embeddings_of(13, E, D, F)
    e[:, 1, F:] = 1.0
    rng = np.random.default_rng(14)
    dy = rng.standard_normal((N, D))
    _, saved = forward(made, e, n, save=True)
    d = ops.compressed_experts_backward(dy, saved, *made.args, e, n, **made.options)
    found, at = arrays(d), arrays(inputs(made, e))
    assert [a.shape for a in found] == [a.shape for a in at]
    assert not d.embeddings[:, 1, F:].any()
    for g, a in zip(found, at, strict=True):
        p, eps, before = rng.standard_normal(a.shape), 1e-6, a.copy()
        a += eps * p
        plus = float((forward(made, e, n) * dy).sum())
        a[...] = before - eps * p
        minus = float((forward(made, e, n) * dy).sum())
        a[...] = before
        slope, size = float((g * p).sum()), float(np.abs(g * p).sum())
        assert abs((plus - minus) / (2 * eps) - slope) < 3e-7 * (size + 1)


@given(
    seed=st.integers(0, 9),
    dtype=st.sampled_from([F32, BF16]),
    n=st.integers(1, 3),
    wide=st.booleans(),
)
@settings(max_examples=20, deadline=None)
def test_narrow_gradients_are_those_in_float64(seed, dtype, n, wide):
    E, D, F, K, N = 6, 32, 20, 4, 50
    made = layer(seed, N, K, E, D, F, dtype=dtype, bias=True, **KINDS["mixed"])
    exact = layer(seed, N, K, E, D, F, bias=True, **KINDS["mixed"])
    e = embeddings_of(seed + 20, E, D, F, dtype, wide)
    for one, other in zip(arrays(inputs(exact, e)), arrays(inputs(made, e)), strict=True):
        if one is not other:
            one[...] = other.astype(F64)
    dy = np.random.default_rng(seed).standard_normal((N, D)).astype(dtype)
    found = []
    for own, vectors, towards in ((made, e, dy), (exact, e.astype(F64), dy.astype(F64))):
        _, saved = forward(own, vectors, n, save=True)
        found.append(
            arrays(ops.compressed_experts_backward(
                towards, saved, *own.args, vectors, n, **own.options))
        )  # fmt: skip
    for g, want in zip(*found, strict=True):
        assert g.dtype == F32
        loose = 1e-4 if dtype == F32 else 0.05
        np.testing.assert_allclose(g, want, atol=loose * (np.abs(want).max(initial=0) + 1e-6))


def test_over_several_chunks_and_threads():
    """The same bits whatever the threads; chunks add up."""
    E, D, F, K, N = 5, 24, 16, 3, 4500
    made = layer(15, N, K, E, D, F, dtype=F32, **KINDS["gauge"])
    e = embeddings_of(16, E, D, F, F32)
    dy = np.random.default_rng(17).standard_normal((N, D)).astype(F32)
    results = []
    for threads in (1, 3):
        with molae.num_threads(threads):
            y, saved = forward(made, e, 2, save=True)
            d = ops.compressed_experts_backward(dy, saved, *made.args, e, 2, **made.options)
            results.append([y.tobytes(), *(a.tobytes() for a in arrays(d))])
    assert results[0] == results[1]
    np.testing.assert_allclose(y, reference(made, e, 2), rtol=0, atol=1e-4)
    whole, half = np.zeros_like(d.embeddings), 2048
    for some in (slice(0, half), slice(half, N)):
        own = made.x[some], made.index[some], made.weights[some], *made.args[3:], e, 2
        _, saved = ops.compressed_experts_forward(*own, **made.options, save=True)
        out = Gradients(embeddings=whole)  # added to
        ops.compressed_experts_backward(dy[some], saved, *own, **made.options, out=out)
    np.testing.assert_allclose(whole, d.embeddings, rtol=0, atol=1e-5 * np.abs(whole).max())


def test_only_what_is_wanted():
    made = layer(18, 40, 3, 5, 12, 8, **KINDS["gauge"])
    e, dy = embeddings_of(19, 5, 12, 8), np.random.default_rng(2).standard_normal((40, 12))
    _, saved = forward(made, e, 1, save=True)
    whole = ops.compressed_experts_backward(dy, saved, *made.args, e, 1, **made.options)
    for name in ("x", "top_k_weights", "embeddings", "gate", "down"):
        one = ops.compressed_experts_backward(
            dy, saved, *made.args, e, 1, **made.options, wanted=[name]
        )
        for a, b in zip(
            arrays(one), arrays(Gradients(**{name: getattr(whole, name)})), strict=True
        ):
            assert a.tobytes() == b.tobytes()


def test_what_makes_no_sense_is_refused():
    made = layer(20, 10, 3, 5, 12, 8)
    e = np.ones((5, 3, 12))
    for n in (-1, 3, 4):
        with pytest.raises(
            ArgumentError, match=f"num_compressed: expected 0 to K - 1 = 2, got {n}"
        ):
            forward(made, e, n)
    for wrong in (e[:4], e[:, :2], np.ones((5, 31)), np.ones((5, 3, 11)), np.ones(5)):
        with pytest.raises(ShapeError, match="embeddings: expected shape"):
            forward(made, wrong, 1)
    with pytest.raises(ArgumentError, match="embeddings: expected float64 for this x"):
        forward(made, e.astype(F32), 1)
    y, saved = ops.latent_experts_forward(*made.args, save=True)
    with pytest.raises(ArgumentError, match="dembeddings: there are no embeddings"):
        ops.latent_experts_backward(y, saved, *made.args, out=Gradients(embeddings=e))
    with pytest.raises(ArgumentError, match="dembeddings: an array|overlaps"):
        ops.compressed_experts_backward(y, saved, *made.args, e, 1, out=Gradients(embeddings=e))


def test_layouts_are_each_others():
    flat = embeddings_of(21, 4, 9, 5, wide=False)
    assert np.array_equal(ops.from_authors_layout(ops.to_authors_layout(flat, 9), 5), flat)
    assert (ops.to_authors_layout(flat, 9)[:, 1, 5:] == 1).all()
