"""Charts as SVG, drawn from numbers: narrow enough for a phone, styled by the page."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from molae.report.markup import Markup, join, swatch_list, tag
from molae.report.units import short

__all__ = [
    "Bins",
    "Part",
    "Series",
    "bars",
    "heatmap",
    "line_chart",
    "line_legend",
    "part_legend",
    "stacked_columns",
]

#: Width of every chart in its own units, which a phone shows at four fifths.
WIDTH = 420
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 28, 40

#: Points of a line that are marked one by one, and cells that are drawn one by one, each with
#: its number at the pointer; more of them are lines and bands alone, for the page to stay small.
MARKED, SINGLE = 24, 700

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A line, or dots alone.

    Attributes
    ----------
    name : str
    style : str
        Class that gives the colour.
    points : sequence of (float, float)
    mark : {'circle', 'square', 'triangle', ''}
        So that lines are told apart without colour, too.
    tips : sequence of str
        What each point says at the pointer; may be empty.
    joined : bool
    dashed : bool
    """

    name: str
    style: str
    points: Sequence[Point]
    mark: str = "circle"
    tips: Sequence[str] = ()
    joined: bool = True
    dashed: bool = False

    @property
    def finite(self) -> list[tuple[Point, str]]:
        tips = self.tips or [""] * len(self.points)
        return [
            (point, tip)
            for point, tip in zip(self.points, tips, strict=True)
            if all(map(math.isfinite, point))
        ]


@dataclass(frozen=True)
class Part:
    """One colour of stacked bars: a value for each bar."""

    name: str
    style: str
    values: Sequence[float]


@dataclass(frozen=True)
class Bins:
    """Ranges of values, each with a class and a name; `edges` lie between them."""

    edges: Sequence[float]
    styles: Sequence[str]
    names: Sequence[str]

    def at(self, value: float) -> int:
        return bisect.bisect_right(self.edges, value)

    def legend(self) -> Markup:
        return part_legend(zip(self.names, self.styles, strict=True))


class Scale:
    """From values to places; of logarithms where `log`."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False):
        self._of = math.log10 if log else float
        self.low, self.high = self._of(low), self._of(high)
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        span = (self.high - self.low) or 1.0
        at = min(max((self._of(value) - self.low) / span, 0.0), 1.0)
        return self.start + at * (self.end - self.start)


def at(value: float) -> str:
    """A coordinate, to a tenth."""
    return f"{value:.1f}".removesuffix(".0")


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers from at most `low` to at least `high`."""
    span = high - low
    if not (math.isfinite(span) and span > 0):
        return [low, low + 1.0]
    size = 10 ** math.floor(math.log10(span / about))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if span / (size * m) <= about * 1.2)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten around positive values."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [10.0**n for n in range(first, max(last, first + 1) + 1)]


def whole_ticks(values: Sequence[int], about: int = 8) -> list[int]:
    """Some of the numbers of layers, evenly apart."""
    step = max(1, -(-len(values) // about))
    return list(values[::step])


def drawing(key: str, title: str, desc: str, height: float, *children: object) -> Markup:
    """An SVG with a name and a description for those who do not see it."""
    return tag(
        "svg",
        tag("title", title, id=f"{key}-t"),
        tag("desc", desc, id=f"{key}-d"),
        *children,
        viewBox=f"0 0 {WIDTH} {at(height)}",
        role="img",
        aria_labelledby=f"{key}-t {key}-d",
    )


# ------------------------------------------------------------------------ lines


def line_chart(
    key: str,
    title: str,
    desc: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    x_ticks: Sequence[float] | None = None,
    top: float | None = None,
    log_x: bool = False,
    log_y: bool = False,
    guides: Sequence[float] = (),
    x_text: Callable[[float], str] = short,
    y_text: Callable[[float], str] = short,
    height: float = 250,
) -> Markup:
    """Lines and dots over numbers. The vertical axis starts at 0, unless it is logarithmic;
    `guides` are levels to compare with."""
    every = [point for own in series for point, _ in own.finite]
    xs = [x for x, _ in every] or [0.0]
    ys = [y for _, y in every] + list(guides) or [0.0]
    if log_y:
        rows = decades(min(ys), max(ys))
    else:
        rows = ticks(min(0.0, *ys), max(ys) if top is None else max(top, *ys))
    if log_x:
        columns: Sequence[float] = decades(min(xs), max(xs))
        low, high = columns[0], columns[-1]
    else:
        columns = ticks(min(xs), max(xs), 5) if x_ticks is None else x_ticks
        low, high = min(*xs, *columns), max(*xs, *columns)
        if x_ticks is not None:  # room beside the first and the last layer
            gap = max((high - low) * 0.03, 0.25)
            low, high = low - gap, high + gap
    x = Scale(low, high, LEFT, WIDTH - RIGHT, log_x)
    y = Scale(rows[0], rows[-1], height - BOTTOM, TOP, log_y)
    return drawing(
        key,
        title,
        desc,
        height,
        _grid(x, y, columns, rows, x_label, y_label, height, x_text, y_text),
        *(tag("path", class_="guide", d=f"M{LEFT} {at(y(v))}H{WIDTH - RIGHT}") for v in guides),
        *(_line(own, x, y) for own in series),
    )


def _grid(
    x: Scale,
    y: Scale,
    columns: Sequence[float],
    rows: Sequence[float],
    x_label: str,
    y_label: str,
    height: float,
    x_text: Callable[[float], str],
    y_text: Callable[[float], str],
) -> Markup:
    lines = "".join(f"M{LEFT} {at(y(row))}H{WIDTH - RIGHT}" for row in rows)
    return tag(
        "g",
        tag("path", class_="grid", d=lines),
        *(
            tag("text", y_text(row), x=LEFT - 6, y=at(y(row) + 4), text_anchor="end")
            for row in rows
        ),
        *(
            tag("text", x_text(column), x=at(x(column)), y=at(height - BOTTOM + 17),
                text_anchor="middle")
            for column in columns
        ),
        tag("text", x_label, x=at((LEFT + WIDTH - RIGHT) / 2), y=at(height - 4),
            text_anchor="middle", class_="label"),
        tag("text", y_label, x=4, y=12, class_="label"),
        class_="axis",
        aria_hidden="true",
    )  # fmt: skip


def _line(own: Series, x: Scale, y: Scale) -> Markup:
    found = [((x(a), y(b)), tip) for (a, b), tip in own.finite]
    parts: list[Markup] = []
    if own.joined and len(found) > 1:
        d = "M" + "L".join(f"{at(a)} {at(b)}" for (a, b), _ in found)
        parts.append(tag("path", class_="line dashed" if own.dashed else "line", d=d))
    if own.mark and len(found) <= MARKED:
        parts += [_mark(own.mark, a, b, tip) for (a, b), tip in found]
    elif own.mark == "triangle":
        d = "".join(f"M{at(a)} {at(b - 3)}l3 5.4h-6z" for (a, b), _ in found)
        parts.append(tag("path", class_="dot", d=d))
    elif own.mark:
        d = "".join(f"M{at(a)} {at(b)}h0" for (a, b), _ in found)
        parts.append(tag("path", class_=f"dots {own.mark}", d=d))
    return tag("g", *parts, class_=own.style)


def _mark(shape: str, a: float, b: float, tip: str = "") -> Markup:
    inner = [tag("title", tip)] if tip else []
    if shape == "square":
        return tag("rect", *inner, x=at(a - 2.7), y=at(b - 2.7), width=5.4, height=5.4)
    if shape == "triangle":
        return tag("path", *inner, class_="dot", d=f"M{at(a)} {at(b - 3.6)}l3.5 6.2h-7z")
    return tag("circle", *inner, cx=at(a), cy=at(b), r=2.9)


def line_legend(series: Iterable[Series]) -> Markup:
    """Name, colour and mark of each line."""
    entries = []
    for own in series:
        line = tag("path", class_="line dashed" if own.dashed else "line", d="M0 6H26")
        entries.append(
            (
                tag(
                    "svg",
                    line if own.joined else None,
                    _mark(own.mark, 13, 6) if own.mark else None,
                    class_=f"key {own.style}",
                    viewBox="0 0 26 12",
                    aria_hidden="true",
                ),
                own.name,
            )
        )
    return swatch_list(entries)


# ------------------------------------------------------------------------- bars


def part_legend(parts: Iterable[tuple[str, str]]) -> Markup:
    """Names and classes of areas."""
    return swatch_list(
        (
            tag(
                "svg",
                tag("rect", width=12, height=12, rx=2),
                class_=f"key area {style}",
                viewBox="0 0 12 12",
                aria_hidden="true",
            ),
            name,
        )
        for name, style in parts
    )


def bars(
    key: str,
    title: str,
    desc: str,
    names: Sequence[str],
    parts: Sequence[Part],
    text: Callable[[float], str],
) -> Markup:
    """Bars that lie, one a name, of several parts each; their sums stand at the right."""
    row, bar, left, right = 34.0, 20.0, 62.0, 74.0
    totals = [sum(part.values[n] for part in parts) for n in range(len(names))]
    scale = Scale(0.0, max(totals) or 1.0, 0.0, WIDTH - left - right)
    drawn: list[Markup] = []
    for n, name in enumerate(names):
        top, along = n * row + 6, left
        drawn.append(tag("text", name, x=left - 8, y=at(top + 14.5), text_anchor="end"))
        for part in parts:
            width = scale(part.values[n])
            if width > 0:
                tip = tag("title", f"{name}, {part.name}: {text(part.values[n])}")
                drawn.append(
                    tag("rect", tip, x=at(along), y=at(top), width=at(max(width, 0.3)),
                        height=at(bar), class_=f"area {part.style}")
                )  # fmt: skip
            along += width
        drawn.append(
            tag("text", text(totals[n]), x=at(along + 7), y=at(top + 14.5), class_="strong")
        )
    return drawing(key, title, desc, len(names) * row + 2, *drawn)


def stacked_columns(
    key: str,
    title: str,
    desc: str,
    names: Sequence[int],
    parts: Sequence[Part],
    *,
    x_label: str,
    y_label: str,
    text: Callable[[float], str],
    height: float = 216,
) -> Markup:
    """Bars that stand, one a layer, of several parts each."""
    totals = [sum(part.values[n] for part in parts) for n in range(len(names))]
    rows = ticks(0.0, max([*totals, 0.0]) or 1.0)
    y = Scale(rows[0], rows[-1], height - BOTTOM, TOP)
    step = (WIDTH - RIGHT - LEFT) / max(len(names), 1)
    width = min(step * 0.78, 44.0)
    x = Scale(0, max(len(names), 1), LEFT, WIDTH - RIGHT)
    place = {name: n for n, name in enumerate(names)}
    drawn: list[Markup] = []
    for n, name in enumerate(names):
        below = 0.0
        for part in parts:
            value = part.values[n]
            low, high = y(below), y(below + value)
            if low - high > 0.05:
                drawn.append(
                    tag(
                        "rect",
                        tag("title", f"layer {name}, {part.name}: {text(value)}"),
                        x=at(x(n + 0.5) - width / 2),
                        y=at(high),
                        width=at(width),
                        height=at(low - high),
                        class_=f"area {part.style}",
                    )
                )
            below += value
    return drawing(
        key,
        title,
        desc,
        height,
        _grid(
            Scale(-0.5, len(names) - 0.5, LEFT, WIDTH - RIGHT),
            y,
            [place[name] for name in whole_ticks(names)],
            rows,
            x_label,
            y_label,
            height,
            lambda n: str(names[int(n)]),
            short,
        ),
        *drawn,
    )


# --------------------------------------------------------------------- heat maps


def heatmap(
    key: str,
    title: str,
    desc: str,
    rows: Sequence[tuple[str, Sequence[float | None]]],
    bins: Bins,
    *,
    x_label: str,
    tip: Callable[[str, int, float], str],
    column_names: Sequence[str] | None = None,
) -> Markup:
    """Cells by value: one by one where they are few, else merged into bands of one colour.

    `tip` gives what a single cell says at the pointer, from its row's name, column and value.
    """
    most = max((len(values) for _, values in rows), default=0) or 1
    left, top = 40.0, 4.0
    cell_w = (WIDTH - left - RIGHT) / most
    cell_h = min(max(190.0 / len(rows), 4.5), 34.0) if rows else 10.0
    bottom = top + cell_h * len(rows)
    apart = max(1, math.ceil(12 / cell_h))
    single = sum(len(values) for _, values in rows) <= SINGLE
    cells = _cells(rows, bins, left, top, cell_w, cell_h, tip) if single else None
    bands = None if single else _bands(rows, bins, left, top, cell_w, cell_h)
    names = column_names or [str(n) for n in range(most)]
    step = max(1, -(-most // 8))
    return drawing(
        key,
        title,
        desc,
        bottom + 34,
        tag(
            "g",
            *(
                tag("text", name, x=left - 6, y=at(top + (n + 0.5) * cell_h + 4), text_anchor="end")
                for n, (name, _) in enumerate(rows)
                if n % apart == 0
            ),
            *(
                tag("text", names[n], x=at(left + (n + 0.5) * cell_w), y=at(bottom + 13),
                    text_anchor="middle")
                for n in range(0, min(most, len(names)), step)
            ),
            tag("text", x_label, x=at((left + WIDTH - RIGHT) / 2), y=at(bottom + 30),
                text_anchor="middle", class_="label"),
            class_="axis",
            aria_hidden="true",
        ),
        cells,
        bands,
    )  # fmt: skip


def _cells(
    rows: Sequence[tuple[str, Sequence[float | None]]],
    bins: Bins,
    left: float,
    top: float,
    cell_w: float,
    cell_h: float,
    tip: Callable[[str, int, float], str],
) -> Markup:
    gap = 1.0 if cell_w > 6 else 0.3
    return join(
        tag(
            "rect",
            tag("title", tip(name, column, value)),
            x=at(left + column * cell_w),
            y=at(top + n * cell_h),
            width=at(cell_w - gap),
            height=at(cell_h - 1),
            class_=f"area {bins.styles[bins.at(value)]}",
        )
        for n, (name, values) in enumerate(rows)
        for column, value in enumerate(values)
        if value is not None
    )


def _bands(
    rows: Sequence[tuple[str, Sequence[float | None]]],
    bins: Bins,
    left: float,
    top: float,
    cell_w: float,
    cell_h: float,
) -> Markup:
    """One path a colour, of horizontal strokes as high as a cell, in units of cells."""
    paths: list[list[str]] = [[] for _ in bins.styles]
    for n, (_, values) in enumerate(rows):
        column = 0
        while column < len(values):
            value, start = values[column], column
            if value is None:
                column += 1
                continue
            own = bins.at(value)
            while column < len(values):
                value = values[column]
                if value is None or bins.at(value) != own:
                    break
                column += 1
            paths[own].append(f"M{start} {n}h{column - start}")
    place = f"translate({at(left)} {at(top + cell_h / 2)}) scale({cell_w:.5g} {cell_h:.5g})"
    return tag(
        "g",
        *(
            tag("path", class_=f"band {style}", d="".join(path))
            for style, path in zip(bins.styles, paths, strict=True)
            if path
        ),
        transform=place,
    )
