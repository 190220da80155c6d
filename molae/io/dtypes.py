"""The types of the safetensors format, and the NumPy types they are read as."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from molae.errors import CheckpointError, shorten

__all__ = [
    "COMPUTABLE",
    "DTYPES",
    "FLOATING",
    "DType",
    "config_dtype",
    "dtype_name",
    "numpy_dtype",
]


@dataclass(frozen=True, slots=True)
class DType:
    """One type of the format.

    Attributes
    ----------
    name : str
        The format's name, such as ``"BF16"``.
    bits : int
        Bits an element.
    numpy : numpy.dtype or None
        Little-endian NumPy type of the same bits; None where NumPy has none (the types of
        less than a byte), whose tensors can be copied but not computed with.
    """

    name: str
    bits: int
    numpy: np.dtype | None

    @property
    def itemsize(self) -> int:
        """Bytes an element, at least 1 (the types of less than a byte are packed)."""
        return max(1, self.bits // 8)

    def nbytes(self, count: int) -> int:
        """Bytes of `count` elements."""
        return (count * self.bits + 7) // 8


def _entry(name: str, bits: int, numpy: str | None = None) -> DType:
    # Older versions of ml_dtypes lack some of the small types.
    kind = getattr(ml_dtypes, numpy, None) if numpy and len(numpy) > 3 else numpy
    return DType(name, bits, None if kind is None else np.dtype(kind))


DTYPES: dict[str, DType] = {
    d.name: d
    for d in (
        _entry("BOOL", 8, "?"),
        _entry("F4", 4),
        _entry("F6_E2M3", 6),
        _entry("F6_E3M2", 6),
        _entry("U8", 8, "u1"),
        _entry("I8", 8, "i1"),
        _entry("F8_E5M2", 8, "float8_e5m2"),
        _entry("F8_E4M3", 8, "float8_e4m3fn"),
        _entry("F8_E8M0", 8, "float8_e8m0fnu"),
        _entry("F8_E4M3FNUZ", 8, "float8_e4m3fnuz"),
        _entry("F8_E5M2FNUZ", 8, "float8_e5m2fnuz"),
        _entry("I16", 16, "<i2"),
        _entry("U16", 16, "<u2"),
        _entry("F16", 16, "<f2"),
        _entry("BF16", 16, "bfloat16"),
        _entry("I32", 32, "<i4"),
        _entry("U32", 32, "<u4"),
        _entry("F32", 32, "<f4"),
        _entry("C64", 64, "<c8"),
        _entry("F64", 64, "<f8"),
        _entry("I64", 64, "<i8"),
        _entry("U64", 64, "<u8"),
    )
}
"""Every type of the format, by its name."""

COMPUTABLE = ("F32", "F16", "BF16")
"""The types experts may have; tensors of any other type are only copied."""

FLOATING = frozenset(n for n in DTYPES if n == "BF16" or n.startswith("F"))
"""The types whose elements count as parameters."""

_CONFIG_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
_NAMES = {d.numpy: d.name for d in DTYPES.values() if d.numpy is not None}


def numpy_dtype(name: str) -> np.dtype:
    """NumPy type of the format's type `name`.

    Raises
    ------
    CheckpointError
        The format has no such type, or NumPy has none for it.
    """
    entry = DTYPES.get(name)
    if entry is None:
        raise CheckpointError(f"dtype {name!r} is unknown; known are {', '.join(DTYPES)}")
    if entry.numpy is None:
        raise CheckpointError(f"dtype {name} has no NumPy type; its tensors can only be copied")
    return entry.numpy


def dtype_name(dtype: np.dtype | type) -> str:
    """Name the format gives to a NumPy type.

    Raises
    ------
    CheckpointError
        The format cannot hold that type (big-endian types included).
    """
    name = _NAMES.get(np.dtype(dtype))
    if name is None:
        raise CheckpointError(f"NumPy type {np.dtype(dtype)} cannot be stored in safetensors")
    return name


def config_dtype(config: Mapping[str, Any]) -> str | None:
    """The type that a ``config.json``, or its ``text_config``, says of the weights; None where it
    says none.

    Raises
    ------
    CheckpointError
        It is none of those that models are kept in.
    """
    text = config.get("text_config")
    for own in (config, text if isinstance(text, Mapping) else {}):
        written = own.get("dtype") or own.get("torch_dtype")
        if written:
            if not isinstance(written, str) or written not in _CONFIG_NAMES:
                raise CheckpointError(
                    f"config.json: type {shorten(written)} is unknown; "
                    f"known are {', '.join(_CONFIG_NAMES)}"
                )
            return _CONFIG_NAMES[written]
    return None
