"""HTML from Python: the one place where text becomes markup, and is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

__all__ = ["Markup", "escape", "join", "swatch_list", "table", "tag"]

#: Lone surrogates cannot be written; controls and marks that turn the direction of text can hide
#: what a name says.
_UNFIT = dict.fromkeys(
    [
        *range(0x09), 0x0B, 0x0C, *range(0x0E, 0x20), *range(0x7F, 0xA0),
        *range(0x200E, 0x2010), *range(0x202A, 0x202F), *range(0x2066, 0x206A),
        *range(0xD800, 0xE000), 0xFFFE, 0xFFFF,
    ],
    "\ufffd",
)  # fmt: skip

#: Elements that have nothing inside, and no end tag.
_VOID = {"meta", "br", "col", "hr"}

#: Of SVG, written as one tag where they have nothing inside.
_SHAPES = {"path", "rect", "circle", "line"}


class Markup(str):
    """Text that is HTML already; everything else is escaped."""

    __slots__ = ()


def escape(value: object) -> Markup:
    """Any text as HTML that shows it, in an element or in a quoted attribute."""
    if isinstance(value, Markup):
        return value
    return Markup(html.escape(str(value).translate(_UNFIT), quote=True))


def join(children: Iterable[object], between: str = "") -> Markup:
    """Several pieces as one; None is left out."""
    return Markup(between.join(escape(child) for child in children if child is not None))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element. Attributes that are None are left out; `class_` is class, `stroke_width` is
    stroke-width.

    Examples
    --------
    >>> str(tag("p", "a < b", class_="note"))
    '<p class="note">a &lt; b</p>'
    """
    parts = [
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    ]
    start = f"<{name}{''.join(parts)}"
    if name in _VOID:
        return Markup(f"{start}>")
    inner = join(children)
    if not inner and name in _SHAPES:
        return Markup(f"{start}/>")
    return Markup(f"{start}>{inner}</{name}>")


def table(
    caption: str | None,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    texts: Sequence[int] = (0,),
) -> Markup:
    """A table whose first column names its rows; columns that are not in `texts` are numbers."""

    def kind(at: int) -> str | None:
        return "l" if at in texts else None

    head = tag("tr", *(tag("th", c, scope="col", class_=kind(at)) for at, c in enumerate(columns)))
    body = join(
        tag(
            "tr",
            tag("th", row[0], scope="row"),
            *(tag("td", cell, class_=kind(at)) for at, cell in enumerate(row[1:], 1)),
        )
        for row in rows
    )
    return tag(
        "div",
        tag(
            "table",
            None if caption is None else tag("caption", caption),
            tag("thead", head),
            tag("tbody", body),
        ),
        class_="wide",
        tabindex="0",  # it may scroll sideways, and so must be reached by keys
        role="region",
        aria_label=caption or "Table of " + ", ".join(c for c in columns if c),
    )


def swatch_list(entries: Iterable[tuple[Markup, str]]) -> Markup:
    """A legend: what each mark stands for."""
    return tag(
        "ul", *(tag("li", mark, tag("span", text)) for mark, text in entries), class_="legend"
    )
