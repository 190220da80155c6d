"""What error is possible at each rank."""

from __future__ import annotations

import math

from molae.convert import Report, TypeRow
from molae.report.facts import by_layer, calibrated, kinds_of
from molae.report.figures.common import LOOKS, Depth, card, extremes, mean
from molae.report.markup import Markup, table
from molae.report.svg import Series, line_chart, line_legend, whole_ticks

__all__ = ["curves", "effective_ranks"]

#: Layers from which on a curve has every other of its points.
MANY_LAYERS = 16


def curves(report: Report) -> list[Markup]:
    """For each type what error is possible at each rank, a line a layer."""
    cards = []
    for kind in kinds_of(report):
        style, name, _ = LOOKS[kind]
        rows = [(n, own[kind]) for n, own in by_layer(report).items() if kind in own]
        known = [(n, row) for n, row in rows if row.energy_curve]
        if not known:
            continue
        depth = Depth([n for n, _ in known])
        series = []
        for n, row in known:
            steps = row.energy_curve or []
            points = [(i / (len(steps) - 1), math.sqrt(max(e, 0.0))) for i, e in enumerate(steps)]
            points = points[:: 2 if len(known) > MANY_LAYERS else 1]
            series.append(Series(f"layer {n}", depth.style(n), points, ""))
        title = f"Error by rank, {name}"
        half = [own.points[len(own.points) // 2][1] for own in series]
        metric = ", as the calibration text uses them" if calibrated(report) else ""
        cards.append(
            card(
                title,
                f"The least relative error of groups at each share of their full rank{metric}.",
                line_chart(
                    f"curve-{style}",
                    title,
                    f"At half the rank {min(half):.3f} to {max(half):.3f}.",
                    series,
                    x_label="share of the full rank",
                    y_label="relative error",
                    x_ticks=(0, 0.25, 0.5, 0.75, 1),
                    top=1.0,
                ),
                depth.legend(),
                table(
                    None,
                    ("layer", "at 1/4", "at 1/2", "at 3/4", "discarded energy", "common kernel"),
                    [_curve_row(n, row) for n, row in known],
                ),
            )
        )
    return cards


def _curve_row(layer: int, row: TypeRow) -> tuple[object, ...]:
    steps = row.energy_curve or [0.0]
    quarters = [math.sqrt(max(steps[(len(steps) - 1) * n // 4], 0.0)) for n in (1, 2, 3)]
    kernel = [dim for dim in row.kernel_dim if dim is not None]
    return (
        layer,
        *(f"{error:.3f}" for error in quarters),
        f"{mean(row.discarded_energy):.4f}",
        f"{mean(kernel):.1f}" if kernel else "",
    )


def effective_ranks(report: Report) -> Markup | None:
    """How many directions count, beside how many are kept."""
    series, rows = [], []
    layers = by_layer(report)
    for kind in kinds_of(report):
        style, name, mark = LOOKS[kind]
        found = []
        for n, own in layers.items():
            row = own.get(kind)
            known = [] if row is None else [e for e in row.effective_rank if e is not None]
            if row is not None and known:
                kept = mean([rank for rank in row.ranks if rank is not None])
                found.append((n, mean(known), kept))
                rows.append((f"{n} {name}", f"{mean(known):.1f}", f"{kept:.1f}"))
        if found:
            tips = [f"layer {n}, {name}: {e:.1f} count, {r:.1f} kept" for n, e, r in found]
            series += [
                Series(f"{name}, count", style, [(n, e) for n, e, _ in found], mark, tips),
                Series(f"{name}, kept", style, [(n, r) for n, _, r in found], "", dashed=True),
            ]
    if not series:
        return None
    title = "Directions that count, and that are kept"
    return card(
        title,
        "Mean over the groups: the effective rank, by the entropy of the singular values, and the "
        "rank that is stored.",
        line_chart(
            "effective",
            title,
            extremes(series, "{:.1f}".format),
            series,
            x_label="layer",
            y_label="rank",
            x_ticks=whole_ticks(list(layers)),
        ),
        line_legend(series),
        table(None, ("layer, type", "effective rank", "kept"), rows),
    )
