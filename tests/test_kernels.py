"""Every table of kernels against NumPy and ml_dtypes, bit by bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from molae import _core
from molae.errors import ArgumentError

ISAS = _core.build_info()["isas"]
SIZES = (0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 61, 127, 257)
EVERY = np.arange(65536, dtype=np.uint16)  # all patterns of 16 bits


def bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view({2: np.uint16, 4: np.uint32}[x.itemsize])


def same(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Equal bit by bit, where any NaN stands for any other."""
    nan = np.isnan(theirs)
    return bool(
        np.array_equal(np.isnan(ours), nan) and np.array_equal(bits(ours)[~nan], bits(theirs)[~nan])
    )


def hard_floats() -> np.ndarray:
    """float32 values at and beside each rounding boundary of both 16-bit types."""
    high = EVERY.astype(np.uint32) << 16
    ties = [high | low for low in (0x0000, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    f16 = EVERY.view(np.float16)[np.isfinite(EVERY.view(np.float16))].astype(np.float32)
    half = bits(f16)
    ties += [half, half + 0x0FFF, half + 0x1000, half + 0x1001]
    return np.concatenate(ties).view(np.float32)


def test_checker_rejects_one_bit():
    good = np.array([1.0, np.nan, 3.0], dtype=np.float32)
    bad = good.copy()
    bits(bad)  # a view of contiguous data
    bad.view(np.uint32)[2] ^= 1
    assert same(good, good)
    assert not same(bad, good)
    assert not same(np.array([1.0, 2.0, 3.0], np.float32), good)


@pytest.mark.parametrize("isa", ISAS)
class TestTables:
    def test_widen_bf16(self, isa):
        y, finite = _core.kernel("bf16_to_f32", isa, EVERY)
        with np.errstate(invalid="ignore"):
            want = EVERY.view(ml_dtypes.bfloat16).astype(np.float32)
        assert y.dtype == np.float32
        assert same(y, want)
        assert not finite

    def test_widen_f16(self, isa):
        y, finite = _core.kernel("f16_to_f32", isa, EVERY)
        with np.errstate(invalid="ignore"):
            want = EVERY.view(np.float16).astype(np.float32)
        assert same(y, want)
        assert not finite

    def test_narrow_bf16(self, isa):
        x = hard_floats()
        y = _core.kernel("f32_to_bf16", isa, x).view(ml_dtypes.bfloat16)
        with np.errstate(invalid="ignore", over="ignore"):
            want = x.astype(ml_dtypes.bfloat16)
        assert same(y, want)

    def test_narrow_f16(self, isa):
        x = hard_floats()
        y = _core.kernel("f32_to_f16", isa, x).view(np.float16)
        with np.errstate(invalid="ignore", over="ignore"):
            want = x.astype(np.float16)
        assert same(y, want)

    @pytest.mark.parametrize("name", ["bf16_to_f32", "f16_to_f32"])
    @pytest.mark.parametrize("n", SIZES)
    def test_sizes_and_bad_values(self, isa, name, n):
        kind = ml_dtypes.bfloat16 if name == "bf16_to_f32" else np.float16
        x = np.linspace(-3, 3, n, dtype=np.float32).astype(kind)
        y, finite = _core.kernel(name, isa, x.view(np.uint16))
        assert finite
        assert same(y, x.astype(np.float32))
        for i in range(n):
            for value in (np.nan, np.inf, -np.inf):
                bad = x.copy()
                bad[i] = value
                assert not _core.kernel(name, isa, bad.view(np.uint16))[1]

    @pytest.mark.parametrize("n", SIZES)
    def test_checked_copy(self, isa, n):
        x = np.linspace(-3, 3, n, dtype=np.float32)
        y, finite = _core.kernel("f32_check", isa, x)
        assert finite
        assert same(y, x)
        for i in range(n):
            bad = x.copy()
            bad[i] = np.inf if i % 2 else np.nan
            y, finite = _core.kernel("f32_check", isa, bad)
            assert not finite
            assert same(y, bad)

    @pytest.mark.parametrize("n", SIZES)
    def test_narrowing_sizes(self, isa, n, rng):
        x = rng.standard_normal(n).astype(np.float32)
        assert same(
            _core.kernel("f32_to_bf16", isa, x).view(ml_dtypes.bfloat16),
            x.astype(ml_dtypes.bfloat16),
        )
        assert same(_core.kernel("f32_to_f16", isa, x).view(np.float16), x.astype(np.float16))

    @pytest.mark.parametrize("n", SIZES)
    def test_sum_of_squares(self, isa, n, rng):
        x = rng.standard_normal(n).astype(np.float32)
        # The order of additions is part of the contract: 16 partial sums, folded in halves.
        padded = np.zeros(-(-n // 16) * 16 or 16)
        padded[:n] = x.astype(np.float64) ** 2
        lanes = np.zeros(16)
        for row in padded.reshape(-1, 16):
            lanes = lanes + row
        for half in (8, 4, 2, 1):
            lanes = lanes[:half] + lanes[half : 2 * half]
        assert _core.kernel("f32_sumsq", isa, x) == lanes[0]

    def test_sum_of_squares_does_not_overflow(self, isa):
        x = np.full(33, np.finfo(np.float32).max)
        assert np.isfinite(_core.kernel("f32_sumsq", isa, x))
        assert np.isnan(_core.kernel("f32_sumsq", isa, np.array([1.0, np.nan], np.float32)))

    def test_unaligned_and_strided_arrays(self, isa):
        raw = np.arange(4 * 40 + 1, dtype=np.uint8)
        x = raw[1:].view(np.float32)
        y, _ = _core.kernel("f32_check", isa, x)
        assert same(y, x)
        z = np.arange(60, dtype=np.float32)[::3]
        assert same(_core.kernel("f32_check", isa, z)[0], z)


def test_refusals():
    x = np.zeros(3, np.float32)
    with pytest.raises(ArgumentError, match="no kernel is called 'f32_to_f8'"):
        _core.kernel("f32_to_f8", "ref", x)
    with pytest.raises(ArgumentError, match="'mmx' is not in this build or CPU"):
        _core.kernel("f32_check", "mmx", x)
    with pytest.raises(ArgumentError, match="wrong type"):
        _core.kernel("bf16_to_f32", "ref", x)


@pytest.mark.parametrize(
    ("disabled", "allowed"),
    [
        ("amx", {"ref", "avx2", "avx512", "avx512bf16"}),
        ("avx512bf16", {"ref", "avx2", "avx512"}),
        ("avx512", {"ref", "avx2"}),
        ("avx2", {"ref"}),  # and with it what is built on it
        ("avx2, avx512", {"ref"}),
    ],
)
def test_disable_isa(python, disabled, allowed):
    code = "import molae; print(molae.show_config('dict')['kernels']['isa'])"
    assert python(code, MOLAE_DISABLE_ISA=disabled).strip() in allowed


def test_best_table_is_used(python):
    code = "import molae; print(molae.show_config('dict')['kernels']['isa'])"
    assert python(code).strip() == ISAS[-1]
