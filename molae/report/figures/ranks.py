"""Ranks of the groups, and where the size was spent."""

from __future__ import annotations

import math
from collections.abc import Sequence

from molae.convert import Report
from molae.report.facts import by_layer, calibrated, kinds_of
from molae.report.figures.common import (
    LOOKS,
    MOST_COLUMNS,
    card,
    column_names,
    columns,
    spread_table,
    together,
)
from molae.report.markup import Markup, table
from molae.report.svg import Bins, Series, heatmap, line_chart, line_legend
from molae.report.units import percent

__all__ = ["rank_maps", "sensitivity"]


def rank_maps(report: Report) -> list[Markup]:
    """A heat map of ranks for each type, where they differ."""
    found = {
        kind: {r for row in report.rows if row.kind == kind for r in row.ranks if r is not None}
        for kind in kinds_of(report)
    }
    unequal = {kind: ranks for kind, ranks in found.items() if len(ranks) > 1}
    if not unequal:
        return []
    bins = _rank_bins(sorted(set().union(*unequal.values())))
    cards = []
    for kind in unequal:
        style, name, _ = LOOKS[kind]
        rows = [(n, own[kind]) for n, own in by_layer(report).items() if kind in own]
        values = [(str(n), columns(row.ranks)) for n, row in rows]
        most = max(len(row.ranks) for _, row in rows)
        order = ", the busiest experts first" if calibrated(report) else ""
        merged = "" if most <= MOST_COLUMNS else f", {together(most)} together"
        title = f"Ranks of {name}"
        flat = [rank for _, row in rows for rank in row.ranks if rank is not None]
        cards.append(
            card(
                title,
                f"By layer and group of experts{order}{merged}. Blank: as in the source.",
                heatmap(
                    f"ranks-{style}",
                    title,
                    f"From {min(flat, default=0)} to {max(flat, default=0)}, mean "
                    f"{sum(flat) / max(len(flat), 1):.1f}.",
                    values,
                    bins,
                    x_label="group",
                    tip=lambda layer, column, value: f"layer {layer}, group {column}: {value:.4g}",
                    column_names=column_names(most),
                ),
                bins.legend(),
                spread_table([(n, row.ranks) for n, row in rows], "ranks, group by group"),
            )
        )
    return cards


def _rank_bins(ranks: Sequence[int]) -> Bins:
    """At most seven ranges with whole ends."""
    low, high = ranks[0], ranks[-1]
    if len(ranks) <= 7:
        step = 6 / (len(ranks) - 1)
        styles = [f"q{round(n * step)}" for n in range(len(ranks))]
        return Bins([float(rank) for rank in ranks[1:]], styles, [str(rank) for rank in ranks])
    edges = [low + (high + 1 - low) * n / 7 for n in range(1, 7)]
    whole_edges = [math.ceil(edge) for edge in edges]
    starts, ends = [low, *whole_edges], [*(edge - 1 for edge in whole_edges), high]
    names = [str(a) if a == b else f"{a}–{b}" for a, b in zip(starts, ends, strict=True)]
    return Bins([float(e) for e in whole_edges], [f"q{n}" for n in range(7)], names)


def sensitivity(report: Report) -> Markup | None:
    """What is kept where, over how much the model minds."""
    series, rows, tried = [], [], 0.0
    for kind in kinds_of(report):
        style, name, mark = LOOKS[kind]
        points, tips = [], []
        for layer, own in by_layer(report).items():
            row = own.get(kind)
            if row is None or not row.effects:
                continue
            tried, effect = row.effects[len(row.effects) // 2]
            kept = row.stored_numbers / row.dense_numbers
            cells = [f"{nats:.3g}" for _, nats in row.effects]
            seen = "" if row.foreseen is None else f"{row.foreseen:.3g}"
            rows.append((f"{layer} {name}", percent(kept), *cells, seen))
            if effect > 0:
                points.append((effect, kept))
                tips.append(f"layer {layer}, {name}: {effect:.3g} nats a token, {percent(kept)}")
        if points:
            series.append(Series(name, style, points, mark, tips, joined=False))
    if not series:
        return None
    first = next(row for row in report.rows if row.effects)
    heads = [f"nats at {size:g}" for size, _ in first.effects or ()]
    title = "Where the size was spent"
    return card(
        title,
        f"Each mark is one type of one layer: to the right, how far the model's answers moved "
        f"while it alone was at size {tried:g}; upward, what it keeps.",
        line_chart(
            "sensitivity",
            title,
            f"{len(rows)} types of layers; effects in nats a token, on a logarithmic scale.",
            series,
            x_label="nats a token, alone at that size",
            y_label="share kept",
            log_x=True,
            y_text="{:.0%}".format,
        ),
        line_legend(series),
        table(None, ("layer, type", "kept", *heads, "foreseen"), rows),
    )
