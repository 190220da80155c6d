"""Sums over many numbers."""

from __future__ import annotations

import numpy as np
import pytest

import molae
from molae import _core
from molae.errors import ArgumentError, ShapeError
from molae.fit.sums import dot, row_squares, squares


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (5, 7), (300, 41)])
def test_sums_are_those_of_doubles(dtype, shape, rng):
    a, b = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    wide = a.astype(np.float64)
    assert dot(a, b) == pytest.approx((wide * b).sum(), rel=1e-12, abs=1e-12)
    assert squares(a) == pytest.approx((wide**2).sum(), rel=1e-12)
    np.testing.assert_allclose(row_squares(a), (wide**2).sum(1), rtol=1e-12)
    assert dot(a.T, b.T) == pytest.approx((wide * b).sum(), rel=1e-12, abs=1e-12)
    np.testing.assert_allclose(row_squares(a.T), (wide**2).sum(0), rtol=1e-12)


def test_threads_change_no_bit(rng):
    a = rng.standard_normal((5000, 33)).astype(np.float32)
    with molae.threads.num_threads(1):
        one = row_squares(a)
    with molae.threads.num_threads(3):
        assert np.array_equal(row_squares(a), one)


def test_bad_values_are_seen():
    a = np.ones((4, 20), np.float32)
    a[2, 3] = np.nan
    assert np.isnan(squares(a))
    assert np.isnan(row_squares(a)).tolist() == [False, False, True, False]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint16])
@pytest.mark.parametrize("width", [0, 1, 7, 300])
def test_rows_by_number(dtype, width, rng):
    src = (100 * rng.standard_normal((50, width))).astype(dtype)
    for n in (0, 1, 3, 63, 64, 65, 200):
        index = rng.integers(0, 50, n)
        for threads in (1, 3):
            assert np.array_equal(_core.take_rows(src, index, threads), src[index])


def test_what_does_not_fit_is_refused():
    a = np.ones(4, np.float32)
    for wrong in (-1, 4):
        with pytest.raises(ArgumentError, match="index: out of range"):
            _core.take_rows(a[:, None], np.array([0, wrong]), 1)
    with pytest.raises(ArgumentError, match="int64"):
        _core.take_rows(a[:, None], np.array([0], np.int32), 1)
    with pytest.raises(ArgumentError, match="src"):
        _core.take_rows(np.ones((4, 4))[:, ::2], np.array([0]), 1)
    with pytest.raises(ShapeError, match="as many"):
        _core.dot(a, a[:3])
    with pytest.raises(ArgumentError, match="float32"):
        _core.dot(a, np.ones(4))
    with pytest.raises(ShapeError, match="x"):
        _core.row_lengths(a, 1)
