"""What the files of a quantized release take, by what its config says of them."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from molae.errors import CheckpointError, shorten
from molae.io import DTYPES, TensorInfo

__all__ = ["Packing", "find_packing"]

_NEVER = re.compile(r"(^|\.)(embed_tokens|embeddings|word_embeddings|lm_head|gate|router)\.weight$")
"""What no such release quantizes, whether its config says so or not."""


@dataclass(frozen=True)
class Packing:
    """How the weights of linear layers and experts are packed.

    Attributes
    ----------
    encoding : str
        'fp8', 'mxfp4' or 'int4'.
    experts_only : bool
        Whether all but the experts keeps its type.
    """

    encoding: str
    experts_only: bool
    _matrix: Callable[[int, int], int]
    _skipped: Callable[[str], bool]

    def matrix_bytes(self, rows: int, cols: int) -> int:
        """Bytes of one packed matrix, its scales included."""
        return self._matrix(rows, cols)

    def other_bytes(self, tensors: Mapping[str, TensorInfo]) -> int:
        """Bytes of the tensors that are no experts'."""
        total = 0
        for name, info in tensors.items():
            packed = (
                not self.experts_only
                and len(info.shape) == 2
                and name.endswith(".weight")
                and not _NEVER.search(name)
                and not self._skipped(name)
            )
            total += self._matrix(*info.shape[:2]) if packed else info.nbytes
        return total


def find_packing(config: Mapping[str, Any]) -> Packing | None:
    """How a config says that the files are quantized; None where they are not.

    Raises
    ------
    CheckpointError
        By a method whose bytes molae cannot tell; the message names it.
    """
    text = config.get("text_config")
    quant = config.get("quantization_config")
    if quant is None and isinstance(text, Mapping):
        quant = text.get("quantization_config")
    if not quant:
        return None
    method = quant.get("quant_method") if isinstance(quant, Mapping) else None
    if method == "molae":
        return None
    if method == "fp8":
        return _fp8(config, quant)
    if method == "mxfp4":
        return Packing("mxfp4", True, _groups(32, 1), lambda name: True)
    if method == "compressed-tensors" and (found := _compressed(quant)):
        return found
    raise CheckpointError(
        f"config.json: quantized by {shorten(method)}, of which molae does not know what the "
        "files take"
    )


def _fp8(config: Mapping[str, Any], quant: Mapping[str, Any]) -> Packing:
    block = quant.get("weight_block_size")
    if not (isinstance(block, Sequence) and len(block) == 2 and all(
        isinstance(n, int) and n > 0 for n in block
    )):  # fmt: skip
        raise CheckpointError(
            f"config.json: quantized to fp8 in blocks of {shorten(block)}, of which molae does not "
            "know what the files take"
        )
    if config.get("expert_dtype"):
        raise CheckpointError(
            f"config.json: quantized to fp8, and the experts to {config['expert_dtype']!r}, of "
            "which molae does not know what the files take"
        )
    high, wide = block
    scale = DTYPES["F32"].itemsize

    def matrix(rows: int, cols: int) -> int:
        return rows * cols + scale * -(-rows // high) * -(-cols // wide)

    return Packing("fp8", False, matrix, _skips(quant))


def _groups(size: int, scale: int) -> Callable[[int, int], int]:
    """Four bits a number, and for each group of a row a scale of so many bytes."""

    def matrix(rows: int, cols: int) -> int:
        return rows * (-(-cols // 2) + scale * -(-cols // size))

    return matrix


def _compressed(quant: Mapping[str, Any]) -> Packing | None:
    groups = quant.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        return None
    group = next(iter(groups.values()))
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        return None
    size, bits, kind = (weights.get(key) for key in ("group_size", "num_bits", "type"))
    if bits != 4 or not isinstance(size, int) or size < 1 or weights.get("strategy") != "group":
        return None
    if kind == "int":
        return Packing("int4", False, _groups(size, 2), _skips(quant))
    if kind == "float" and size == 32 and weights.get("scale_dtype") == "torch.uint8":
        return Packing("mxfp4", False, _groups(32, 1), _skips(quant))
    return None


def _skips(quant: Mapping[str, Any]) -> Callable[[str], bool]:
    """Whether a tensor belongs to a module that the config leaves as it is."""
    listed = quant.get("modules_to_not_convert") or quant.get("ignore") or []
    if not isinstance(listed, list) or not all(isinstance(x, str) for x in listed):
        raise CheckpointError(
            f"config.json: quantization_config leaves out {shorten(listed)}, expected a list of "
            "names"
        )
    plain = {x for x in listed if not x.startswith("re:") and "*" not in x}
    globs = [x for x in listed if "*" in x and not x.startswith("re:")]
    try:
        patterns = [re.compile(x[3:]) for x in listed if x.startswith("re:")]
    except re.error as error:
        raise CheckpointError(
            f"config.json: quantization_config leaves out {error.pattern!r}, no pattern: {error}"
        ) from error

    def skipped(name: str) -> bool:
        module = name.rpartition(".")[0]
        parts = module.split(".")
        starts = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
        return (
            bool(plain & (starts | set(parts)))
            or any(fnmatch.fnmatch(start, own) for own in globs for start in starts)
            or any(own.match(module) for own in patterns)
        )

    return skipped
