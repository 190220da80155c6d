"""Compressed experts, and layers that were trained."""

from __future__ import annotations

from molae.convert import Report
from molae.report.figures.common import DEPTHS, Depth, card, errors_over_layers
from molae.report.markup import Markup, table
from molae.report.svg import Part, Series, line_chart, part_legend, stacked_columns
from molae.report.units import time_text, whole

__all__ = ["compressed_counts", "compressed_errors", "healing_curves", "healing_ends"]


def compressed_errors(report: Report) -> Markup | None:
    rows = sorted(report.compressed, key=lambda row: row.layer)
    if not rows:
        return None
    moments = ("without them", "linear part fitted", "all fitted")
    looks = (("dim", "square", True), ("up", "triangle", True), ("light", "circle", False))
    return errors_over_layers(
        "compressed",
        "What acts in their place",
        "Relative error of the layers' answers on the calibration text: when the last experts of "
        "a token do not run, and with what was fitted to act for them.",
        [
            (name, style, mark, [(row.layer, row.layer_error[at]) for row in rows], dashed)
            for at, (name, (style, mark, dashed)) in enumerate(zip(moments, looks, strict=True))
        ],
    )


def compressed_counts(report: Report) -> Markup | None:
    rows = sorted(report.compressed, key=lambda row: row.layer)
    if not rows:
        return None
    K = report.plan["letters"]["K"]
    numbers = [row.layer for row in rows]
    counts = [float(row.num_compressed) for row in rows]
    title = "How many do not run"
    return card(
        title,
        f"Of the {K} experts of a token, by layer; more where the model misses them less.",
        stacked_columns(
            "counts",
            title,
            f"{min(counts):.0f} to {max(counts):.0f} of {K}.",
            numbers,
            (
                Part("run", "other", [K - n for n in counts]),
                Part("do not run", "light", counts),
            ),
            x_label="layer",
            y_label="experts of a token",
            text=whole,
        ),
        part_legend((("run", "other"), ("do not run", "light"))),
        table(
            None,
            ("layer", "do not run", "tokens of the fit", "time"),
            [
                (r.layer, r.num_compressed, whole(r.tokens), time_text(r.seconds)) for r in rows
            ],
        ),
    )  # fmt: skip


def healing_curves(report: Report) -> Markup | None:
    """How the error on the tokens held out fell."""
    rows = sorted(report.healed, key=lambda row: row.layer)
    if not any(row.losses for row in rows):
        return None
    depth = Depth([row.layer for row in rows])
    few = len(rows) <= len(DEPTHS)
    series = [
        Series(
            f"layer {row.layer}",
            depth.style(row.layer),
            [(step, loss) for step, loss in row.losses],
            "circle" if few else "",
            [f"layer {row.layer}, step {step:.0f}: {loss:.4f}" for step, loss in row.losses],
        )
        for row in rows
        if row.losses
    ]
    title = "How training went"
    best = [
        (row.layer, row.losses[0][1], min(y for _, y in row.losses)) for row in rows if row.losses
    ]
    return card(
        title,
        "Relative error of each layer's answers on the tokens held out, by steps done. The best "
        "weights of each are kept.",
        line_chart(
            "healing",
            title,
            f"{len(rows)} layers; from {max(a for _, a, _ in best):.4f} at the start of the worst "
            f"to {min(b for _, _, b in best):.4f} at the best of all.",
            series,
            x_label="steps",
            y_label="relative error",
        ),
        depth.legend(),
        table(
            None,
            ("layer", "held out: start", "best", "steps", "time"),
            [
                (
                    row.layer,
                    f"{row.losses[0][1]:.4f}" if row.losses else "",
                    f"{min(y for _, y in row.losses):.4f}" if row.losses else "",
                    row.steps,
                    time_text(row.seconds),
                )
                for row in rows
            ],
        ),
    )


def healing_ends(report: Report) -> Markup | None:
    rows = sorted(report.healed, key=lambda row: row.layer)
    if not rows:
        return None
    return errors_over_layers(
        "healed",
        "Before and after training",
        "Relative error of each layer's answers on the calibration text.",
        [
            ("before", "dim", "square", [(row.layer, row.layer_error[0]) for row in rows], True),
            ("after", "gate", "circle", [(row.layer, row.layer_error[-1]) for row in rows], False),
        ],
    )
