"""Rows of a comparison that are done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["Found", "Rows"]

Found = dict[str, Any]


class Rows:
    """Rows that are done, kept in a file: a run of hours may be cut off."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[Found] = json.loads(path.read_text()) if path.exists() else []

    def find(self, name: str, size: float) -> Found | None:
        return next((r for r in self._rows if (r["name"], r["size"]) == (name, size)), None)

    def add(self, row: Found) -> None:
        self._rows.append(row)
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(self._rows))
        part.replace(self._path)
