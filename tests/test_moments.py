"""molae.fit.second_moments against float64 references, its properties, and bad arguments."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import molae
from molae import _core
from molae.errors import ArgumentError, NonFiniteError, ShapeError
from molae.fit import second_moments

F32, F64, BF16 = np.float32, np.float64, ml_dtypes.bfloat16
EPS = {F32: 2.0**-23, BF16: 2.0**-23, F64: 2.0**-52}


def routed(seed, N, K, E, W, dtype=F64, per_slot=False):
    """Rows, experts (E: none) and weights; expert 0 is left out where there are more."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((N, K, W) if per_slot else (N, W)).astype(dtype)
    index = rng.integers(min(1, E - 1), E + 1, (N, K))
    return x, index, rng.random((N, K)).astype(F64 if dtype is F64 else F32)


def reference(x, index, weights, E):
    """The definition, in float64; and the same of absolute values, which bounds the rounding."""
    x, weights = x.astype(F64), weights.astype(F64)
    W = x.shape[-1]
    sums, bound = np.zeros((E, W, W)), np.zeros((E, W, W))
    for t, k in np.ndindex(index.shape):
        if (e := index[t, k]) < E:
            row = weights[t, k] * (x[t, k] if x.ndim == 3 else x[t])
            sums[e] += np.outer(row, row)
            bound[e] += np.abs(np.outer(row, row))
    return sums, bound


def agrees(found, x, index, weights, E, dtype):
    """Each sum has at most n additions and three roundings a term."""
    sums, bound = reference(x, index, weights, E)
    n = np.bincount(index[index < E].ravel(), minlength=E)[:, None, None]
    return bool((np.abs(found.moment - sums) <= (n + 4) * EPS[dtype] * bound).all())


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("per_slot", [False, True])
@pytest.mark.parametrize("shape", [(40, 2, 5, 7), (700, 3, 2, 33), (3, 1, 1, 1), (20, 2, 3, 530)])
def test_the_definition(dtype, per_slot, shape):
    N, K, E, W = shape
    x, index, weights = routed(1, N, K, E, W, dtype, per_slot)
    found = second_moments(x, index, weights, E)
    assert agrees(found, x, index, weights, E, dtype)
    assert found.moment.dtype == (F64 if dtype is F64 else F32)
    assert np.array_equal(found.moment, found.moment.transpose(0, 2, 1))
    wide = np.where(index < E, np.square(weights.astype(F64)), 0)
    mass = [wide[index == e].sum() for e in range(E)]
    assert np.allclose(found.mass, mass, rtol=1e-13, atol=0)
    assert found.count.tolist() == [(index == e).sum() for e in range(E)]


def test_the_check_rejects_a_wrong_answer():
    x, index, weights = routed(2, 40, 2, 4, 6)
    found = second_moments(x, index, weights, 4)
    found.moment[1, 2, 3] *= 1 + 1e-9
    assert not agrees(found, x, index, weights, 4, F64)


def test_the_error_of_an_expert_is_what_it_says():
    """tr((W - V) C (W - V)ᵀ) is the squared error of the weighted outputs."""
    x, index, weights = routed(3, 60, 2, 3, 8)
    found = second_moments(x, index, weights, 3)
    W, V = np.random.default_rng(4).standard_normal((2, 5, 8))
    for e in range(3):
        direct = sum(
            np.square(weights[t, k] * ((W - V) @ x[t])).sum() for t, k in np.argwhere(index == e)
        )
        by_moments = np.trace((W - V) @ found.moment[e] @ (W - V).T)
        assert by_moments == pytest.approx(direct, rel=1e-12, abs=1e-12)


@given(st.integers(0, 2**32), st.integers(0, 50), st.integers(1, 3), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_calls_add_up(seed, N, K, E):
    x, index, weights = routed(seed, N, K, E, 5)
    whole = second_moments(x, index, weights, E)
    cut = N // 3
    parts = second_moments(x[:cut], index[:cut], weights[:cut], E)
    same = second_moments(x[cut:], index[cut:], weights[cut:], E, out=parts)
    assert same is parts
    assert np.allclose(parts.moment, whole.moment, rtol=1e-12, atol=1e-12)
    assert np.array_equal(parts.count, whole.count)
    assert np.allclose(parts.mass, whole.mass, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_threads_do_not_show(dtype):
    x, index, weights = routed(5, 600, 2, 3, 540, dtype)
    found = []
    for threads in (1, 2, 5):
        with molae.num_threads(threads):
            found.append(second_moments(x, index, weights, 3))
    assert all(np.array_equal(found[0].moment, other.moment) for other in found[1:])


def test_nothing_is_left_behind():
    x, index, weights = routed(6, 50, 2, 3, 9)
    second_moments(x, index, weights, 3)
    before = _core.mem_live()
    for _ in range(5):
        second_moments(x, index, weights, 3)
    assert _core.mem_live() == before


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused_and_named(dtype, bad):
    x, index, weights = routed(7, 900, 2, 3, 4, dtype)
    x[777, 1] = bad
    out = second_moments(x[:10], index[:10], weights[:10], 3)
    before = out.moment.copy(), out.mass.copy(), out.count.copy()
    with pytest.raises(NonFiniteError, match="x: NaN or Inf") as error:
        second_moments(x, index, weights, 3, out=out)
    assert error.value.info == 777
    x[777, 1] = 0
    weights[5, 1] = bad
    with pytest.raises(NonFiniteError, match="top_k_weights: NaN or Inf") as error:
        second_moments(x, index, weights, 3, out=out)
    assert error.value.info == 11
    after = out.moment, out.mass, out.count
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_no_memory(monkeypatch):
    x, index, weights = routed(8, 20, 2, 3, 4)
    molae.ops.release_scratch()
    _core.mem_fail_after(1)
    try:
        with pytest.raises(MemoryError):
            second_moments(x, index, weights, 3)
    finally:
        _core.mem_fail_after(0)


X, INDEX, G = np.ones((4, 3)), np.zeros((4, 2), dtype=np.int64), np.ones((4, 2))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((np.ones(3), INDEX, G, 2), ShapeError, r"^x: expected shape \(N, W\)"),
        ((np.ones((4, 0)), INDEX, G, 2), ShapeError, "^x: expected shape"),
        ((np.ones((4, 3, 5)), INDEX, G, 2), ShapeError, "^x: "),
        ((np.ones((5, 3)), INDEX, G, 2), ShapeError, "^top_k_index: "),
        ((X, INDEX[0], G, 2), ShapeError, "^top_k_index: "),
        ((X, INDEX, G[:, :1], 2), ShapeError, "^top_k_weights: "),
        ((X.astype(np.float16), INDEX, G, 2), ArgumentError, "^x: expected float32"),
        ((X.astype(int), INDEX, G, 2), ArgumentError, "^x: expected float32"),
        ((X, INDEX + 0.0, G, 2), ArgumentError, "^top_k_index: expected integers"),
        ((X, INDEX + 3, G, 2), ArgumentError, "^top_k_index: expected 0 to E"),
        ((X, INDEX - 1, G, 2), ArgumentError, "^top_k_index: expected 0 to E"),
        ((X, INDEX, G, 0), ArgumentError, "^num_experts: expected 1 or more"),
        ((X, INDEX, G, 2.0), ArgumentError, "^num_experts: expected 1 or more"),
    ],
)
def test_bad_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        second_moments(*arguments)


def test_a_bad_out():
    out = second_moments(X, INDEX, G, 2)
    with pytest.raises(ShapeError, match="^out: of 2 experts, expected 3"):
        second_moments(X, INDEX, G, 3, out=out)
    with pytest.raises(ShapeError, match=r"^out\.moment: "):
        second_moments(np.ones((4, 5)), INDEX, G, 2, out=out)
    with pytest.raises(ArgumentError, match="float64 with float64"):
        second_moments(X.astype(F32), INDEX, G, 2, out=out)
    with pytest.raises(ArgumentError, match=r"^out\.moment: overlaps an input"):
        second_moments(out.moment[0], INDEX[:3], G[:3], 2, out=out)
    out.moment.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        second_moments(X, INDEX, G, 2, out=out)


def test_rows_that_are_not_contiguous():
    x, index, weights = routed(9, 30, 2, 3, 8)
    strided = np.asfortranarray(x)
    assert np.array_equal(
        second_moments(strided, index, weights, 3).moment,
        second_moments(x, index, weights, 3).moment,
    )
