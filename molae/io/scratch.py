"""What lies on a disk for the time of a run: a folder, and arrays in mapped files."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from molae.errors import ArgumentError

__all__ = ["scratch_array", "scratch_folder"]


@contextlib.contextmanager
def scratch_folder(prefix: str, parent: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """A new folder that is removed at the end.

    Parameters
    ----------
    prefix : str
        What its name begins with.
    parent : path, optional
        Where it is made; by default the system's folder for temporary files.

    Raises
    ------
    ArgumentError
        It cannot be made.
    """
    parent = Path(parent or tempfile.gettempdir())
    try:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    except OSError as error:
        raise ArgumentError(
            f"{parent}: no temporary files can be made here: {error.strerror}; name another folder"
        ) from error
    try:
        yield folder
    finally:
        # What cannot be removed is in nobody's way, and must hide no other trouble.
        shutil.rmtree(folder, ignore_errors=True)


def scratch_array(path: Path, shape: tuple[int, ...]) -> np.memmap[Any, np.dtype[np.float32]]:
    """Room for float32 numbers in a file of a `scratch_folder`, for which there is space.

    A file of that name is not written over: who has mapped it keeps what is in it.

    Raises
    ------
    ArgumentError
        The disk is full, or refuses.
    """
    nbytes = 4 * math.prod(shape)
    try:
        path.unlink(missing_ok=True)
        with open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)
        return np.memmap(path, dtype=np.float32, mode="r+", shape=shape)
    except OSError as error:
        raise ArgumentError(
            f"no room for {nbytes / 1e9:.1f} GB of temporary files in {path.parent.parent}: "
            f"{error.strerror}; name another folder, or take fewer sequences"
        ) from error
