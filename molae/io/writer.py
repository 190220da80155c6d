"""Write safetensors files whose tensors arrive in any order, and never half a file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType

import numpy as np

from molae.errors import ArgumentError, CheckpointError, DestinationError
from molae.io.dtypes import DTYPES

__all__ = [
    "PART",
    "ShardWriter",
    "TensorSpec",
    "copy_file_atomic",
    "destination_error",
    "plan_bytes",
    "rename_durably",
    "write_all",
    "write_bytes_atomic",
    "write_text_atomic",
]

PART = ".part"
"""Ending of a file that is not finished."""

# Linux writes at most 2 GiB a call; smaller pieces let Ctrl-C through soon.
_PIECE = 1 << 26


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written.

    Attributes
    ----------
    name : str
    dtype : str
        The format's name of the type, such as ``"BF16"``.
    shape : tuple of int
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return DTYPES[self.dtype].nbytes(prod(self.shape))


def plan_bytes(specs: Iterable[TensorSpec]) -> int:
    """Size in bytes of the file that a `ShardWriter` makes of `specs`."""
    header, _, end = _layout(specs)
    return len(header) + end


class ShardWriter:
    """Write one safetensors file under a temporary name.

    The header is written at once; the tensors come in any order and from any thread.
    Until `finish` returns, the file is called ``<path>.part``, so a file under its own name
    is whole. As a context manager it removes the part unless `finish` was called.

    Parameters
    ----------
    path : path
        The file to make; one of that name is replaced by `finish`.
    specs : sequence of TensorSpec
        What the file holds. In the file, tensors stand by descending item size (so that each
        is aligned), then in the order given.

    Raises
    ------
    ArgumentError
        A name twice, an unknown type or a negative size.
    DestinationError
        The file cannot be created or the header cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], specs: Sequence[TensorSpec]) -> None:
        self.path = Path(path)
        header, offsets, end = _layout(specs)
        self.nbytes = len(header) + end
        self._specs = {s.name: s for s in specs}
        self._offsets = {n: len(header) + o for n, o in offsets.items()}
        self._part = self.path.with_name(self.path.name + PART)
        self._done = {s.name for s in specs if s.nbytes == 0}
        self._begun: set[str] = set(self._done)
        self._lock = threading.Lock()
        self._busy = 0
        self._fd = -1
        self._state = "new"
        with self._guard():
            # No O_EXCL: a part of a killed run is worthless and is written over.
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
            self._fd = os.open(self._part, flags, 0o666)
            self._state = "open"
            self._pwrite(memoryview(header), 0)

    def write(self, name: str, data: np.ndarray | bytes | bytearray | memoryview) -> None:
        """Write one tensor.

        Parameters
        ----------
        name : str
        data : ndarray or bytes-like
            An array of the tensor's shape and type, in any memory order (written in C
            order, no more than one contiguous piece at a time); or its bytes.

        Raises
        ------
        ArgumentError
            No such tensor, written before, another shape, type or number of bytes, or the
            writer is finished or aborted.
        DestinationError
            The disk is full or refuses; the part is removed.
        """
        spec = self._spec(name)
        if isinstance(data, np.ndarray):
            self._check(spec, data.dtype, data.shape)
            self._put(name, _pieces(data))
        else:
            view = memoryview(data)
            if view.nbytes != spec.nbytes:
                raise ArgumentError(f"{name}: expected {spec.nbytes} bytes, got {view.nbytes}")
            self._put(name, iter([view.cast("B")] if view.nbytes else []))

    def write_stack(self, name: str, arrays: Sequence[np.ndarray]) -> None:
        """Write the arrays one after the other as one tensor with a leading axis.

        The same as ``write(name, np.stack(arrays))`` without the copy.

        Parameters
        ----------
        name : str
        arrays : sequence of ndarray
            As many as the tensor's first axis is long, each of the shape of the rest. Each is
            asked for once and in order, so they may be computed on the way.

        Raises
        ------
        ArgumentError, DestinationError
            As `write`.
        """
        spec = self._spec(name)
        if not spec.shape or len(arrays) != spec.shape[0]:
            raise ArgumentError(f"{name}: got {len(arrays)} arrays for shape {list(spec.shape)}")

        def pieces() -> Iterator[memoryview]:
            for a in arrays:
                self._check(spec, a.dtype, (len(arrays), *a.shape))
                yield from _pieces(a)

        self._put(name, pieces())

    def finish(self) -> str:
        """Make the file durable and give it its name.

        Returns
        -------
        str
            SHA-256 of the whole file, read back after it was written.

        Raises
        ------
        ArgumentError
            A tensor was not written. The part stays open: write it, or abort.
        DestinationError
            The disk refuses; the part is removed.

        Notes
        -----
        The order is: sync the file, read it back, rename it, sync the folder. After a crash
        at any moment either the whole file is there or none of that name (or the earlier one).
        """
        with self._lock:
            if self._state != "open":
                raise ArgumentError(f"{self.path.name}: the writer is {self._state}")
            missing = [n for n in self._specs if n not in self._done]
            if missing:
                raise ArgumentError(
                    f"{self.path.name}: {len(missing)} tensors not written, first {missing[0]}"
                )
            self._state = "finishing"
        with self._guard():
            os.fsync(self._fd)
            digest = _digest(self._fd, self.nbytes)
            fd, self._fd = self._fd, -1
            os.close(fd)
            os.replace(self._part, self.path)
            self._state = "finished"
            _sync_folder(self.path.parent)
        return digest

    def abort(self) -> None:
        """Remove the part. Does nothing after `finish`, and nothing the second time."""
        with self._lock:
            if self._state not in ("finished", "aborted"):
                self._state = "aborted"
                self._close_if_idle()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort()

    def _spec(self, name: str) -> TensorSpec:
        spec = self._specs.get(name)
        if spec is None:
            raise ArgumentError(f"{name}: not planned for {self.path.name}")
        return spec

    def _check(self, spec: TensorSpec, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        if DTYPES[spec.dtype].numpy != dtype:
            raise ArgumentError(f"{spec.name}: expected type {spec.dtype}, got {dtype}")
        if tuple(spec.shape) != tuple(shape):
            raise ArgumentError(
                f"{spec.name}: expected shape {tuple(spec.shape)}, got {tuple(shape)}"
            )

    def _put(self, name: str, pieces: Iterator[memoryview]) -> None:
        with self._lock:
            if self._state != "open":
                raise ArgumentError(f"{self.path.name}: the writer is {self._state}")
            if name in self._begun and self._specs[name].nbytes:
                raise ArgumentError(f"{name}: written twice")
            self._begun.add(name)
            self._busy += 1
        try:
            with self._guard():
                offset = self._offsets[name]
                for piece in pieces:
                    self._pwrite(piece, offset)
                    offset += piece.nbytes
        except BaseException:
            with self._lock:
                self._begun.discard(name)  # half written: it may be written again
            raise
        finally:
            with self._lock:
                self._busy -= 1
                if self._state == "aborted":
                    self._close_if_idle()
        with self._lock:
            self._done.add(name)

    def _pwrite(self, data: memoryview, offset: int) -> None:
        # A write may be short: at a signal, a quota, or the system's own limit.
        while data.nbytes:
            n = os.pwrite(self._fd, data[:_PIECE], offset)
            if n <= 0:
                raise OSError(errno.EIO, "the system wrote nothing and gave no reason")
            data, offset = data[n:], offset + n

    def _close_if_idle(self) -> None:
        # The descriptor stays open while another thread writes: its number could be given to
        # another file in between, and that file would get our bytes.
        with contextlib.suppress(OSError):
            os.unlink(self._part)
        if self._busy == 0 and self._fd >= 0:
            fd, self._fd = self._fd, -1
            with contextlib.suppress(OSError):
                os.close(fd)

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            with self._lock:
                if self._state != "new":  # else the part, if there is one, is not ours
                    self._state = "aborted"
                    self._close_if_idle()
            raise destination_error(e, self.path, self.nbytes) from e


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file (UTF-8) that is at all times whole: the old one or the new one.

    Parameters
    ----------
    path : path
    text : str

    Raises
    ------
    DestinationError
        The disk is full or refuses; the old file stands.
    """
    write_bytes_atomic(path, text.encode("utf-8"))


def write_bytes_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """The same of bytes."""
    _atomically(Path(path), len(data), lambda fd: write_all(fd, data))


def copy_file_atomic(src: str | os.PathLike[str], dst: str | os.PathLike[str]) -> None:
    """Copy a file's contents; `dst` is at all times absent, the old file, or whole.

    Parameters
    ----------
    src, dst : path
        A link at `src` is followed.

    Raises
    ------
    CheckpointError
        `src` cannot be read.
    DestinationError
        The disk is full or refuses.
    """

    def unreadable(e: OSError) -> CheckpointError:
        return CheckpointError(f"{os.fspath(src)}: cannot be read: {e.strerror or e}")

    def copy(fd: int) -> None:
        while True:
            try:
                block = source.read(1 << 20)
            except OSError as e:
                raise unreadable(e) from e
            if not block:
                return
            write_all(fd, block)

    try:
        source = open(src, "rb")  # noqa: SIM115 (closed below; its errors are told apart)
    except OSError as e:
        raise unreadable(e) from e
    with source:
        _atomically(Path(dst), os.fstat(source.fileno()).st_size, copy)


def rename_durably(old: str | os.PathLike[str], new: str | os.PathLike[str]) -> None:
    """Give a file that is whole its name; an earlier one of that name is replaced.

    Parameters
    ----------
    old, new : path
        In one folder.

    Raises
    ------
    DestinationError
        The disk refuses.
    """
    new = Path(new)
    try:
        os.replace(old, new)
        _sync_folder(new.parent)
    except OSError as e:
        raise destination_error(e, new, 0) from e


def _layout(specs: Iterable[TensorSpec]) -> tuple[bytes, dict[str, int], int]:
    """Header with its length field, offset of each tensor's data, end of the data."""
    specs = list(specs)
    for s in specs:
        if s.dtype not in DTYPES:
            raise ArgumentError(f"{s.name}: unknown dtype {s.dtype!r}; known: {', '.join(DTYPES)}")
        if any(n < 0 for n in s.shape):
            raise ArgumentError(f"{s.name}: negative size in shape {list(s.shape)}")
    offsets: dict[str, int] = {}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for s in sorted(specs, key=lambda s: -DTYPES[s.dtype].itemsize):
        if s.name in header:
            raise ArgumentError(f"{s.name}: planned twice for one file")
        offsets[s.name] = end
        end += s.nbytes
        header[s.name] = {
            "dtype": s.dtype,
            "shape": [int(n) for n in s.shape],
            "data_offsets": [offsets[s.name], end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, offsets, end


def _pieces(a: np.ndarray) -> Iterator[memoryview]:
    """The bytes of `a` in C order, in contiguous pieces, copying one row at most."""
    if a.size == 0:
        return
    if a.flags.c_contiguous:
        yield a.reshape(-1).view(np.uint8).data
    elif a.ndim == 1:
        yield np.ascontiguousarray(a).view(np.uint8).data
    else:
        for row in a:
            yield from _pieces(row)


def _digest(fd: int, size: int) -> str:
    # The pages were just written, so this reads memory, at the speed of the hash.
    sha, at = hashlib.sha256(), 0
    while at < size:
        block = os.pread(fd, 1 << 22, at)
        if not block:
            raise OSError(errno.EIO, f"the file ends at {at} of {size} bytes")
        sha.update(block)
        at += len(block)
    return sha.hexdigest()


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data`; a single write may be short."""
    view = memoryview(data)
    while view.nbytes:
        n = os.write(fd, view)
        if n <= 0:
            raise OSError(errno.EIO, "the system wrote nothing and gave no reason")
        view = view[n:]


def _atomically(path: Path, size: int, fill: Callable[[int], None]) -> None:
    part = path.with_name(path.name + PART)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = -1
    try:
        fd = os.open(part, flags, 0o666)
        fill(fd)
        os.fsync(fd)
        os.close(fd)
        fd = -2
        os.replace(part, path)
        _sync_folder(path.parent)
    except BaseException as e:
        if fd >= 0:
            os.close(fd)
        if fd != -1:
            with contextlib.suppress(OSError):
                os.unlink(part)
        if isinstance(e, OSError):
            raise destination_error(e, path, size) from e
        raise


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as e:
        # Some network file systems cannot sync a folder; the file itself is synced.
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def destination_error(e: OSError, path: Path, size: int | None = None) -> DestinationError:
    """Say which file, what it needs, and what to do."""
    what = e.strerror or str(e)
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        try:
            free = f", {_bytes(shutil.disk_usage(path.parent).free)} are free"
        except OSError:
            free = ""
        what = "the quota is used up" if e.errno == errno.EDQUOT else "the disk is full"
        what += free if size is None else f": the file needs {_bytes(size)}{free}"
        remedy = "free space and run the same command again"
    elif e.errno == errno.EROFS:
        remedy = "choose a destination on a file system that can be written to"
    elif e.errno in (errno.EACCES, errno.EPERM):
        remedy = "give write permission on the folder, or choose another destination"
    elif e.errno == errno.EFBIG:
        what = f"the file system does not take a file of {_bytes(size or 0)}"
        remedy = "choose a destination on another file system"
    elif e.errno in (errno.ENOENT, errno.ENOTDIR):
        remedy = "make the folder first, or choose another destination"
    else:
        remedy = "check the disk and run the same command again"
    error = DestinationError(f"{path}: cannot be written: {what}; {remedy}")
    error.errno = e.errno
    return error


def _bytes(n: int) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB")):
        if n >= unit:
            return f"{n} bytes ({n / unit:.1f} {name})"
    return f"{n} bytes"
