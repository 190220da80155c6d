"""What is made of the rows' scores, and a check of it. Apart, so that tables need no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from benchmarks.heal.rows import ROWS

__all__ = ["check", "find", "taken_back"]

Result = Mapping[str, Any]

#: To which a figure and what it is made of agree.
CLOSE = 1e-9


def find(result: Result, name: str, size: float) -> Mapping[str, Any] | None:
    """A row; the original's own, which have no size, are there at every one."""
    size = size if ROWS[name].sized else 1.0
    return next((r for r in result["rows"] if (r["name"], r["size"]) == (name, size)), None)


def taken_back(before: float, after: float) -> float | None:
    """Share of the rise before that is gone after; None where there was none."""
    return (before - after) / before if before > 0 else None


def check(result: Result) -> None:
    """See that the figures are made of each other.

    Raises
    ------
    ArithmeticError
        A perplexity is not its loss's, a rise not that of its perplexity, a share not that of
        its rises, or rows that begin with the same steps do not name the same costs; the row is
        named.
    """
    costs: dict[tuple[float, tuple[str, ...]], Any] = {}
    for row in result["rows"]:
        own, where = ROWS[row["name"]], f"{row['name']} at {row['size']:g}"
        if "loss" not in row:
            continue
        expected: dict[str, float | None] = {"perplexity": math.exp(row["loss"])}
        for rise, other in (("rise", "original"), ("rise_tuned", "original-tuned")):
            if rise in row:
                base = find(result, other, row["size"])
                if base is None:
                    raise ArithmeticError(f"{where}: {rise} over a row that is not there")
                expected[rise] = math.expm1(row["loss"] - base["loss"])
        if "taken_back" in row:
            before = find(result, own.before, row["size"])
            if before is None:
                raise ArithmeticError(f"{where}: heals a row that is not there")
            expected["taken_back"] = taken_back(before["rise"], row["rise"])
        for name, value in expected.items():
            if not _same(row[name], value):
                raise ArithmeticError(f"{where}: {name} is {row[name]}, should be {value}")
        if tuple(step["step"] for step in row["steps"]) != own.steps:
            raise ArithmeticError(f"{where}: made by other steps than its name says")
        for n, step in enumerate(row["steps"], 1):
            if costs.setdefault((row["size"], own.steps[:n]), step) != step:
                raise ArithmeticError(f"{where}: {step['step']} is another than in other rows")


def _same(found: float | None, expected: float | None) -> bool:
    if found is None or expected is None:
        return found is expected
    return math.isclose(found, expected, rel_tol=CLOSE, abs_tol=CLOSE)
