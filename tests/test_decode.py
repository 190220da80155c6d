"""molae.ops.decode_fp8 and decode_mxfp4 against definitions in exact arithmetic."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from ref import decode as ref

from molae import ops, threads
from molae.errors import ArgumentError, NonFiniteError, ShapeError

BF16 = ml_dtypes.bfloat16
FINITE = np.array([b for b in range(256) if b % 128 != 127], np.uint8)


def bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16 if array.dtype.itemsize == 2 else np.uint32)


def random_fp8(rng, rows, cols, block):
    weight = rng.choice(FINITE, (rows, cols))
    shape = -(-rows // block[0]), -(-cols // block[1])
    return weight, np.exp(rng.standard_normal(shape) * 3).astype(np.float32)


# ------------------------------------------------------------------- frozen


def test_fp8_by_hand():
    # 1.125 = 0 0111 001, the largest 448 = 0 1111 110, the least normal 2^-6, subnormals of 2^-9.
    weight = np.array([[0x39, 0x7E, 0x08, 0x01, 0x87], [0x80, 0x00, 0xB8, 0x38, 0xFE]], np.uint8)
    scale = np.array([[2.0, 0.5, 512.0]], np.float32)
    wanted = [[2.25, 896.0, 2**-7, 2**-10, -7.0], [-0.0, 0.0, -0.5, 0.5, -448.0 * 512]]
    found = ops.decode_fp8(weight, scale, (2, 2))
    assert found.tolist() == wanted
    assert np.signbit(found[1, 0])
    assert not np.signbit(found[1, 1])


def test_mxfp4_by_hand():
    blocks = np.zeros((1, 2, 16), np.uint8)
    # Low four bits first: 0 0.5, 1 1.5, 2 3, 4 6, then all of them negative.
    blocks[0, 0, :8] = 0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE
    blocks[0, 1, 15] = 0xF7  # the last two of the second group: 6 and -6
    found = ops.decode_mxfp4(blocks, np.array([[127, 124]], np.uint8))
    positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert found[0, :16].tolist() == positive + [-x for x in positive]
    assert found[0, 62:].tolist() == [0.75, -0.75]
    assert np.signbit(found[0, 8])
    assert not found[0, 16:62].any()


# ---------------------------------------------------------------- reference


def test_all_fp8_numbers():
    found = ops.decode_fp8(FINITE[None], np.ones((1, 1), np.float32), (1, 256))
    assert found[0].tolist() == [float(ref.e4m3(int(b))) for b in FINITE]


@pytest.mark.parametrize("block", [(128, 128), (2, 3), (1, 1), (64, 500)])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 7), (65, 129), (2, 300)])
def test_fp8(rows, cols, block):
    rng = np.random.default_rng(rows * cols + block[0])
    weight, scale = random_fp8(rng, rows, cols, block)
    wanted = ref.fp8(weight, scale, block)
    found = ops.decode_fp8(weight, scale, block)
    np.testing.assert_array_equal(bits(found), bits(wanted))
    narrow = ops.decode_fp8(weight.view(ml_dtypes.float8_e4m3fn), scale, block, dtype=BF16)
    np.testing.assert_array_equal(bits(narrow), ref.to_bf16(wanted))


@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (5, 3), (66, 9)])
def test_mxfp4(rows, groups):
    rng = np.random.default_rng(rows)
    blocks = rng.integers(0, 256, (rows, groups, 16), dtype=np.uint8)
    scales = rng.integers(0, 253, (rows, groups), dtype=np.uint8)
    scales[0, 0] = 0  # 2^-127: subnormal numbers
    wanted = ref.mxfp4(blocks, scales)
    for dtype in (np.float32, BF16):
        found = ops.decode_mxfp4(blocks, scales, dtype=dtype)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found.astype(np.float64), wanted)


def test_threads_and_strides():
    rng = np.random.default_rng(0)
    weight, scale = random_fp8(rng, 300, 200, (128, 128))
    blocks = rng.integers(0, 256, (300, 4, 16), dtype=np.uint8)
    scales = rng.integers(100, 150, (300, 4), dtype=np.uint8)
    one = ops.decode_fp8(weight, scale), ops.decode_mxfp4(blocks, scales)
    wide = np.zeros((300, 400), np.uint8)
    wide[:, ::2] = weight
    with threads.num_threads(3):
        more = ops.decode_fp8(wide[:, ::2], scale), ops.decode_mxfp4(blocks, scales)
    for a, b in zip(one, more, strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))


def test_inputs_stay_as_they_are_and_may_be_read_only():
    rng = np.random.default_rng(1)
    weight, scale = random_fp8(rng, 4, 5, (2, 2))
    before = weight.copy(), scale.copy()
    weight.flags.writeable = scale.flags.writeable = False
    ops.decode_fp8(weight, scale, (2, 2))
    np.testing.assert_array_equal(weight, before[0])
    np.testing.assert_array_equal(scale, before[1])


def test_nothing():
    empty = np.zeros((0, 5), np.uint8)
    assert ops.decode_fp8(empty, np.ones((0, 1), np.float32)).shape == (0, 5)
    none = np.zeros((3, 0, 16), np.uint8)
    assert ops.decode_mxfp4(none, np.zeros((3, 0), np.uint8)).shape == (3, 0)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_fp8_nan(byte, dtype):
    weight = np.zeros((200, 70), np.uint8)
    weight[150, 69] = weight[199, 0] = byte
    with threads.num_threads(2), pytest.raises(NonFiniteError) as caught:
        ops.decode_fp8(weight, np.ones((2, 1), np.float32), dtype=dtype)
    assert caught.value.info == 150 * 70 + 69


def test_a_scale_that_is_not_finite_or_too_large():
    weight = np.full((2, 2), 0x7E, np.uint8)
    for scale in (np.nan, np.inf, 1e38):
        with pytest.raises(NonFiniteError):
            ops.decode_fp8(weight, np.full((1, 1), scale, np.float32))
    # Just within float32, and beyond the largest bfloat16 when rounded.
    edge = np.full((1, 1), np.float32(np.finfo(np.float32).max / 448), np.float32)
    assert np.isfinite(ops.decode_fp8(weight, edge)).all()
    with pytest.raises(NonFiniteError):
        ops.decode_fp8(weight, edge, dtype=BF16)


def test_mxfp4_nan_and_overflow():
    blocks = np.zeros((2, 2, 16), np.uint8)
    scales = np.full((2, 2), 127, np.uint8)
    scales[1, 1] = 255
    with pytest.raises(NonFiniteError) as caught:
        ops.decode_mxfp4(blocks, scales)
    assert caught.value.info == 64 + 32
    scales[1, 1] = 254
    assert not ops.decode_mxfp4(blocks, scales).any()
    blocks[1, 1, 0] = 0x07  # 6 times 2^127
    with pytest.raises(NonFiniteError):
        ops.decode_mxfp4(blocks, scales)


def test_refusals():
    weight, scale = np.zeros((3, 5), np.uint8), np.ones((1, 1), np.float32)
    with pytest.raises(ShapeError, match="scale"):
        ops.decode_fp8(weight, scale, (2, 5))
    with pytest.raises(ArgumentError, match="scale: expected float32"):
        ops.decode_fp8(weight, scale.astype(np.float64))
    with pytest.raises(ArgumentError, match="block"):
        ops.decode_fp8(weight, scale, (0, 5))
    with pytest.raises(ShapeError, match="weight: expected 2 axes"):
        ops.decode_fp8(weight[0], scale)
    with pytest.raises(ArgumentError, match="weight: expected bytes"):
        ops.decode_fp8(weight.astype(np.int16), scale)
    with pytest.raises(ArgumentError, match="type|dtype"):
        ops.decode_fp8(weight, scale, dtype=np.float64)
    blocks, scales = np.zeros((2, 3, 16), np.uint8), np.zeros((2, 3), np.uint8)
    with pytest.raises(ShapeError, match="blocks"):
        ops.decode_mxfp4(blocks[:, :, :8], scales)
    with pytest.raises(ShapeError, match="scales"):
        ops.decode_mxfp4(blocks, scales[:1])
