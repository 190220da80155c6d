"""Numbers as a person reads them."""

from __future__ import annotations

import math

__all__ = ["percent", "short", "size_text", "time_text", "whole"]


def size_text(count: float, unit: str = "B") -> str:
    """Decimal units, as disks are sold: 12.9 GB."""
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {prefix}{unit}"
    return f"{count:.0f} {unit}".rstrip()


def time_text(seconds: float) -> str:
    """'40 s', '12 min', '3.2 h'."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def whole(count: float) -> str:
    """1,234,567."""
    return f"{count:,.0f}"


def percent(share: float) -> str:
    """0.4978 is 49.8%; small shares keep two digits."""
    return f"{share:.1%}" if abs(share) >= 0.01 or share == 0 else f"{share * 100:.2g}%"


def short(value: float) -> str:
    """For an axis: 0, 0.25, 40, 1.5k, 2e-05."""
    if not math.isfinite(value):
        return "–"
    if abs(value) >= 1000:
        return size_text(value, "").replace(" ", "") if value > 0 else f"{value:g}"
    return f"{value:.3g}"
