"""What the charts of a report's page have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from molae.report.markup import Markup, table, tag
from molae.report.svg import Series, line_chart, line_legend, part_legend, whole_ticks
from molae.report.units import short

__all__ = [
    "DEPTHS",
    "LOOKS",
    "MOST_COLUMNS",
    "Depth",
    "card",
    "column_names",
    "columns",
    "errors_over_layers",
    "extremes",
    "mean",
    "over_layers",
    "spread_table",
    "together",
]

#: Class, short name and mark of each matrix type.
LOOKS = {
    "gate_proj": ("gate", "gate", "circle"),
    "up_proj": ("up", "up", "square"),
    "down_proj": ("down", "down", "triangle"),
}

#: Columns of a heat map; what has more is put together.
MOST_COLUMNS = 64

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


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def extremes(series: Sequence[Series], show: Callable[[float], str]) -> str:
    """What is to be seen, in words."""
    parts = []
    for own in series:
        if own.points:
            ys = [y for _, y in own.points]
            parts.append(f"{own.name}: {show(min(ys))} to {show(max(ys))}")
    return "; ".join(parts) + "."


def spread_table(
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


def together(count: int) -> int:
    """How many neighbours share a column."""
    return max(1, -(-count // MOST_COLUMNS))


def column_names(count: int) -> list[str]:
    return [str(first) for first in range(0, count, together(count))]


def columns(values: Sequence[float | None]) -> list[float | None]:
    """At most `MOST_COLUMNS`: neighbours are put together by their mean."""
    each = together(len(values))
    if each <= 1:
        return list(values)
    found: list[float | None] = []
    for start in range(0, len(values), each):
        known = [value for value in values[start : start + each] if value is not None]
        found.append(sum(known) / len(known) if known else None)
    return found


def over_layers(
    key: str,
    title: str,
    text: str,
    series: Sequence[Series],
    *,
    y_label: str = "relative error",
    guides: Sequence[float] = (),
    show: Callable[[float], str] = "{:.4f}".format,
    y_text: Callable[[float], str] = short,
) -> Markup:
    """A figure of lines over the layers; `show` is how a value is told in the table."""
    numbers = sorted({int(x) for own in series for x, _ in own.points})
    known = [{int(x): y for x, y in own.points} for own in series]
    rows = [(n, *(show(own[n]) if n in own else "" for own in known)) for n in numbers]
    return card(
        title,
        text,
        line_chart(
            key,
            title,
            extremes(series, show),
            series,
            x_label="layer",
            y_label=y_label,
            x_ticks=whole_ticks(numbers),
            guides=guides,
            y_text=y_text,
        ),
        line_legend(series),
        table(None, ("layer", *(own.name for own in series)), rows),
    )


def errors_over_layers(
    key: str,
    title: str,
    text: str,
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
    return over_layers(key, title, text, series)


class Depth:
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
