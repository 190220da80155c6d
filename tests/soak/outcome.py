"""What every part of the soak finds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Findings"]


@dataclass
class Findings:
    """What must not be, and how long it took; each part adds counts of its own."""

    faults: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))
