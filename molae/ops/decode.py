"""Weights of a few bits as numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from molae import _core
from molae.errors import ArgumentError, ShapeError
from molae.threads import get_num_threads

__all__ = ["decode_fp8", "decode_mxfp4"]

Array = npt.NDArray[Any]


def decode_fp8(
    weight: Array,
    scale: Array,
    block: tuple[int, int] = (128, 128),
    *,
    dtype: npt.DTypeLike = np.float32,
) -> Array:
    """A matrix of FP8 numbers with one scale a block.

    ``out[i, j] = weight[i, j] · scale[i // block[0], j // block[1]]``, in float32.

    Parameters
    ----------
    weight : (rows, cols) ndarray of uint8, or of an 8-bit type such as ml_dtypes.float8_e4m3fn
        The bits of e4m3 numbers: a sign, 4 bits of exponent with bias 7, 3 of mantissa, no
        infinities.
    scale : (ceil(rows / block[0]), ceil(cols / block[1])) ndarray of float32
    block : (int, int)
        Rows and columns of a block; those at the end may be smaller.
    dtype : dtype
        Of the result: float32, or ml_dtypes.bfloat16, to which the product is rounded.

    Returns
    -------
    (rows, cols) ndarray of `dtype`

    Raises
    ------
    ShapeError, ArgumentError
        An argument is not as described.
    NonFiniteError
        A result is NaN or infinite; ``info`` is its place in the flat array.

    Notes
    -----
    One multiplication a number; 1 byte read and 4 or 2 written. Results do not depend on the
    number of threads.

    Examples
    --------
    >>> import numpy as np, molae
    >>> bits = np.array([[0x38, 0x3C, 0xC0]], np.uint8)       # 1, 1.5, -2
    >>> molae.ops.decode_fp8(bits, np.array([[2.0, 10.0]], np.float32), (1, 2))
    array([[  2.,   3., -20.]], dtype=float32)
    """
    bits = _bits("weight", weight, 2)
    out = np.empty(bits.shape, dtype)
    rows, cols = block
    given = np.ascontiguousarray(scale)
    _core.decode_fp8(out, bits, given, int(rows), int(cols), get_num_threads())
    return out


def decode_mxfp4(blocks: Array, scales: Array, *, dtype: npt.DTypeLike = np.float32) -> Array:
    """A matrix of MXFP4 numbers: FP4 e2m1 in groups of 32 with one power of two each.

    Parameters
    ----------
    blocks : (rows, groups, 16) ndarray of uint8
        Two numbers a byte, the low four bits first.
    scales : (rows, groups) ndarray of uint8
        Exponents with bias 127 (E8M0).
    dtype : dtype
        Of the result: float32 or ml_dtypes.bfloat16; both hold every number exactly.

    Returns
    -------
    (rows, 32 groups) ndarray of `dtype`

    Raises
    ------
    ShapeError, ArgumentError
        An argument is not as described.
    NonFiniteError
        A scale of 255, which is NaN, or a number that is too large; ``info`` is its place.

    Examples
    --------
    >>> import numpy as np, molae
    >>> blocks, scales = np.zeros((1, 1, 16), np.uint8), np.array([[128]], np.uint8)
    >>> blocks[0, 0, :2] = 0xA1, 0x07                          # 0.5 and -1, 6 and 0
    >>> molae.ops.decode_mxfp4(blocks, scales)[0, :4]
    array([ 1., -2., 12.,  0.], dtype=float32)
    """
    bits, powers = _bits("blocks", blocks, 3), _bits("scales", scales, 2)
    out = np.empty((bits.shape[0], 32 * bits.shape[1]), dtype)
    _core.decode_mxfp4(out, bits, powers, get_num_threads())
    return out


def _bits(name: str, array: Array, ndim: int) -> Array:
    """As bytes that C can read; a copy where the memory is strided."""
    array = np.asarray(array)
    if array.ndim != ndim:
        raise ShapeError(f"{name}: expected {ndim} axes, got shape {array.shape}")
    if array.dtype.itemsize != 1:
        raise ArgumentError(f"{name}: expected bytes, got {array.dtype}")
    return np.ascontiguousarray(array).view(np.uint8)
