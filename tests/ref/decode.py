"""Weights of a few bits by their definitions, number by number in exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np


def e4m3(byte: int) -> Fraction | None:
    """FP8 e4m3 without infinities; None for NaN."""
    sign = -1 if byte >= 128 else 1
    exponent, mantissa = divmod(byte % 128, 8)
    if (exponent, mantissa) == (15, 7):
        return None
    if exponent == 0:
        return sign * Fraction(mantissa, 8) / 2**6
    return sign * (1 + Fraction(mantissa, 8)) * Fraction(2) ** (exponent - 7)


def fp8(weight: np.ndarray, scale: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """float32: each product rounded once."""
    out = np.empty(weight.shape, np.float32)
    for (i, j), byte in np.ndenumerate(weight):
        value = e4m3(int(byte))
        own = np.float32(scale[i // block[0], j // block[1]])
        if value is None:
            out[i, j] = np.nan
        else:  # a fraction has no negative zero
            out[i, j] = np.float32(-1 if byte >= 128 else 1) * (np.float32(abs(value)) * own)
    return out


def e2m1(bits: int) -> Fraction:
    """FP4: a sign, two bits of exponent with bias 1, one of mantissa."""
    sign = -1 if bits >= 8 else 1
    exponent, mantissa = divmod(bits % 8, 2)
    if exponent == 0:
        return sign * Fraction(mantissa, 2)
    return sign * (1 + Fraction(mantissa, 2)) * Fraction(2) ** (exponent - 1)


def mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float64 (rows, 32 groups)."""
    rows, groups, _ = blocks.shape
    out = np.empty((rows, groups, 32))
    for i in range(rows):
        for g in range(groups):
            power = Fraction(2) ** (int(scales[i, g]) - 127)
            for b in range(16):
                byte = int(blocks[i, g, b])
                for half, bits in enumerate((byte % 16, byte // 16)):
                    value = float(abs(e2m1(bits)) * power)
                    out[i, g, 2 * b + half] = -value if bits >= 8 else value  # and negative zero
    return out.reshape(rows, 32 * groups)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Bits of float32 numbers rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
