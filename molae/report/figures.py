"""The charts of a report's page, each with its table; None where there is nothing to draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from molae.convert import Report, TypeRow
from molae.report.facts import by_layer, calibrated, kinds_of, layer_errors
from molae.report.markup import Markup, table, tag
from molae.report.svg import (
    Bins,
    Part,
    Series,
    bars,
    heatmap,
    line_chart,
    line_legend,
    part_legend,
    stacked_columns,
    whole_ticks,
)
from molae.report.units import percent, short, size_text, time_text, whole

__all__ = [
    "answer_errors",
    "compressed_counts",
    "compressed_errors",
    "curves",
    "effective_ranks",
    "healing_curves",
    "healing_ends",
    "layer_seconds",
    "load",
    "output_errors",
    "rank_maps",
    "sensitivity",
    "shares",
    "sizes",
    "weight_errors",
]

#: Class, short name and mark of each matrix type.
LOOKS = {
    "gate_proj": ("gate", "gate", "circle"),
    "up_proj": ("up", "up", "square"),
    "down_proj": ("down", "down", "triangle"),
}

#: Shares of numbers that differ by less are called the same.
EVEN = 0.02

#: Columns of a heat map; what has more is put together.
MOST_COLUMNS = 64

#: Layers from which on a curve has every other of its points.
MANY_LAYERS = 16

#: Colours of layers, early to late.
DEPTHS = ("q2", "q3", "q4", "q5", "q6")


def card(
    title: str, text: str, chart: Markup, legend: Markup | None = None, data: Markup | None = None
) -> Markup:
    """A figure: what it is, how to read it, the chart, and the numbers behind it."""
    return tag(
        "figure",
        tag("figcaption", tag("h3", title), tag("p", text)),
        legend,
        chart,
        tag("details", tag("summary", "Numbers"), data) if data is not None else None,
        class_="card",
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


# ------------------------------------------------------------------------- sizes


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


# ------------------------------------------------------------- by layer and type


def _by_type(
    report: Report,
    key: str,
    title: str,
    text: str,
    value: Callable[[TypeRow], float | None],
    *,
    y_label: str,
    top: float | None = None,
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
    numbers = sorted({int(x) for own in series for x, _ in own.points})
    known = [{int(x): y for x, y in own.points} for own in series]
    rows = [(n, *(show(own[n]) if n in own else "" for own in known)) for n in numbers]
    return card(
        title,
        text,
        line_chart(
            key,
            title,
            _extremes(series, show),
            series,
            x_label="layer",
            y_label=y_label,
            x_ticks=whole_ticks(numbers),
            top=top,
            guides=guides,
            y_text=y_text,
        ),
        line_legend(series),
        table(None, ("layer", *(own.name for own in series)), rows),
    )


def _extremes(series: Sequence[Series], show: Callable[[float], str]) -> str:
    """What is to be seen, in words."""
    parts = []
    for own in series:
        if own.points:
            ys = [y for _, y in own.points]
            parts.append(f"{own.name}: {show(min(ys))} to {show(max(ys))}")
    return "; ".join(parts) + "."


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
    return _lines_by_layer(
        "answers",
        "Error of the layers' answers",
        "Relative error of what each layer as a whole answers to the calibration text, before "
        "and after its private factors were refitted.",
        list(found),
        [
            ("factored", "dim", "square", [(n, both[0]) for n, both in pairs], True),
            ("refitted", "down", "circle", [(n, both[1]) for n, both in pairs], False),
        ],
    )


def _lines_by_layer(
    key: str,
    title: str,
    text: str,
    layers: Sequence[int],
    lines: Sequence[tuple[str, str, str, Sequence[tuple[int, float]], bool]],
) -> Markup:
    """Errors of layers at several moments: name, class, mark, points, dashed."""
    series = [
        Series(
            name,
            style,
            [(float(n), y) for n, y in points],
            mark,
            [f"layer {n}, {name}: {y:.4f}" for n, y in points],
            dashed=dashed,
        )
        for name, style, mark, points, dashed in lines
    ]
    known = [dict(points) for _, _, _, points, _ in lines]
    return card(
        title,
        text,
        line_chart(
            key,
            title,
            _extremes(series, "{:.4f}".format),
            series,
            x_label="layer",
            y_label="relative error",
            x_ticks=whole_ticks(layers),
        ),
        line_legend(series),
        table(
            None,
            ("layer", *(name for name, *_ in lines)),
            [(n, *(f"{own[n]:.4f}" if n in own else "" for own in known)) for n in layers],
        ),
    )


# ------------------------------------------------------------------------- ranks


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
        values = [(str(n), _columns(row.ranks)) for n, row in rows]
        most = max(len(row.ranks) for _, row in rows)
        order = ", the busiest experts first" if calibrated(report) else ""
        merged = "" if most <= MOST_COLUMNS else f", {_together(most)} together"
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
                    column_names=_column_names(most),
                ),
                bins.legend(),
                _spread_table([(n, row.ranks) for n, row in rows], "ranks, group by group"),
            )
        )
    return cards


def _spread_table(
    rows: Sequence[tuple[int, Sequence[int | None]]], all_of_them: str, *more: Sequence[object]
) -> Markup:
    """How values lie in each layer, and where they are few all of them; None is dense.

    `more` are further columns: a name, and a cell for each layer.
    """
    few = max(len(values) for _, values in rows) <= MOST_COLUMNS
    heads = (
        "layer",
        "least",
        "tenth",
        "median",
        "nine tenths",
        "most",
        *(str(own[0]) for own in more),
    )
    cells: list[list[object]] = []
    for at, (layer, values) in enumerate(rows):
        known = sorted(value for value in values if value is not None)
        last = len(known) - 1
        shown = [known[round(last * q)] for q in (0, 0.1, 0.5, 0.9, 1)] if known else [""] * 5
        cells.append(
            [
                layer,
                *(f"{value:,}" if isinstance(value, int) else value for value in shown),
                *(own[1 + at] for own in more),
            ]
        )
        if few:
            cells[-1].append(" ".join("dense" if v is None else str(v) for v in values))
    return table(None, (*heads, all_of_them) if few else heads, cells, texts=(0, len(heads)))


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


def _together(count: int) -> int:
    """How many neighbours share a column."""
    return max(1, -(-count // MOST_COLUMNS))


def _column_names(count: int) -> list[str]:
    return [str(first) for first in range(0, count, _together(count))]


def _columns(values: Sequence[float | None]) -> list[float | None]:
    """At most `MOST_COLUMNS`: neighbours are put together by their mean."""
    each = _together(len(values))
    if each <= 1:
        return list(values)
    found: list[float | None] = []
    for start in range(0, len(values), each):
        known = [value for value in values[start : start + each] if value is not None]
        found.append(sum(known) / len(known) if known else None)
    return found


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


# ----------------------------------------------------------------------- spectra


def curves(report: Report) -> list[Markup]:
    """For each type what error is possible at each rank, a line a layer."""
    cards = []
    for kind in kinds_of(report):
        style, name, _ = LOOKS[kind]
        rows = [(n, own[kind]) for n, own in by_layer(report).items() if kind in own]
        known = [(n, row) for n, row in rows if row.energy_curve]
        if not known:
            continue
        depth = _Depth([n for n, _ in known])
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
        f"{_mean(row.discarded_energy):.4f}",
        f"{_mean(kernel):.1f}" if kernel else "",
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
                kept = _mean([rank for rank in row.ranks if rank is not None])
                found.append((n, _mean(known), kept))
                rows.append((f"{n} {name}", f"{_mean(known):.1f}", f"{kept:.1f}"))
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
            _extremes(series, "{:.1f}".format),
            series,
            x_label="layer",
            y_label="rank",
            x_ticks=whole_ticks(list(layers)),
        ),
        line_legend(series),
        table(None, ("layer, type", "effective rank", "kept"), rows),
    )


class _Depth:
    """Colours of layers, early ones pale."""

    def __init__(self, layers: Sequence[int]) -> None:
        self._layers = list(layers)
        self._few = len(self._layers) <= len(DEPTHS)

    def style(self, layer: int) -> str:
        n, last = self._layers.index(layer), max(len(self._layers) - 1, 1)
        if self._few:
            return DEPTHS[round(n * (len(DEPTHS) - 1) / last)]
        return DEPTHS[n * len(DEPTHS) // len(self._layers)]

    def legend(self) -> Markup:
        spans: dict[str, list[int]] = {}
        for layer in self._layers:
            spans.setdefault(self.style(layer), []).append(layer)
        return part_legend(
            (f"layer {own[0]}" if len(own) == 1 else f"layers {own[0]}–{own[-1]}", style)
            for style, own in spans.items()
        )


# ----------------------------------------------------------------------- routing

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
        rows.append((str(layer), _columns([count / even for count in shown])))
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
            column_names=_column_names(E),
        ),
        LOADS.legend(),
        _spread_table(
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


# ------------------------------------------------------------ compressed, healed


def compressed_errors(report: Report) -> Markup | None:
    rows = sorted(report.compressed, key=lambda row: row.layer)
    if not rows:
        return None
    moments = ("without them", "linear part fitted", "all fitted")
    looks = (("dim", "square", True), ("up", "triangle", True), ("light", "circle", False))
    return _lines_by_layer(
        "compressed",
        "What acts in their place",
        "Relative error of the layers' answers on the calibration text: when the last experts of "
        "a token do not run, and with what was fitted to act for them.",
        [row.layer for row in rows],
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
    depth = _Depth([row.layer for row in rows])
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
    return _lines_by_layer(
        "healed",
        "Before and after training",
        "Relative error of each layer's answers on the calibration text.",
        [row.layer for row in rows],
        [
            ("before", "dim", "square", [(row.layer, row.layer_error[0]) for row in rows], True),
            ("after", "gate", "circle", [(row.layer, row.layer_error[-1]) for row in rows], False),
        ],
    )


# -------------------------------------------------------------------------- time


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
