"""Tensors that files hold in a few bits and scales, seen as the BF16 tensors they stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import ml_dtypes
import numpy as np

from molae.errors import CheckpointError, shorten
from molae.io.dtypes import DTYPES
from molae.io.header import TensorInfo
from molae.ops.decode import decode_fp8, decode_mxfp4

__all__ = ["ENCODINGS", "Encoded", "encoded_tensors"]

#: A tensor of FP8 has its scales under its own name and this.
SCALE = "_scale_inv"

#: A tensor of MXFP4 is two, under its name and these.
BLOCKS, SCALES = "_blocks", "_scales"

#: What scales of FP8 may be stored as; all of them are float32 numbers.
SCALE_TYPES = ("F32", "BF16", "F16", "F8_E8M0")

_AGAIN = "download the checkpoint again, or take the unquantized release"


@dataclass(frozen=True, slots=True)
class Encoded:
    """One such tensor.

    Attributes
    ----------
    info : TensorInfo
        What it stands for: BF16, with its shape and number of bytes.
    parts : tuple of TensorInfo
        What the files hold.
    decode : callable
        Gives a matrix (rows, cols) of bfloat16 from arrays of the parts; of tensors with an axis
        more, from those of one expert.
    columns : int
        Numbers of a row as the files hold it.
    """

    info: TensorInfo
    parts: tuple[TensorInfo, ...]
    decode: Callable[..., np.ndarray]
    columns: int


def encoded_tensors(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> dict[str, Encoded]:
    """The tensors that ``quantization_config`` says are encoded, by the names they stand for.

    Parameters
    ----------
    config : mapping
        As in ``config.json``.
    tensors : mapping of str to TensorInfo
        What the files hold.

    Returns
    -------
    dict of str to Encoded
        Empty where there is no ``quantization_config`` or one of another method.

    Raises
    ------
    CheckpointError
        A scale is missing, of another shape or type than its tensor needs, or the encoding is
        a kind that is not read; the message names the tensor or the entry.
    """
    quant = config.get("quantization_config")
    if not isinstance(quant, Mapping):
        return {}
    read = ENCODINGS.get(str(quant.get("quant_method")))
    return {} if read is None else read(quant, tensors)


# ----------------------------------------------------------------------- FP8


def _fp8(quant: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, Encoded]:
    block = _block(quant)
    found = {}
    for name, info in tensors.items():
        if info.dtype == "F8_E4M3":
            found[name] = _fp8_tensor(info, tensors.get(name + SCALE), block)
        elif info.dtype.startswith("F8_") and info.dtype != "F8_E8M0":
            raise CheckpointError(f"{name}: type {info.dtype}, FP8 is read as F8_E4M3 only")
    for name in tensors:
        if name.endswith(SCALE) and name.removesuffix(SCALE) not in found:
            raise CheckpointError(
                f"{name}: {name.removesuffix(SCALE)} is absent or not FP8; {_AGAIN}"
            )
    return found


def _block(quant: Mapping[str, Any]) -> tuple[int, int]:
    scheme, size = quant.get("activation_scheme", "dynamic"), quant.get("weight_block_size")
    where = "config.json: quantization_config"
    if scheme != "dynamic":
        raise CheckpointError(
            f"{where}.activation_scheme: {shorten(scheme)}, only 'dynamic' is read; "
            "dequantize to BF16 first"
        )
    if (
        not isinstance(size, list)
        or len(size) != 2
        or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in size)
    ):
        raise CheckpointError(
            f"{where}.weight_block_size: expected two whole numbers such as [128, 128], got "
            f"{shorten(size)}; dequantize to BF16 first"
        )
    return size[0], size[1]


def _fp8_tensor(info: TensorInfo, scale: TensorInfo | None, block: tuple[int, int]) -> Encoded:
    if scale is None:
        raise CheckpointError(f"{info.name}: FP8, and there is no {info.name}{SCALE}; {_AGAIN}")
    if len(info.shape) not in (2, 3):
        raise CheckpointError(f"{info.name}: FP8 of shape {info.shape}, only matrices are read")
    wanted = (
        *info.shape[:-2],
        *(-(-n // b) for n, b in zip(info.shape[-2:], block, strict=True)),
    )
    if scale.shape != wanted or scale.dtype not in SCALE_TYPES:
        raise CheckpointError(
            f"{scale.name}: expected shape {wanted} for {info.name} {info.shape} in blocks of "
            f"{block}, of {' or '.join(SCALE_TYPES)}, got {scale.dtype} of shape {scale.shape}; "
            f"{_AGAIN}"
        )

    def decode(weight: np.ndarray, scales: np.ndarray) -> np.ndarray:
        wide = scales.astype(np.float32)
        return decode_fp8(weight, wide, block, dtype=ml_dtypes.bfloat16)

    own = _stands_for(info, info.name, info.shape)
    return Encoded(own, (info, scale), decode, info.shape[-1])


# --------------------------------------------------------------------- MXFP4


def _mxfp4(quant: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, Encoded]:
    found = {}
    for name, info in tensors.items():
        if name.endswith(BLOCKS):
            own = name.removesuffix(BLOCKS)
            found[own] = _mxfp4_tensor(own, info, tensors.get(own + SCALES))
        elif name.endswith(SCALES) and name.removesuffix(SCALES) + BLOCKS not in tensors:
            raise CheckpointError(
                f"{name}: scales without {name.removesuffix(SCALES)}{BLOCKS}; {_AGAIN}"
            )
    return found


def _mxfp4_tensor(name: str, blocks: TensorInfo, scales: TensorInfo | None) -> Encoded:
    if scales is None:
        raise CheckpointError(f"{blocks.name}: MXFP4, and there is no {name}{SCALES}; {_AGAIN}")
    if len(blocks.shape) != 4 or blocks.shape[-1] != 16 or blocks.dtype != "U8":
        raise CheckpointError(
            f"{blocks.name}: expected U8 of shape (E, rows, groups, 16), got {blocks.dtype} of "
            f"shape {blocks.shape}; {_AGAIN}"
        )
    if scales.shape != blocks.shape[:-1] or scales.dtype != "U8":
        raise CheckpointError(
            f"{scales.name}: expected U8 of shape {blocks.shape[:-1]} for {blocks.name}, got "
            f"{scales.dtype} of shape {scales.shape}; {_AGAIN}"
        )
    experts, rows, groups, _ = blocks.shape

    def decode(own: np.ndarray, powers: np.ndarray) -> np.ndarray:
        # Rows are outputs, and the tensor they stand for has them last.
        return decode_mxfp4(own, powers, dtype=ml_dtypes.bfloat16).T

    info = _stands_for(blocks, name, (experts, 32 * groups, rows))
    return Encoded(info, (blocks, scales), decode, 32 * groups)


def _stands_for(stored: TensorInfo, name: str, shape: tuple[int, ...]) -> TensorInfo:
    nbytes = DTYPES["BF16"].nbytes(prod(shape))
    return TensorInfo(name, "BF16", shape, stored.file, stored.offset, nbytes)


#: What is read, by ``quant_method``.
ENCODINGS: Mapping[
    str, Callable[[Mapping[str, Any], Mapping[str, TensorInfo]], dict[str, Encoded]]
] = {"fp8": _fp8, "mxfp4": _mxfp4}
