"""The folder a result goes to: who may write there, and what may be replaced."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from molae.convert.journal import JOURNAL, Journal, differences
from molae.convert.report import PAGE, REPORT
from molae.errors import DestinationError, MolaeError
from molae.io import parse_json
from molae.io.writer import PART, destination_error

__all__ = [
    "LOCK",
    "WORKERS",
    "apart_name",
    "check_apart",
    "check_usable",
    "locked",
    "named_troubles",
    "prepare",
    "sweep_apart",
]

LOCK = ".molae-lock"

#: Is there while other processes compute for a run, and says which run that is.
WORKERS = ".molae-workers"

#: The end of the name of a file that one of them writes.
_APART = re.compile(r"\.[0-9a-f]{12}-[0-9]+$")


def apart_name(file: str, run: str, number: int) -> str:
    """What a file is called while a worker writes it: no two tries have the same name.

    Parameters
    ----------
    file : str
    run : str
        Twelve hexadecimal digits.
    number : int
        Of the try.
    """
    return f"{file}.{run}-{number}"


def sweep_apart(dst: Path) -> None:
    """Remove what workers have left: files of tries whose results nobody took."""
    for path in dst.iterdir():
        if _APART.search(path.name.removesuffix(PART)):
            path.unlink(missing_ok=True)


def check_apart(src: Path, dst: Path) -> None:
    """Refuse a destination that is the source, lies in it, or holds it.

    Raises
    ------
    DestinationError
    """
    src, dst = src.resolve(), dst.resolve()
    for outer, inner, what in (
        (src, dst, "lies inside the source"),
        (dst, src, "holds the source"),
    ):
        if inner == outer:
            raise DestinationError(f"{dst}: is the source itself; choose another folder")
        if inner.is_relative_to(outer):
            raise DestinationError(f"{dst}: {what} {src}; choose a folder beside it")


@contextlib.contextmanager
def locked(dst: Path) -> Iterator[None]:
    """Hold the destination's lock; the system gives it back even after a kill.

    Raises
    ------
    DestinationError
        Another run holds it, or the folder cannot be made.
    """
    try:
        dst.mkdir(parents=True, exist_ok=True)
        descriptor = _take_lock(dst / LOCK)
    except OSError as error:
        if isinstance(error, DestinationError):
            raise
        raise DestinationError(
            f"{dst}: cannot be written to ({error.strerror or error}); "
            "choose a folder in which you may create files"
        ) from error
    try:
        yield
    finally:
        # Removed while held, so that nobody can lock a file that is about to vanish. One that
        # cannot be removed is no lock any more once it is closed, and hides no other trouble.
        with contextlib.suppress(OSError):
            (dst / LOCK).unlink(missing_ok=True)
        os.close(descriptor)


@contextlib.contextmanager
def named_troubles(dst: Path) -> Iterator[None]:
    """What the system refuses is told as an error of molae's that names the file."""
    try:
        yield
    except OSError as error:
        if isinstance(error, MolaeError):
            raise
        raise destination_error(error, Path(error.filename or dst)) from error


def _take_lock(path: Path) -> int:
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(path, flags, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise DestinationError(
                f"{path.parent}: another run is writing there; wait for it or stop it first"
            ) from None
        os.close(descriptor)  # the holder before us removed the file: try again


def check_usable(dst: Path, *, overwrite: bool) -> set[str]:
    """Refuse a folder that holds a finished result, or files that molae did not write.

    Returns
    -------
    set of str
        The files below `dst` that are molae's own.

    Raises
    ------
    DestinationError
    """
    if dst.exists() and not dst.is_dir():
        raise DestinationError(f"{dst}: is a file; choose a folder")
    journal = Journal(dst)
    present = _files_below(dst)
    names = _own_names(dst, journal)
    own = {n for n in present if n in names or _APART.sub("", n.removesuffix(PART)) in names}
    if foreign := sorted(present - own):
        raise DestinationError(
            f"{dst}: not empty: holds {_some(foreign)}, which molae did not write; "
            "choose an empty folder"
        )
    if journal.header is None and REPORT in own and not overwrite:
        raise DestinationError(
            f"{dst}: holds a finished result; replace it with --overwrite, or choose another folder"
        )
    return own


def prepare(dst: Path, header: dict[str, Any], *, overwrite: bool, needed: int) -> Journal:
    """Decide whether the folder can be used, and return its journal, ready to be added to.

    An empty folder starts afresh. An unfinished run with the same header goes on: its
    finished shards stay if they are still whole. Anything else needs `overwrite`, which
    removes what molae wrote and nothing else.

    Parameters
    ----------
    dst : Path
        An existing folder whose lock is held.
    header : dict
        What the run is; ``header["files"]`` names all that it will write.
    overwrite : bool
    needed : int
        Bytes of the whole result.

    Raises
    ------
    DestinationError
        The folder holds something else, a finished result, or the beginning of a
        different run, or its disk is too small; the message says what and what to do.
    """
    own = check_usable(dst, overwrite=overwrite)
    journal = Journal(dst)
    differing = differences(journal.header, header) if journal.header is not None else []
    if differing and not overwrite:
        raise DestinationError(
            f"{dst}: holds an unfinished run that differs: {'; '.join(differing[:5])}. "
            "Run the same command as then to finish it, or start anew with --overwrite"
        )
    _check_room(dst, needed, sum(_size(dst / name) for name in own))
    if journal.header is not None and not differing:
        _keep_finished(dst, journal, own)
    else:
        _remove(dst, own)
        journal.start(header)
    return journal


def _files_below(dst: Path) -> set[str]:
    return {
        path.relative_to(dst).as_posix()
        for path in dst.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }


def _own_names(dst: Path, journal: Journal) -> set[str]:
    """Names that a run of molae wrote or may have been writing."""
    names = {LOCK, JOURNAL, WORKERS} | _reported_names(dst / REPORT)
    if journal.header is not None:
        names |= set(journal.header.get("files", ()))  # a list of texts, `Journal` saw to it
    return names | {name + PART for name in names}


def _reported_names(path: Path) -> set[str]:
    try:
        report = parse_json(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError):
        return set()
    if not isinstance(report, dict) or not report.get("molae_report"):
        return set()
    files = report.get("files")
    return {REPORT, PAGE, *files} if isinstance(files, dict) else set()


def _check_room(dst: Path, needed: int, own: int) -> None:
    free = shutil.disk_usage(dst).free + own
    if free < needed:
        raise DestinationError(
            f"{dst}: the result needs {needed:,} bytes and {free:,} are free; "
            f"free {needed - free:,} more or choose another disk"
        )


def _keep_finished(dst: Path, journal: Journal, own: set[str]) -> None:
    for name, whole in list(journal.verify()):
        if not whole:
            journal.forget(name)
    for name in own:
        if name.endswith(PART) or _APART.search(name) or name == WORKERS:
            (dst / name).unlink(missing_ok=True)


def _remove(dst: Path, own: set[str]) -> None:
    """Remove a run's files, those last that say whose the others are."""
    last = (REPORT, JOURNAL)
    ordered = sorted(own - {LOCK, *last}) + [name for name in last if name in own]
    for name in ordered:
        (dst / name).unlink(missing_ok=True)
        for folder in Path(name).parents[:-1]:
            with contextlib.suppress(OSError):  # not empty yet
                (dst / folder).rmdir()


def _size(path: Path) -> int:
    """0 where it is gone: a worker of an interrupted run removes what it no longer needs."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
