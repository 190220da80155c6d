"""Streaming products and the bf16 matrix product of every table against NumPy in float64."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest

from molae import _core
from molae.errors import ArgumentError, ShapeError

ISAS = _core.build_info()["isas"]
NATIVE = [isa for isa in ISAS if _core.gemm_bf16_native(isa)]
TYPES = ("f32", "bf16", "f64")
LAYOUTS = ("nt", "nn")
MARK = 7.0e30  # what stands around outputs

# Tiles are 8 or 16 lanes, 1 to 6 rows of X, 12 rows of W, 256 columns at a time and 16 rows of X.
STREAM_N = (0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 15, 16, 17, 33)
STREAM_COLUMNS = (0, 1, 7, 8, 11, 12, 13, 16, 31, 32, 33, 61)
STREAM_K = (0, 1, 3, 4, 7, 8, 9, 15, 16, 17, 31, 127, 129, 257, 521)
LONG = (
    (1, 2049, 31),
    (3, 4133, 12),
    (4, 1031, 9),
    (16, 1041, 40),
    (5, 24, 1543),
    (17, 13, 2050),
    (5, 300, 2100),
)

# Tiles are 8, 16 or 32 rows, 16, 32 or 48 columns, pairs and 32 of k, and 256 of k at once.
GEMM_M = (0, 1, 7, 8, 9, 16, 17, 31, 32, 33, 61)
GEMM_N = (0, 1, 15, 16, 17, 32, 33, 47, 48, 49, 97)
GEMM_K = (0, 1, 2, 31, 32, 33, 63, 129)
GEMM_LONG = (
    (40, 33, 257),
    (33, 40, 385),
    (7, 90, 1031),
    (70, 5, 1024),
    (65, 700, 1531),  # more columns than a block of packed B has
    (700, 65, 1531),
    (40, 1100, 600),  # and than may be packed at once
    (1100, 40, 600),
    (3, 1400, 40),
)

# Tiles are 16, 32 or 48 rows of X, 1, 4, 8 or 12 of W and 48 at a time, 16 and 256 of k.
ROWS_N = (0, 1, 15, 16, 17, 31, 33, 48, 49, 65, 81)
ROWS_R = (0, 1, 3, 4, 11, 16, 23, 47, 48, 49)
ROWS_K = (0, 1, 15, 16, 17, 65)
ROWS_LONG = (
    *((17, 97, 257), (64, 50, 513), (113, 150, 1031), (256, 20, 621), (33, 9, 2049)),
    *((20, 433, 131), (150, 800, 300), (9, 385, 129)),
)


# Rows in gauge form: rows, columns of their own, and others. Small ones have W packed, those with
# more columns than rows, or more than 256 of k, have X.
GAUGE = (
    *((0, 3, 4), (1, 1, 0), (1, 1, 1), (2, 5, 0), (7, 7, 9), (8, 8, 40), (17, 9, 30)),
    *((16, 16, 16), (33, 33, 31), (40, 49, 15), (61, 50, 137), (50, 61, 137), (100, 97, 256)),
    *((100, 97, 257), (130, 16, 530), (20, 150, 300), (384, 56, 136)),
)


def unit(dtype: np.dtype) -> float:
    return float(np.finfo(dtype).eps) / 2


def real(kind: str) -> str:
    """The type of X and Y that goes with W's."""
    return "f64" if kind == "f64" else "f32"


def widen(w: np.ndarray) -> np.ndarray:
    return (w.view(ml_dtypes.bfloat16) if w.dtype == np.uint16 else w).astype(np.float64)


def draw(rng: np.random.Generator, kind: str, rows: int, cols: int, pad: int = 0) -> np.ndarray:
    """(rows,cols) whose rows lie cols + pad apart, NaN between them, at an odd element."""
    ld = cols + pad
    flat = np.full(rows * ld + 1, np.nan, np.float64 if kind == "f64" else np.float32)
    view = flat[1:].reshape(rows, ld)[:, :cols]
    view[...] = rng.standard_normal((rows, cols))
    if kind != "bf16":
        return view
    return flat.astype(ml_dtypes.bfloat16).view(np.uint16)[1:].reshape(rows, ld)[:, :cols]


class Output:
    """A matrix amid marks; `check` compares it and sees that the marks are untouched."""

    def __init__(self, dtype: type, rows: int, cols: int, start: float, pad: int = 3):
        self.whole = np.full((rows + 2, cols + pad + 2), MARK, dtype)
        self.view = self.whole[1 : rows + 1, 1 : cols + 1]
        self.view[...] = start

    def check(self, want: np.ndarray, bound: np.ndarray) -> None:
        error = np.abs(self.view - want)
        assert (error <= bound).all(), (error.max(), bound.ravel()[error.argmax()])
        self.view[...] = MARK
        assert (self.whole == self.whole.dtype.type(MARK)).all(), "written past the edge"


def expected(
    a: np.ndarray, b: np.ndarray, layout: str, start: float | np.ndarray, u: float
) -> tuple[np.ndarray, np.ndarray]:
    """a b + start, and the bound (k + 2) u (sum |a||b| + |start|) of its error."""
    a, b = widen(a), widen(b)
    b = b.T if layout == "nt" else b
    return a @ b + start, (a.shape[1] + 2) * u * (np.abs(a) @ np.abs(b) + np.abs(start))


def uses_amx(isa: str, layout: str, kind: str, n: int) -> bool:
    return (isa, layout, kind) == ("amx", "nt", "bf16") and n > 4


def stream(
    isa: str, layout: str, kind: str, x: np.ndarray, w: np.ndarray, accumulate: bool
) -> None:
    columns = w.shape[0] if layout == "nt" else w.shape[1]
    # What is overwritten may be anything.
    y = Output(x.dtype.type, len(x), columns, 3.0 if accumulate else np.nan)
    _core.stream(f"{layout}_{kind}", isa, y.view, x, w, accumulate)
    want, bound = expected(x, w, layout, 3.0 if accumulate else 0.0, unit(x.dtype))
    if uses_amx(isa, layout, kind, len(x)):  # the parts of x add up to |x| (1 + 2^-6) at most
        bound *= 1 + 2.0**-6
    y.check(want, bound)


def gemm(isa: str, layout: str, a: np.ndarray, b: np.ndarray, accumulate: bool) -> None:
    n = b.shape[0] if layout == "nt" else b.shape[1]
    c = Output(np.float32, len(a), n, 3.0 if accumulate else np.nan)
    _core.gemm_bf16(layout, isa, c.view, a, b, accumulate)
    c.check(*expected(a, b, layout, 3.0 if accumulate else 0.0, unit(np.float32)))


def second(layout: str, columns: int, k: int) -> tuple[int, int]:
    return (columns, k) if layout == "nt" else (k, columns)


def test_checker_sees_an_error_and_a_stray_write():
    want, bound = np.zeros((2, 2)), np.full((2, 2), 1e-7)
    y = Output(np.float32, 2, 2, 0.0)
    y.check(want, bound)
    y = Output(np.float32, 2, 2, 0.0)
    y.view[1, 1] = 2e-7
    with pytest.raises(AssertionError):
        y.check(want, bound)
    y = Output(np.float32, 2, 2, np.nan)
    with pytest.raises(AssertionError):
        y.check(want, bound)
    y = Output(np.float32, 2, 2, 0.0)
    y.whole[1, 3] = 0.0
    with pytest.raises(AssertionError, match="past the edge"):
        y.check(want, bound)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", TYPES)
class TestStream:
    def test_sizes(self, isa, layout, kind, rng):
        for count, (n, c) in enumerate(itertools.product(STREAM_N, STREAM_COLUMNS)):
            for k in STREAM_K[count % 3 :: 3]:
                x, w = draw(rng, real(kind), n, k), draw(rng, kind, *second(layout, c, k))
                stream(isa, layout, kind, x, w, bool(count % 2))

    @pytest.mark.parametrize("accumulate", [False, True])
    @pytest.mark.parametrize("pad", [0, 1, 5])
    def test_long_and_far_apart(self, isa, layout, kind, accumulate, pad, rng):
        for n, c, k in LONG:
            x, w = draw(rng, real(kind), n, k, pad), draw(rng, kind, *second(layout, c, k), pad)
            stream(isa, layout, kind, x, w, accumulate)

    def test_nan_reaches_its_outputs_alone(self, isa, layout, kind, rng):
        n, c, k = 5, 29, 37
        for where in range(k):
            x = draw(rng, real(kind), n, k)
            w = draw(rng, kind, *second(layout, c, k))
            x[2, where] = np.nan
            (w if layout == "nt" else w.T)[11, (where * 5) % k] = (
                0x7FC1 if kind == "bf16" else np.nan
            )
            y = np.zeros((n, c), x.dtype)
            _core.stream(f"{layout}_{kind}", isa, y, x, w, True)
            want = np.zeros((n, c), bool)
            want[2] = want[:, 11] = True
            assert np.array_equal(np.isnan(y), want)

    def test_bits_do_not_depend_on_the_batch_nor_the_split(self, isa, layout, kind, rng):
        n, c, k = 40, 45, 301
        x = draw(rng, real(kind), n, k)
        w = draw(rng, kind, *second(layout, c, k))

        def by_rows(cut: int) -> np.ndarray:
            y = np.ones((n, c), x.dtype)
            for i in range(0, n, cut):
                _core.stream(f"{layout}_{kind}", isa, y[i : i + cut], x[i : i + cut], w, True)
            return y

        whole, few = by_rows(n), by_rows(1)
        for cut in (2, 4, 5, 8, 10, 16, 20):
            assert np.array_equal(by_rows(cut), few if cut <= 4 else whole)
        if not uses_amx(isa, layout, kind, n):  # it has one order to N = 4 and another beyond
            assert np.array_equal(few, whole)
        for cut in (1, 2, 5, 8, 16):
            y = np.ones((n, c), x.dtype)
            for j in range(0, c, cut):
                part = w[j : j + cut] if layout == "nt" else w[:, j : j + cut]
                _core.stream(f"{layout}_{kind}", isa, y[:, j : j + cut], x, part, True)
            assert np.array_equal(y, whole)

    @pytest.mark.parametrize("n", [1, 4, 5, 16])
    def test_no_bit_of_x_is_lost(self, isa, layout, kind, n, rng):
        dtype = np.float64 if kind == "f64" else np.float32
        x = rng.standard_normal((n, 1)).astype(dtype) * dtype(2.0) ** rng.integers(-90, 90, (n, 1))
        x = np.nextafter(x, dtype(np.inf)).astype(dtype)
        x[0] = np.finfo(dtype).max
        w = np.array([[1.0]], dtype)
        w = w.astype(ml_dtypes.bfloat16).view(np.uint16) if kind == "bf16" else w
        y = np.zeros((n, 1), dtype)
        _core.stream(f"{layout}_{kind}", isa, y, x, w, False)
        assert np.array_equal(y, x)
        x[0] = -np.inf
        _core.stream(f"{layout}_{kind}", isa, y, x, w, False)
        assert np.array_equal(y, x)
        if dtype == np.float32:  # a NaN whose bits are all in the half that bf16 cuts off
            x[0] = np.array([0x7F800001], np.uint32).view(np.float32)
            _core.stream(f"{layout}_{kind}", isa, y, x, w, False)
            assert np.isnan(y[0])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS)
class TestGemm:
    def test_sizes(self, isa, layout, rng):
        for count, (m, n) in enumerate(itertools.product(GEMM_M, GEMM_N)):
            for k in GEMM_K[count % 2 :: 2]:
                a, b = draw(rng, "bf16", m, k), draw(rng, "bf16", *second(layout, n, k))
                gemm(isa, layout, a, b, bool(count // 2 % 2))

    @pytest.mark.parametrize("accumulate", [False, True])
    @pytest.mark.parametrize("pad", [0, 1, 6])
    def test_long_and_far_apart(self, isa, layout, accumulate, pad, rng):
        for m, n, k in GEMM_LONG:
            a, b = draw(rng, "bf16", m, k, pad), draw(rng, "bf16", *second(layout, n, k), pad)
            gemm(isa, layout, a, b, accumulate)

    def test_nan_reaches_its_outputs_alone(self, isa, layout, rng):
        m, n, k = 19, 37, 45
        for where in range(k):
            a, b = draw(rng, "bf16", m, k), draw(rng, "bf16", *second(layout, n, k))
            a[13, where] = 0x7FC1
            (b if layout == "nt" else b.T)[11, (where * 7) % k] = 0x7FC1
            c = np.zeros((m, n), np.float32)
            _core.gemm_bf16(layout, isa, c, a, b, True)
            want = np.zeros((m, n), bool)
            want[13] = want[:, 11] = True
            assert np.array_equal(np.isnan(c), want)

    def test_subnormals_are_within_the_contract(self, isa, layout, rng):
        m, n, k = 18, 35, 50
        # Values down to the smallest: products and sums below 2^-126, too.
        a, b = (
            (2.0 ** rng.integers(-133, -60, size)).astype(np.float32).astype(ml_dtypes.bfloat16)
            for size in ((m, k), second(layout, n, k))
        )
        c = Output(np.float32, m, n, np.nan)
        _core.gemm_bf16(layout, isa, c.view, a.view(np.uint16), b.view(np.uint16), False)
        want, bound = expected(a, b, layout, 0.0, unit(np.float32))
        wide = widen(b) if layout == "nt" else widen(b).T
        sums = widen(a).sum(1)[:, None] + wide.sum(1)[None, :]
        c.check(want, bound + 2.0**-126 * (k + sums))


@pytest.mark.skipif(len(NATIVE) < 1, reason="neither AVX512_BF16 nor AMX here")
def test_native_gemms_are_not_the_portable_one():
    assert not _core.gemm_bf16_native("ref")
    # 2^-133 is subnormal: they take it for zero, which only they may.
    a = np.full((1, 1), 1, np.uint16)
    one = np.full((1, 1), 0x3F80, np.uint16)
    for isa in ISAS:
        c = np.full((1, 1), np.nan, np.float32)
        _core.gemm_bf16("nt", isa, c, a, one, False)
        assert c[0, 0] == (0.0 if isa in NATIVE else np.float32(2.0**-133))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("layout", ["nt", "nn"])
def test_rows(isa, layout, accumulate):
    rng = np.random.default_rng(11)
    start = 2.0 if accumulate else np.nan
    for n, r, k in (*itertools.product(ROWS_N, ROWS_R, ROWS_K), *ROWS_LONG):
        x, w = draw(rng, "f32", n, k, 3), draw(rng, "f32", *second(layout, r, k), 5)
        y = Output(np.float32, n, r, start)
        _core.rows_f32(layout, isa, y.view, x, w, accumulate)
        y.check(*expected(x, w, layout, 2.0 if accumulate else 0.0, unit(np.float32)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", ["nt", "nn"])
def test_rows_do_not_change_each_other(isa, layout):
    rng = np.random.default_rng(12)
    x, w = draw(rng, "f32", 130, 601, 1), draw(rng, "f32", *second(layout, 131, 601))
    whole = np.empty((130, 131), np.float32)
    _core.rows_f32(layout, isa, whole, x, w, False)
    for n0, n1, r0, r1 in ((0, 17, 0, 131), (40, 90, 50, 131), (129, 130, 7, 8)):
        part = np.empty((n1 - n0, r1 - r0), np.float32)
        piece = w[r0:r1] if layout == "nt" else w[:, r0:r1]
        _core.rows_f32(layout, isa, part, x[n0:n1], piece, False)
        assert (part == whole[n0:n1, r0:r1]).all()


def gauge(rng: np.random.Generator, N: int, R: int, k: int) -> tuple[np.ndarray, ...]:
    """X, row, own, rest, M: rows out of more, some twice, and columns in any order."""
    X = draw(rng, "f32", 2 * N + 1, R + k + 3)
    columns = rng.permutation(R + k + 3).astype(np.int32)
    row = rng.integers(0, len(X), N)
    return X, row, columns[:R].copy(), columns[3 + R :].copy(), draw(rng, "f32", R, k, 2)


@pytest.mark.parametrize("isa", ISAS)
def test_rows_in_gauge_form(isa):
    rng = np.random.default_rng(13)
    for N, R, k in GAUGE:
        X, row, own, rest, M = gauge(rng, N, R, k)
        z = Output(np.float32, N, R, np.nan)
        _core.gauge_f32(isa, z.view, X, row, own, rest, M)
        first = X[row][:, own].astype(np.float64)
        want, bound = expected(X[row][:, rest], M, "nt", first, unit(np.float32))
        z.check(want, bound)
        z.view[...] = np.nan
        _core.gauge_f32(isa, z.view, X, row, own, None, None)
        z.check(first, np.zeros_like(first))


@pytest.mark.parametrize("isa", ISAS)
def test_rows_in_gauge_form_do_not_change_each_other(isa):
    # Fewer rows than columns, and more: not packed alike, and the same bits.
    rng = np.random.default_rng(14)
    X, row, own, rest, M = gauge(rng, 90, 70, 200)
    whole = np.empty((90, 70), np.float32)
    _core.gauge_f32(isa, whole, X, row, own, rest, M)
    for n0, n1, r0, r1 in ((0, 20, 0, 70), (40, 90, 30, 70), (89, 90, 7, 8)):
        part = np.empty((n1 - n0, r1 - r0), np.float32)
        _core.gauge_f32(isa, part, X, row[n0:n1], own[r0:r1], rest, M[r0:r1])
        assert (part == whole[n0:n1, r0:r1]).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("accumulate", [False, True])
def test_small_gradients(isa, accumulate):
    rng = np.random.default_rng(15)
    start = 2.0 if accumulate else np.nan
    for (N, r, k), taken in itertools.product(GAUGE, (False, True)):
        y, x = draw(rng, "f32", N, r, 3), draw(rng, "f32", N, k, 5)
        row = rng.integers(0, N, N) if taken and N else None
        w = Output(np.float32, r, k, start)
        _core.tn_f32(isa, w.view, y, x, row, accumulate)
        met = x if row is None else x[row]
        w.check(*expected(y.T, met, "nn", 2.0 if accumulate else 0.0, unit(np.float32)))


def test_refusals_of_rows_by_number():
    X, row = np.zeros((2, 3), np.float32), np.array([0, 2])
    own = np.array([1], np.int32)
    z = np.zeros((2, 1), np.float32)
    with pytest.raises(ArgumentError, match="row: expected numbers from 0 to 1"):
        _core.gauge_f32("ref", z, X, row, own, None, None)
    with pytest.raises(ShapeError, match="Z, X, row, own, rest, M: shapes do not fit"):
        _core.gauge_f32("ref", z[:1], X, row[:2] // 2, own, None, None)
    with pytest.raises(ShapeError, match="dW, dY, X, row: shapes do not fit"):
        _core.tn_f32("ref", z, X, X, None, False)


def test_which_rows_are_native():
    for isa in ISAS:
        assert _core.rows_f32_native(isa) == (isa != "ref")


def test_refusals():
    x = np.zeros((2, 3), np.float32)
    h = np.zeros((4, 3), np.uint16)
    y = np.zeros((2, 4), np.float32)
    with pytest.raises(ArgumentError, match="no product is called 'tn_f32'"):
        _core.stream("tn_f32", "ref", y, x, x, False)
    with pytest.raises(ArgumentError, match="'mmx' is not in this build or CPU"):
        _core.stream("nt_f32", "mmx", y, x, x, False)
    with pytest.raises(ArgumentError, match="W: expected an aligned matrix of another type"):
        _core.stream("nt_bf16", "ref", y, x, x, False)
    with pytest.raises(ShapeError, match="do not fit 'nn_bf16'"):
        _core.stream("nn_bf16", "ref", y, x, h, False)
    with pytest.raises(ArgumentError, match="X: expected contiguous rows"):
        _core.stream("nt_bf16", "ref", y, np.zeros((2, 6), np.float32)[:, ::2], h, False)
    with pytest.raises(ShapeError, match="do not fit 'nt'"):
        _core.rows_f32("nt", "ref", y, x, x, False)
    with pytest.raises(ArgumentError, match="layout: expected 'nt' or 'nn', got 'tt'"):
        _core.gemm_bf16("tt", "ref", y, h, h, False)
    with pytest.raises(ShapeError, match="do not fit 'nt'"):
        _core.gemm_bf16("nt", "ref", y, h, h, False)
