"""The table of the case 'active'."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["active"]

Result = Mapping[str, Any]
Table = Callable[[Sequence[str], Sequence[Sequence[str]]], str]


def active(found: Result, table: Table) -> str:
    """A line for each layer and number of tokens."""
    names = [
        "layer, type, tokens", "all K", "plain K − n", "vectors", "narrow", "vectors over plain",
        "left of all K", "took of all K", "of peak",
    ]  # fmt: skip
    cells = []
    for row in found["rows"]:
        work = row["work"]
        over, took, left = row["overhead"], row["took"], row["left"]
        cells.append(
            [
                f"{row['shape']}, {row['dtype']}, {row['N']}",
                *(
                    _time(work[name]["median_s"])
                    for name in ("all K", "plain", "vectors", "narrow")
                ),
                f"**{over['ratio']:.3f}×** ({over['ratio_low']:.2f}–{over['ratio_high']:.2f})",
                f"{left:.3f} ({row['bound']})",
                f"{took['ratio']:.3f}",
                f"{row['peak_share']:.0%}" if "peak_share" in row else "",
            ]
        )
    reached = {
        goal: f"{sum(row['goals'][goal] for row in found['rows'])} of {len(found['rows'])}"
        for goal in ("overhead", "saved")
    }
    note = (
        "A layer of experts of which a token has K, with the last n = K / 2 compressed; medians. "
        f"Narrow: experts of 1/{found['narrow']} in their place. Left: share of the bytes (few "
        "tokens: of the weights that a call reads) or of the operations that plain top-(K − n) "
        "needs. Took: share of the time that vectors need. Goals: vectors within 1.05 of plain in "
        f"{reached['overhead']} rows, what took within 1.10 of what is left in {reached['saved']}."
    )
    return f"{note}\n\n{table(names, cells)}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f} ms" if seconds < 0.1 else f"{seconds * 1e3:,.0f} ms"
