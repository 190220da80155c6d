"""The table of the case 'distill'."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["distill"]

Result = Mapping[str, Any]
Table = Callable[[Sequence[str], Sequence[Sequence[str]]], str]


def distill(found: Result, table: Table) -> str:
    """A line for each layer."""
    names = [
        "layer, size", "experts", "ranks", "molae, steps/s", "torch, steps/s", "faster",
        "of peak (torch)", "torch's forms, steps/s",
    ]  # fmt: skip
    cells = []
    for row in found["rows"]:
        best, against = row["best"], row["against"]
        rates = {name: 1 / times["median_s"] for name, times in row["times"].items()}
        cells.append(
            [
                f"{row['shape']}, {row['size']:g}",
                f"{row['K']} of {row['E']}, {row['F']}×{row['D']}",
                ", ".join(str(rank) for rank in row["ranks"].values()),
                _rate(rates["molae"]),
                f"{_rate(rates[best])} ({best})",
                f"**{against['ratio']:.2f}×** "
                f"({against['ratio_low']:.2f}–{against['ratio_high']:.2f})",
                f"{row['peak_share']['molae']:.0%} ({row['peak_share'][best]:.0%})",
                ", ".join(f"{name} {_rate(rates[name])}" for name in rates if name != "molae"),
            ]
        )
    reached = sum(row["reached"] for row in found["rows"])
    apart = max(max(row["apart"].values()) for row in found["rows"])
    note = (
        f"Steps of {found['batch']:,} tokens of a layer's distillation, float32: forward, backward "
        "and AdamW; medians. Of peak: operations of its products over time, over the pace of a big "
        "product in the same rounds. After a run the factors of all were within "
        f"{apart:.1e} of the way that they had gone. Goal: {found['goal']:g} times torch's, "
        f"reached in {reached} of {len(found['rows'])} rows."
    )
    return f"{note}\n\n{table(names, cells)}"


def _rate(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.2f}"
