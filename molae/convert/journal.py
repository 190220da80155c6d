"""The record of an unfinished run: what it was asked, and which shards are done.

``DST/.molae-journal.jsonl`` has one JSON object a line. The first says what the run
is: settings, source, versions. Each further line stands for one finished shard and is
synced to the disk before the next shard is finished, so that after a kill the same
command knows what it need not do again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from molae.convert.report import JOURNAL, is_row, is_worker
from molae.errors import DestinationError
from molae.io import parse_json, write_text_atomic
from molae.io.writer import destination_error, write_all

__all__ = ["JOURNAL", "Journal", "differences"]

_PLAIN = re.compile(r"\w[\w.-]*")


class Journal:
    """The journal of one destination.

    Attributes
    ----------
    header : dict or None
        The first line; None where there is no (whole) first line.
    shards : dict of str to dict
        The lines of finished shards, by file name.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / JOURNAL
        self.header: dict[str, Any] | None = None
        self.shards: dict[str, dict[str, Any]] = {}
        self._end = 0
        self._read()

    @property
    def exists(self) -> bool:
        return self._path.exists()

    def _read(self) -> None:
        if self._path.is_symlink() or (self.exists and not self._path.is_file()):
            raise DestinationError(
                f"{self._path}: is no file of molae's; remove it, or choose another folder"
            )
        if not self.exists:
            return
        try:
            raw = self._path.read_bytes()
        except OSError as error:
            raise DestinationError(
                f"{self._path}: cannot be read: {error.strerror or error}; check the disk and run "
                "the same command again"
            ) from error
        for line in raw.splitlines(keepends=True):
            entry = _parse(line)
            if entry is None or not (_is_header if self.header is None else _is_shard)(entry):
                break  # torn by a crash, or damaged: what it stood for is done again
            self._end += len(line)
            if self.header is None:
                self.header = entry
            else:
                self.shards[entry["file"]] = entry

    def start(self, header: Mapping[str, Any]) -> None:
        """Begin a new journal."""
        write_text_atomic(self._path, json.dumps(header) + "\n")
        self.header, self.shards, self._end = dict(header), {}, self._path.stat().st_size

    def add(self, entry: Mapping[str, Any]) -> None:
        """Record a finished shard, durably."""
        entry = {**entry, "check": _check(entry)}
        line = (json.dumps(entry) + "\n").encode()
        try:
            with open(self._path, "r+b", buffering=0) as file:
                file.truncate(self._end)
                file.seek(self._end)
                write_all(file.fileno(), line)
                os.fsync(file.fileno())
        except OSError as error:
            raise destination_error(error, self._path, self._end + len(line)) from error
        self._end += len(line)
        self.shards[entry["file"]] = dict(entry)

    def verify(self) -> Iterator[tuple[str, bool]]:
        """(file, whether it is still as recorded) of each finished shard."""
        for name, entry in self.shards.items():
            path = self._folder / name
            same = _is_complete(entry) and not path.is_symlink() and path.is_file()
            same = same and path.stat().st_size == entry["bytes"]
            yield name, same and file_sha256(path) == entry["sha256"]

    def forget(self, file: str) -> None:
        """Take a shard as not done."""
        del self.shards[file]

    def remove(self) -> None:
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            raise destination_error(error, self._path, 0) from error


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        entry = parse_json(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _is_header(entry: Mapping[str, Any]) -> bool:
    return is_names(entry.get("files", []))


def _is_shard(entry: Mapping[str, Any]) -> bool:
    """Whether a line is of a shard; those lie in the folder itself, and nothing else is read."""
    return isinstance(entry.get("file"), str) and _PLAIN.fullmatch(entry["file"]) is not None


def _is_complete(entry: Mapping[str, Any]) -> bool:
    """Whether a line says all that a finished shard's does."""
    kinds = {"bytes": int, "sha256": str, "inputs": dict, "rows": list}
    said = {name: value for name, value in entry.items() if name != "check"}
    return (
        entry.get("check") == _check(said)
        and all(isinstance(entry.get(name), kind) for name, kind in kinds.items())
        and all(is_row(row) for row in entry["rows"])
        and ("worker" not in entry or is_worker(entry["worker"]))
    )


def _check(entry: Mapping[str, Any]) -> str:
    """Tells a line of which a bit has turned: what it says goes into the result."""
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()[:16]


def is_names(value: Any) -> bool:
    """Whether it is a list of texts."""
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differences(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    prefix: str = "",
    words: tuple[str, str] = ("then", "now"),
) -> list[str]:
    """Where two headers differ, as short texts: 'settings.size: 0.75 then, 0.5 now'."""
    found = []
    for key in [*old, *(key for key in new if key not in old)]:
        was, now = old.get(key), new.get(key)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            found += differences(was, now, f"{prefix}{key}.", words)
        elif was != now:
            found.append(f"{prefix}{key}: {was!r} {words[0]}, {now!r} {words[1]}")
    return found
