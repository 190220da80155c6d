"""Read the header of one safetensors file, trusting nothing in it."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from molae.errors import CheckpointError
from molae.io.dtypes import DTYPES

__all__ = ["FileHeader", "TensorInfo", "object_without_repeats", "parse_json", "read_header"]

# The limit of the reference reader.
_MAX_HEADER = 100_000_000
# Objects and lists within each other, in any JSON that is read.
_DEEPEST = 64
# More than any model's tensors have; NumPy 1 stops here too.
_MAX_AXES = 32
_AGAIN = "copy or download the file again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes
    ----------
    name : str
    dtype : str
        The format's name of the type, such as ``"BF16"``.
    shape : tuple of int
    file : str
        Name of the file in the checkpoint's folder.
    offset : int
        First byte, counted from the start of the file.
    nbytes : int
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class FileHeader:
    """What one file holds, and enough to tell whether it has changed since."""

    file: str
    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str]
    size: int
    mtime_ns: int
    sha256: str


class RepeatedKey(ValueError):
    """A JSON object has a key twice."""


def object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Hook for `json.loads` that refuses an object with a key twice."""
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise RepeatedKey(key)
        seen[key] = value
    return seen


def parse_json(raw: bytes | str, *, repeats: bool = True) -> Any:
    """`json.loads` of a text that nobody vouches for.

    Raises
    ------
    RepeatedKey
        An object has a key twice, where `repeats` is False.
    ValueError
        No JSON, or nested so deeply that to go through it would exhaust the stack.
    """
    try:
        value = json.loads(raw, object_pairs_hook=None if repeats else object_without_repeats)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [value]
    for _ in range(_DEEPEST):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return value
    raise ValueError("nested too deeply")


def _inside(value: Any) -> Iterable[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [x for x in inner if isinstance(x, (dict, list))]


def read_header(path: Path, file: str) -> FileHeader:
    """Check a safetensors file and read its header.

    Parameters
    ----------
    path : Path
        The file.
    file : str
        The name to give it in facts and messages.

    Raises
    ------
    CheckpointError
        The file is missing, empty, truncated, longer than its header says, or its header is
        no valid header.

    Notes
    -----
    No more than the header is read, and not before its length was compared with the file's.
    """
    try:
        with open(path, "rb") as f:
            stat = os.fstat(f.fileno())
            raw = _header_bytes(f.read(8), f, stat.st_size, file)
        # The library decides what is valid: offsets, overlaps, sizes, types.
        with safe_open(path, framework="np"):
            pass
        parsed = parse_json(raw, repeats=False)
        infos = _tensors(parsed, file, 8 + len(raw))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: the file is missing from {path.parent}; {_AGAIN}") from None
    except OSError as e:
        raise CheckpointError(f"{file}: cannot be read: {e.strerror or e}") from e
    except RepeatedKey as e:
        raise CheckpointError(
            f"{file}: the header has {e.args[0]!r} twice, so it is unclear which one is meant; "
            f"write the file anew with the safetensors library"
        ) from None
    except SafetensorError as e:
        raise CheckpointError(_explain(e, raw, stat.st_size, file)) from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{file}: the header cannot be understood ({e}); {_AGAIN}") from e
    return FileHeader(
        file,
        infos,
        dict(parsed.get("__metadata__") or {}),
        stat.st_size,
        stat.st_mtime_ns,
        hashlib.sha256(raw).hexdigest(),
    )


def _header_bytes(prefix: bytes, f: Any, size: int, file: str) -> bytes:
    if size < 8:
        what = "is empty" if size == 0 else f"has {size} bytes, less than a header's length field"
        raise CheckpointError(f"{file}: the file {what}; {_AGAIN}")
    (n,) = struct.unpack("<Q", prefix)
    if n > _MAX_HEADER:
        raise CheckpointError(
            f"{file}: the header claims {n} bytes, more than the {_MAX_HEADER} allowed: "
            f"no safetensors file, or a damaged one; {_AGAIN}"
        )
    if n > size - 8:
        raise CheckpointError(
            f"{file}: truncated: the header claims {n} bytes, the file has {size - 8} "
            f"after the length field; {_AGAIN}"
        )
    raw: bytes = f.read(n)
    if len(raw) != n:
        raise CheckpointError(f"{file}: truncated while it was read; {_AGAIN}")
    return raw


def _tensors(parsed: Any, file: str, start: int) -> tuple[TensorInfo, ...]:
    infos = []
    for name, entry in parsed.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        # What the library refuses comes here too, to be explained: no product of huge numbers.
        if len(shape) > _MAX_AXES or not all(0 <= n < 1 << 63 for n in shape):
            raise ValueError(f"{name!r} has a shape that no tensor has")
        info = TensorInfo(name, entry["dtype"], shape, file, start + begin, end - begin)
        # Cheap, and views are made by these numbers: never rely on another parser alone.
        if info.nbytes != DTYPES[info.dtype].nbytes(info.size):
            raise ValueError(f"{name!r} has {info.nbytes} bytes for shape {list(shape)}")
        infos.append(info)
    return tuple(sorted(infos, key=lambda t: (t.offset, t.nbytes)))


def _explain(e: SafetensorError, raw: bytes, size: int, file: str) -> str:
    """Say what is wrong in terms of the file, where its header is readable."""
    text = str(e).removeprefix("Error while deserializing header: ")
    try:
        tensors = _tensors(parse_json(raw), file, 8 + len(raw))
        wanted = max((t.offset + t.nbytes for t in tensors), default=8 + len(raw))
    except (ValueError, KeyError, TypeError, AttributeError):
        wanted = size
    if wanted > size:
        return f"{file}: truncated: its header promises {wanted} bytes, it has {size}; {_AGAIN}"
    if wanted < size:
        return f"{file}: {size - wanted} bytes more than its header describes; {_AGAIN}"
    return f"{file}: not a valid safetensors file ({text}); {_AGAIN}"
