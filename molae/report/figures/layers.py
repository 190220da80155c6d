"""Sizes, errors and times over the layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from molae.convert import Report, TypeRow
from molae.report.facts import by_layer, calibrated, kinds_of, layer_errors
from molae.report.figures.common import LOOKS, card, errors_over_layers, over_layers
from molae.report.markup import Markup, table
from molae.report.svg import (
    Part,
    Series,
    bars,
    part_legend,
    stacked_columns,
)
from molae.report.units import percent, short, size_text, time_text, whole

__all__ = ["answer_errors", "layer_seconds", "output_errors", "shares", "sizes", "weight_errors"]

#: Shares of numbers that differ by less are called the same.
EVEN = 0.02


def sizes(report: Report) -> Markup:
    """Numbers before and after, by what they belong to."""
    both = report.plan["before"], report.plan["after"]

    def of_kind(kind: str) -> list[float]:
        return [sum(own["numbers"][kind].values()) - own["numbers"][kind]["perm"] for own in both]

    parts = [Part(LOOKS[kind][1], LOOKS[kind][0], of_kind(kind)) for kind in LOOKS]
    known = [sum(part.values[n] for part in parts) for n in range(2)]
    extra = [own["expert_numbers"] - known[n] for n, own in enumerate(both)]
    if any(extra):
        parts.append(Part("in compressed experts' place", "light", extra))
    parts.append(Part("all but the routed experts", "other", [o["other_numbers"] for o in both]))
    title = "Numbers of the model, before and after"
    return card(
        title,
        "Experts by matrix type, and what molae does not touch: attention, embeddings, routers, "
        "shared experts.",
        bars(
            "sizes",
            title,
            f"{whole(both[0]['total_numbers'])} before, {whole(both[1]['total_numbers'])} after.",
            ("before", "after"),
            parts,
            lambda value: size_text(value, ""),
        ),
        part_legend((part.name, part.style) for part in parts),
        table(None, ("", "before", "after"), [
            (part.name, *(whole(value) for value in part.values)) for part in parts
        ]),
    )  # fmt: skip


def _by_type(
    report: Report,
    key: str,
    title: str,
    text: str,
    value: Callable[[TypeRow], float | None],
    *,
    y_label: str,
    guides: Sequence[float] = (),
    show: Callable[[float], str] = "{:.4f}".format,
    y_text: Callable[[float], str] = short,
) -> Markup | None:
    """A line a type over the layers."""
    layers = by_layer(report)
    series = []
    for kind in kinds_of(report):
        style, name, mark = LOOKS[kind]
        found = [
            (layer, own)
            for layer, rows in layers.items()
            if kind in rows and (own := value(rows[kind])) is not None
        ]
        tips = [f"layer {layer}, {name}: {show(own)}" for layer, own in found]
        if found:
            series.append(Series(name, style, [(float(a), b) for a, b in found], mark, tips))
    if not series:
        return None
    return over_layers(
        key, title, text, series, y_label=y_label, guides=guides, show=show, y_text=y_text
    )


def shares(report: Report) -> Markup | None:
    """What each layer and type keeps of its numbers, where they do not keep the same."""
    kept = [row.stored_numbers / row.dense_numbers for row in report.rows]
    if not kept or max(kept) - min(kept) < EVEN:
        return None
    reached = report.plan["size_reached"]
    return _by_type(
        report,
        "shares",
        "What each layer keeps",
        f"Share of the numbers of each matrix type that is stored. Dotted: all experts, "
        f"{percent(reached)}.",
        lambda row: row.stored_numbers / row.dense_numbers,
        y_label="share kept",
        guides=(reached,),
        show=percent,
        y_text="{:.0%}".format,
    )


def weight_errors(report: Report) -> Markup | None:
    return _by_type(
        report,
        "weights",
        "Error of the weights",
        "Relative Frobenius error of what is stored, by layer. It counts every direction alike, "
        "whether a text uses it or not.",
        lambda row: row.error,
        y_label="relative error",
    )


def output_errors(report: Report) -> Markup | None:
    return _by_type(
        report,
        "outputs",
        "Error of the outputs",
        "Of what each matrix answers to the calibration text, by routing weight, to first order "
        "and before any refit.",
        lambda row: row.output_error,
        y_label="relative error",
    )


def answer_errors(report: Report) -> Markup | None:
    """Of whole layers, before and after the refits."""
    found = layer_errors(report)
    if not found:
        return None
    pairs = list(found.items())
    return errors_over_layers(
        "answers",
        "Error of the layers' answers",
        "Relative error of what each layer as a whole answers to the calibration text, before "
        "and after its private factors were refitted.",
        [
            ("factored", "dim", "square", [(n, both[0]) for n, both in pairs], True),
            ("refitted", "down", "circle", [(n, both[1]) for n, both in pairs], False),
        ],
    )


def layer_seconds(report: Report) -> Markup | None:
    """What each layer took. With a text all types of a layer are fitted at once."""
    every: Sequence[Any] = (*report.rows, *report.compressed, *report.healed)
    layers = sorted({row.layer for row in every})
    if not layers:
        return None
    parts: list[Part] = []
    own = by_layer(report)

    def spent(found: Mapping[int, float]) -> list[float]:
        return [found.get(layer, 0.0) for layer in layers]

    if calibrated(report):
        whole_layer = {n: sum(row.seconds for row in rows.values()) for n, rows in own.items()}
        if whole_layer:
            name = "fit and training" if report.healed else "fit"
            parts.append(Part(name, "gate", spent(whole_layer)))
    else:
        for kind in kinds_of(report):
            style, name, _ = LOOKS[kind]
            found = {n: rows[kind].seconds for n, rows in own.items() if kind in rows}
            parts.append(Part(name, style, spent(found)))
    if report.compressed:
        found = {row.layer: row.seconds for row in report.compressed}
        parts.append(Part("compressed experts", "light", spent(found)))
    if report.healed and not report.rows:  # of a conversion it is in the fit
        found = {row.layer: row.seconds for row in report.healed}
        parts.append(Part("training", "gate", spent(found)))
    title = "Time by layer"
    sums = [sum(part.values) for part in parts]
    total = sum(sums)
    slowest = max(range(len(layers)), key=lambda n: sum(part.values[n] for part in parts))
    rest = report.seconds - total
    rows = [(part.name, time_text(value)) for part, value in zip(parts, sums, strict=True)]
    if rest > 0:
        rows.append(("reading, writing, all else", time_text(rest)))
    rows.append(("in all", time_text(report.seconds)))
    text = f"In all {time_text(report.seconds)}; {time_text(total)} of that in the layers"
    if calibrated(report) and report.kind == "convert":
        text += ". What was measured first, to decide groups and ranks, is not in it"
    return card(
        title,
        f"{text}. Layer {layers[slowest]} took longest.",
        stacked_columns(
            "seconds",
            title,
            f"{len(layers)} layers, {time_text(total)} together.",
            layers,
            parts,
            x_label="layer",
            y_label="seconds",
            text=time_text,
        ),
        part_legend((part.name, part.style) for part in parts),
        table(None, ("step", "time"), rows),
    )
