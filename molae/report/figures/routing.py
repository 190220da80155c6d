"""How many tokens the experts have read."""

from __future__ import annotations

import math
from collections.abc import Sequence

from molae.convert import Report
from molae.report.figures.common import MOST_COLUMNS, card, column_names, columns, spread_table
from molae.report.markup import Markup
from molae.report.svg import Bins, heatmap

__all__ = ["load"]

#: Tokens of an expert over the mean of its layer.
LOADS = Bins(
    (0.25, 0.5, 0.8, 1.25, 2.0, 4.0),
    ("d0", "d1", "d2", "d3", "d4", "d5", "d6"),
    ("under 1/4", "1/4–1/2", "1/2–0.8", "about even", "1.25–2", "2–4 times", "over 4"),
)


def load(report: Report) -> Markup | None:
    """Tokens of the calibration text by expert."""
    tokens = {row.layer: row.tokens for row in report.rows if row.tokens}
    tokens = dict(sorted(tokens.items()))
    if not tokens:
        return None
    E = max(len(own) for own in tokens.values())
    ordered = E > MOST_COLUMNS
    rows = []
    for layer, own in tokens.items():
        even = sum(own) / len(own) or 1.0
        shown = sorted(own, reverse=True) if ordered else own
        rows.append((str(layer), columns([count / even for count in shown])))
    title = "Tokens by expert"
    text = "What the routers sent to each expert of the calibration text, over an even share."
    if ordered:
        text += " The busiest come first in each row, and neighbours are put together."

    def tip(layer: str, column: int, value: float) -> str:
        return f"layer {layer}, expert {column}: {tokens[int(layer)][column]:,} tokens"

    least = min(min(own) for own in tokens.values())
    most = max(max(own) for own in tokens.values())
    return card(
        title,
        text,
        heatmap(
            "load",
            title,
            f"{len(tokens)} layers of {E} experts; {least:,} to {most:,} tokens an expert.",
            rows,
            LOADS,
            x_label="expert, by use" if ordered else "expert",
            tip=tip,
            column_names=column_names(E),
        ),
        LOADS.legend(),
        spread_table(
            list(tokens.items()),
            "by expert",
            ("without any", *(own.count(0) for own in tokens.values())),
            ("as even as", *(f"{_as_even_as(own):.1f} experts" for own in tokens.values())),
        ),
    )


def _as_even_as(tokens: Sequence[int]) -> float:
    """So many experts with even shares would have the same entropy."""
    total = sum(tokens) or 1
    return math.exp(-sum(n / total * math.log(n / total) for n in tokens if n > 0))
